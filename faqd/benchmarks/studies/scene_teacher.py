"""The float segmenter, trained with a class for every pixel: what `faqd-train teacher` does not do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from faqd.benchmarks.studies.scenes import targets_of
from faqd.train.data.datasets import Augmentation, Say, load_dataset
from faqd.train.data.options import DataOptions
from faqd.train.loop.accumulate import Losses
from faqd.train.loop.batches import Batch, Batches, images_on
from faqd.train.loop.distributed import ProcessGroup
from faqd.train.loop.fit import finish, fit
from faqd.train.loop.trainer import Job
from faqd.train.networks.source import user_source
from faqd.train.networks.tensor_files import write_tensors
from faqd.train.recipes import Training
from faqd.train.run.folder import WEIGHTS, held


def train_on_scenes(
    spec: str, data: DataOptions, scenes: Path, training: Training, out: Path, say: Say, processes: ProcessGroup
) -> None:
    """Train the network that `spec` names with cross-entropy per pixel; its weights into `out`.

    The loop of faqd-train, so that a run goes on from its checkpoint. No augmentation: targets would have to follow.
    """
    if (out / WEIGHTS).is_file():
        say(f"{out}: this run is finished.")
        return
    dataset = load_dataset(data, with_labels=False, say=say)
    torch.manual_seed(training.seed)
    network = user_source(spec, 3, dataset.train.images.shape[1:3]).build()
    network.to(processes.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    train, select = (
        images_on(
            processes.device,
            split.images,
            targets_of(split.images, scenes).astype(np.int64),
            dataset.preprocess,
            Augmentation(),
        )
        for split in (dataset.train, dataset.select)
    )
    batches = Batches(train, select, training.batch_size, training.data_seed, None, processes)
    weights = [p for p in network.parameters() if p.dim() > 1]
    others = [p for p in network.parameters() if p.dim() <= 1]
    job = Job("teacher", out, network, weights, others, _cross_entropy, lambda: None, training)
    out.mkdir(parents=True, exist_ok=True)
    with held(out):
        for error in fit([job], batches).failed.values():
            raise error
        write_tensors(out / WEIGHTS, network.state_dict())
        finish(out)


def _cross_entropy(scores: Tensor, batch: Batch, generator: torch.Generator) -> Losses:
    assert batch.labels is not None
    return {"cross-entropy": functional.cross_entropy(scores, batch.labels)}
