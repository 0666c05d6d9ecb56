"""Files are whole or absent, and what a killed process left goes with the next that writes the same one."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from faqd.files import written_beside


def _die_half_way(path: Path) -> None:
    with written_beside(path) as temporary:
        temporary.mkdir()
        (temporary / "half").write_bytes(b"1")
        os.kill(os.getpid(), signal.SIGKILL)


def _killed(path: Path) -> Path:
    """What a process leaves that was killed while it wrote `path`."""
    process = multiprocessing.get_context("spawn").Process(target=_die_half_way, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (left,) = path.parent.glob(".*.partial")
    return left


def test_what_a_killed_process_left_goes_with_the_next(tmp_path: Path) -> None:
    path = tmp_path / "b[1]"
    left = _killed(path)
    others = [
        left.with_name(left.name.replace(".b[1].", ".b[1].elsewhere-")),
        left.with_name(left.name.replace(".b[1].", ".another.")),
        left.with_name(left.name.replace(left.suffixes[-2].rpartition("-")[2], str(os.getppid()))),
    ]
    for other in others:
        other.touch()
    with written_beside(path) as temporary:
        temporary.write_bytes(b"whole")
    assert path.read_bytes() == b"whole" and not left.exists()
    assert {other for other in others if other.exists()} == set(others), (
        "of another machine, name, or of one that lives"
    )


@pytest.mark.parametrize("found", [b"before", None])
def test_a_block_that_fails_leaves_what_was_there(found: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "file"
    if found is not None:
        path.write_bytes(found)
    with pytest.raises(ValueError, match="half"), written_beside(path) as temporary:
        temporary.write_bytes(b"half")
        raise ValueError("half-way")
    assert (path.read_bytes() if path.exists() else None) == found
    assert list(tmp_path.iterdir()) == ([path] if found is not None else [])
