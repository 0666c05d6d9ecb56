"""What a builder is asked for: the options, the shapes that follow from them, and the same as a line for trtexec."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from faqd.deploy.engine.trt import TensorRT
from faqd.errors import UserError

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
HardwareCompatibility = Literal["none", "ampere+", "same-compute-capability"]
ProfilingVerbosity = Literal["layer_names_only", "detailed", "none"]

MOST_ELEMENTS = 2**31 - 1
"""Of one input: what TensorRT counts in 32 bits."""
MOST_WORKSPACE_MIB = 2**24
"""16 TiB, far beyond any GPU and within TensorRT's 64 bits."""
BATCHES = (1, 8, 64)
"""Smallest, typical and largest batch of an input whose batch is free and for which nobody gave shapes."""

_SHAPES = ("--min-shapes", "--opt-shapes", "--max-shapes")
_HARDWARE = {"ampere+": "AMPERE_PLUS", "same-compute-capability": "SAME_COMPUTE_CAPABILITY"}


@dataclass(frozen=True)
class BuildOptions:
    """Named as trtexec names them. None is the builder's default; shapes are by input name.

    opt_level: 0 to 5, effort of the search. workspace_mib: limit of scratch memory. timing_cache: a file that is read
    if it is there and written after the build; with frozen_timing_cache it is read only, and what it lacks ends the
    build.
    """

    min_shapes: Shapes = field(default_factory=dict)
    opt_shapes: Shapes = field(default_factory=dict)
    max_shapes: Shapes = field(default_factory=dict)
    workspace_mib: int | None = None
    opt_level: int | None = None
    timing_cache: Path | None = None
    frozen_timing_cache: bool = False
    version_compatible: bool = False
    hardware_compatibility: HardwareCompatibility = "none"
    profiling_verbosity: ProfilingVerbosity = "detailed"

    def __post_init__(self) -> None:
        if self.opt_level is not None and not 0 <= self.opt_level <= 5:
            raise UserError(f"--opt-level {self.opt_level}: the builder knows 0 to 5.")
        if self.workspace_mib is not None and not 1 <= self.workspace_mib <= MOST_WORKSPACE_MIB:
            raise UserError(f"--workspace {self.workspace_mib}: give 1 to {MOST_WORKSPACE_MIB} MiB.")
        if self.frozen_timing_cache and self.timing_cache is None:
            raise UserError("--frozen-timing-cache: name the cache with --timing-cache FILE.")

    def to_json(self) -> dict[str, Any]:
        return {
            "workspace_mib": self.workspace_mib,
            "opt_level": self.opt_level,
            "timing_cache": None if self.timing_cache is None else self.timing_cache.name,
            "frozen_timing_cache": self.frozen_timing_cache,
            "version_compatible": self.version_compatible,
            "hardware_compatibility": self.hardware_compatibility,
            "profiling_verbosity": self.profiling_verbosity,
        }


def shapes_from_text(option: str, text: str | None) -> dict[str, Shape]:
    """`images:1x3x32x32,other:1x8` as trtexec writes it; a name may hold colons. UserError otherwise."""
    found: dict[str, Shape] = {}
    for part in text.split(",") if text is not None else ():
        name, colon, axes = part.strip().rpartition(":")
        sizes = axes.lower().split("x")
        if not (name and colon and all(size.isdecimal() for size in sizes)):
            raise UserError(
                f"{option} {text}: expected NAME:SIZExSIZE..., as in images:1x3x32x32, comma between inputs."
            )
        if name in found:
            raise UserError(f"{option} {text}: the input {name} stands there twice.")
        found[name] = tuple(int(size) for size in sizes)
    return found


def refuse_what_is_missing(trt: TensorRT, options: BuildOptions) -> None:
    """UserError, with its name and version, where this builder does not have what is asked for."""
    for option, there in _needs(trt, options):
        if not there:
            raise UserError(f"{option}: {trt} does not have it. Leave the option out.")


def _needs(trt: TensorRT, options: BuildOptions) -> Iterator[tuple[str, bool]]:
    # TensorRT-RTX still has these names: its timing cache does nothing, its version-compatible build asks for a lean
    # runtime that it does not bring, and it answers a compatibility level with a warning.
    full = not trt.is_rtx
    if options.frozen_timing_cache:
        yield "--frozen-timing-cache", full
    if options.timing_cache is not None:
        yield "--timing-cache", full
    if options.version_compatible:
        yield "--version-compatible", full
    if options.hardware_compatibility != "none":
        levels = trt.module.HardwareCompatibilityLevel
        yield (
            f"--hardware-compatibility {options.hardware_compatibility}",
            full and hasattr(levels, _HARDWARE[options.hardware_compatibility]),
        )


def hardware_level(trt: TensorRT, options: BuildOptions) -> Any:
    """The builder's own value, None for `none`."""
    name = _HARDWARE.get(options.hardware_compatibility)
    return None if name is None else getattr(trt.module.HardwareCompatibilityLevel, name)


