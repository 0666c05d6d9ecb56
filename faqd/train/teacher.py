"""Training a float teacher, with labels: where the user has none of their own, and for the demo."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from faqd.errors import UserError
from faqd.files import read_json, write_json
from faqd.train.data import DataOptions, Dataset, load_dataset
from faqd.train.loop import Images, Job, finish, fit, images_on, select_losses
from faqd.train.network import NetworkSource
from faqd.train.recipes import TeacherRecipe, recipe_json
from faqd.train.run import RECORD, WEIGHTS, claim, data_json, save_weights

Say = Callable[[str], None]


def train_teacher(
    recipe: TeacherRecipe, data: DataOptions, out: Path, device: torch.device, resume: bool, say: Say
) -> dict[str, Any]:
    """Train with cross-entropy and write the run. Returns its record with `accuracy_select`."""
    dataset = load_dataset(data, with_labels=True, say=say)
    if dataset.train.labels is None or dataset.classes is None:
        raise UserError(f"--data {data.source}: a teacher is trained with labels and there are none here.")
    height, width, channels = dataset.train.images.shape[1:]
    source = NetworkSource(channels, (height, width), len(dataset.classes), architecture=recipe.arch)
    asked = {"recipe": recipe_json(recipe), "data": data_json(data)}
    record = {
        "kind": "teacher",
        "asked": asked,
        "data": data_json(data),
        "network": source.to_json(),
        "preprocess": dataset.preprocess.to_json(),
        "classes": list(dataset.classes),
    }
    if claim(out, record, resume):
        say(f"{out}: this run is finished.")
        return dict(read_json(out / RECORD))
    torch.manual_seed(recipe.training.seed)
    network = source.build().to(device, memory_format=torch.channels_last)

    def losses(x: Tensor, labels: Tensor | None, generator: torch.Generator) -> dict[str, Tensor]:
        assert labels is not None
        return {"cross-entropy": functional.cross_entropy(network(x), labels)}

    train, select = splits_on(device, dataset)
    parameters = list(network.parameters())
    job = Job("teacher", network, parameters, [], losses, lambda: None, train, select, recipe.training)
    fit(job, out)
    record["select"] = {**select_losses(job), "accuracy": _accuracy(network, select)}
    save_weights(out / WEIGHTS, network)
    record = {**read_json(out / RECORD), **record}
    write_json(out / RECORD, record)
    finish(out)
    return record


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
