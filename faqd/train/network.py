"""Where a float network comes from: the zoo or the user's own file, and how its weights are read safely."""

from __future__ import annotations

import importlib.util
import inspect
import pickle
import sys
import traceback
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from faqd.errors import UserError, first_line
from faqd.files import sha256, written_beside
from faqd.train.models import build_architecture, check_architecture

WRAPPINGS = ("state_dict_ema", "model_ema", "ema", "state_dict", "model_state_dict", "model", "net", "weights")
"""Keys under which training scripts commonly store the state dict; the averaged weights, by which they judge, first."""
PREFIXES = ("module.", "_orig_mod.", "model.")
"""What DataParallel and averaged models, torch.compile, and Lightning put before every key."""
COUNTERS = ("n_averaged",)
"""Entries of an averaged model that are no weights."""

_neighbours: dict[str, Path] = {}
"""Modules that files of the user imported from beside themselves, by name, and the folder of each."""


@dataclass(frozen=True)
class NetworkSource:
    """Either `architecture` from the zoo, or `file` and `callable` of the user's with the file's SHA-256.

    channels, pixels: of the input. classes: width of the classifier, 0 for a user's own network, which knows it.
    """

    channels: int
    pixels: tuple[int, int]
    classes: int
    architecture: str | None = None
    file: str | None = None
    callable: str | None = None
    sha256: str | None = None

    @property
    def name(self) -> str:
        return self.architecture or f"{Path(str(self.file)).name}:{self.callable}"

    def build(self) -> nn.Module:
        """A freshly initialised network; UserError if the user's file changed since the run, or fails."""
        if self.architecture is not None:
            return build_architecture(self.architecture, self.channels, self.classes, max(self.pixels))
        path = Path(str(self.file))
        if not path.is_file():
            raise UserError(f"{path}: no such file; the run was made with the network in it.")
        if sha256(path) != self.sha256:
            raise UserError(
                f"{path}: changed since the run was made (SHA-256 differs). Code is only imported unchanged: restore "
                "the file, or distil again with the new one."
            )
        return _call(path, str(self.callable))

    def example(self, batch: int = 2) -> Tensor:
        """(batch, C, H, W) zeros: for tracing and shapes only."""
        return torch.zeros(batch, self.channels, *self.pixels)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> NetworkSource:
        return cls(**{**record, "pixels": tuple(record["pixels"])})


def is_users(spec: str) -> bool:
    """Whether `spec` has the form FILE.py:callable."""
    return spec.rpartition(":")[0].endswith(".py")


def architecture_source(arch: str, channels: int, pixels: tuple[int, int], classes: int) -> NetworkSource:
    """What `--arch` names: a network of the zoo with `classes` outputs, or FILE.py:callable, which knows its own.

    UserError where there is none of that name; the user's file is not imported yet.
    """
    if is_users(arch):
        return user_source(arch, channels, pixels, "--arch")
    check_architecture(arch)
    return NetworkSource(channels, pixels, classes, architecture=arch)


def user_source(spec: str, channels: int, pixels: tuple[int, int], option: str = "--teacher") -> NetworkSource:
    """The source that `FILE.py:callable` names. option: where the name was given, for messages."""
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if not is_users(spec) or not name.isidentifier():
        raise UserError(f"{option} {spec}: expected {'a run folder, or ' * (option == '--teacher')}FILE.py:callable.")
    if not path.is_file():
        raise UserError(f"{path}: no such file (from {option} {spec}); expected FILE.py:callable.")
    return NetworkSource(channels, pixels, 0, file=str(path.resolve()), callable=name, sha256=sha256(path))


def user_function(spec: str, option: str) -> Callable[..., Any]:
    """The function that `FILE.py:function` names; what it raises comes as a UserError with its line."""
    source = user_source(spec, 0, (0, 0), option)
    path = Path(str(source.file))
    with _importable(path) as module:
        _run_of_the_user(path, "importing it", lambda: module.__spec__.loader.exec_module(module))
    function = getattr(module, str(source.callable), None)
    if not callable(function):
        raise UserError(f"{option} {spec}: {path} has no function of that name; name one that it has.")
    return lambda *arguments: _run_of_the_user(path, f"{source.callable}()", lambda: function(*arguments))


def _call(path: Path, name: str) -> nn.Module:
    with _importable(path) as module:
        _run_of_the_user(path, "importing it", lambda: module.__spec__.loader.exec_module(module))
        build = getattr(module, name, None)
        if not callable(build):
            raise UserError(f"{path}: has no callable named {name}.")
        needed = _needed_arguments(build)
        if needed:
            raise UserError(
                f"{path}: {name} needs arguments ({', '.join(needed)}); give a function without any that returns the "
                "network, for example `def build(): return Net(classes=10)`."
            )
        network = _run_of_the_user(path, f"{name}()", build)
    if not isinstance(network, nn.Module):
        raise UserError(f"{path}: {name}() returned {type(network).__name__}, expected a torch.nn.Module.")
    return network


@contextmanager
def _importable(path: Path) -> Iterator[Any]:
    """The module of the user's file, not yet executed; what lies beside the file can be imported in the block."""
    name = f"faqd_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    # Dataclasses and pickle look their module up there.
    sys.modules[name] = importlib.util.module_from_spec(spec)
    folder = path.parent
    _forget_namesakes(folder)
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield sys.modules[name]
    finally:
        sys.path.remove(str(folder))
        _neighbours.update({new: folder for new in set(sys.modules) - before if _lies_in(folder, new)})


