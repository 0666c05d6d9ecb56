"""Pictures of one's own through a bundle: the same pixels, the same numbers as everywhere else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import faqd
from faqd.bundle import load_bundle
from tests.fixtures.toy_runs import NET, User, faqd_deploy, new_user, succeeds, write_images

DENSE = NET.replace("return self.head(self.features(x).mean((2, 3)))", "return self.features(x)")


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> User:
    return new_user(tmp_path_factory.mktemp("user"))


def quantized(user: User, out: Path, *more: object) -> Path:
    succeeds(faqd_deploy("ptq", *user.teacher, *user.data, "--out", out, *more))
    return out


@pytest.mark.parametrize("form", ["float32-nchw", "uint8-nhwc"])
@pytest.mark.parametrize("channels", ["rgb", "bgr"])
def test_a_picture_gives_what_the_bundles_own_images_give(user: User, tmp_path: Path, form: str, channels: str) -> None:
    bundle = quantized(user, tmp_path / "bundle", "--input", form, "--channels", channels)
    out = tmp_path / "o.npz"
    said = succeeds(faqd_deploy("predict", bundle, "--images", user.folder / "images", "--out", out)).stdout
    found = np.load(out)
    loaded = load_bundle(bundle)
    held = loaded.evaluation().images
    wanted = faqd.Engine(bundle)(loaded.network_input(held))
    rows = {row.tobytes() for row in found["student.logits"]}
    assert len(held) > 5 and all(row.tobytes() in rows for row in np.asarray(wanted))
    lines = said.splitlines()
    assert len(lines) == len(found["files"]) == len(list((user.folder / "images").iterdir()))
    for line, file, scores in zip(lines, found["files"], found["student.logits"], strict=True):
        assert line == f"{file}: {scores.argmax()} {scores.max():.4g}"


def test_top_classes_by_name_as_lines_and_json(user: User, tmp_path: Path) -> None:
    for index, kind in enumerate(("cats", "dogs", "mice")):
        write_images(tmp_path / "labelled" / kind, 40 + index)
    bundle = tmp_path / "bundle"
    line = ("--data", f"folder:{tmp_path / 'labelled'}", "--labels", "--mean", "none", "--std", "none", "--out", bundle)
    net = tmp_path / "net.py"
    net.write_text(NET.replace("classes=10", "classes=3"))
    import torch

    names: dict[str, object] = {}
    exec(net.read_text(), names)
    torch.manual_seed(0)
    torch.save(names["build"]().state_dict(), tmp_path / "best.pth")  # type: ignore[operator]
    succeeds(faqd_deploy("ptq", "--teacher", f"{net}:build", "--teacher-weights", tmp_path / "best.pth", *line))
    picture = sorted((user.folder / "images").iterdir())[0]
    shown = succeeds(faqd_deploy("predict", bundle, "--images", picture, "--top", 2, "--json", "-"))
    record = json.loads(shown.stdout)
    (one,) = record["images"]
    assert record["runs_on"] == "onnxruntime" and one["file"] == str(picture)
    best, second = one["top"]
    assert {best["class"], second["class"]} < {"cats", "dogs", "mice"} and best["score"] >= second["score"]
    assert one["outputs"]["logits"][best["index"]] == best["score"]
    (words,) = succeeds(faqd_deploy("predict", bundle, "--images", picture, "--top", 2)).stdout.splitlines()
    assert words == f"{picture}: {best['class']} {best['score']:.4g}, {second['class']} {second['score']:.4g}"


def test_dense_outputs_are_described_and_written_whole(user: User, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(DENSE)
    weights = user.folder / "best.pth"
    line = ("--teacher", f"{tmp_path / 'net.py'}:build", "--teacher-weights", weights, *user.data)
    bundle = tmp_path / "bundle"
    succeeds(faqd_deploy("ptq", *line, "--out", bundle))
    out, target = tmp_path / "o.npz", tmp_path / "o.json"
    shown = faqd_deploy("predict", bundle, "--images", user.folder / "images", "--out", out, "--json", target)
    assert "logits 16x4x4, " in succeeds(shown).stdout.splitlines()[0]
    assert np.load(out)["student.logits"].shape[1:] == (16, 4, 4)
    assert json.loads(target.read_text())["images"][0]["outputs"] == {"logits": {"shape": [16, 4, 4]}}


def test_what_is_no_picture_is_left_out_and_nothing_is_an_error(user: User, tmp_path: Path) -> None:
    bundle = quantized(user, tmp_path / "bundle")
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    Image.new("L", (30, 20), 90).save(mixed / "a.png")
    (mixed / "b.jpg").write_bytes(b"GIF89a")
    shown = succeeds(faqd_deploy("predict", bundle, "--images", mixed))
    assert (
        shown.stdout.count("\n") == 1
        and f"{mixed / 'b.jpg'}: left out, for files like this one are GIF" in shown.stderr
    )
    for images, said in (
        (mixed / "b.jpg", "none of 1 files can be read as a picture"),
        (mixed / "no.jpg", "no such file or folder"),
    ):
        refused = faqd_deploy("predict", bundle, "--images", images, "--out", tmp_path / "o.npz")
        assert refused.code == 2 and said in refused.stderr
    assert not (tmp_path / "o.npz").exists()


def test_an_engine_that_cannot_run_is_not_replaced_in_silence(
    user: User, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = quantized(user, tmp_path / "bundle")
    asked = ("predict", bundle, "--images", user.folder / "images", "--backend", "engine")
    monkeypatch.setattr("faqd.deploy.run_bundle.device_or_none", lambda: (None, "no NVIDIA driver found."))
    refused = faqd_deploy(*asked)
    assert refused.code == 2 and "student.tensorrt.engine: cannot run here: no NVIDIA driver" in refused.stderr
    monkeypatch.setattr("faqd.deploy.run_bundle.device_or_none", lambda: (object(), ""))
    refused = faqd_deploy(*asked)
    assert refused.code == 2 and f"`faqd-deploy build-engine {bundle}` makes student.tensorrt.engine" in refused.stderr
