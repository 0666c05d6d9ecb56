"""How figures are written, once for the terminal and the report, so that both show the same digits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from faqd.bundle import EVAL
from faqd.fidelity import rounded

NONE = "–"
MICROSECONDS_BELOW = 0.1
"""In ms."""
KIND = {"float": "float", "distilled": "distilled", "ptq": "PTQ"}
Record = Mapping[str, Any]


def percent(share: float, n: int) -> str:
    """A share in percent, with no more decimals than n images can tell apart."""
    return f"{100 * share:.{decimals(n)}f}"


def points(difference: float, n: int) -> str:
    """A difference of shares in percentage points, signed."""
    text = f"{100 * difference:+.{decimals(n)}f}"
    return text.replace("-", "−") if float(text) else text.lstrip("+-")


def decimals(n: int) -> int:
    return 2 if n >= 1000 else 1


@dataclass(frozen=True)
class Unit:
    """What times are written in, the same all over a page or a table. per_ms: how many of it a millisecond has."""

    name: str
    per_ms: float

    def write(self, ms: float | None) -> str:
        return NONE if ms is None else significant(ms * self.per_ms)


def unit_for(ms: float) -> Unit:
    """Such that a time of so many ms has no zeros in front."""
    return Unit("µs", 1e3) if ms < MICROSECONDS_BELOW else Unit("ms", 1.0)


def time_unit(result: Record) -> Unit:
    """That of a record: its fastest median at the first batch size decides."""
    latencies = [latency_at(network, first_batch(result)) for network in result["networks"]]
    return unit_for(min((latency["median_ms"] for latency in latencies if latency), default=1.0))


def number(value: float | None) -> str:
    return NONE if value is None else significant(value)


def significant(value: float) -> str:
    """Three significant digits, never in exponent form; whole numbers grouped from 1,000 on."""
    if value >= 99.95 or value == 0:
        return f"{value:,.0f}"
    if value >= 9.995:
        return f"{value:.1f}"
    if value >= 0.9995:
        return f"{value:.2f}"
    return f"{value:.3f}" if value >= 0.09995 else f"{value:.4f}"


def kib(size: float) -> str:
    return significant(size / 1024)


def times(ratio: Record | None) -> str:
    """A speed-up by its paired median; `~` marks a noisy one."""
    if ratio is None:
        return NONE
    return f"{'~' if ratio['noisy'] else ''}{ratio['paired_median']:.2f}×"


def bits(network: Record) -> str:
    return f"{network['weight_bits']}/{network['act_bits']}"


def latency_at(network: Record, batch: int) -> Record | None:
    return next((record for record in network["latency"] if record["batch"] == batch), None)


def speed_up_at(network: Record, batch: int, over: str) -> Record | None:
    return next((r for r in network["speed_up"] if r["batch"] == batch and r["over"] == over), None)


def first_batch(result: Record) -> int:
    """The batch that tables and charts speak of: the first that was asked for."""
    return int(result["switches"]["batch"][0])


def compared(result: Record) -> list[Record]:
    """The teacher, the students, and the unquantized students that were judged: the rows of the main table."""
    return [network for network in result["networks"] if network["role"] != "float" or network["accuracy"]]


def label(network: Record) -> str:
    """A network's name where its kind does not stand below it: PTQ and distilled students are often called the same."""
    return f"{network['name']}, PTQ" if network["kind"] == "ptq" else str(network["name"])


def kind(network: Record) -> str:
    """What stands below a network's name."""
    if network["role"].startswith("teacher"):
        return "float teacher" if network["role"] == "teacher" else "teacher in FP16"
    if network["role"] == "float" and network["weight_bits"] == 16:
        return "float in FP16"
    return KIND.get(network["kind"], str(network["kind"]))


_VERDICTS = {
    "failed": "verify FAILED",
    "stale": "proof of another file",
    "missing": "not verified",
    "elsewhere": "not proved on this CPU",
}


def complaint(result: Record, network: Record) -> str | None:
    """What a table says of a student whose file is not proved to be what was trained; None where it is."""
    if network["role"] != "student":
        return None
    return _VERDICTS.get(str(result["bundles"][network["bundle"]]["verify"]))


def fidelity_of(network: Record) -> Record | None:
    """How much of its teacher a student has kept; None for other networks, and in older records."""
    accuracy = network["accuracy"] or {}
    return accuracy.get("fidelity") if network["role"] == "student" else None


@dataclass(frozen=True)
class Judged:
    """A file of a student with what is known of it. name, run: of the file, and how it was run; empty in older records.
    proof: its status. codes: what the proof has counted, where that is known. path: of `accuracy` in the record, and of
    the proof."""

    name: str
    run: str
    proof: str
    codes: Record | None
    accuracy: Record
    path: str
    proof_path: str

    @property
    def kept(self) -> Record | None:
        """Its fidelity; None in older records."""
        found: Record | None = self.accuracy.get("fidelity")
        return found


