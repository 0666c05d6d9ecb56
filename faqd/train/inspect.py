"""What every layer gets, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from faqd.command import parse_size
from faqd.errors import UserError
from faqd.train import graph
from faqd.train.network import NetworkSource, user_source
from faqd.train.placement import Bits
from faqd.train.prepare import prepare, student_table
from faqd.train.run import read_record
from faqd.train.taps import tap_names, tap_pairs


def inspect_network(
    teacher: str, weight_bits: int, act_bits: int, target: Any, image_size: str | None, input_channels: int
) -> dict[str, Any]:
    """The scheme of each layer and the taps, for the network of a run or FILE.py:callable."""
    source = _source(teacher, image_size, input_channels)
    bits = Bits(weight_bits, act_bits, target)
    traced = graph.capture(source.build(), source.example())
    student = prepare(traced, bits, source.example())
    return {
        "network": source.name,
        "layers": student_table(student),
        "taps": tap_names(traced, student, tap_pairs(traced, student, None)),
    }


def _source(teacher: str, image_size: str | None, channels: int) -> NetworkSource:
    if Path(teacher).is_dir():
        return NetworkSource.from_json(read_record(Path(teacher))["network"])
    size = parse_size(image_size)
    if size is None:
        raise UserError(f"--teacher {teacher}: give --image-size, the input size of that network.")
    return user_source(teacher, channels, size)
