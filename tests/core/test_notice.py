"""What takes long is named while it does, on command lines alone."""

from __future__ import annotations

import threading

import pytest

from faqd import notice


def test_a_slow_step_is_named_where_someone_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notice, "PATIENCE", 0.0)
    heard, called = [], threading.Event()

    def say(text: str) -> None:
        heard.append(text)
        called.set()

    with notice.told(say), notice.slow("capturing Net"):
        assert called.wait(30)
    assert heard == ["capturing Net ..."]


def test_a_quick_step_and_a_library_are_silent() -> None:
    heard: list[str] = []
    threads = threading.active_count()
    with notice.slow("capturing Net"):
        assert threading.active_count() == threads
    with notice.told(heard.append), notice.slow("capturing Net"):
        pass
    assert heard == []
