"""What a command has understood of the data and the networks, said before the work: a wrong size or normalisation is
seen here, and nowhere so early."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from faqd.train.data.datasets import Dataset
from faqd.train.loop.trainer import resolved
from faqd.train.recipes import Training

LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
NORMS = nn.modules.batchnorm._BatchNorm


def data_in_words(dataset: Dataset, *, unread_labels: bool = False) -> Iterator[str]:
    """unread_labels: whether the user has named labels that this command has no use for."""
    yield f"{dataset.source}: {dataset.preprocess.in_words()}."
    counts = (len(split) for split in (dataset.train, dataset.select, dataset.eval))
    classes = f"labels of {len(dataset.classes or ())} classes"
    alone = "" if dataset.train.labels is not None else ", for evaluation alone"
    none = "labels are left to `eval` and `export`" if unread_labels else "no labels"
    labels = none if dataset.eval.labels is None else f"{classes}{alone}"
    yield "images: {:,} to train or calibrate on, {:,} to validate, {:,} for evaluation; {}.".format(*counts, labels)


def network_in_words(network: nn.Module, name: str) -> str:
    modules = list(network.modules())
    layers, norms = (sum(isinstance(module, kinds) for module in modules) for kinds in (LAYERS, NORMS))
    values = sum(value.numel() for value in network.parameters())
    return (
        f"teacher {name}: {values:,} parameters, {_counted(layers, 'layer')} (convolutions, linear), "
        f"{_counted(norms, 'batch norm')}."
    )


def training_in_words(network: nn.Module, training: Training, iterations: int, images: int) -> Iterator[str]:
    """training: with nothing left open. iterations: of the whole run. images: to train on."""
    if training.batch_size > images:
        yield f"--batch-size {training.batch_size}: there are {images} training images; each iteration sees them all."
    yield (
        f"training: {iterations:,} iterations of {training.batch_size} images{_parts(training)}, learning rate "
        f"{resolved(training.lr):.3g} at its peak ({training.optimizer} steps)."
    )
    if not any(isinstance(module, NORMS) for module in network.modules()):
        return
    frozen = resolved(training.frozen_norm)
    if frozen == 1:
        yield "batch norm: the statistics of the trained network, which training leaves as they are."
        return
    fixed = f", fixed for the last {100 * frozen:g} % of training" if frozen else ""
    yield f"batch norm: statistics of each batch{fixed}; estimated again with the final weights."


def _parts(training: Training) -> str:
    return f" in {training.accumulate} parts" if training.accumulate > 1 else ""


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
