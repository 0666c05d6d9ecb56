"""The user's code, FILE.py:callable or module:callable: executed once in a process, whoever asks for it."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_PREFIX = "faqd_user_"
_NUMBERED = re.compile(rf"^{_PREFIX}(.+?)_\d+\.")
_executed: dict[tuple[Path, str], ModuleType] = {}
"""By path and SHA-256: a file that registers an operator, or a model by its name, can be executed only once."""
_neighbours: dict[Path, dict[str, ModuleType]] = {}
"""Modules that files of the user imported from beside themselves, by folder and name."""


def executed(path: Path, sha256: str, run: Callable[[Callable[[], None]], None]) -> ModuleType:
    """The module that a file is, by its resolved path; within `importable`. sha256: of the file. run: calls what
    executes it, and makes a UserError of what that raises."""
    if (path, sha256) not in _executed:
        name = f"{_PREFIX}{path.stem}_{len(_executed)}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        # Dataclasses and pickle look their module up there.
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        loader = spec.loader
        run(lambda: loader.exec_module(module))
        _executed[path, sha256] = module
    return _executed[path, sha256]


def name_anywhere(name: str) -> str:
    """A class of such a module, by what it is called in every process."""
    return _NUMBERED.sub(r"\1.", name)


def module_of(spec: str) -> tuple[str, str] | None:
    """Module and name of `module:callable`; None for anything else, such as FILE.py:callable."""
    if spec.rpartition(":")[0].endswith(".py") or _MODULE.fullmatch(spec) is None:
        return None
    module, _, name = spec.partition(":")
    return module, name


def not_there(module: str, error: BaseException | None) -> bool:
    """Whether an import failed because there is no such module, and not within it."""
    return isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")


def no_module(spec: str) -> str:
    """What to do where there is no module of that name."""
    module, _, name = spec.partition(":")
    return (
        f"no module {module} can be imported here. Install its package, or start in the folder that it lies in; a file "
        f"is named with its ending, as {module.replace('.', '/')}.py:{name}."
    )


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Lets what lies in the folder be imported in the block, whatever was imported under those names from others."""
    for other, modules in _neighbours.items():
        for name in [name for name in modules if other != folder and _lies_in(folder, name)]:
            sys.modules.pop(name, None)
    sys.modules.update(_neighbours.get(folder, {}))
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))
        new = {name: sys.modules[name] for name in set(sys.modules) - before if _lies_in(folder, name)}
        _neighbours.setdefault(folder, {}).update(new)


def _lies_in(folder: Path, module: str) -> bool:
    top = folder / module.partition(".")[0]
    return top.is_dir() or top.with_suffix(".py").is_file()
