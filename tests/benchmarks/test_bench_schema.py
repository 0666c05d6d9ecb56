"""A stored record that was damaged or edited ends in a sentence, whatever is read from it: never in a traceback."""

from __future__ import annotations

import copy
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from faqd.benchmarks.measure import energy, hwmon
from faqd.benchmarks.record.compare import compare
from faqd.benchmarks.record.gates import Gates, judged
from faqd.benchmarks.record.read import read_record
from faqd.benchmarks.record.schema import complaint
from faqd.benchmarks.report.html import page_from_result
from faqd.benchmarks.report.terminal import print_comparison, print_result
from faqd.errors import UserError
from tests.benchmarks.test_bench import call
from tests.fixtures.boards import ORIN_NANO, board
from tests.fixtures.fake_bundle_engines import gpu, make_engines
from tests.fixtures.tiny_bundles import ISLANDS

GATES = Gates(0.5, 0.5, 1e9, 1e9)
DAMAGES: tuple[Any, ...] = ("delete", None, "x", [], {}, [[]], -1, 0, True, 1e400)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A record with every part that there is."""
    root = tmp_path_factory.mktemp("full")
    folder = make_engines(
        root / "bundle", "student.tensorrt", "student.float.fp16", "teacher.fp16", islands=ISLANDS, int8_share=0.4
    )
    (root / "m.py").write_text("def half(outputs, eval):\n    return {'half': 0.5}\n")
    rails = board(root / "board", ORIN_NANO) / "sys/class/hwmon"
    more = ("--sweep", "--dump-profile", "--sustained", "0.02", "--energy-duration", "0.1", "--batch", "1,2")
    with pytest.MonkeyPatch.context() as monkeypatch, gpu(monkeypatch):
        monkeypatch.setattr(hwmon, "HWMON", rails)
        monkeypatch.setattr(energy, "UPDATES", 1)
        monkeypatch.setattr(energy, "IDLE_S", 0.1)
        quick = ("--duration", "0.02", "--rounds", "2", "--warm-up", "0")
        metric = ("--metric", f"{root / 'm.py'}:half", "--bootstrap", "100")
        assert call(monkeypatch, folder, *quick, *more, *metric, "--json", root / "r.json") == 0
    found: dict[str, Any] = json.loads((root / "r.json").read_text())
    student = found["networks"][2]
    student["engine_file"] = {
        "file": "other.onnx",
        **copy.deepcopy({key: student[key] for key in ("accuracy", "metric", "metric_difference")}),
    }
    parts = ("layers", "energy", "sweep", "sustained", "metric", "metric_difference")
    assert all(found["networks"][2][part] for part in parts)
    return found


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place of a record, with the first three elements of a list for all."""
    for key in range(min(3, len(value))) if isinstance(value, list) else value if isinstance(value, dict) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


def damaged(record: dict[str, Any], path: tuple[Any, ...], damage: Any) -> dict[str, Any]:
    result = copy.deepcopy(record)
    inside: Any = result
    for key in path[:-1]:
        inside = inside[key]
    if damage == "delete":
        del inside[path[-1]]
    else:
        inside[path[-1]] = damage
    return result


def use(path: Path, other: dict[str, Any]) -> None:
    record = read_record(path)
    console = Console(file=io.StringIO(), width=100)
    record["gates"] = judged(record, GATES)
    print_result(record, console)
    page_from_result(record)
    for pair in ((record, other), (other, record)):
        print_comparison(compare(*pair), console)


def test_a_whole_record_has_nothing_wrong(full: dict[str, Any], tmp_path: Path) -> None:
    assert complaint(full) is None
    (tmp_path / "r.json").write_text(json.dumps(full))
    use(tmp_path / "r.json", full)


def test_a_record_of_before_names_no_files_and_nothing_that_stays_float(full: dict[str, Any], tmp_path: Path) -> None:
    older = copy.deepcopy(full)
    for key in ("islands", "int8_share", "worth_int8", "proofs"):
        del older["bundles"][0][key]
    for network in older["networks"]:
        del network["file"], network["engine_file"]
    (tmp_path / "r.json").write_text(json.dumps(older))
    use(tmp_path / "r.json", full)


def test_no_damage_is_a_traceback(full: dict[str, Any], tmp_path: Path) -> None:
    every = [(path, damage) for path in places(full) for damage in DAMAGES if path[0] not in ("format", "version")]
    refused = 0
    for path, damage in random.Random(0).sample(every, 50):
        (tmp_path / "r.json").write_text(json.dumps(damaged(full, path, damage)))
        try:
            use(tmp_path / "r.json", full)
        except UserError as error:
            refused += 1
            assert error.exit_code == 2
        except Exception as error:
            raise AssertionError(f"{'/'.join(map(str, path))} = {damage!r}") from error
    assert 10 < refused < 50


@pytest.mark.parametrize(
    ("path", "damage", "says"),
    [
        (("networks", 2, "latency", 0, "median_ms"), "fast", "networks/2/latency/0/median_ms is 'fast', not a number"),
        (("switches", "batch"), [], "switches/batch is a list, not a list of at least 1"),
        (("networks", 2, "accuracy"), None, "networks/2/accuracy is null, not an object"),
        (("environment", "cpu"), "delete", "environment/cpu is missing"),
        (("networks", 2, "layers", "layers", 0, "kind"), "int3", "layers/0/kind is 'int3', not one of int8"),
        (("bundles", 0, "int8_share"), "delete", "bundles/0/int8_share is missing"),
        (
            ("bundles", 0, "islands", 0, "operators", "norm"),
            3,
            "bundles/0/islands/0/operators/norm is a int, not a str",
        ),
        (("networks", 0, "role"), "float", "networks/0 is not the teacher"),
    ],
)
def test_the_place_is_named(
    full: dict[str, Any], tmp_path: Path, path: tuple[Any, ...], damage: Any, says: str
) -> None:
    (tmp_path / "r.json").write_text(json.dumps(damaged(full, path, damage)))
    with pytest.raises(UserError, match=r"the record is damaged \(.*run the bench again") as caught:
        read_record(tmp_path / "r.json")
    assert says in str(caught.value)


def test_a_number_that_is_none_is_no_json(full: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps(damaged(full, ("networks", 2, "latency", 0, "min_ms"), float("nan"))))
    with pytest.raises(UserError, match=r"r\.json: not valid JSON \(NaN is no JSON\)"):
        read_record(tmp_path / "r.json")
