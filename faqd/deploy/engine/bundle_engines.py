"""The engines of a bundle: which of its files are built, and only after its proof."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from faqd.bundle import (
    FLOAT_STUDENT_FP16,
    STUDENT_DEEPSTREAM,
    STUDENT_TENSORRT,
    TEACHER,
    TEACHER_FP16,
    VERIFY,
    Bundle,
    without_fp16_teacher,
)
from faqd.deploy.engine.build import engine_from_onnx
from faqd.deploy.engine.options import BuildOptions
from faqd.deploy.engine.progress import Say
from faqd.deploy.engine.record import engine_name
from faqd.errors import UserError
from faqd.fidelity import rounded
from faqd.files import refuse_unmakeable, sha256
from faqd.proof import fidelity_of, proof_of


def build_bundle(
    bundle: Bundle, *, all: bool, force: bool, options: BuildOptions, say: Say, out: Path | None = None
) -> list[dict[str, Any]]:
    """Build the student's engine, that for DeepStream where its file is there, with `all` those of the float student
    and the teacher too; returns the records.

    What counts is the proof of the TensorRT file: that for onnxruntime on a CPU is another network.

    Both are FP16; a bundle without an FP16 teacher gets an FP32 one, and that is said.

    force: build although verify.json says failed or speaks of other files. UserError (exit code 1) otherwise.
    out: the folder for engines and records instead of the bundle's, where the bench finds them.
    """
    if not bundle.has(STUDENT_TENSORRT):
        raise UserError(
            f"{bundle.folder}: no {STUDENT_TENSORRT} in this bundle. Its student was trained with "
            "--target onnxruntime, whose 8-bit activations do not fit TensorRT's INT8; "
            "train with --target tensorrt to get an engine."
        )
    folder = _writable(bundle, out)
    students = [name for name in (STUDENT_TENSORRT, STUDENT_DEEPSTREAM) if bundle.has(name)]
    names = [*students, *(_baselines(bundle, say) if all else ())]
    verify = _verified(bundle, force, say)
    kept = fidelity_of(bundle).get(STUDENT_TENSORRT)
    if kept is not None:
        proved = "is proved" if verify is not None and verify["passed"] else "is not proved"
        warning = "" if kept["verdict"] == "kept" else "warning: "
        of_teacher = f"of its teacher: {kept['verdict']}, fidelity {rounded(kept['least'])}"
        say(f"{warning}{STUDENT_TENSORRT} {proved}; {of_teacher}.")
    records = []
    for name in names:
        source = bundle.path(name)
        records.append(
            engine_from_onnx(
                source,
                folder / engine_name(name),
                options,
                say,
                sha256=bundle.manifest["files"][name]["sha256"],
                verify=verify,
                fidelity=kept if name in students else None,
                expected_int8=_expected_int8(bundle) if name in students else None,
            )
        )
    return records


def _writable(bundle: Bundle, out: Path | None) -> Path:
    """Where engines go; UserError, before minutes of building, where nothing can be written."""
    if out is not None:
        refuse_unmakeable(out)
        return out
    try:
        refuse_unmakeable(bundle.folder)
    except UserError as error:
        raise UserError(
            f"{bundle.folder}: engines cannot be written beside its files. Give --out FOLDER; for the bench, copy the "
            "bundle to where it can be written."
        ) from error
    return bundle.folder


def _baselines(bundle: Bundle, say: Say) -> list[str]:
    teacher = TEACHER_FP16 if bundle.has(TEACHER_FP16) else TEACHER
    if teacher == TEACHER and bundle.has(TEACHER):
        say(f"warning: {without_fp16_teacher(bundle)}")
    return [name for name in (FLOAT_STUDENT_FP16, teacher) if bundle.has(name)]


def _expected_int8(bundle: Bundle) -> list[str] | None:
    layers = bundle.manifest.get("layers")
    known = [layer for layer in layers or [] if isinstance(layer, dict) and "runs_int8" in layer]
    return [str(layer.get("name")) for layer in known if layer["runs_int8"]] if known else None


def _verified(bundle: Bundle, force: bool, say: Say) -> dict[str, Any] | None:
    """What the records say of verify.json: None where there is none, `complaint` where --force built all the same."""
    path = bundle.folder / VERIFY
    proof = proof_of(bundle, "tensorrt")
    if proof.status == "missing":
        say(f"warning: {proof.complaint}")
        return None
    if proof.complaint is not None:
        if not force:
            raise UserError(f"{path}: {proof.complaint} No engine is built from it without --force.", exit_code=1)
        say(f"warning: {path}: {proof.complaint} Building all the same (--force).")
    return {"file": VERIFY, "sha256": sha256(path), "passed": proof.complaint is None, "complaint": proof.complaint}
