"""faqd-train: options to one call each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from faqd.command import data_flags, data_values, emit_json, json_option, run, version_option
from faqd.errors import UserError

if TYPE_CHECKING:
    from faqd.train.data import DataOptions
    from faqd.train.recipes import DistillRecipe


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@version_option
def cli() -> None:
    """Distil a float network into a quantized student, without labels."""


def main() -> None:
    run(cli)


def _schedule(command: Any) -> Any:
    for option in reversed(
        (
            click.option("--epochs", type=click.IntRange(1), help="Passes over the training images."),
            click.option("--steps", type=click.IntRange(1), help="Exactly so many iterations, instead of epochs."),
            click.option("--batch-size", type=click.IntRange(2), help="Images per iteration."),
            click.option("--lr", type=click.FloatRange(0, min_open=True), help="Peak learning rate."),
            click.option("--seed", type=click.IntRange(0), help="Initialisation."),
            click.option("--data-seed", type=click.IntRange(0), help="Order and augmentation."),
            click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True),
            click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the run."),
            click.option("--resume", is_flag=True, help="Go on with the run in --out; start it if there is none."),
        )
    ):
        command = option(command)
    return command


@cli.command()
@click.option("--recipe", default="digits-teacher", show_default=True, help="See `faqd-train recipes`.")
@click.option("--arch", help="Network from the zoo, such as resnet20.")
@data_flags
@_schedule
@json_option
def teacher(recipe: str, arch: str | None, json_target: str | None, **options: Any) -> None:
    """Train a float teacher with labels, where you have none of your own."""
    from faqd.train.recipes import overridden, teacher_recipe
    from faqd.train.teacher import train_teacher

    data, schedule = _data_and_schedule(options)
    chosen = overridden(teacher_recipe(recipe), {"arch": arch, "data": data["source"], **schedule["training"]})
    record = train_teacher(
        chosen,
        _data_options({**data, "source": chosen.data}),
        schedule["out"],
        _device(schedule["device"]),
        schedule["resume"],
        _say,
    )
    selected = record["select"]["accuracy"]
    click.echo(f"{schedule['out']}: {chosen.arch}, {100 * selected:.2f} % on the select split.", err=True)
    emit_json(json_target, record)


@cli.command()
@click.option("--recipe", default="default", show_default=True, help="Sets everything; other options override it.")
@click.option("--teacher", required=True, metavar="RUN|FILE.py:callable", help="The float network to learn from.")
@click.option("--teacher-weights", type=click.Path(path_type=Path), help="Its .safetensors, .pt or .pth file.")
@click.option("--arch", help="The student, from the zoo. Default: the teacher's own network.")
@click.option("--init", metavar="teacher|scratch|RUN", help="Where the student starts from.")
@click.option("--weight-bits", metavar="BITS[,BITS]", help="1 to 8. A list trains each into its own folder.")
@click.option("--act-bits", metavar="BITS[,BITS]", help="1 to 8, or 32 for float.")
@click.option("--seeds", type=click.IntRange(1), help="Train so many seeds, each into its own folder.")
@click.option("--target", type=click.Choice(["tensorrt", "onnxruntime"]), help="Which 8-bit grid is trained.")
@click.option("--scales", type=click.Choice(["channel", "tensor"]), help="Weight scales: one per output channel.")
@click.option("--logit", type=click.Choice(["mse", "kl"]), help="Distance of the outputs.")
@click.option("--logit-weight", type=float)
@click.option("--temperature", type=click.FloatRange(0, min_open=True), help="Of --logit kl.")
@click.option("--affinity", type=click.Choice(["l1", "l2", "l2_squared", "fast", "none"]), help="Feature affinity.")
@click.option("--affinity-weight", type=float, help="On the mean over the batch.")
@click.option("--columns", type=click.IntRange(1), help="Random projections of --affinity fast.")
@click.option("--tap", "taps", multiple=True, metavar="PLACE[=PLACE]", help="Compare maps here (teacher=student).")
@data_flags
@_schedule
@json_option
def distill(recipe: str, teacher: str, teacher_weights: Path | None, json_target: str | None, **options: Any) -> None:
    """Distil a quantized student from a teacher, on images without labels."""
    from faqd.train import distill as distillation
    from faqd.train.recipes import distill_recipe, overridden

    data, schedule = _data_and_schedule(options)
    taps, seeds = list(options.pop("taps")) or None, options.pop("seeds")
    weight_bits, act_bits = (
        _bit_list("--weight-bits", options.pop("weight_bits")),
        _bit_list("--act-bits", options.pop("act_bits")),
    )
    base = overridden(distill_recipe(recipe), {"data": data["source"], **options, **schedule["training"]})
    data["source"] = base.data or _teacher_data(teacher)
    data_options = _data_options(data)
    chosen = _teacher(teacher, teacher_weights, data_options)
    records = []
    for variant, out in _variants(base, weight_bits, act_bits, seeds, schedule["out"]):
        records.append(
            distillation.distill(
                variant, chosen, data_options, taps, out, _device(schedule["device"]), schedule["resume"], _say
            )
        )
        losses = ", ".join(f"{name} {value:.4g}" for name, value in records[-1]["select"].items())
        click.echo(f"{out}: student {variant.weight_bits}/{variant.act_bits}; select losses: {losses}.", err=True)
    emit_json(json_target, records[0] if len(records) == 1 else records)


@cli.command("eval")
@click.argument("run_folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--data-root", type=click.Path(path_type=Path), help="Where the published data set lies now.")
@json_option
def evaluate(run_folder: Path, data_root: Path | None, json_target: str | None) -> None:
    """Accuracy of a run's network on the eval split: for a student, of the deployed integers."""
    from faqd.train.evaluate import evaluate_run

    result = evaluate_run(run_folder, data_root)
    for name, value in result.items():
        click.echo(f"{name}: {value}", err=True)
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
@click.option("--teacher", required=True, metavar="RUN|FILE.py:callable")
@click.option("--weight-bits", type=int, default=8, show_default=True)
@click.option("--act-bits", type=int, default=8, show_default=True)
@click.option("--target", type=click.Choice(["tensorrt", "onnxruntime"]), default="tensorrt", show_default=True)
@click.option("--image-size", metavar="H[xW]", help="Input of a FILE.py network; a run knows its own.")
@click.option("--input-channels", type=click.IntRange(1), default=3, show_default=True)
@json_option
def inspect(json_target: str | None, **options: Any) -> None:
    """Show what each layer would get before training: weight and input grids, and the affinity taps."""
    from faqd.train.inspect import inspect_network

    table = inspect_network(**options)
    if json_target is None:
        click.echo(f"{'layer':34} {'operator':10} {'weights':12} {'inputs':14} shape")
        for row in table["layers"]:
            shape = "x".join(map(str, row["weight_shape"]))
            click.echo(f"{row['name']:34} {row['operator']:10} {row['weights']:12} {row['inputs']:14} {shape}")
        click.echo("affinity taps: " + ", ".join(table["taps"]))
    emit_json(json_target, table)


