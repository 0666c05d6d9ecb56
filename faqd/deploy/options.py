"""The options of faqd-deploy that several commands take, or that are many."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from faqd.command import (
    Finite,
    attention_option,
    exclude_option,
    flags,
    json_option,
    section,
    strict_option,
    target_option,
    writable,
)
from faqd.data_flags import data_flags

if TYPE_CHECKING:
    from faqd.deploy.write_bundle import Calibration
    from faqd.quantize.config import QuantConfig

FOLDER = click.Path(path_type=Path)

float_flags = flags(
    section(
        "Teacher",
        click.option(
            "--teacher",
            required=True,
            metavar="RUN|FILE.py:callable|module:callable|FILE.pt2|FILE.onnx",
            help="Quantize this float network.",
        ),
        click.option("--teacher-weights", type=FOLDER, help="Read its weights from a .safetensors, .pt or .pth file."),
    ),
    data_flags,
    section(
        "Student",
        click.option("--weight-bits", type=int, default=8, help="Give weights 1 to 8 bits."),
        click.option("--act-bits", type=int, default=8, help="Give activations 1 to 8 bits."),
        target_option,
        click.option(
            "--calibration",
            type=click.Choice(["auto", "mse", "percentile", "max", "entropy"]),
            default="auto",
            help="Choose activation scales in this way; auto: mse, and percentile where that loses something.",
        ),
        click.option(
            "--calibration-images",
            type=click.IntRange(1),
            default=512,
            help="Choose them on so many training images.",
        ),
        click.option(
            "--equalize",
            type=click.Choice(["auto", "always", "never"]),
            default="auto",
            help="Make channels that share a scale alike, exactly in float; auto: where something is lost without.",
        ),
        click.option(
            "--asymmetric",
            type=click.Choice(["auto", "always", "never"]),
            default="auto",
            help="Let 8-bit activations have all 256 values from where theirs begin; auto: where something is lost "
            "without.",
        ),
        attention_option,
        exclude_option,
        strict_option,
    ),
)
"""A float network, and how it is quantized without training."""


def quantization(options: dict[str, Any]) -> tuple[QuantConfig, Calibration]:
    """Take what `float_flags` say of the student out of a command's keyword arguments."""
    from faqd.deploy.write_bundle import Calibration
    from faqd.quantize.config import Attention, QuantConfig

    names = ("weight_bits", "act_bits", "target", "exclude", "strict")
    weights, activations, target, exclude, strict = map(options.pop, names)
    attention: Attention = options.pop("attention") or "float"
    bits = QuantConfig(weights, activations, target, exclude=exclude, strict=bool(strict), attention=attention)
    how = ("calibration", "calibration_images", "equalize", "asymmetric")
    return bits, Calibration(*map(options.pop, how))


keep_float_option = section(
    "Student",
    click.option(
        "--keep-float",
        type=click.IntRange(0),
        default=0,
        metavar="N",
        help="Keep at most N layers and operators float, chosen by what they cost the outputs: as few as reach "
        "--min-fidelity, or 0.97.",
    ),
)
min_fidelity_option = click.option(
    "--min-fidelity",
    type=Finite(0, 1),
    metavar="NUMBER",
    help="End with exit code 1 where less of the teacher's outputs is left: 0.97 is kept, below 0.5 is ruined.",
)
bundle_flags = section(
    "Output",
    click.option("--out", type=FOLDER, required=True, help="Write the bundle to this folder."),
    click.option("--eval-samples", type=click.IntRange(1), help="Store only so many evaluation images."),
    click.option(
        "--float-type",
        type=click.Choice(["fp16", "fp32"]),
        default="fp16",
        help="Compute precision of what is not quantized in the TensorRT file.",
    ),
    click.option(
        "--input",
        "input_form",
        type=click.Choice(["float32-nchw", "uint8-nhwc"]),
        default="float32-nchw",
        help="Take normalised float32 images, or uint8 pixels that the networks normalise themselves.",
    ),
    click.option(
        "--for",
        "servers",
        type=click.Choice(["triton", "deepstream"]),
        multiple=True,
        help="Add the configuration of this server, marked untried; may be given twice.",
    ),
    click.option(
        "--license",
        "licence",
        metavar="NAME",
        help="Write into the ONNX files how the network may be used: an SPDX name, or a URL.",
    ),
    min_fidelity_option,
    json_option,
)
"""What a bundle is to hold, and where it goes."""

predict_flags = flags(
    section(
        "Pictures",
        click.option(
            "--images",
            type=FOLDER,
            required=True,
            multiple=True,
            metavar="FILE|FOLDER",
            help="Read this picture, or those in and below this folder; may be given several times.",
        ),
    ),
    section(
        "Output",
        click.option(
            "--top", type=click.IntRange(1), default=1, help="Name so many classes for each picture, the best first."
        ),
        click.option(
            "--out",
            type=click.Path(path_type=Path, dir_okay=False),
            callback=writable,
            metavar="FILE.npz",
            help="Write all outputs to this file: arrays `files` and `student.OUTPUT`.",
        ),
        json_option,
    ),
    section(
        "Runtime",
        click.option(
            "--backend",
            type=click.Choice(["auto", "onnxruntime", "engine"]),
            default="auto",
            help="Run this; auto takes the engine where there are a GPU and an engine.",
        ),
    ),
)
"""Which pictures a bundle is run on, by what, and where its outputs go."""

built_flags = section(
    "What is built",
    click.option(
        "--all", "build_all", is_flag=True, help="Also build the unquantized student and the teacher, both in FP16."
    ),
    click.option("--force", is_flag=True, help="Build although verify failed or is out of date."),
)
engine_output_flags = section(
    "Output",
    click.option(
        "--out",
        type=click.Path(path_type=Path, file_okay=False),
        show_default="the bundle, where the bench looks for them",
        help="Write engines and their records to this folder.",
    ),
    json_option,
)
shape_flags = section(
    "Shapes",
    click.option("--min-shapes", metavar="SHAPES", help="Accept these and above, as in images:1x3x32x32,other:1x8."),
    click.option("--opt-shapes", metavar="SHAPES", help="Tune for these."),
    click.option("--max-shapes", metavar="SHAPES", show_default="a free batch is 1 to 64", help="Accept no larger."),
)
builder_flags = section(
    "Builder",
    click.option(
        "--workspace",
        "workspace_mib",
        type=click.IntRange(1, 1 << 24),
        metavar="MIB",
        help="Allow so much scratch memory.",
    ),
    click.option(
        "--opt-level", type=click.IntRange(0, 5), show_default="TensorRT's, 3", help="Set the builder's effort."
    ),
    click.option(
        "--timing-cache", type=FOLDER, metavar="FILE", help="Read kernel timings from FILE, and keep new ones."
    ),
    click.option("--frozen-timing-cache", is_flag=True, help="Only read them, and fail on one that is missing."),
)
engine_flags = section(
    "Engine",
    click.option("--version-compatible", is_flag=True, help="Build an engine that newer TensorRT runs too."),
    click.option(
        "--hardware-compatibility",
        type=click.Choice(["none", "ampere+", "same-compute-capability"]),
        default="none",
        help="Build an engine that more GPUs run than this one.",
    ),
    click.option(
        "--profiling-verbosity",
        type=click.Choice(["layer_names_only", "detailed", "none"]),
        default="detailed",
        help="Keep so much about its layers in the engine; only detailed tells their types.",
    ),
)
"""With those above, what TensorRT's builder is told; fields of `engine.options.BuildOptions`."""
