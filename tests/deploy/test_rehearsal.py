"""distill rehearses the export: what it refuses, it refuses before the first iteration."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.fixtures.toy_runs import NET, User, faqd_train, new_user, succeeds, write_net


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> User:
    return new_user(tmp_path_factory.mktemp("user"))


@pytest.fixture(autouse=True)
def unrehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("faqd.deploy.rehearsal._rehearsed", set())


def test_a_student_is_rehearsed_once_whatever_its_seed(user: User, tmp_path: Path) -> None:
    told = succeeds(user.distill(tmp_path / "run", "--steps", 1, "--seeds", 2, "--weight-bits", "4,8"))
    lines = [line for line in told.stderr.splitlines() if line.startswith("export rehearsed")]
    assert [line.rpartition(": ")[0] for line in lines] == [
        f"export rehearsed on the untrained student {bits}" for bits in ("4/8", "8/8")
    ]
    assert all(line.endswith(" s.") for line in lines)


@pytest.mark.parametrize(
    ("pool", "more", "words"),
    [
        # onnxruntime computes it wrongly on codes.
        ("nn.functional.avg_pool2d(x, 3, 2, 1, True)", [], "an average with ceil_mode that counts its padding"),
        # Operators kept float that torch's exporter, or the reference, does not know.
        ("x.cummax(1)[0]", ["--exclude", "cummax"], "cummax"),
    ],
)
def test_what_cannot_be_exported_is_not_trained(
    user: User, pool: str, more: list[str], words: str, tmp_path: Path
) -> None:
    code = NET.replace("self.features(x)", "self.between(self.features(x))")
    code = code.replace("    def forward", f"    def between(self, x):\n        return {pool}\n\n    def forward", 1)
    net = write_net(tmp_path / "net", code)
    line = ("--teacher", f"{net}:build", "--teacher-weights", net.parent / "best.pth", *user.data, "--batch-size", 16)
    told = faqd_train("distill", *line, *more, "--steps", 1, "--out", tmp_path / "run")
    assert told.code in (1, 2) and words in told.stderr.splitlines()[-1], told.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_that_goes_on_and_a_float_student_are_not_rehearsed(user: User, tmp_path: Path) -> None:
    assert user.distill(tmp_path / "run", "--time-limit", 1e-6).code != 1
    told = succeeds(user.distill(tmp_path / "run", "--resume"))
    assert "rehearsed" not in told.stderr
    told = succeeds(user.distill(tmp_path / "float", "--weight-bits", 32, "--act-bits", 32, "--steps", 1))
    assert "rehearsed" not in told.stderr


def test_without_onnx_there_is_no_rehearsal_and_a_sentence(
    user: User, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "faqd.deploy.rehearsal", raising=False)
    monkeypatch.setitem(sys.modules, "faqd.deploy.export.torch_to_onnx", None)
    told = succeeds(user.distill(tmp_path / "run", "--steps", 1))
    assert "the export is not tried before training" in told.stderr and "[onnx]' brings it" in told.stderr
