"""Sanity checks: what is legal and makes no sense, told or refused before training; docs/decisions.md has the list."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from faqd.errors import UserError
from faqd.quantize import nodes
from faqd.quantize.outputs import named_outputs, renamed
from faqd.train.data.datasets import Dataset, Say
from faqd.train.losses.layouts import with_maps
from faqd.train.run.folder import network_input

IMAGES = 16
"""Training images that a teacher is looked at with."""
COMPARED_IMAGES = 512
"""Training images that are held against each other."""
BLACK, BRIGHT_SHARE = 32, 1e-3
"""Where fewer values than this share reach this one of 255, a viewer shows black."""
SMALL, LARGE = 0.01, 10.0
"""Where network input as a rule does not lie: all of it nearer to 0, some of it farther."""
LARGEST_OUTPUT = 1e18
CONSTANT = 1e-6
"""What differs by less, relative to its size, is taken to be the same."""


def warn_of_images(dataset: Dataset, say: Say) -> None:
    """Whether there is something to learn on the training images, as the network will see them."""
    pixels = dataset.train.pixels[:COMPARED_IMAGES]
    different = len(_different(pixels))
    if different == 1 < len(pixels):
        raise UserError(
            f"--data {dataset.source}: all of {len(pixels)} training images are equal, pixel by pixel; give different "
            "ones."
        )
    if 2 * different < len(pixels):
        say(f"{dataset.source}: only {different} of {len(pixels)} training images are different ones.")
    flat = pixels.reshape(len(pixels), -1, pixels.shape[-1])
    if bool((flat == flat[:, :1]).all()):
        say(f"{dataset.source}: every training image has one colour; nothing spatial can be learned from these.")
    some = pixels[:: max(1, len(pixels) // IMAGES)]
    if (some >= BLACK).mean() < BRIGHT_SHARE:
        say(
            f"{dataset.source}: the training images are nearly black, no value in a thousand reaches {BLACK} of 255 "
            f"(the largest is {some.max()}). Are these masks of labels, or data of fewer bits than their files have?"
        )
    reach = float(network_input(pixels[:IMAGES], dataset.preprocess).abs().max())
    if not SMALL < reach <= LARGE:
        size, setting = ("only", "large") if reach <= SMALL else ("up to", "small")
        say(
            f"{dataset.source}: behind --mean and --std the network input reaches {size} ±{reach:.3g}. Networks are "
            f"commonly trained on a few units around 0; is --std too {setting}? Both count in a pixel range 0..1."
        )


def warn_of_teacher(network: nn.Module, name: str, dataset: Dataset, say: Say) -> None:
    """Whether a float network in evaluation mode looks trained, and its outputs say something of the images."""
    _warn_of_statistics(network, name, say)
    pixels = dataset.train.pixels[:COMPARED_IMAGES]
    x = network_input(pixels[_different(pixels)[:IMAGES]], dataset.preprocess)
    with torch.no_grad():
        returned = [network(some) for some in x.split(2)]
    for output, place in renamed(returned[0]).items():
        say(f"{name}: what it returns at {place} is called {output} in every file.")
    answers = [named_outputs(each) for each in returned]
    outputs = {output: torch.cat([answer[output] for answer in answers]) for output in answers[0]}
    for output, values in outputs.items():
        broken = sum(not image.isfinite().all() for image in values)
        if broken:
            raise UserError(
                f"{name}: its output {output} holds NaN or infinite values for {broken} of {len(x)} training images; "
                "give other weights, or a callable whose network returns only outputs that can be imitated."
            )
    for output, values in outputs.items():
        reach = float(values.abs().max())
        if reach > LARGEST_OUTPUT or 0 < reach < 1 / LARGEST_OUTPUT:
            raise UserError(
                f"{name}: its output {output} reaches {reach:.3g}, whose square no float32 holds, so that nothing can "
                "be compared with it; let the network return it in other units."
            )
    constant = [output for output, values in outputs.items() if len(x) > 1 and _same_everywhere(values, 0)]
    if len(constant) == len(outputs):
        raise UserError(
            f"{name}: its outputs ({', '.join(outputs)}) are the same for {len(x)} different training images, so that "
            "there is nothing to imitate; are these its weights, and is this its --mean and --std?"
        )
    if constant:
        say(f"{name}: the same for {len(x)} different images is its output {', '.join(constant)}.")


def _different(pixels: NDArray[np.uint8]) -> list[int]:
    """Where in `pixels` images are that are there for the first time."""
    first: dict[bytes, int] = {}
    for index, image in enumerate(pixels):
        first.setdefault(hashlib.sha256(image.tobytes()).digest(), index)
    return list(first.values())


def _same_everywhere(values: Tensor, axis: int) -> bool:
    """Whether nothing changes along an axis."""
    spread = values.amax(axis) - values.amin(axis)
    return float(spread.max()) <= CONSTANT * float(values.abs().max())


def _warn_of_statistics(network: nn.Module, name: str, say: Say) -> None:
    untouched = [
        place
        for place, norm in network.named_modules()
        if isinstance(norm, nn.modules.batchnorm._BatchNorm)
        and norm.running_mean is not None
        and norm.running_var is not None
        and not norm.running_mean.any()
        and bool((norm.running_var == 1).all())
    ]
    if untouched:
        more = f" and {len(untouched) - 1} more have" if len(untouched) > 1 else " has"
        say(
            f"{name}: batch norm {untouched[0]}{more} the statistics of a new one, mean 0 and variance 1; are these "
            "trained weights?"
        )


def warn_of_taps(teacher: fx.GraphModule, names: list[str], x: Tensor, say: Say) -> None:
    """Whether the teacher's maps at these nodes have pixels to tell apart. x: network input, where the network is."""
    names = list(dict.fromkeys(names))
    places = {node.name: place for node, place in nodes.places(teacher).items()}
    with torch.no_grad():
        _, maps = with_maps(teacher, names)(x)
    for name, values in zip(names, maps, strict=True):
        if _same_everywhere(values.flatten(2), 2):
            say(
                f"feature layer {places[name]}: the teacher's map has one value in all pixels of a channel, for "
                f"{len(x)} images; nothing can be compared there. --feature-layer names others."
            )


def refuse_kl_of_one(shapes: dict[str, tuple[int, ...]]) -> None:
    """UserError where an output has one class, which softmax turns into 1 whatever the network says. shapes: by name,
    (images, classes, ...)."""
    single = [name for name, shape in shapes.items() if shape[1] == 1]
    if single:
        raise UserError(
            f"--logit kl: the output {single[0]} has one value for each image or pixel, whose softmax is always 1, so "
            "that this loss is zero for any student; use --logit mse."
        )


def refuse_one_class(dataset: Dataset, option: str) -> None:
    """UserError where all training labels are of one class. option: what the labels are wanted for."""
    labels = dataset.train.labels
    if labels is not None and len(found := np.unique(labels)) == 1:
        name = dataset.classes[int(found[0])] if dataset.classes else str(found[0])
        raise UserError(
            f"{option}: all {len(labels)} training labels of {dataset.source} are of one class, {name}; whatever the "
            "image shows is then right. Give images of several classes."
        )
