"""What no linter sees about the repository: its links, its names, the length of its files, what its text gives away."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINKS = ("quantize", "train", "deploy", "calib", "benchmarks")
LINES = 400
LONGER: dict[str, str] = {}
"""Files of the package that may be longer, each with its reason."""

# Absolute paths of somebody's machine, and the hosts that packages are fetched from: both are the user's own affair.
GIVEN_AWAY = re.compile(
    r"(?<![\w.~*}])/(?:home|root|tmp|work|opt|mnt|Users)/\w+|pypi\.\w+|python[h]osted|download\.pytorch|anaconda\.\w+|file:/[/]"
)


def listed() -> list[Path]:
    """What git holds or would add; where there is no git, every file of these folders."""
    if not (ROOT / ".git").exists():
        return [path for folder in ("faqd", "tests", "docs", "results") for path in (ROOT / folder).rglob("*.*")]
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [ROOT / name for name in names if name]


def test_no_text_gives_away_a_machine_or_a_package_host() -> None:
    found = []
    for path in listed():
        if path.is_file() and not path.is_symlink() and b"\0" not in (content := path.read_bytes()):
            lines = content.decode("utf-8").splitlines()
            name = path.relative_to(ROOT)
            found += [f"{name}:{n}: {hit[0]}" for n, line in enumerate(lines, 1) if (hit := GIVEN_AWAY.search(line))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "given_away"),
    [
        ("built in {}home/ann/faqd", True),
        ("'{}tmp/x'", True),
        ("{}usr/bin/chromium", False),
        ("runs{}work/one", False),
    ],
)
def test_such_text_would_be_found(text: str, given_away: bool) -> None:
    assert bool(GIVEN_AWAY.search(text.format("/"))) == given_away


@pytest.mark.parametrize("name", LINKS)
def test_the_names_at_the_top_are_relative_links(name: str) -> None:
    assert (ROOT / name).readlink() == Path("faqd", name)
    assert (ROOT / name).is_dir()


def test_no_module_goes_by_the_name_of_a_link() -> None:
    assert not sys.modules.keys() & set(LINKS), "pytest has imported every test file by now: one of them imports a link"
    code = (
        "import faqd, importlib, pkgutil, sys\n"
        "for module in pkgutil.walk_packages(faqd.__path__, 'faqd.'):\n"
        "    if not module.name.endswith('.__main__'):\n"
        "        importlib.import_module(module.name)\n"
        f"sys.exit(', '.join(sys.modules.keys() & set({LINKS!r})) or None)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_files_stay_short() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in python_files()}
    longer = {name for name, lines in lengths.items() if lines >= LINES}
    assert longer == set(LONGER), (
        f"{LINES} lines or more, or listed without need; a long file usually hides a second noun"
    )


def test_every_folder_of_the_package_is_one() -> None:
    """Without its __init__.py a folder is missing in the wheel."""
    assert {path.parent for path in python_files()} == {path.parent for path in (ROOT / "faqd").rglob("__init__.py")}


NAMED = re.compile(r"(?<![\w/.-])(?:faqd|tests|results|docs|\.ci)/[\w./-]*\w(?![\w*])")
NOT_HERE = ("faqd/bin", "results/boards/BUILDER-VERSION-GPU.json", "results/foreign")
"""A virtual environment, a pattern, and what a script writes."""


def test_every_path_that_a_text_names_exists() -> None:
    texts = [path for path in listed() if path.suffix in (".md", ".py", ".cfg", ".toml") and path.is_file()]
    missing = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in texts
        for name in NAMED.findall(path.read_text("utf-8"))
        if not (ROOT / name).exists() and not name.startswith(NOT_HERE)
    }
    assert not missing, "\n".join(sorted(missing))


def python_files() -> list[Path]:
    return sorted((ROOT / "faqd").rglob("*.py"))
