"""faqd-train recover: options to one call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from faqd.command import (
    Command,
    attention_option,
    emit_json,
    exclude_option,
    json_option,
    section,
    strict_option,
    target_option,
)
from faqd.data_flags import data_flags, data_values
from faqd.deploy.options import min_fidelity_option
from faqd.errors import UserError
from faqd.train.options import (
    device_options,
    length_options,
    place_values,
    teacher_option,
    teacher_weights_option,
    time_limit_option,
)


@click.command(cls=Command)
@section("Teacher", teacher_option("Win this float network back in integers."), teacher_weights_option)
@data_flags
@section(
    "Student",
    click.option("--weight-bits", type=click.IntRange(1, 8), default=8, help="Give weights so many bits."),
    click.option("--act-bits", type=click.IntRange(1, 8), default=8, help="Give activations so many bits."),
    target_option,
    click.option(
        "--keep-float",
        type=click.IntRange(0),
        default=5,
        metavar="N",
        help="Where scales alone are not enough, keep at most N layers and operators float; 0 keeps all in integers.",
    ),
    attention_option,
    exclude_option,
    strict_option,
)
@section("Training", *length_options("20", "8 to 100, by the size of images"), *device_options, time_limit_option)
@section(
    "Output",
    click.option(
        "--out",
        type=click.Path(path_type=Path),
        required=True,
        help="Write to this folder: recover.json, the bundle, and the run where it comes to training.",
    ),
    click.option("--resume", is_flag=True, help="Go on with the recovery in --out; start it if there is none."),
    min_fidelity_option,
    json_option,
)
def recover(
    teacher: str,
    teacher_weights: Path | None,
    keep_float: int,
    min_fidelity: float | None,
    json_target: str | None,
    **options: Any,
) -> None:
    """Win a network back that loses in INT8, without labels: the cheap first, training last, a bundle of the best.

    Every step is judged on images of the validation split, that nothing was fitted on. It ends at --min-fidelity, or
    0.97, says what each step gave and its time, and whether the result is accepted.
    """
    from faqd.bundle import VERIFY
    from faqd.deploy.conclusion import bundle_lines, exit_if_failed
    from faqd.fidelity import KEPT
    from faqd.files import read_json
    from faqd.train.loop.distributed import process_group
    from faqd.train.recipes import distill_recipe, overridden
    from faqd.train.recover.record import refuse_other_folder
    from faqd.train.recover.recover import Recovery
    from faqd.train.recover.verdict import lines
    from faqd.train.run.lesson import lesson_from
    from faqd.train.run.student import recipe_bits

    data, out, device, workers, resume, deadline = data_values(options), *place_values(options)
    recipe = overridden(distill_recipe("default"), {"data": data["source"], **options})
    recipe_bits(recipe)
    enough = KEPT if min_fidelity is None else min_fidelity
    refuse_other_folder(out, resume)
    with process_group(device, workers) as processes:
        if processes.size > 1:
            raise UserError("torchrun: recover is one process; run it alone, or `faqd-train distill` in several.")
        lesson = lesson_from(teacher, teacher_weights, data, with_labels="eval", say=_say)
        record, bundle = Recovery(lesson, recipe, keep_float, enough, out, _say, processes, deadline).run()
    click.echo("\n".join(lines(record)), err=json_target == "-")
    click.echo("\n".join(bundle_lines(bundle, advised=False)), err=True)
    emit_json(json_target, record)
    exit_if_failed(read_json(bundle.folder / VERIFY), min_fidelity)


def _say(text: str) -> None:
    click.echo(text, err=True)
