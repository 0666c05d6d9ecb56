"""What a builder is asked for: shapes by trtexec's grammar, refusals by name, and the same as a line for trtexec."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from faqd.deploy.engine import build as engine
from faqd.deploy.engine.network import network_flags
from faqd.deploy.engine.options import (
    BuildOptions,
    Profile,
    hardware_level,
    profiles,
    refuse_what_is_missing,
    shapes_from_text,
    trtexec_line,
)
from faqd.deploy.engine.trt import Name, TensorRT
from faqd.errors import UserError
from tests.repository.test_api_names import API

ONNX = Path("net.onnx")
INPUTS = {"images": (-1, 3, 16, 16)}


def stand_in(version: str) -> TensorRT:
    """A TensorRT of that version with the enumerations that its bindings have, each member its own name."""
    name: Name = "tensorrt_rtx" if version.startswith("rtx-") else "tensorrt"
    module: Any = SimpleNamespace(__version__=f"{version.removeprefix('rtx-')}.0")
    for full, have in API.have.items():
        of, _, member = full.partition(".")
        if version in have and of in ("BuilderFlag", "HardwareCompatibilityLevel", "NetworkDefinitionCreationFlag"):
            if not hasattr(module, of):
                setattr(module, of, SimpleNamespace())
            setattr(getattr(module, of), member, 0 if member == "STRONGLY_TYPED" else member)
    return TensorRT(name, module)


VERSIONS = sorted(API.versions)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("images:1x3x32x32", {"images": (1, 3, 32, 32)}),
        ("images:1x3x32X32,mask:8", {"images": (1, 3, 32, 32), "mask": (8,)}),
        ("model:0/images:2x4", {"model:0/images": (2, 4)}),
        (None, {}),
    ],
)
def test_shapes_are_written_as_for_trtexec(text: str | None, wanted: dict[str, Any]) -> None:
    assert shapes_from_text("--min-shapes", text) == wanted


@pytest.mark.parametrize(
    "text", ["", "images", "images:", "images:1x", ":1x3", "images:1xa", "a:1,", "a:-1x3", "a:1,a:2"]
)
def test_other_shapes_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--max-shapes"):
        shapes_from_text("--max-shapes", text)


@pytest.mark.parametrize(
    ("given", "batches"),
    [
        ({}, (1, 8, 64)),
        ({"max_shapes": 4}, (1, 4, 4)),
        ({"opt_shapes": 128}, (1, 128, 128)),
        ({"min_shapes": 100}, (100, 100, 100)),
        ({"min_shapes": 2, "opt_shapes": 3, "max_shapes": 5}, (2, 3, 5)),
    ],
)
def test_a_free_batch_gets_shapes_that_are_in_order(given: dict[str, int], batches: tuple[int, ...]) -> None:
    options = BuildOptions(**{key: {"images": (batch, 3, 16, 16)} for key, batch in given.items()})  # type: ignore[arg-type]
    profile = profiles(INPUTS, options, ONNX)["images"]
    assert (profile.low[0], profile.opt[0], profile.high[0]) == batches
    assert profile.low[1:] == profile.opt[1:] == profile.high[1:] == (3, 16, 16)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"min_shapes": {"image": (1, 3, 16, 16)}}, "--min-shapes image: net.onnx has no such input; it has images"),
        ({"opt_shapes": {"images": (1, 3, 32, 32)}}, "this input is -1x3x16x16"),
        ({"opt_shapes": {"images": (1, 3, 16)}}, "this input is -1x3x16x16"),
        ({"max_shapes": {"images": (0, 3, 16, 16)}}, "at least 1"),
        ({"min_shapes": {"images": (9, 3, 16, 16)}, "max_shapes": {"images": (4, 3, 16, 16)}}, "no shape may be"),
        (
            {"opt_shapes": {"images": (9, 3, 16, 16)}, "max_shapes": {"images": (4, 3, 16, 16)}},
            r"input images: --min-shapes 1x3x16x16 \(where none is given\), --opt-shapes 9x3x16x16, --max-shapes 4x3x",
        ),
        ({"max_shapes": {"images": (1 << 40, 3, 16, 16)}}, r"--max-shapes images:.*at most 2,147,483,647 elements"),
    ],
)
def test_shapes_that_do_not_fit_the_network_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        profiles(INPUTS, BuildOptions(**options), ONNX)


def test_free_axes_beside_the_batch_need_shapes() -> None:
    inputs = {"images": (-1, 3, -1, -1), "fixed": (1, 4)}
    with pytest.raises(UserError, match=r"--min-shapes images:1x3x1x1.*or export"):
        profiles(inputs, BuildOptions(), ONNX)
    shapes = [{"images": (1, 3, size, size)} for size in (16, 32, 64)]
    options = BuildOptions(min_shapes=shapes[0], opt_shapes=shapes[1], max_shapes=shapes[2])
    assert profiles(inputs, options, ONNX) == {"images": Profile(*(one["images"] for one in shapes))}


@pytest.mark.parametrize(
    "bad", [{"opt_level": 6}, {"opt_level": -1}, {"workspace_mib": 0}, {"frozen_timing_cache": True}], ids=str
)
def test_options_out_of_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^--"):
        BuildOptions(**bad)


@pytest.mark.parametrize(
    ("option", "refused_by"),
    [
        ({"timing_cache": Path("c")}, {"rtx-1.7"}),
        ({"timing_cache": Path("c"), "frozen_timing_cache": True}, {"rtx-1.7"}),
        ({"version_compatible": True}, {"rtx-1.7"}),
        ({"hardware_compatibility": "ampere+"}, {"rtx-1.7"}),
        ({"hardware_compatibility": "same-compute-capability"}, {"rtx-1.7", "10.3", "10.7"}),
        ({"workspace_mib": 64, "opt_level": 5, "profiling_verbosity": "none"}, set()),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),  # the same in every process
)
def test_what_a_builder_does_not_have_is_refused_with_its_name(option: dict[str, Any], refused_by: set[str]) -> None:
    options = BuildOptions(**option)
    refused = set()
    for version in VERSIONS:
        trt = stand_in(version)
        try:
            refuse_what_is_missing(trt, options)
        except UserError as error:
            refused.add(version)
            assert str(trt) in str(error) and str(error).startswith("--")
        else:
            hardware_level(trt, options)  # What is not refused is there.
    assert refused == refused_by


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("quantized", [True, False])
def test_the_weakly_typed_fallback_is_taken_below_10_12_only(version: str, quantized: bool) -> None:
    trt = stand_in(version)
    flags: list[str] = []
    layers = ["CONVOLUTION", *(["QUANTIZE"] if quantized else [])]
    network = SimpleNamespace(
        num_layers=len(layers), get_layer=lambda index: SimpleNamespace(type=SimpleNamespace(name=layers[index]))
    )
    engine._allow_small_types(trt, network, SimpleNamespace(set_flag=flags.append))
    weak = version in ("10.3", "10.7")
    assert flags == (["FP16", *(["INT8"] if quantized else [])] if weak else [])
    assert network_flags(trt) == (0 if weak else 1)
    line = trtexec_line(trt, ONNX, Path("net.engine"), BuildOptions(), {}, quantized)
    assert ("--fp16" in line, "--int8" in line) == (weak, weak and quantized)
    assert ("--stronglyTyped" in line) == (version in ("10.12", "10.13", "10.16"))  # 11 knows nothing else.
    assert line.split()[0] == ("tensorrt_rtx" if version == "rtx-1.7" else "trtexec")


def test_the_line_for_trtexec_says_all_of_it() -> None:
    options = BuildOptions(
        workspace_mib=256,
        opt_level=4,
        timing_cache=Path("my cache"),
        frozen_timing_cache=True,
        version_compatible=True,
        hardware_compatibility="same-compute-capability",
        profiling_verbosity="layer_names_only",
    )
    shapes = {"a": Profile((1, 3), (2, 3), (4, 3)), "b": Profile((1,), (1,), (9,))}
    line = trtexec_line(stand_in("10.13"), Path("a net.onnx"), Path("net.engine"), options, shapes, True)
    assert shlex.split(line) == [
        "trtexec",
        "--onnx=a net.onnx",
        "--saveEngine=net.engine",
        "--stronglyTyped",
        "--minShapes=a:1x3,b:1",
        "--optShapes=a:2x3,b:1",
        "--maxShapes=a:4x3,b:9",
        "--memPoolSize=workspace:256",
        "--builderOptimizationLevel=4",
        "--timingCacheFile=my cache",
        "--errorOnTimingCacheMiss",
        "--versionCompatible",
        "--hardwareCompatibilityLevel=sameComputeCapability",
        "--profilingVerbosity=layer_names_only",
        "--skipInference",
    ]


class Cache:
    """A timing cache of the builder: what it was made from, and what a build adds to it."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content + b" and a kernel"


