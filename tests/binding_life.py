"""Everything that is asked of a CUDA binding, once; prints what came of it as JSON. Run in a process of its own by
test_bindings.py, because the driver that it meets there is a fake one."""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

import numpy as np

from faqd.deploy.cuda.cuda import open_cuda
from faqd.deploy.cuda.interface import Cuda
from faqd.errors import UserError


def main(backend: str) -> None:
    held = ctypes.CDLL("libcuda.so.1").fake_held
    cuda = open_cuda(backend)
    found: dict[str, Any] = {"device": vars(cuda.device()), "name": cuda.name}
    found["device"].pop("driver")
    opened = held()
    for _ in range(1000):
        found["life"] = life(cuda)
    found["held"] = held() - opened
    found["too_much"] = error(lambda: cuda.allocate(1 << 40))
    with_another = open_cuda(backend)
    with_another.close()
    cuda.free(cuda.allocate(16))  # Closing one leaves the context to the other.
    cuda.close()
    found["graph"] = error(lambda: graph(backend))
    found["after_all"] = held() - (0 if backend == "cuda-bindings" else 1)  # pycuda keeps the context to the end.
    print(json.dumps(found))  # noqa: T201


def life(cuda: Cuda) -> dict[str, Any]:
    sent = np.arange(256, dtype=np.uint8)
    address, source, target = cuda.allocate(256), cuda.allocate_pinned(256), cuda.allocate_pinned(256)
    stream, start, end = cuda.stream(), cuda.event(), cuda.event(blocking=True)
    source[:] = sent
    cuda.record(start, stream)
    cuda.copy_in(address, source, stream)
    cuda.copy_out(target, address, stream)
    cuda.follow(stream, start)
    cuda.record(end, stream)
    cuda.wait_for(end)
    cuda.synchronize(stream)
    came_back = bool((target == sent).all())
    result = {"came_back": came_back, "ms": cuda.elapsed_ms(start, end), "stream": cuda.stream_address(stream) > 0}
    for event in (start, end):
        cuda.free_event(event)
    cuda.free_stream(stream)
    for pinned in (source, target):
        cuda.free_pinned(pinned)
    cuda.free(address)
    mapped, at = cuda.allocate_mapped(256)
    mapped[:] = sent
    result["mapped"] = cuda.shares_memory() and bytes((ctypes.c_uint8 * 256).from_address(at)) == sent.tobytes()
    cuda.free_pinned(mapped)
    return result


def graph(backend: str) -> list[bool]:
    """Whether a captured copy waits for its launch, and follows what stands in the buffer then."""
    cuda = open_cuda(backend)
    stream, source, target = cuda.stream(), cuda.allocate_pinned(4), cuda.allocate_pinned(4)
    address = cuda.allocate(4)

    def work() -> None:
        cuda.copy_in(address, source, stream)
        cuda.copy_out(target, address, stream)

    def fails() -> None:
        work()
        raise UserError("launch failed")

    try:
        source[:], target[:] = 1, 0
        assert not cuda.has_graphs or error(lambda: cuda.capture(stream, fails)) == "launch failed"
        captured = cuda.capture(stream, work)
        seen = [bool((target == 0).all())]
        for value in (5, 7):
            source[:] = value
            cuda.launch(captured, stream)
            cuda.synchronize(stream)
            seen.append(bool((target == value).all()))
        cuda.free_graph(captured)
        return seen
    finally:
        cuda.free(address)
        for pinned in (source, target):
            cuda.free_pinned(pinned)
        cuda.free_stream(stream)
        cuda.close()


def error(call: Any) -> Any:
    try:
        return call()
    except UserError as failure:
        return str(failure)


if __name__ == "__main__":
    main(sys.argv[1])
