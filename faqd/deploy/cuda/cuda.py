"""The GPU through the binding that is asked for or installed: cuda-bindings, or pycuda (which has no CUDA graphs)."""

from __future__ import annotations

import contextlib
import os

from faqd.deploy.cuda.cuda_bindings import CudaBindings
from faqd.deploy.cuda.interface import DRIVER, Cuda, Device, NotInstalled, how_to_install
from faqd.deploy.cuda.pycuda import PyCuda
from faqd.errors import UserError

BACKENDS = ("cuda-bindings", "pycuda")
"""In the order in which they are tried."""

AUTO = "auto"
"""The first of them that is installed."""

VARIABLE = "FAQD_CUDA_BACKEND"


def open_cuda(backend: str | None = None) -> Cuda:
    """The first GPU through `backend`. Where that is `auto` or None, FAQD_CUDA_BACKEND decides, else the first binding
    that is installed. UserError where there is none, no driver, or no GPU."""
    missing = []
    for name in _candidates(backend):
        try:
            return CudaBindings() if name == "cuda-bindings" else PyCuda()
        except NotInstalled as error:
            missing.append(f"{name}: {error}")
    raise UserError(f"no CUDA binding can be imported ({'; '.join(missing)}): {how_to_install()}. {DRIVER}")


def device_or_none(backend: str | None = None) -> tuple[Device | None, str]:
    """The GPU in use, or None and the reason."""
    _candidates(backend)  # A misspelt back end is no missing GPU.
    try:
        with contextlib.closing(open_cuda(backend)) as cuda:
            return cuda.device(), ""
    except UserError as error:
        return None, str(error)


def _candidates(backend: str | None) -> tuple[str, ...]:
    wanted = os.environ.get(VARIABLE, AUTO) if backend in (None, AUTO) else backend
    if wanted in ("", AUTO):
        return BACKENDS
    if wanted not in BACKENDS:
        raise UserError(f"CUDA back end {wanted!r}: choose {AUTO}, {' or '.join(BACKENDS)} (also in {VARIABLE}).")
    return (wanted,)
