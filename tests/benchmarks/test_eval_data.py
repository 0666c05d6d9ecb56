"""`faqd-bench --eval-data`: judged on images of the user's own, against what the teacher's file gives for them."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from faqd.benchmarks.measure import eval_data
from faqd.benchmarks.measure.eval_data import evaluation_data
from faqd.benchmarks.record.schema import complaint
from faqd.benchmarks.report.html import page_from_result
from faqd.bundle import EVAL, MANIFEST, TEACHER, Bundle, load_bundle
from tests.benchmarks.test_bench import call
from tests.fixtures.tiny_bundles import CLASSES, SIDE, make_bundle

QUICK = ("--skip-latency", "--backend", "onnxruntime")
IMAGES = 40


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bundle") / "b", noise=0.3)


def judged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *arguments: str | Path) -> dict[str, Any]:
    assert call(monkeypatch, *arguments, *QUICK, "--json", tmp_path / "r.json") == 0
    found: dict[str, Any] = json.loads((tmp_path / "r.json").read_text())
    assert complaint(found) is None
    return found


def folder_of(path: Path, images: Any, labels: Any = None) -> str:
    """PNG files; labels: in subfolders named as the bundle calls its classes."""
    for index, image in enumerate(images):
        place = path if labels is None else path / f"class {labels[index]}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(place / f"{index:03}.png")
    return f"folder:{path}"


def npz_of(path: Path, images: Any, **arrays: Any) -> str:
    np.savez(path, images=images, **arrays)
    return f"npz:{path}"


def test_its_own_images_from_outside_give_its_own_figures(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bundle.evaluation()
    sources = {
        "npz": (npz_of(tmp_path / "e.npz", data.images, labels=data.labels),),
        "folder": (folder_of(tmp_path / "named", data.images, data.labels), "--labels"),
    }
    own = judged(monkeypatch, tmp_path, bundle.folder)
    assert own["evaluation"]["source"] == EVAL
    for source, *more in sources.values():
        found = judged(monkeypatch, tmp_path, bundle.folder, "--eval-data", source, *more)
        assert found["evaluation"]["source"] == source
        assert f">{len(data.images)}</span> images of {source}" in page_from_result(found)
        assert found["evaluation"] == {**own["evaluation"], **{k: found["evaluation"][k] for k in ("source", "sha256")}}
        for mine, theirs in zip(found["networks"], own["networks"], strict=True):
            for key in ("top1", "gap_to_teacher", "agreement"):
                assert (mine["accuracy"] or {}).get(key) == (theirs["accuracy"] or {}).get(key)
        kept = [each["networks"][1]["accuracy"]["fidelity"]["least"] for each in (found, own)]
        assert kept[0] == pytest.approx(kept[1], abs=1e-6)


def test_images_without_labels_and_a_table_of_bundles_with_other_images_of_their_own(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_bundle(tmp_path / "other", "fewer", images=30)
    pixels = np.random.default_rng(9).integers(0, 256, (IMAGES, SIDE, SIDE, 1), np.uint8)
    source = folder_of(tmp_path / "heap", pixels)
    assert call(monkeypatch, bundle.folder, other.folder, *QUICK) == 2
    assert "their eval.npz differ" in capsys.readouterr().err
    (tmp_path / "m.py").write_text(
        "def named(outputs, found):\n"
        "    assert 'labels' not in found and found['sizes'].tolist() == [[8, 8]] * 40\n"
        "    return {'first': float(found['names'][0] == '000.png')}\n"
    )
    line = (bundle.folder, other.folder, "--eval-data", source, "--metric", f"{tmp_path / 'm.py'}:named")
    found = judged(monkeypatch, tmp_path, *line)
    assert found["evaluation"]["images"] == IMAGES and not found["evaluation"]["labels"]
    assert [network["metric"] for network in found["networks"] if network["role"] == "student"] == [{"first": 1.0}] * 2
    again = judged(monkeypatch, tmp_path, *line)
    assert again["evaluation"]["sha256"] == found["evaluation"]["sha256"]
    with tarfile.open(tmp_path / "heap.tar", "w") as shard:
        for file in sorted((tmp_path / "heap").iterdir()):
            shard.add(file, file.name)
    packed = judged(monkeypatch, tmp_path, *line[:3], f"shards:{tmp_path / 'heap.tar'}", *line[4:])
    assert packed["evaluation"]["sha256"] == found["evaluation"]["sha256"]
    assert packed["networks"][1]["metric"] == found["networks"][1]["metric"]
    manifest = json.loads((other.folder / MANIFEST).read_text())
    manifest["teacher"]["sha256"] = "0" * 64  # read from a run, and not from the user's file
    (other.folder / MANIFEST).write_text(json.dumps(manifest))
    assert judged(monkeypatch, tmp_path, *line)["evaluation"]["sha256"] == found["evaluation"]["sha256"]
    make_bundle(tmp_path / "foreign", seed=5)
    assert call(monkeypatch, bundle.folder, tmp_path / "foreign", *QUICK, "--eval-data", source) == 2
    assert "they have different teachers" in capsys.readouterr().err


def test_dense_outputs_are_kept_of_the_first_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = make_bundle(tmp_path / "dense", dense=True, labels=False)
    pixels = np.random.default_rng(9).integers(0, 256, (100, SIDE, SIDE, 1), np.uint8)
    source = npz_of(tmp_path / "e.npz", pixels)
    monkeypatch.setattr(eval_data, "MOST_VALUES", 70 * SIDE * SIDE)
    told: list[str] = []
    found = evaluation_data(dense, source, False, 1, told.append).evaluation
    assert found.images.shape == pixels.shape and found.teacher["map"].shape == (70, 1, SIDE, SIDE)
    assert "100 images" in told[-1]


@pytest.mark.parametrize(
    ("source", "more", "said"),
    [
        ("digits", (), "--eval-data digits: expected one of npz:PATH, folder:PATH"),
        ("npz:absent.npz", (), "absent.npz: no such file"),
        ("npz:e.npz", ("--labels",), "has no subfolders to take classes from; leave it out."),
        ("npz:eleven.npz", (), f"has labels of {CLASSES + 1} classes"),
        ("npz:named.npz", (), "has labels of the class cat, which "),
        ("", ("--labels",), "--labels: the images of a bundle have their labels with them"),
    ],
)
def test_what_cannot_be_judged_on_is_refused(
    bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    source: str,
    more: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(9).integers(0, 256, (IMAGES, SIDE, SIDE, 1), np.uint8)
    npz_of(tmp_path / "e.npz", pixels)
    npz_of(tmp_path / "named.npz", pixels, labels=np.zeros(IMAGES, int), classes=["cat"])
    npz_of(tmp_path / "eleven.npz", pixels, labels=np.full(IMAGES, CLASSES))
    given = ("--eval-data", source) if source else ()
    assert call(monkeypatch, bundle.folder, *QUICK, *given, *more) == 2
    assert said in capsys.readouterr().err


def test_it_needs_the_teacher(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    folder = Path(shutil.copytree(bundle.folder, tmp_path / "b"))
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"][TEACHER]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    load_bundle(folder)
    pixels = np.zeros((2, SIDE, SIDE, 1), np.uint8)
    assert call(monkeypatch, folder, *QUICK, "--eval-data", npz_of(tmp_path / "e.npz", pixels)) == 2
    assert f"holds no {TEACHER}, which --eval-data needs" in capsys.readouterr().err
