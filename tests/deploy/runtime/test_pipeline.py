"""Timed queries on a GPU made of Python: what is between which events, and what runs ahead of what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from faqd.deploy.runtime.pipeline import Streams
from faqd.deploy.runtime.runtime import Engine, load_engine
from faqd.errors import UserError
from tests.fixtures.fake_gpu import FakeCuda, FakeNetwork, FakeTensorRT, Io, Mode, engine_file, fake_gpu

FEEDS = {"x": np.arange(4, dtype=np.float32)}
COPY_IN = ["record", "copy_in", "record", "follow"]
COPY_OUT = ["follow", "record", "copy_out", "record"]
KERNELS = ["record", "execute", "record"]


def network(**fails: set[str]) -> FakeNetwork:
    return FakeNetwork(
        [Io("x", Mode.INPUT, (4,)), Io("y", Mode.OUTPUT, (4,))],
        compute=lambda x: {"y": 2 * x},
        shapes=lambda x: {"y": x},
        **fails,
    )


@contextmanager
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **fails: set[str]) -> Iterator[tuple[FakeCuda, Engine]]:
    with fake_gpu(network(**fails), monkeypatch) as cuda:
        with load_engine(engine_file(tmp_path), trust=True) as loaded:
            yield cuda, loaded
        assert cuda.held() == {} and cuda.closed


def test_times_are_between_the_events_of_each_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine(tmp_path, monkeypatch) as (cuda, loaded), loaded.pipeline(FEEDS) as pipeline:
        cuda.log.clear()
        pipeline.begin()
        pipeline.submit()
        times = pipeline.collect()
        assert cuda.log == ["record", "wait_for", *COPY_IN, *KERNELS, *COPY_OUT, "wait_for"]
    # The clock of the fake counts calls: a copy and the event itself, a launch and the event, a copy and the event.
    assert (times.h2d_ms, times.compute_ms, times.d2h_ms, times.latency_ms) == (2, 2, 2, 6)
    assert (times.start_h2d_ms, times.start_compute_ms, times.start_d2h_ms) == (2, 6, 10)
    assert times.enqueue_ms > 0 and times.start_enqueue_ms > 0


def test_without_transfers_latency_is_compute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine(tmp_path, monkeypatch) as (cuda, loaded), loaded.pipeline(FEEDS, transfers=False) as pipeline:
        assert cuda.log.count("copy_in") == 1, "the inputs are there all the same"
        cuda.log.clear()
        pipeline.submit()
        times = pipeline.collect()
        assert cuda.log == [*KERNELS, "wait_for"]
    assert times.latency_ms == times.compute_ms == 2
    assert (times.h2d_ms, times.d2h_ms) == (0, 0)
    assert times.start_h2d_ms == times.start_compute_ms == times.start_d2h_ms - 2


def test_one_query_ahead_is_submitted_before_the_first_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine(tmp_path, monkeypatch) as (cuda, loaded), loaded.pipeline(FEEDS, slots=2, graph=True) as pipeline:
        assert pipeline.cuda_graph and len(cuda.graphs) == 2, "each slot has buffers, hence a graph, of its own"
        cuda.log.clear()
        pipeline.submit()
        pipeline.submit()
        first = pipeline.collect()
        pipeline.submit()
        second, third = pipeline.collect(), pipeline.collect()
        calls = [call for call in cuda.log if call in ("launch", "wait_for")]
        assert calls == ["launch", "launch", "wait_for", "launch", "wait_for", "wait_for"]
    starts = [times.start_h2d_ms for times in (first, second, third)]
    assert starts == sorted(starts) and len(set(starts)) == 3


@pytest.mark.parametrize("spin", [False, True])
def test_spin_waiting_is_a_matter_of_the_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spin: bool) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(FakeCuda, "event", _noting(FakeCuda.event, asked))
    with engine(tmp_path, monkeypatch) as (_, loaded), loaded.pipeline(FEEDS, spin=spin):
        assert asked == [not spin] * 7


def test_zero_copy_computes_on_the_hosts_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copying = {"allocate", "allocate_pinned", "copy_in", "copy_out"}
    monkeypatch.setattr(FakeCuda, "shares_memory", lambda self: True)
    with (
        engine(tmp_path, monkeypatch) as (cuda, loaded),
        loaded.pipeline(FEEDS, slots=2, graph=True, zero_copy=True) as pipeline,
    ):
        pipeline.submit()
        times = pipeline.collect()
        assert times.latency_ms == times.compute_ms > 0 and (times.h2d_ms, times.d2h_ms) == (0, 0)
        assert cuda.log.count("allocate_mapped") == 4 and not copying & set(cuda.log)
    with fake_gpu(network(), monkeypatch) as cuda:
        with load_engine(engine_file(tmp_path), trust=True, zero_copy=True, graph=True) as mapped:
            for factor in (1, 3):
                np.testing.assert_array_equal(mapped.run({"x": factor * FEEDS["x"]})["y"], 2 * factor * FEEDS["x"])
        assert not copying & set(cuda.log) and cuda.held() == {}


def test_zero_copy_is_refused_where_the_gpu_has_its_own_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = r"net\.engine: zero copy is for GPUs that share the host's memory"
    with engine(tmp_path, monkeypatch) as (_, loaded), pytest.raises(UserError, match=said):
        loaded.pipeline(FEEDS, zero_copy=True)
    with pytest.raises(UserError, match=said), fake_gpu(network(), monkeypatch) as cuda:
        load_engine(engine_file(tmp_path), trust=True, zero_copy=True)
    assert cuda.held() == {} and cuda.closed


def test_streams_take_queries_in_turn_and_answer_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        engine(tmp_path, monkeypatch) as (cuda, loaded),
        loaded.pipeline(FEEDS, slots=2) as one,
        loaded.pipeline(FEEDS, slots=2) as other,
    ):
        streams = Streams([one, other])
        assert streams.slots == 4 and not streams.cuda_graph
        for _ in range(2):
            streams.begin()
            cuda.log.clear()
            for _ in range(4):
                streams.submit()
            assert cuda.log.count("execute") == 4, "all are in flight before one is waited for"
            starts = [streams.collect().start_h2d_ms for _ in range(4)]
            assert starts == sorted(starts)
            assert not one._in_flight and not other._in_flight


def _noting(event: object, asked: list[bool]) -> object:
    def noted(self: FakeCuda, *, blocking: bool = False) -> object:
        asked.append(blocking)
        return event(self)  # type: ignore[operator]

    return noted


def test_where_capture_fails_the_pipeline_says_so_and_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine(tmp_path, monkeypatch, fails={"capture"}) as (_, loaded):
        with pytest.warns(UserWarning, match="no CUDA graph") as caught:
            pipeline = loaded.pipeline(FEEDS, slots=2, graph=True)
        assert caught[0].filename == __file__, "the warning points at the caller"
        with pipeline:
            assert not pipeline.cuda_graph
            pipeline.submit()
            assert pipeline.collect().compute_ms > 0


def test_a_pipeline_leaves_the_engine_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine(tmp_path, monkeypatch) as (_, loaded):
        before = loaded.run(FEEDS)["y"]
        with loaded.pipeline({"x": FEEDS["x"] + 1}) as pipeline:
            pipeline.submit()
        np.testing.assert_array_equal(loaded.run(FEEDS)["y"], before)


def test_the_profiler_tells_the_time_of_every_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine(tmp_path, monkeypatch) as (_, loaded):
        assert loaded.layer_times(FEEDS, runs=3) == {"reformat": [0.25] * 3, "conv": [0.5] * 3}
        assert loaded.auxiliary_streams == 0


def test_arrays_and_launches_that_fail_end_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine(tmp_path, monkeypatch, fails={"execute"}) as (_, loaded):
        with pytest.raises(UserError, match="input x takes"):
            loaded.pipeline({"x": np.zeros(3, np.float32)})
        with pytest.raises(UserError, match="execute_async_v3 failed"):
            loaded.pipeline(FEEDS)
        with pytest.raises(UserError, match="execute_async_v3 failed"):
            loaded.layer_times(FEEDS, runs=1)


def test_the_fakes_profiler_is_named_as_tensorrts_is() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (pip install 'faqd[rtx]')")
    assert hasattr(trt.IProfiler, "report_layer_time") and hasattr(FakeTensorRT.IProfiler, "report_layer_time")
    assert hasattr(trt.IExecutionContext, "profiler") and hasattr(trt.ICudaEngine, "num_aux_streams")
