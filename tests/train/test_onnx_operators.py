"""Operators of ONNX files that torch does not write, or not so: each is held against onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from faqd.errors import UserError
from faqd.train.networks.from_onnx import read
from faqd.train.networks.from_onnx.read import input_size, read_onnx
from tests.fixtures.onnx_files import node, weights, written

pytestmark = pytest.mark.filterwarnings("ignore")

F32 = np.float32
OPERATORS: dict[str, tuple[list[onnx.NodeProto], dict[str, Any], int]] = {
    "SAME_UPPER": ([node("Conv", "x w", auto_pad="SAME_UPPER", strides=[2, 2])], {"w": weights(4, 3, 3, 3)}, 17),
    "SAME_LOWER": ([node("Conv", "x w", auto_pad="SAME_LOWER", strides=[2, 2])], {"w": weights(4, 3, 3, 3)}, 17),
    "uneven padding": ([node("Conv", "x w b", pads=[0, 1, 2, 0])], {"w": weights(4, 3, 3, 3), "b": weights(4)}, 17),
    "groups": ([node("Conv", "x w", group=3, dilations=[2, 2])], {"w": weights(6, 1, 3, 3)}, 17),
    "bias behind": (
        [node("Conv", "x w", "a"), node("Reshape", "b s", "c"), node("Add", "a c")],
        {"w": weights(4, 3, 1, 1), "b": weights(4), "s": np.array([1, 4, 1, 1])},
        12,
    ),
    "what is added is no bias": (
        [node("Conv", "x w", "a"), node("Add", "a b")], {"w": weights(6, 3, 3, 3), "b": weights(6)}, 12),
    "transposed, cut": (
        [node("ConvTranspose", "x w", strides=[2, 2], output_shape=[16, 16])], {"w": weights(3, 4, 3, 3)}, 17),
    "transposed, padded": (
        [node("ConvTranspose", "x w", strides=[2, 2], pads=[1, 1, 0, 0], group=3)], {"w": weights(3, 2, 3, 3)}, 17),
    "max pool": ([node("MaxPool", "x", kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER")], {}, 17),
    "max pool up": ([node("MaxPool", "x", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)], {}, 17),
    "average pool": ([node("AveragePool", "x", kernel_shape=[3, 3], pads=[1, 1, 1, 1])], {}, 17),
    "average with its padding": (
        [node("AveragePool", "x", kernel_shape=[3, 3], pads=[0, 0, 1, 1], count_include_pad=1)], {}, 17),
    "nearest, whole": (
        [node("Resize", "x r s", mode="nearest")], {"r": np.zeros(0, F32), "s": np.array([1, 1, 3, 3], F32)}, 13),
    "nearest, floor": (
        [node("Resize", "x r s", mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor")],
        {"r": np.zeros(0, F32), "s": np.array([1, 1, 1.5, 2], F32)}, 13),
    "linear": (
        [node("Resize", "x r e s", mode="linear")],
        {"r": np.zeros(0, F32), "e": np.zeros(0, F32), "s": np.array([1, 3, 12, 20])}, 13),
    "linear, corners": (
        [node("Resize", "x r s", mode="linear", coordinate_transformation_mode="align_corners")],
        {"r": np.zeros(0, F32), "s": np.array([1, 1, 2, 2], F32)}, 13),
    "upsample": ([node("Upsample", "x s", mode="nearest")], {"s": np.array([1, 1, 2, 2], F32)}, 9),
    "hard sigmoid": ([node("HardSigmoid", "x", alpha=0.2, beta=0.4)], {}, 17),
    "old clip": ([node("Clip", "x", min=-0.5, max=0.25)], {}, 7),
    "clip below": ([node("Clip", "x l")], {"l": np.array(-0.5, F32)}, 13),
    "slopes": ([node("PRelu", "x w")], {"w": weights(3, 1, 1)}, 17),
    "depth to space": (
        [node("Conv", "x w", "a"), node("DepthToSpace", "a", blocksize=2)], {"w": weights(8, 3, 1, 1)}, 17),
    "depth to space, columns": (
        [node("Conv", "x w", "a"), node("DepthToSpace", "a", blocksize=2, mode="CRD")], {"w": weights(8, 3, 1, 1)}, 17),
    "space to depth": ([node("SpaceToDepth", "x", blocksize=2)], {}, 17),
    "focus": (
        [node("Slice", "x z e a t", "p"), node("Slice", "x o e a t", "q"), node("Concat", "p q", axis=1)],
        {"z": np.array([0, 0]), "o": np.array([1, 0]), "e": np.array([2**31, 2**31]), "a": np.array([2, 3]),
         "t": np.array([2, 2])}, 17),
    "negative slice": ([node("Slice", "x b e a")], {"b": np.array([-3]), "e": np.array([-1]), "a": np.array([-1])}, 17),
    "split": ([node("Split", "x s", "a y", axis=2)], {"s": np.array([3, 5])}, 17),
    "picked": ([node("Gather", "x i", axis=1)], {"i": np.array([2, 0])}, 17),
    "one picked": ([node("Gather", "x i", axis=1)], {"i": np.array(-1)}, 17),
    "length": ([node("ReduceL2", "x", axes=[1], keepdims=1)], {}, 17),
    "squeezed": ([node("ReduceMean", "x", "a", axes=[2, 3]), node("Squeeze", "a s")], {"s": np.array([-1])}, 13),
    "old softmax": ([node("GlobalAveragePool", "x", "a"), node("Softmax", "a")], {}, 11),
    "shape of the image": (
        [node("Shape", "x", "s"), node("Gather", "s z", "n"), node("Unsqueeze", "n z1", "m"),
         node("Concat", "m rest", "t", axis=0), node("Reshape", "x t")],
        {"z": np.array(0), "z1": np.array([0]), "rest": np.array([3, -1])}, 13),
    "sizes without images": (
        [node("Reshape", "x s", "a"), node("Transpose", "a", perm=[0, 2, 1])], {"s": np.array([1, 3, 64])}, 17),
    "images merged with rows": (
        [node("Transpose", "x", "t", perm=[0, 2, 3, 1]), node("Reshape", "t s", "r"), node("MatMul", "r w", "m"),
         node("Reshape", "m u")],
        {"s": np.array([-1, 3]), "w": weights(3, 5), "u": np.array([1, 8, 8, 5])}, 17),
    "gemm": (
        [node("Flatten", "x", "f"), node("Gemm", "f w b", alpha=0.5, beta=2.0)],
        {"w": weights(192, 10), "b": weights(10)}, 17),
    "padding": ([node("Pad", "x p", mode="reflect")], {"p": np.array([0, 0, 1, 2, 0, 0, 3, 0])}, 17),
    "a number added": (
        [node("Pad", "x p v")], {"p": np.array([0, 0, 1, 0, 0, 0, 0, 2]), "v": np.array(0.5, F32)}, 17),
    "most of several": (
        [node("Max", "x l", "a"), node("Min", "a h")], {"l": np.array(-0.5, F32), "h": np.array(0.5, F32)}, 17),
    "token for each image": (
        [node("Reshape", "x s", "a"), node("Concat", "t a", axis=1)],
        {"s": np.array([1, 3, 64]), "t": weights(1, 1, 64)}, 17),
    "lstm": (
        [node("Reshape", "x s", "a"), node("Transpose", "a", "b", perm=[2, 0, 1]),
         node("LSTM", "b w r c", "d e f", hidden_size=5, direction="bidirectional"),
         node("Transpose", "d", perm=[2, 0, 1, 3])],
        {"s": np.array([0, 3, 64]), "w": weights(2, 20, 3), "r": weights(2, 20, 5), "c": weights(2, 40)}, 14),
    "gru": (
        [node("Reshape", "x s", "a"), node("Transpose", "a", "b", perm=[2, 0, 1]),
         node("GRU", "b w r c", "d e", hidden_size=5, linear_before_reset=1),
         node("Transpose", "d", perm=[2, 0, 1, 3])],
        {"s": np.array([0, 3, 64]), "w": weights(1, 15, 3), "r": weights(1, 15, 5), "c": weights(1, 30)}, 14),
}  # fmt: skip


IMAGES: dict[str, tuple[Any, ...]] = {"one": (1, 3, 8, 8), "any": ("n", 3, 8, 8), "any size": ("n", 3, None, None)}
"""Some files say any and hold for one."""


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_is_onnxruntimes(name: str, image: str, tmp_path: Path) -> None:
    """What read_onnx compares itself: outputs with onnxruntime's, several images with each alone."""
    nodes, constants, opset = OPERATORS[name]
    output = nodes[-1].output[-1] if name == "split" else nodes[-1].output[0]
    path = written(tmp_path / "net.onnx", nodes, constants, opset=opset, image=IMAGES[image], output=output)
    assert len(read_onnx(path, 3, (8, 8))(torch.randn(3, 3, 8, 8))[output]) == 3


