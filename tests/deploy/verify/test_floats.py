"""Float islands, tensor by tensor: sketches against torch, and operators of onnxruntime against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from faqd.deploy.export.torch_to_onnx import written_from_deployed
from faqd.deploy.reference.onnx_fallback import FLOAT_OPERATORS
from faqd.deploy.verify.float_operators import BITS, FloatOperators, has_float_operators
from faqd.deploy.verify.layers import trace_of, verify_file
from faqd.deploy.verify.segments import segments
from faqd.deploy.verify.sketches import agreeing_bits, sketched
from faqd.deploy.verify.torch_values import torch_digests
from faqd.quantize.config import QuantConfig
from faqd.quantize.convert import convert
from tests.fixtures.networks import calibrated, images

SHAPE = (3, 8, 8)
VALUES = np.random.default_rng(0).normal(size=(4, 5, 321))


@pytest.mark.parametrize("place", [(0, 0, 0), (1, 2, 3), (3, 4, 320)])
@pytest.mark.parametrize("relative", [1e-2, 1e-5])
def test_a_sketch_shows_a_change_of_one_value_wherever_it_is(place: tuple[int, ...], relative: float) -> None:
    changed = VALUES.copy()
    changed[place] += relative * np.linalg.norm(VALUES)
    bits = agreeing_bits(sketched(changed), sketched(VALUES))
    assert bits == pytest.approx(-np.log2(relative), abs=0.1)


def test_sketches_of_one_tensor_are_one_however_it_lies_in_memory() -> None:
    turned = np.asfortranarray(VALUES)
    assert agreeing_bits(sketched(turned), sketched(VALUES)) == 52
    assert agreeing_bits(sketched(VALUES.transpose(0, 2, 1)), sketched(VALUES)) < 2


def test_values_that_are_not_finite_are_counted() -> None:
    infinite = VALUES.copy()
    infinite[0, 0, 0] = -np.inf
    assert agreeing_bits(sketched(infinite), sketched(infinite)) == 52
    assert agreeing_bits(sketched(VALUES), sketched(infinite)) == 0


def test_nothing_is_equal_to_nothing() -> None:
    assert agreeing_bits(sketched(np.zeros((2, 0))), sketched(np.zeros((2, 0)))) == 52
    assert agreeing_bits(sketched(np.ones(3)), sketched(np.zeros(3))) == 0


class Blurred(nn.Module):
    """What an island computes hardly moves the codes that follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 4, 8), nn.LayerNorm(4), nn.Linear(4, 3)
        nn.init.uniform_(self.norm.bias)
        self.table = nn.Parameter(torch.full((1, 4), 1e-4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x).flatten(1))
        return self.last((x + self.table.sin()).softmax(1))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def written() -> tuple[onnx.ModelProto, dict[str, Any], Tensor]:
    torch.manual_seed(0)
    x = images(3, 4, SHAPE)
    deployed = convert(calibrated(Blurred().eval(), QuantConfig(8, 8), shape=SHAPE), "tensorrt")
    file = written_from_deployed(deployed, x[:2], {})
    return file.model, torch_digests(deployed, x, tensors=file.tensors), x


def changed(model: onnx.ModelProto, what: str) -> onnx.ModelProto:
    wrong: onnx.ModelProto = onnx.ModelProto.FromString(model.SerializeToString())
    for node in wrong.graph.node:
        for attribute in node.attribute:
            if attribute.name == what:
                attribute.f *= 10
    for tensor in wrong.graph.initializer:
        if what in tensor.name:
            values = numpy_helper.to_array(tensor).copy()
            values.flat[0] += 1e-3 * np.abs(values).max()
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    assert wrong != model
    return wrong


@pytest.mark.parametrize("what", ["epsilon", "norm.weight", "norm.bias"])
def test_a_wrong_number_is_found_that_moves_no_code(
    what: str, written: tuple[onnx.ModelProto, dict[str, Any], Tensor]
) -> None:
    model, digests, x = written
    found = verify_file(model, x.numpy(), digests, [False])
    assert found["failures"] == []
    assert found["floats"]["tensors"] >= 3 and found["floats"]["least_bits"] > 40
    wrong = changed(model, what)
    blind = verify_file(wrong, x.numpy(), {**digests, "floats": {}}, [False])["failures"]
    assert blind == [], "the codes show it already, so that this shows nothing"
    failures = verify_file(wrong, x.numpy(), digests, [False])["failures"]
    assert failures and "a float on the way, is torch's to" in failures[0]


def test_a_tensor_that_the_file_has_not_is_told(written: tuple[onnx.ModelProto, dict[str, Any], Tensor]) -> None:
    model, digests, x = written
    more = {**digests, "floats": {**digests["floats"], "gone": [0.0] * 10}}
    assert verify_file(model, x.numpy(), more, [False])["failures"] == ["gone: the file has no such tensor"]


def test_an_operator_that_a_runtime_gets_wrong_is_named(
    written: tuple[onnx.ModelProto, dict[str, Any], Tensor],
) -> None:
    model, digests, x = written
    told: list[str] = []
    wrong_ones = segments(changed(model, "epsilon"))
    for (right, feeds, _), wrong in zip(trace_of(model, x.numpy(), digests), wrong_ones, strict=True):
        if has_float_operators(right):
            shown = FloatOperators(right)
            assert list(shown.failures(shown.run(feeds))) == []
            told += shown.failures(FloatOperators(wrong).run(feeds))
    assert len(told) == 1 and told[0].startswith("norm: LayerNormalization is right to ")


def test_bounds_are_stated_of_operators_that_there_are() -> None:
    known = {schema.name for schema in onnx.defs.get_all_schemas()}
    assert known >= set(BITS) and known >= FLOAT_OPERATORS
