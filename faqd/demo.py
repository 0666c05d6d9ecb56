"""The main job on an embedded default: `python -m faqd.demo --out demo`, minutes on a CPU, no download.

It types the commands a user would type, on the handwritten digits of scikit-learn.
"""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any

import click

from faqd.benchmarks.cli import bench_command
from faqd.command import run
from faqd.deploy.cli import cli as deploy_cli
from faqd.errors import UserError
from faqd.files import read_json
from faqd.train.cli import cli as train_cli

TOOLS: dict[str, click.Command] = {"faqd-train": train_cli, "faqd-deploy": deploy_cli, "faqd-bench": bench_command}

STEPS = (
    (
        "A float ResNet-20 teacher, trained with labels",
        "faqd-train teacher --recipe digits-teacher --out {out}/teacher",
    ),
    ("The baseline: 8 bits without training", "faqd-deploy ptq --teacher {out}/teacher --out {out}/ptq-w8a8"),
    (
        "The control: 4 bits without training, which must lose",
        "faqd-deploy ptq --teacher {out}/teacher --weight-bits 4 --act-bits 4 --out {out}/ptq-w4a4",
    ),
    (
        "A student with 8 bits, without labels",
        "faqd-train distill --recipe digits --teacher {out}/teacher --out {out}/run-w8a8",
    ),
    (
        "A student with 4-bit weights and activations, without labels",
        "faqd-train distill --recipe digits --teacher {out}/teacher --weight-bits 4 --act-bits 4 --out {out}/run-w4a4",
    ),
    (
        "A smaller student with 8 bits, without labels",
        "faqd-train distill --recipe digits --teacher {out}/teacher --arch resnet8 --out {out}/run-small",
    ),
    ("Lower and verify the students", "faqd-deploy export {out}/run-w8a8 --out {out}/w8a8"),
    ("", "faqd-deploy export {out}/run-w4a4 --out {out}/w4a4"),
    ("", "faqd-deploy export {out}/run-small --out {out}/small"),
    (
        "Bench all of them, interleaved",
        "faqd-bench {out}/ptq-w8a8 {out}/w8a8 {out}/w4a4 {out}/small {out}/ptq-w4a4 --batch 1,32 --duration 0.5 "
        "--report {out}/report.html --json {out}/bench.json",
    ),
)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--out", type=click.Path(path_type=Path), default=Path("demo"), show_default=True, help="A new folder.")
def demo(out: Path) -> None:
    """Train, quantize, distil, export, verify and bench on the digits of scikit-learn."""
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: is not empty; remove it, or give another --out.")
    started = time.monotonic()
    for title, line in STEPS:
        command = line.format(out=shlex.quote(str(out)))
        if title:
            click.secho(f"\n{title}", bold=True)
        click.echo(f"$ {command}")
        name, *arguments = shlex.split(command)
        TOOLS[name].main(arguments, prog_name=name, standalone_mode=False)
    click.echo(f"\n{_control(read_json(out / 'bench.json'))}")
    click.echo(f"{time.monotonic() - started:.0f} s; open {out}/report.html")


def _control(result: dict[str, Any]) -> str:
    """A sentence on the control; UserError (exit code 1) if 4 bits without training were as good as with it.

    Judged by the divergence from the teacher's outputs: 500 digits cannot tell such students apart by top-1.
    """
    divergence = {
        network["kind"]: float(network["accuracy"]["kl_to_teacher_nats"])
        for network in result["networks"]
        if network["role"] == "student" and network["weight_bits"] == 4
    }
    if divergence["ptq"] <= divergence["distilled"]:
        raise UserError("the control, 4 bits without training, is as close to the teacher as the student.", exit_code=1)
    return (
        f"The control loses: 4 bits without training are {divergence['ptq']:.4f} nats from the teacher's outputs, "
        f"the distilled student {divergence['distilled']:.4f}."
    )


if __name__ == "__main__":
    run(demo)