def test_channels_may_be_last(tmp_path: Path) -> None:
    nodes = [node("Transpose", "x", "a", perm=[0, 3, 1, 2]), node("Conv", "a w")]
    path = written(tmp_path / "net.onnx", nodes, {"w": weights(4, 3, 3, 3)}, image=(1, 8, 6, 3))
    assert read_onnx(path, 3, (8, 6))(torch.zeros(2, 3, 8, 6))["y"].shape == (2, 4, 6, 4)
    assert input_size(path) == (3, (8, 6))


def test_a_network_that_was_read_wrongly_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "net.onnx", [node("HardSigmoid", "x", alpha=0.2)])
    monkeypatch.setitem(read.RULES, "HardSigmoid", lambda each: each.module(nn.Hardsigmoid(), each.ref()))
    with pytest.raises(UserError, match=r"its output y is \d.* of its range from what onnxruntime computes"):
        read_onnx(path, 3, (8, 8))


def test_a_saturated_output_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a sigmoid is zero for all images, what it reads is compared."""
    nodes = [node("Sub", "x c", "a"), node("Sigmoid", "a")]
    path = written(tmp_path / "net.onnx", nodes, {"c": np.array(60, F32)})
    monkeypatch.setitem(read.RULES, "Sub", lambda each: each.function(torch.add, each.ref(), -61.0))
    with pytest.raises(UserError, match="its output a is"):
        read_onnx(path, 3, (8, 8))