def _forget_namesakes(folder: Path) -> None:
    """Let the modules in `folder` be found where another user's file imported some of the same names from beside it."""
    for name, other in list(_neighbours.items()):
        if other != folder and _lies_in(folder, name):
            sys.modules.pop(name, None)
            del _neighbours[name]


def _lies_in(folder: Path, module: str) -> bool:
    top = folder / module.partition(".")[0]
    return top.is_dir() or top.with_suffix(".py").is_file()


def _run_of_the_user(path: Path, what: str, function: Callable[[], Any]) -> Any:
    try:
        return function()
    # Whatever the user's code does; SystemExit is what argparse does on import.
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f" (line {lines[-1]})" if lines else ""
        raise UserError(
            f"{path}: {what} failed{where}: {type(error).__name__}: {first_line(error)}. Correct it and try again."
        ) from error


def _needed_arguments(build: Callable[..., Any]) -> list[str]:
    starred = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(build).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in starred]


def load_weights(network: nn.Module, path: Path, say: Callable[[str], None] = lambda _: None) -> None:
    """Fill `network` from a safetensors file, or from a .pt/.pth file that holds tensors only.

    Common wrappings are looked through; where a file holds several state dicts, `say` tells which was taken.
    UserError for a damaged file, pickled classes, values that are not finite, or another network's weights.
    """
    wanted = network.state_dict()
    state = _without_prefixes(_state_dict(path, say), set(wanted))
    missing = sorted(key for key in wanted if key not in state and not key.endswith("num_batches_tracked"))
    foreign = sorted(key for key in state if key not in wanted)
    reshaped = sorted(k for k in wanted if k in state and state[k].shape != wanted[k].shape)
    if missing or foreign or reshaped:
        problems = [
            f"{len(names)} {what} (first: {names[0]})"
            for what, names in (("missing", missing), ("unknown", foreign), ("of another shape", reshaped))
            if names
        ]
        raise UserError(
            f"{path}: these are not weights of {type(network).__name__}: {', '.join(problems)}. Give the weights that "
            "were trained with this very network."
        )
    infinite = next((key for key, value in state.items() if not value.isfinite().all()), None)
    if infinite is not None:
        raise UserError(f"{path}: {infinite} holds NaN or infinite values; give weights from before they broke down.")
    # Modules that read several versions of their own weights ask for it, and not every file keeps it.
    state = OrderedDict(state)
    state._metadata = wanted._metadata  # type: ignore[attr-defined]
    network.load_state_dict(state, strict=False)


def _without_prefixes(state: dict[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    state = {key: value for key, value in state.items() if key not in COUNTERS or key in wanted}
    while not state.keys() <= wanted:
        prefix = next((prefix for prefix in PREFIXES if all(key.startswith(prefix) for key in state)), None)
        if prefix is None:
            break
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _state_dict(path: Path, say: Callable[[str], None]) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path}: no such weights file.")
    if path.suffix == ".safetensors":
        return read_tensors(path)
    if path.suffix not in (".pt", ".pth"):
        raise UserError(f"{path}: weights are read from .safetensors, .pt or .pth files.")
    if _is_torchscript(path):
        raise UserError(
            f"{path}: a TorchScript archive, which holds code; save only its tensors: "
            f"torch.save(torch.jit.load('{path.name}').state_dict(), 'weights.pth')."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on damaged files; they end below
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: cannot be read as plain tensors; it is damaged, or it holds pickled classes, which could run "
            "code. Where the network was trained, save only its tensors: "
            "torch.save(network.state_dict(), 'weights.pth')."
        ) from error
    # A damaged file makes torch's readers raise almost anything: RuntimeError, EOFError, KeyError, struct.error.
    except Exception as error:
        raise UserError(
            f"{path}: not a readable torch file; it is damaged or cut short ({first_line(error)}). Copy it again."
        ) from error
    return _unwrapped(loaded, path, say)


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _unwrapped(loaded: Any, path: Path, say: Callable[[str], None]) -> dict[str, Tensor]:
    while isinstance(loaded, Mapping):
        found = [key for key in WRAPPINGS if isinstance(loaded.get(key), Mapping)]
        if not found:
            break
        if len(found) > 1:
            say(f"{path}: takes the weights under '{found[0]}'; the file also holds {', '.join(map(repr, found[1:]))}.")
        loaded = loaded[found[0]]
    if not isinstance(loaded, Mapping):
        raise UserError(f"{path}: holds a {type(loaded).__name__}, expected a state dict.")
    state = {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}
    if not state:
        raise UserError(f"{path}: holds no state dict; found the keys {', '.join(map(str, list(loaded)[:8]))}.")
    return state


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; UserError if it is damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or cut short ({first_line(error)}); copy or write it again.") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, whole or absent, and an OSError where it cannot be written."""
    # Clones, because safetensors refuses tensors that share memory and a network may have one module in two places.
    plain = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
    with written_beside(path) as temporary:
        # safetensors' own writer turns a full disk into an error that does not say so.
        temporary.write_bytes(safetensors_bytes(plain))