# Shapes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Profile:
    """The shapes of one input: what the engine accepts at least, is tuned for, and accepts at most."""

    low: Shape
    opt: Shape
    high: Shape

    def to_json(self) -> dict[str, list[int]]:
        return {"min": list(self.low), "opt": list(self.opt), "max": list(self.high)}


def profiles(inputs: Mapping[str, Shape], options: BuildOptions, where: Path) -> dict[str, Profile]:
    """The profile of every input with a free axis (-1), from the options, else from BATCHES.

    UserError where shapes are given for no input, do not fit the network, are out of order, or are missing for a free
    axis other than the batch.
    """
    given = (options.min_shapes, options.opt_shapes, options.max_shapes)
    for option, shapes in zip(_SHAPES, given, strict=True):
        for name, shape in shapes.items():
            _check(option, name, shape, inputs, where)
    return {name: _profile(name, shape, options, where) for name, shape in inputs.items() if -1 in shape}


def _check(option: str, name: str, shape: Shape, inputs: Mapping[str, Shape], where: Path) -> None:
    if name not in inputs:
        raise UserError(f"{option} {name}: {where.name} has no such input; it has {', '.join(inputs)}.")
    wanted = inputs[name]
    if len(shape) != len(wanted) or any(a not in (-1, b) for a, b in zip(wanted, shape, strict=True)) or 0 in shape:
        raise UserError(
            f"{option} {name}:{_x(shape)}: in {where.name} this input is {_x(wanted)}, "
            "where -1 is an axis that you may choose, at least 1."
        )
    if math.prod(shape) > MOST_ELEMENTS:
        raise UserError(f"{option} {name}:{_x(shape)}: an engine takes at most {MOST_ELEMENTS:,} elements at once.")


def _profile(name: str, shape: Shape, options: BuildOptions, where: Path) -> Profile:
    given = [shapes.get(name) for shapes in (options.min_shapes, options.opt_shapes, options.max_shapes)]
    if None in given and -1 in shape[1:]:
        raise UserError(
            f"{where}: input {name} has the free axes {_x(shape)}: give its shapes with --min-shapes, --opt-shapes "
            f"and --max-shapes, as in --min-shapes {name}:{_x(tuple(1 if size == -1 else size for size in shape))}, "
            "or export the network with a fixed image size."
        )
    low, opt, high = (None if found is None else found[0] for found in given)
    low = BATCHES[0] if low is None else low
    high = max(BATCHES[2], low, opt or 0) if high is None else high
    opt = min(max(BATCHES[1], low), high) if opt is None else opt
    filled = [found or (size, *shape[1:]) for found, size in zip(given, (low, opt, high), strict=True)]
    for a, b in pairwise(filled):
        if any(x > y for x, y in zip(a, b, strict=True)):
            said = [
                f"{option} {_x(shape)}{'' if there else ' (where none is given)'}"
                for option, shape, there in zip(_SHAPES, filled, given, strict=True)
            ]
            raise UserError(f"input {name}: {', '.join(said)}: no shape may be larger than the next one.")
    return Profile(*filled)


# trtexec -----------------------------------------------------------------------------------------------------------

_TRTEXEC_HARDWARE = {"ampere+": "ampere+", "same-compute-capability": "sameComputeCapability"}


def trtexec_line(
    trt: TensorRT, onnx: Path, engine: Path, options: BuildOptions, shapes: Mapping[str, Profile], quantized: bool
) -> str:
    """What to type to have NVIDIA's own tool build the same: trtexec, or tensorrt_rtx for TensorRT-RTX."""
    words = ["tensorrt_rtx" if trt.is_rtx else "trtexec", f"--onnx={onnx}", f"--saveEngine={engine}"]
    if not trt.strongly_typed:
        words += ["--fp16", *(["--int8"] if quantized else [])]
    elif not trt.is_rtx and trt.release < (11,):
        words.append("--stronglyTyped")
    for flag, part in (("min", "low"), ("opt", "opt"), ("max", "high")):
        if shapes:
            named = (f"{name}:{_x(getattr(profile, part))}" for name, profile in shapes.items())
            words.append(f"--{flag}Shapes={','.join(named)}")
    if options.workspace_mib is not None:
        words.append(f"--memPoolSize=workspace:{options.workspace_mib}")
    if options.opt_level is not None:
        words.append(f"--builderOptimizationLevel={options.opt_level}")
    if options.timing_cache is not None:
        words.append(f"--timingCacheFile={options.timing_cache}")
    if options.frozen_timing_cache:
        words.append("--errorOnTimingCacheMiss")
    if options.version_compatible:
        words.append("--versionCompatible")
    if options.hardware_compatibility != "none":
        words.append(f"--hardwareCompatibilityLevel={_TRTEXEC_HARDWARE[options.hardware_compatibility]}")
    return shlex.join([*words, f"--profilingVerbosity={options.profiling_verbosity}", "--skipInference"])


def _x(shape: Shape) -> str:
    return "x".join(map(str, shape))
