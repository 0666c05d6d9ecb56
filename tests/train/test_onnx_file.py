"""FILE.onnx as a teacher: the network that it is, for any number of images, or a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from faqd.errors import UserError
from faqd.quantize.capture.capture import capture
from faqd.quantize.outputs import named_outputs
from faqd.train.networks.from_onnx.read import read_onnx
from faqd.train.networks.source import NetworkSource, user_source
from tests.fixtures import families, transformer
from tests.fixtures.networks import lively
from tests.fixtures.onnx_files import node, weights, written
from tests.fixtures.toy_runs import PLAIN, faqd_deploy, faqd_train, succeeds, write_images

pytestmark = pytest.mark.filterwarnings("ignore")

NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "residual": (families.SeResNet, 16),
    "mobile": (lambda: families.MobileNetV2(nn.Hardswish), 16),
    "segmenter": (families.UNet, 16),
    "detector": (families.Detector, 16),
    "transformer": (transformer.Vit, 8),
}
WAYS: dict[str, dict[str, Any]] = {
    "one image, opset 14": {"dynamo": False, "opset_version": 14},
    "any number of images": {"dynamo": True, "dynamic_shapes": ({0: torch.export.Dim.DYNAMIC},)},
}
"""How torch writes a file: with layer norm and GELU written out, and with operators of their own."""


def exported(name: str, way: str, path: Path) -> nn.Module:
    """The network that `path` is written of."""
    torch.manual_seed(0)
    network, pixels = NETWORKS[name][0](), NETWORKS[name][1]
    network = lively(network, 0).eval()
    images = torch.randn(1 if way.startswith("one") else 3, 3, pixels, pixels)
    outputs = list(named_outputs(network(images)))
    settings = WAYS[way] | ({} if way.startswith("one") else {"external_data": False, "verbose": False})
    torch.onnx.export(network, (images,), path, input_names=["images"], output_names=outputs, **settings)
    return network


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_the_network_that_was_exported(name: str, way: str, tmp_path: Path) -> None:
    network = exported(name, way, tmp_path / "net.onnx")
    pixels = NETWORKS[name][1]
    found = read_onnx(tmp_path / "net.onnx", 3, (pixels, pixels))
    x = torch.randn(5, 3, pixels, pixels)
    wanted, outputs = named_outputs(network(x)), named_outputs(found(x))
    assert list(outputs) == list(wanted)
    for output, values in wanted.items():
        torch.testing.assert_close(outputs[output], values, rtol=1e-4, atol=1e-5)
    traced = capture(found, x[:2])
    kinds = [type(module) for module in traced.modules()]
    wished = {"mobile": nn.Hardswish, "detector": nn.SiLU, "transformer": nn.GELU}.get(name)
    assert wished is None or wished in kinds
    assert name != "transformer" or kinds.count(nn.LayerNorm) == 5
    assert any(parameter.endswith(".weight") for parameter, _ in traced.named_parameters())


def test_weights_stand_at_the_names_of_the_nodes(tmp_path: Path) -> None:
    exported("residual", "one image, opset 14", tmp_path / "net.onnx")
    names = {name for name, _ in read_onnx(tmp_path / "net.onnx", 3, (16, 16)).named_parameters()}
    assert {"stem_stem_0_Conv.weight", "stem_stem_0_Conv.bias", "head_head_2_Gemm.weight"} <= names


def test_levels_of_a_detector_share_their_head(tmp_path: Path) -> None:
    network = exported("detector", "one image, opset 14", tmp_path / "net.onnx")
    found = read_onnx(tmp_path / "net.onnx", 3, (16, 16))
    wanted, counted = (
        sum(value.numel() for name, value in one.named_parameters() if name.startswith(("scores", "boxes")))
        for one in (network, found)
    )
    assert counted == wanted


@pytest.mark.parametrize("name", ["mobile", "segmenter", "transformer"])
def test_it_becomes_a_proved_bundle(name: str, tmp_path: Path) -> None:
    exported(name, "one image, opset 14", tmp_path / "net.onnx")
    images, pixels = write_images(tmp_path / "images", pixels=16), NETWORKS[name][1]
    data = ("--data", f"folder:{images}", "--image-size", pixels, *PLAIN, "--eval-samples", 8)
    succeeds(faqd_deploy("ptq", "--teacher", tmp_path / "net.onnx", *data, "--out", tmp_path / "bundle"))
    manifest = json.loads((tmp_path / "bundle/manifest.json").read_text())
    outputs = {output["name"] for output in manifest["outputs"]}
    assert outputs == ({"out"} if name == "segmenter" else {"logits"})
    assert json.loads((tmp_path / "bundle/verify.json").read_text())["passed"]


def test_applications_find_the_tensors_by_the_names_that_they_know(tmp_path: Path) -> None:
    """Of frameworks that write slashes and colons; in the teacher's file and with pixels as input too."""
    names = {"x": "serving/image:0", "y": "save_model/scale_0.tmp-1", "z": "boxes/1"}
    layers = [node("Conv", "x w", pads=[1, 1, 1, 1]), node("Sigmoid", "y", "z")]
    model = onnx.load(written(tmp_path / "plain.onnx", layers, {"w": weights(4, 3, 3, 3)}))
    graph = model.graph
    graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, (1, 4, 8, 8)))
    for entry in graph.node:
        for field in (entry.input, entry.output):
            field[:] = [names.get(tensor, tensor) for tensor in field]
    for value in (*graph.input, *graph.output):
        value.name = names[value.name]
    onnx.save(model, tmp_path / "net.onnx")
    images = write_images(tmp_path / "images", pixels=16)
    line = ("--data", f"folder:{images}", "--image-size", 8, *PLAIN, "--eval-samples", 8)
    for form in ("float32-nchw", "uint8-nhwc"):
        bundle = tmp_path / form
        succeeds(faqd_deploy("ptq", "--teacher", tmp_path / "net.onnx", *line, "--input", form, "--out", bundle))
        manifest = json.loads((bundle / "manifest.json").read_text())
        assert manifest["input"]["name"] == names["x"]
        for file in bundle.glob("*.onnx"):
            written_graph = onnx.load(file).graph
            assert [value.name for value in written_graph.input] == [names["x"]]
            assert [value.name for value in written_graph.output] == [names["y"], names["z"]]


