"""faqd-train: options to one call each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from faqd.command import (
    SETTINGS,
    Finite,
    data_flags,
    data_values,
    emit_json,
    exclude_option,
    json_option,
    run,
    strict_option,
    version_option,
)
from faqd.errors import UserError

if TYPE_CHECKING:
    from faqd.train.distill import Rehearsal
    from faqd.train.recipes import DistillRecipe

SEED = click.IntRange(0, 2**32 - 1)
"""torch's generator on the CPU knows no more of them."""


@click.group(context_settings=SETTINGS)
@version_option
def cli() -> None:
    """Distil a float network into a quantized student, without labels."""


def main() -> None:
    run(cli)


def _absolute(context: click.Context, option: click.Parameter, spec: str | None) -> str | None:
    """FILE.py:callable with a path that holds from any folder, since a run remembers it."""
    file, _, name = (spec or "").rpartition(":")
    return f"{Path(file).expanduser().resolve()}:{name}" if file.endswith(".py") else spec


def _arch(help_text: str) -> Callable[[Any], Any]:
    return click.option("--arch", metavar="NAME|FILE.py:callable", callback=_absolute, help=help_text)


def _schedule(command: Any) -> Any:
    for option in reversed(
        (
            click.option("--epochs", type=click.IntRange(1), help="Pass so many times over the training images."),
            click.option("--steps", type=click.IntRange(1), help="Train so many iterations, whatever --epochs says."),
            click.option("--batch-size", type=click.IntRange(2), help="Take so many images per iteration."),
            click.option("--lr", type=Finite(0, min_open=True), help="Use this learning rate at its peak."),
            click.option("--seed", type=SEED, help="Draw the initial weights with this seed."),
            click.option("--data-seed", type=SEED, help="Draw order and augmentation with this seed."),
            click.option(
                "--device",
                type=click.Choice(["auto", "cpu", "cuda"]),
                default="auto",
                show_default=True,
                help="Train here; auto takes a GPU if there is one.",
            ),
            click.option("--out", type=click.Path(path_type=Path), required=True, help="Write the run to this folder."),
            click.option("--resume", is_flag=True, help="Go on with the run in --out; start it if there is none."),
            click.option(
                "--time-limit",
                type=Finite(0, min_open=True),
                help="Stop after so many seconds, with a checkpoint; --resume goes on.",
            ),
        )
    ):
        command = option(command)
    return command


@cli.command()
@click.option("--recipe", default="digits-teacher", show_default=True, help="Set everything; `recipes` lists them.")
@_arch("Train this network: one of the zoo, such as resnet20, or your own.")
@data_flags
@_schedule
@json_option
def teacher(recipe: str, json_target: str | None, **options: Any) -> None:
    """Train a float teacher with labels, where you have none of your own."""
    from faqd.train.data.datasets import DataOptions
    from faqd.train.loop.distributed import joined
    from faqd.train.recipes import overridden, teacher_recipe
    from faqd.train.teacher import train_teacher

    data, out, device, resume, deadline = data_values(options), *_place_values(options)
    chosen = overridden(teacher_recipe(recipe), {"data": data["source"], **options})
    with joined(device) as world:
        say = _say if world.leads else _silent
        record = train_teacher(
            chosen, DataOptions(**{**data, "source": chosen.data}), out, resume, say, world, deadline
        )
        say(f"{out}: {Path(chosen.arch).name}, {100 * record['select']['accuracy']:.2f} % on the select split.")
        if world.leads:
            emit_json(json_target, record)


_teacher_weights = click.option(
    "--teacher-weights", type=click.Path(path_type=Path), help="Read its weights from a .safetensors, .pt or .pth file."
)


