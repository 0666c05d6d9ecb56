"""`faqd-deploy sensitivity` as a new user has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from faqd.deploy.sensitivity import cure, lines
from faqd.deploy.sensitivity_chart import chart
from faqd.quantize.sensitivity import Trial
from tests.fixtures.toy_runs import User, faqd_deploy, new_user, succeeds


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> User:
    return new_user(tmp_path_factory.mktemp("user"))


def test_a_good_network(user: User) -> None:
    outcome = succeeds(faqd_deploy("sensitivity", *user.teacher, *user.data))
    assert "roundings, each alone, on " in outcome.stdout and "All rounded: nothing float, 100.0 %" in outcome.stdout
    assert "--exclude" not in outcome.stdout and "distill" not in outcome.stdout


def test_the_record_and_its_words(user: User) -> None:
    bits = ("--weight-bits", 1, "--act-bits", 1, "--images", 4)
    outcome = succeeds(faqd_deploy("sensitivity", *user.teacher, *user.data, *bits, "--json", "-"))
    record = json.loads(outcome.stdout)
    assert record["bits"] == "1/1" and record["images"] == 4 and record["trials"][0]["verdict"] == "ruined"
    assert {part["kind"] for part in record["parts"]} == {"activations", "weights"}
    assert outcome.stderr.count("tried: ") == len(record["trials"])
    shown = "\n".join(lines(record))
    assert "All rounded: nothing float" in shown and "Rounded are all activations and nothing else: fidelity" in shown
    channels = [part["channels"] for part in record["parts"] if part["kind"] == "activations"]
    assert all(each["largest"] >= each["median"] and each["count"] >= each["lost"] >= 0 for each in channels)
    assert set(record["alone"]) == {"activations", "weights"}


def test_the_chart_has_a_sign_for_every_rounding(user: User, tmp_path: Path) -> None:
    line = ("--images", 4, "--chart", tmp_path / "chart.svg", "--json", tmp_path / "found.json")
    succeeds(faqd_deploy("sensitivity", *user.teacher, *user.data, *line))
    record = json.loads((tmp_path / "found.json").read_text())
    root = ElementTree.parse(tmp_path / "chart.svg").getroot()
    signs = [each for each in root.iter() if each.get("class") in ("activations", "weights")]
    assert len(signs) == 2 + len(record["parts"])  # two are the legend's
    named = {each.text for each in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {part["place"] for part in record["parts"]} <= named


@pytest.mark.parametrize("distance", [None, 0.0, 1e-9, 0.02, 7.0, 1e9])
def test_every_distance_has_a_place_in_the_chart(distance: float | None) -> None:
    part = {"place": "a<b>", "kind": "weights", "distance": distance}
    root = ElementTree.fromstring(chart({"network": "net", "bits": "8/8", "parts": [part]}))
    _, sign = root.iter("{http://www.w3.org/2000/svg}path")  # the first is the legend's
    x = float(sign.attrib["d"][1:].split()[0])
    assert 330 <= x <= 870 and (x == 870) == (distance in (None, 1e9)) and (x == 330) == (distance in (0.0, 1e-9))


def test_what_it_says_to_exclude_can_be_excluded(user: User, tmp_path: Path) -> None:
    bits = ("--weight-bits", 2, "--act-bits", 2)
    record = json.loads(succeeds(faqd_deploy("sensitivity", *user.teacher, *user.data, *bits, "--json", "-")).stdout)
    tried = next(trial for trial in record["trials"] if trial["exclude"])
    line = (*user.teacher, *user.data, *bits, "--exclude", tried["exclude"], "--out", tmp_path / "b")
    succeeds(faqd_deploy("ptq", *line))
    made = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert made["int8_share"] == pytest.approx(tried["int8_share"], abs=1e-4)


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (("--images", 1), 2, "--images"),
        (("--act-bits", 9), 2, "1 to 8"),
        (("--exclude", "nowhere"), 2, "fits no module path"),
        (("--chart", "/dev/null/chart.svg"), 2, "no file can be written there"),
        (("--weight-bits", 32, "--act-bits", 32), 2, "nothing is rounded"),
    ],
)
def test_wrong_input(user: User, more: tuple[object, ...], code: int, said: str) -> None:
    outcome = faqd_deploy("sensitivity", *user.teacher, *user.data, *more)
    assert outcome.code == code and said in outcome.stderr


def test_one_image_for_scales(user: User, tmp_path: Path) -> None:
    one = ("--calibration-images", 1, "--equalize", "always")
    succeeds(faqd_deploy("ptq", *user.teacher, *user.data, *one, "--out", tmp_path / "b"))
    succeeds(faqd_deploy("sensitivity", *user.teacher, *user.data, *one))


def trial(floats: int, share: float, fidelity: float) -> Trial:
    return Trial(f"^{floats}$" if floats else "", floats, share, fidelity)


@pytest.mark.parametrize(
    ("trials", "best"),
    [
        ([(0, 1.0, 0.99)], None),
        ([(0, 1.0, 0.3), (1, 0.9, 0.4)], None),
        ([(0, 1.0, 0.3), (1, 0.9, 0.6), (2, 0.8, 0.9)], 1),
        ([(0, 1.0, 0.3), (2, 0.8, 0.6), (4, 0.7, 0.98), (3, 0.75, 0.971)], 3),
        ([(0, 1.0, 0.6), (2, 0.8, 0.9), (4, 0.4, 0.99)], None),
    ],
)
def test_the_cure_is_worth_int8_and_has_a_better_verdict(trials: list[Any], best: int | None) -> None:
    found = cure([trial(*each) for each in trials])
    assert (found.floats if found else None) == best
