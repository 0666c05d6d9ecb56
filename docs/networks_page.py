"""docs/networks.md, from results/coverage/: `python docs/networks_page.py` writes it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from faqd.files import read_json

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "networks.md"
RECORD = ROOT / "results" / "coverage" / "coverage.json"
STAGES = ("capture", "prepare", "calibrate", "bundle", "engine")
KINDS = {
    "cnn": "CNN",
    "mobile": "mobile CNN",
    "hybrid": "hybrid",
    "transformer": "transformer, MLP",
    "segmentation": "segmentation",
    "detector": "detector",
    "face": "face",
    "yolo": "YOLO",
}

Networks = dict[str, dict[str, Any]]


def page() -> Iterator[str]:
    record = read_json(RECORD)
    networks: Networks = record["networks"]
    cpu = record["environment"]["cpu"]
    yield from (
        "# Networks that were tried",
        "",
        "Public networks as their packages build them, quantized to 8/8 without training on 16 pictures and exported",
        "as a bundle whose proof holds for both files. Weights are random and calm",
        "([why](../faqd/benchmarks/studies/calm_weights.py)), pictures are made, images are small: this page says",
        "what can be done with a network, and not how accurate it ends. Written by `docs/networks_page.py` from",
        f"[results/coverage](../results/README.md): {len(networks)} networks, faqd {record['versions']['faqd']}, torch",
        f"{record['versions']['torch']}, one thread of {cpu}, which did other work: its seconds are an upper bound.",
        "",
        "| kind | tried | captured | proved bundle | engine | share of products in INT8 | dB behind plain rounding |",
        "|---|---|---|---|---|---|---|",
    )
    for kind, name in KINDS.items():
        some = {key: found for key, found in networks.items() if found["kind"] == kind}
        if some:
            yield _summary(name, some)
    yield _summary("**all**", networks)
    yield from (
        "",
        "Shares are the median and the least. Plain rounding is that of the input of every layer and of its weights",
        "to 8 bits and nothing else; the student rounds more, as TensorRT's kernels want it. The median of what it is",
        "behind in the signal-to-noise ratio to the float network, and the most; below zero it is ahead.",
        "",
        "| network | kind | pixels | INT8 | islands | dB to float (plain) | capture, s | bundle, s | peak MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    )
    for name, found in sorted(networks.items()):
        if _reached(found, "bundle"):
            yield _row(name, found)
    stopped = {name: found for name, found in sorted(networks.items()) if not _reached(found, "bundle")}
    if stopped:
        yield from ("", "## What did not get so far", "")
        yield from (f"- `{name}`: {_sentence(found)}" for name, found in stopped.items())


def _summary(name: str, networks: Networks) -> str:
    counts = [sum(_reached(found, stage) for found in networks.values()) for stage in ("capture", "bundle", "engine")]
    shares = [found["int8_share"] for found in networks.values() if "int8_share" in found]
    behind = sorted(lost for found in networks.values() if (lost := _behind(found)) is not None)
    share = f"{median(shares):.3f} ({min(shares):.3f})" if shares else "–"
    distance = f"{median(behind):.1f} ({behind[-1]:.1f})" if behind else "–"
    return f"| {name} | {len(networks)} | {' | '.join(map(str, counts))} | {share} | {distance} |"


def _row(name: str, found: dict[str, Any]) -> str:
    distance = "–" if found["snr_db"] is None else f"{found['snr_db']:.1f} ({_number(found['plain_db'])})"
    cells = (
        f"`{name}`",
        KINDS[found["kind"]],
        str(found["side"]),
        f"{found['int8_share']:.3f}",
        str(found["islands"]),
        distance,
        f"{found['seconds']['capture']:.1f}",
        f"{found['seconds']['bundle']:.0f}",
        str(found["peak_mib"]["bundle"]),
    )
    return f"| {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _behind(found: dict[str, Any]) -> float | None:
    ours, plain = found.get("snr_db"), found.get("plain_db")
    return None if ours is None or plain is None else float(plain - ours)


def _reached(found: dict[str, Any], stage: str) -> bool:
    return bool(found["reached"]) and STAGES.index(found["reached"]) >= STAGES.index(stage)


def _sentence(found: dict[str, Any]) -> str:
    return str(found.get("sentence", "")).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text("\n".join(page()) + "\n", "utf-8")
