"""What verify.json says of the bundle that it lies in, for whoever builds on a proof or shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from faqd.bundle import MANIFEST, STUDENT_ONNXRUNTIME, STUDENT_TENSORRT, VERIFY, Bundle
from faqd.cpu import cpu_kind
from faqd.fidelity import RECORD
from faqd.files import read_json, sha256
from faqd.quant import Target
from faqd.schema import Each, Many, unprintable, wrong

FORMAT = "faqd-verify"
VERSION = 2
"""2: a verdict for each flavour, and the CPU that onnxruntime ran on."""

STUDENTS: dict[Target, str] = {"tensorrt": STUDENT_TENSORRT, "onnxruntime": STUDENT_ONNXRUNTIME}
"""The file of each flavour that is deployed."""

EQUAL_CODES = 0.9999
"""Least share of all codes on which onnxruntime and the reference agree; no code may differ by more than one."""

_VERDICT = {"passed": bool, "every_cpu": bool, "cpu_kinds": Many(str)}
_FILES = {"onnx_sha256": dict}


Status = Literal["passed", "failed", "stale", "missing", "elsewhere"]
STATUSES: tuple[str, ...] = get_args(Status)


@dataclass(frozen=True)
class Proof:
    """What is proved of one flavour.

    status: stale means that it speaks of other files, elsewhere that it passed on CPUs of another kind, and that this
    one could make other sums of it. complaint: a sentence; None where it passed.
    """

    status: Status
    complaint: str | None


def proof_of(bundle: Bundle, flavour: Target) -> Proof:
    """Of the file of one flavour: what failed in the other says nothing of it."""
    path = bundle.folder / VERIFY
    again = f"run `faqd-deploy verify {bundle.folder}`"
    if not path.is_file():
        return Proof("missing", f"no {VERIFY} in {bundle.folder}; {again} first.")
    verify = read_json(path)
    if isinstance(verify, dict) and verify.get("version") == 1:
        return Proof("stale", f"it is of an earlier faqd, which gave no verdict for each flavour; {again}.")
    if next(wrong(verify, _FILES), None) is not None:
        return Proof("failed", f"not the result of a verification; {again}.")
    here = {name: bundle.manifest["files"][name]["sha256"] for name in bundle.onnx_files()}
    hashes = verify["onnx_sha256"]
    other = [name for name in {**here, **hashes} if hashes.get(name) != here.get(name)]
    if not other and verify.get("manifest_sha256") != sha256(bundle.folder / MANIFEST):
        other = [MANIFEST]
    if other:
        other = [name for name in other if name in here or name == MANIFEST] or ["set of files"]
        return Proof("stale", f"it speaks of another {', '.join(other)} than the one here; {again}.")
    complaint = next(wrong(verify, {"version": float, "flavours": {flavour: _VERDICT}}), None)
    if complaint is not None or verify["version"] != VERSION or unprintable(verify["flavours"]) is not None:
        return Proof("failed", f"not the result of a verification by this faqd; {again}.")
    return _judged(verify["flavours"][flavour], flavour, again)


def _judged(verdict: dict[str, Any], flavour: Target, again: str) -> Proof:
    if not verdict["passed"]:
        return Proof(
            "failed", f"the verification failed for the {flavour} file: export the run again, or see its report."
        )
    if not verdict["every_cpu"] and cpu_kind() not in verdict["cpu_kinds"]:
        seen = " and ".join(verdict["cpu_kinds"]) or "none"
        return Proof(
            "elsewhere",
            f"its sums can saturate on some CPUs, and it was verified on {seen}, not on {cpu_kind()}: {again}.",
        )
    return Proof("passed", None)


def for_manifest(verify: Mapping[str, Any]) -> dict[str, Any]:
    """Of a verification, what the manifest of the bundle is to say: what was found when it was written."""
    verdicts = verify["flavours"].items()
    proof = {flavour: "passed" if verdict["passed"] else "failed" for flavour, verdict in verdicts}
    return {"proof": proof, "fidelity": verify["fidelity"]}


def fidelity_of(bundle: Bundle) -> dict[str, dict[str, Any]]:
    """How much of the teacher each file has kept (`faqd.fidelity`): by verify.json where it speaks of these files, else
    by the manifest, which is of when they were written. Nothing of bundles of before."""
    written: dict[str, dict[str, Any]] = bundle.manifest.get("fidelity", {})
    proofs = proofs_of(bundle).values()
    if not proofs or any(proof.status in ("missing", "stale") for proof in proofs):
        return written
    record = read_json(bundle.folder / VERIFY)
    if next(wrong(record, {"fidelity": Each(RECORD)}), None) is not None or unprintable(record) is not None:
        return written
    found: dict[str, dict[str, Any]] = record["fidelity"]
    return found


def compared_codes(verdict: Mapping[str, Any]) -> dict[str, int]:
    """Of one flavour in verify.json: how many codes onnxruntime and the reference made, how many differ, and by what at
    most."""
    modes = [layer[mode] for layer in verdict["layers"] for mode in ("plain", "optimised") if mode in layer]
    made = [mode for mode in modes if "codes" in mode]
    return {
        "codes": sum(mode["codes"] for mode in made),
        "differing": sum(mode["differing"] for mode in made),
        "largest_difference": max((mode["largest_difference"] for mode in made), default=0),
    }


_CODES = {"codes": float, "differing": float, "largest_difference": float}


def proof_facts(bundle: Bundle) -> dict[str, dict[str, Any]]:
    """For a record, by the file that is deployed: `status`, and the codes that were compared, where verify.json speaks
    of these files and counts them."""
    found: dict[str, dict[str, Any]] = {}
    for flavour, proof in proofs_of(bundle).items():
        counts: dict[str, int | None] = dict.fromkeys(_CODES)
        if proof.status not in ("missing", "stale"):
            verdict = read_json(bundle.folder / VERIFY).get("flavours", {}).get(flavour, {})
            layers = verdict.get("layers") if isinstance(verdict, dict) else None
            if isinstance(layers, list) and layers and all(map(_are_counted, layers)):
                counts |= compared_codes(verdict)
        found[STUDENTS[flavour]] = {"status": proof.status, **counts}
    return found


def _are_counted(layer: Any) -> bool:
    if not isinstance(layer, dict):
        return False
    modes = [layer[mode] for mode in ("plain", "optimised") if mode in layer]
    return all(isinstance(mode, dict) and ("codes" not in mode or not any(wrong(mode, _CODES))) for mode in modes)


def codes_in_words(record: dict[str, Any]) -> str:
    """What a verification that passed has compared."""
    compared = [compared_codes(verdict) for verdict in record["flavours"].values()]
    codes, differing = (sum(each[key] for each in compared) for key in ("codes", "differing"))
    verb = "differs" if differing == 1 else "differ"
    ties = " by one, at ties" if differing else ""
    return f"the files compute the student: {codes:,} quantized values compared, {differing:,} {verb}{ties}"


def standing_of(bundle: Bundle) -> dict[str, Any]:
    """Both for a record: `proof`, a status by flavour, as it is here and now, and `fidelity` by file."""
    return {
        "proof": {flavour: proof.status for flavour, proof in proofs_of(bundle).items()},
        "fidelity": fidelity_of(bundle),
    }


def proofs_of(bundle: Bundle) -> dict[Target, Proof]:
    """Of every flavour that the bundle has."""
    return {flavour: proof_of(bundle, flavour) for flavour, file in STUDENTS.items() if bundle.has(file)}