@cli.command()
@click.option("--recipe", default="default", show_default=True, help="Set everything; `recipes` lists them.")
@click.option(
    "--teacher", required=True, metavar="RUN|FILE.py:callable|FILE.pt2", help="Learn from this float network."
)
@_teacher_weights
@_arch("Train this network, of the zoo or your own, instead of the teacher's.")
@click.option("--init", metavar="teacher|scratch|RUN", help="Start the student from these weights.")
@click.option("--weight-bits", metavar="BITS[,BITS]", help="Use 1 to 8 bits; a list trains all side by side.")
@click.option(
    "--act-bits",
    metavar="BITS[,BITS]",
    help="Use 1 to 8 bits, or 32 for float; a list as above. Weights are float with 32 for both.",
)
@click.option(
    "--seeds",
    type=click.IntRange(1),
    help="Train so many seeds, each into its own folder: of the initial weights, or of order and augmentation where "
    "the student starts from trained ones.",
)
@click.option("--target", type=click.Choice(["tensorrt", "onnxruntime"]), help="Train the 8-bit grid of this runtime.")
@click.option("--scales", type=click.Choice(["channel", "tensor"]), help="Give each of these a weight scale.")
@click.option("--rounding", type=click.Choice(["nearest", "ceil"]), help="Round activations behind a ReLU like this.")
@click.option(
    "--scale-gradient",
    type=click.Choice(["lsq", "mean", "pact", "min"]),
    help="Learn their scales by this slope: lsq's, or a coarse one of the paper.",
)
@click.option(
    "--calibration",
    type=click.Choice(["mse", "percentile", "max", "entropy"]),
    help="Choose the first activation scales in this way.",
)
@exclude_option
@strict_option
@click.option(
    "--logit", type=click.Choice(["relative", "mse", "kl"]), help="Measure the distance of the outputs in this way."
)
@click.option("--logit-weight", type=Finite(0), help="Weigh that distance with this.")
@click.option("--temperature", type=Finite(0, min_open=True), help="Soften the outputs of --logit kl by this.")
@click.option(
    "--affinity",
    type=click.Choice(["l1", "l2", "l2_batch", "l2_squared", "fast", "none"]),
    help="Measure the distance of the feature affinities in this way.",
)
@click.option(
    "--adaptors/--no-adaptors", default=None, help="Compare the student's maps behind a 1x1 convolution of their own."
)
@click.option("--affinity-weight", type=Finite(0), help="Weigh that distance, a mean over the batch, with this.")
@click.option(
    "--affinity-floor", type=Finite(0), help="Add this share of a map's typical length to the length of every pixel."
)
@click.option("--columns", type=click.IntRange(1), help="Use so many random projections for --affinity fast.")
@click.option("--teacher-dtype", type=click.Choice(["fp32", "bf16"]), help="Run the teacher in this.")
@click.option(
    "--autocast",
    type=click.Choice(["none", "bf16", "fp16"]),
    help="Train with convolutions and matrix products in this; quantizers and losses stay in float32.",
)
@click.option(
    "--label-weight",
    type=Finite(0),
    help="Weigh the cross-entropy to the labels with this; without it no label is read.",
)
@click.option(
    "--tap", "taps", multiple=True, metavar="PLACE[=PLACE]", help="Compare feature maps here (teacher=student)."
)
@click.option(
    "--optimizer",
    type=click.Choice(["relative", "sgd"]),
    help="Step by shares of what is learned (then --lr is that share), or as SGD does.",
)
@click.option(
    "--select",
    metavar="FILE.py:function",
    callback=_absolute,
    help="Keep the weights for which this measure of yours is largest, instead of the least distance.",
)
@data_flags
@_schedule
@json_option
def distill(recipe: str, teacher: str, teacher_weights: Path | None, json_target: str | None, **options: Any) -> None:
    """Distil quantized students from a teacher, on images without labels."""
    from faqd.train import distill as distillation
    from faqd.train.loop.distributed import joined
    from faqd.train.recipes import distill_recipe, overridden
    from faqd.train.run.lesson import lesson_from

    data, out, device, resume, deadline = data_values(options), *_place_values(options)
    taps, seeds = list(options.pop("taps")) or None, options.pop("seeds")
    options["exclude"] = options["exclude"] or None
    weight_bits = _bit_list("--weight-bits", options.pop("weight_bits"))
    act_bits = _bit_list("--act-bits", options.pop("act_bits"))
    base = overridden(distill_recipe(recipe), {"data": data["source"], **options})
    variants = _variants(base, weight_bits, act_bits)
    with joined(device) as world:
        say = _say if world.leads else _silent
        source = {**data, "source": base.data}
        lesson = lesson_from(teacher, teacher_weights, source, with_labels=base.label_weight > 0, say=say)
        seeded = distillation.with_seeds(variants, seeds or 1, lesson.teacher)
        names = [f"w{each.weight_bits}a{each.act_bits}-s{each.training.seed}" for each in seeded]
        runs = [out / name for name in names] if len(seeded) > 1 else [out]
        records = distillation.distill(
            list(zip(seeded, runs, strict=True)), lesson, taps, resume, say, world, deadline, _rehearsal(say)
        )
        for each, run_folder, record in zip(seeded, runs, records, strict=True):
            before = record.get("select_untrained") or {}
            losses = ", ".join(
                f"{name} {value:.4g}" + (f" (untrained {before[name]:.4g})" if name in before else "")
                for name, value in record["select"].items()
            )
            say(f"{run_folder}: student {each.weight_bits}/{each.act_bits}; select losses: {losses}.")
        if world.leads:
            emit_json(json_target, records[0] if len(records) == 1 else records)


