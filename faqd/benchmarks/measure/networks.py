"""What a run measures: the teacher once, every student, the same unquantized; and what the bundles say of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from faqd.benchmarks.measure.latency import Submission
from faqd.bundle import (
    EVAL,
    FLOAT_STUDENT_FP16,
    FLOATS,
    MANIFEST,
    TEACHER,
    TEACHER_FP16,
    WORTH_INT8,
    Bundle,
    Evaluation,
)
from faqd.errors import UserError
from faqd.files import sha256
from faqd.proof import STUDENTS, proof_facts, proof_of

Array = NDArray[Any]
Role = Literal["teacher", "teacher_fp16", "student", "float"]
"""teacher: the FP32 one, against whose stored outputs all are judged. teacher_fp16: the same on a GPU. float: the
student's graph unquantized, the baseline for speed; its weights are not meant to classify."""


class Network(Protocol):
    facts: dict[str, Any]
    """For the record: `load_ms`, `file_bytes`, `device_memory_bytes`, `auxiliary_streams`; None where unknown."""

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]: ...

    def submission(self, feeds: Mapping[str, Array], slots: int = 1) -> AbstractContextManager[Submission]:
        """slots: queries in flight at most. UserError where the network does not take such arrays."""
        ...

    def layer_times(self, feeds: Mapping[str, Array], runs: int) -> list[tuple[str, str, list[float]]]:
        """Name, kind (int8, float, conversion, other or unknown) and ms in every query of each layer, in order."""
        ...


class Backend(Protocol):
    """What runs the networks: onnxruntime on the CPU, or engines on a GPU."""

    name: str
    files: Mapping[Role, str]
    """The ONNX file that each network is run from, or its engine was built from."""
    facts: dict[str, Any]
    """For the record: `device`, `why`, versions."""
    gpu: str | None
    """Its name, or None where the CPU computes."""
    switches: dict[str, Any]
    """DeviceSwitches, or the same keys with None."""

    def missing(self, bundle: Bundle, role: Role) -> str | None:
        """Why this network cannot be run here and what makes it so, or None."""

    def open(self, bundle: Bundle, role: Role) -> AbstractContextManager[Network]: ...

    def open_engine_file(self, bundle: Bundle) -> AbstractContextManager[Network] | None:
        """The file that an engine is built from, as written, to be judged beside the one that is run; None where that
        is the one, or there is none."""
        ...


@dataclass(frozen=True)
class EvaluationData:
    """What a run judges on. source: `eval.npz`, or what --eval-data named. sha256: of images, labels and teacher."""

    evaluation: Evaluation
    source: str
    sha256: str


def stored_data(bundle: Bundle) -> EvaluationData:
    """The images that the bundle holds."""
    return EvaluationData(bundle.evaluation(), EVAL, bundle.manifest["files"][EVAL]["sha256"])


def check_comparable(bundles: Sequence[Bundle], own_images: bool = False) -> None:
    """UserError where the bundles cannot stand in one table. own_images: not those that they hold are judged on."""
    first = bundles[0]
    for other in bundles[1:]:
        pair = f"{first.folder} and {other.folder}"
        if own_images:
            if _teacher_file(other) != _teacher_file(first):
                raise UserError(f"{pair}: they have different teachers, by which outputs are judged; bench them apart.")
        elif other.manifest["files"][EVAL]["sha256"] != first.manifest["files"][EVAL]["sha256"]:
            raise UserError(
                f"{pair}: their {EVAL} differ (other images, labels or teacher), so their figures cannot stand "
                "in one table; bench them apart, or export both from the same data and teacher."
            )
        if other.preprocess != first.preprocess or other.takes_pixels != first.takes_pixels:
            raise UserError(f"{pair}: they preprocess images differently; bench them apart.")


def _teacher_file(bundle: Bundle) -> str | None:
    """Its checksum: what the teacher was read from, a file of the user's or a run, has another in each."""
    sha256: str | None = bundle.manifest["files"].get(TEACHER, {}).get("sha256")
    return sha256