def _say(text: str) -> None:
    click.echo(text, err=True)


def _device(name: str) -> Any:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA GPU here; use --device cpu.")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def _data_and_schedule(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    data = data_values(options)
    schedule = {name: options.pop(name) for name in ("device", "out", "resume")}
    names = ("epochs", "steps", "batch_size", "lr", "seed", "data_seed")
    return data, {**schedule, "training": {name: options.pop(name) for name in names}}


def _data_options(values: dict[str, Any]) -> DataOptions:
    from faqd.train.data import DataOptions

    return DataOptions(**values)


def _bit_list(option: str, text: str | None) -> list[int | None]:
    if text is None:
        return [None]
    if not all(part.isdigit() for part in text.split(",")):
        raise UserError(f"{option} {text}: expected a number, or several with commas between.")
    return [int(part) for part in text.split(",")]


def _variants(
    base: DistillRecipe, weight_bits: list[int | None], act_bits: list[int | None], seeds: int | None, out: Path
) -> list[tuple[DistillRecipe, Path]]:
    """The cross product of bits and seeds, each with its folder; a single one is in `out` itself."""
    from faqd.train.distill import recipe_bits
    from faqd.train.recipes import overridden

    made = []
    for weights in weight_bits:
        for activations in act_bits:
            for seed in range(seeds) if seeds else [None]:
                options = {"weight_bits": weights, "act_bits": activations, "seed": seed, "data_seed": seed}
                recipe = overridden(base, options)
                recipe_bits(recipe)  # refuses bits out of range before anything is trained
                name = f"w{recipe.weight_bits}a{recipe.act_bits}-s{recipe.training.seed}"
                made.append((recipe, out / name))
    return made if len(made) > 1 else [(made[0][0], out)]


def _teacher_data(teacher: str) -> str:
    if not (Path(teacher) / "run.json").is_file():
        raise UserError("--data: say which images to learn from, for example --data folder:images.")
    from faqd.train.run import read_record

    return str(read_record(Path(teacher))["data"]["source"])


def _teacher(spec: str, weights: Path | None, data: DataOptions) -> Any:
    from faqd.train.source import teacher_from

    return teacher_from(spec, weights, data)


if __name__ == "__main__":
    main()
