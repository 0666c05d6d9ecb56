"""A folder of inputs that once ended wrongly, beside the repository; skipped where there is none."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from faqd.errors import UserError
from faqd.quantize.capture.capture import capture
from faqd.quantize.config import QuantConfig
from faqd.quantize.outputs import named_outputs
from faqd.quantize.placement import place
from faqd.train.data.datasets import load_dataset
from faqd.train.data.options import DataOptions
from faqd.train.networks.load_weights import load_weights
from faqd.train.networks.source import user_source

CASES = Path(__file__).resolve().parents[3] / "shared" / "cases"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="no folder of cases beside the repository")


def _functions(file: str) -> list[str]:
    if not CASES.is_dir():
        return []
    lines = (CASES / file).read_text(encoding="utf-8").splitlines()
    return [line[4 : line.index("(")] for line in lines if line.startswith("def ") and "():" in line]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", _functions("networks.py"))
def test_a_network_is_captured_and_has_its_quantizers(name: str) -> None:
    source = user_source(f"{CASES / 'networks.py'}:{name}", 3, (32, 32))
    traced = capture(source.build(), source.example())
    place(traced, QuantConfig(8, 8))
    assert not any(getattr(module, "ceil_mode", False) for module in traced.modules())


@pytest.mark.parametrize(
    "name", ["outputs_named_input", "outputs_same_name_in_nest", "exported", "lazy", "data_parallel", "averaged"]
)
@pytest.mark.filterwarnings("ignore")
def test_a_habit_is_taken(name: str) -> None:
    source = user_source(f"{CASES / 'habits.py'}:{name}", 3, (32, 32))
    network = source.build()
    names = list(named_outputs(network.eval()(source.example())))
    assert "input" not in names and len(names) == (2 if name.startswith("outputs") else 1)
    place(capture(network, source.example()), QuantConfig(8, 8))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the makers write."""
    folder = tmp_path_factory.mktemp("files")
    for maker in ("weights_files.py", "images.py"):
        made = subprocess.run(
            [sys.executable, "-W", "ignore", CASES / maker], cwd=folder, capture_output=True, text=True
        )
        assert made.returncode == 0, made.stderr
    return folder


REFUSED = {
    "complex.pth": "backbone.0.weight is complex64",
    "int8w.pth": "backbone.0.weight is int8",
    "lightning_hparams_ns.pth": "argparse.Namespace",
    "list.pth": "holds a list",
    "meta.pth": "meta device",
    "mmcv_ema_in_state.pth": "unknown (first: ema_",
    "module.pth": "weights_net.Net",
    "numpy_array.pth": "numpy._core.multiarray",
    "numpy_scalar.pth": "numpy._core.multiarray.scalar",
    "prune.pth": "1 missing (first: head.weight)",
    "qat.pth": "2 unknown",
    "qint8.pth": "quantized (qint8)",
    "sparse.pth": "sparse coo",
    "tied_differ.pth": "hold different values",
    "timm_ema.pth": "argparse.Namespace",
}


def _networks() -> Any:
    spec = importlib.util.spec_from_file_location("weights_net", CASES / "weights_net.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_file_of_weights_loads_or_is_refused_by_its_own_sentence(files: Path) -> None:
    build: Callable[[], nn.Module]
    seen = 0
    for file in sorted(path for path in files.iterdir() if path.is_file()):
        build = _networks().tied if file.name.startswith("tied") else _networks().build
        if file.name not in REFUSED:
            network = build()
            before = [value.clone() for value in network.parameters()]
            load_weights(network, file)
            assert not all(map(torch.equal, before, network.parameters())), file
        else:
            with pytest.raises(UserError) as refused:
                load_weights(build(), file)
            assert REFUSED[file.name] in str(refused.value)
        seen += 1
    assert seen >= 40


@pytest.mark.parametrize(
    ("folder", "words"),
    [("phone", None), ("huge", "2 of 112 images have more than 178,956,970 pixels"), ("latin1", None)],
)
def test_a_folder_of_pictures(folder: str, words: str | None, files: Path) -> None:
    options = DataOptions(f"folder:{os.fspath(files / folder)}", image_size=(32, 48), mean="none", std="none")
    if words is None:
        assert load_dataset(options, with_labels=False).skipped == ()
        return
    with pytest.raises(UserError, match=words):
        load_dataset(options, with_labels=False)
