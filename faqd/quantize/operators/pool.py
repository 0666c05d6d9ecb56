"""Pooling: maxima of codes, and averages, which are exact sums of codes and one division."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faqd.errors import UserError
from faqd.quantize.operators.arithmetic import Stacked, times
from faqd.quantize.operators.emit import Emission, Size, Value, settled
from faqd.quantize.operators.resize import Nearest
from faqd.quantize.operators.row import Call, ExactForm, Operator, Pieces, Rule, is_number
from faqd.quantize.operators.separable import separable
from faqd.quantize.operators.treatment import AVERAGED, PASSED


class IntegerAverage(nn.Module):
    """An average over pixels of codes: exact integer sums, one division, then the input's scale."""

    scale: Tensor

    def __init__(self, average: Any, scale: Tensor) -> None:
        super().__init__()
        self.average = average
        self.register_buffer("scale", scale.detach().float().reshape(()))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        codes = (x / self.scale.double()).round_()
        return self.average(codes, *args, **kwargs) * self.scale.double()  # type: ignore[no-any-return]


def _max_pool(kind: Any) -> Rule:
    def rule(call: Call) -> Any:
        kernel, stride = _each(call["kernel_size"]), _each(call["stride"])
        rest = {"padding": _each(call["padding"]), "dilation": _each(call["dilation"]), "ceil_mode": call["ceil_mode"]}
        return kind(kernel, stride or kernel, **rest)

    return rule


def _avg_pool(kind: Any) -> Rule:
    def rule(call: Call) -> Any:
        kernel, stride = _each(call["kernel_size"]), _each(call["stride"])
        divisor = call.get("divisor_override")
        counts = {"ceil_mode": call["ceil_mode"], "count_include_pad": bool(divisor) or call["count_include_pad"]}
        average = kind(kernel, stride or kernel, _each(call["padding"]), **counts)
        if not divisor:
            return average
        pixels = math.prod(_per_axis(kernel, len(call.before) - 2))
        return None if call["ceil_mode"] else times(call, call.module(average), pixels / divisor)

    return rule


def _each(value: Any) -> Any:
    """A setting as torch's modules print it: one number where it is the same for all axes."""
    values = list(value) if isinstance(value, list | tuple) else [value]
    return values[0] if len(set(values)) == 1 else tuple(values)


