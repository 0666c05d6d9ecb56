"""Twins of modules that compute floats, and of operators that only move values, in an ONNX file of opset 19."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from faqd.quantize.operators.activation import CURVES, Curve
from faqd.quantize.operators.clamp import Clamp
from faqd.quantize.operators.resize import Bilinear, Interpolate, Nearest
from faqd.quantize.operators.shape import Part, Reshape

OPSET = 19


def plain_twin(module: nn.Module) -> nn.Module | None:
    """What emits a module that is the same in floats."""
    if isinstance(module, Interpolate | Bilinear):
        return _ResizeTwin(module.before, module.size, "linear", module.align_corners)
    if isinstance(module, Nearest):
        return _ResizeTwin(module.before, module.size, "nearest", False)
    if isinstance(module, Part):
        return _SliceTwin(module)
    if isinstance(module, Clamp):
        return _ClampTwin(module)
    if isinstance(module, Reshape) and module.sizes[0] == -1:
        return ReshapeTwin(module.sizes[1:], batch=-1)
    if isinstance(module, CURVES) and not isinstance(module, nn.PReLU):
        return _CurveTwin(Curve(module))
    return _CurveTwin(module) if isinstance(module, Curve) else None


def emit(
    operator: str, inputs: tuple[Tensor | None, ...], like: Tensor, dtype: torch.dtype, **attributes: Any
) -> Tensor:
    result: Tensor = torch.onnx.ops.symbolic(operator, inputs, attributes, dtype=dtype, shape=like.shape, version=OPSET)
    return result


class _ClampTwin(nn.Module):
    low: Tensor
    high: Tensor

    def __init__(self, clamp: Clamp) -> None:
        super().__init__()
        self.register_buffer("low", torch.tensor(clamp.low))
        self.register_buffer("high", torch.tensor(clamp.high))

    def forward(self, x: Tensor) -> Tensor:
        return emit("Clip", (x, self.low, self.high), x, torch.float32)


class _CurveTwin(nn.Module):
    """An activation in the order of its formula."""

    def __init__(self, curve: Curve) -> None:
        super().__init__()
        self.curve = curve
        for name, value in curve.formula.constants.items():
            self.register_buffer(f"number_{name}", torch.tensor(value))

    def forward(self, x: Tensor) -> Tensor:
        def on(operator: str, *inputs: Tensor, **attributes: Any) -> Tensor:
            return emit(operator, inputs, x, torch.float32, **attributes)

        constants = {name: self.get_buffer(f"number_{name}") for name in self.curve.formula.constants}
        return self.curve.formula.file(on, x, self.curve, constants)


class _SliceTwin(nn.Module):
    def __init__(self, part: Part) -> None:
        super().__init__()
        self.part = part
        for name, value in {"start": part.start, "end": part.end, "axis": part.axis}.items():
            self.register_buffer(name, torch.tensor([value]))

    def forward(self, x: Tensor) -> Tensor:
        borders = (self.get_buffer("start"), self.get_buffer("end"), self.get_buffer("axis"))
        return emit("Slice", (x, *borders), self.part(x), torch.float32)


class _ResizeTwin(nn.Module):
    """A resize: by its ratios, or by its sizes where float32 cannot hold the ratios."""

    def __init__(self, before: tuple[int, ...], size: tuple[int, ...], mode: str, align_corners: bool) -> None:
        super().__init__()
        self.size, self.mode, self.align_corners = size, mode, align_corners
        ratios = torch.tensor(size, dtype=torch.float64) / torch.tensor(before)
        self.exact = bool((ratios.float().double() == ratios).all())
        self.register_buffer("scales", torch.cat([torch.ones(2), ratios.float()]))
        self.register_buffer("sizes", torch.tensor(size))

    def forward(self, x: Tensor) -> Tensor:
        wanted = x.new_empty(*x.shape[:2], *self.size)
        rule: dict[str, Any] = {"mode": self.mode, "coordinate_transformation_mode": "half_pixel"}
        if self.align_corners:
            rule["coordinate_transformation_mode"] = "align_corners"
        if self.mode == "nearest":
            rule |= {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        if not self.exact:
            sizes = (x, None, None, self.get_buffer("sizes"))
            return emit("Resize", sizes, wanted, torch.float32, axes=[2, 3], **rule)
        return emit("Resize", (x, None, self.get_buffer("scales")), wanted, torch.float32, **rule)


# Plain operators: what backends run on codes, where torch's exporter would write chains of others ------------------


class GlobalAverage(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return emit("GlobalAveragePool", (x,), x.new_empty(*x.shape[:2], *[1] * (x.dim() - 2)), torch.float32)


class Mean(nn.Module):
    """A mean over any axes; torch's exporter computes them in the graph, which TensorRT does not take."""

    def __init__(self, axes: tuple[int, ...], keep: bool) -> None:
        super().__init__()
        self._axes, self.keep = axes, keep
        self.register_buffer("axes", torch.tensor(axes))

    def forward(self, x: Tensor) -> Tensor:
        like = x.mean(self._axes, keepdim=self.keep)
        return emit("ReduceMean", (x, self.get_buffer("axes")), like, torch.float32, keepdims=int(self.keep))


class ReshapeTwin(nn.Module):
    """A reshape that keeps the batch, or with -1 for it takes what is left. sizes: of the other axes."""

    def __init__(self, sizes: tuple[int, ...], batch: int = 0) -> None:
        super().__init__()
        self.sizes, self.batch = sizes, batch
        self.register_buffer("shape", torch.tensor([batch, *sizes]))

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0] if self.batch == 0 else x.numel() // math.prod(self.sizes)
        return emit("Reshape", (x, self.get_buffer("shape")), x.new_empty(batch, *self.sizes), torch.float32)


class Regrouped(nn.Module):
    """Axes behind the batch taken apart, put in another order and joined again, as shuffles of channels and pixels do.

    parts: sizes of the axes taken apart. order: of the axes, the batch included. sizes: of the result, without it.
    """

    def __init__(self, parts: tuple[int, ...], order: tuple[int, ...], sizes: tuple[int, ...]) -> None:
        super().__init__()
        self._parts, self._sizes, self.order = parts, sizes, order
        self.register_buffer("parts", torch.tensor([0, *parts]))
        self.register_buffer("sizes", torch.tensor([0, *sizes]))

    def forward(self, x: Tensor) -> Tensor:
        apart = x.new_empty(x.shape[0], *self._parts)
        apart = emit("Reshape", (x, self.get_buffer("parts")), apart, torch.float32)
        ordered = emit("Transpose", (apart,), apart.permute(self.order), torch.float32, perm=list(self.order))
        joined = x.new_empty(x.shape[0], *self._sizes)
        return emit("Reshape", (ordered, self.get_buffer("sizes")), joined, torch.float32)


class Flatten(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return emit("Flatten", (x,), x.new_empty(x.shape[0], math.prod(x.shape[1:])), torch.float32, axis=1)
