"""What a JSON document must hold, as a rule, and what is wrong with one.

A rule is a type; Maybe(rule), null or that; a dict, these keys at least; Each(rule), any keys with such values; a
Many(rule), a list; or a tuple, one of these strings. Numbers are finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Maybe:
    rule: Any


@dataclass(frozen=True)
class Each:
    rule: Any


@dataclass(frozen=True)
class Many:
    rule: Any
    least: int = 0


@dataclass(frozen=True)
class Above:
    """A number above this."""

    limit: float


COUNT = Above(0)
POSITIVE = Above(0)


def wrong(value: Any, rule: Any, path: str = "") -> Iterator[str]:
    """Every complaint about a value, by its place in the document."""
    if isinstance(rule, Maybe):
        if value is not None:
            yield from wrong(value, rule.rule, path)
    elif isinstance(rule, (dict, Each)):
        if not isinstance(value, dict):
            yield f"{path} is {_kind(value)}, not an object"
            return
        for key, inner in rule.items() if isinstance(rule, dict) else dict.fromkeys(value, rule.rule).items():
            if key not in value:
                yield f"{path}/{key} is missing".removeprefix("/")
            else:
                yield from wrong(value[key], inner, f"{path}/{key}".removeprefix("/"))
    elif isinstance(rule, Many):
        if not isinstance(value, list) or len(value) < rule.least:
            yield f"{path} is {_kind(value)}, not a list of at least {rule.least}"
            return
        for index, inner in enumerate(value):
            yield from wrong(inner, rule.rule, f"{path}/{index}")
    elif isinstance(rule, tuple):
        if value not in rule:
            yield f"{path} is {value!r}, not one of {', '.join(rule)}"
    elif isinstance(rule, Above) or rule is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and _is_finite(value)
        if not number or (isinstance(rule, Above) and value <= rule.limit):
            above = f" above {rule.limit:g}" if isinstance(rule, Above) else ""
            yield f"{path} is {repr(value)[:40]}, not a number{above}"
    elif not isinstance(value, rule):
        yield f"{path} is {_kind(value)}, not a {rule.__name__}"


def unprintable(document: Any) -> str | None:
    """A string, key or value, that a terminal would obey or could not show; None where there is none."""
    stack = [document]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            stack += [*value, *value.values()]
        elif isinstance(value, list):
            stack += value
        elif isinstance(value, str) and not _OBEYED.isdisjoint(value):
            return value
    return None


_OBEYED = frozenset(
    chr(code)
    for first, last in ((0, 31), (127, 159), (0x2028, 0x202E), (0x2066, 0x2069), (0xD800, 0xDFFF))
    for code in range(first, last + 1)
)
"""Control characters, line and paragraph separators, what turns the direction of text, and halves of characters."""


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer beyond all floats
        return False


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"
