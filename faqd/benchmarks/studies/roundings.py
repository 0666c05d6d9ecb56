"""Which kinds of roundings a network without training loses by: weights, activations, and what reads them.

`python -m faqd.benchmarks.studies.roundings NETWORKS.json --only NETWORK --json FILE`. NETWORKS.json is that of
`faqd.benchmarks.studies.defaults`; the network needs a metric of (outputs, teacher's outputs). Judged are 48 training
images on which no scale is chosen, as torch computes the student with one kind of roundings and no other.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, fx

from faqd import __version__
from faqd.benchmarks.measure.environment import environment
from faqd.benchmarks.studies.defaults import lesson_of
from faqd.command import emit_json, json_option, run
from faqd.files import read_json
from faqd.quantize import nodes
from faqd.quantize.calibrate import calibrate
from faqd.quantize.capture.capture import capture
from faqd.quantize.config import QuantConfig
from faqd.quantize.equalize import equalized
from faqd.quantize.outputs import run_batches
from faqd.quantize.prepare import insert_quantizers
from faqd.quantize.sensitivity import KINDS, Sensitivity
from faqd.train.networks.source import user_function
from faqd.train.run.folder import network_input

CALIBRATED, JUDGED, BATCH = 32, 48, 16


def figures(network: fx.GraphModule, scales: Tensor, images: Tensor, metric: Any) -> dict[str, float]:
    """The metric with all roundings, and with one kind alone. network: a captured float one."""
    student = insert_quantizers(network, QuantConfig(), images[:2])
    student.network.eval()
    calibrate(student, scales, "mse")
    wanted = {name: values.numpy() for name, values in run_batches(network, images, BATCH).items()}

    def judged() -> float:
        found = run_batches(student.network, images, BATCH)
        return round(float(metric({name: values.numpy() for name, values in found.items()}, {"teacher": wanted})), 2)

    result = {"all": judged()}
    asked = Sensitivity(student, images[:2], [scales], "mse")
    for kind in KINDS:
        with asked.only(kind):
            result[kind] = judged()
    return result


@click.command(help=(__doc__ or "").splitlines()[0])
@click.argument("networks", type=click.Path(path_type=Path, exists=True))
@click.option("--only", required=True, metavar="NETWORK", help="Try this network of the list.")
@json_option
def command(networks: Path, only: str, json_target: str | None) -> None:
    entry = read_json(networks)[only]
    lesson = lesson_of(entry, networks.parent)
    x = network_input(lesson.dataset.train.pixels[: CALIBRATED + JUDGED], lesson.dataset.preprocess)
    scales, images = x[:CALIBRATED], x[CALIBRATED:]
    metric = user_function(str(networks.parent / entry["metric"]), "metric")
    captured = capture(lesson.teacher.network, nodes.two_of(x))
    with torch.no_grad():
        even = equalized(captured, QuantConfig(), [scales]).network
        result = {
            name: figures(net, scales, images, metric) for name, net in (("plain", captured), ("equalized", even))
        }
    record = {
        "what": "the metric of a student without training, with all its roundings and with one kind of them alone",
        "command": f"python -m faqd.benchmarks.studies.roundings networks.json --only {only}",
        "environment": environment(),
        "versions": {"faqd": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "images": len(images),
        "figures": result,
    }
    emit_json(json_target, record)


def main() -> None:
    run(command)


if __name__ == "__main__":
    main()
