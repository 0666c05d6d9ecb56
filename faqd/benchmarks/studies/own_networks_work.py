"""A network of `own_networks` under way: how it is trained, on which data, and where its files lie."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from faqd.benchmarks.studies import own_networks_models, scenes
from faqd.benchmarks.studies.resumable import say
from faqd.quantize.outputs import SINGLE, run_batches
from faqd.train.loop.distributed import ProcessGroup
from faqd.train.recipes import Training
from faqd.train.run.folder import WEIGHTS, network_input
from faqd.train.run.lesson import Lesson, lesson_from

BATCH = 16
"""Deployed students compute in float64: more 64-pixel images at once leave the caches and take three times as long."""
NETWORKS = Path(str(own_networks_models.__file__))
MEAN_STD: dict[str, Any] = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}
"""Of the photographs that scenes are made of."""


@dataclass(frozen=True)
class Study:
    """How a network is trained: the teacher, and all students alike."""

    teacher: Training
    student: Training


@dataclass(frozen=True)
class Work:
    """The folder of a network under way. limit: training images or scenes, None for all."""

    network: str
    study: Study
    folder: Path
    data_root: Path
    limit: int | None
    seeds: int
    processes: ProcessGroup

    @property
    def spec(self) -> str:
        return f"{NETWORKS}:{self.network}"

    @property
    def dense(self) -> bool:
        return self.network == "segmenter"

    @property
    def scenes(self) -> Path:
        return self.folder / "scenes.npz"

    @property
    def data(self) -> dict[str, Any]:
        """Fields of DataOptions: 64-pixel photographs by preprocessing, or the file of scenes."""
        if self.dense:
            return {"source": f"npz:{self.scenes.resolve()}", "limit": self.limit, **MEAN_STD}
        return {"source": "cifar10", "root": self.data_root, "image_size": (64, 64), "limit": self.limit}

    @property
    def teacher(self) -> Path:
        return self.folder / "teacher"

    @property
    def weights(self) -> Path | None:
        """For --teacher-weights: a user's own network; None where the teacher is a run of faqd-train."""
        return self.teacher / WEIGHTS if self.dense else None

    @cached_property
    def lesson(self) -> Lesson:
        teacher = self.spec if self.dense else str(self.teacher)
        return lesson_from(teacher, self.weights, self.data, with_labels=True, say=say)

    @cached_property
    def inputs(self) -> Tensor:
        return network_input(self.lesson.dataset.eval.images, self.lesson.dataset.preprocess)

    @cached_property
    def targets(self) -> NDArray[Any]:
        """The class of every evaluation image (N,), or of its pixels (N, 32, 32)."""
        split = self.lesson.dataset.eval
        return scenes.targets_of(split.images, self.scenes) if self.dense else np.asarray(split.labels)

    @cached_property
    def taught(self) -> NDArray[Any]:
        """What the float teacher sees, in the shape of the targets."""
        return self.seen_by(self.lesson.teacher.network)

    def seen_by(self, network: Any) -> NDArray[Any]:
        return run_batches(network, self.inputs, BATCH)[SINGLE].argmax(1).numpy()

    def run(self, bits: int, seed: int) -> Path:
        return self.folder / "students" / f"w{bits}a{bits}-s{seed}"

    def bundle(self, method: str, bits: int) -> Path:
        return self.folder / "bundles" / f"{method}-w{bits}a{bits}"
