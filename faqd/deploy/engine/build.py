"""ONNX to engine and record. TensorRT's own parser reads the ONNX: neither torch nor onnx is needed.

The engine is the builder's bytes and nothing else, so that trtexec and C++ load it; what it is and what it was made
from stands in the record beside it, NAME.engine.json.
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from faqd import __version__
from faqd.deploy.cuda import cuda
from faqd.deploy.engine.kernels import Kernel, kernels_from_inspector, kernels_from_log, not_int8, products
from faqd.deploy.engine.network import NotBuilt, float_type, input_shapes, is_quantized, layers_in, parsed, tensor_facts
from faqd.deploy.engine.options import (
    BuildOptions,
    Profile,
    hardware_level,
    profiles,
    refuse_what_is_missing,
    trtexec_line,
)
from faqd.deploy.engine.progress import Say, interruptible, watched
from faqd.deploy.engine.record import FORMAT, VERSION, record_path
from faqd.deploy.engine.trt import (
    Builder,
    IBuilderConfig,
    ILogger,
    INetworkDefinition,
    Messages,
    Plan,
    TensorRT,
    builder_here,
    heard,
    how_to_install,
)
from faqd.deploy.onnx_model.scan import read_scanned
from faqd.errors import UserError
from faqd.files import write_json, written_beside

_PRODUCTS = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY", "EINSUM")


def engine_from_onnx(
    onnx: Path,
    engine: Path,
    options: BuildOptions,
    say: Say,
    *,
    sha256: str | None = None,
    verify: dict[str, Any] | None = None,
    fidelity: dict[str, Any] | None = None,
    expected_int8: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Build `engine` and its record, both whole or absent; returns the record.

    sha256: what the ONNX file must be. verify, fidelity: what the record says of the proof of that file, and of how
    much of the teacher it has kept. expected_int8: the layers that should run in INT8; fewer of them is said with
    names. UserError with exit code 1 where the build fails.
    """
    content = _content(onnx, sha256)
    device, no_device = cuda.device_or_none()
    trt, remark = builder_here(device is not None)
    refuse_what_is_missing(trt, options)
    if remark:
        say(f"{engine.name}: {remark}")
    say(f"{engine.name}: building with {trt} from {onnx.name}")
    started = time.perf_counter()
    with heard(trt) as (log, messages):
        builder = new_builder(trt, log, messages)
        config = builder.create_builder_config()
        network = parsed(trt, builder, onnx, content, log, messages)
        shapes = profiles(input_shapes(network), options, onnx)
        _configure(trt, builder, network, config, options, shapes)
        line = trtexec_line(trt, onnx, engine, options, shapes, is_quantized(network))
        say(f"{engine.name}: the same with NVIDIA's tool: {line}")
        with _timing_cache(trt, config, options), watched(engine.name, say) as watch:
            plan = interruptible(trt, config, watch, lambda: builder.build_serialized_network(network, config))
            if plan is None:
                raise NotBuilt(f"{onnx}: {trt} built no engine: {messages.why()}", exit_code=1)
        kernels, read_from = _kernels(trt, plan, log, messages, options, on_gpu=device is not None)
    seconds = time.perf_counter() - started
    record = {
        "format": FORMAT,
        "version": VERSION,
        "faqd": __version__,
        "engine": {"file": engine.name, "sha256": hashlib.sha256(plan).hexdigest(), "bytes": plan.nbytes},
        "onnx": {"file": onnx.name, "sha256": hashlib.sha256(content).hexdigest()},
        "builder": {"name": trt.name, "version": trt.version},
        "platform": {"system": platform.system(), "architecture": platform.machine()},
        "typing": "strong" if trt.strongly_typed else "weak",
        "float_type": float_type(trt, network),
        "options": options.to_json(),
        "shapes": {name: profile.to_json() for name, profile in shapes.items()},
        "trtexec": line,
        "gpu": None if device is None else asdict(device),
        "no_gpu_because": no_device or None,
        "inputs": [tensor_facts(network.get_input(i)) for i in range(network.num_inputs)],
        "outputs": [tensor_facts(network.get_output(i)) for i in range(network.num_outputs)],
        "int8": _int8(network, kernels, expected_int8),
        "layers": [kernel.to_json() for kernel in kernels],
        "layers_read_from": read_from,
        "not_int8": not_int8(kernels),
        "warnings": messages.warnings,
        "verify": verify,
        "fidelity": fidelity,
        "build_s": round(seconds, 3),
    }
    # The record is put in place first: an engine beside another engine's record is never loaded.
    with written_beside(engine) as temporary, written_beside(record_path(engine)) as temporary_record:
        temporary.write_bytes(plan)
        write_json(temporary_record, record)
    _report(record, say)
    return record


def _content(onnx: Path, sha256: str | None) -> bytes:
    """The bytes that are parsed: what the record says of the ONNX file is said of these."""
    content = read_scanned(onnx)
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{onnx}: changed since the bundle was read (SHA-256 differs); export the run again.")
    return content


def new_builder(trt: TensorRT, log: ILogger, messages: Messages) -> Builder:
    """UserError where this TensorRT cannot build on this machine at all."""
    try:
        return trt.module.Builder(log)
    except (TypeError, RuntimeError) as error:
        # The full TensorRT makes no builder where it finds no driver; pybind11 calls that a TypeError.
        why = messages.why() if messages.errors else str(error)
        raise UserError(
            f"{trt} starts no builder here ({why}): it needs an NVIDIA GPU and driver. {how_to_install()}"
        ) from error


