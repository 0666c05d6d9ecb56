"""Where a float network comes from: the zoo or the user's own file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from faqd.errors import UserError
from faqd.extras import EXTRA_OF, install
from faqd.files import sha256
from faqd.train.networks.own_tensors import with_own_memory
from faqd.train.networks.program_file import SUFFIX, program_input, read_program
from faqd.train.networks.user_code import Code, code_of_module, users_function, users_network
from faqd.train.networks.zoo import build_architecture, check_architecture
from faqd.user_file import module_of

ONNX_SUFFIX = ".onnx"


@dataclass(frozen=True)
class NetworkSource:
    """Either `architecture` from the zoo, or `file` and `callable` of the user's with the file's SHA-256; a file that
    holds the network itself (torch.export.save, ONNX) has no callable. In place of the file there may be a `module`,
    found again by its name; the SHA-256 is then that of the file in it that defines the callable.

    channels, pixels: of the input. classes: width of the classifier, 0 for a user's own network, which knows it.
    program: where its run keeps it as a program with this SHA-256, for where the user's code is not; no_program: why it
    does not (`faqd.train.run.program`).
    """

    channels: int
    pixels: tuple[int, int]
    classes: int
    architecture: str | None = None
    file: str | None = None
    callable: str | None = None
    sha256: str | None = None
    module: str | None = None
    # The same network, whichever run keeps it.
    program: str | None = field(default=None, compare=False)
    program_sha256: str | None = field(default=None, compare=False)
    no_program: str | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        if self.architecture is not None:
            return self.architecture
        if self.module is not None:
            return f"{self.module}:{self.callable}"
        file = Path(str(self.file)).name
        return file if self.callable is None else f"{file}:{self.callable}"

    def build(self) -> nn.Module:
        """A freshly initialised network; UserError if the user's file changed since the run, or fails."""
        if self.architecture is not None:
            return build_architecture(self.architecture, self.channels, self.classes, max(self.pixels))
        if (kept := self._kept()) is not None:
            return read_program(kept)
        code = self.code()
        if code.sha256 != self.sha256:
            raise UserError(
                f"{code}: changed since the run was made (SHA-256 differs). Code is only imported unchanged: restore "
                "the file, or distil again with the new one."
            )
        if self.callable is None:
            return self._read(code.path)
        return with_own_memory(users_network(code, self.callable, self.example()))

    def _kept(self) -> Path | None:
        """The program in the run, where the code itself is not here as it was."""
        if self.program is None or not Path(self.program).is_file():
            return None
        try:
            if self.code().sha256 == self.sha256:
                return None
        except UserError:
            pass
        path = Path(self.program)
        if sha256(path) != self.program_sha256:
            raise UserError(f"{path}: changed since the run was made (SHA-256 differs); copy the whole folder again.")
        return path

    def _read(self, path: Path) -> nn.Module:
        if not is_onnx(str(path)):
            return read_program(path)
        network: nn.Module = _onnx_reader(path).read_onnx(path, self.channels, self.pixels)
        return network

    def code(self) -> Code:
        """Where its code is now; UserError where there is none."""
        if self.module is not None:
            return code_of_module(self.module, str(self.callable), self.name)
        path = Path(str(self.file))
        if not path.is_file():
            raise UserError(
                f"{path}: no such file; the run was made with the network in it. Put the same file there, or beside "
                f"the run, where a moved one is looked for.{self._why_not_kept()}"
            )
        return Code(path, _sha256(path))

    def _why_not_kept(self) -> str:
        return f" The run holds no program of it: {self.no_program}." if self.no_program else ""

    def example(self, batch: int = 2) -> Tensor:
        """(batch, C, H, W) zeros: for tracing and shapes only."""
        return torch.zeros(batch, self.channels, *self.pixels)

    def to_json(self) -> dict[str, Any]:
        """What the record of a run says of it, but for the program, which is that run's."""
        record = {key: value for key, value in asdict(self).items() if "program" not in key}
        return record if self.module is not None else {key: value for key, value in record.items() if key != "module"}

    @classmethod
    def from_json(cls, record: dict[str, Any], run: Path) -> NetworkSource:
        """run: the folder of the record. It may have been moved with the file, which is looked for near it then."""
        source = cls(**{**record, "pixels": tuple(record["pixels"])})
        if source.program is not None:
            source = replace(source, program=str(run / Path(source.program).name))
        return source if source.file is None else replace(source, file=_where_it_is_now(source, run))