def config(takes_it: bool = True) -> tuple[Any, list[str]]:
    flags: list[str] = []
    holder = SimpleNamespace(create_timing_cache=Cache, set_flag=flags.append)
    holder.set_timing_cache = lambda cache, ignore_mismatch: vars(holder).update(cache=cache) or takes_it
    holder.get_timing_cache = lambda: holder.cache
    return holder, flags


def test_a_timing_cache_is_read_and_kept(tmp_path: Path) -> None:
    options = BuildOptions(timing_cache=tmp_path / "cache")
    for wanted in (b" and a kernel", b" and a kernel and a kernel"):
        with engine._timing_cache(stand_in("10.13"), config()[0], options):
            pass
        assert (tmp_path / "cache").read_bytes() == wanted


def test_a_frozen_timing_cache_is_only_read(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    options = BuildOptions(timing_cache=path, frozen_timing_cache=True)
    with pytest.raises(UserError, match="no such file"), engine._timing_cache(stand_in("10.3"), config()[0], options):
        pass
    path.write_bytes(b"kernels")
    holder, flags = config()
    with engine._timing_cache(stand_in("10.3"), holder, options):
        assert holder.cache.content == b"kernels"
    assert flags == ["ERROR_ON_TIMING_CACHE_MISS"]
    assert path.read_bytes() == b"kernels"


def test_a_timing_cache_of_another_gpu_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    path.write_bytes(b"kernels")
    with (
        pytest.raises(UserError, match="from another version or GPU"),
        engine._timing_cache(stand_in("11.4"), config(takes_it=False)[0], BuildOptions(timing_cache=path)),
    ):
        pass
    assert path.read_bytes() == b"kernels"


def test_a_failed_build_leaves_the_timing_cache(tmp_path: Path) -> None:
    options = BuildOptions(timing_cache=tmp_path / "cache")
    with pytest.raises(UserError, match="no engine"), engine._timing_cache(stand_in("11.4"), config()[0], options):
        raise UserError("no engine")
    assert not list(tmp_path.iterdir())
