"""The record of a bench run as one self-contained HTML page: no script, no font, no network."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from importlib import resources

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from faqd.benchmarks.report import accuracy_latency_chart as charts
from faqd.benchmarks.report import figures
from faqd.benchmarks.report import layer_time_chart as bars
from faqd.benchmarks.report import throughput_charts as curves
from faqd.benchmarks.report.figures import (
    Record,
    compared,
    complaint,
    fidelity_of,
    first_batch,
    latency_at,
    speed_up_at,
)
from faqd.benchmarks.report.pictures import Picture
from faqd.benchmarks.report.svg import colour_class, inline_mark
from faqd.bundle import float_operators
from faqd.fidelity import KEPT, RUINED, rounded
from faqd.proof import EQUAL_CODES

WIDE, NARROW = 900, 340
"""Widths of the pictures in CSS pixels: for a desk and for a phone."""


def page_from_result(result: Record, pictures: Sequence[Picture] = ()) -> str:
    """The page for a record of faqd.benchmarks.bench; its figures carry the place they have in the JSON."""
    pages = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = resources.files("faqd.benchmarks.report").joinpath("report.html").read_text(encoding="utf-8")
    helpers = ("percent", "points", "significant", "kib", "times", "bits", "kind", "label", "proof_in_words")
    pages.filters |= {name: getattr(figures, name) for name in helpers}
    pages.filters["colour"] = colour_class
    pages.filters["rounded"] = rounded
    batch = first_batch(result)
    return pages.from_string(source).render(
        r=result,
        pictures=pictures,
        batch=batch,
        rows=[(result["networks"].index(network), network) for network in compared(result)],
        networks=list(enumerate(result["networks"])),
        lead=_lead(result),
        lead_files=figures.judged_files(result, _lead(result)),
        files=_files(result),
        proofs=_PROOFS,
        unit=figures.time_unit(result),
        sign=lambda network: inline_mark(colour_class(network)),
        differing_share=100 * (1 - EQUAL_CODES),
        kept_from=KEPT,
        ruined_below=RUINED,
        command=shlex.join(result["command"]),
        verify=lambda bundle: f"faqd-deploy verify {shlex.quote(bundle['folder'])}",
        device=figures.device(result),
        latency_at=latency_at,
        speed_up_at=speed_up_at,
        complaint=complaint,
        fidelity_of=fidelity_of,
        index_of=lambda items, item: items.index(item),
        scatter=_both(lambda width: charts.accuracy_against_latency(result, width)),
        distributions=[(size, _both(_distribution(result, size))) for size in result["switches"]["batch"]],
        all_int8=figures.all_int8(result),
        partly_float=figures.partly_float(result),
        line_of=figures.line_of,
        of_source=figures.of_source(result),
        judged_by_metric=figures.judged_by_metric(result),
        difference_of=figures.difference_of,
        bootstrap=figures.bootstrap_in_words(result),
        float_operators=float_operators,
        below=charts.BELOW,
        throughput=_both(lambda width: curves.throughput_against_batch(result, width)),
        under_load=_both(lambda width: curves.sustained_throughput(result, width)),
        layers=[
            (network, _both(_layers(network, index)), bars.kinds_in(network))
            for index, network in enumerate(result["networks"])
            if network["layers"]
        ],
        layer_kinds=bars.KINDS,
        most_layers=bars.MOST,
        raw=_json_for_script(result),
    )


def _lead(result: Record) -> Record:
    """The student that the head of the page speaks of: the first distilled one, else the first."""
    students = [network for network in compared(result) if network["role"] == "student"]
    return next((network for network in students if network["kind"] == "distilled"), students[0])


def _files(result: Record) -> list[tuple[Record, figures.Judged]]:
    """Every file of every student."""
    students = [network for network in result["networks"] if network["role"] == "student"]
    return [(network, file) for network in students for file in figures.judged_files(result, network)]


_PROOFS = {
    "passed": "",
    "missing": "Not verified yet.",
    "stale": "verify.json does not speak of this file.",
    "elsewhere": "Verified on another kind of CPU, where its sums may come out otherwise.",
    "failed": "Do not deploy it; this says what differs.",
}
"""What to say beside a command that verifies, by the status of a proof."""


def _distribution(result: Record, batch: int) -> Callable[[int], Markup | None]:
    return lambda width: charts.latency_distribution(result, batch, width)


def _layers(network: Record, index: int) -> Callable[[int], Markup | None]:
    return lambda width: bars.time_per_layer(network, f"networks/{index}", width)


def _both(draw: Callable[[int], Markup | None]) -> tuple[Markup, Markup] | None:
    wide, narrow = draw(WIDE), draw(NARROW)
    return None if wide is None or narrow is None else (wide, narrow)


def _json_for_script(result: Record) -> Markup:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(result, allow_nan=False, ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # Nothing in it can be read as markup any more.
