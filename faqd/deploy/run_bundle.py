"""A bundle as a function of arrays, on whatever is here: the engine on a GPU, else onnxruntime."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from faqd.bundle import STUDENT_ONNXRUNTIME, STUDENT_TENSORRT, load_bundle
from faqd.deploy.cuda.cuda import device_or_none
from faqd.deploy.engine.record import engine_name
from faqd.errors import UserError
from faqd.proof import proof_of

Backend = Literal["auto", "onnxruntime", "engine"]


class Engine:
    """The student of a bundle. `runs_on` says what computes: `tensorrt` where there is an NVIDIA device and the engine
    was built (`faqd-deploy build-engine`), else `onnxruntime`. backend: `onnxruntime` or `engine` to have that one.

    UserError where the folder holds no bundle, what would run was not proved, or an engine that was asked for cannot
    run here.

        engine = faqd.Engine("bundle")
        logits = engine(images)
    """

    def __init__(self, folder: Path | str, backend: Backend = "auto") -> None:
        self.bundle = bundle = load_bundle(Path(folder))
        plan = bundle.folder / engine_name(STUDENT_TENSORRT)
        self.runs_on = _runtime(plan, backend)
        proof = proof_of(bundle, "tensorrt" if self.runs_on == "tensorrt" else "onnxruntime")
        if proof.complaint is not None:
            raise UserError(f"{bundle.folder}: {proof.complaint}", exit_code=1)
        self.input = bundle.manifest["input"]
        self._run: Any
        if self.runs_on == "tensorrt":
            from faqd.deploy.runtime.runtime import load_engine

            self._run = load_engine(plan)
        else:
            from faqd.deploy.onnx_model.session import OnnxSession

            self._run = OnnxSession(bundle.path(STUDENT_ONNXRUNTIME), threads=0)

    def __call__(self, images: NDArray[Any]) -> NDArray[Any] | dict[str, NDArray[Any]]:
        """The outputs for (N, ...) of the bundle's `input`: an array, or a dictionary by name where there are
        several."""
        wanted = np.dtype(self.input["dtype"])
        found = np.ascontiguousarray(images)
        if found.dtype != wanted and not (found.dtype.kind == "f" and wanted.kind == "f"):
            raise UserError(f"images are {found.dtype}, and this bundle takes {wanted} {self.input['shape']}.")
        outputs: dict[str, NDArray[Any]] = self._run.run({self.input["name"]: found.astype(wanted)})
        return next(iter(outputs.values())) if len(outputs) == 1 else outputs

    def close(self) -> None:
        """Give back what a GPU holds; also the end of a `with` block."""
        if self.runs_on == "tensorrt":
            self._run.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _runtime(plan: Path, backend: str) -> Literal["tensorrt", "onnxruntime"]:
    if backend == "onnxruntime":
        return "onnxruntime"
    device, why = device_or_none()
    if plan.is_file() and device is not None:
        return "tensorrt"
    if backend == "engine":
        needed = why if device is None else f"`faqd-deploy build-engine {plan.parent}` makes {plan.name}."
        raise UserError(f"{plan}: cannot run here: {needed}")
    return "onnxruntime"
