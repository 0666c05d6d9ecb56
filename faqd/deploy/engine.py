"""ONNX to engine and record. TensorRT's own parser reads the ONNX: neither torch nor onnx is needed.

The engine is the builder's bytes and nothing else, so that trtexec and C++ load it; what it is and what it was made
from stands in the record beside it, NAME.engine.json.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from faqd import __version__
from faqd.bundle import FLOAT_STUDENT_FP16, STUDENT_TENSORRT, TEACHER, VERIFY, Bundle
from faqd.deploy import cuda
from faqd.deploy.kernels import Kernel, kernels_from_inspector, kernels_from_log, not_int8, products
from faqd.deploy.record import FORMAT, VERSION, engine_name, record_path
from faqd.deploy.trt import INSTALL, Messages, TensorRT, heard, installed
from faqd.errors import UserError
from faqd.files import read_json, sha256, write_json, written_beside

Say = Callable[[str], None]

_PRODUCTS = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY")
_FLOAT_TYPES = {"HALF": "fp16", "BF16": "bf16"}


@dataclass(frozen=True)
class BuildOptions:
    """What the builder is asked for. The batch sizes count where the network's batch is free.

    opt_level: 0 to 5, effort of the search; workspace_mib: limit of scratch memory. None is the builder's default.
    """

    min_batch: int = 1
    opt_batch: int = 8
    max_batch: int = 64
    opt_level: int | None = None
    workspace_mib: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.min_batch <= self.opt_batch <= self.max_batch:
            raise UserError(
                f"batch sizes {self.min_batch}, {self.opt_batch}, {self.max_batch}: "
                "give smallest, typical and largest in this order, at least 1."
            )
        if self.opt_level is not None and not 0 <= self.opt_level <= 5:
            raise UserError(f"optimisation level {self.opt_level}: the builder knows 0 to 5.")
        if self.workspace_mib is not None and self.workspace_mib < 1:
            raise UserError(f"workspace of {self.workspace_mib} MiB: give at least 1.")


def build_bundle(bundle: Bundle, *, all: bool, force: bool, options: BuildOptions, say: Say) -> list[dict[str, Any]]:
    """Build the student's engine, with `all` the teacher's and the float student's in FP16 too; returns the records.

    force: build although verify.json says failed or speaks of other files. UserError (exit code 1) otherwise.
    """
    if not bundle.has(STUDENT_TENSORRT):
        raise UserError(
            f"{bundle.folder}: no {STUDENT_TENSORRT} in this bundle. Its student was trained with "
            "--target onnxruntime, whose 8-bit activations do not fit TensorRT's INT8; "
            "train with --target tensorrt to get an engine."
        )
    names = [STUDENT_TENSORRT, *(name for name in (FLOAT_STUDENT_FP16, TEACHER) if all and bundle.has(name))]
    verify = _checked_verify(bundle, names, force, say)
    records = []
    for name in names:
        source = bundle.path(name)
        expected = _expected_int8(bundle) if name == STUDENT_TENSORRT else None
        engine = source.with_name(engine_name(name))
        records.append(engine_from_onnx(source, engine, options, say, verify=verify, expected_int8=expected))
    return records


def engine_from_onnx(
    onnx: Path,
    engine: Path,
    options: BuildOptions,
    say: Say,
    *,
    verify: Path | None = None,
    expected_int8: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Build `engine` and its record, both whole or absent; returns the record.

    verify: the verify.json that speaks of the ONNX file, bound to the record by its SHA-256. expected_int8: the layers
    that should run in INT8; fewer of them is said with names. UserError with exit code 1 where the build fails.
    """
    if not onnx.is_file():
        raise UserError(f"{onnx}: no such file.")
    trt = installed()
    say(f"{engine.name}: building with {trt} from {onnx.name}")
    device, no_device = cuda.device_or_none()
    started = time.perf_counter()
    with heard(trt) as (log, messages):
        builder = _builder(trt, log, messages)
        config = builder.create_builder_config()
        network = builder.create_network(_network_flags(trt))
        _parse(trt, onnx, network, log, messages)
        _configure(trt, builder, network, config, options, onnx)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise UserError(f"{onnx}: {trt} built no engine: {messages.why()}", exit_code=1)
        kernels, read_from = _kernels(trt, plan, log, messages, on_gpu=device is not None)
    seconds = time.perf_counter() - started
    with written_beside(engine) as temporary:
        temporary.write_bytes(plan)
    record = {
        "format": FORMAT,
        "version": VERSION,
        "faqd": __version__,
        "engine": {"file": engine.name, "sha256": sha256(engine), "bytes": engine.stat().st_size},
        "onnx": {"file": onnx.name, "sha256": sha256(onnx)},
        "builder": {"name": trt.name, "version": trt.version},
        "typing": "strong" if trt.strongly_typed else "weak",
        "float_type": _float_type(trt, network),
        "options": asdict(options),
        "gpu": None if device is None else asdict(device),
        "no_gpu_because": no_device or None,
        "inputs": [_tensor(network.get_input(i)) for i in range(network.num_inputs)],
        "outputs": [_tensor(network.get_output(i)) for i in range(network.num_outputs)],
        "int8": _int8(network, kernels, expected_int8),
        "layers": [kernel.to_json() for kernel in kernels],
        "layers_read_from": read_from,
        "not_int8": not_int8(kernels),
        "warnings": messages.warnings,
        "verify": None if verify is None else {"file": verify.name, "sha256": sha256(verify)},
        "build_s": round(seconds, 3),
    }
    write_json(record_path(engine), record)
    _report(record, say)
    return record


