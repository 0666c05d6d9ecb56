"""The export of a student that is not trained yet: what would stop it then stops it before the first iteration."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor, nn

from faqd.deploy.export.torch_to_onnx import onnx_from_network
from faqd.deploy.lower import lower
from faqd.deploy.verify.bundle_networks import flavours
from faqd.deploy.verify.layers import verify_file
from faqd.errors import UserError
from faqd.quant import FLOAT_BITS
from faqd.quantize.capture.capture import capture
from faqd.quantize.capture.fuse_batch_norm import fused
from faqd.quantize.convert import collect_output_scales
from faqd.quantize.student import Student

_rehearsed: set[str] = set()
"""Students that differ in their weights alone are lowered alike: one of them is enough."""


def rehearse(student: Student, teacher: nn.Module | None, x: Tensor, say: Callable[[str], None]) -> None:
    """Lower a calibrated student as `faqd-deploy export` will, and prove both flavours on two images.

    teacher: of another network, which is lowered as well. x: (N >= 2, C, H, W) float32 on the CPU, network input.
    UserError says what cannot be lowered, or could not be verified. A student with float activations is never exported.
    """
    kind = f"{student.config} {tuple(x.shape[1:])} {student.network.graph} {student.network} {teacher}"
    if student.config.activations == FLOAT_BITS or kind in _rehearsed:
        return
    start = time.monotonic()
    scales = collect_output_scales(student, [x[:2]])
    for flavour in flavours(student.config.target, student.config.activations):
        lowered = lower(student, flavour, scales, x[:2])
        modes = [False, True] if flavour == "onnxruntime" else [False]
        failures = verify_file(lowered.onnx, x[:2].numpy(), lowered.digests, modes)["failures"]
        if failures:
            raise UserError(
                f"the {flavour} file of this student could not be verified: {failures[0]}. Nothing was trained; keep "
                "that place float with --exclude, or write it in another way.",
                exit_code=1,
            )
    if teacher is not None:
        onnx_from_network(fused(capture(teacher, x)), x, {})
    _rehearsed.add(kind)
    say(f"export rehearsed on the untrained student {student.config.label}: {time.monotonic() - start:.1f} s.")
