"""The report as a browser shows it: figures equal the JSON, nothing overflows or overlaps, nothing is fetched."""

from __future__ import annotations

import copy
import io
import json
import math
import re
import shlex
import shutil
import subprocess
import tempfile
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

from faqd.benchmarks.backends.sessions import OnnxruntimeBackend
from faqd.benchmarks.bench import bench
from faqd.benchmarks.cli import bench_command
from faqd.benchmarks.measure.latency import Length
from faqd.benchmarks.measure.switches import Options
from faqd.benchmarks.record.gates import Gates
from faqd.benchmarks.report.accuracy_latency_chart import accuracy_against_latency, latency_distribution
from faqd.benchmarks.report.html import page_from_result
from faqd.benchmarks.report.label_layout import Box, place
from faqd.benchmarks.report.svg import SHAPES
from faqd.benchmarks.report.terminal import console_for, print_result
from faqd.bundle import load_bundle
from faqd.deploy.cli import cli as deploy_cli
from faqd.proof import STATUSES
from faqd.train.cli import cli as train_cli
from tests.fixtures.tiny_bundles import ISLANDS, make_bundle

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")
HOSTILE = """<b>&amp;"'</script><img src=x onerror=alert(1)>"""
DARK, LIGHT = 0, 1
FAR_BELOW = "l7 -11h-14z"
"""An arrow downwards, in the place of any mark."""

PROBE = """<script>
const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
const seen = e => e.getClientRects().length > 0;
parent.document.documentElement.dataset.probe = JSON.stringify({
  dom: document.body.outerHTML,
  width: innerWidth,
  content: Math.max(...[...document.querySelectorAll("body *")].filter(seen).map(e => box(e)[2])),
  scroll: document.documentElement.scrollWidth,
  page: getComputedStyle(document.body).backgroundColor,
  ink: getComputedStyle(document.body).color,
  small: Math.min(...[...document.querySelectorAll("svg text")].filter(seen).map(
    e => parseFloat(getComputedStyle(e).fontSize) * e.getCTM().a)),
  marks: [...document.querySelectorAll(".scatter div svg .mark")].filter(seen).filter(
    e => !e.closest(".sign")).map(box),
  labels: [...document.querySelectorAll(".scatter svg text.label")].filter(seen).map(box),
  leaders: [...document.querySelectorAll(".scatter svg .leader")].filter(seen).map(box),
  elements: [...document.querySelectorAll("script, img, link, iframe")].length,
});
</script>"""


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Six students, a hostile name and a hopeless control among them."""
    root = tmp_path_factory.mktemp("bundles")
    students = {
        "resnet20 8/8": ("distilled", 0.02, True),
        "resnet20 PTQ W8A8": ("ptq", 0.08, None),
        "resnet20 4W4A": ("distilled", 0.12, False),
        "a student whose name is longer than any picture has room for": ("distilled", 0.1, True),
        HOSTILE: ("distilled", 0.05, True),
        "control, not trained": ("ptq", 2.0, True),
    }
    floats: dict[str, dict[str, Any]] = {
        "resnet20 8/8": {"islands": [], "int8_share": 1.0},
        "resnet20 4W4A": {"islands": ISLANDS, "int8_share": 0.8123},
        HOSTILE: {"islands": [{"operators": {HOSTILE: HOSTILE}, "line": f" ({HOSTILE})"}] * 9, "int8_share": 0.4},
    }
    for index, (name, (kind, noise, verify)) in enumerate(students.items()):
        make_bundle(root / str(index), name, kind=kind, noise=noise, verify=verify, **floats.get(name, {}))
    bundles = [load_bundle(root / str(index)) for index in range(len(students))]
    options = Options(batch=(1, 4), length=Length(0.2, 0.0, rounds=2), gates=Gates(min_agreement=0.5))
    # A clock of its own makes the page the same every time, with all points in one column: the worst case.
    ticks = np.random.default_rng(0).gamma(4.0, 1.25e-4, 200_000).cumsum()
    clock = iter(ticks.tolist()).__next__
    return bench(
        bundles, OnnxruntimeBackend(1, "test", clock), options, command=["faqd-bench", HOSTILE], clock=clock
    ).result


def chromium(page: Path, width: int, scheme: int, *options: str, height: int = 2000) -> str:
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [
                str(CHROMIUM),
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--hide-scrollbars",
                f"--user-data-dir={profile}",
                f"--blink-settings=preferredColorScheme={scheme}",
                f"--window-size={width},{height}",
                *options,
                page.as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
    return done.stdout


def probed(html: str, folder: Path, width: int, scheme: int) -> dict[str, Any]:
    """What a script finds out about the page as it is laid out; the shipped page itself forbids scripts.

    The page stands in a frame, because Chromium makes no window narrower than 500 px.
    """
    open_page = re.sub(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", "", html)
    inner = escape(open_page.replace("</body>", f"{PROBE}</body>"), quote=True)
    page = folder / "probe.html"
    frame = f'<iframe style="width: {width}px; height: 2000px; border: 0" srcdoc="{inner}"></iframe>'
    page.write_text(f'<!doctype html><meta charset="utf-8"><body>{frame}</body>', encoding="utf-8")
    dom = chromium(page, 1300, scheme, "--dump-dom")
    found = next(dict(attributes)["data-probe"] for tag, attributes in read(dom).tags if tag == "html")
    assert found is not None
    probe = json.loads(found)
    assert isinstance(probe, dict)
    return probe


class Reader(HTMLParser):
    """Tags with attributes, and the text of every element that names its place in the JSON."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, list[tuple[str, str | None]]]] = []
        self.figures: list[tuple[str, float, str]] = []
        self.record = ""
        self._in: tuple[str, float] | None = None
        self._in_record = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, attrs))
        found = dict(attrs)
        path = found.get("data-json")
        self._in = (path, float(found.get("data-scale") or 1)) if path else None
        self._in_record = found.get("id") == "record"

    def handle_data(self, data: str) -> None:
        if self._in:
            self.figures.append((*self._in, data))
        if self._in_record:
            self.record += data

    def handle_endtag(self, tag: str) -> None:
        self._in = None
        self._in_record = False


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    return reader


