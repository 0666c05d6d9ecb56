"""`--input uint8-nhwc`: the networks normalise, reorder and transpose by themselves, to the same bits."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from faqd.benchmarks.backends.sessions import OnnxruntimeBackend
from faqd.benchmarks.bench import bench
from faqd.benchmarks.measure.latency import Length
from faqd.benchmarks.measure.switches import Options
from faqd.bundle import FLOAT_STUDENT_FP16, STUDENT_ONNXRUNTIME, STUDENT_TENSORRT, TEACHER, Bundle
from faqd.deploy.bundle_facts import BundleOptions
from faqd.deploy.engine.bundle_engines import build_bundle
from faqd.deploy.engine.options import BuildOptions
from faqd.deploy.explain.explain import explanation
from faqd.deploy.export.server_configs import TRITON_TENSORRT
from faqd.deploy.export.uint8_input import compare_preprocessing, with_preprocessing, without_preprocessing
from faqd.deploy.onnx_model.load import load_model
from faqd.deploy.onnx_model.session import OnnxSession
from faqd.deploy.verify.verify import verification
from faqd.deploy.write_bundle import Calibration, quantize_after_training
from faqd.errors import UserError
from faqd.files import read_json
from faqd.preprocess import Channels, Preprocess
from faqd.quantize.config import QuantConfig
from faqd.train.data.options import DataOptions
from tests.fixtures.networks import lively
from tests.fixtures.qdq_network import SHAPE, residual_network

NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3), nn.Linear(8, 10)
        self.preprocess = nn.ReLU()

    def forward(self, x):
        return self.fc(self.preprocess(self.conv2(self.preprocess(self.conv1(x)))).mean((2, 3)))
"""
PREPROCESS: dict[Channels, Preprocess] = {
    "rgb": Preprocess(*SHAPE[1:], (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "bgr": Preprocess(*SHAPE[1:], (0.406, 0.456, 0.485), (0.225, 0.224, 0.229), channels="bgr"),
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A network quantized after training; its module `preprocess` is named like our nodes."""
    folder = tmp_path_factory.mktemp("uint8")
    (folder / "net.py").write_text(NETWORK)
    space: dict[str, Any] = {}
    exec(NETWORK, space)
    torch.save(lively(space["Net"](), 1).state_dict(), folder / "best.pth")
    data, bits = asdict(DataOptions("digits")), QuantConfig(4, 4)
    weights, out = folder / "best.pth", folder / "out"
    return quantize_after_training(
        f"{folder}/net.py:Net",
        weights,
        data,
        bits,
        Calibration(images=128),
        out,
        BundleOptions(100, input_form="uint8-nhwc", servers=("triton",)),
        lambda _: None,
    )


def copy_of(bundle: Bundle, folder: Path) -> Bundle:
    shutil.copytree(bundle.folder, folder)
    return Bundle(folder, bundle.manifest)


@pytest.fixture(scope="module")
def plain(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same networks behind their preprocessing, as the other form of the input has them."""
    folder = copy_of(bundle, tmp_path_factory.mktemp("plain") / "out").folder
    for path in folder.glob("*.onnx"):
        path.write_bytes(without_preprocessing(load_model(path)).SerializeToString())
    return Bundle(folder, {**bundle.manifest, "input": {**bundle.manifest["input"], "dtype": "float32"}})


def pixels(count: int = 8) -> NDArray[np.uint8]:
    height, width = SHAPE[1:]
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)


@pytest.mark.parametrize("channels", PREPROCESS)
def test_the_same_bits_come_out_of_both_forms(channels: Channels) -> None:
    preprocess, plain = PREPROCESS[channels], residual_network()
    model = with_preprocessing(plain, preprocess)
    onnx.checker.check_model(model, full_check=True)
    assert [value.type.tensor_type.elem_type for value in model.graph.input] == [TensorProto.UINT8]
    fitted = np.stack([preprocess.fit(image) for image in pixels()])
    whole = OnnxSession(model.SerializeToString(), optimise=False).run({"images": pixels()})
    apart = OnnxSession(plain.SerializeToString(), optimise=False).run({"images": preprocess.normalise(fitted)})
    np.testing.assert_array_equal(whole["classifier"], apart["classifier"])
    assert compare_preprocessing(model, pixels(), preprocess.normalise(fitted))["equal"]
    core = without_preprocessing(model)
    assert core.graph.node == plain.graph.node and core.graph.initializer == plain.graph.initializer
    assert core.graph.input == plain.graph.input


def test_pixels_in_another_order_are_noticed() -> None:
    preprocess = PREPROCESS["rgb"]
    model = with_preprocessing(residual_network(), preprocess)
    assert not compare_preprocessing(model, pixels(), preprocess.normalise(pixels()[..., ::-1]))["equal"]
    with pytest.raises(UserError, match="takes no uint8 pixels"):
        without_preprocessing(residual_network())


def test_the_bundle_records_it_and_is_verified(bundle: Bundle) -> None:
    """Verified means: on the probes every layer behind the preprocessing has the codes of torch."""
    record = read_json(bundle.folder / "verify.json")
    assert record["passed"] and bundle.takes_pixels
    shape = ["batch", 8, 8, 1]
    assert bundle.manifest["input"] == {"name": "input", "shape": shape, "dtype": "uint8", "channels": "grey"}
    assert "data_type: TYPE_UINT8\n    dims: [ 8, 8, 1 ]" in (bundle.folder / TRITON_TENSORRT).read_text()
    assert set(record["preprocessing"]) == {name for name in bundle.manifest["files"] if name.endswith(".onnx")}


@pytest.mark.parametrize("name", [STUDENT_TENSORRT, STUDENT_ONNXRUNTIME, FLOAT_STUDENT_FP16, TEACHER])
def test_every_network_of_the_bundle_gives_the_same_outputs(name: str, bundle: Bundle, plain: Bundle) -> None:
    images = bundle.evaluation().images
    found, wanted = (
        OnnxSession(b.path(name), optimise=False).run({"input": b.network_input(images)})["logits"]
        for b in (bundle, plain)
    )
    np.testing.assert_array_equal(found, wanted)


def test_a_wrong_mean_inside_fails_the_verification(bundle: Bundle, tmp_path: Path) -> None:
    folder = copy_of(bundle, tmp_path / "copy").folder
    model = load_model(folder / STUDENT_TENSORRT)
    offset = next(tensor for tensor in model.graph.initializer if tensor.name == "preprocess/offset")
    offset.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(offset) + np.float32(1e-6), offset.name))
    (folder / STUDENT_TENSORRT).write_bytes(model.SerializeToString())
    record = verification(Bundle(folder, bundle.manifest))
    assert record["failures"] == [f"{STUDENT_TENSORRT}: input: its preprocessing is not the record's"]


