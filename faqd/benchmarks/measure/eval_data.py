"""`faqd-bench --eval-data`: images of the user's own in place of those that a bundle holds.

They are decoded where training decodes them, and `teacher.onnx` says what is wanted of them. The images of a bundle
need neither, so that a board needs neither.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from faqd.at_once import images_at_once
from faqd.benchmarks.backends.sessions import OnnxruntimeBackend
from faqd.benchmarks.measure.networks import EvaluationData
from faqd.bundle import TEACHER, Bundle, Evaluation
from faqd.data_flags import refuse_idle_labels
from faqd.errors import UserError
from faqd.train.data.evaluation import EvaluationImages, names_and_sizes, read_evaluation, renumbered
from faqd.train.data.memory import refuse_beyond_memory
from faqd.train.data.options import DataOptions
from faqd.train.data.split import Split
from faqd.train.run.labels import refuse_other_classes

BATCH = 64
MOST_VALUES = 2**28
"""Of one output that are kept in memory, 1 GiB: a metric that knows boxes or masks wants more images than a bundle
stores outputs of."""
Say = Callable[[str], None]


def evaluation_data(bundle: Bundle, source: str, labels: bool, threads: int, say: Say) -> EvaluationData:
    """All images of `source` (as --data has them), fitted as the bundle says, with the teacher's outputs.

    labels: whether the subfolders of a folder are classes; those of an npz file count where it has some. UserError
    where the source cannot be read, or has labels of other classes than the bundle.
    """
    refuse_idle_labels(labels, source)
    options = DataOptions(str(bundle.folder), labels=labels, evaluation=source)
    read = read_evaluation(options, bundle.preprocess, None, True, say)
    split = _of_bundle_classes(read, bundle, options)
    shape = bundle.preprocess.height, bundle.preprocess.width, len(bundle.preprocess.mean)
    refuse_beyond_memory(source, len(split), *shape)
    images = split.images
    say(f"what the teacher gives for {len(split):,} images of {source}")
    teacher = _of_teacher(bundle, images, threads)
    content = hashlib.sha256(images.tobytes())
    content.update(b"" if split.labels is None else split.labels.tobytes())
    content.update(bundle.manifest["teacher"]["sha256"].encode())
    evaluation = Evaluation(images, split.labels, teacher, *names_and_sizes(split, read.files))
    return EvaluationData(evaluation, source, content.hexdigest())


def _of_bundle_classes(read: EvaluationImages, bundle: Bundle, options: DataOptions) -> Split:
    """With labels that count the bundle's classes: by their names, where both have names, else as they are."""
    split, classes, known = read.split, read.classes or (), tuple(bundle.manifest["classes"] or ())
    if split.labels is None:
        return split
    if known and classes != known and classes != tuple(map(str, range(len(classes)))):
        return replace(split, labels=renumbered(split.labels, classes, known, options))
    shapes = {output["name"]: tuple(output["shape"]) for output in bundle.manifest["outputs"]}
    refuse_other_classes(classes, f"--eval-data {options.evaluation}", shapes, bundle.name)
    return split


def _of_teacher(bundle: Bundle, images: NDArray[np.uint8], threads: int) -> dict[str, NDArray[np.float32]]:
    """Dense outputs for the first images only, as many as MOST_VALUES allows."""
    if not bundle.has(TEACHER):
        raise UserError(f"{bundle.folder} holds no {TEACHER}, which --eval-data needs: export the run again.")
    parts: dict[str, list[NDArray[np.float32]]] = {}
    name = bundle.manifest["input"]["name"]
    with OnnxruntimeBackend(threads, "").open(bundle, "teacher") as network:
        step = images_at_once(images.shape[1:3], BATCH)
        for start in range(0, len(images), step):
            outputs = network.run({name: bundle.network_input(images[start : start + step])})
            rows = {key: max(1, MOST_VALUES // values[0].size) for key, values in outputs.items()}
            wanted = {key: values for key, values in outputs.items() if start < rows[key]}
            for key, values in wanted.items():
                parts.setdefault(key, []).append(values[: rows[key] - start].astype(np.float32))
            if not wanted:
                break
    return {key: np.concatenate(values) for key, values in parts.items()}
