"""A tiny bundle with engine files, and the GPU made of Python that runs them: for the bench on a device."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from faqd.benchmarks.backends import engines
from faqd.bundle import FLOAT_STUDENT, FLOAT_STUDENT_FP16, TEACHER, TEACHER_FP16, write_manifest
from faqd.deploy.cuda import cuda as cuda_module
from faqd.deploy.engine.trt import TensorRT
from tests.fake_gpu import GPU, FakeCuda, FakeNetwork, FakeTensorRT, Io, Mode, fake_gpu
from tests.tiny_bundles import CLASSES, SIDE, make_bundle

MOST = 64
"""The largest batch of these engines."""
LAYERS = [
    {"name": "reformat", "type": "Reformat", "inputs": ["Float"], "outputs": ["Int8"], "int8": False},
    {"name": "conv", "type": "CaskConvolution", "inputs": ["Int8"], "outputs": ["Int8"], "int8": True},
]


def make_engines(folder: Path, *roles: str, fp16_teacher: bool = True, **options: Any) -> Path:
    """roles: of the engines, student alone by default. fp16_teacher: False for a bundle of before."""
    bundle = make_bundle(folder, **options)
    halves = {FLOAT_STUDENT_FP16: FLOAT_STUDENT} | ({TEACHER_FP16: TEACHER} if fp16_teacher else {})
    for half, full in halves.items():  # No engine is built from them here: that they are there is enough.
        (folder / half).write_bytes((folder / full).read_bytes() + b"\0")
    facts = {key: value for key, value in bundle.manifest.items() if key not in ("files", "format", "version", "faqd")}
    write_manifest(folder, facts, dict.fromkeys([*bundle.manifest["files"], *halves], "0" * 64))
    for role in roles or ("student.tensorrt",):
        plan = role.encode()
        (folder / f"{role}.engine").write_bytes(plan)
        record = {
            "format": "faqd-engine",
            "version": 1,
            "engine": {"sha256": hashlib.sha256(plan).hexdigest()},
            "builder": {"name": "tensorrt", "version": "10.13.3"},
            "layers": LAYERS,
        }
        (folder / f"{role}.engine.json").write_text(json.dumps(record))
    return folder


@contextmanager
def gpu(monkeypatch: pytest.MonkeyPatch, **fails: set[str]) -> Iterator[FakeCuda]:
    weights = np.random.default_rng(0).normal(size=(SIDE * SIDE, CLASSES)).astype(np.float32)
    network = FakeNetwork(
        [
            Io("input", Mode.INPUT, (-1, 1, SIDE, SIDE), low=(1, 1, SIDE, SIDE), high=(MOST, 1, SIDE, SIDE)),
            Io("logits", Mode.OUTPUT, (-1, CLASSES)),
        ],
        compute=lambda input: {"logits": input.reshape(len(input), -1) @ weights},
        shapes=lambda input: {"logits": (input[0], CLASSES)},
        **fails,
    )
    with fake_gpu(network, monkeypatch) as cuda, monkeypatch.context() as patch:
        patch.setattr(cuda, "close", lambda: None)  # Several engines share it here.
        patch.setattr(cuda_module, "open_cuda", lambda backend: cuda)
        patch.setattr(cuda_module, "device_or_none", lambda backend=None: (GPU, ""))
        patch.setattr(engines, "installed", lambda: TensorRT("tensorrt", FakeTensorRT(network, cuda)))
        yield cuda
