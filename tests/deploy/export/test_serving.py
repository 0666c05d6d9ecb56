"""Configuration for Triton and DeepStream: it agrees with the tensors of the file that it is for, and says untried."""

from __future__ import annotations

import configparser
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from faqd.bundle import (
    STUDENT_DEEPSTREAM,
    STUDENT_ONNXRUNTIME,
    STUDENT_TENSORRT,
    Bundle,
    load_bundle,
    write_manifest,
)
from faqd.deploy.export.server_configs import (
    DEEPSTREAM,
    LABELS,
    TRITON_ONNXRUNTIME,
    TRITON_TENSORRT,
    serving_files,
)
from faqd.deploy.export.uint8_input import with_preprocessing
from faqd.deploy.onnx_model.session import OnnxSession
from faqd.files import sha256
from faqd.preprocess import Preprocess
from tests.fixtures.qdq_network import SHAPE, residual_network, written
from tests.fixtures.tiny_bundles import facts_of
from tests.fixtures.toy_runs import NET, faqd_deploy, new_user, succeeds, write_net

PLAIN = Preprocess(*SHAPE[1:], (0.5, 0.4, 0.3), (0.25, 0.25, 0.25))
PIXEL = np.array([10, 100, 250], np.uint8)


def make_bundle(folder: Path, preprocess: Preprocess = PLAIN, pixels: bool = False, **facts: Any) -> Bundle:
    folder.mkdir()
    model = residual_network()
    if pixels:
        model = with_preprocessing(model, preprocess)
    for name in (STUDENT_TENSORRT, STUDENT_ONNXRUNTIME):
        written(model, folder / name)
    dtype, channels = ("uint8", "rgb") if pixels else ("float32", preprocess.channels)
    facts = {"classes": ["a cat", "a\ndog"], **facts, "preprocess": preprocess.to_json()}
    facts["input"] = {"name": "images", "shape": [], "dtype": dtype, "channels": channels}
    return write_manifest(
        folder, facts_of("served", **facts), dict.fromkeys((STUDENT_TENSORRT, STUDENT_ONNXRUNTIME), "")
    )


def tensors(text: str) -> dict[str, list[tuple[str, str, list[int]]]]:
    """(name, type, sizes) of the tensors in a config.pbtxt."""
    found = {}
    for kind in ("input", "output"):
        block = re.search(rf"^{kind} \[\n(.*?)^\]", text, re.DOTALL | re.MULTILINE)
        assert block is not None
        entries = re.findall(r'name: "([^"]+)"\s+data_type: (\w+)\s+dims: \[ ([^]]+) \]', block[1])
        found[kind] = [(name, dtype, [int(size) for size in sizes.split(",")]) for name, dtype, sizes in entries]
    return found


def declared(model: onnx.ModelProto) -> dict[str, list[tuple[str, str, list[int]]]]:
    types = {onnx.TensorProto.FLOAT: "TYPE_FP32", onnx.TensorProto.UINT8: "TYPE_UINT8"}
    return {
        kind: [
            (
                value.name,
                types[value.type.tensor_type.elem_type],
                [d.dim_value for d in value.type.tensor_type.shape.dim[1:]],
            )
            for value in values
        ]
        for kind, values in (("input", model.graph.input), ("output", model.graph.output))
    }


@pytest.mark.parametrize("pixels", [False, True])
@pytest.mark.parametrize(
    ("config", "network", "backend", "model"),
    [
        (TRITON_TENSORRT, STUDENT_TENSORRT, "tensorrt", "student.tensorrt.engine"),
        (TRITON_ONNXRUNTIME, STUDENT_ONNXRUNTIME, "onnxruntime", STUDENT_ONNXRUNTIME),
    ],
)
def test_triton_is_told_the_tensors_of_the_file(
    config: str, network: str, backend: str, model: str, pixels: bool, tmp_path: Path
) -> None:
    bundle = make_bundle(tmp_path / "bundle", pixels=pixels)
    text = serving_files(bundle, ["triton"])[config]
    assert tensors(text) == declared(onnx.load(bundle.path(network)))
    assert f'backend: "{backend}"' in text and f'default_model_filename: "{model}"' in text
    assert "max_batch_size: 64" in text and "dynamic_batching { }" in text
    assert text.startswith("# Written by faqd, untried") and text.count("[") == text.count("]")
    assert text.count("{") == text.count("}")
    assert f'label_filename: "{LABELS["triton"]}"' in text
    assert ("uint8 pixels" in text) == pixels


def properties(text: str) -> dict[str, str]:
    parser = configparser.ConfigParser()
    parser.read_string(text)
    return dict(parser["property"])


