"""What every layer gets, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from faqd.data_flags import parse_size
from faqd.errors import UserError
from faqd.quantize.capture.capture import capture
from faqd.quantize.config import Attention, QuantConfig
from faqd.quantize.int8_share import floats_of
from faqd.quantize.prepare import insert_quantizers
from faqd.quantize.student import student_table
from faqd.train.data.datasets import Say
from faqd.train.losses.taps import tap_names, tap_pairs
from faqd.train.networks.load_weights import load_weights
from faqd.train.networks.source import NetworkSource, stated_input, user_source
from faqd.train.run.folder import read_record
from faqd.train.run.lesson import Teacher, refuse_weights_of_a_run
from faqd.train.run.student import student_source


def inspect_network(
    teacher: str,
    teacher_weights: Path | None,
    arch: str | None,
    weight_bits: int,
    act_bits: int,
    target: Any,
    scales: str,
    exclude: tuple[str, ...],
    strict: bool | None,
    attention: Attention | None,
    image_size: str | None,
    input_channels: int,
    say: Say,
) -> dict[str, Any]:
    """The scheme of each layer and the taps: of the network of a run or FILE.py:callable, or of its student `arch`.

    teacher_weights: read so that a file of another network is refused here already; no scheme depends on weights.
    """
    if teacher_weights is not None:
        refuse_weights_of_a_run(teacher)
    source = _source(teacher, image_size, input_channels)
    network, example = source.build(), source.example()
    if teacher_weights is not None:
        load_weights(network, teacher_weights, say)
    bits = QuantConfig(
        weight_bits,
        act_bits,
        target,
        scales == "channel",
        exclude=exclude,
        strict=bool(strict),
        attention=attention or "float",
    )
    traced = capture(network, example)
    source = student_source(arch, Teacher(network, source, ""))
    student = insert_quantizers(traced if arch is None else capture(source.build(), example), bits, example)
    return {
        "network": source.name,
        "weight_scales": scales,
        "layers": student_table(student),
        **floats_of(student),
        "taps": tap_names(traced, student, tap_pairs(traced, student, None)),
    }


def _source(teacher: str, image_size: str | None, channels: int) -> NetworkSource:
    if Path(teacher).is_dir():
        return NetworkSource.from_json(read_record(Path(teacher))["network"], Path(teacher))
    size = parse_size(image_size)
    if size is None and (known := stated_input(teacher)) is not None:
        channels, size = known
    if size is None:
        raise UserError(f"--teacher {teacher}: give --image-size, the input size of that network.")
    return user_source(teacher, channels, size)
