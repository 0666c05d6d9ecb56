"""A cure for a missing library is a line that works: it names the checkout or the wheel, and the pip of this Python."""

from __future__ import annotations

import json
import shlex
import sys
from importlib import metadata
from pathlib import Path

import pytest

from faqd import extras
from faqd.extras import EXTRA_OF, install


class Installed:
    """What metadata.distribution gives for a package that pip has installed from `url`."""

    def __init__(self, url: str | None) -> None:
        self.url = url

    def read_text(self, name: str) -> str | None:
        return None if self.url is None else json.dumps({"url": self.url})


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel, and faqd as if it lay in site-packages."""
    monkeypatch.setattr(extras, "__file__", str(tmp_path / "site-packages" / "faqd" / "extras.py"))
    monkeypatch.setattr(extras, "__version__", "1.2")
    path = tmp_path / "some wheels" / "faqd-1.2-py3-none-any.whl"
    path.parent.mkdir()
    path.touch()
    return path


def argument(line: str) -> str:
    *pip, verb, what = shlex.split(line)
    assert verb == "install" and pip[-1].endswith("pip")
    return what


def test_a_checkout_is_named_from_wherever_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "checkout"
    (root / "faqd").mkdir(parents=True)
    (root / "setup.cfg").touch()
    monkeypatch.setattr(extras, "__file__", str(root / "faqd" / "extras.py"))
    for folder, named in ((root, ".[onnx]"), (tmp_path, "./checkout[onnx]"), (root / "faqd", f"{root}[onnx]")):
        monkeypatch.chdir(folder)
        assert argument(install("onnx")) == named


def test_a_wheel_is_named_where_it_lies_and_by_its_name_where_it_is_gone(
    wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "distribution", lambda name: Installed(wheel.as_uri()))
    assert argument(install("train")) == f"{wheel}[train]"
    wheel.unlink()
    assert argument(install("train")) == f"{wheel.name}[train]"
    for url in (None, "https://somewhere/faqd.whl"):
        monkeypatch.setattr(metadata, "distribution", lambda name, url=url: Installed(url))
        assert argument(install("train")) == f"{wheel.name}[train]"


def test_another_pip_on_the_path_is_not_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "bin"
    here.mkdir()
    monkeypatch.setattr(sys, "executable", str(here / "python"))
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/pip")
    assert install("onnx").startswith(f"{here / 'python'} -m pip install ")
    monkeypatch.chdir(tmp_path)
    assert install("onnx").startswith("bin/python -m pip install ")
    monkeypatch.setattr("shutil.which", lambda name: str(here / "pip"))
    assert install("onnx").startswith("pip install ")


def test_every_extra_that_a_cure_names_exists() -> None:
    text = (Path(__file__).parents[2] / "setup.cfg").read_text("utf-8")
    assert all(f"\n{extra} =\n" in text for extra in {*EXTRA_OF.values(), "tensorrt", "rtx", "pycuda"})
