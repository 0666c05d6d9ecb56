"""Distillation never looks at a label: permuted, damaged or none, the student is the same to the last byte."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from faqd.train.data import npz_files
from tests.fixtures.toy_runs import PLAIN, everything_in, faqd_train, succeeds


def write_npz(path: Path, labels: NDArray[Any] | None) -> None:
    pixels = np.rint(load_digits().images * 255 / 16).astype(np.uint8)[:200, ..., None]
    arrays: dict[str, Any] = {"images": pixels} if labels is None else {"images": pixels, "labels": labels}
    np.savez(path, **arrays)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    write_npz(folder / "data.npz", load_digits().target[:200])
    line = ("--data", f"npz:{folder / 'data.npz'}", *PLAIN, "--arch", "resnet8", "--steps", 3, "--batch-size", 16)
    succeeds(faqd_train("teacher", *line, "--out", folder / "run"))
    return folder / "run"


def distilled(teacher: Path, data: Path, out: Path) -> bytes:
    line = ("--teacher", teacher, "--data", f"npz:{data}", "--weight-bits", 4, "--act-bits", 4)
    succeeds(faqd_train("distill", *line, "--steps", 12, "--batch-size", 16, "--out", out))
    return everything_in(out)["weights.safetensors"]


def test_permuted_labels_leave_the_weights_byte_identical(teacher: Path, tmp_path: Path) -> None:
    labels = load_digits().target[:200]
    weights = []
    # One file name for all, since a run remembers where its data are.
    for index, these in enumerate((labels, np.random.default_rng(0).permutation(labels), None)):
        write_npz(tmp_path / "data.npz", these)
        weights.append(distilled(teacher, tmp_path / "data.npz", tmp_path / f"run{index}"))
    assert weights[0] == weights[1] == weights[2]


def test_the_array_of_labels_is_not_even_opened(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_npz(tmp_path / "data.npz", None)
    with zipfile.ZipFile(tmp_path / "data.npz", "a") as archive:
        archive.writestr("labels.npy", b"\x93NUMPY, and then nothing of the kind")
    read: list[tuple[str, ...]] = []
    plain = npz_files._npz_arrays

    def listed(path: Path, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        read.append(tuple(names))
        return plain(path, names)

    monkeypatch.setattr(npz_files, "_npz_arrays", listed)
    distilled(teacher, tmp_path / "data.npz", tmp_path / "run")
    assert read == [("images",)]
    # The file is as damaged as it looks: who asks for labels is told.
    with pytest.raises(ValueError, match="not a readable npz file"):
        npz_files.read_npz(tmp_path / "data.npz", with_labels=True)
