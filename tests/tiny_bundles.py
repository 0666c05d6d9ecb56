"""Tiny bundles with real ONNX files for the tests of the bench."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from faqd.bundle import (
    EVAL,
    FLOAT_STUDENT,
    MANIFEST,
    STUDENT_ONNXRUNTIME,
    TEACHER,
    VERIFY,
    Bundle,
    Evaluation,
    write_manifest,
)
from faqd.cpu import cpu_kind
from faqd.deploy.onnx_model.session import OnnxSession
from faqd.files import sha256, write_json
from faqd.preprocess import Preprocess
from faqd.proof import FORMAT, VERSION

SIDE, CLASSES = 8, 10
PREPROCESS = Preprocess(SIDE, SIDE, (0.5,), (0.25,), channels="grey")


def make_bundle(
    folder: Path,
    name: str = "tiny 8/8",
    *,
    kind: str = "distilled",
    noise: float = 0.02,
    labels: bool = True,
    dense: bool = False,
    images: int = 120,
    seed: int = 0,
    verify: bool | None = True,
) -> Bundle:
    """A bundle whose student is its teacher with `noise` on the weights; equal seeds share data and teacher.

    verify: what verify.json says, None for no file.
    """
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    weights = generator.normal(size=(SIDE * SIDE, CLASSES)).astype(np.float32)
    pixels = generator.integers(0, 256, (images, SIDE, SIDE, 1), dtype=np.uint8)
    student = weights + noise * np.random.default_rng(seed + 1).normal(size=weights.shape).astype(np.float32)
    for file, values in (
        (TEACHER, weights),
        (FLOAT_STUDENT, student * np.float32(1.001)),
        (STUDENT_ONNXRUNTIME, student),
    ):
        (folder / file).write_bytes(network(values, dense))
    outputs = OnnxSession(folder / TEACHER).run({"input": PREPROCESS.normalise(pixels)})
    truth = None
    if labels:
        truth = outputs["logits"].argmax(1).astype(np.int64)
        truth[::10] = (truth[::10] + 1) % CLASSES  # The teacher gets every tenth image wrong.
    Evaluation(pixels, truth, {key: values.astype(np.float32) for key, values in outputs.items()}).save(folder / EVAL)
    teacher_sha256 = sha256(folder / TEACHER)
    classes = [f"class {index}" for index in range(CLASSES)]
    teacher = {"name": "tiny teacher", "sha256": teacher_sha256}
    facts = facts_of(name, kind=kind, classes=classes, teacher=teacher)
    files = (TEACHER, FLOAT_STUDENT, STUDENT_ONNXRUNTIME, EVAL)
    bundle = write_manifest(folder, facts, dict.fromkeys(files, teacher_sha256))
    if verify is not None:
        write_verify(bundle, passed=verify)
    return bundle


def facts_of(name: str, **other: Any) -> dict[str, Any]:
    """What every manifest says; other: facts that are not the usual ones."""
    return {
        "name": name,
        "kind": "ptq",
        "architecture": "linear",
        "weight_bits": 8,
        "act_bits": 8,
        "target": "tensorrt",
        "preprocess": PREPROCESS.to_json(),
        "classes": None,
        "input": {"name": "input", "shape": ["batch", 1, SIDE, SIDE]},
        "outputs": [{"name": "logits", "shape": ["batch", CLASSES]}],
        "layers": [],
        "size": {"float32_bytes": 2560, "int8_bytes": 640, "packed_bytes": 640, "parameters": 640},
        "teacher": {"name": "tiny teacher", "sha256": ""},
        **other,
    }


def write_verify(bundle: Bundle, *, passed: bool = True, **other: Any) -> None:
    """A verify.json that speaks of this bundle. passed: in each flavour. other: entries that are not the usual ones."""
    hashes = {name: bundle.manifest["files"][name]["sha256"] for name in bundle.onnx_files()}
    verdict = {"passed": passed, "every_cpu": True, "cpu_kinds": [cpu_kind()]}
    record = {
        "format": FORMAT,
        "version": VERSION,
        "passed": passed,
        "onnx_sha256": hashes,
        "manifest_sha256": sha256(bundle.folder / MANIFEST),
        "flavours": {"tensorrt": verdict, "onnxruntime": verdict},
    }
    write_json(bundle.folder / VERIFY, record | other)


def network(weights: NDArray[np.float32], dense: bool = False) -> bytes:
    """Flatten and multiply; `dense` gives the input again as an image-shaped output, scaled by the first weight."""
    image: list[str | int | None] = ["batch", 1, SIDE, SIDE]
    if dense:
        nodes = [helper.make_node("Mul", ["input", "weights"], ["map"])]
        outputs = [helper.make_tensor_value_info("map", TensorProto.FLOAT, image)]
        weights = weights[:1, :1].reshape(())
    else:
        nodes = [
            helper.make_node("Flatten", ["input"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
        ]
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, image)],
        outputs,
        [numpy_helper.from_array(np.asarray(weights), "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())
