"""Labels that are read for a network: whether they can be those of its classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from faqd.errors import UserError
from faqd.train.data.datasets import Dataset


def refuse_other_labels(dataset: Dataset, shapes: Mapping[str, tuple[int, ...]], name: str) -> None:
    """UserError where the labels are not of the classes that the network gives scores for: accuracy would mean nothing.

    shapes: as `refuse_other_classes` has it.
    """
    if dataset.eval.labels is not None:
        refuse_other_classes(dataset.classes or (), dataset.source, shapes, name)


def refuse_other_classes(
    classes: tuple[str, ...], source: str, shapes: Mapping[str, tuple[int | str, ...]], name: str
) -> None:
    """UserError where labels of `source` count other classes than the network has scores for.

    shapes: of its outputs, (images, classes, ...) by name; only a single vector of scores has classes. Labels without
    names may be fewer, for the last classes may just not be there.
    """
    (scores, *more) = shapes.values()
    if more or len(scores) != 2:
        return
    numbers = tuple(map(str, range(len(classes))))
    if len(classes) == scores[1] or (classes == numbers and len(classes) < int(scores[1])):
        return
    listed = ", ".join(classes[:5]) + (" ..." if len(classes) > 5 else "")
    raise UserError(
        f"{source}: has labels of {len(classes)} classes ({listed}), and {name} gives scores of {scores[1]}. "
        "Give labels in the order that it was trained with, or none: leave out --labels, or the array 'labels'."
    )


def without_labels(dataset: Dataset) -> Dataset:
    parts = {name: replace(getattr(dataset, name), labels=None) for name in ("train", "select", "eval")}
    return replace(dataset, classes=None, **parts)
