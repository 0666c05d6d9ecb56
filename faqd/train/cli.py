"""faqd-train: options to one call each."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from faqd.command import (
    SETTINGS,
    Group,
    attention_option,
    emit_json,
    exclude_option,
    json_option,
    run,
    section,
    strict_option,
    target_option,
    version_option,
)
from faqd.data_flags import MOVED_DATA, absolute_source, data_flags, data_values
from faqd.errors import UserError
from faqd.extras import install
from faqd.given import refuse_idle
from faqd.sweep import members, table
from faqd.train.options import (
    arch_option,
    bit_list,
    loss_flags,
    output_flags,
    place_values,
    schedule_flags,
    step_flags,
    student_flags,
    teacher_flags,
    teacher_option,
    teacher_weights_option,
)
from faqd.train.recover_cli import recover

if TYPE_CHECKING:
    from faqd.train.distill import Rehearsal
    from faqd.train.recipes import DistillRecipe


@click.group(cls=Group, context_settings=SETTINGS)
@version_option
def cli() -> None:
    """Distil a float network into a quantized student, without labels."""


def main() -> None:
    run(cli)


@cli.command()
@section(
    "Network",
    click.option("--recipe", default="digits-teacher", help="Set everything; `recipes` lists them."),
    arch_option("Train this network: one of the zoo, such as resnet20, or your own.", "resnet20"),
)
@data_flags
@schedule_flags(epochs="20", batch_size="64", lr="0.1")
@output_flags
def teacher(recipe: str, json_target: str | None, **options: Any) -> None:
    """Train a float teacher with labels, where you have none of your own.

    Defaults in parentheses are those of the recipe `digits-teacher`; another recipe has its own.
    """
    from faqd.train.data.options import DataOptions
    from faqd.train.loop.distributed import process_group
    from faqd.train.recipes import overridden, teacher_recipe
    from faqd.train.teacher import train_teacher

    data, out, device, workers, resume, deadline = data_values(options), *place_values(options)
    chosen = overridden(teacher_recipe(recipe), {"data": data["source"], **options})
    with process_group(device, workers) as processes:
        say, goes_on = _say if processes.is_rank_0 else _silent, resume or processes.is_restart
        record = train_teacher(
            chosen, DataOptions(**{**data, "source": chosen.data}), out, goes_on, say, processes, deadline
        )
        say(f"{out}: {Path(chosen.arch).name}, {100 * record['select']['accuracy']:.2f} % on the validation split.")
        if processes.is_rank_0:
            emit_json(json_target, record)


@cli.command()
@teacher_flags
@data_flags
@student_flags
@loss_flags
@schedule_flags(epochs="20", batch_size="8 to 100, by the size of images", lr="by start, bits and distance")
@step_flags
@output_flags
def distill(recipe: str, teacher: str, teacher_weights: Path | None, json_target: str | None, **options: Any) -> None:
    """Distil quantized students from a teacher, on images without labels.

    Defaults in parentheses are those of the recipe `default`; another recipe has its own.
    """
    from faqd.train import distill as distillation
    from faqd.train.idle_options import refuse_idle_options
    from faqd.train.loop.distributed import process_group
    from faqd.train.recipes import distill_recipe, overridden
    from faqd.train.run.lesson import lesson_from
    from faqd.train.run.outcome import outcome
    from faqd.train.run.plan import with_seeds

    data, out, device, workers, resume, deadline = data_values(options), *place_values(options)
    taps, seeds = list(options.pop("taps")) or None, options.pop("seeds")
    options["exclude"], cache = options["exclude"] or None, options.pop("cache_teacher")
    weight_bits = bit_list("--weight-bits", options.pop("weight_bits"))
    act_bits = bit_list("--act-bits", options.pop("act_bits"))
    base = overridden(distill_recipe(recipe), {"data": data["source"], "teacher_cache": cache and True, **options})
    variants = _variants(base, weight_bits, act_bits)
    refuse_idle_options(variants)
    with process_group(device, workers) as processes:
        say, goes_on = _say if processes.is_rank_0 else _silent, resume or processes.is_restart
        source = {**data, "source": base.data}
        lesson = lesson_from(teacher, teacher_weights, source, with_labels=base.label_weight > 0, say=say)
        seeded = with_seeds(variants, seeds, lesson.teacher)
        names = [f"w{each.weight_bits}a{each.act_bits}-s{each.training.seed}" for each in seeded]
        runs = [out / name for name in names] if len(seeded) > 1 else [out]
        records = distillation.distill(
            list(zip(seeded, runs, strict=True)),
            lesson,
            taps,
            goes_on,
            say,
            processes,
            deadline,
            _rehearsal(say),
            cache,
        )
        for each, run_folder, record in zip(seeded, runs, records, strict=True):
            before = record.get("select_untrained") or {}
            losses = ", ".join(
                f"{name} {value:.4g}" + (f" (untrained {before[name]:.4g})" if name in before else "")
                for name, value in record["select"].items()
            )
            say(f"{run_folder}: student {each.weight_bits}/{each.act_bits}; validation losses: {losses}.")
            if (sentence := outcome(record)) is not None:
                say(f"{run_folder}: {sentence}")
        if processes.is_rank_0:
            emit_json(json_target, records[0] if len(records) == 1 else records)


cli.add_command(recover)


@cli.command("eval")
@click.argument("run_folder", metavar="RUN", type=click.Path(path_type=Path))
@section("Data", *MOVED_DATA)
@json_option
def evaluate(run_folder: Path, data: str | None, data_root: Path | None, json_target: str | None) -> None:
    """Accuracy of a run's network on the evaluation split: for a student, of the deployed integers.

    A folder of runs, as `distill` writes it for lists of bits and several seeds, gives one table.
    """
    from faqd.train.evaluate import evaluate_run, evaluate_runs, row
    from faqd.train.run.folder import RECORD, MovedData

    moved = MovedData(data_root, absolute_source(data))
    if runs := members(run_folder, RECORD):
        results = evaluate_runs(runs, moved, _say)
        if json_target != "-":
            click.echo("\n".join(table([row(each) for each in results])))
        emit_json(json_target, results)
        return
    result = evaluate_run(run_folder, moved)
    if json_target != "-":
        click.echo("\n".join(f"{name}: {value}" for name, value in result.items()))
    emit_json(json_target, result)


@cli.command()
@click.argument("run_folder", metavar="RUN", type=click.Path(path_type=Path))
@section(
    "Output",
    click.option(
        "--tensorboard",
        metavar="FOLDER",
        type=click.Path(path_type=Path, file_okay=False),
        help="Write them into FOLDER for TensorBoard, each run under its name, and print nothing.",
    ),
    json_option,
)
def curves(run_folder: Path, tensorboard: Path | None, json_target: str | None) -> None:
    """Show how the losses of a run fell, epoch by epoch, while it trains or when it has ended.

    Of a folder of runs it shows all; those that have no losses yet are named.
    """
    from faqd.train.curves import lines, points, runs_in, write_events

    found: dict[str, list[dict[str, float]]] = {}
    for run_path in (runs := runs_in(run_folder)):
        try:
            found[run_path.resolve().name] = each = points(run_path)
        except UserError as error:
            if len(runs) == 1:
                raise
            _say(f"{error}")
            continue
        if tensorboard is not None:
            write_events(each, tensorboard / run_path.resolve().name)
        elif json_target != "-":
            click.echo("\n".join(lines(run_path, each)))
    if tensorboard is not None:
        _say(f"{len(found)} in {tensorboard}: `tensorboard --logdir {shlex.quote(str(tensorboard))}` shows them.")
    emit_json(json_target, found)


@cli.command()
@json_option
def recipes(json_target: str | None) -> None:
    """List the recipes."""
    from faqd.train.recipes import RECIPES, TeacherRecipe, recipe_json

    built = {name: make() for name, make in RECIPES.items()}
    if json_target != "-":
        for name, recipe in built.items():
            kind = "teacher" if isinstance(recipe, TeacherRecipe) else "distill"
            click.echo(f"{name:26} {kind:8} {recipe.about}")
    emit_json(json_target, {name: recipe_json(recipe) for name, recipe in built.items()})


@cli.command()
@section(
    "Network",
    teacher_option("Look at this network."),
    teacher_weights_option,
    arch_option("Look at this student of it instead, of the zoo or your own."),
    click.option(
        "--image-size",
        metavar="H[xW]",
        help="Feed a network this size; a run, and most files of networks, know their own.",
    ),
    click.option("--input-channels", type=click.IntRange(1), default=3, help="Feed it so many channels."),
)
@section(
    "Student",
    click.option("--weight-bits", type=int, default=8, help="Give weights 1 to 8 bits."),
    click.option("--act-bits", type=int, default=8, help="Give activations 1 to 8 bits, or 32."),
    target_option,
    click.option(
        "--scales",
        type=click.Choice(["channel", "tensor"]),
        default="channel",
        help="Give each of these a weight scale.",
    ),
    attention_option,
    exclude_option,
    strict_option,
)
@section(
    "Output",
    json_option,
)
def inspect(json_target: str | None, **options: Any) -> None:
    """Show before training how each layer is quantized, weights and inputs, and which feature layers are compared."""
    from faqd.bundle import floats_in_words
    from faqd.train.inspect import inspect_network

    if Path(options["teacher"]).is_dir():
        refuse_idle(["--image-size", "--input-channels"], "a run knows its input")
    table = inspect_network(**options, say=_say)
    if json_target != "-":
        click.echo(f"{'layer':34} {'operator':10} {'weights':12} {'inputs':14} shape")
        for row in table["layers"]:
            shape = "x".join(map(str, row["weight_shape"]))
            click.echo(f"{row['name']:34} {row['operator']:10} {row['weights']:12} {row['inputs']:14} {shape}")
        for sentence in floats_in_words(table):
            click.echo(sentence)
        click.echo(f"weight scales: one per {table['weight_scales']}")
        click.echo("feature layers: " + ", ".join(table["taps"]))
    emit_json(json_target, table)


def _say(text: str) -> None:
    click.echo(text, err=True)


def _silent(text: str) -> None:
    """What all processes but the first say."""


def _rehearsal(say: Callable[[str], None]) -> Rehearsal | None:
    """What tries the export of a student before it is trained; None where what the export needs is not installed."""
    try:
        from faqd.deploy.rehearsal import rehearse
    except ModuleNotFoundError as error:
        say(f"the export is not tried before training: no {error.name} here; {install('onnx')} brings it.")
        return None
    return rehearse


def _variants(base: DistillRecipe, weight_bits: list[int | None], act_bits: list[int | None]) -> list[DistillRecipe]:
    """The cross product of bits; refuses those out of range before anything is read or trained."""
    from faqd.train.recipes import overridden
    from faqd.train.run.student import recipe_bits

    pairs = product(weight_bits, act_bits)
    made = [overridden(base, {"weight_bits": weights, "act_bits": activations}) for weights, activations in pairs]
    for recipe in made:
        recipe_bits(recipe)
    return made


if __name__ == "__main__":
    main()
