"""One of the processes that `faqd.benchmarks.studies.scaling` starts and times, under torchrun or alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, distributed

from faqd.benchmarks.studies.calm_weights import enliven, settle
from faqd.benchmarks.studies.one_iteration import TOTAL, WARM_UP, prepared, timed
from faqd.preprocess import Preprocess
from faqd.train.data.datasets import Augmentation
from faqd.train.data.listed_files import listed
from faqd.train.data.pictures import PictureFiles, Pictures
from faqd.train.loop.batches import images_on
from faqd.train.loop.distributed import process_group
from faqd.train.losses.distillation import affinity_loss
from faqd.train.networks.source import NetworkSource

CLASSES = 10


def _affinity(maps: Iterable[Tensor]) -> None:
    """Forward and backward, of a student's maps that are a little apart."""
    for theirs in maps:
        ours = (theirs + 0.1 * torch.randn_like(theirs)).requires_grad_()
        affinity_loss(ours, theirs, "l2", floor=1e-3).backward()


def main() -> None:
    """Write what one process, or the first of several, measured as JSON to the file that is asked for."""
    asked = json.loads(sys.argv[1])
    target, pixels, times = Path(asked["target"]), asked["pixels"], asked["times"]
    run = target.parent / "run"  # where a trainer looks for a checkpoint
    run.mkdir(exist_ok=True)
    torch.manual_seed(0)
    source = NetworkSource(3, (pixels, pixels), CLASSES, architecture=asked["network"])
    preprocess = Preprocess(pixels, pixels, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    files = listed(Path(asked["folder"]))
    pictures = Pictures(PictureFiles(files, np.arange(len(files)), preprocess.fit), (pixels, pixels, 3))
    with process_group("cpu", 0) as processes:
        images = images_on(processes.device, pictures, None, preprocess, Augmentation(pad=pixels // 16))
        teacher = source.build().eval()
        enliven(teacher)
        settle(teacher, images.normalised(images.pixels[:16]))
        trainer, batches, _ = prepared(teacher, source, images, asked["batch"], run, processes)
        found: dict[str, list[float]] = {}
        found["iteration"], found["iteration_cpu"] = timed(lambda n: trainer.step(batches.at(n), TOTAL), times)
        parameters = sum(p.numel() for p in trainer.job.network.parameters() if p.requires_grad)
        found["parameters"] = [float(parameters)]
        if processes.is_distributed:
            gradient = torch.zeros(parameters)
            found["exchange"], _ = timed(lambda _: distributed.all_reduce(gradient), times)
        elif asked["parts"]:
            feed, teach, batch = batches.feed, batches.teacher, batches.at(0)
            assert feed is not None and teach is not None and batch.target is not None
            maps = batch.target.maps.values()
            found["decode_cpu"] = timed(lambda number: feed.at(WARM_UP + times + number), times)[1]
            found["teacher_cpu"] = timed(lambda _: teach(batch.x), times)[1]
            found["affinity_cpu"] = timed(lambda _: _affinity(maps), times)[1]
        if processes.is_rank_0:
            target.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
