"""The buffers of an execution context for one set of input shapes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from faqd.deploy.cuda.interface import Cuda
from faqd.deploy.engine.trt import IExecutionContext, Messages
from faqd.deploy.runtime.signature import Shape, Shapes
from faqd.errors import UserError


@dataclass(frozen=True)
class Buffer:
    """Device memory and its page-locked partner; `array` is that one as the tensor's shape and type."""

    address: int
    pinned: NDArray[np.uint8]
    array: NDArray[Any]


@dataclass
class Binding:
    """The buffers of every tensor for one set of input shapes, and the CUDA graph captured with their addresses."""

    shapes: Shapes | None
    buffers: dict[str, Buffer]
    resources: contextlib.ExitStack
    graph: Any = None


@contextlib.contextmanager
def giving_back() -> Iterator[contextlib.ExitStack]:
    """A stack that is unwound if the block fails, and whose own failures then do not hide the reason: after a fault
    CUDA refuses every further call, freeing included."""
    stack = contextlib.ExitStack()
    try:
        yield stack
    except BaseException:
        with contextlib.suppress(UserError):
            stack.close()
        raise


def taken(take: Callable[[], Any], give_back: Callable[[Any], None], stack: contextlib.ExitStack) -> Any:
    """What `take` returns; the stack gives it back."""
    thing = take()
    stack.callback(give_back, thing)
    return thing


def must(done: bool, name: str, call: str, messages: Messages) -> None:
    if not done:
        raise UserError(f"{name}: {call} failed: {messages.why()}.", exit_code=1)


def set_shapes(name: str, context: IExecutionContext, shapes: Shapes, messages: Messages) -> None:
    """Tell the context the shapes of its inputs; UserError where they do not go together."""
    for tensor, shape in shapes:
        done = context.set_input_shape(tensor, shape)
        must(done, name, f"set_input_shape({tensor}, {list(shape)})", messages)
    try:
        unknown = context.infer_shapes()
    except RuntimeError as error:
        given = ", ".join(f"{tensor} {list(shape)}" for tensor, shape in shapes)
        raise UserError(f"{name}: inputs of these shapes do not go together ({given}): {messages.why()}.") from error
    if unknown:
        raise UserError(f"{name}: the shape of {', '.join(unknown)} stays open.", exit_code=1)


def buffers_for(
    name: str,
    context: IExecutionContext,
    types: Mapping[str, np.dtype[Any]],
    cuda: Cuda,
    stack: contextlib.ExitStack,
    *,
    zero_copy: bool = False,
) -> dict[str, Buffer]:
    """Buffers for every tensor of a context whose input shapes are set.

    zero_copy: in the host's memory, on which the GPU then works.
    """
    buffers = {}
    for tensor, dtype in types.items():
        shape = tuple(context.get_tensor_shape(tensor))
        if -1 in shape:
            raise UserError(
                f"{name}: the shape {list(shape)} of {tensor} depends on values, not on shapes alone; "
                "such outputs are not run here.",
                exit_code=1,
            )
        buffers[tensor] = _buffer(cuda, shape, dtype, stack, zero_copy)
    return buffers


def set_addresses(name: str, context: IExecutionContext, buffers: Mapping[str, Buffer], messages: Messages) -> None:
    for tensor, buffer in buffers.items():
        done = context.set_tensor_address(tensor, buffer.address)
        must(done, name, f"set_tensor_address({tensor})", messages)


def _buffer(cuda: Cuda, shape: Shape, dtype: np.dtype[Any], stack: contextlib.ExitStack, zero_copy: bool) -> Buffer:
    size = max(1, math.prod(shape)) * dtype.itemsize
    if zero_copy:
        pinned, address = cuda.allocate_mapped(size)
        stack.callback(cuda.free_pinned, pinned)
    else:
        address = taken(lambda: cuda.allocate(size), cuda.free, stack)
        pinned = taken(lambda: cuda.allocate_pinned(size), cuda.free_pinned, stack)
    return Buffer(address, pinned, pinned.view(dtype)[: math.prod(shape)].reshape(shape))


def refuse_zero_copy(name: str, cuda: Cuda) -> None:
    """UserError where the GPU has a memory of its own: it would fetch every value over the bus, again and again."""
    if not cuda.shares_memory():
        raise UserError(
            f"{name}: zero copy is for GPUs that share the host's memory, as on a Jetson; here it is apart."
        )
