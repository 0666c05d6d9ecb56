"""What 8 bits lose in networks with attention, and what equalization, asymmetric activations and INT8 attention change.

`python -m faqd.benchmarks.studies.transformers --json FILE [NAME ...]`: public networks with calm random weights, as
results/coverage has them. Signal-to-noise ratio of the outputs to the float network, on pictures that nothing was
calibrated on. The pictures are drawn by seed.
"""

from __future__ import annotations

import shlex
import sys
from typing import Any

import click
import torch
from torch import Tensor, fx, nn

from faqd import __version__
from faqd.benchmarks.measure.environment import environment
from faqd.benchmarks.studies.calm_weights import pictures
from faqd.benchmarks.studies.public_networks import build, public_networks
from faqd.benchmarks.studies.resumable import say
from faqd.command import emit_json, json_option, run
from faqd.deploy.verify.outputs import snr_db
from faqd.errors import UserError
from faqd.preprocess import Preprocess
from faqd.quantize import nodes
from faqd.quantize.calibrate import calibrate
from faqd.quantize.capture.capture import capture
from faqd.quantize.config import QuantConfig
from faqd.quantize.equalize import equalized
from faqd.quantize.outputs import run_batches
from faqd.quantize.prepare import insert_quantizers
from faqd.quantize.quantizers.activation import ActivationQuantizer
from faqd.quantize.student import Student

VERSION = 1
NETWORKS = (
    "timm/vit_tiny_patch16_224",
    "timm/pvt_v2_b0",
    "timm/swin_tiny_patch4_window7_224",
    "timm/convnext_atto",
    "timm/poolformer_s12",
    "timm/mobilevit_xxs",
)
CALIBRATION, JUDGED, BATCH = 48, 16, 8
"""Images."""
_DEFAULT = QuantConfig()
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def measured(name: str) -> dict[str, Any]:
    """snr_db: of the plain student, and with one change each. equalized: how many tensors, and products among them."""
    known = public_networks()
    if name not in known:
        raise UserError(f"{name}: no network of this study; {', '.join(NETWORKS)} are those that it asks by itself.")
    network = known[name]
    preprocess = Preprocess(network.side, network.side, MEAN, STD)
    x = torch.from_numpy(preprocess.normalise(pictures(network.side, CALIBRATION + JUDGED, seed=0)))
    traced = capture(build(network, x[:BATCH]), x[:2])
    made = equalized(traced, QuantConfig(), x[:CALIBRATION].split(BATCH))
    students = {
        "plain": _student(traced, x),
        "equalized": _student(made.network, x),
        "asymmetric": _student(traced, x, QuantConfig(asymmetric=True)),
        "asymmetric_gelu": _student(traced, x, QuantConfig(asymmetric=True), only_gelu=True),
        "attention_int8": _student(traced, x, QuantConfig(attention="int8")),
    }
    wanted = run_batches(traced, x[CALIBRATION:], BATCH)
    return {
        "kind": network.kind,
        "side": network.side,
        "equalized": {"tensors": len(made.tensors), "products": len(made.products)},
        "snr_db": {way: _least(student, x[CALIBRATION:], wanted) for way, student in students.items()},
    }


def _student(traced: fx.GraphModule, x: Tensor, config: QuantConfig = _DEFAULT, *, only_gelu: bool = False) -> Student:
    """only_gelu: whether none but the results of GELU are asymmetric."""
    student = insert_quantizers(traced, config, x[:2])
    if only_gelu:
        for node in student.network.graph.nodes:
            quantizer = nodes.module_of(student.network, node)
            of_gelu = node.all_input_nodes and isinstance(
                nodes.module_of(student.network, nodes.operand(node)), nn.GELU
            )
            if isinstance(quantizer, ActivationQuantizer) and quantizer.quant.signed and not of_gelu:
                quantizer.asymmetric = False
    calibrate(student.eval(), x[:CALIBRATION].split(BATCH))
    return student


def _least(student: Student, x: Tensor, wanted: dict[str, Tensor]) -> float | None:
    found = run_batches(student, x, BATCH)
    ratios = [snr_db(found[name].numpy(), value.numpy()) for name, value in wanted.items()]
    return min((round(ratio, 2) for ratio in ratios if ratio is not None), default=None)


@click.command(help=(__doc__ or "").splitlines()[0])
@click.argument("names", nargs=-1)
@json_option
def command(names: tuple[str, ...], json_target: str | None) -> None:
    found: dict[str, Any] = {}
    result = {
        "version": VERSION,
        "what": "8/8 without training, mse scales, beside the float network; calm random weights",
        "command": shlex.join(["python", "-m", "faqd.benchmarks.studies.transformers", *sys.argv[1:]]),
        "environment": environment(),
        "versions": {"faqd": __version__, "torch": torch.__version__},
        "images": {"calibration": CALIBRATION, "judged": JUDGED, "seed": 0},
        "networks": found,
    }
    for name in names or NETWORKS:
        found[name] = measured(name)
        say(f"{name}: {found[name]['snr_db']}")
        if json_target != "-":
            emit_json(json_target, result)  # whatever is finished stays
    if json_target == "-":
        emit_json(json_target, result)


def main() -> None:
    run(command)


if __name__ == "__main__":
    main()