def test_it_is_a_teacher_for_every_command(tmp_path: Path) -> None:
    file = tmp_path / "net.onnx"
    exported("residual", "any number of images", file)
    write_images(tmp_path / "images", pixels=16)
    data = ("--data", f"folder:{tmp_path / 'images'}", *PLAIN)
    assert "node_linear" in succeeds(faqd_train("inspect", "--teacher", file)).stdout
    line = ("--teacher", file, *data)
    succeeds(faqd_train("distill", *line, "--batch-size", 16, "--steps", 2, "--out", tmp_path / "run"))
    succeeds(faqd_train("distill", *line, "--arch", file, "--batch-size", 16, "--steps", 1, "--out", tmp_path / "same"))
    succeeds(faqd_deploy("export", tmp_path / "run", "--eval-samples", 8, "--out", tmp_path / "bundle"))
    succeeds(faqd_deploy("sensitivity", *line))


# What is refused ----------------------------------------------------------------------------------------------------


def _quantized(path: Path) -> Path:
    nodes = [node("QuantizeLinear", "x s z", "q"), node("DequantizeLinear", "q s z")]
    return written(path, nodes, {"s": np.array(0.1, np.float32), "z": np.array(0, np.int8)})


def _two_inputs(path: Path) -> Path:
    model = onnx.load(written(path, [node("Add", "x second")], {"second": weights(1, 3, 8, 8)}))
    del model.graph.initializer[:]
    model.graph.input.append(helper.make_tensor_value_info("second", TensorProto.FLOAT, (1, 3, 8, 8)))
    path.write_bytes(model.SerializeToString())
    return path


def _branches(path: Path) -> Path:
    body = helper.make_graph(
        [node("Identity", "x")], "body", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 3, 8, 8))]
    )
    return written(path, [node("If", "c", then_branch=body, else_branch=body)], {"c": np.array(True)})


def _custom(path: Path) -> Path:
    model = onnx.load(written(path, [node("Relu", "x")]))
    model.graph.node[0].domain = "mine"
    model.opset_import.append(helper.make_opsetid("mine", 1))
    path.write_bytes(model.SerializeToString())
    return path


def _outside(path: Path) -> Path:
    model = onnx.load(written(path, [node("Conv", "x w")], {"w": weights(4, 3, 3, 3)}))
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../weights.bin")
    path.write_bytes(model.SerializeToString())
    return path


