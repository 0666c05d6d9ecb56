"""Which TensorRT is installed, and what it says while it works: `tensorrt` first, then `tensorrt_rtx`."""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from faqd.errors import UserError, first_line
from faqd.extras import install

Name = Literal["tensorrt", "tensorrt_rtx"]
NAMES: tuple[Name, ...] = ("tensorrt", "tensorrt_rtx")

TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}


def how_to_install() -> str:
    return (
        "On a Jetson TensorRT comes with JetPack (use a virtual environment with system site packages); on x86 with an "
        f"NVIDIA GPU: {install('tensorrt')}; to build and check without a GPU: {install('rtx')}"
    )


# The bindings carry no types. These say to the reader, and to the test that holds every name we use against each
# version's, of which class a value is.
Builder: TypeAlias = Any
IBuilderConfig: TypeAlias = Any
ICudaEngine: TypeAlias = Any
IExecutionContext: TypeAlias = Any
ILayer: TypeAlias = Any
ILogger: TypeAlias = Any
INetworkDefinition: TypeAlias = Any
IProfiler: TypeAlias = Any
ITensor: TypeAlias = Any
ParserError: TypeAlias = Any
Plan: TypeAlias = Any
"""IHostMemory: an engine's bytes before they are a file."""


@dataclass(frozen=True)
class TensorRT:
    """An imported TensorRT: `module` is what `import tensorrt` gives."""

    name: Name
    module: Any

    @property
    def version(self) -> str:
        return str(self.module.__version__)

    @property
    def release(self) -> tuple[int, ...]:
        """The first three numbers of the version: what an engine is bound to."""
        return release(self.version)

    @property
    def is_rtx(self) -> bool:
        return self.name == "tensorrt_rtx"

    @property
    def strongly_typed(self) -> bool:
        """Whether the types in the ONNX are what runs.

        NVIDIA calls that complete from 10.12; below, INT8 and FP16 are flags of the builder. RTX, which counts
        1.x, never had anything else.
        """
        return self.is_rtx or self.release >= (10, 12)

    def __str__(self) -> str:
        return f"{TITLES[self.name]} {self.version}"


def release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def installed(name: Name | None = None) -> TensorRT:
    """The TensorRT of this machine, the one called `name` if it is here; UserError that says what to install where
    there is none."""
    reasons = []
    for one in by_preference(name):
        found = flavour(one)
        if isinstance(found, TensorRT):
            return found
        reasons.append(f"{one}: {found}")
    raise UserError(f"this needs TensorRT, which cannot be imported ({'; '.join(reasons)}). {how_to_install()}")


def builder_here(on_gpu: bool) -> tuple[TensorRT, str]:
    """What builds engines on this machine, and what is to be said of the choice, if anything.

    Without a GPU that is TensorRT-RTX where it is installed: the full TensorRT makes no builder there.
    """
    trt = installed(None if on_gpu else "tensorrt_rtx")
    other = flavour("tensorrt") if trt.is_rtx and not on_gpu else None
    if not isinstance(other, TensorRT):
        return trt, ""
    return trt, f"{other} is installed too, but builds only where there is a GPU: {trt} builds instead."


def by_preference(name: str | None) -> list[Name]:
    """The names in the order in which to import them. The first that works is enough: two in one process share
    names of symbols and types."""
    return sorted(NAMES, key=lambda one: one != name)


@functools.cache
def flavour(name: Name) -> TensorRT | str:
    """The TensorRT that is imported by this name, or why it cannot be."""
    try:
        return TensorRT(name, importlib.import_module(name))
    except (ImportError, OSError) as error:
        # The bindings without their libraries fail so as well, with the library's name in the text.
        return first_line(error)


@dataclass
class Messages:
    """What TensorRT said: errors and warnings in order, each once, and the kernel list of a verbose build."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    layers: str = ""

    def why(self) -> str:
        """The errors as one line, for a sentence."""
        return "; ".join(self.errors) or "it gave no reason"


@contextlib.contextmanager
def heard(trt: TensorRT) -> Iterator[tuple[ILogger, Messages]]:
    """TensorRT's logger, which prints nothing, and what it is told within the block."""
    messages = Messages()
    _listeners.append(messages)
    try:
        yield _logger(trt), messages
    finally:
        _listeners.pop()


_listeners: list[Messages] = []


@functools.cache
def _logger(trt: TensorRT) -> ILogger:
    """One for the process: TensorRT keeps to the first logger as long as anything made with it lives, and tells a
    second one nothing."""
    base: Any = trt.module.ILogger
    grave = (base.INTERNAL_ERROR, base.ERROR)

    class Collector(base):  # type: ignore[misc]
        def __init__(self) -> None:
            # pybind11 asks for the base class itself: super().__init__() leaves the object unusable.
            base.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if not _listeners:
                return
            if severity in grave:
                _add(_listeners[-1].errors, text)
            elif severity == base.WARNING:
                _add(_listeners[-1].warnings, text)
            elif text.startswith("Layers:"):
                _listeners[-1].layers = text

    return Collector()


def _add(to: list[str], text: str) -> None:
    line = " ".join(text.split())
    if line not in to and "Using global log stream" not in line:
        to.append(line)