def at(record: Any, path: str) -> float:
    for key in path.split("/"):
        record = record[int(key)] if isinstance(record, list) else record[key]
    return float(record)


def assert_figures_equal(html: str, result: dict[str, Any], least: int = 100) -> None:
    figures = read(html).figures
    assert len(figures) > least
    for path, scale, text in figures:
        number = text.strip().replace("−", "-").replace(",", "")
        half_a_digit = 0.5 * 10.0 ** -len(number.partition(".")[2])
        wanted = at(result, path) * scale
        assert abs(float(number) - wanted) <= half_a_digit * (1 + 1e-6), (path, wanted, text)


def test_the_page_is_whole_and_escaped(result: dict[str, Any]) -> None:
    html = page_from_result(result)
    reader = read(html)
    assert {tag for tag, _ in reader.tags}.isdisjoint({"img", "link", "iframe", "object"})
    assert not any(name in ("src", "href") or name.startswith("on") for _, attrs in reader.tags for name, _ in attrs)
    assert not re.search(r"https?://|url\(|@import", html)
    assert [dict(attrs).get("type") for tag, attrs in reader.tags if tag == "script"] == ["application/json"]
    assert json.loads(reader.record) == result
    assert_figures_equal(html, result, least=200)


def test_the_first_screen_says_proof_and_fidelity_then_speed(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", engine_noise=1.5)
    html = page_from_result(bench([bundle], OnnxruntimeBackend(1, "test"), Options(length=Length(0.01))).result)
    head = html[html.index("<header>") : html.index("</header>")]
    order = (
        'class="chip passed">proof passed<',
        'class="chip passed">kept<',
        'class="chip failed">ruined<',
        "Median lat",
    )
    places = [head.index(text) for text in order]
    assert places == sorted(places), "also of the file for engines where that is something else"
    section = html[html.index("</header>") :].partition("</section>")[0]
    assert "<h2>Proof and fidelity</h2>" in section and "at most 0.01 % of the quantized values" in section
    files = [
        f"{name}</small>"
        for name in ("student.onnxruntime.onnx, run here", "student.tensorrt.onnx, for engines, as written")
    ]
    assert all(section.count(name) == 1 for name in files)


def test_every_row_and_column_of_a_table_has_a_header(result: dict[str, Any]) -> None:
    html = page_from_result(result)
    tags = read(html).tags
    scopes = [dict(attrs).get("scope") for tag, attrs in tags if tag == "th"]
    assert set(scopes) == {"col", "row"}
    assert scopes.count("row") == sum(tag == "tr" for tag, _ in tags) - html.count("<thead>")


def test_a_network_has_one_mark_in_tables_and_pictures(result: dict[str, Any]) -> None:
    html = page_from_result(result)
    for kind in ("teacher", "ptq", "distilled", "float"):
        shape = re.sub(r"^M[\d.]+ [\d.]+", "", SHAPES[kind].format(0, 0))
        drawn = re.findall(
            rf'class="(?:sign )?{kind}"[^>]*>(?:<title>[^<]*</title>)?(?:<line[^>]*>)*<path class="mark" d="([^"]*)"',
            html,
        )
        assert drawn and all(path.endswith((shape, FAR_BELOW)) for path in drawn), kind


def test_times_below_a_tenth_of_a_millisecond_are_microseconds(result: dict[str, Any]) -> None:
    quick = copy.deepcopy(result)
    for network in quick["networks"]:
        for latency in network["latency"]:
            for key in ("min_ms", "median_ms", "max_ms"):
                latency[key] /= 1e3
            for key in ("distribution_ms", "round_medians_ms"):
                latency[key] = [value / 1e3 for value in latency[key]]
            latency["percentiles_ms"] = {p: v and v / 1e3 for p, v in latency["percentiles_ms"].items()}
    for record, unit, other in ((result, "ms", "µs"), (quick, "µs", "ms")):
        html = page_from_result(record)
        assert_figures_equal(html, record, least=200)
        assert f"median latency in {unit}, batch 1" in html and f"<small>{unit}</small>" in html
        assert not re.search(rf"\d {other}\b", html.partition("<h2>Environment")[0])
        console = console_for(io.StringIO())
        print_result(record, console)
        printed = console.file.getvalue()  # type: ignore[attr-defined]
        assert f"p50 {unit}" in printed and f"latency in {unit}" in printed
        assert "variation" not in (html.partition("<script")[0] + printed).lower(), (
            "one stalled query in thousands makes it 7,000 %"
        )


@pytest.mark.parametrize("status", STATUSES)
def test_every_command_on_the_page_exists(result: dict[str, Any], status: str) -> None:
    """With the arguments that it prints: each is parsed, and none is carried out."""
    stored = copy.deepcopy(result)
    stored["command"] = ["faqd-bench", "a folder/b", "--eval-data", "folder:c d", "--duration", "0.5"]
    for bundle in stored["bundles"]:
        bundle["folder"] = "a folder/of $HOME"
        bundle["proofs"] = {name: {**proof, "status": status} for name, proof in bundle["proofs"].items()}
    html = page_from_result(stored).partition('<script type="application/json"')[0]
    codes = [unescape(text) for text in re.findall(r"<code[^>]*>([^<]*)</code>", html)]
    lines = [line for line in (*codes, *re.findall(r"`([^`]*)`", unescape(html))) if line.startswith("faqd")]
    assert (f"faqd-deploy verify {shlex.quote('a folder/of $HOME')}" in lines) == (status != "passed")
    assert shlex.join(stored["command"]) in lines
    for line in lines:
        name, *arguments = shlex.split(line.replace(" ...", ""))
        command: click.Command = {"faqd-train": train_cli, "faqd-deploy": deploy_cli, "faqd-bench": bench_command}[name]
        if isinstance(command, click.Group):
            command = command.commands[arguments.pop(0)]
        if "..." in line:  # an outline: its options exist
            known = {spelling for option in command.params for spelling in option.opts}
            assert known.issuperset(each for each in arguments if each.startswith("--")), line
        else:
            command.make_context(name, arguments)


def test_the_page_tells_what_stays_float(result: dict[str, Any], tmp_path: Path) -> None:
    html = page_from_result(result)
    assert "All multiply-accumulates in INT8: resnet20 8/8." in html
    section = html.partition("<h2>What stays float</h2>")[2].partition("</section>")[0]
    assert section.count('class="name"') == 2, "nothing of a student that is all integers, nor of bundles of before"
    assert [path for path, *_ in read(section).figures] == ["bundles/2/int8_share", "bundles/4/int8_share"]
    assert section.count("INT8 is not worth it here") == 1
    assert "<summary>matmul (2 times), LayerNorm, softmax</summary>" in section
    assert '<code>norm</code> LayerNorm <span class="soft">net.py:12</span>' in section
    assert "<code>attend</code> matmul, <code>weigh</code> softmax, <code>attend_1</code> matmul</li>" in section


def test_the_page_of_a_student_without_islands_has_no_section_on_them(tmp_path: Path) -> None:
    options = Options(skip_latency=True)
    variants: tuple[tuple[str, dict[str, Any]], ...] = (
        ("whole", {"islands": [], "int8_share": 1.0}),
        ("of before", {}),
    )
    for name, floats in variants:
        bundle = make_bundle(tmp_path / name, **floats)
        html = page_from_result(bench([bundle], OnnxruntimeBackend(1, "test"), options).result)
        assert "What stays float" not in html
        assert ("All multiply-accumulates in INT8: tiny 8/8." in html) == (name == "whole")
    bundle = make_bundle(tmp_path / "kept", islands=[], int8_share=0.7)
    html = page_from_result(bench([bundle], OnnxruntimeBackend(1, "test"), options).result)
    assert "none: layers that were kept float" in html and "not worth it" not in html


def test_the_page_without_latency_labels_or_classes(tmp_path: Path) -> None:
    make_bundle(tmp_path / "labelless", labels=False)
    make_bundle(tmp_path / "dense", labels=False, dense=True)
    make_bundle(tmp_path / "labels")
    for name, latency, said in (
        ("labelless", True, "names the same class as its float teacher"),
        ("dense", True, "Its outputs are dense"),
        ("labels", False, "images right"),
    ):
        options = Options(batch=(2,), length=Length(0.01, 0.0, rounds=1), skip_latency=not latency)
        found = bench([load_bundle(tmp_path / name)], OnnxruntimeBackend(1, "test"), options).result
        html = page_from_result(found)
        assert said in html
        assert ("Where the queries fall" in html) == latency
        assert (accuracy_against_latency(found, 900) is not None) == (name == "labelless")
        assert (latency_distribution(found, 2, 900) is not None) == latency


def middle(box: Box) -> tuple[float, float]:
    return (box.left + box.right) / 2, (box.top + box.bottom) / 2


@needs_chromium
@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("scheme", [LIGHT, DARK])
def test_the_page_in_a_browser(result: dict[str, Any], tmp_path: Path, width: int, scheme: int) -> None:
    html = page_from_result(result)
    probe = probed(html, tmp_path, width, scheme)
    assert_figures_equal(probe["dom"], result, least=200)
    assert probe["width"] == width
    assert probe["scroll"] <= width, "no horizontal scrolling"
    assert probe["content"] <= width + 0.5, "nothing sticks out"
    assert probe["elements"] == 2, "the record and the probe: a hostile name makes no elements"
    assert probe["small"] >= 11, "text in the pictures stays readable"
    page, ink = (sum(map(int, re.findall(r"\d+", probe[key])[:3])) for key in ("page", "ink"))
    assert (page < ink) == (scheme == DARK)
    boxes, marks = ([Box(*corners) for corners in probe[key]] for key in ("labels", "marks"))
    assert len(boxes) == len(marks) == 7
    assert not [(a, b) for a in boxes for b in marks if a.overlap(b) > 4]
    assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlap(b) > 1]
    ambiguous = 0
    for label in boxes:
        apart = sorted(math.dist(middle(mark), label.nearest(*middle(mark))) for mark in marks)
        ambiguous += apart[1] < apart[0] + 4
    assert len(probe["leaders"]) >= ambiguous, "where two marks are as near to a label a line says which is meant"


