"""What holds onnxruntime on other CPUs against the reference: each fault, a missing emulation too, is a sentence."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from faqd.deploy.reference.evaluator import stored
from faqd.deploy.reference.int16_kernel import emulated
from tests.cpus import runner
from tests.cpus.__main__ import bad_end
from tests.cpus.emulated import A76, CPUS, Cpu, run_as, tell_about
from tests.cpus.judge import instruction_sets, objections, verdicts
from tests.cpus.students import SATURATING, SIGNED, Case, cases, write_cases

ROOT = Path(__file__).parents[2]
HERE, HASWELL, NEHALEM = CPUS[:3]


@pytest.fixture(scope="module")
def found() -> list[Case]:
    return cases((SIGNED, SATURATING))


def write_results(
    found: list[Case], folder: Path, student: str, change: Callable[[Case, NDArray[Any]], NDArray[Any]]
) -> None:
    """What the runner writes where onnxruntime computes the reference's values, but for one optimised layer of a
    student: the second of the first, the saturating layer of the other."""
    for index, case in enumerate(found):
        values = stored(case.values[case.segment.output])
        concerned = case.student == student and case.segment.layer in ("bn1", "out")
        np.savez(folder / f"{index:03}.npz", plain=values, optimised=change(case, values) if concerned else values)


def right(case: Case, codes: NDArray[Any]) -> NDArray[Any]:
    return codes


def one_code_two_off(case: Case, codes: NDArray[Any]) -> NDArray[Any]:
    changed: NDArray[Any] = codes.copy()
    changed.flat[0] ^= 2
    return changed


def halved(case: Case, codes: NDArray[Any]) -> NDArray[Any]:
    smaller: NDArray[Any] = codes // 2
    return smaller


def saturated(case: Case, codes: NDArray[Any]) -> NDArray[Any]:
    found = emulated(case.segment.model, case.feeds, case.segment.output)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("cpu", "sets", "student", "change", "told"),
    [
        (NEHALEM, ["SSE42"], "", right, []),
        (HERE, ["SSE42", "AVX2"], "", right, []),
        (HERE, ["SSE42", "AVX2"], SATURATING, saturated, []),
        (HASWELL, ["SSE42", "AVX2"], SATURATING, saturated, []),
        (HASWELL, ["SSE42", "AVX2"], "", right, ["Haswell: not emulated: the saturating layer came out right"]),
        (
            HASWELL,
            ["AVX2", "AVX512F", "AVX512VNNI"],
            SATURATING,
            saturated,
            ["Haswell: not emulated: it ran with AVX512F"],
        ),
        (
            HASWELL,
            ["SSE42", "AVX2"],
            SATURATING,
            halved,
            ["Haswell: the saturating layer gives other codes than `verify` knows of saturating kernels"],
        ),
        (
            A76,
            [],
            SIGNED,
            one_code_two_off,
            [
                "Cortex-A76: not emulated: it ran without ASIMDDP",
                "Cortex-A76: signed activations: bn1: 1 of 32768 quantized values differ in optimised onnxruntime, by "
                "up to 2",
            ],
        ),
    ],
    ids=["right", "right here", "saturates here", "Haswell", "exact on Haswell", "AVX-512", "otherwise", "a code"],
)
def test_a_run_is_judged_by_what_its_cpu_is_known_for(
    found: list[Case],
    tmp_path: Path,
    cpu: Cpu,
    sets: list[str],
    student: str,
    change: Callable[[Case, NDArray[Any]], NDArray[Any]],
    told: list[str],
) -> None:
    write_results(found, tmp_path, student, change)
    assert objections(cpu, sets, verdicts(found, tmp_path)) == told


def test_saturation_is_told_where_the_cpu_has_none(found: list[Case], tmp_path: Path) -> None:
    write_results(found, tmp_path, SATURATING, saturated)
    told = objections(NEHALEM, ["SSE42"], verdicts(found, tmp_path))
    assert told and all(text.startswith("Nehalem: saturating layer: ") for text in told)


def test_the_runner_runs_every_segment_with_little(found: list[Case], tmp_path: Path) -> None:
    """Plain, which no CPU's integer kernels touch; onnx, torch and faqd may not be needed."""
    segments, results = tmp_path / "segments", tmp_path / "results"
    segments.mkdir()
    results.mkdir()
    write_cases(found, segments)
    code = f"import runpy, sys; sys.modules.update(dict.fromkeys({('faqd', 'onnx', 'torch', 'click')!r}))\n"
    code += (
        f"sys.argv[1:] = {[str(segments), str(results)]!r}; runpy.run_path({runner.__file__!r}, run_name='__main__')"
    )
    done = run_as(HERE, tmp_path, "-c", code)
    assert (done.returncode, done.stderr) == (0, "")
    assert instruction_sets(results)
    told = [text for one in verdicts(found, results) for text in one.failures]
    assert [text for text in told if "in plain onnxruntime" in text] == []


def test_every_layer_has_codes_to_tell_apart(found: list[Case]) -> None:
    for case in found:
        values = stored(case.values[case.segment.output])
        assert case.student == SATURATING or len(np.unique(values)) > 30, (case.student, case.segment.layer)


def test_an_arm_process_is_told_of_one_core_of_its_own_kind(tmp_path: Path) -> None:
    tell_about(A76, tmp_path)
    text = (tmp_path / "proc/cpuinfo").read_text()
    assert text.count("processor") == 1 and "CPU implementer\t: 0x41\n" in text and "CPU part\t: 0xd0b\n" in text
    assert (tmp_path / "sys/devices/system/cpu/present").read_text() == "0\n"


@pytest.mark.parametrize(
    ("code", "end"),
    [
        ("import os; os.kill(os.getpid(), 11)", "it ended with signal 11: "),
        ("import sys; sys.exit('no such kernel')", "it ended with exit code 1: no such kernel"),
    ],
)
def test_a_process_that_dies_is_told(code: str, end: str, tmp_path: Path) -> None:
    assert bad_end("it", run_as(HERE, tmp_path, "-c", code)) == end


def test_on_another_system_it_ends_in_a_sentence(tmp_path: Path) -> None:
    uname = tmp_path / "uname"
    uname.write_text("#!/bin/sh\necho riscv64\n")
    uname.chmod(0o755)
    line = [str(ROOT / ".ci/test_cpus"), sys.executable, "faqd.whl", str(tmp_path / "work")]
    done = subprocess.run(line, capture_output=True, text=True, env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: this is ") and " on riscv64; other CPUs are emulated on " in done.stderr
    assert not (tmp_path / "work").exists()
