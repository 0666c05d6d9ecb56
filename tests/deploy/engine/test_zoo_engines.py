"""Every network of the zoo, exported with random weights, is really built by TensorRT-RTX, with each layer in INT8."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from faqd.deploy.engine.build import engine_from_onnx
from faqd.deploy.engine.options import BuildOptions
from faqd.deploy.export.float16 import float16_from_float32
from faqd.deploy.export.torch_to_onnx import onnx_from_deployed, save
from faqd.quantize.calibrate import calibrate
from faqd.quantize.config import QuantConfig
from faqd.quantize.convert import convert
from faqd.quantize.prepare import insert_quantizers
from faqd.train.networks.zoo import ARCHITECTURES, build_architecture
from tests.fixtures.networks import captured, images

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="tensorrt-rtx is not installed (pip install 'faqd[rtx]'): nothing here can build an engine",
)

# Convolutions and matrix products: the depth in the name, and a 1x1 convolution where a stage changes the shape.
ZOO = [
    *((f"resnet{depth}", 32, depth + 2) for depth in (8, 14, 20, 32, 44, 56, 110)),
    ("resnet20-reference", 32, 20 + 2),
    *(("resnet18", pixels, 18 + 3) for pixels in (64, 224)),
    *(("resnet34", pixels, 34 + 3) for pixels in (64, 224)),
]


def test_the_zoo_is_all_here() -> None:
    assert {name for name, _, _ in ZOO} == set(ARCHITECTURES)


@pytest.mark.parametrize(("name", "pixels", "products"), ZOO)
def test_the_builder_takes_it_with_every_layer_in_int8(name: str, pixels: int, products: int, tmp_path: Path) -> None:
    shape = (3, pixels, pixels)
    student = insert_quantizers(
        captured(build_architecture(name, 3, 10, pixels).eval(), shape), QuantConfig(8, 8), images(0, 2, shape)
    )
    student.network.eval()
    calibrate(student, [images(0, 2, shape)], "max")
    onnx = onnx_from_deployed(convert(student, "tensorrt"), images(1, 2, shape), {})
    save(float16_from_float32(onnx), tmp_path / "student.onnx")
    small = {"input": (2, *shape)}
    options = BuildOptions(opt_shapes=small, max_shapes=small)
    record = engine_from_onnx(tmp_path / "student.onnx", tmp_path / "student.engine", options, lambda line: None)
    assert [product["int8"] for product in record["int8"]["products"]] == [True] * products
    assert record["not_int8"] == [] and record["warnings"] == [] and record["float_type"] == "fp16"
