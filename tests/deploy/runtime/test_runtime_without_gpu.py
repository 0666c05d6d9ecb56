"""The runtime's own decisions, on a GPU made of Python: what is bound, in which order it runs, who frees what."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from faqd.deploy.runtime.runtime import Engine, load_engine
from faqd.errors import UserError
from tests.fixtures.fake_gpu import (
    TYPES,
    FakeContext,
    FakeEngine,
    FakeNetwork,
    FakeTensorRT,
    Io,
    Kind,
    Layout,
    Mode,
    Place,
    engine_file,
    fake_gpu,
)

QUERY = ["copy_in", "copy_in", "execute", "copy_out", "copy_out", "synchronize"]


def weighted(**fails: Any) -> FakeNetwork:
    """Two inputs, of which one has a free batch, and two outputs of other types."""
    return FakeNetwork(
        [
            Io("images", Mode.INPUT, (-1, 3), low=(1, 3), high=(8, 3)),
            Io("count", Mode.OUTPUT, (1,), Kind.INT64),
            Io("weight", Mode.INPUT, (3,), Kind.HALF),
            Io("scores", Mode.OUTPUT, (-1,)),
        ],
        compute=lambda images, weight: {
            "scores": (images @ weight.astype(np.float32)).astype(np.float32),
            "count": np.asarray([len(images)], np.int64),
        },
        shapes=lambda images, weight: {"scores": images[:1], "count": (1,)},
        **fails,
    )


def feeds(n: int = 4) -> dict[str, Any]:
    images = np.arange(3 * n, dtype=np.float32).reshape(n, 3)
    return {"weight": np.asarray([1, 2, 3], np.float16), "images": images}


SCORES = [8, 26, 44, 62]
"""Of feeds(4)."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return engine_file(tmp_path)


@pytest.mark.parametrize("graph", [False, True])
def test_tensors_are_bound_by_name_and_outputs_are_new_arrays(
    path: Path, monkeypatch: pytest.MonkeyPatch, graph: bool
) -> None:
    with fake_gpu(weighted(), monkeypatch) as cuda, load_engine(path, trust=True, graph=graph) as engine:
        assert engine.inputs == {"images": ((-1, 3), np.dtype(np.float32)), "weight": ((3,), np.dtype(np.float16))}
        assert engine.outputs == {"count": ((1,), np.dtype(np.int64)), "scores": ((-1,), np.dtype(np.float32))}
        first = engine.run(feeds(4))
        second = engine.run(feeds(2))
        np.testing.assert_array_equal(first["scores"], SCORES)
        np.testing.assert_array_equal(second["scores"], first["scores"][:2])
        assert [int(first["count"][0]), int(second["count"][0])] == [4, 2]
        assert first["count"].dtype == np.int64 and first["scores"].dtype == np.float32
    assert cuda.held() == {} and cuda.closed


