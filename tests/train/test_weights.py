"""Files of weights as training scripts leave them: each loads as what it is, or is refused by a true sentence."""

from __future__ import annotations

import argparse
import gzip
import pickle
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

from faqd.errors import UserError
from faqd.train.networks.load_weights import load_weights

State = dict[str, Tensor]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))  # type: ignore[no-any-return]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight


def state_of(network: nn.Module, seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.rand(value.shape, generator=generator) if value.is_floating_point() else value.clone()
        for key, value in network.state_dict().items()
    }


PARTS = ("backbone", "head")
WANTED, WORSE = state_of(Net(), 1), state_of(Net(), 2)


def under(prefix: str, state: State = WANTED) -> State:
    return {prefix + key: value for key, value in state.items()}


def kernels(change: Callable[[Tensor], Tensor]) -> State:
    return {key: change(value) if value.dim() == 4 else value for key, value in WANTED.items()}


LOADS: dict[str, tuple[Any, str]] = {
    "plain": (WANTED, ""),
    "averaged before the last": (
        {"model": under("module.", WORSE), "ema": {"module": WANTED, "updates": 3}},
        "'model'",
    ),
    "averaged in part": (
        {"model": WANTED, "ema": {key: value * 2 for key, value in WORSE.items() if "running" not in key}},
        "leaves out what lies under 'ema', which has not all weights",
    ),
    "averaged only": ({"ema": {"module": WANTED, "updates": 3}}, ""),
    "params_ema": ({"params": WORSE, "params_ema": WANTED}, "takes the weights under 'params_ema'"),
    "module": ({"module": WANTED, "ds_version": "0.15"}, ""),
    "model_state beside the optimizer": (
        {"model_state": WANTED, "optimizer_state": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}},
        "",
    ),
    "a key of the user's own": ({"generator": WANTED, "discriminator": {"a.weight": torch.ones(2)}}, ""),
    "the first wrapping is of another network": ({"ema": {"a.weight": torch.ones(2)}, "model": WANTED}, ""),
    "a nest": ({"state": {"model": {"net": WANTED}}, "epoch": 3}, ""),
    "Lightning with a criterion": (
        {"state_dict": {**under("model."), "criterion.pos_weight": torch.ones(4)}},
        "leaves out criterion.pos_weight",
    ),
    "a student beside its teacher": (
        {**under("student."), **under("teacher.", WORSE)},
        "takes the weights under 'student.' and leaves out teacher.backbone.0.weight",
    ),
    "wrapper inside": ({key.replace("backbone.", "backbone._orig_mod."): v for key, v in WANTED.items()}, ""),
    "wrappers everywhere": ({"state_dict": under("model._orig_mod.module.")}, ""),
    "sharded": (under("_fsdp_wrapped_module."), ""),
    "checkpointed": (
        {k.replace("backbone.", "backbone._checkpoint_wrapped_module."): v for k, v in WANTED.items()},
        "",
    ),
    "an averaged model": ({"n_averaged": torch.tensor(5), **under("module.")}, "w.pth: leaves out n_averaged."),
    "a list of networks": (
        {"models": [WANTED, WORSE]},
        "takes the weights under 'models.0'; the file also holds 'models.1'",
    ),
    "a pair": ((WANTED, {"lr": 0.1}), ""),
    "numbers beside the weights": (
        {**WANTED, "epoch": torch.tensor(3), "logit_scale": torch.ones(1)},
        "leaves out epoch, logit_scale",
    ),
    "in parts": (
        {part: {k.partition(".")[2]: v for k, v in WANTED.items() if k.startswith(part)} for part in PARTS},
        "",
    ),
    "averaged beside the last, by prefix": (
        {**under("model.", WORSE), **under("ema_model.")},
        "takes the weights under 'ema_model.' and leaves out model.backbone.0.weight",
    ),
    "averaged without names": ({"model": WANTED, "ema": {"shadow_params": [torch.ones(2)]}}, "is no state dict"),
    "doubles": ({key: v.double() if v.is_floating_point() else v for key, v in WANTED.items()}, ""),
    "counters as floats": ({key: v.float() for key, v in WANTED.items()}, ""),
    "without counters": ({key: v for key, v in WANTED.items() if "num_batches" not in key}, ""),
}


