"""What the README shows first, from results/: `python docs/worth_page.py` writes its tables and docs/worth.svg."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from faqd.files import read_json

ROOT = Path(__file__).parents[1]
README, PICTURE = ROOT / "README.md", ROOT / "docs" / "worth.svg"
SPEED, TRAINED = ROOT / "results" / "onnxruntime-cpu", ROOT / "results" / "defaults"
CPUS = {
    "x86-avx512-vnni": "AMD EPYC, AVX-512 with VNNI",
    "x86-avx512-vnni-amx": "Intel Xeon, AMX",
    "x86-avx2": "AMD EPYC, AVX2",
}
TIMED = {"resnet18": "ResNet-18, 224 pixels", "resnet20": "ResNet-20, 32 pixels", "mobilenet": "MobileNetV2, 64 pixels"}
JUDGED = {"resnet20": "ResNet-20", "mlperf-resnet8": "ResNet-8 of MLPerf Tiny"}


def page(text: str) -> str:
    return _between("accuracy", accuracy_table(), _between("speed", speed_table(), text))


def speed_table() -> Iterator[str]:
    """How many times as fast as the unquantized student the INT8 file is: median of the rounds, least and most."""
    yield "| batch 1, one thread | " + " | ".join(CPUS.values()) + " |"
    yield "|---|" + "---|" * len(CPUS)
    for network, name in TIMED.items():
        cells = []
        for cpu in CPUS:
            rounds = sorted(a / b for a, b in zip(*_rounds(cpu, network), strict=True))
            cells.append(f"{median(rounds):.2f} × ({rounds[0]:.2f} to {rounds[-1]:.2f})")
        yield f"| {name} | {' | '.join(cells)} |"


def accuracy_table() -> Iterator[str]:
    """Top-1 in %, and how far chance in the choice of test images reaches, with 95 %."""
    yield "| top-1 % on CIFAR-10 | float | 8/8, not trained | 8/8, distilled | 4/4, not trained | 4/4, distilled |"
    yield "|---|---|---|---|---|---|"
    for network, name in JUDGED.items():
        shares = [_top1(network, 8, "teacher"), *(_top1(network, b, kind) for b in (8, 4) for kind in _KINDS)]
        yield f"| {name} | {' | '.join(f'{100 * share:.2f} ± {100 * chance:.2f}' for share, chance in shares)} |"


_KINDS = ("ptq", "distilled")


def picture() -> str:
    float_ms, int8_ms = (median(rounds) for rounds in _rounds("x86-avx512-vnni", "resnet18"))
    shares = [100 * _top1("mlperf-resnet8", 4, kind)[0] for kind in ("teacher", *_KINDS)]
    times = [("float", float_ms, f"{float_ms:.1f} ms"), ("INT8", int8_ms, f"{int8_ms:.1f} ms")]
    names = ("float", "4-bit, not trained", "4-bit, distilled")
    tops = [(name, share, f"{share:.1f} %") for name, share in zip(names, shares, strict=True)]
    return "\n".join(
        (
            '<svg xmlns="http://www.w3.org/2000/svg" width="800" height="130" font-family="sans-serif" font-size="13">',
            *_panel(0, "ResNet-18, 224 pixels: one image on one CPU core", times, 60),
            *_panel(440, "ResNet-8 on CIFAR-10: top-1, without labels", tops, 125),
            "</svg>\n",
        )
    )


def _panel(left: int, title: str, bars: list[tuple[str, float, str]], indent: int) -> Iterator[str]:
    """Bars from zero on, the longest of 180 pixels."""
    largest = max(value for _, value, _ in bars)
    yield f'<text x="{left}" y="18" fill="#6e7781" font-weight="bold">{title}</text>'
    for index, (name, value, said) in enumerate(bars):
        y, width = 34 + 30 * index, 180 * value / largest
        colour = "#8c959f" if name == "float" else "#2da44e" if index == len(bars) - 1 else "#d4a72c"
        yield f'<text x="{left}" y="{y + 14}" fill="#6e7781">{name}</text>'
        yield f'<rect x="{left + indent}" y="{y}" width="{width:.1f}" height="20" fill="{colour}"/>'
        yield f'<text x="{left + indent + width + 8:.1f}" y="{y + 14}" fill="#6e7781">{said}</text>'


def _rounds(cpu: str, network: str) -> tuple[list[float], list[float]]:
    """Round medians in ms at batch 1: of the unquantized student, and of the 8/8 student."""
    entries = read_json(SPEED / f"{cpu}.json")["networks"]
    entry = next(entry for entry in entries if entry["network"] == network and entry["batch"] == 1)
    found = {row["variant"]: row["round_medians_ms"] for row in entry["variants"]}
    return found["float"], found["8/8"]


def _top1(network: str, bits: int, kind: str) -> tuple[float, float]:
    """The share that is right, of the float network or of TensorRT's file, and 1.96 standard errors of it."""
    cell: dict[str, Any] = read_json(TRAINED / f"{network}.json")["cells"][f"{network}-w{bits}a{bits}-s0"]
    share = float(cell[kind]["top1"] if kind == "teacher" else cell[kind]["tensorrt"]["top1"])
    return share, 1.96 * (share * (1 - share) / cell["images"]) ** 0.5


def _between(name: str, lines: Iterator[str], text: str) -> str:
    begin, end = f"<!-- {name}: written by docs/worth_page.py -->\n", f"<!-- {name}: end -->"
    marked = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    made, count = marked.subn(lambda _: begin + "".join(f"{line}\n" for line in lines) + end, text)
    assert count == 1, f"README.md has no place for {name}"
    return made


if __name__ == "__main__":
    README.write_text(page(README.read_text("utf-8")), "utf-8")
    PICTURE.write_text(picture(), "utf-8")
