"""What the user's code, FILE.py:callable or module:callable, gives a training: the network that it builds, or a
function."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from faqd.errors import UserError, first_line
from faqd.files import sha256
from faqd.quantize.capture.program import as_plain_modules, is_exported
from faqd.train.networks.own_tensors import copy_of
from faqd.user_file import executed, importable, no_module, not_there

_left_in: dict[Path, Path] = {}
"""The working folder that a file chose when it was executed: what it does later may count on it."""


@dataclass(frozen=True)
class Code:
    """A file of the user's, or a module by its dotted name. path, sha256: of the file with what is asked."""

    path: Path
    sha256: str
    module: str | None = None

    def __str__(self) -> str:
        return self.module or str(self.path)

    @property
    def folder(self) -> Path:
        """From where it imports what lies beside it."""
        return self.path.parent if self.module is None else Path.cwd()

    def executed(self) -> ModuleType:
        """Within `importable` of the folder."""
        if self.module is None:
            return executed(self.path, self.sha256, partial(_run_of_the_user, self, "importing it"))
        found: ModuleType = _run_of_the_user(self, "importing it", partial(importlib.import_module, self.module))
        return found


def code_of_module(module: str, name: str, asked: str) -> Code:
    """The code behind `module:name`; UserError where it cannot be imported. asked: the option and its value."""
    code = Code(Path(), "", module)
    with importable(code.folder):
        try:
            home = code.executed()
        except UserError as error:
            if not_there(module, error.__cause__):
                raise UserError(f"{asked}: {no_module(f'{module}:{name}')}") from None
            raise
    found = getattr(home, name, None)
    if not callable(found):
        raise UserError(f"{asked}: the module {module} has no callable named {name}.")
    try:
        file = inspect.getsourcefile(inspect.unwrap(found))
    except TypeError:  # an instance, or what is not written in Python
        file = None
    path = Path(file or getattr(home, "__file__", None) or "")
    if not path.is_file():
        raise UserError(f"{asked}: the code of {name} is in no file, so that a run could not hold on to it.")
    return Code(path.resolve(), sha256(path), module)


def users_network(code: Code, name: str, example: Tensor) -> nn.Module:
    """A network that `name` of the code builds, each time another one.

    Lazy modules get their sizes from `example` (N, C, H, W). UserError says what of the user's fails.
    """
    with importable(code.folder):
        build = getattr(code.executed(), name, None)
        if not callable(build):
            raise UserError(f"{code}: has no callable named {name}.")
        needed = _needed_arguments(build)
        if needed:
            raise UserError(
                f"{code}: {name} needs arguments ({', '.join(needed)}); give a function without any that returns the "
                "network, for example `def build(): return Net(classes=10)`."
            )
        built = _unwrapped(_run_of_the_user(code, f"{name}()", build))
        if is_exported(built):
            return as_plain_modules(built)
        if not isinstance(built, nn.Module):
            raise UserError(f"{code}: {name}() returned {type(built).__name__}, expected a torch.nn.Module.")
        if any(value.is_meta for value in (*built.parameters(), *built.buffers()) if not is_lazy(value)):
            raise UserError(f"{code}: {name}() built it on the meta device, without values; build it on the CPU.")
        if any(map(is_lazy, (*built.parameters(), *built.buffers()))):
            _run_of_the_user(
                code, f"a first run of the lazy modules that {name}() returned", lambda: _run(built, example)
            )
    return _another(built)


def users_function(code: Code, name: str, asked: str) -> Callable[..., Any]:
    """The function `name` of the code; what it raises comes as a UserError with its line. asked: the option and its
    value, for the sentence where there is no such function."""
    with importable(code.folder):
        function = getattr(code.executed(), name, None)
    if not callable(function):
        raise UserError(f"{asked}: {code} has no function of that name; name one that it has.")
    return lambda *arguments: _run_of_the_user(code, f"{name}()", lambda: function(*arguments))


def _unwrapped(built: Any) -> Any:
    """Without what runs a network elsewhere, compiles it or averages it: their forwards cannot be captured."""
    while isinstance(built, _WRAPPERS) or hasattr(built, _COMPILED):
        built = getattr(built, _COMPILED) if hasattr(built, _COMPILED) else built.module
    return built


_WRAPPERS = (nn.DataParallel, DistributedDataParallel, AveragedModel)
_COMPILED = "_orig_mod"
"""Where torch.compile keeps the network."""


def _run(network: nn.Module, example: Tensor) -> None:
    with torch.no_grad():
        network.eval()
        network(example)


def _another(network: nn.Module) -> nn.Module:
    """A copy, since a function may return one network of its file again and again; what cannot be copied, itself."""
    try:
        return copy_of(network)
    except Exception:  # of whatever the user's modules hold
        return network


@contextmanager
def _settings_of(path: Path) -> Iterator[None]:
    """What the user's code changes for a whole process, put back behind the block; what it prints goes to stderr."""
    here, search, device = Path.cwd(), list(sys.path), torch.get_default_device()
    gradient, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    os.chdir(_left_in.get(path, here))
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        if Path.cwd() != here or path in _left_in:
            _left_in[path] = Path.cwd()
        os.chdir(here)
        sys.path[:] = search
        torch.set_grad_enabled(gradient)
        torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(None if device.type == "cpu" else device)


def _run_of_the_user(code: Code, what: str, function: Callable[[], Any]) -> Any:
    try:
        with _settings_of(code.path):
            return function()
    # Whatever the user's code does; SystemExit is what argparse does on import.
    except (Exception, SystemExit) as error:
        lines = [
            frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(code.path)
        ]
        where = f" (line {lines[-1]})" if lines else ""
        raise UserError(
            f"{code}: {what} failed{where}: {type(error).__name__}: {first_line(error)}. Correct it and try again."
        ) from error


def _needed_arguments(build: Callable[..., Any]) -> list[str]:
    starred = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    try:
        parameters = inspect.signature(build).parameters.values()
    except ValueError:  # of what is not written in Python
        return []
    return [p.name for p in parameters if p.default is p.empty and p.kind not in starred]