def test_a_query_copies_runs_copies_back_and_waits(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_gpu(weighted(), monkeypatch) as cuda, load_engine(path, trust=True) as engine:
        engine.run(feeds())
        cuda.log.clear()
        engine.run(feeds())
        assert cuda.log == QUERY, "nothing is allocated when the shapes stay"


def test_a_graph_is_captured_once_per_shape_after_a_plain_launch(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_gpu(weighted(), monkeypatch) as cuda, load_engine(path, trust=True, graph=True) as engine:
        engine.run(feeds(4))
        launches = [call for call in cuda.log if call in ("execute", "capture", "launch", "synchronize")]
        assert launches == ["execute", "synchronize", "capture", "execute", "launch", "synchronize"]
        cuda.log.clear()
        engine.run(feeds(4))
        assert cuda.log == [call if call != "execute" else "launch" for call in QUERY]
        engine.run(feeds(2))
        assert cuda.log.count("capture") == cuda.log.count("free_graph") == 1
    assert cuda.held() == {}


@pytest.mark.parametrize("by", ["TensorRT", "CUDA"])
def test_where_capture_fails_kernels_are_launched_one_by_one_with_a_warning(
    path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    network = weighted(fails={"capture"} if by == "TensorRT" else set())
    with fake_gpu(network, monkeypatch) as cuda, load_engine(path, trust=True, graph=True) as engine:
        cuda.fails = {"capture": "CUDA: cuStreamEndCapture failed"} if by == "CUDA" else {}
        with pytest.warns(UserWarning, match=r"net\.engine: no CUDA graph, kernels are launched one by one") as caught:
            found = engine.run(feeds())
        assert caught[0].filename == __file__, "the warning points at the caller"
        np.testing.assert_array_equal(found["scores"], SCORES)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            engine.run(feeds(2))
    assert cuda.held() == {}


def without_copies(arrays: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {name: value for name, value in (arrays | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"weight": None}, r"takes images, weight; it was given images\."),
        ({"logits": np.zeros(1)}, r"takes images, weight; it was given .*logits"),
        ({"images": np.zeros((2, 3))}, r"input images is float32; it was given float64\. Convert it"),
        ({"images": np.zeros((2, 3), ">f4")}, r"input images is float32; it was given >f4"),
        ({"images": [[1.0, 2.0, 3.0]]}, r"input images is a list; give a numpy array"),
        ({"images": np.zeros((2, 4), np.float32)}, r"takes \[1, 3\] to \[8, 3\]; it was given \[2, 4\]\. Build"),
        ({"images": np.zeros((9, 3), np.float32)}, r"takes \[1, 3\] to \[8, 3\]; it was given \[9, 3\]"),
        ({"images": np.zeros((0, 3), np.float32)}, r"it was given \[0, 3\]"),
        ({"images": np.zeros(3, np.float32)}, r"it was given \[3\]"),
        ({"weight": np.zeros(4, np.float16)}, r"input weight takes \[3\]; it was given \[4\]\.$"),
    ],
)
def test_arrays_that_are_not_the_engines_end_in_a_sentence(
    path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], says: str
) -> None:
    with fake_gpu(weighted(), monkeypatch) as cuda, load_engine(path, trust=True) as engine:
        before = engine.run(feeds())
        cuda.log.clear()
        with pytest.raises(UserError, match=rf"^net\.engine: .*{says}"):
            engine.run(without_copies(feeds(), **changes))
        assert cuda.log == []
        np.testing.assert_array_equal(engine.run(feeds())["scores"], before["scores"])


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind in TYPES])
def test_every_type_and_any_memory_layout_go_through_unchanged(
    path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    shape = (2, 3, 5)
    network = FakeNetwork(
        [Io("x", Mode.INPUT, shape, kind), Io("y", Mode.OUTPUT, shape, kind), Io("scalar", Mode.OUTPUT, (), kind)],
        compute=lambda x: {"y": x, "scalar": x[1, 2, 4]},
        shapes=lambda x: {"y": shape, "scalar": ()},
    )
    base: NDArray[Any] = np.random.default_rng(0).integers(-100, 100, (5, 2, 6)).astype(TYPES[kind])
    moved = base.transpose(1, 2, 0)
    layouts = [moved[:, ::2], np.asfortranarray(moved[:, 1::2]), np.broadcast_to(base[0, 0, :5], shape)]
    with fake_gpu(network, monkeypatch), load_engine(path, trust=True) as engine:
        for x in layouts:
            assert x.shape == shape and not x.flags.c_contiguous
            found = engine.run({"x": x})
            np.testing.assert_array_equal(found["y"], x)
            assert found["y"].dtype == TYPES[kind] and found["scalar"].shape == () and found["scalar"] == x[1, 2, 4]


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (Io("x", Mode.INPUT, (1,), Kind.BF16), "tensor x is BF16, which numpy does not hold"),
        (Io("x", Mode.INPUT, (1,), layout=Layout.CHW32), "tensor x is CHW32 on the device"),
        (Io("x", Mode.INPUT, (1,), place=Place.HOST), "tensor x is LINEAR on the host"),
    ],
)
def test_tensors_that_are_no_plain_arrays_on_the_device_are_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch, tensor: Io, says: str
) -> None:
    network = FakeNetwork([tensor], lambda x: {}, lambda x: {})
    with fake_gpu(network, monkeypatch) as cuda, pytest.raises(UserError, match=rf"net\.engine: {says}"):
        load_engine(path, trust=True)
    assert cuda.held() == {} and cuda.closed


def test_an_output_whose_shape_depends_on_values_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = FakeNetwork(
        [Io("x", Mode.INPUT, (4,)), Io("where", Mode.OUTPUT, (-1, 1), Kind.INT64)],
        compute=lambda x: {},
        shapes=lambda x: {"where": (-1, 1)},
    )
    with fake_gpu(network, monkeypatch) as cuda, load_engine(path, trust=True) as engine:
        with pytest.raises(UserError, match=r"shape \[-1, 1\] of where depends on values"):
            engine.run({"x": np.zeros(4, np.float32)})
        assert "memory" not in cuda.held() and "pinned" not in cuda.held()


