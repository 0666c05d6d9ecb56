"""The teacher as a source of targets: batch norm folded, channels last, no gradient, in float32 or bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx

from faqd.errors import UserError, first_line
from faqd.quantize.capture.fuse_batch_norm import fused, in_place
from faqd.quantize.outputs import named_outputs
from faqd.train.loop.batches import Target
from faqd.train.losses.layouts import with_maps
from faqd.train.recipes import TeacherDtype


def target_of(
    teacher: fx.GraphModule, names: list[str], device: torch.device, dtype: TeacherDtype = "fp32"
) -> Callable[[Tensor], Target]:
    """What the teacher makes of a batch: its outputs, in the batch's dtype, and its maps at these nodes."""
    names = list(dict.fromkeys(names))
    tapped = in_place(fused(with_maps(teacher, names)))
    tapped.eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if dtype == "bf16":
        tapped.to(torch.bfloat16)

    def target(x: Tensor) -> Target:
        with torch.inference_mode():
            outputs, maps = tapped(x.bfloat16() if dtype == "bf16" else x)
        # A copy made outside can be saved for a backward pass; the maps never are.
        copied = {name: output.to(x.dtype, copy=True) for name, output in named_outputs(outputs).items()}
        return Target(copied, dict(zip(names, maps, strict=True)))

    return target


@dataclass(frozen=True)
class DtypeEffect:
    """What another dtype does to a teacher: |other - float32| / |float32| of the outputs and of every map.

    agreement: share of the images for which the largest output is the same.
    """

    dtype: TeacherDtype
    images: int
    outputs: float
    maps: dict[str, float]
    agreement: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def sentence(self) -> str:
        maps = ", ".join(f"{name} {100 * value:.2g} %" for name, value in self.maps.items())
        return (
            f"teacher in {self.dtype}: outputs move by {100 * self.outputs:.2g} % in norm, same top class for "
            f"{100 * self.agreement:.1f} % of {self.images} images" + (f"; maps: {maps}." if maps else ".")
        )


def dtype_effect(
    teacher: fx.GraphModule, names: dict[str, str], batches: list[Tensor], device: torch.device, dtype: TeacherDtype
) -> DtypeEffect:
    """Compare the teacher in `dtype` with itself in float32 on `batches` (B, C, H, W).

    names: node name -> what to call its map. UserError if the teacher does not run in that dtype.
    """
    plain, other = (target_of(teacher, list(names), device, kind) for kind in ("fp32", dtype))
    moved: dict[str | None, list[float]] = {key: [0.0, 0.0] for key in (None, *names)}
    same = images = 0
    for x in batches:
        wanted = plain(x)
        try:
            found = other(x)
        except RuntimeError as error:
            raise UserError(f"--teacher-dtype {dtype}: the teacher does not run in it: {first_line(error)}.") from error
        for key, sums in moved.items():
            ours, theirs = (found.outputs, wanted.outputs) if key is None else (found.maps, wanted.maps)
            for name in wanted.outputs if key is None else [key]:
                a, b = ours[name], theirs[name]
                sums[0] += float((a.double() - b.double()).square().sum())
                sums[1] += float(b.double().square().sum())
        for name, output in wanted.outputs.items():
            same += int((found.outputs[name].argmax(1) == output.argmax(1)).sum())
            images += output.argmax(1).numel()
    relative = {key: (a / b) ** 0.5 if b else 0.0 for key, (a, b) in moved.items()}
    maps = {name: relative[key] for key, name in names.items()}
    return DtypeEffect(dtype, images, relative[None], maps, same / images)