def _allow_small_types(trt: TensorRT, network: INetworkDefinition, config: IBuilderConfig) -> None:
    """Before 10.12 the types are the builder's choice: without these flags it ignores Q/DQ and FP16."""
    if trt.strongly_typed:
        return
    flags = trt.module.BuilderFlag
    config.set_flag(flags.FP16)
    if is_quantized(network):
        config.set_flag(flags.INT8)


def _configure(
    trt: TensorRT,
    builder: Builder,
    network: INetworkDefinition,
    config: IBuilderConfig,
    options: BuildOptions,
    shapes: dict[str, Profile],
) -> None:
    config.profiling_verbosity = getattr(trt.module.ProfilingVerbosity, options.profiling_verbosity.upper())
    _allow_small_types(trt, network, config)
    if options.opt_level is not None:
        config.builder_optimization_level = options.opt_level
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.module.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    if options.version_compatible:
        config.set_flag(trt.module.BuilderFlag.VERSION_COMPATIBLE)
    level = hardware_level(trt, options)
    if level is not None:
        config.hardware_compatibility_level = level
    if shapes:
        profile = builder.create_optimization_profile()
        for name, found in shapes.items():
            profile.set_shape(name, found.low, found.opt, found.high)
        config.add_optimization_profile(profile)


@contextmanager
def _timing_cache(trt: TensorRT, config: IBuilderConfig, options: BuildOptions) -> Iterator[None]:
    """Give the build the timing cache of the options, and write it back after a build that ended well."""
    path = options.timing_cache
    if path is None:
        yield
        return
    if options.frozen_timing_cache and not path.is_file():
        raise UserError(f"{path}: no such file, and a frozen timing cache is only read. Build once without freezing.")
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        raise UserError(
            f"{path}: {trt} does not take this timing cache: it is damaged, or from another version or GPU. "
            "Name another file."
        )
    if options.frozen_timing_cache:
        config.set_flag(trt.module.BuilderFlag.ERROR_ON_TIMING_CACHE_MISS)
    yield
    if not options.frozen_timing_cache:
        with written_beside(path) as temporary:
            temporary.write_bytes(config.get_timing_cache().serialize())


def _kernels(
    trt: TensorRT, plan: Plan, log: ILogger, messages: Messages, options: BuildOptions, *, on_gpu: bool
) -> tuple[list[Kernel], str | None]:
    """The kernels and where they were read: from the engine where a GPU can load it, else from the build log."""
    if on_gpu:
        runtime = trt.module.Runtime(log)
        runtime.engine_host_code_allowed = options.version_compatible  # It was built just now, by us.
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is not None:
            inspector = engine.create_engine_inspector()
            text = inspector.get_engine_information(trt.module.LayerInformationFormat.JSON)
            kernels = kernels_from_inspector(text)
            if any(kernel.is_product for kernel in kernels):
                return kernels, "engine inspector"
    kernels = kernels_from_log(messages.layers)
    return kernels, "build log" if kernels else None


def _int8(network: INetworkDefinition, kernels: list[Kernel], expected: Sequence[str] | None) -> dict[str, Any]:
    """What became of each convolution and matrix product of the network. `expected` and `missing` are null where
    nobody said which should be INT8."""
    nodes = [(layer.name, layer.type.name.lower()) for layer in layers_in(network) if layer.type.name in _PRODUCTS]
    found = products(nodes, kernels)
    built = [product["node"] for product in found if product["int8"]]
    return {
        "products": found,
        "built": len(built),
        "expected": None if expected is None else len(expected),
        "missing": None if expected is None else _missing(expected, found),
    }


def _missing(expected: Sequence[str], found: list[dict[str, Any]]) -> list[str]:
    """The layers that should be INT8 and are not: by name where the names are the network's, else by number."""
    nodes = {product["node"]: product["int8"] for product in found}
    int8 = {node.rpartition(".")[0]: runs for node, runs in nodes.items()} | nodes  # of faqd's files, by place
    short = len(expected) > sum(1 for runs in nodes.values() if runs)
    missing = [name for name in expected if (name in int8 or short) and not int8.get(name)]
    if int8.keys().isdisjoint(expected):  # Named otherwise: all that is known is what does not run in INT8.
        return [node for node, runs in nodes.items() if not runs] if short else []
    return missing


MOST_LISTED = 12


def _report(record: dict[str, Any], say: Say) -> None:
    name, int8 = record["engine"]["file"], record["int8"]
    cure = (
        "" if record["options"]["profiling_verbosity"] == "detailed" else " Build with --profiling-verbosity detailed."
    )
    for warning in record["warnings"]:
        say(f"{name}: warning: {warning}")
    if record["layers_read_from"] is None:
        say(f"{name}: warning: the builder names no types, so it is not known which layers run in INT8.{cure}")
        return
    if int8["missing"]:
        more = " ..." if len(int8["missing"]) > MOST_LISTED else ""
        say(
            f"{name}: warning: {int8['expected']} layers should run in INT8, {int8['built']} do; "
            f"not so: {', '.join(int8['missing'][:MOST_LISTED])}{more}. "
            "A Q/DQ pair is missing or misplaced there, or TensorRT fused them with floats."
        )
    say(
        f"{name}: {record['engine']['bytes'] / 1e6:.2f} MB, {int8['built']} of {len(int8['products'])} "
        f"convolutions and matrix products in INT8, the rest {record['float_type']}"
    )
