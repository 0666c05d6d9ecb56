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
from faqd.benchmarks.report.figures import first_batch, speed_up_at
from faqd.command import run
from faqd.cpu import has_dot_products
from faqd.deploy.cli import cli as deploy_cli
from faqd.errors import UserError
from faqd.files import read_json
from faqd.train.cli import cli as train_cli

TOOLS: dict[str, click.Command] = {"faqd-train": train_cli, "faqd-deploy": deploy_cli, "faqd-bench": bench_command}

STEPS = (
    (
        "A float ResNet-20 teacher, trained with labels",
        "faqd-train teacher --recipe digits-teacher --image-size 24 --epochs 8 --out {out}/teacher",
    ),
    ("The baseline: 8 bits without training", "faqd-deploy ptq --teacher {out}/teacher --out {out}/ptq-w8a8"),
    (
        "The control: 4 bits without training, which must lose",
        "faqd-deploy ptq --teacher {out}/teacher --weight-bits 4 --act-bits 4 --out {out}/ptq-w4a4",
    ),
    (
        "A student with 4-bit weights and activations, without labels",
        "faqd-train distill --recipe digits --teacher {out}/teacher --weight-bits 4 --act-bits 4 --steps 100 "
        "--out {out}/run-w4a4",
    ),
    ("Lower and verify it", "faqd-deploy export {out}/run-w4a4 --out {out}/w4a4"),
    (
        "Bench all of them, interleaved",
        "faqd-bench {out}/ptq-w8a8 {out}/w4a4 {out}/ptq-w4a4 --batch 1,32 --duration 0.5 "
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
        click.secho(f"\n{title}", bold=True)
        click.echo(f"$ {command}")
        name, *arguments = shlex.split(command)
        TOOLS[name].main(arguments, prog_name=name, standalone_mode=False)
    result = read_json(out / "bench.json")
    click.echo(f"\n{_control(result)}\n{_speed(result)}")
    click.echo(f"{time.monotonic() - started:.0f} s; open {out}/report.html")


def _control(result: dict[str, Any]) -> str:
    """A sentence on the control; UserError (exit code 1) if 4 bits without training were as good as with it.

    Judged by the divergence from the teacher's outputs: 500 digits need not tell such students apart by top-1.
    """
    accuracy = {
        network["kind"]: network["accuracy"]
        for network in result["networks"]
        if network["role"] == "student" and network["weight_bits"] == 4
    }
    untrained, trained = (accuracy[kind] for kind in ("ptq", "distilled"))
    if untrained["kl_to_teacher_nats"] <= trained["kl_to_teacher_nats"]:
        raise UserError("the control, 4 bits without training, is as close to the teacher as the student.", exit_code=1)
    right = untrained["top1"]
    return (
        "The control loses in its distance to the teacher's outputs (KL divergence): 4 bits without training are "
        f"{untrained['kl_to_teacher_nats']:.4f} nats away, the distilled student {trained['kl_to_teacher_nats']:.4f}. "
        f"Of {right['n']} digits they get {100 * right['value']:.1f} and {100 * trained['top1']['value']:.1f} % right."
    )


def _speed(result: dict[str, Any]) -> str:
    """A sentence on what INT8 has brought, which depends on the CPU."""
    student = next(network for network in result["networks"] if network["kind"] == "distilled")
    ratio = speed_up_at(student, first_batch(result), "own_float")
    assert ratio is not None, "the demo times what it benches"
    times, sets = ratio["paired_median"], result["environment"]["instruction_sets"]
    name = f"{student['name']} in INT8 is {times:.2f} times as fast as in float at batch 1 on this CPU"
    if has_dot_products(sets):
        return f"{name}, which multiplies 8-bit integers in one instruction ({' '.join(sets)})."
    return (
        f"{name}. It has no instruction that multiplies and adds 8-bit integers (VNNI on x86, dotprod on ARM): with "
        "one INT8 gains more."
    )


if __name__ == "__main__":
    run(demo)
