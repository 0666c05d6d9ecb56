"""docs/api.md from the docstrings of the public names: `python docs/api_page.py > docs/api.md`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import Any

import faqd

HEAD = """# Python

Everything that `import faqd` hands on. The import itself loads no library; a name loads what it needs. What a user did
wrong is a `faqd.UserError` with a sentence. [examples/](../examples) has these calls in order.
"""


def page() -> str:
    return "\n".join([HEAD, *(line for name in sorted(faqd._HOMES) for line in entry(name, getattr(faqd, name)))])


def entry(name: str, public: Any) -> Iterator[str]:
    yield f"## `faqd.{name}`\n"
    if not (inspect.isclass(public) and issubclass(public, Exception)):
        yield f"```python\n{signature(name, public)}\n```\n"
    yield f"{inspect.getdoc(public)}\n"
    if not inspect.isclass(public):
        return
    for method, function in vars(public).items():
        shown = method in ("__call__", "forward") or not method.startswith("_")
        if shown and inspect.isfunction(function) and function.__doc__:
            yield f"`{signature(method, function)}`: {inspect.getdoc(function)}\n"


def signature(name: str, public: Any) -> str:
    found = inspect.signature(public)
    parts = []
    for parameter in (p for p in found.parameters.values() if p.name != "self"):
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        parts.append(_parameter(parameter))
    returned = "" if inspect.isclass(public) or not found.return_annotation else f" -> {found.return_annotation}"
    line = f"{name}({', '.join(parts)}){returned}"
    return line if len(line) <= 110 else f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){returned}"


def _parameter(parameter: inspect.Parameter) -> str:
    default = "..." if callable(parameter.default) else repr(parameter.default)
    stated = "" if parameter.default is parameter.empty else f" = {default}"
    return f"{parameter.name}: {parameter.annotation}{stated}"


if __name__ == "__main__":
    sys.stdout.write(page())