def _builder(trt: TensorRT, log: Any, messages: Messages) -> Any:
    try:
        return trt.module.Builder(log)
    except (TypeError, RuntimeError) as error:
        # The full TensorRT makes no builder where it finds no driver; pybind11 calls that a TypeError.
        why = messages.why() if messages.errors else str(error)
        raise UserError(
            f"{trt} starts no builder here ({why}): it needs an NVIDIA GPU and driver. {INSTALL}"
        ) from error


def _network_flags(trt: TensorRT) -> int:
    return 1 << int(trt.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if trt.strongly_typed else 0


def _allow_small_types(trt: TensorRT, network: Any, config: Any) -> None:
    """Before 10.12 the types are the builder's choice: without these flags it ignores Q/DQ and FP16."""
    if trt.strongly_typed:
        return
    flags = trt.module.BuilderFlag
    config.set_flag(flags.FP16)
    if any(layer.type.name == "QUANTIZE" for layer in _layers(network)):
        config.set_flag(flags.INT8)


def _parse(trt: TensorRT, onnx: Path, network: Any, log: Any, messages: Messages) -> None:
    parser = trt.module.OnnxParser(network, log)
    read = parser.parse_from_file(str(onnx))
    if parser.num_errors:
        raise UserError(f"{onnx}: {trt} refuses it: {_parser_error(parser.get_error(0))}", exit_code=1)
    # Bytes that are no ONNX at all can count as a network without nodes.
    if not read or network.num_outputs == 0:
        why = f": {messages.why()}" if messages.errors else ""
        raise UserError(
            f"{onnx}: {trt} finds no network in it{why}. The file is damaged; export it again.", exit_code=1
        )


def _parser_error(error: Any) -> str:
    text = " ".join(str(error.desc()).split())
    if not error.node_operator():
        return f"{text} The file is damaged or cut short; export it again."
    return f"node {error.node_name() or '(without a name)'} ({error.node_operator()}): {text}"


def _configure(trt: TensorRT, builder: Any, network: Any, config: Any, options: BuildOptions, onnx: Path) -> None:
    config.profiling_verbosity = trt.module.ProfilingVerbosity.DETAILED  # The types per kernel are read back.
    _allow_small_types(trt, network, config)
    if options.opt_level is not None:
        config.builder_optimization_level = options.opt_level
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.module.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    profile = builder.create_optimization_profile()
    free = False
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(tensor.shape)
        if -1 in shape[1:]:
            raise UserError(
                f"{onnx}: input {tensor.name} has the free axes {list(shape)}; only the batch, the first, may be free: "
                "export it with a fixed image size."
            )
        if shape[:1] == (-1,):
            free = True
            sizes = (options.min_batch, options.opt_batch, options.max_batch)
            profile.set_shape(tensor.name, *((size, *shape[1:]) for size in sizes))
    if free:
        config.add_optimization_profile(profile)


def _kernels(
    trt: TensorRT, plan: Any, log: Any, messages: Messages, *, on_gpu: bool
) -> tuple[list[Kernel], str | None]:
    """The kernels and where they were read: from the engine where a GPU can load it, else from the build log."""
    if on_gpu:
        runtime = trt.module.Runtime(log)
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is not None:
            inspector = engine.create_engine_inspector()
            text = inspector.get_engine_information(trt.module.LayerInformationFormat.JSON)
            kernels = kernels_from_inspector(text)
            if any(kernel.is_product for kernel in kernels):
                return kernels, "engine inspector"
    kernels = kernels_from_log(messages.layers)
    return kernels, "build log" if kernels else None


def _int8(network: Any, kernels: list[Kernel], expected: Sequence[str] | None) -> dict[str, Any]:
    """What became of each convolution and matrix product of the network. `expected` and `missing` are null where
    nobody said which should be INT8."""
    nodes = [(layer.name, layer.type.name.lower()) for layer in _layers(network) if layer.type.name in _PRODUCTS]
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
    int8 = {product["node"]: product["int8"] for product in found}
    short = len(expected) > sum(1 for runs in int8.values() if runs)
    missing = [name for name in expected if (name in int8 or short) and not int8.get(name)]
    if int8.keys().isdisjoint(expected):  # Named otherwise: all that is known is what does not run in INT8.
        return [node for node, runs in int8.items() if not runs] if short else []
    return missing


def _report(record: dict[str, Any], say: Say) -> None:
    name, int8 = record["engine"]["file"], record["int8"]
    for warning in record["warnings"]:
        say(f"{name}: warning: {warning}")
    if record["layers_read_from"] is None:
        say(f"{name}: warning: the builder names no types, so it is not known which layers run in INT8.")
        return
    if int8["missing"]:
        say(
            f"{name}: warning: {int8['expected']} layers should run in INT8, {int8['built']} do; "
            f"not so: {', '.join(int8['missing'])}. A Q/DQ pair is missing or misplaced there."
        )
    say(
        f"{name}: {record['engine']['bytes'] / 1e6:.2f} MB, {int8['built']} of {len(int8['products'])} "
        f"convolutions and matrix products in INT8, the rest {record['float_type']}"
    )


def _float_type(trt: TensorRT, network: Any) -> str:
    """The type of what is not quantized: the smallest float type that any layer puts out."""
    if not trt.strongly_typed:
        return "fp16 or fp32"  # The builder chooses per layer.
    types = {
        layer.get_output(index).dtype.name
        for layer in _layers(network)
        for index in range(layer.num_outputs)
        if layer.get_output(index) is not None
    }
    return next((word for name, word in _FLOAT_TYPES.items() if name in types), "fp32")


def _layers(network: Any) -> list[Any]:
    return [network.get_layer(index) for index in range(network.num_layers)]


def _tensor(tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "shape": list(tensor.shape), "dtype": tensor.dtype.name.lower()}


def _expected_int8(bundle: Bundle) -> list[str] | None:
    layers = bundle.manifest.get("layers")
    known = [layer for layer in layers or [] if isinstance(layer, dict) and "runs_int8" in layer]
    return [str(layer.get("name")) for layer in known if layer["runs_int8"]] if known else None


def _checked_verify(bundle: Bundle, names: list[str], force: bool, say: Say) -> Path | None:
    path = bundle.folder / VERIFY
    if not path.is_file():
        say(f"warning: no {VERIFY} in {bundle.folder}; `faqd-deploy verify {bundle.folder}` proves the files first.")
        return None
    complaint = _complaint(path, bundle, names)
    if complaint is None:
        return path
    if not force:
        raise UserError(f"{path}: {complaint} No engine is built from it without --force.", exit_code=1)
    say(f"warning: {path}: {complaint} Building all the same (--force).")
    return path


def _complaint(path: Path, bundle: Bundle, names: list[str]) -> str | None:
    verify = read_json(path)
    hashes = verify.get("onnx_sha256") if isinstance(verify, dict) else None
    if not isinstance(hashes, dict):
        return f"not the result of a verification; run `faqd-deploy verify {bundle.folder}`."
    if verify.get("passed") is not True:
        return "the verification failed: export the run again, or see its report."
    stale = [name for name in names if name in hashes and hashes[name] != sha256(bundle.folder / name)]
    if stale or STUDENT_TENSORRT not in hashes:
        which = ", ".join(stale) or STUDENT_TENSORRT
        return f"it speaks of another {which} than the one here; run `faqd-deploy verify {bundle.folder}`."
    return None