@needs_chromium
def test_the_page_is_printed_on_few_sheets_that_begin_with_what_counts(result: dict[str, Any], tmp_path: Path) -> None:
    page, sheets = tmp_path / "report.html", tmp_path / "report.pdf"
    page.write_text(page_from_result(result), encoding="utf-8")
    chromium(page, 1200, LIGHT, f"--print-to-pdf={sheets}")
    count = len(re.findall(rb"/Type\s*/Page\b", sheets.read_bytes()))
    assert 1 < count <= 8, "it was 16 where a sheet was laid out as a phone and no card was ever broken"


@needs_chromium
def test_the_shipped_page_can_be_photographed(result: dict[str, Any], tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(page_from_result(result), encoding="utf-8")
    for width, scheme in ((1200, LIGHT), (1200, DARK), (390, LIGHT), (390, DARK)):
        picture = tmp_path / f"{width}-{scheme}.png"
        chromium(page, width, scheme, f"--screenshot={picture}", height=1400)
        content = picture.read_bytes()
        assert content.startswith(b"\x89PNG")
        assert int.from_bytes(content[16:20], "big") == width
        assert len(content) > 30_000, "not an empty page"


def test_labels_find_room_in_a_crowd() -> None:
    generator = np.random.default_rng(1)
    frame = Box(0, 0, 880, 360)
    for _ in range(20):
        anchors = [(float(x), float(y)) for x, y in generator.uniform((20, 20), (860, 340), (12, 2))]
        solid = [Box(x - 8, y - 8, x + 8, y + 8) for x, y in anchors]
        boxes = place(anchors, [(120.0, 30.0)] * 12, solid, [], frame)
        assert all(box.within(frame) for box in boxes)
        assert not any(box.overlap(other) for i, box in enumerate(boxes) for other in [*boxes[:i], *solid])


def test_no_label_stands_beside_another_mark() -> None:
    """Marks one above the other, as of one network with other bits; nothing but marks is in the way."""
    anchors = [(212.0, 82.0), (212.0, 162.0), (218.0, 162.0), (257.0, 162.0)]
    marks = [Box(x - 8, y - 8, x + 8, y + 8) for x, y in anchors]
    columns = [Box(x - 3, 0, x + 3, 330) for x, _ in anchors]
    boxes = place(anchors, [(145.0, 32.0)] * 4, marks, columns, Box(52, 16, 340, 370))
    for own, box in zip(anchors, boxes, strict=True):
        assert box.distance(*own) == min(box.distance(*anchor) for anchor in anchors), (own, box)
