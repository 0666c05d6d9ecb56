"""What only a builder with a GPU at hand can show: timing caches, version-compatible engines, a content doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from faqd.deploy.board.doctor import examine
from faqd.deploy.cuda import cuda
from faqd.deploy.engine.build import engine_from_onnx
from faqd.deploy.engine.options import BuildOptions
from faqd.deploy.engine.trt import TensorRT, flavour
from faqd.deploy.runtime.runtime import load_engine
from faqd.errors import UserError

onnx = pytest.importorskip("onnx", reason="the test network is made with onnx (pip install 'faqd[onnx]')")

from tests.fixtures.qdq_network import SHAPE, residual_network, written  # noqa: E402

DEVICE, WHY = cuda.device_or_none()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DEVICE is None, reason=f"no GPU: {WHY}")]

needs_full = pytest.mark.skipif(
    not isinstance(flavour("tensorrt"), TensorRT), reason="the full TensorRT is not installed"
)


def build(folder: Path, **options: Any) -> Path:
    source = written(residual_network(), folder / "net.onnx")
    engine_from_onnx(source, folder / "net.engine", BuildOptions(**options), lambda line: None)
    return folder / "net.engine"


def test_the_doctor_lets_pass_what_was_built_here(tmp_path: Path) -> None:
    assert {finding.status for finding in examine(build(tmp_path))} <= {"good", "doubtful"}


@needs_full
def test_a_frozen_timing_cache_fails_on_a_miss_and_stays(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    build(tmp_path, timing_cache=cache)
    kept = cache.read_bytes()
    assert kept
    build(tmp_path, timing_cache=cache, frozen_timing_cache=True)
    with pytest.raises(UserError) as caught:
        build(tmp_path, timing_cache=cache, frozen_timing_cache=True, max_shapes={"images": (512, *SHAPE)})
    assert caught.value.exit_code == 1
    assert cache.read_bytes() == kept


@needs_full
def test_a_version_compatible_engine_loads_and_runs(tmp_path: Path) -> None:
    with load_engine(build(tmp_path, version_compatible=True)) as engine:
        found = engine.run({"images": np.zeros((1, *SHAPE), np.float32)})
    assert np.isfinite(found["classifier"]).all()
