"""Records read again: --from, --compare, the gates on them, and the keys that they promise."""

from __future__ import annotations

import copy
import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from faqd.benchmarks.measure.latency import Length
from faqd.benchmarks.measure.sweep import FLAT, sweep
from faqd.benchmarks.record.compare import compare, rank_test, worse
from faqd.errors import UserError
from tests.benchmarks.test_bench import call
from tests.benchmarks.test_latency import Clock, Turns
from tests.benchmarks.test_report import assert_figures_equal
from tests.fixtures.tiny_bundles import make_bundle

QUICK = ("--duration", "0.05", "--rounds", "5", "--warm-up", "0", "--batch", "1,4", "--backend", "onnxruntime")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of a run with everything that a CPU can do."""
    root = tmp_path_factory.mktemp("run")
    make_bundle(root / "bundle")
    with pytest.MonkeyPatch.context() as monkeypatch:
        more = ("--sweep", "--sustained", "0.03", "--dump-profile", "--json", root / "run.json")
        assert call(monkeypatch, root / "bundle", *QUICK, *more) == 0
    return root / "run.json"


@pytest.fixture
def record(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run.read_text())
    return found


def shape(value: Any, depth: int = 3) -> Any:
    """The keys of a record, with the first element standing for a list."""
    if isinstance(value, dict) and depth:
        return {key: shape(inner, depth - 1) for key, inner in value.items()}
    if isinstance(value, list) and value and depth:
        return [shape(value[0], depth - 1)]
    return None


def test_the_keys_are_these(record: dict[str, Any]) -> None:
    """Changing one is a new version of the record."""
    assert (record["format"], record["version"]) == ("faqd-bench", 2)
    assert " ".join(record) == (
        "format version faqd command switches backend environment clocks evaluation metric energy bundles networks "
        "gates notes"
    )
    assert " ".join(record["switches"]) == (
        "backend preset cuda_graph spin_wait transfers zero_copy inf_streams submissions duration_s warm_up_ms "
        "iterations rounds min_accuracy_ratio min_agreement max_p99_ms max_energy_mj batch percentiles average_runs "
        "skip_latency sweep profile sustained_minutes energy_duration_s power_rail bootstrap metric"
    )
    student = record["networks"][1]
    assert " ".join(student) == (
        "id role bundle name file kind weight_bits act_bits file_bytes size own_float loaded accuracy metric "
        "metric_difference engine_file latency speed_up layers energy sweep sustained"
    )
    assert " ".join(student["latency"][0]) == (
        "batch samples min_ms median_ms mean_ms max_ms coefficient_of_variation percentiles_ms percentile_bands_ms "
        "averages throughput_queries_per_s throughput_images_per_s wall_s round_medians_ms distribution_ms parts "
        "submission cuda_graph warnings one_ahead"
    )
    assert " ".join(student["sweep"]["points"][0]) == "batch samples median_ms throughput_images_per_s"
    assert " ".join(student["layers"]["layers"][0]) == "name kind mean_ms median_ms share"
    assert " ".join(student["loaded"]) == "load_ms file_bytes device_memory_bytes auxiliary_streams first_inference_ms"
    assert " ".join(record["energy"]) == "status reason rail source"
    assert record["energy"]["status"] == "no energy data" and record["energy"]["reason"]


def test_times_powers_and_sizes_have_their_unit_in_the_key(record: dict[str, Any]) -> None:
    unit = re.compile(r"(^|_)(ms|s|mj|w|mhz|c|bytes|nats|db|per_s|minutes)$")
    bare = {
        "value",
        "low",
        "high",
        "count",
        "n",
        "ratio",
        "share",
        "least",
        "by_output",
        "batch",
        "samples",
        "queries",
        "rounds",
        "percentiles",
    }

    def walk(value: Any, key: str) -> None:
        if isinstance(value, dict):
            for inner, part in value.items():
                walk(part, key if unit.search(key) or key == "by_output" else inner)
        elif isinstance(value, list):
            for part in value:
                walk(part, key)
        elif isinstance(value, float):
            assert unit.search(key) or key in bare or key in UNITLESS, f"{key} = {value} has no unit"

    walk(record, "")


UNITLESS = {
    "coefficient_of_variation",
    "paired_median",
    "ratio_of_minima",
    "ratio_to_teacher",
    "throughput_kept",
    "saturated_at_batch",
}


def test_a_cpus_record_says_what_is_absent(record: dict[str, Any]) -> None:
    switches = record["switches"]
    assert all(switches[key] is None for key in ("preset", "cuda_graph", "spin_wait", "transfers"))
    latency = record["networks"][1]["latency"][0]
    assert latency["parts"] is None and latency["one_ahead"] is None
    layers = record["networks"][1]["layers"]["layers"]
    assert [layer["kind"] for layer in layers if "MatMul" in layer["name"] or "Gemm" in layer["name"]] == ["float"]
    assert sum(layer["share"] for layer in layers) == pytest.approx(1.0)


def test_from_prints_reports_and_writes_the_same_record(
    run: Path,
    record: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(monkeypatch, "--from", run, "--json", tmp_path / "r.json", "--report", tmp_path / "r.html") == 0
    assert json.loads((tmp_path / "r.json").read_text()) == record
    out = capsys.readouterr().out
    assert "tiny 8/8" in out and "saturated" in out and max(map(len, out.splitlines())) <= 100
    html = (tmp_path / "r.html").read_text()
    assert_figures_equal(html, record)
    assert all(title in html for title in ("Throughput against batch", "Time per layer", "Under load for"))


@pytest.mark.parametrize(
    ("gate", "code", "said"),
    [
        (("--max-p99-ms", "1e6", "--min-agreement", "0.5"), 0, ""),
        (("--max-p99-ms", "1e-6"), 1, "tiny 8/8, student.onnxruntime.onnx: p99"),
        (("--max-energy-mj", "5"), 2, "has no energy per image: no power rail"),
        (("--max-energy-mj", "5", "--max-p99-ms", "1e-6"), 2, "is above the 1e-06 ms"),
        (("--max-p99-ms", "nan"), 2, "--max-p99-ms"),
    ],
)
def test_gates_on_a_stored_run(
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    gate: tuple[str, ...],
    code: int,
    said: str,
) -> None:
    assert call(monkeypatch, "--from", run, *gate) == code
    assert said in capsys.readouterr().err


def test_gates_whose_figure_cannot_exist_are_refused_before_measuring(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = run.parent / "bundle"
    for gate, said in (("--max-p99-ms", "--skip-latency leaves them out"), ("--max-energy-mj", "no energy data")):
        assert call(monkeypatch, bundle, "--skip-latency", gate, "1") == 2
        captured = capsys.readouterr()
        assert said in captured.err and "accuracy of" not in captured.out
    short = ("--duration", "1e-9", "--rounds", "1", "--warm-up", "0", "--batch", "1", "--max-p99-ms", "1000")
    assert call(monkeypatch, bundle, *short) == 2
    assert "10 queries cannot carry a p99, 100 can" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "not a record that"),
        ("{", "not valid JSON"),
        ('{"format": "faqd-bench", "version": 1}', "record version 1, this faqd reads version 2"),
        ('{"format": "faqd-bench", "version": 2}', "the record is damaged"),
    ],
)
def test_what_is_no_record_ends_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    (tmp_path / "r.json").write_text(text)
    assert call(monkeypatch, "--from", tmp_path / "r.json") == 2
    assert said in capsys.readouterr().err
    assert call(monkeypatch) == 2
    assert "give one of BUNDLE, --from, --compare; found none" in capsys.readouterr().err


def changed(record: dict[str, Any], factor: float) -> dict[str, Any]:
    """The same run with all times of the student multiplied."""
    other = copy.deepcopy(record)
    for latency in other["networks"][1]["latency"]:
        latency["median_ms"] *= factor
        latency["round_medians_ms"] = [value * factor for value in latency["round_medians_ms"]]
    return other


def verdicts(comparison: dict[str, Any], network: str = "tiny 8/8") -> dict[str, str]:
    return {
        f"{change['measure']} {change['batch']}": change["verdict"]
        for change in comparison["changes"]
        if change["network"] == network
    }


def test_compare_tells_a_change_from_noise(record: dict[str, Any]) -> None:
    for latency in record["networks"][1]["latency"]:
        latency["round_medians_ms"] = [latency["median_ms"] * f for f in (0.99, 0.995, 1.0, 1.005, 1.01)]
    same = verdicts(compare(record, record))
    assert set(same.values()) == {"within noise"}
    assert verdicts(compare(record, changed(record, 1.01)))["median_ms 1"] == "within noise", "below 2 %"
    assert verdicts(compare(record, changed(record, 1.2)))["median_ms 1"] == "worse"
    assert verdicts(compare(record, changed(record, 0.8)))["median_ms 4"] == "better"
    assert worse(compare(record, changed(record, 1.2)))[0].startswith(
        "tiny 8/8, student.onnxruntime.onnx: median_ms got worse, "
    )
    noisy = copy.deepcopy(changed(record, 1.2))
    noisy["networks"][1]["latency"][0]["round_medians_ms"] = record["networks"][1]["latency"][0]["round_medians_ms"]
    assert verdicts(compare(record, noisy))["median_ms 1"] == "within noise"
    short = copy.deepcopy(changed(record, 1.2))
    for latency in short["networks"][1]["latency"]:
        latency["round_medians_ms"] = latency["round_medians_ms"][:2]
    assert verdicts(compare(record, short))["median_ms 1"] == "cannot tell"
    worse_student = copy.deepcopy(record)
    worse_student["networks"][1]["accuracy"]["top1"] |= {"value": 0.5, "low": 0.4, "high": 0.6}
    assert verdicts(compare(record, worse_student))["top1 None"] == "worse"


def test_compare_tells_the_files_of_a_student_apart(record: dict[str, Any]) -> None:
    other = copy.deepcopy(record)
    for each in (record, other):
        student = each["networks"][1]
        student["engine_file"] = {"file": "student.tensorrt.onnx", "accuracy": copy.deepcopy(student["accuracy"])}
    other["networks"][1]["engine_file"]["accuracy"]["top1"] |= {"value": 0.5, "low": 0.4, "high": 0.6}
    (said,) = worse(compare(record, other))
    assert said.startswith("tiny 8/8, student.tensorrt.onnx: top1 got worse, from ")


def test_compare_pairs_networks_of_one_name_in_their_order(record: dict[str, Any]) -> None:
    """Two bundles of the same bits have students and unquantized students of the same name."""
    teacher, student, own = record["networks"]
    record["bundles"] += [dict(record["bundles"][0]), {**record["bundles"][0], "kind": "ptq"}]
    again = [[{**copy.deepcopy(network), "bundle": index} for network in (student, own)] for index in (1, 2)]
    for factor, latency in enumerate((student["latency"][0], *(pair[0]["latency"][0] for pair in again)), 1):
        latency["median_ms"] = float(factor)
    before = {**record, "networks": [teacher, student, own, *again[0], *again[1]]}
    changes = [c for c in compare(before, before)["changes"] if c["measure"] == "median_ms" and c["batch"] == 1]
    assert len(changes) == 7 and all(change["before"] == change["after"] for change in changes)
    without = {**record, "networks": [teacher, *again[1]]}
    found = [c["after"] for c in compare(before, without)["changes"] if c["network"] == student["name"]]
    assert 3.0 in found and not {1.0, 2.0} & set(found), "the PTQ one is compared with itself"


def test_compare_never_crosses_presets_devices_or_data(record: dict[str, Any]) -> None:
    other = copy.deepcopy(record)
    other["switches"]["preset"] = "trtexec10"
    found = compare(record, other)
    assert not any("median_ms" in key for key in verdicts(found))
    assert found["not_compared_because"] == ["preset None against trtexec10, so latencies are not compared"]
    other["evaluation"]["sha256"] = "0" * 64
    with pytest.raises(UserError, match="cannot be compared: evaluation data differ"):
        compare(record, other)
    other["networks"] = [{**network, "name": "another"} for network in other["networks"]]
    with pytest.raises(UserError, match="no network in common"):
        compare(record, other)


def test_the_command_compares_and_ends_with_1_where_something_got_worse(
    run: Path,
    record: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "slow.json").write_text(json.dumps(changed(record, 50.0)))
    assert call(monkeypatch, "--compare", run, run) == 0
    assert "within noise" in capsys.readouterr().out
    assert call(monkeypatch, "--compare", run, tmp_path / "slow.json", "--json", tmp_path / "c.json") == 1
    captured = capsys.readouterr()
    assert "worse" in captured.out and "median_ms got worse" in captured.err
    assert json.loads((tmp_path / "c.json").read_text())["format"] == "faqd-bench-comparison"
    assert call(monkeypatch, "--compare", tmp_path / "slow.json", run) == 0


def test_the_rank_test_is_exact() -> None:
    """Against every way to share out the ranks."""
    for n, m in ((3, 4), (5, 5)):
        ranks = range(n + m)
        statistics = [sum(x > y for x in a for y in set(ranks) - set(a)) for a in combinations(ranks, n)]
        for a in list(combinations(ranks, n))[::7]:
            b = sorted(set(ranks) - set(a))
            u = sum(x > y for x in a for y in b)
            least = min(u, n * m - u)
            wanted = min(1.0, 2 * sum(value <= least for value in statistics) / len(statistics))
            assert rank_test(a, b) == pytest.approx(wanted)
    assert rank_test([1.0] * 5, [1.0] * 5) == 1.0


class Scaling:
    """A network whose query takes a fixed time and a time per image, up to a largest batch."""

    def __init__(self, clock: Clock, most: int) -> None:
        self.clock, self.most = clock, most

    def submission(self, feeds: Any, slots: int = 1) -> Any:
        from contextlib import nullcontext

        batch = len(feeds["x"])
        if batch > self.most:
            raise UserError("input x takes [1] to [8]")
        return nullcontext(Turns(self.clock, "net", 1.0 + batch / 64, slots))


def test_a_sweep_ends_where_a_larger_batch_no_longer_pays() -> None:
    clock = Clock()
    networks: Any = {"large": Scaling(clock, 1 << 20), "small": Scaling(clock, 8)}

    def swept(names: str, image_bytes: int) -> dict[str, Any]:
        chosen = {name: networks[name] for name in names.split()}
        length = Length(20.0, 0.0, rounds=1)
        return sweep(chosen, lambda n: {"x": np.zeros(n)}, image_bytes, 1, length, clock, lambda _: None)

    found = swept("large small", 4)
    rates = [point["throughput_images_per_s"] for point in found["large"]["points"]]
    assert rates == sorted(rates) and max(rates[-FLAT:]) < 1.05 * max(rates[:-FLAT])
    assert found["large"]["ended"] == "saturated"
    saturated = found["large"]["saturated_at_batch"]
    assert saturated / (1 + saturated / 64) >= 0.95 * max(rates) > (saturated / 2) / (1 + saturated / 128)
    assert [point["batch"] for point in found["small"]["points"]] == [1, 2, 4, 8]
    assert found["small"]["saturated_at_batch"] is None and "at batch 16: input x takes" in found["small"]["ended"]
    assert "would take more than 512 MiB" in swept("large", 1 << 28)["large"]["ended"]
