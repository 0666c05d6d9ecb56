"""Training a float teacher, with labels: where the user has none of their own, and for the demo."""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from faqd.errors import UserError
from faqd.train.data.datasets import Dataset, Say, load_dataset
from faqd.train.data.options import DataOptions
from faqd.train.data.sanity_checks import refuse_one_class, warn_of_images
from faqd.train.loop.accumulate import Losses
from faqd.train.loop.batches import Batch, Batches, Images, refuse_uneven, splits_on
from faqd.train.loop.distributed import ProcessGroup
from faqd.train.loop.fit import finish, fit
from faqd.train.loop.trainer import Job, select_losses
from faqd.train.networks.source import NetworkSource, architecture_source
from faqd.train.recipes import TeacherRecipe, recipe_json
from faqd.train.run.folder import asked_json, begin, conclude, data_json, held, is_done, read_record
from faqd.train.run.lesson import output_shapes

JUDGED_IMAGES = 10_000
"""Of the validation split, for the accuracy that is reported."""


def train_teacher(
    recipe: TeacherRecipe,
    data: DataOptions,
    out: Path,
    resume: bool,
    say: Say,
    processes: ProcessGroup,
    deadline: float = math.inf,
) -> dict[str, Any]:
    """Train with cross-entropy and write the run. Returns its record with the accuracy on the validation split.

    deadline: see `fit`.
    """
    architecture_source(recipe.arch, 1, (1, 1), 1)  # refuses a wrong name before images are read
    dataset = load_dataset(data, with_labels=True, say=say)
    source = _source(recipe, dataset)
    refuse_one_class(dataset, "faqd-train teacher")
    warn_of_images(dataset, say)
    refuse_uneven(recipe.training, len(dataset.train), processes)
    record = _record(recipe, data, dataset, source)
    if processes.from_rank_0(lambda: is_done(out, record, resume)):
        say(f"{out}: this run is finished.")
        return read_record(out)
    training = recipe.training
    torch.manual_seed(training.seed)
    network = source.build()
    network.to(processes.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    train, select = splits_on(processes.device, dataset, training.views)
    shares = training.accumulate, training.decode
    batches = Batches(train, select, training.batch_size, training.data_seed, None, processes, *shares)
    job = Job("teacher", out, network, list(network.parameters()), [], _cross_entropy, lambda: None, training)
    with ExitStack() as locks:
        if processes.is_rank_0:
            begin(out, record)
            locks.enter_context(held(out))
        for error in fit([job], batches, deadline).failed.values():
            raise error
        for sentence in batches.in_words():
            say(sentence)
        selected = {**select_losses(job, batches), "accuracy": _accuracy(network, select)}
        return processes.from_rank_0(lambda: _conclude(out, selected, network))


def _conclude(out: Path, selected: dict[str, float], network: nn.Module) -> dict[str, Any]:
    record = conclude(out, {"select": selected}, network)
    finish(out)
    return record


def _cross_entropy(answer: Tensor, batch: Batch, generator: torch.Generator) -> Losses:
    assert batch.labels is not None
    return {"cross-entropy": functional.cross_entropy(answer, batch.labels)}


def _source(recipe: TeacherRecipe, dataset: Dataset) -> NetworkSource:
    if dataset.train.labels is None or dataset.classes is None:
        raise UserError(
            f"--data {dataset.source}: a teacher is trained with labels and there are none here. A folder has them as "
            "names of subfolders with --labels, an npz file as its array 'labels'."
        )
    height, width, channels = dataset.train.pixels.shape[1:]
    source = architecture_source(recipe.arch, channels, (height, width), len(dataset.classes))
    if source.architecture is None:
        _refuse_outputs(source, dataset)
    return source


def _refuse_outputs(source: NetworkSource, dataset: Dataset) -> None:
    wanted = (len(dataset.classes or ()),)
    network = source.build()
    network.eval()
    shapes = output_shapes(network, source, f"{dataset.source}; see --image-size and --channels")
    if [shape[1:] for shape in shapes.values()] != [wanted]:
        listed = ", ".join(f"{name} {shape[1:]}" for name, shape in shapes.items())
        raise UserError(
            f"--arch {source.name}: returns {listed}, and a teacher is trained here with one score for each of the "
            f"{wanted[0]} classes of {dataset.source}. Train other networks yourself, and give them to `distill` with "
            "--teacher and --teacher-weights."
        )


def _record(recipe: TeacherRecipe, data: DataOptions, dataset: Dataset, source: NetworkSource) -> dict[str, Any]:
    return {
        "kind": "teacher",
        "asked": asked_json(recipe, data, dataset.files),
        "recipe": recipe_json(recipe),
        "data": data_json(data),
        "network": source.to_json(),
        "preprocess": dataset.preprocess.to_json(),
        "classes": list(dataset.classes or ()),
    }


@torch.no_grad()
def _accuracy(network: nn.Module, images: Images) -> float:
    assert images.labels is not None
    network.eval()
    hits = [
        (network(images.normalised(pixels)).argmax(1) == labels).sum()
        for pixels, labels in zip(
            images.parts(500, JUDGED_IMAGES), images.labels[:JUDGED_IMAGES].split(500), strict=True
        )
    ]
    return float(torch.stack(hits).sum()) / len(images.labels[:JUDGED_IMAGES])
