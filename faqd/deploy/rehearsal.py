"""The export of a student that is not trained yet: what would stop it then stops it before the first iteration."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

from torch import Tensor, nn

from faqd import bundle as names
from faqd.deploy.export.float16 import float16_from_float32
from faqd.deploy.export.torch_to_onnx import onnx_from_deployed, onnx_from_network
from faqd.deploy.lower import lower
from faqd.deploy.onnx_model.session import OnnxSession
from faqd.deploy.verify.bundle_networks import flavours
from faqd.deploy.verify.layers import verify_file
from faqd.deploy.verify.outputs import float_snr_db, outputs_of
from faqd.deploy.verify.torch_values import float_outputs_in_torch, stored_outputs
from faqd.deploy.verify.verify import FLOAT_SNR_DB
from faqd.errors import UserError
from faqd.fidelity import all_probabilities
from faqd.quant import FLOAT_BITS
from faqd.quantize.branches import branches_of
from faqd.quantize.capture.capture import capture
from faqd.quantize.capture.fuse_batch_norm import fused
from faqd.quantize.convert import collect_output_scales, convert
from faqd.quantize.student import Student

_rehearsed: set[str] = set()
"""Students that differ in their weights alone are lowered alike: one of them is enough."""


def rehearse(student: Student, teacher: nn.Module | None, x: Tensor, say: Callable[[str], None]) -> None:
    """Make all files of a calibrated student that `faqd-deploy export` will, and prove them on two images.

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
                "that layer float with --exclude, or write it in another way.",
                exit_code=1,
            )
    _rehearse_float_networks(student, teacher, x)
    _rehearsed.add(kind)
    say(f"export rehearsed on the untrained student {student.config.label}: {time.monotonic() - start:.1f} s.")


def _rehearse_float_networks(student: Student, teacher: nn.Module | None, x: Tensor) -> None:
    """The student unquantized, and the teacher: their files, which say in ONNX what torch computes."""
    here = copy.deepcopy(student).cpu().eval()
    taught = here.float_network if teacher is None else capture(teacher, x)
    files = {
        names.FLOAT_STUDENT: (onnx_from_deployed(convert(here, "float"), x, {}), float_outputs_in_torch(here, x)),
        names.TEACHER: (onnx_from_network(fused(taught), x, {}), stored_outputs(taught, x)),
    }
    branches = branches_of(taught)
    float16_from_float32(files[names.FLOAT_STUDENT][0])
    for name, (model, wanted) in files.items():
        found = outputs_of(OnnxSession(model.SerializeToString()), x.numpy())
        for output, values in wanted.items():
            ratio = float_snr_db(found[output], values, all_probabilities(branches[output]))
            if ratio is not None and ratio < FLOAT_SNR_DB:
                raise UserError(
                    f"{name} of this student would be {ratio:.0f} dB from torch's {output}, and at least "
                    f"{FLOAT_SNR_DB} are needed. Nothing was trained; some operator means something else in ONNX.",
                    exit_code=1,
                )
