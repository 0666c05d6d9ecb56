"""Asymmetric students are really built by TensorRT-RTX: layers in INT8, the padding in the kernel in front of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from faqd.deploy.engine.build import engine_from_onnx
from faqd.deploy.engine.options import BuildOptions
from faqd.deploy.export.float16 import float16_from_float32
from faqd.deploy.export.torch_to_onnx import save
from faqd.quantize.config import QuantConfig
from tests.quantize.test_asymmetric import NETWORKS, student_of
from tests.quantize.test_lowering import lowered

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="tensorrt-rtx is not installed (pip install 'faqd[rtx]'): nothing here can build an engine",
)


def built(name: str, folder: Path, *, asymmetric: bool) -> dict[str, Any]:
    _, model = lowered(student_of(name, QuantConfig(asymmetric=asymmetric)), "tensorrt")
    save(float16_from_float32(model), folder / "student.onnx")
    return engine_from_onnx(folder / "student.onnx", folder / "student.engine", BuildOptions(), lambda line: None)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_builder_takes_it_with_layers_in_int8_and_no_kernel_more(name: str, tmp_path: Path) -> None:
    record, usual = (built(name, tmp_path, asymmetric=each) for each in (True, False))
    in_float = [product["node"] for product in record["int8"]["products"] if not product["int8"]]
    assert in_float == (["up.convtranspose"] if name == "transposed" else [])
    assert record["warnings"] == [] and len(record["layers"]) <= len(usual["layers"])
