"""What `export` and `inspect` do with a folder of runs or bundles: all of them, and one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from faqd.bundle import MANIFEST, Bundle, load_bundle
from faqd.errors import UserError
from faqd.files import read_json
from faqd.proof import fidelity_of, proofs_of, standing_of
from faqd.sweep import members, table

RUN_RECORD, RUN_WEIGHTS = "run.json", "weights.safetensors"
Say = Callable[[str], None]


def exported(
    runs: Sequence[Path], out: Path, write: Callable[[Path, Path], Bundle], say: Say
) -> tuple[list[Bundle], list[str]]:
    """A bundle in `out` for every run, by its name, those that are there already among them; and the names of the runs
    of which there is none, each of which was told why. write: makes the bundle of a run in a folder, or raises."""
    made, failed = [], []
    for run in runs:
        target = out / run.name
        if (target / MANIFEST).is_file():
            say(f"{target}: is there already, and stays.")
            made.append(load_bundle(target))
            continue
        try:
            made.append(write(run, target))
        except UserError as error:
            say(f"{run}: no bundle: {error}")
            failed.append(run.name)
    return made, failed


def inspected(folder: Path) -> tuple[list[dict[str, Any]], list[str]] | None:
    """(facts, lines) of a folder of bundles or runs; None where it is none."""
    if bundles := members(folder, MANIFEST):
        loaded = [load_bundle(path) for path in bundles]
        facts = [{"bundle": one.folder.name, **one.manifest, **standing_of(one)} for one in loaded]
        return facts, table([bundle_row(one) for one in loaded])
    if runs := members(folder, RUN_RECORD):
        records = [{"run": path.name, **read_json(path / RUN_RECORD)} for path in runs]
        return records, table([_run_row(path, one) for path, one in zip(runs, records, strict=True)])
    return None


def bundle_row(bundle: Bundle) -> dict[str, str]:
    facts, kept = bundle.manifest, fidelity_of(bundle)
    worst = min(kept.values(), key=lambda each: float(each["least"])) if kept else None
    proofs = {flavour: proof.status for flavour, proof in proofs_of(bundle).items()}
    same = set(proofs.values())
    return {
        "bundle": bundle.folder.name,
        "kind": bundle.kind,
        "w/a": f"{facts['weight_bits']}/{facts['act_bits']}",
        "proof": same.pop() if len(same) == 1 else ", ".join(f"{name} {text}" for name, text in proofs.items()),
        "fidelity": f"{worst['least']:.4f}" if worst else "–",
        "verdict": worst["verdict"] if worst else "–",
        "KiB packed": f"{facts['size']['packed_bytes'] / 1024:.0f}",
    }


def _run_row(path: Path, record: dict[str, Any]) -> dict[str, str]:
    recipe, kept = record["recipe"], record.get("kept") or {}
    bits = f"{recipe['weight_bits']}/{recipe['act_bits']}" if record["kind"] == "distill" else "–"
    losses = ", ".join(f"{name} {value:.4g}" for name, value in record.get("select", {}).items())
    return {
        "run": path.name,
        "kind": record["kind"],
        "w/a": bits,
        "finished": "yes" if (path / RUN_WEIGHTS).is_file() else "no",
        "kept iteration": str(kept.get("iteration", "–")),
        "validation": losses or "–",
    }
