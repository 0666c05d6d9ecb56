"""Engines really run on the GPU of this machine."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from faqd.deploy import cuda
from faqd.deploy.build_options import BuildOptions
from faqd.deploy.engine import engine_from_onnx
from faqd.deploy.runtime import load_engine
from faqd.errors import UserError

onnx = pytest.importorskip("onnx", reason="the test network is made with onnx (pip install 'faqd[onnx]')")

from tests.qdq_network import SHAPE, residual_network, written  # noqa: E402

DEVICE, WHY = cuda.device_or_none()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DEVICE is None, reason=f"no GPU: {WHY}")]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("engine")
    path = folder / "net.engine"
    engine_from_onnx(
        written(residual_network(), folder / "net.onnx"), path, BuildOptions(max_shapes={"images": (16, *SHAPE)}), print
    )
    yield path


def images(n: int = 8) -> NDArray[np.float32]:
    # Twice the range of the input scale: values beyond the clip are part of what must agree.
    return np.random.default_rng(3).normal(0, 2.5, (n, *SHAPE)).astype(np.float32)


def outputs(engine: Path, feeds: NDArray[np.float32], **options: Any) -> NDArray[Any]:
    with load_engine(engine, **options) as loaded:
        return loaded.run({"images": feeds})["classifier"]


def installed(backend: str) -> str:
    device, why = cuda.device_or_none(backend)
    if device is None:
        pytest.skip(f"{backend}: {why}")
    return backend


def test_both_back_ends_give_equal_outputs(engine: Path) -> None:
    bindings, pycuda = installed("cuda-bindings"), installed("pycuda")
    x = images()
    np.testing.assert_array_equal(outputs(engine, x, backend=bindings), outputs(engine, x, backend=pycuda))


def test_the_engine_agrees_with_onnxruntime(engine: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the reference is onnxruntime (pip install 'faqd[onnx]')")
    from faqd.deploy.onnx_session import OnnxSession

    x = images(16)
    expected = OnnxSession(engine.with_suffix(".onnx"), optimise=False).run({"images": x})["classifier"]
    found = outputs(engine, x)
    assert len(set(expected.argmax(1))) > 1
    np.testing.assert_array_equal(found.argmax(1), expected.argmax(1))
    error = np.square(found - expected).mean() / np.square(expected).mean()
    assert 10 * np.log10(1 / max(float(error), 1e-12)) > 30  # dB


def test_every_batch_size_of_the_profile_and_no_other(engine: Path) -> None:
    x = images(16)
    with load_engine(engine) as loaded:
        assert loaded.inputs == {"images": ((-1, *SHAPE), np.dtype(np.float32))}
        whole = loaded.run({"images": x})["classifier"]
        for n in (1, 5, 16, 1):
            part = loaded.run({"images": x[:n]})["classifier"]
            np.testing.assert_allclose(part, whole[:n], rtol=1e-4, atol=1e-5)
        with pytest.raises(UserError, match="Build the engine again with other batch sizes"):
            loaded.run({"images": images(17)})


def test_a_cuda_graph_gives_equal_outputs(engine: Path) -> None:
    backend, x = installed("cuda-bindings"), images()
    with load_engine(engine, backend=backend, graph=True) as loaded:
        for n in (8, 3, 8):
            np.testing.assert_array_equal(loaded.run({"images": x[:n]})["classifier"], outputs(engine, x[:n]))


def test_pycuda_launches_plainly_and_says_so(engine: Path) -> None:
    backend = installed("pycuda")
    with (
        load_engine(engine, backend=backend, graph=True) as loaded,
        pytest.warns(UserWarning, match="no CUDA graph"),
    ):
        loaded.run({"images": images()})


@pytest.mark.parametrize("graph", [False, True])
def test_timing(engine: Path, graph: bool) -> None:
    with warnings.catch_warnings(), load_engine(engine, graph=graph) as loaded:
        warnings.simplefilter("ignore", UserWarning)
        timing = [loaded.timed({"images": images()}) for _ in range(5)][-1]
    assert min(timing.enqueue_ms, timing.h2d_ms, timing.compute_ms, timing.d2h_ms) > 0
    assert timing.latency_ms == timing.h2d_ms + timing.compute_ms + timing.d2h_ms