@pytest.mark.parametrize("kind", LOADS)
def test_loads(kind: str, tmp_path: Path) -> None:
    file, words = LOADS[kind]
    said: list[str] = []
    torch.save(file, tmp_path / "w.pth")
    network = Net()
    load_weights(network, tmp_path / "w.pth", said.append)
    assert all(torch.equal(value, WANTED[key]) for key, value in network.state_dict().items())
    assert len(said) == bool(words) and all(words in text for text in said), said


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16])
def test_narrow_floats_are_widened(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.save(kernels(lambda value: value.to(dtype)), tmp_path / "w.pth")
    network = Net()
    load_weights(network, tmp_path / "w.pth")
    assert torch.equal(network.head.weight, WANTED["head.weight"].to(dtype).float())


@pytest.mark.parametrize("wrapped", [nn.DataParallel, torch.optim.swa_utils.AveragedModel])
def test_a_network_in_a_wrapper_takes_plain_weights(wrapped: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    torch.save(WANTED, tmp_path / "w.pth")
    network = wrapped(Net())
    load_weights(network, tmp_path / "w.pth")
    assert torch.equal(network.state_dict()["module.head.weight"], WANTED["head.weight"])


def quantized(value: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such tensors are old, their files are still about
        return torch.quantize_per_tensor(value, 0.01, 0, torch.qint8)


def whole_counter() -> State:
    return {**WANTED, "backbone.1.num_batches_tracked": torch.tensor(2.5)}


REFUSED: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "int8": (lambda: kernels(lambda v: (v * 100).to(torch.int8)), ["backbone.0.weight is int8", "float32"]),
    "bool": (lambda: kernels(lambda v: v > 0.5), ["backbone.0.weight is bool"]),
    "complex": (lambda: kernels(lambda v: v.to(torch.complex64)), ["backbone.0.weight is complex64"]),
    "quantized": (lambda: kernels(quantized), ["backbone.0.weight is quantized (qint8)"]),
    "sparse": (lambda: kernels(lambda v: v.to_sparse()), ["backbone.0.weight is a sparse coo tensor"]),
    "meta": (lambda: kernels(lambda v: v.to("meta")), ["backbone.0.weight", "meta device"]),
    "a count that is none": (whole_counter, ["num_batches_tracked is float32", "int64"]),
    "beyond float32": (lambda: kernels(lambda v: v.double() * 1e300), ["backbone.0.weight holds NaN or infinite"]),
    "pruned": (
        lambda: {**{k: v for k, v in WANTED.items() if k != "head.weight"}, "head.weight_orig": WANTED["head.weight"]},
        ["1 missing (first: head.weight)", "1 unknown (first: head.weight_orig)"],
    ),
    "another layer under the prefix": (
        lambda: under("model.", {**WANTED, "neck.weight": torch.ones(2)}),
        ["1 unknown (first: model.neck.weight)"],
    ),
    "a class": (lambda: {"state_dict": WANTED, "args": argparse.Namespace(lr=0.1)}, ["(argparse.Namespace)"]),
    "a negative variance": (
        lambda: {**WANTED, "backbone.1.running_var": -WANTED["backbone.1.running_var"]},
        ["backbone.1.running_var holds negative values"],
    ),
    "lazy modules that never ran": (
        lambda: nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU()).state_dict(),
        ["weights of a lazy module that never ran"],
    ),
    "lazy buffers that never ran": (
        lambda: {"norm.running_mean": nn.LazyBatchNorm2d().running_mean, "a.weight": torch.ones(2)},
        ["weights of a lazy module that never ran"],
    ),
    "nothing": (dict, ["an empty state dict"]),
    "nothing in a wrapping": (lambda: {"state_dict": {}}, ["no state dict", "state_dict"]),
    "nested": (
        lambda: {**WANTED, "head.bias": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])},
        ["head.bias is a nested tensor"],
    ),
    "of before its weight norm was removed": (
        lambda: {**{k: v for k, v in WANTED.items() if k != "head.weight"}, "head.weight_g": WANTED["head.weight"]},
        ["1 missing (first: head.weight)", "of before a weight norm"],
    ),
    "no tensor": (lambda: {"epoch": 3, "optimizer": {}}, ["no state dict", "epoch, optimizer"]),
    "a list": (lambda: list(WANTED.values()), ["holds a list"]),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_is_refused(kind: str, tmp_path: Path) -> None:
    make, words = REFUSED[kind]
    torch.save(make(), tmp_path / "w.pth")
    with pytest.raises(UserError) as refused:
        load_weights(Net(), tmp_path / "w.pth")
    assert all(word in str(refused.value) for word in ["w.pth", *words]), refused.value


def a_program(path: Path) -> None:
    torch.export.save(torch.export.export(Net().eval(), (torch.zeros(2, 3, 8, 8),)), path)


def an_archive(path: Path, member: str = "weights/readme.txt") -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, "see elsewhere")


def arrays(path: Path) -> None:
    with path.open("wb") as stream:  # numpy would add its own suffix to a path
        np.savez(stream, weight=WANTED["head.weight"].numpy())


def a_tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("weights.pth"))


def an_onnx_file(path: Path) -> None:
    graph = onnx.helper.make_graph([], "net", [], [])
    path.write_bytes(onnx.helper.make_model(graph, producer_name="pytorch").SerializeToString())


def cut_short(path: Path) -> None:
    torch.save(WANTED, path)
    path.write_bytes(path.read_bytes()[:-600])


def a_distributed_checkpoint(path: Path) -> None:
    path.mkdir()
    (path / "__0_0.distcp").write_bytes(b"PK")


