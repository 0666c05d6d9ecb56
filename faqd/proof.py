"""What verify.json says of the bundle that it lies in, for whoever builds on a proof or shows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from faqd.bundle import MANIFEST, VERIFY, Bundle
from faqd.files import read_json, sha256


@dataclass(frozen=True)
class Proof:
    """status: stale means that it speaks of other files. complaint: a sentence; None where it passed."""

    status: Literal["passed", "failed", "stale", "missing"]
    complaint: str | None


def proof_of(bundle: Bundle) -> Proof:
    path = bundle.folder / VERIFY
    again = f"run `faqd-deploy verify {bundle.folder}`"
    if not path.is_file():
        return Proof("missing", f"no {VERIFY} in {bundle.folder}; {again} first.")
    verify = read_json(path)
    hashes = verify.get("onnx_sha256") if isinstance(verify, dict) else None
    if not isinstance(hashes, dict):
        return Proof("failed", f"not the result of a verification; {again}.")
    if verify.get("passed") is not True:
        return Proof("failed", "the verification failed: export the run again, or see its report.")
    here = {name: bundle.manifest["files"][name]["sha256"] for name in bundle.onnx_files()}
    other = [name for name in {**here, **hashes} if hashes.get(name) != here.get(name)]
    if not other and verify.get("manifest_sha256") != sha256(bundle.folder / MANIFEST):
        other = [MANIFEST]
    if other:
        other = [name for name in other if name in here or name == MANIFEST] or ["set of files"]
        return Proof("stale", f"it speaks of another {', '.join(other)} than the one here; {again}.")
    return Proof("passed", None)
