"""What a run or a bundle is, for people and as JSON. Needs the base packages only."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from faqd.bundle import MANIFEST, float32_in_words, floats_in_words, load_bundle
from faqd.deploy.onnx_model.scan import read_scanned
from faqd.errors import UserError
from faqd.fidelity import in_words
from faqd.files import read_json
from faqd.proof import Proof, proofs_of, standing_of
from faqd.quant import Target

RUN_RECORD = "run.json"


def inspect_folder(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """(facts, lines to print) of a bundle or a run; UserError where `folder` is neither."""
    if (folder / MANIFEST).is_file():
        return _bundle(folder)
    if (folder / RUN_RECORD).is_file():
        record: dict[str, Any] = read_json(folder / RUN_RECORD)
        return record, _run_lines(folder, record)
    raise UserError(f"{folder}: neither a run nor a bundle.")


def _bundle(folder: Path) -> tuple[dict[str, Any], list[str]]:
    bundle = load_bundle(folder)
    for name in bundle.onnx_files():
        read_scanned(folder / name)
    facts = bundle.manifest
    size = facts["size"]
    lines = [
        f"bundle {bundle.name} ({bundle.kind}), made by faqd {facts['faqd']}",
        f"weights {facts['weight_bits']} bits, activations {facts['act_bits']} bits, target {facts['target']}",
        f"size: {size['float32_bytes'] / 1024:.0f} KiB as float32, {size['int8_bytes'] / 1024:.0f} KiB as int8, "
        f"{size['packed_bytes'] / 1024:.0f} KiB packed",
        f"input {facts['input']['shape']}, outputs {[o['shape'] for o in facts['outputs']]}",
        "",
        f"{'layer':34} {'operator':10} {'weights':12} {'inputs':14} shape",
    ]
    for row in facts["layers"]:
        shape = "x".join(map(str, row["weight_shape"]))
        lines.append(f"{row['name']:34} {row['operator']:10} {row['weights']:12} {row['inputs']:14} {shape}")
    lines += ["", *_choices(facts)]
    reasons = [part["reason"] for part in facts.get("float32_parts", [])]
    lines += [*floats_in_words(facts), *float32_in_words(reasons)]
    for name, record in facts["files"].items():
        lines.append(f"{name:30} {record['bytes']:>10} bytes  sha256 {record['sha256'][:16]}")
    standing = standing_of(bundle)
    kept = standing["fidelity"]
    lines += [*_verify_lines(proofs_of(bundle)), *(in_words(kept) if kept else ())]
    return {**facts, **standing}, lines


def _choices(facts: dict[str, Any]) -> Iterator[str]:
    """What was chosen where nothing is trained, and what attention multiplies."""
    if "calibration" in facts:
        tensors = facts.get("equalized", {}).get("tensors", 0)
        ranges = ", asymmetric activations" if facts.get("asymmetric") else ""
        yield f"without training: {facts['calibration']} scales{ranges}, {tensors} tensors equalized"
    if kept := facts.get("kept_float"):
        yield f"kept float: {' '.join(f'--exclude {shlex.quote(each)}' for each in kept['exclude']) or 'nothing'}"
    if facts.get("attention") == "int8":
        yield "attention: queries, keys, values and probabilities in 8 bits"


_SAID = {
    "passed": "passed",
    "missing": "not verified yet",
    "failed": "FAILED",
    "stale": "STALE",
    "elsewhere": "NOT PROVED ON THIS CPU",
}


def _verify_lines(proofs: dict[Target, Proof]) -> list[str]:
    """One for all flavours where the same is to be said of them."""
    told = {
        flavour: _SAID[proof.status] + ("" if proof.status in ("passed", "missing") else f": {proof.complaint}")
        for flavour, proof in proofs.items()
    }
    if len(set(told.values())) == 1:
        return [f"verify: {next(iter(told.values()))}"]
    return [f"verify {flavour}: {text}" for flavour, text in told.items()]


def _run_lines(folder: Path, record: dict[str, Any]) -> list[str]:
    network = record["network"]
    name = network["architecture"] or network.get("module") or network["file"]
    lines = [
        f"{record['kind']} run, made by faqd {record['faqd']}",
        f"network {name}, input {network['channels']} x {network['pixels']}",
        f"data {record['data']['source']}",
    ]
    if record["kind"] == "distill":
        recipe = record["recipe"]
        lines.append(f"weights {recipe['weight_bits']} bits, activations {recipe['act_bits']} bits")
    finished = (folder / "weights.safetensors").is_file()
    losses = ", ".join(f"{name} {value:.4g}" for name, value in record.get("select", {}).items())
    return [*lines, f"finished; on the validation split: {losses}" if finished else "not finished"]
