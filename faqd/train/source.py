"""The teacher that the command line names: a finished run, or the user's own network with its weights."""

from __future__ import annotations

from pathlib import Path

from faqd.errors import UserError
from faqd.files import sha256
from faqd.train.data import DataOptions, load_dataset
from faqd.train.distill import Teacher
from faqd.train.network import load_weights, user_source
from faqd.train.run import load_teacher


def teacher_from(spec: str, weights: Path | None, data: DataOptions) -> Teacher:
    """The float teacher in evaluation mode; UserError says what is missing.

    data: gives the input size of a network of the user's own.
    """
    if Path(spec).is_dir():
        if weights is not None:
            raise UserError(f"--teacher-weights: the run {spec} has its own weights; leave the option out.")
        return Teacher(*load_teacher(Path(spec)))
    if not spec.rpartition(":")[0].endswith(".py"):
        raise UserError(f"--teacher {spec}: no such run folder, and not FILE.py:callable.")
    if weights is None:
        raise UserError(f"--teacher {spec}: needs --teacher-weights FILE, the trained weights of that network.")
    images = load_dataset(data, with_labels=False).train.images
    source = user_source(spec, images.shape[3], (images.shape[1], images.shape[2]))
    network = source.build()
    load_weights(network, weights)
    return Teacher(network.eval(), source, sha256(weights))