def _adaptive(pool: type[nn.Module], whole: type[nn.Module]) -> Rule:
    """An adaptive pooling whose windows are all of one size, as ordinary pooling; where every window is one pixel, as
    the repetition that it is. A global average stays one."""

    def rule(call: Call) -> nn.Module | None:
        before = call.before[-len(call["output_size"]) :]
        wanted = tuple(call["output_size"])
        if math.prod(wanted) == 1 and issubclass(pool, nn.AvgPool1d | nn.AvgPool2d):
            return whole(_each(wanted))
        if not any(a % b for b, a in zip(before, wanted, strict=True)):
            return nn.Identity() if before == wanted else Nearest(before, wanted)
        if any(b % a for b, a in zip(before, wanted, strict=True)):
            return _uneven(before, wanted) if pool is nn.AvgPool2d else whole(wanted)
        kernel = tuple(b // a for b, a in zip(before, wanted, strict=True))
        return pool(kernel, kernel)

    return rule


def _uneven(before: Any, wanted: Any) -> nn.Module:
    """An average over windows of several sizes."""

    def along(x: Tensor, axis: int) -> Tensor:
        return F.adaptive_avg_pool2d(x, (wanted[0], 1) if axis == 2 else (1, wanted[1]))

    return separable(before, along)


def _first_of(rule: Rule) -> Rule:
    """Of an operator that gives places as well, where nothing reads them."""

    def pieces(call: Call) -> Any:
        module = rule(call)
        places_are_read = any(reader.args[1] != 0 and reader.users for reader in call.node.users)
        return None if module is None or places_are_read else Pieces([lambda: call.module(module)])

    return pieces


def _mean(call: Call) -> Any:
    if isinstance(call["self"], Stacked):
        return times(call, call["self"].sum(call), 1 / len(call["self"]))
    return call.function(torch.mean, call.x, _axes(call.get("dim"), call.before), bool(call.get("keepdim")))


def _sum(call: Call) -> Any:
    """The mean times how many there are."""
    if isinstance(call["self"], Stacked):
        return call["self"].sum(call)
    axes = _axes(call.get("dim"), call.before)
    counts = [call.before[axis] for axis in axes]
    if 0 in axes or not all(map(is_number, counts)):
        return None
    return times(call, call.function(torch.mean, call.x, axes, bool(call.get("keepdim"))), math.prod(counts))


def _axes(given: Any, sizes_before: tuple[Any, ...]) -> tuple[int, ...]:
    rank = len(sizes_before)
    every = tuple(range(rank)) if given is None or given == [] else (given,) if isinstance(given, int) else given
    return tuple(axis % rank for axis in every)


def _per_axis(value: Any, axes: int) -> list[int]:
    return list(value) if isinstance(value, list | tuple) else [value] * axes


def _windows(pool: Any, axes: int) -> dict[str, Any]:
    padding = _per_axis(pool.padding, axes)
    return {
        "kernel_shape": _per_axis(pool.kernel_size, axes),
        "strides": _per_axis(pool.stride, axes),
        "pads": [*padding, *padding],
        "ceil_mode": int(pool.ceil_mode),
    }


def _emit_maximum(emission: Emission) -> Value | None:
    pool, axes = emission.module, len(emission.before) - 2
    if isinstance(pool, nn.AdaptiveMaxPool1d | nn.AdaptiveMaxPool2d) or pool.return_indices:
        return None
    return emission.op("MaxPool", emission.x, **_windows(pool, axes), dilations=_per_axis(pool.dilation, axes))


def _emit_average(emission: Emission) -> Value | None:
    return _emit_average_of(emission, emission.module)


def _emit_integer_average(emission: Emission) -> Value | None:
    average = emission.module.average
    return _emit_mean(emission) if average is torch.mean else _emit_average_of(emission, average)


def _emit_average_of(emission: Emission, pool: Any) -> Value | None:
    sizes, axes = emission.before[2:], len(emission.before) - 2
    if isinstance(pool, nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d):
        return emission.op("GlobalAveragePool", emission.x) if set(emission.after[2:]) == {1} else None
    windows = _windows(pool, axes)
    if _averages_all(pool, sizes, emission.after[2:], windows):
        return emission.op("GlobalAveragePool", emission.x)
    windows["count_include_pad"] = int(pool.count_include_pad)
    if emission.flavour != "float":
        _count_no_padding(emission.path, sizes, windows)
    return emission.op("AveragePool", emission.x, **windows)


def _averages_all(pool: Any, before: tuple[Size, ...], after: tuple[Size, ...], windows: dict[str, Any]) -> bool:
    """Whether there is one window, which holds all pixels, and counts nothing else."""
    if set(after) != {1} or (any(windows["pads"]) and pool.count_include_pad):
        return False
    holds = zip(windows["kernel_shape"], windows["pads"], before, strict=False)
    return all(isinstance(size, int) and kernel - pad >= size for kernel, pad, size in holds)


def _count_no_padding(path: str, before: tuple[Size, ...], windows: dict[str, Any]) -> None:
    """Let averages whose windows reach beyond the map (ceil_mode) count values alone: the same where nothing is padded.

    onnxruntime 1.32 computes them wrongly on codes where padding counts.
    """
    if not (windows["count_include_pad"] and windows["ceil_mode"]):
        return
    padded = any(windows["pads"])
    if padded and _reaches_beyond(before, windows):
        raise UserError(
            f"{path}: an average with ceil_mode that counts its padding, which onnxruntime "
            "computes wrongly on integers; give it count_include_pad=False, or leave ceil_mode out."
        )
    windows["ceil_mode" if padded else "count_include_pad"] = 0


def _reaches_beyond(before: tuple[Size, ...], windows: dict[str, Any]) -> bool:
    """Whether ceil_mode gives a pooling another window along some axis."""
    sizes = settled(before)
    along = zip(sizes or [], windows["pads"], windows["kernel_shape"], windows["strides"], strict=False)
    return sizes is None or any((size + 2 * pad - kernel) % step for size, pad, kernel, step in along)


def _emit_mean(emission: Emission) -> Value | None:
    """Over all pixels as what backends compute on codes, over other axes with these as constants, as TensorRT wants."""
    _, axes, kept = emission.arguments
    rank = len(emission.before)
    if rank in (3, 4) and sorted(axes) == list(range(2, rank)):
        result = emission.op("GlobalAveragePool", emission.x)
        return result if kept else emission.op("Flatten", result, axis=1)
    return emission.op("ReduceMean", emission.x, emission.number("axes", list(axes)), keepdims=int(bool(kept)))


OPERATORS = (
    Operator(
        "reshape",
        (nn.MaxPool1d, nn.MaxPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
        {
            "max_pool1d": _max_pool(nn.MaxPool1d),
            "max_pool2d": _max_pool(nn.MaxPool2d),
            "max_pool1d_with_indices": _first_of(_max_pool(nn.MaxPool1d)),
            "max_pool2d_with_indices": _first_of(_max_pool(nn.MaxPool2d)),
            "adaptive_max_pool1d": _first_of(_adaptive(nn.MaxPool1d, nn.AdaptiveMaxPool1d)),
            "adaptive_max_pool2d": _first_of(_adaptive(nn.MaxPool2d, nn.AdaptiveMaxPool2d)),
        },
        emit=_emit_maximum,
        stands_for="max pooling",
        treatment=PASSED,
    ),
    Operator(
        "average",
        (nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d),
        {
            "avg_pool1d": _avg_pool(nn.AvgPool1d),
            "avg_pool2d": _avg_pool(nn.AvgPool2d),
            "adaptive_avg_pool1d": _adaptive(nn.AvgPool1d, nn.AdaptiveAvgPool1d),
            "adaptive_avg_pool2d": _adaptive(nn.AvgPool2d, nn.AdaptiveAvgPool2d),
        },
        on_codes=IntegerAverage,
        emit=_emit_average,
        stands_for="average, adaptive and global pooling",
        treatment=AVERAGED,
    ),
    Operator(
        "average",
        (torch.mean,),
        {"mean": _mean, "sum": _sum},
        on_codes=IntegerAverage,
        emit=_emit_mean,
        stands_for="`mean` and `sum` over axes",
        treatment=AVERAGED,
    ),
)
EXACT_FORMS = (ExactForm(IntegerAverage, _emit_integer_average),)
