"""What an engine takes and gives: names, shapes and types of its tensors, and whether arrays fit them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from faqd.deploy.engine.trt import ICudaEngine, TensorRT
from faqd.errors import UserError

Arrays = Mapping[str, NDArray[Any]]
Shape = tuple[int, ...]
Shapes = tuple[tuple[str, Shape], ...]

_TYPES: dict[str, type[np.generic]] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "INT32": np.int32,
    "INT64": np.int64,
    "BOOL": np.bool_,
}


@dataclass(frozen=True)
class Tensor:
    """An input or output. shape: -1 is a free axis. low, high: the smallest and largest shape of an input that the
    engine was built for; both are `shape` where nothing is free."""

    shape: Shape
    dtype: np.dtype[Any]
    low: Shape
    high: Shape

    def takes(self, shape: Shape) -> bool:
        return len(shape) == len(self.low) and all(
            low <= size <= high for low, size, high in zip(self.low, shape, self.high, strict=True)
        )

    def __str__(self) -> str:
        return str(list(self.low)) if self.low == self.high else f"{list(self.low)} to {list(self.high)}"


@dataclass(frozen=True)
class Signature:
    """The tensors of an engine in its own order."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def signature(path: Path, trt: TensorRT, engine: ICudaEngine) -> Signature:
    """Read from a loaded engine; UserError where it has a tensor that is no plain array of a type of numpy."""
    found = Signature({}, {})
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        kind = engine.get_tensor_dtype(name).name
        if kind not in _TYPES:
            raise UserError(
                f"{path}: tensor {name} is {kind}, which numpy does not hold: export it with a Cast to float."
            )
        # Buffers are sized and filled for plain row-major arrays in device memory: anything else would be overrun.
        layout, place = engine.get_tensor_format(name), engine.get_tensor_location(name)
        if layout != trt.module.TensorFormat.LINEAR or place != trt.module.TensorLocation.DEVICE:
            raise UserError(
                f"{path}: tensor {name} is {layout.name} on the {place.name.lower()}, and only plain arrays on the "
                "device are run here: build the engine without special formats and without shape tensors."
            )
        shape = tuple(engine.get_tensor_shape(name))
        dtype = np.dtype(_TYPES[kind])
        if engine.get_tensor_mode(name) == trt.module.TensorIOMode.INPUT:
            low, high = (shape, shape) if -1 not in shape else _profile(engine, name)
            found.inputs[name] = Tensor(shape, dtype, low, high)
        else:
            found.outputs[name] = Tensor(shape, dtype, shape, shape)
    return found


def _profile(engine: ICudaEngine, name: str) -> tuple[Shape, Shape]:
    low, _, high = engine.get_tensor_profile_shape(name, 0)
    return tuple(low), tuple(high)


def checked_shapes(engine: str, inputs: Mapping[str, Tensor], feeds: Arrays) -> Shapes:
    """The shapes of `feeds`; UserError where names, types or shapes are not those of `inputs`."""
    if feeds.keys() != inputs.keys():
        raise UserError(f"{engine}: takes {', '.join(inputs)}; it was given {', '.join(feeds) or 'nothing'}.")
    for name, tensor in inputs.items():
        given = feeds[name]
        if not isinstance(given, np.ndarray):
            raise UserError(f"{engine}: input {name} is a {type(given).__name__}; give a numpy array.")
        if given.dtype != tensor.dtype:
            raise UserError(
                f"{engine}: input {name} is {tensor.dtype}; it was given {given.dtype}. Convert it with .astype()."
            )
        if not tensor.takes(given.shape):
            cure = ""
            if tensor.low != tensor.high:
                cure = " Build the engine again with other batch sizes, or change the batch."
            raise UserError(f"{engine}: input {name} takes {tensor}; it was given {list(given.shape)}.{cure}")
    return tuple((name, feeds[name].shape) for name in inputs)