def _where_it_is_now(source: NetworkSource, run: Path) -> str:
    """The file at its old place, else the same one beside or above the run, by its name and as many folders as fit."""
    file = str(source.file)
    if Path(file).is_file():
        return file
    parts, here = Path(file).parts[1:], run.resolve()
    for folder in (here, *here.parents):
        for start in range(len(parts)):
            found = folder.joinpath(*parts[start:])
            if found.is_file() and _is(found, source.sha256):
                return str(found)
    return file


def _is(path: Path, digest: str | None) -> bool:
    try:
        return _sha256(path) == digest
    except UserError:  # an ONNX file by that name that is damaged, or whose weights are not beside it
        return False


def is_users(spec: str) -> bool:
    """Whether `spec` has the form FILE.py:callable, module:callable, FILE.pt2 or FILE.onnx."""
    return spec.rpartition(":")[0].endswith(".py") or is_program(spec) or module_of(spec) is not None


def is_program(spec: str) -> bool:
    """Whether `spec` has the form FILE.pt2 or FILE.onnx: a network with its weights."""
    return spec.endswith(SUFFIX) or is_onnx(spec)


def is_onnx(spec: str) -> bool:
    return spec.endswith(ONNX_SUFFIX)


def onnx_input(spec: str) -> tuple[int, tuple[int, int]] | None:
    """(channels, (H, W)) of the images of FILE.onnx; None where it leaves one of them free."""
    found: tuple[int, tuple[int, int]] | None = _onnx_reader(Path(spec)).input_size(Path(spec))
    return found


def stated_input(spec: str) -> tuple[int, tuple[int, int]] | None:
    """(channels, (H, W)) that a file with the network in it states; None of other networks, and where they are free."""
    if is_onnx(spec):
        return onnx_input(spec)
    return program_input(Path(spec)) if is_program(spec) and Path(spec).is_file() else None


def _sha256(path: Path) -> str:
    """Of all that the network is in: an ONNX file may keep its weights in others."""
    return str(_onnx_reader(path).onnx_sha256(path)) if is_onnx(str(path)) else sha256(path)


def _onnx_reader(path: Path) -> Any:
    """The module that reads ONNX; who trains needs no onnx, unless it is for this."""
    try:
        from faqd.train.networks.from_onnx import read
    except ModuleNotFoundError as error:
        extra = EXTRA_OF.get(str(error.name), "onnx")
        raise UserError(f"{path}: to read it takes {error.name}; {install(extra)} brings it.") from error
    return read


def architecture_source(arch: str, channels: int, pixels: tuple[int, int], classes: int) -> NetworkSource:
    """What `--arch` names: a network of the zoo with `classes` outputs, or code of the user, which knows its own.

    UserError where there is none of that name; the user's file is not imported yet.
    """
    if is_users(arch):
        return user_source(arch, channels, pixels, "--arch")
    check_architecture(arch)
    return NetworkSource(channels, pixels, classes, architecture=arch)


def user_source(spec: str, channels: int, pixels: tuple[int, int], option: str = "--teacher") -> NetworkSource:
    """The source that FILE.py:callable, module:callable, FILE.pt2 or FILE.onnx names. option: where it was given."""
    if is_program(spec):
        path = Path(spec)
        if not path.is_file():
            raise UserError(f"{path}: no such file (from {option} {spec}).")
        return NetworkSource(channels, pixels, 0, file=str(path.resolve()), sha256=_sha256(path))
    if (named := module_of(spec)) is not None:
        code = code_of_module(*named, f"{option} {spec}")
        return NetworkSource(channels, pixels, 0, callable=named[1], sha256=code.sha256, module=named[0])
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if not is_users(spec) or not name.isidentifier():
        raise UserError(
            f"{option} {spec}: expected {'a run folder, ' * (option == '--teacher')}FILE.py:callable, module:callable, "
            "FILE.pt2 or FILE.onnx."
        )
    if not path.is_file():
        raise UserError(f"{path}: no such file (from {option} {spec}); expected FILE.py:callable.")
    return NetworkSource(channels, pixels, 0, file=str(path.resolve()), callable=name, sha256=sha256(path))


def user_function(spec: str, option: str) -> Callable[..., Any]:
    """The function that FILE.py:function or module:function names; what it raises is a UserError with its line."""
    if is_program(spec):
        raise UserError(f"{option} {spec}: expected FILE.py:function or module:function.")
    source = user_source(spec, 0, (0, 0), option)
    return users_function(source.code(), str(source.callable), f"{option} {spec}")
