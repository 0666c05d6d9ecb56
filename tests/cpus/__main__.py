"""Holds onnxruntime on other CPUs against the reference, as .ci/test_cpus calls it: python -m tests.cpus WORK

Exit code 1 if a code differs somewhere, if a process ends badly, or if a CPU was not emulated.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from time import monotonic

import click

from tests.cpus import runner
from tests.cpus.emulated import A76, CPUS, Cpu, run_as
from tests.cpus.judge import instruction_sets, objections, verdicts
from tests.cpus.students import SATURATING, Case, cases, write_cases
from tests.fixtures.tiny_bundles import make_bundle

ROW = "{:<14} {:<21} {:>8} {:>9} {:>7}  {:>4}  {}"
SHORT_BENCH = ("--backend", "onnxruntime", "--duration", "0.1", "--warm-up", "10", "--rounds", "2")


def main(work: Path) -> list[str]:
    """Prints a table, codes and differing ones of every student on every CPU, and returns what is wrong.

    work: as `run_as` has it; segments/, results/ and bundle/ in it are written anew.
    """
    started = monotonic()
    segments = emptied(work / "segments")
    found = cases()
    write_cases(found, segments)
    click.echo(f"{len(found)} segments of students written: {monotonic() - started:.0f} s")
    click.echo(ROW.format("CPU", "student", "codes", "differing", "largest", "s", "instruction sets"))
    wrong = [text for cpu in CPUS for text in judged_on(cpu, work, found)]
    if not wrong:
        click.echo(f"The students have the reference's codes on every CPU; the {SATURATING} shows which ones saturate.")
    return wrong + wheel_on_arm(work)


def judged_on(cpu: Cpu, work: Path, found: list[Case]) -> list[str]:
    """Runs all segments on a CPU and prints its rows; returns what is wrong there."""
    started = monotonic()
    results = emptied(work / "results")
    done = run_as(cpu, work, runner.__file__, work / "segments", results)
    if done.returncode:
        click.echo(ROW.format(cpu.name, "", "", "", "", f"{monotonic() - started:.0f}", "ended badly"))
        return [bad_end(f"{cpu.name}: onnxruntime", done)]
    seconds, sets = f"{monotonic() - started:.0f}", instruction_sets(results)
    told = verdicts(found, results)
    for one in told:
        click.echo(ROW.format(cpu.name, one.student, one.codes, one.differing, one.largest, seconds, " ".join(sets)))
        seconds = ""
    return objections(cpu, sets, told)


def wheel_on_arm(work: Path) -> list[str]:
    """The commands that a board has, as a Cortex-A76; returns what is wrong with them."""
    bundle = make_bundle(emptied(work / "bundle") / "tiny")
    tools = work / "site/bin"
    started = monotonic()
    doctor = run_as(A76, work, tools / "faqd-deploy", "doctor")
    bench = run_as(A76, work, tools / "faqd-bench", bundle.folder, *SHORT_BENCH)
    click.echo(f"\n{doctor.stdout}faqd-deploy doctor and faqd-bench on {A76.name}: {monotonic() - started:.0f} s")
    wrong = [] if bench.returncode == 0 else [bad_end(f"{A76.name}: faqd-bench", bench)]
    # Exit code 1 is a machine that cannot run engines, such as this one.
    if doctor.returncode != 1:
        wrong.append(bad_end(f"{A76.name}: faqd-deploy doctor", doctor))
    for text in ("Linux aarch64", "no NVIDIA driver found"):
        if text not in doctor.stdout:
            wrong.append(f"{A76.name}: faqd-deploy doctor does not say {text!r}")
    return wrong


def bad_end(what: str, done: subprocess.CompletedProcess[str]) -> str:
    """One sentence, and the end of what the process had to say."""
    how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    return f"{what} ended with {how}: {done.stderr[-2000:].strip()}"


def emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


if __name__ == "__main__":
    for text in (told := main(Path(sys.argv[1]).resolve())):
        click.echo(text, err=True)
    sys.exit(bool(told))
