"""The options of faqd-train that several commands take, or that are many, and what their values mean."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from faqd.command import Finite, attention_option, exclude_option, json_option, section, strict_option
from faqd.errors import UserError

SEED = click.IntRange(0, 2**32 - 1)
"""torch's generator on the CPU knows no more of them."""


def teacher_option(help_text: str) -> Callable[[Any], Any]:
    return click.option(
        "--teacher",
        required=True,
        metavar="RUN|FILE.py:callable|module:callable|FILE.pt2|FILE.onnx",
        help=help_text,
    )


teacher_weights_option = click.option(
    "--teacher-weights", type=click.Path(path_type=Path), help="Read its weights from a .safetensors, .pt or .pth file."
)


def _absolute(context: click.Context, option: click.Parameter, spec: str | None) -> str | None:
    """FILE.py:callable with a path that holds from any folder, since a run remembers it."""
    file, _, name = (spec or "").rpartition(":")
    return f"{Path(file).expanduser().resolve()}:{name}" if file.endswith(".py") else spec


def arch_option(help_text: str, default: str | None = None) -> Callable[[Any], Any]:
    return click.option(
        "--arch",
        metavar="NAME|FILE.py:callable|module:callable|FILE.pt2|FILE.onnx",
        callback=_absolute,
        show_default=default,
        help=help_text,
    )


device_options = (
    click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "cuda"]),
        default="auto",
        help="Train here; auto takes a GPU if there is one.",
    ),
    click.option(
        "--workers",
        type=click.IntRange(0),
        help="Decode what is too much for memory in so many processes, 0 for none beside the one that trains; half "
        "of the cores and 8 at most unless told.",
    ),
)
time_limit_option = click.option(
    "--time-limit",
    type=Finite(0, min_open=True),
    help="Stop after so many seconds, with a checkpoint; --resume goes on.",
)


def length_options(epochs: str, batch_size: str) -> tuple[Callable[[Any], Any], ...]:
    return (
        click.option(
            "--epochs", type=click.IntRange(1), show_default=epochs, help="Pass so many times over the training images."
        ),
        click.option("--steps", type=click.IntRange(1), help="Train so many iterations, whatever --epochs says."),
        click.option(
            "--batch-size", type=click.IntRange(2), show_default=batch_size, help="Take so many images per iteration."
        ),
    )


def schedule_flags(epochs: str, batch_size: str, lr: str) -> Callable[[Any], Any]:
    """How long a network is trained, and how fast; with the defaults of the command's default recipe."""
    return section(
        "Training",
        *length_options(epochs, batch_size),
        click.option(
            "--accumulate",
            type=click.IntRange(1),
            show_default="1",
            help="Compute the gradient of a batch in so many parts, one after another, where memory is short.",
        ),
        click.option(
            "--lr", type=Finite(0, min_open=True), show_default=lr, help="Use this learning rate at its peak."
        ),
        click.option("--seed", type=SEED, show_default="0", help="Draw the initial weights with this seed."),
        click.option(
            "--views",
            type=click.IntRange(1),
            show_default="new ones every time",
            help="Show each image in so many fixed crops, the first of which is the image as it is.",
        ),
        click.option("--data-seed", type=SEED, show_default="0", help="Draw order and augmentation with this seed."),
        *device_options,
        click.option(
            "--decode",
            type=click.Choice(["full", "reduced"]),
            show_default="full",
            help="Decode JPEG files that an iteration needs at a part of their size, where twice of what they are "
            "scaled to is left; faster, to slightly other pixels, in batches alone.",
        ),
        time_limit_option,
    )


output_flags = section(
    "Output",
    click.option("--out", type=click.Path(path_type=Path), required=True, help="Write the run to this folder."),
    click.option("--resume", is_flag=True, help="Go on with the run in --out; start it if there is none."),
    json_option,
)