def entries(bundles: Sequence[Bundle], files: Mapping[Role, str]) -> list[dict[str, Any]]:
    """The teacher once, then every student followed by the same unquantized; equal files are one network.

    The FP32 teacher has no latency where an FP16 one stands beside it.
    """
    first = bundles[0]
    name = str(first.manifest["teacher"]["name"])
    found = [_entry("teacher", 0, name, first, files)]
    if first.has(files.get("teacher_fp16", "")):
        found.append(_entry("teacher_fp16", 0, f"{name} FP16", first, files))
    teacher = found[-1]
    known = {_sha256(first, files[teacher["role"]]): teacher["id"]}
    for index, bundle in enumerate(bundles):
        student = _entry("student", index, bundle.name, bundle, files)
        student |= {"kind": bundle.kind} | {key: bundle.manifest[key] for key in ("weight_bits", "act_bits", "size")}
        found.append(student)
        if not bundle.has(files["float"]):
            continue
        content = _sha256(bundle, files["float"])
        if content not in known:
            known[content] = f"float-{index}"
            found.append(_entry("float", index, f"{bundle.name}, unquantized", bundle, files))
        student["own_float"] = known[content]
    return found


def timed_teacher(networks: Sequence[Mapping[str, Any]]) -> str:
    """The id of the teacher that is run, and that speed-ups are over."""
    return str([network["id"] for network in networks if network["role"].startswith("teacher")][-1])


def _sha256(bundle: Bundle, file: str) -> str | None:
    return bundle.manifest["files"][file]["sha256"] if bundle.has(file) else None


def _entry(role: Role, index: int, name: str, bundle: Bundle, files: Mapping[Role, str]) -> dict[str, Any]:
    bits = 16 if files[role] in (FLOAT_STUDENT_FP16, TEACHER_FP16) else 32
    return {
        "id": role if role.startswith("teacher") else f"{role}-{index}",
        "role": role,
        "bundle": index,
        "name": name,
        "file": files[role],
        "kind": "float",
        "weight_bits": bits,
        "act_bits": bits,
        "file_bytes": bundle.manifest["files"].get(files[role], {}).get("bytes"),
        "size": bundle.manifest["teacher"].get("size") if role == "teacher" else None,
        "own_float": None,
        "loaded": None,
        "accuracy": None,
        "metric": None,
        "metric_difference": None,
        "engine_file": None,
        "latency": [],
        "speed_up": [],
        "layers": None,
        "energy": None,
        "sweep": None,
        "sustained": None,
    }


def feeds_of(bundle: Bundle, data: Evaluation, batch: int) -> dict[str, Array]:
    """Real images, repeated where there are fewer than the batch."""
    images = data.images[np.arange(batch) % len(data.images)]
    return {bundle.manifest["input"]["name"]: bundle.network_input(images)}


def bundle_record(bundle: Bundle, files: Mapping[Role, str]) -> dict[str, Any]:
    """`verify` speaks of the flavour that is run, `proofs` of every file that is deployed. What stays float is there
    where the manifest says it."""
    flavour = next(flavour for flavour, file in STUDENTS.items() if file == files["student"])
    keys = ("name", "kind", "architecture", "weight_bits", "act_bits", "target", "teacher")
    return {
        "folder": str(bundle.folder),
        **{key: bundle.manifest[key] for key in keys},
        "manifest_sha256": sha256(bundle.folder / MANIFEST),
        "verify": proof_of(bundle, flavour).status,
        "proofs": proof_facts(bundle),
        **_floats(bundle.manifest),
    }


def _floats(manifest: Mapping[str, Any]) -> dict[str, Any]:
    if not FLOATS.keys() <= manifest.keys():
        return {}
    return {**{key: manifest[key] for key in FLOATS}, "worth_int8": manifest["int8_share"] >= WORTH_INT8}