def judged_files(result: Record, network: Record) -> list[Judged]:
    """The files of a student that were judged, the one that was timed first."""
    bundle = result["bundles"][network["bundle"]]
    place = f"networks/{next(i for i, other in enumerate(result['networks']) if other is network)}"
    timed = "as an engine" if result["backend"]["name"] == "engine" else "run here"
    sources = [(network, timed, f"{place}/accuracy")]
    if network.get("engine_file"):
        sources.append((network["engine_file"], "for engines, as written", f"{place}/engine_file/accuracy"))
    found = []
    for source, run, path in sources:
        name = source.get("file", "")
        facts = bundle.get("proofs", {}).get(name, {"status": bundle["verify"]})
        codes = facts if facts.get("codes") else None
        proof_path = f"bundles/{network['bundle']}/proofs/{name}"
        found.append(Judged(name, run, facts["status"], codes, source["accuracy"], path, proof_path))
    return found


def judged_by_metric(result: Record) -> list[tuple[Record, str, Record]]:
    """Whom the user's metric has judged: the network, the file where it is not the one that was run, and the part of
    the record that has its figures."""
    found = []
    for network in result["networks"]:
        beside = network.get("engine_file") or {}
        sources = (("", network), (beside.get("file", ""), beside))
        found += [(network, file, source) for file, source in sources if source.get("metric")]
    return found


def difference_of(source: Record, name: str) -> str:
    """The gap of a figure of the user's metric to the teacher's, with its interval; empty where that is not known."""
    difference = (source.get("metric_difference") or {}).get(name)
    if difference is None:
        return ""
    value, low, high = (
        f"{difference[key]:+.3g}".replace("-", "−") if difference[key] else "0" for key in ("value", "low", "high")
    )
    return f"gap {value} ({low} … {high})"


def bootstrap_in_words(result: Record) -> str:
    """What these differences are; empty where there are none."""
    resamples = result["switches"].get("bootstrap")
    if not (result["metric"] and resamples):
        return ""
    return (
        f"A gap is the difference to the teacher, with its 95 % interval by a paired bootstrap: {resamples:,} "
        f"resamples of {result['metric']['images']:,} images. Where the interval holds 0, no difference was found."
    )


def in_words(judged: Judged) -> str:
    """Proof and fidelity of a file, which say different things."""
    snr = judged.accuracy["snr_db"]
    ratios = ", ".join(
        f"{output if len(snr) > 1 else ''} {'equal' if ratio is None else f'{ratio:.1f} dB'}".strip()
        for output, ratio in snr.items()
    )
    right = judged.accuracy["top1"]
    top1 = f"; top-1 {percent(right['value'], right['n'])} %" if right else ""
    file = f"{judged.name}, {judged.run}: " if judged.name else ""
    kept = f"; {judged.kept['verdict']}: fidelity {rounded(judged.kept['least'])}" if judged.kept else ""
    return f"{file}{proof_in_words(judged.proof)}{kept} ({ratios}){top1}"


def proof_in_words(status: str) -> str:
    return _VERDICTS.get(status, "proof passed")


def partly_float(result: Record) -> list[tuple[Record, Record]]:
    """The students that compute something in float, each with its bundle's record, which says what."""
    return [(network, bundle) for network, bundle in _known(result) if not _all_int8(bundle)]


def all_int8(result: Record) -> str:
    """The students that compute nothing in float, in words; empty where there is none, or where the record is older."""
    names = ", ".join(label(network) for network, bundle in _known(result) if _all_int8(bundle))
    return f"All multiply-accumulates in INT8: {names}." if names else ""


def _known(result: Record) -> list[tuple[Record, Record]]:
    students = [network for network in result["networks"] if network["role"] == "student"]
    paired = [(network, result["bundles"][network["bundle"]]) for network in students]
    return [(network, bundle) for network, bundle in paired if "int8_share" in bundle]


def _all_int8(bundle: Record) -> bool:
    return not bundle["islands"] and bundle["int8_share"] >= 1


def line_of(island: Record) -> str:
    """The user's line, such as `net.py:12`; empty where it is not known."""
    return str(island["line"]).strip(" ()")


def of_source(result: Record) -> str:
    """Whose images were judged on, where they are not the bundle's own."""
    source = result["evaluation"].get("source", EVAL)
    return "" if source == EVAL else f" of {source}"


def device(result: Record) -> str:
    """Where latencies were measured, in words."""
    backend = result["backend"]
    if backend["device"] != "CPU":
        return str(backend["device"])
    threads = backend["threads"]
    return f"{processor(result)}, {threads} thread{'s' if threads > 1 else ''}"


def processor(result: Record) -> str:
    """The CPU's name and what it can do; records of before say no more than the name."""
    environment = result["environment"]
    sets = environment.get("instruction_sets")
    return f"{environment['cpu']} ({' '.join(sets)})" if sets else str(environment["cpu"])
