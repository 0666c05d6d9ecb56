"""The command lines: their options, frozen; every help text a sentence; exit codes."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from faqd.benchmarks.cli import bench_command
from faqd.cli import cli as faqd_cli
from faqd.command import Command, ending_in_a_sentence, run
from faqd.deploy.cli import cli as deploy_cli
from faqd.errors import UserError
from faqd.extras import install
from faqd.files import written_beside
from faqd.given import arguments_given
from faqd.train.cli import cli as train_cli
from tests.fixtures.toy_runs import faqd_deploy, faqd_train, outcome_of, succeeds

DATA = "--data --eval-data --data-root --download --image-size --resize --channels --mean --std --labels --limit"
SCHEDULE = "--epochs --steps --batch-size --accumulate --lr --seed --views --data-seed --device --workers"
SCHEDULE += " --decode --time-limit"
RUN = "--out --resume --json"
BUNDLE = "--out --eval-samples --float-type --input --for --license --min-fidelity --json"

# Changing a line here changes what people have in their scripts: say so in the changelog.
FLAGS = {
    "faqd": "--version",
    "faqd-train": "--version",
    "faqd-train teacher": f"--recipe --arch {DATA} {SCHEDULE} {RUN}",
    "faqd-train distill": (
        f"--recipe --teacher --teacher-weights --teacher-dtype --cache-teacher {DATA} "
        "--arch --init --weight-bits --act-bits --target --scales --rounding --scale-gradient --calibration --equalize "
        "--asymmetric --attention --exclude --strict --logit --logit-weight --temperature --affinity "
        "--affinity-weight --affinity-floor --columns --adaptors --feature-layer --label-weight "
        f"{SCHEDULE} --optimizer --autocast --seeds --select {RUN}"
    ),
    "faqd-train recover": (
        f"--teacher --teacher-weights {DATA} --weight-bits --act-bits --target --keep-float --attention --exclude "
        "--strict --epochs --steps --batch-size --device --workers --time-limit --out --resume --min-fidelity --json"
    ),
    "faqd-train eval": "--data --data-root --json",
    "faqd-train curves": "--tensorboard --json",
    "faqd-train recipes": "--json",
    "faqd-train inspect": (
        "--teacher --teacher-weights --arch --image-size --input-channels --weight-bits --act-bits --target --scales "
        "--attention --exclude --strict --json"
    ),
    "faqd-deploy": "--version",
    "faqd-deploy export": f"--data --data-root --eval-data --labels {BUNDLE}",
    "faqd-deploy ptq": (
        f"--teacher --teacher-weights {DATA} --weight-bits --act-bits --target --calibration --calibration-images "
        f"--equalize --asymmetric --attention --exclude --strict --keep-float {BUNDLE}"
    ),
    "faqd-deploy sensitivity": (
        f"--teacher --teacher-weights {DATA} --weight-bits --act-bits --target --calibration --calibration-images "
        "--equalize --asymmetric --attention --exclude --strict --images --chart --json"
    ),
    "faqd-deploy verify": "--min-fidelity --json",
    "faqd-deploy explain": "--rules-only --json",
    "faqd-deploy inspect": "--json",
    "faqd-deploy predict": "--images --top --out --json --backend",
    "faqd-deploy build-engine": (
        "--all --force --min-shapes --opt-shapes --max-shapes --workspace --opt-level --timing-cache "
        "--frozen-timing-cache --version-compatible --hardware-compatibility --profiling-verbosity --out --json"
    ),
    "faqd-deploy doctor": "--json",
    "faqd-deploy selftest": "--cases --cuda --json",
    "faqd-bench": (
        "--batch --threads --backend --cuda --trust --metric --bootstrap --eval-data --labels "
        "--warm-up --duration --iterations --avg-runs --percentile --rounds --skip-latency --sweep --sustained "
        "--preset --use-cuda-graph --use-spin-wait --include-data-transfers --zero-copy --inf-streams "
        "--energy-duration --power-rail --min-accuracy-ratio --min-agreement --max-p99-ms --max-energy-mj "
        "--from --compare --report --pictures --json --dump-profile --export-profile --export-times --version"
    ),
}
TOOLS: dict[str, click.Command] = {
    "faqd": faqd_cli,
    "faqd-train": train_cli,
    "faqd-deploy": deploy_cli,
    "faqd-bench": bench_command,
}


def commands() -> Iterator[tuple[str, click.Command]]:
    for tool, command in TOOLS.items():
        yield tool, command
        if command is faqd_cli:  # its commands are the others
            continue
        for name, below in command.commands.items() if isinstance(command, click.Group) else ():
            yield f"{tool} {name}", below


@pytest.mark.parametrize("tool", TOOLS)
def test_dash_h_is_help(tool: str) -> None:
    result = CliRunner().invoke(TOOLS[tool], ["-h"])
    assert result.exit_code == 0 and result.output.startswith("Usage:")


def test_one_name_has_the_three_command_lines() -> None:
    assert faqd_cli.commands == {"train": train_cli, "deploy": deploy_cli, "bench": bench_command}
    listed = " ".join(CliRunner().invoke(faqd_cli, ["-h"]).output.partition("Commands:")[2].split())
    assert "..." not in listed and all(f"{name} " in listed for name in faqd_cli.commands)


def test_a_command_knows_its_arguments_under_either_name_and_called_from_another_program() -> None:
    found: list[list[str]] = []

    @click.command(cls=Command)
    @click.argument("words", nargs=-1)
    def tell(words: tuple[str, ...]) -> None:
        found.append(arguments_given())

    above = click.Group("faqd", commands={"bench": tell})
    for command, arguments in ((tell, ["a", "b"]), (above, ["bench", "a", "b"])):
        command.main(arguments, standalone_mode=False)
        assert found.pop() == ["a", "b"]


def options(command: click.Command) -> list[click.Option]:
    return [parameter for parameter in command.params if isinstance(parameter, click.Option)]


def test_the_flags_are_these() -> None:
    assert {name: " ".join(o.opts[0] for o in options(command)) for name, command in commands()} == FLAGS


@pytest.mark.parametrize(("name", "command"), list(commands()))
def test_every_help_text_is_a_sentence(name: str, command: click.Command) -> None:
    texts = {option.opts[0]: option.help or "" for option in options(command)}
    texts[name] = (command.help or "").strip()
    poor = {key: text for key, text in texts.items() if not (text[:1].isupper() and text.endswith("."))}
    assert not poor


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (UserError("a.txt: wrong."), 2, "error: a.txt: wrong.\n"),
        (UserError("too slow.", exit_code=1), 1, "error: too slow.\n"),
        (KeyboardInterrupt(), 130, "error: interrupted.\n"),
        (click.exceptions.Abort(), 130, "error: interrupted.\n"),
        (
            ModuleNotFoundError("No module named 'torch'", name="torch.nn"),
            2,
            f"error: this command needs torch.nn, which is not installed: {install('train')}\n",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "run/x"),
            2,
            "error: no space left on the disk (run/x): free some, then run the same command again, a training with "
            "--resume.\n",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "run"),
            2,
            "error: not permitted to write or read (run): choose another folder.\n",
        ),
        (
            NotADirectoryError(errno.ENOTDIR, "Not a directory", "f/run"),
            2,
            "error: a file stands where a folder is needed (f/run): choose another place.\n",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_an_expected_failure_is_one_sentence(
    raised: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end, ending_in_a_sentence():
        raise raised
    assert end.value.code == code
    assert capsys.readouterr() == ("", said)


@pytest.mark.parametrize("bug", [ValueError("no"), ModuleNotFoundError("x", name="faqd.x"), OSError(errno.EIO, "I/O")])
def test_a_bug_keeps_its_traceback(bug: Exception) -> None:
    with pytest.raises(type(bug)), ending_in_a_sentence():
        raise bug


def test_a_command_that_exits_hands_its_code_on() -> None:
    @click.command()
    def fails() -> None:
        raise click.exceptions.Exit(1)

    with pytest.raises(SystemExit) as end:
        run(fails, [])
    assert end.value.code == 1


def test_a_terminated_command_leaves_nothing_half_written(tmp_path: Path) -> None:
    @click.command()
    def writes() -> None:
        with written_beside(tmp_path / "file") as temporary:
            temporary.write_text("half")
            signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        run(writes, [])
    assert end.value.code == 143 and not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("line", [["--help"], ["--version"], ["teacher", "-h"]])
def test_help_and_version_end_well(line: list[str]) -> None:
    assert faqd_train(*line).code == 0


def test_the_version_names_what_a_report_of_a_fault_needs() -> None:
    said = succeeds(faqd_deploy("--version")).stdout
    assert said.startswith("faqd ") and all(f"{name} " in said for name in ("Python", "torch", "onnx", "onnxruntime"))


def test_no_memory_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    @click.command()
    def takes_all() -> None:
        raise MemoryError("Unable to allocate 112. GiB")

    with pytest.raises(SystemExit) as end:
        run(takes_all, [])
    assert (
        end.value.code == 2
        and "not enough memory (Unable to allocate 112. GiB): give smaller" in capsys.readouterr().err
    )


def test_json_never_takes_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "kept").touch()
    outcome = faqd_train("recipes", "--json", tmp_path)
    assert outcome.code == 2 and "is a directory" in outcome.stderr
    assert (tmp_path / "kept").exists()


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path: Path) -> None:
    """So does /dev/null: a rename would put a file in its place."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    outcome = faqd_train("recipes", "--json", pipe)
    assert outcome.code == 0 and isinstance(json.loads(os.read(reader, 1 << 16)), list | dict)
    os.close(reader)
    assert pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]


@pytest.mark.parametrize("option", ["--json", "--report", "--export-times", "--export-profile"])
def test_what_cannot_be_written_is_said_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setattr("faqd.benchmarks.cli._measure", lambda *_: pytest.fail("measured first"))
    (tmp_path / "file").touch()
    for target in (tmp_path / "file" / "r", tmp_path / "file" / "deep" / "r"):
        outcome = outcome_of(bench_command, (tmp_path / "bundle", option, target))
        assert outcome.code == 2 and f"{tmp_path / 'file'} is a file" in outcome.stderr
    monkeypatch.setattr(os, "access", lambda folder, mode: False)
    outcome = outcome_of(bench_command, (tmp_path / "bundle", option, tmp_path / "new" / "r"))
    assert outcome.code == 2 and f"no permission to write into {tmp_path}" in outcome.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_where_no_file_can_be_made_is_a_sentence() -> None:
    with pytest.raises((UserError, PermissionError), match="faqd"), written_beside(Path("/proc/faqd")) as temporary:
        temporary.touch()