def _damaged(path: Path) -> Path:
    content = written(path, [node("Conv", "x w")], {"w": weights(4, 3, 3, 3)}).read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "quantized": (_quantized, r"quantized already \(node the/quantizelinear/q, QuantizeLinear\); give the float file"),
    "two inputs": (_two_inputs, r"has 2 inputs \(x, second\)"),
    "control flow": (_branches, r"network of its own \(If, Loop or Scan\)"),
    "a domain": (_custom, "operators of the domain 'mine'"),
    "weights elsewhere": (_outside, "keeps tensors in '../weights.bin', outside of its folder"),
    "damaged": (_damaged, "not a valid ONNX file"),
    "unknown": (
        lambda path: written(path, [node("Det", "x", "a"), node("Hardmax", "x")]),
        r"operators that are not read: Det \(1\), Hardmax \(1\)",
    ),
    "half floats": (
        lambda path: written(path, [node("Cast", "x", to=1)], kind=TensorProto.FLOAT16),
        "its input x is float16; save the network in float32",
    ),
    "another size": (lambda path: written(path, [node("Relu", "x")], image=(1, 3, 12, 8)), "give --image-size 12x8"),
    "grey": (lambda path: written(path, [node("Relu", "x")], image=(1, 1, 8, 8)), "images of 1 channels"),
    "some images": (
        lambda path: written(path, [node("Gather", "x i", axis=0)], {"i": np.array([0])}, image=("n", 3, 8, 8)),
        "picks images",
    ),
    "computed weights": (lambda path: written(path, [node("Conv", "x x")]), r"the/conv \(Conv\) computes its input 1"),
    "images behind": (
        lambda path: written(path, [node("Transpose", "x", perm=[1, 0, 2, 3])]),
        "its output y has its images along axis 1",
    ),
    "the images mixed": (
        lambda path: written(path, [node("ReduceMean", "x", keepdims=0)]),
        "its output y has its images among others",
    ),
    "a second result": (
        lambda path: written(path, [node("Dropout", "x", "a y"), node("Cast", "y", "z", to=1)], output="z"),
        "second result",
    ),
    "a constant output": (
        lambda path: written(path, [node("Relu", "x", "a"), node("Relu", "c")], {"c": weights(2)}),
        "its output y is the same for every image",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_by_name(name: str, tmp_path: Path) -> None:
    make, sentence = REFUSED[name]
    with pytest.raises(UserError, match=sentence):
        read_onnx(make(tmp_path / "net.onnx"), 3, (8, 8))


def beside(path: Path, location: str) -> Path:
    """A file whose weights are in another one, which says that it lies at `location`."""
    model = onnx.load(written(path, [node("Conv", "x w")], {"w": weights(4, 3, 3, 3)}))
    onnx.save_model(model, path, save_as_external_data=True, location="net.data", size_threshold=0)
    model = onnx.load(path, load_external_data=False)
    next(e for e in model.graph.initializer[0].external_data if e.key == "location").value = location
    path.write_bytes(model.SerializeToString())
    return path


def test_weights_may_lie_beside_the_file(tmp_path: Path) -> None:
    """As torch's own exporter puts them."""
    path = beside(tmp_path / "net.onnx", "net.data")
    found = read_onnx(path, 3, (8, 8)).state_dict()["the_conv.weight"]
    np.testing.assert_array_equal(found.numpy(), weights(4, 3, 3, 3))
    record = user_source(str(path), 3, (8, 8)).to_json()
    (tmp_path / "moved").mkdir()
    for name in ("net.onnx", "net.data"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    moved = NetworkSource.from_json(record, tmp_path / "moved/run")
    assert moved.file == str(tmp_path / "moved/net.onnx")
    moved.build()
    for name in ("net.onnx", "net.data"):
        (tmp_path / "moved" / name).rename(tmp_path / name)
    data = bytearray((tmp_path / "net.data").read_bytes())
    data[3] ^= 1
    (tmp_path / "net.data").write_bytes(data)
    with pytest.raises(UserError, match="changed since the run was made"):
        NetworkSource.from_json(record, tmp_path).build()


@pytest.mark.parametrize("location", ["../net.data", "/etc/passwd", "link", "nothing", "", "short"])
def test_weights_that_lie_elsewhere_are_not_read(location: str, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    path = beside(tmp_path / "here/net.onnx", location)
    (tmp_path / "here/net.data").rename(tmp_path / "net.data")
    (tmp_path / "here/link").symlink_to(tmp_path / "net.data")
    (tmp_path / "here/short").write_bytes(b"few")
    with pytest.raises(UserError, match=r"outside of its folder|leads out|no such file beside it|not of one export"):
        read_onnx(path, 3, (8, 8))


def test_a_free_size_has_to_be_given(tmp_path: Path) -> None:
    path = written(tmp_path / "net.onnx", [node("Relu", "x")], image=("n", 3, None, None))
    outcome = faqd_train("inspect", "--teacher", path)
    assert outcome.code == 2 and "give --image-size" in outcome.stderr


def test_a_file_that_changed_is_no_teacher_of_a_run(tmp_path: Path) -> None:
    path = written(tmp_path / "net.onnx", [node("Relu", "x")])
    record = user_source(str(path), 3, (8, 8)).to_json()
    NetworkSource.from_json(record, tmp_path).build()
    written(path, [node("Sigmoid", "x")])
    with pytest.raises(UserError, match="changed since the run was made"):
        NetworkSource.from_json(record, tmp_path).build()
