"""A bundle in a read-only image: its proof is told all the same, and nothing is built before one knows where to."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from faqd.errors import UserError
from tests.fixtures.toy_runs import everything_in, faqd_deploy, new_user, succeeds


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    user = new_user(tmp_path_factory.mktemp("user"))
    succeeds(faqd_deploy("ptq", *user.teacher, *user.data, "--out", user.folder / "bundle"))
    return user.folder / "bundle"


def test_verify_tells_what_it_found_before_what_it_cannot_keep(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path, value: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    before = everything_in(bundle)
    monkeypatch.setattr("faqd.deploy.conclusion.write_json", refused)
    found = succeeds(faqd_deploy("verify", bundle, "--json", tmp_path / "found.json"))
    assert f"{bundle / 'verify.json'} is as it was, it cannot be written (read-only file system)" in found.stderr
    assert json.loads((tmp_path / "found.json").read_text())["passed"]
    assert json.loads(faqd_deploy("verify", bundle, "--json", "-").stdout)["passed"]
    assert "fidelity" in succeeds(faqd_deploy("verify", bundle)).stdout
    assert faqd_deploy("verify", bundle, "--min-fidelity", "1").code == 1
    assert everything_in(bundle) == before


def test_an_engine_is_not_built_where_it_cannot_be_written(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Path] = []

    def refused(path: Path) -> None:
        if path == bundle:
            raise UserError("no folder can be made there")

    def build(onnx: Path, engine: Path, *_: Any, **__: Any) -> dict[str, Any]:
        built.append(engine)
        return {}

    monkeypatch.setattr("faqd.deploy.engine.bundle_engines.refuse_unmakeable", refused)
    monkeypatch.setattr("faqd.deploy.engine.bundle_engines.engine_from_onnx", build)
    outcome = faqd_deploy("build-engine", bundle)
    assert outcome.code == 2 and "engines cannot be written beside its files. Give --out FOLDER" in outcome.stderr
    assert not built
    succeeds(faqd_deploy("build-engine", bundle, "--all", "--out", tmp_path / "engines"))
    assert [engine.parent for engine in built] == [tmp_path / "engines"] * 3
