"""Training a float teacher, with labels: where the user has none of their own, and for the demo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from faqd.errors import UserError
from faqd.train.data import DataOptions, Dataset, Say, load_dataset
from faqd.train.loop import Images, Job, finish, fit, images_on, select_losses
from faqd.train.models import check_architecture
from faqd.train.network import NetworkSource
from faqd.train.recipes import TeacherRecipe, recipe_json
from faqd.train.run import asked_json, begin, conclude, data_json, is_done, read_record


def train_teacher(
    recipe: TeacherRecipe, data: DataOptions, out: Path, device: torch.device, resume: bool, say: Say
) -> dict[str, Any]:
    """Train with cross-entropy and write the run. Returns its record with the accuracy on the select split."""
    check_architecture(recipe.arch)
    dataset = load_dataset(data, with_labels=True, say=say)
    source = _source(recipe, dataset)
    record = _record(recipe, data, dataset, source)
    if is_done(out, record, resume):
        say(f"{out}: this run is finished.")
        return read_record(out)
    begin(out, record)
    torch.manual_seed(recipe.training.seed)
    network = source.build()
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def losses(x: Tensor, labels: Tensor | None, generator: torch.Generator) -> dict[str, Tensor]:
        assert labels is not None
        return {"cross-entropy": functional.cross_entropy(network(x), labels)}

    train, select = splits_on(device, dataset)
    parameters = list(network.parameters())
    job = Job("teacher", network, parameters, [], losses, lambda: None, train, select, recipe.training)
    fit(job, out)
    selected = {**select_losses(job), "accuracy": _accuracy(network, select)}
    record = conclude(out, {"select": selected}, network)
    finish(out)
    return record


def _source(recipe: TeacherRecipe, dataset: Dataset) -> NetworkSource:
    if dataset.train.labels is None or dataset.classes is None:
        raise UserError(
            f"--data {dataset.source}: a teacher is trained with labels and there are none here. A folder has them as "
            "names of subfolders with --labels, an npz file as its array 'labels'."
        )
    height, width, channels = dataset.train.images.shape[1:]
    return NetworkSource(channels, (height, width), len(dataset.classes), architecture=recipe.arch)


def _record(recipe: TeacherRecipe, data: DataOptions, dataset: Dataset, source: NetworkSource) -> dict[str, Any]:
    return {
        "kind": "teacher",
        "asked": asked_json(recipe, data),
        "recipe": recipe_json(recipe),
        "data": data_json(data),
        "network": source.to_json(),
        "preprocess": dataset.preprocess.to_json(),
        "classes": list(dataset.classes or ()),
    }


def splits_on(device: torch.device, dataset: Dataset) -> tuple[Images, Images]:
    """The train and select splits on the device."""
    made = [
        images_on(device, split.images, split.labels, dataset.preprocess, dataset.augmentation)
        for split in (dataset.train, dataset.select)
    ]
    return made[0], made[1]


@torch.no_grad()
def _accuracy(network: torch.nn.Module, images: Images) -> float:
    assert images.labels is not None
    network.eval()
    hits = [
        (network(images.normalised(pixels)).argmax(1) == labels).sum()
        for pixels, labels in zip(images.pixels.split(500), images.labels.split(500), strict=True)
    ]
    return float(torch.stack(hits).sum()) / len(images.labels)
