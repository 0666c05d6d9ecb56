"""How far a build is, on the screen while it lasts, and its end on Ctrl-C.

TensorRT reports phases within phases, each with its number of steps, and stops where a step is answered with False.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from faqd.deploy.engine.trt import IBuilderConfig, TensorRT

Say = Callable[[str], None]


@dataclass
class Phase:
    """One piece of a build's work and how much of it is done."""

    name: str
    parent: str | None
    steps: int
    done: int = 0


class Watch:
    """What TensorRT tells of its phases. It calls from threads of its own; `cancelled` is set from ours."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()

    def start(self, phase: Phase) -> None: ...

    def step(self, phase: Phase) -> None: ...

    def finish(self, phase: Phase) -> None: ...


class Lines(Watch):
    """A line for each step of the outermost phase: for logs."""

    def __init__(self, name: str, say: Say) -> None:
        super().__init__()
        self._name, self._say = name, say

    def step(self, phase: Phase) -> None:
        if phase.parent is None:
            self._say(f"{self._name}: {phase.name}: {phase.done} of {phase.steps}")


class Bars(Watch):
    """A bar for each phase that is under way: for terminals."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress
        self._bars: dict[str, TaskID] = {}

    def start(self, phase: Phase) -> None:
        self._bars[phase.name] = self._progress.add_task(phase.name, total=phase.steps)

    def step(self, phase: Phase) -> None:
        self._progress.update(self._bars[phase.name], completed=phase.done)

    def finish(self, phase: Phase) -> None:
        self._progress.remove_task(self._bars.pop(phase.name))


@contextlib.contextmanager
def watched(name: str, say: Say, console: Console | None = None) -> Iterator[Watch]:
    """What to show the build of the engine `name` with: bars where stderr is a terminal, else lines through `say`."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield Lines(name, say)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bars(progress)


def interruptible(trt: TensorRT, config: IBuilderConfig, watch: Watch, build: Callable[[], Any]) -> Any:
    """`build()` with its phases told to `watch`; Ctrl-C ends it at TensorRT's next step and is raised then.

    The build runs in a thread: TensorRT gives the interpreter free, but a signal waits until the main thread is back
    in Python.
    """
    config.progress_monitor = _monitor(trt, watch)
    outcome: list[Any] = []
    failure: list[BaseException] = []
    ended = threading.Event()

    def work() -> None:
        try:
            outcome.append(build())
        except BaseException as error:
            failure.append(error)
        finally:
            ended.set()

    thread = threading.Thread(target=work, name="build")
    thread.start()
    try:
        ended.wait()
    except KeyboardInterrupt:
        watch.cancelled.set()
        raise
    finally:
        thread.join()
    if failure:
        raise failure[0]
    return outcome[0]


def _monitor(trt: TensorRT, watch: Watch) -> Any:
    base: Any = trt.module.IProgressMonitor

    class Monitor(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)  # As with the logger: pybind11 wants it called so.
            self._phases: dict[str, Phase] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phase = self._phases[phase_name] = Phase(phase_name, parent_phase, num_steps)
            watch.start(phase)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase := self._phases.get(phase_name):
                phase.done = step + 1
                watch.step(phase)
            return not watch.cancelled.is_set()

        def phase_finish(self, phase_name: str) -> None:
            if phase := self._phases.pop(phase_name, None):
                watch.finish(phase)

    return Monitor()