@cli.command("eval")
@click.argument("run_folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--data-root", type=click.Path(path_type=Path), help="Look for a published data set in this folder.")
@json_option
def evaluate(run_folder: Path, data_root: Path | None, json_target: str | None) -> None:
    """Accuracy of a run's network on the eval split: for a student, of the deployed integers."""
    from faqd.train.evaluate import evaluate_run

    result = evaluate_run(run_folder, data_root)
    if json_target is None:
        click.echo("\n".join(f"{name}: {value}" for name, value in result.items()))
    emit_json(json_target, result)


@cli.command()
@json_option
def recipes(json_target: str | None) -> None:
    """List the recipes."""
    from faqd.train.recipes import RECIPES, TeacherRecipe, recipe_json

    built = {name: make() for name, make in RECIPES.items()}
    if json_target is None:
        for name, recipe in built.items():
            kind = "teacher" if isinstance(recipe, TeacherRecipe) else "distill"
            click.echo(f"{name:26} {kind:8} {recipe.about}")
    emit_json(json_target, {name: recipe_json(recipe) for name, recipe in built.items()})


@cli.command()
@click.option("--teacher", required=True, metavar="RUN|FILE.py:callable|FILE.pt2", help="Look at this network.")
@_teacher_weights
@_arch("Look at this student of it instead, of the zoo or your own.")
@click.option("--weight-bits", type=int, default=8, show_default=True, help="Give weights 1 to 8 bits.")
@click.option("--act-bits", type=int, default=8, show_default=True, help="Give activations 1 to 8 bits, or 32.")
@click.option(
    "--target",
    type=click.Choice(["tensorrt", "onnxruntime"]),
    default="tensorrt",
    show_default=True,
    help="Use the 8-bit grid of this runtime.",
)
@click.option(
    "--scales",
    type=click.Choice(["channel", "tensor"]),
    default="channel",
    show_default=True,
    help="Give each of these a weight scale.",
)
@exclude_option
@strict_option
@click.option("--image-size", metavar="H[xW]", help="Feed a FILE.py network this size; a run knows its own.")
@click.option(
    "--input-channels", type=click.IntRange(1), default=3, show_default=True, help="Feed it so many channels."
)
@json_option
def inspect(json_target: str | None, **options: Any) -> None:
    """Show what each layer would get before training: weight and input grids, and the affinity taps."""
    from faqd.bundle import floats_in_words
    from faqd.train.inspect import inspect_network

    table = inspect_network(**options, say=_say)
    if json_target is None:
        click.echo(f"{'layer':34} {'operator':10} {'weights':12} {'inputs':14} shape")
        for row in table["layers"]:
            shape = "x".join(map(str, row["weight_shape"]))
            click.echo(f"{row['name']:34} {row['operator']:10} {row['weights']:12} {row['inputs']:14} {shape}")
        for sentence in floats_in_words(table):
            click.echo(sentence)
        click.echo(f"weight scales: one per {table['weight_scales']}")
        click.echo("affinity taps: " + ", ".join(table["taps"]))
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
        say(f"the export is not tried before training: no {error.name} here; `pip install faqd[onnx]` brings it.")
        return None
    return rehearse


def _place_values(options: dict[str, Any]) -> tuple[Path, str, bool, float]:
    """Take out of the options of a command what says where and how long to train and not what.

    The folder, the device, whether to resume, and the time.monotonic() at which to pause.
    """
    limit = options.pop("time_limit")
    deadline = math.inf if limit is None else time.monotonic() + limit
    return options.pop("out"), options.pop("device"), options.pop("resume"), deadline


def _bit_list(option: str, text: str | None) -> list[int | None]:
    if text is None:
        return [None]
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise UserError(f"{option} {text}: expected a number, or several with commas between.")
    return list(dict.fromkeys(int(part) for part in text.split(",")))


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
