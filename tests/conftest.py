"""FAQD_REQUIRE=chromium,tensorrt-rtx,gpu: a test that is skipped for want of one of these fails instead."""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import TypeVar

import pytest

REQUIRED = tuple(filter(None, os.environ.get("FAQD_REQUIRE", "").casefold().split(",")))
Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return failed_if_required((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return failed_if_required((yield))


def failed_if_required(report: Report) -> Report:
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2]
        words = reason.casefold().replace("_", "-")
        if lacking := next((name for name in REQUIRED if name in words and "has a gpu" not in words), None):
            report.outcome = "failed"
            report.longrepr = f"FAQD_REQUIRE names {lacking}, and this test was skipped: {reason}"
    return report
