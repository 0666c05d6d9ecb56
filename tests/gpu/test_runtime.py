"""Engines really run on the GPU of this machine."""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from faqd.deploy.board.selftest import selftest
from faqd.deploy.cuda import cuda
from faqd.deploy.engine.build import engine_from_onnx
from faqd.deploy.engine.options import BuildOptions
from faqd.deploy.runtime.runtime import load_engine
from faqd.errors import UserError

onnx = pytest.importorskip("onnx", reason="the test network is made with onnx (pip install 'faqd[onnx]')")

from tests.fixtures.qdq_network import SHAPE, residual_network, written  # noqa: E402

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
    if importlib.util.find_spec(backend.removesuffix("-bindings")) is None:
        pytest.skip(f"{backend} is not installed")
    return backend


def test_both_back_ends_give_equal_outputs(engine: Path) -> None:
    bindings, pycuda = installed("cuda-bindings"), installed("pycuda")
    x = images()
    np.testing.assert_array_equal(outputs(engine, x, backend=bindings), outputs(engine, x, backend=pycuda))


def test_the_engine_agrees_with_onnxruntime(engine: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the reference is onnxruntime (pip install 'faqd[onnx]')")
    from faqd.deploy.onnx_model.session import OnnxSession

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


@pytest.mark.parametrize("backend", ["cuda-bindings", "pycuda"])
def test_zero_copy_gives_equal_outputs_where_memory_is_shared(engine: Path, backend: str) -> None:
    x = images()
    with contextlib.closing(cuda.open_cuda(installed(backend))) as gpu:
        shared = gpu.shares_memory()
    if not shared:
        with pytest.raises(UserError, match="zero copy is for GPUs that share the host's memory"):
            outputs(engine, x, backend=backend, zero_copy=True)
        return
    np.testing.assert_array_equal(outputs(engine, x, backend=backend, zero_copy=True), outputs(engine, x))


def test_pycuda_launches_plainly_and_says_so(engine: Path) -> None:
    backend = installed("pycuda")
    with (
        load_engine(engine, backend=backend, graph=True) as loaded,
        pytest.warns(UserWarning, match="no CUDA graph"),
    ):
        loaded.run({"images": images()})


@pytest.mark.parametrize("graph", [False, True])
def test_timing(engine: Path, graph: bool) -> None:
    with warnings.catch_warnings(), load_engine(engine) as loaded:
        warnings.simplefilter("ignore", UserWarning)
        with loaded.pipeline({"images": images()}, slots=2, graph=graph) as pipeline:
            pipeline.submit()
            for _ in range(5):
                pipeline.submit()
                timing = pipeline.collect()
    assert min(timing.enqueue_ms, timing.h2d_ms, timing.compute_ms, timing.d2h_ms) > 0
    assert timing.latency_ms == timing.h2d_ms + timing.compute_ms + timing.d2h_ms


BACKENDS = ["cuda-bindings", "pycuda"]


def free_bytes(backend: str) -> int:
    with contextlib.closing(cuda.open_cuda(backend)) as gpu:
        driver: Any = gpu._driver  # type: ignore[attr-defined]
        return int(driver.cuMemGetInfo()[1] if backend == "cuda-bindings" else driver.mem_get_info()[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_thousand_queries_of_changing_shapes_take_no_memory(engine: Path, backend: str) -> None:
    x = images(16)
    with load_engine(engine, backend=installed(backend), graph=backend == "cuda-bindings") as loaded:
        left = []
        for i in range(1000):
            loaded.run({"images": x[: 1 + i % 5]})
            if i % 5 == 4:
                left.append(free_bytes(backend))
        assert min(left[100:]) >= left[10], "bytes free after each round of five shapes"


@pytest.mark.parametrize("backend", BACKENDS)
def test_loading_again_and_again_takes_no_memory(engine: Path, backend: str) -> None:
    installed(backend)
    # Another user keeps the context, which itself takes memory, alive all the time.
    with contextlib.closing(cuda.open_cuda(backend)):
        left = []
        for _ in range(20):
            outputs(engine, images(), backend=backend)
            left.append(free_bytes(backend))
    assert left[-1] >= left[4] - (4 << 20), left


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_failing_query_is_a_sentence_and_the_next_one_runs(engine: Path, backend: str) -> None:
    x = images()
    with load_engine(engine, backend=installed(backend)) as loaded:
        expected = loaded.run({"images": x})["classifier"]
        with pytest.raises(UserError, match=r"^CUDA: cuMemAlloc failed: .*out of memory.*smaller batch"):
            loaded.cuda.allocate(1 << 50)
        with pytest.raises(UserError, match="input images is float32; it was given float64"):
            loaded.run({"images": x.astype(np.float64)})
        np.testing.assert_array_equal(loaded.run({"images": x})["classifier"], expected)


def test_an_engine_with_damaged_bytes_is_a_sentence(engine: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "net.engine"
    damaged.write_bytes(engine.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"net\.engine: TensorRT.* does not load it: .+build-engine") as caught:
        load_engine(damaged, trust=True)
    assert caught.value.exit_code == 1


def test_every_case_that_faqd_relies_on_is_right_here() -> None:
    lines: list[str] = []
    record = selftest(None, None, lines.append)
    assert record["summary"]["run"]
    assert record["summary"]["broken"] == [], "\n".join(lines)
