"""A measure of the user's own: `--metric FILE.py:fn` or `module:fn`, for any task that top-1 does not fit.

fn(outputs, eval) -> dict: outputs maps the name of every output to its array; eval maps `images` (N, H, W, C uint8),
`teacher` (output name to array) and `preprocess` (its record), and `labels` where there are any. What comes back maps
names to numbers. For `--bootstrap` it is called again on images drawn with repeats. The arrays are read-only: copy
what you want to change.
"""

from __future__ import annotations

import importlib
import math
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from faqd.bundle import Bundle, Evaluation
from faqd.errors import UserError, first_line
from faqd.files import sha256
from faqd.user_file import executed, importable, module_of, no_module, not_there

Array = NDArray[Any]


@dataclass(frozen=True)
class Metric:
    """The user's function, and the SHA-256 of its file."""

    spec: str
    path: Path
    sha256: str
    function: Callable[..., Any]

    def to_json(self, images: int) -> dict[str, Any]:
        return {"source": self.spec, "sha256": self.sha256, "images": images}

    def of(
        self,
        outputs: Mapping[str, Array],
        data: Evaluation,
        bundle: Bundle,
        who: str,
        images: NDArray[np.int64] | None = None,
    ) -> dict[str, float]:
        """Its figures for one network; UserError naming the line where it fails, or what it returned instead.

        images: the indices of those to judge on, by default each once.
        """
        chosen = slice(images_judged(data)) if images is None else images
        found: dict[str, Any] = {
            "images": data.images[chosen],
            "teacher": {name: values[chosen] for name, values in data.teacher.items()},
            "preprocess": bundle.preprocess.to_json(),
        }
        beside = {"labels": data.labels, "names": data.names, "sizes": data.sizes}
        found |= {name: values[chosen] for name, values in beside.items() if values is not None}
        judged = {name: values[chosen] for name, values in outputs.items()}
        result = self._run(_read_only(judged), _read_only(found), who)
        if not isinstance(result, Mapping) or not result:
            raise UserError(f"--metric {self.spec}: returned {_kind(result)}; return a dict of names and numbers.")
        return {str(name): self._number(str(name), value) for name, value in result.items()}

    def _run(self, outputs: dict[str, Array], found: dict[str, Any], who: str) -> Any:
        try:
            return self.function(outputs, found)
        except (Exception, SystemExit) as error:  # whatever the user's function raises
            raise UserError(f"--metric {self.spec}: failed on {who}: {_where(error, self.path)}") from error

    def _number(self, name: str, value: Any) -> float:
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
            raise UserError(f"--metric {self.spec}: {name} is {_kind(value)}; return a plain number, such as float(x).")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise UserError(f"--metric {self.spec}: {name} is {number}; return finite numbers.")
        return number


def images_judged(data: Evaluation) -> int:
    """The images for which every output of the teacher was stored: dense ones may be capped."""
    return min([len(data.images), *(len(values) for values in data.teacher.values())])


def load_metric(spec: str) -> Metric:
    """Import FILE.py, or the module, and take the function out of it; the user asked for that, nothing else is
    imported."""
    file, _, name = spec.rpartition(":")
    module, path = (_module if module_of(spec) else _file)(spec, file)
    if not name.isidentifier():
        raise UserError(f"--metric {spec}: expected FILE.py:function or module:function.")
    function = getattr(module, name, None)
    if not callable(function):
        there = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"--metric {spec}: no function {name} there; it has {', '.join(there) or 'none'}.")
    return Metric(spec, path, sha256(path), function)


def _file(spec: str, file: str) -> tuple[ModuleType, Path]:
    path = Path(file)
    if path.suffix != ".py":
        raise UserError(f"--metric {spec}: expected FILE.py:function or module:function.")
    if not path.is_file():
        raise UserError(f"--metric {spec}: no such file {path}.")

    def importing(execute: Callable[[], None]) -> None:
        try:
            execute()
        except (Exception, SystemExit) as error:  # whatever the user's file raises
            raise UserError(f"--metric {spec}: importing it failed: {_where(error, path)}") from error

    with importable(path.resolve().parent):
        return executed(path.resolve(), sha256(path), importing), path


def _module(spec: str, name: str) -> tuple[ModuleType, Path]:
    try:
        with importable(Path.cwd()):
            module = importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if not_there(name, error):
            raise UserError(f"--metric {spec}: {no_module(spec)}") from None
        raise UserError(f"--metric {spec}: importing it failed: {type(error).__name__}: {first_line(error)}") from error
    if (file := getattr(module, "__file__", None)) is None:
        raise UserError(f"--metric {spec}: {name} is in no file; name a module that is.")
    return module, Path(file)


def _read_only(values: Any) -> Any:
    """The arrays as views that cannot be written to: the same ones are judged and timed afterwards."""
    if isinstance(values, dict):
        return {name: _read_only(value) for name, value in values.items()}
    if isinstance(values, np.ndarray):
        values = values.view()
        values.flags.writeable = False
    return values


def _where(error: BaseException, path: Path) -> str:
    """The error with the last line of the user's file that led to it."""
    text = f"{type(error).__name__}: {first_line(error)}"
    if isinstance(error, SyntaxError) and error.lineno:
        return f"line {error.lineno}: {text}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) in (path, path.resolve())]
    return f"line {lines[-1]}: {text}" if lines else text


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