def test_deepstream_normalises_as_the_record_does(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", replace(PLAIN, channels="bgr"))
    text = serving_files(bundle, ["deepstream"])[DEEPSTREAM]
    found = properties(text)
    offsets = np.array([float(value) for value in found["offsets"].split(";")])
    by_nvinfer = float(found["net-scale-factor"]) * (PIXEL - offsets)
    wanted = bundle.preprocess.normalise(PIXEL.reshape(1, 1, 1, 3)).reshape(-1)
    np.testing.assert_allclose(by_nvinfer, wanted, rtol=1e-6, atol=1e-6)
    model = onnx.load(bundle.path(STUDENT_TENSORRT))
    assert found["infer-dims"] == ";".join(map(str, SHAPE))
    assert found["output-blob-names"] == model.graph.output[0].name
    assert found["model-color-format"] == "1" and found["network-type"] == "1"
    assert found["labelfile-path"] == LABELS["deepstream"] and found["model-engine-file"] == "student.tensorrt.engine"
    assert text.startswith("# Written by faqd, untried")


def test_deepstream_is_told_what_it_does_otherwise(tmp_path: Path) -> None:
    text = serving_files(make_bundle(tmp_path / "bundle", replace(PLAIN, resize="letterbox")), ["deepstream"])[
        DEEPSTREAM
    ]
    assert "nvinfer's are black" in text and properties(text)["maintain-aspect-ratio"] == "1"


IMAGENET = ("--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225")


@pytest.mark.parametrize(
    ("more", "own"),
    [
        (IMAGENET, True),
        ((*IMAGENET, "--input", "uint8-nhwc"), True),
        ((*IMAGENET, "--channels", "bgr", "--input", "uint8-nhwc"), True),
        (("--mean", "0.5", "--std", "0.25", "--channels", "grey", "--input", "uint8-nhwc"), True),
        (("--mean", "0.485,0.456,0.406", "--std", "0.25,0.25,0.25"), False),
    ],
)
def test_what_nvinfer_cannot_feed_has_a_file_that_normalises_itself(
    more: tuple[str, ...], own: bool, tmp_path: Path
) -> None:
    """Fed with nvinfer's factor * (pixel - offset), it gives what the student gives for these images, bit for bit."""
    user = new_user(tmp_path)
    code = NET.replace("channels=3", "channels=1") if "grey" in more else NET
    write_net(user.folder, code)
    out = tmp_path / "bundle"
    data = ("--data", f"folder:{user.folder / 'images'}", "--image-size", 8)
    succeeds(faqd_deploy("ptq", *user.teacher, *data, *more, "--for", "deepstream", "--out", out))
    bundle = load_bundle(out)
    found = properties((out / DEEPSTREAM).read_text())
    name = STUDENT_DEEPSTREAM if own else STUDENT_TENSORRT
    assert bundle.has(STUDENT_DEEPSTREAM) == own
    assert (found["onnx-file"], found["model-engine-file"]) == (name, name.replace(".onnx", ".engine"))
    images = bundle.evaluation().images
    offsets = np.array([float(each) for each in found.get("offsets", "0").split(";")], np.float32)
    by_nvinfer = np.float32(found["net-scale-factor"]) * (images.astype(np.float32) - offsets)
    fed = np.ascontiguousarray(by_nvinfer.transpose(0, 3, 1, 2))
    (outputs,) = OnnxSession(bundle.path(name), optimise=False).run({"input": fed}).values()
    (wanted,) = (
        OnnxSession(bundle.path(STUDENT_TENSORRT), optimise=False).run({"input": bundle.network_input(images)}).values()
    )
    assert np.array_equal(outputs, wanted) or not own
    np.testing.assert_allclose(outputs, wanted, rtol=0, atol=1e-2)
    assert found["infer-dims"] == f"{images.shape[3]};8;8"
    succeeds(faqd_deploy("verify", out))


@pytest.mark.parametrize("damage", ["preprocess/scale", "weights"])
def test_such_a_file_is_proved(damage: str, tmp_path: Path) -> None:
    user = new_user(tmp_path)
    out = tmp_path / "bundle"
    data = ("--data", f"folder:{user.folder / 'images'}", "--image-size", 8)
    succeeds(faqd_deploy("ptq", *user.teacher, *data, *IMAGENET, "--for", "deepstream", "--out", out))
    path = out / STUDENT_DEEPSTREAM
    model = onnx.load(path)
    tensor = next(
        each
        for each in model.graph.initializer
        if each.name == damage or (damage == "weights" and len(each.dims) == 4 and "preprocess" not in each.name)
    )
    values = onnx.numpy_helper.to_array(tensor).copy()
    values.flat[0] = values.flat[0] * np.float32(1.001) if damage != "weights" else values.flat[0] ^ 1
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    path.write_bytes(model.SerializeToString())
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["files"][STUDENT_DEEPSTREAM]["sha256"] = sha256(path)
    (out / "manifest.json").write_text(json.dumps(manifest))
    told = faqd_deploy("verify", out)
    said = "its preprocessing is not the record's" if damage == "preprocess/scale" else "another network inside"
    assert told.code == 1 and f"{STUDENT_DEEPSTREAM}: " in told.stderr and said in told.stderr


def test_labels_are_as_each_server_reads_them_and_absent_without_classes(tmp_path: Path) -> None:
    both = serving_files(make_bundle(tmp_path / "with"), ["triton", "deepstream"])
    assert both[LABELS["triton"]] == "a cat\na dog\n" and both[LABELS["deepstream"]] == "a cat;a dog\n"
    files = serving_files(make_bundle(tmp_path / "without", classes=None), ["triton", "deepstream"])
    assert set(files) == {TRITON_TENSORRT, TRITON_ONNXRUNTIME, DEEPSTREAM}
    assert not any("labels.txt" in text for text in files.values())
    assert serving_files(make_bundle(tmp_path / "none"), []) == {}