def _past_it(model: onnx.ModelProto) -> None:
    """The image once more, added to what the preprocessing made of it."""
    graph = model.graph
    first = next(node for node in graph.node if "preprocess/input" in node.input)
    graph.node.insert(4, helper.make_node("Cast", ["input"], ["again"], "again", to=TensorProto.FLOAT))
    graph.node.insert(5, helper.make_node("Transpose", ["again"], ["turned"], "turned", perm=[0, 3, 1, 2]))
    graph.node.insert(6, helper.make_node("Add", ["preprocess/input", "turned"], ["both"], "both"))
    first.input[0] = "both"


def _half_of_it(model: onnx.ModelProto) -> None:
    next(node for node in model.graph.node if "preprocess/input" in node.input).input[0] = "preprocess/again"
    turn = next(node for node in model.graph.node if "preprocess/input" in node.output)
    again = helper.make_node("Transpose", [turn.input[0]], ["preprocess/again"], "preprocess/again.transpose")
    again.attribute.extend(turn.attribute)
    model.graph.node.insert(4, again)


@pytest.mark.parametrize("edit", [_past_it, _half_of_it])
def test_a_network_that_reads_pixels_past_the_preprocessing_is_refused(
    bundle: Bundle, tmp_path: Path, edit: Callable[[onnx.ModelProto], None]
) -> None:
    folder = copy_of(bundle, tmp_path / "copy").folder
    model = load_model(folder / STUDENT_ONNXRUNTIME)
    edit(model)
    onnx.checker.check_model(model, full_check=True)
    (folder / STUDENT_ONNXRUNTIME).write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match="reads the pixels past their preprocessing"):
        verification(Bundle(folder, bundle.manifest))


def test_the_bench_feeds_pixels_and_finds_the_same_accuracy(bundle: Bundle, plain: Bundle) -> None:
    options = Options(batch=(1,), length=Length(0.02, 0.0, rounds=2))
    results = [bench([one], OnnxruntimeBackend(1, "test"), options) for one in (plain, bundle)]
    without, whole = ([entry["accuracy"] for entry in result.result["networks"]] for result in results)
    assert without == whole
    with pytest.raises(UserError, match="preprocess images differently"):
        bench([plain, bundle], OnnxruntimeBackend(1, "test"), options)


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="tensorrt-rtx is not installed (pip install 'faqd[rtx]'): nothing here can build an engine",
)
def test_tensorrt_builds_it_with_the_first_layer_in_int8(bundle: Bundle) -> None:
    records = build_bundle(bundle, all=True, force=False, options=BuildOptions(), say=lambda _: None)
    assert len(records) == 3
    for record in records:
        assert record["inputs"] == [{"name": "input", "shape": [-1, 8, 8, 1], "dtype": "uint8"}]
    assert {product["int8"] for product in records[0]["int8"]["products"]} == {True}
    explained = explanation(bundle.folder)
    assert [(row["module"], row["int8"]) for row in explained["layers"]] == [
        ("conv1", True),
        ("conv2", True),
        ("fc", True),
    ]