teacher_flags = section(
    "Recipe and teacher",
    click.option("--recipe", default="default", help="Set everything; `recipes` lists them."),
    teacher_option("Learn from this float network."),
    teacher_weights_option,
    click.option(
        "--teacher-dtype", type=click.Choice(["fp32", "bf16"]), show_default="fp32", help="Run the teacher in this."
    ),
    click.option(
        "--cache-teacher",
        metavar="DIR",
        type=click.Path(path_type=Path, file_okay=False),
        help="Keep what the teacher says of each training image in files here, and read it from there; with --views.",
    ),
)
student_flags = section(
    "Student",
    arch_option("Train this network, of the zoo or your own, instead of the teacher's.", "the teacher's"),
    click.option(
        "--init",
        metavar="teacher|scratch|RUN",
        show_default="teacher where it is this network, else scratch",
        help="Start the student from these weights.",
    ),
    click.option(
        "--weight-bits",
        metavar="BITS[,BITS]",
        show_default="8",
        help="Use 1 to 8 bits; a list trains all side by side.",
    ),
    click.option(
        "--act-bits",
        metavar="BITS[,BITS]",
        show_default="8",
        help="Use 1 to 8 bits, or 32 for float; a list as above. Weights are float with 32 for both.",
    ),
    click.option(
        "--target",
        type=click.Choice(["tensorrt", "onnxruntime"]),
        show_default="tensorrt",
        help="Train 8-bit activations for the range of this runtime: 0..127, or 0..255.",
    ),
    click.option(
        "--scales",
        type=click.Choice(["channel", "tensor"]),
        show_default="channel",
        help="Give each of these a weight scale.",
    ),
    click.option(
        "--rounding",
        type=click.Choice(["nearest", "ceil"]),
        show_default="nearest",
        help="Round activations behind a ReLU like this.",
    ),
    click.option(
        "--scale-gradient",
        type=click.Choice(["lsq", "mean", "pact", "min"]),
        show_default="lsq",
        help="Learn their scales by this slope: lsq's, or a coarse one of the paper.",
    ),
    click.option(
        "--calibration",
        type=click.Choice(["auto", "mse", "percentile", "max", "entropy"]),
        show_default="auto",
        help="Choose the first activation scales in this way; auto: mse, or percentile where that is better.",
    ),
    click.option(
        "--equalize",
        type=click.Choice(["auto", "always", "never"]),
        show_default="auto",
        help="At 4/4 and more, make channels that share a scale alike before training; auto: where that is better at "
        "8/8, or nothing is left without.",
    ),
    click.option(
        "--asymmetric",
        type=click.Choice(["auto", "always", "never"]),
        show_default="auto",
        help="Let 8-bit activations have all 256 values from where theirs begin; auto: as --equalize, and after it.",
    ),
    attention_option,
    exclude_option,
    strict_option,
)
loss_flags = section(
    "Losses",
    click.option(
        "--logit",
        type=click.Choice(["relative", "mse", "kl"]),
        show_default="relative; mse with sgd",
        help="Measure the distance of the outputs in this way.",
    ),
    click.option("--logit-weight", type=Finite(0), show_default="1.0", help="Weigh that distance with this."),
    click.option(
        "--temperature",
        type=Finite(0.01, 1000),  # beyond, float32 has nothing left of what a softmax makes of the outputs
        show_default="4.0",
        help="Soften the outputs of --logit kl by this.",
    ),
    click.option(
        "--affinity",
        type=click.Choice(["l1", "l2", "l2_batch", "l2_squared", "fast", "none"]),
        show_default="l2",
        help="Measure the distance of the feature affinities in this way.",
    ),
    click.option(
        "--affinity-weight",
        type=Finite(0),
        show_default="1.0",
        help="Weigh that distance, a mean over the batch, with this.",
    ),
    click.option(
        "--affinity-floor",
        type=Finite(0),
        show_default="0.001",
        help="Add this share of a map's typical length to the length of every pixel.",
    ),
    click.option(
        "--columns",
        type=click.IntRange(1),
        show_default="15",
        help="Use so many random projections for --affinity fast.",
    ),
    click.option(
        "--adaptors/--no-adaptors",
        default=None,
        show_default="no-adaptors",
        help="Compare the student's maps behind a 1x1 convolution of their own.",
    ),
    click.option(
        "--feature-layer",
        "taps",
        multiple=True,
        metavar="LAYER[=LAYER]",
        show_default="chosen from the graph",
        help="Compare the feature maps of this layer, named by its module path (teacher=student).",
    ),
    click.option(
        "--label-weight",
        type=Finite(0),
        show_default="0.0",
        help="Weigh the cross-entropy to the labels with this; without it no label is read.",
    ),
)
step_flags = section(
    "Training",
    click.option(
        "--optimizer",
        type=click.Choice(["relative", "sgd"]),
        show_default="relative from trained weights, else sgd",
        help="Step by shares of what is learned (then --lr is that share), or as SGD does.",
    ),
    click.option(
        "--autocast",
        type=click.Choice(["none", "bf16", "fp16"]),
        show_default="none",
        help="Train with convolutions and matrix products in this; quantizers and losses stay in float32.",
    ),
    click.option(
        "--seeds",
        type=click.IntRange(1),
        default=1,
        help="Train so many seeds, each into its own folder: of the initial weights, or of order and augmentation "
        "where the student starts from trained ones.",
    ),
    click.option(
        "--select",
        metavar="FILE.py:function|module:function",
        callback=_absolute,
        help="Keep the weights for which this measure of yours is largest, instead of the least distance.",
    ),
)


def place_values(options: dict[str, Any]) -> tuple[Path, str, int | None, bool, float]:
    """Take out of the options of a command what says where and how long to train and not what.

    The folder, the device, processes that decode, whether to resume, and the time.monotonic() at which to pause.
    """
    limit = options.pop("time_limit")
    deadline = math.inf if limit is None else time.monotonic() + limit
    return options.pop("out"), options.pop("device"), options.pop("workers"), options.pop("resume"), deadline


def bit_list(option: str, text: str | None) -> list[int | None]:
    if text is None:
        return [None]
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise UserError(f"{option} {text}: expected a number, or several with commas between.")
    return list(dict.fromkeys(int(part) for part in text.split(",")))