def with_a_flipped_bit(path: Path) -> None:
    torch.save(WANTED, path)
    content = bytearray(path.read_bytes())
    content[content.index(WANTED["head.weight"].numpy().tobytes()) + 3] ^= 1
    path.write_bytes(content)


OTHER_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a program of torch.export": (a_program, "a program of torch.export"),
    "TorchScript": (lambda path: torch.jit.save(torch.jit.script(Net()), path), "a TorchScript archive"),
    "a web page": (lambda path: path.write_text("\n<!DOCTYPE html>\n<html><body>Not found"), "a web page"),
    "an error in XML": (lambda path: path.write_text("<?xml version='1.0'?><Error>AccessDenied"), "a web page"),
    "Git LFS": (
        lambda path: path.write_text(
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"
        ),
        "a pointer of Git LFS",
    ),
    "git-annex": (lambda path: path.write_text("/annex/objects/SHA256E-s9--0.pth\n"), "a pointer of git-annex"),
    "an answer in JSON": (
        lambda path: path.write_text('{"error": "Repository not found"}'),
        'a text, which begins with \'{"error"',
    ),
    "words": (lambda path: path.write_text("moved to another place"), "a text, which begins with 'moved"),
    "a long text": (lambda path: path.write_text("ä word " * 500), "a text, which begins with 'ä word"),
    "a folder": (lambda path: path.mkdir(), "a folder"),
    "a picture": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(200)), "a picture"),
    "a document": (lambda path: path.write_bytes(b"%PDF-1.7" + bytes(200)), "a PDF document"),
    "a tar archive": (a_tar, "a tar archive"),
    "UTF-16": (lambda path: path.write_text("moved", encoding="utf-16"), "a text in UTF-16"),
    "a page with a mark": (lambda path: path.write_text("<html>Not found", encoding="utf-8-sig"), "a web page"),
    "a text cut in a letter": (lambda path: path.write_bytes(("ä" * 300).encode()[1:]), "damaged"),
    "an index": (
        lambda path: path.write_text('{"metadata": {}, "weight_map": {"a": "w-00001-of-00002.safetensors"}}'),
        "the index of weights in several files",
    ),
    "no bytes": (lambda path: path.write_bytes(b""), "empty, 0 bytes"),
    "gzip": (lambda path: path.write_bytes(gzip.compress(b"weights")), "a compressed file"),
    "a zip of other things": (an_archive, "a zip archive, of weights/readme.txt"),
    "HDF5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(200)), "an HDF5 file"),
    "one array": (lambda path: path.write_bytes(b"\x93NUMPY\x01\x00" + bytes(200)), "a numpy array"),
    "an npz file": (arrays, "an npz file"),
    "an ONNX file": (an_onnx_file, "an ONNX file"),
    "a distributed checkpoint": (
        a_distributed_checkpoint,
        "dcp_to_torch_save",
    ),
    "a plain pickle": (lambda path: path.write_bytes(pickle.dumps({"a": Path("b")}, 4)), "(pathlib"),
    "an old pickle": (
        lambda path: path.write_bytes(pickle.dumps({"a": argparse.Namespace()}, 2)),
        "argparse.Namespace",
    ),
    "cut short": (cut_short, "damaged or cut short"),
    "a flipped bit": (with_a_flipped_bit, "damaged, "),
    "noise": (lambda path: path.write_bytes(bytes(range(128, 256)) * 4), "damaged"),
}


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "w.pt2", "weights"])
@pytest.mark.parametrize("kind", OTHER_FILES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_another_file_is_called_what_it_is(kind: str, name: str, tmp_path: Path) -> None:
    make, words = OTHER_FILES[kind]
    path = tmp_path / name
    make(path)
    with pytest.raises(UserError) as refused:
        load_weights(Net(), path)
    assert str(refused.value).startswith(f"{path}: ") and words in str(refused.value), refused.value


def without_checksums(path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    torch.save(WANTED, path)
    torch.serialization.set_crc32_options(True)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "w.bin", "w.weights", "w"])
@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(save(WANTED)),
        lambda path: torch.save(WANTED, path),
        lambda path: torch.save(WANTED, path, _use_new_zipfile_serialization=False),
        without_checksums,
    ],
    ids=["safetensors", "torch.save", "torch.save of before 1.6", "torch.save without checksums"],
)
def test_weights_are_read_under_any_name(write: Callable[[Path], Any], name: str, tmp_path: Path) -> None:
    write(tmp_path / name)
    network = Net()
    load_weights(network, tmp_path / name)
    assert torch.equal(network.head.weight, WANTED["head.weight"])


def test_a_parameter_with_the_name_of_a_counter_is_a_weight(tmp_path: Path) -> None:
    network = nn.Linear(2, 2)
    network.register_parameter("steps", nn.Parameter(torch.ones(3)))
    torch.save({key: value for key, value in network.state_dict().items() if key != "steps"}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"1 missing \(first: steps\)"):
        load_weights(network, tmp_path / "w.pth")