def test_inputs_that_do_not_go_together_end_in_a_sentence(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shapes(a: tuple[int, ...], b: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        if a != b:
            raise RuntimeError("Could not infer shapes")
        return {"y": a}

    tensors = [Io(name, Mode.INPUT, (-1,), low=(1,), high=(4,)) for name in ("a", "b")]
    network = FakeNetwork([*tensors, Io("y", Mode.OUTPUT, (-1,))], lambda a, b: {"y": a + b}, shapes)
    one, two = np.ones(1, np.float32), np.ones(2, np.float32)
    with fake_gpu(network, monkeypatch), load_engine(path, trust=True) as engine:
        with pytest.raises(UserError, match=r"shapes do not go together \(a \[1\], b \[2\]\)"):
            engine.run({"a": one, "b": two})
        np.testing.assert_array_equal(engine.run({"a": two, "b": two})["y"], [2, 2])


@pytest.mark.parametrize("fails", ["deserialize", "context"])
def test_an_engine_that_does_not_load_leaves_nothing(path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    with fake_gpu(weighted(fails={fails}), monkeypatch) as cuda, pytest.raises(UserError) as caught:
        load_engine(path, trust=True)
    assert caught.value.exit_code == 1
    if fails == "deserialize":
        assert "Magic tag does not match" in str(caught.value) and "build-engine" in str(caught.value)
    assert cuda.held() == {} and cuda.closed


def a_timed_query(engine: Engine) -> None:
    with engine.pipeline(feeds(2), slots=2, graph=True) as pipeline:
        pipeline.submit()
        pipeline.collect()


def calls_of_a_whole_life(path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every CUDA call that can fail, numbered as FakeCuda numbers them."""
    with fake_gpu(weighted(), monkeypatch) as cuda:
        with load_engine(path, trust=True, graph=True) as engine:
            engine.run(feeds(4))
            a_timed_query(engine)
        life = [call for call in cuda.log if call != "execute"]
    return [f"{call}#{life[: i + 1].count(call)}" for i, call in enumerate(life)]


def test_nothing_leaks_whichever_call_fails(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = calls_of_a_whole_life(path, monkeypatch)
    assert len(calls) > 60
    for call in calls:
        if call.split("#")[0] == "close":
            continue
        with fake_gpu(weighted(), monkeypatch) as cuda:
            cuda.fails = {call: f"CUDA: {call} failed"}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    with load_engine(path, trust=True, graph=True) as engine:
                        engine.run(feeds(4))
                        a_timed_query(engine)
                except UserError as error:
                    assert str(error) == f"CUDA: {call} failed"
                else:
                    assert call.startswith("capture#"), f"{call} failed and nobody said so"
            assert cuda.held() == {} and cuda.closed, call


def test_what_failed_first_is_what_is_seen(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a fault on the device every further call fails, those that free included."""
    network = weighted(fails={"execute"})
    with fake_gpu(network, monkeypatch) as cuda:
        cuda.fails = dict.fromkeys(("free", "free_pinned", "free_event"), "CUDA: an illegal memory access")
        with pytest.raises(UserError, match=r"execute_async_v3 failed"), load_engine(path, trust=True) as engine:
            engine.run(feeds())
        assert cuda.held() == {} and cuda.closed


def test_when_a_broken_query_is_followed_by_another_it_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_gpu(weighted(), monkeypatch) as cuda, load_engine(path, trust=True) as engine:
        cuda.fails = {"allocate#2": "CUDA: cuMemAlloc failed: out of memory"}
        with pytest.raises(UserError, match="out of memory"):
            engine.run(feeds())
        assert "memory" not in cuda.held()
        np.testing.assert_array_equal(engine.run(feeds())["scores"], SCORES)


def test_a_closed_engine_says_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_gpu(weighted(), monkeypatch) as cuda:
        with load_engine(path, trust=True) as engine:
            engine.run(feeds())
        engine.close()
        cuda.log.clear()
        for use in (engine.run, engine.pipeline):
            with pytest.raises(UserError, match=r"net\.engine: it was closed"):
                use(feeds())
        assert cuda.log == []


def test_an_engine_without_inputs_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = FakeNetwork([Io("y", Mode.OUTPUT, (2,))], lambda: {"y": np.ones(2, np.float32)}, lambda: {"y": (2,)})
    with fake_gpu(network, monkeypatch), load_engine(path, trust=True) as engine:
        np.testing.assert_array_equal(engine.run({})["y"], [1, 1])


def test_the_fake_knows_no_name_that_tensorrt_has_not() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (pip install 'faqd[rtx]')")
    for fake, real in (
        (FakeEngine, trt.ICudaEngine),
        (FakeContext, trt.IExecutionContext),
        (FakeTensorRT.ILogger, trt.ILogger),
        (Kind, trt.DataType),
        (Mode, trt.TensorIOMode),
        (Layout, trt.TensorFormat),
        (Place, trt.TensorLocation),
    ):
        names = list(fake.__members__) if hasattr(fake, "__members__") else [n for n in vars(fake) if n[0] != "_"]
        assert names and not [name for name in names if not hasattr(real, name)]
    assert hasattr(trt.Runtime, "deserialize_cuda_engine")
