"""Networks that are not of the zoo, trained: a MobileNetV2 and a small segmenter, label-free, beside PTQ.

`python -m faqd.benchmarks.studies.own_networks --network mobilenet --data-root DATA --out WORK --json FILE`. A float
teacher with labels; from it students at 8/8 and 4/4 bits for several data seeds, without; beside them post-training
quantization, each seed on calibration images of its own. Accuracy is that of the deployed integers. Bundles of the
first seed go through export, verify and the bench as well. Nothing is chosen on the images that are reported.
Whatever is finished lies in WORK: the same command goes on where it was stopped.
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray

from faqd import __version__
from faqd.benchmarks.backends.sessions import OnnxruntimeBackend
from faqd.benchmarks.bench import bench
from faqd.benchmarks.measure.environment import environment
from faqd.benchmarks.measure.switches import Options
from faqd.benchmarks.measure.user_metric import load_metric
from faqd.benchmarks.studies import scenes
from faqd.benchmarks.studies.own_networks_table import DISTILLED, FLOAT, PTQ, Figure, Judged, markdown, rows
from faqd.benchmarks.studies.own_networks_work import Study, Work
from faqd.benchmarks.studies.resumable import STUDY, claim, going_on, say, training_seconds
from faqd.benchmarks.studies.scene_teacher import train_on_scenes
from faqd.bundle import MANIFEST, load_bundle
from faqd.command import emit_json, json_option, run
from faqd.deploy.bundle_facts import BundleOptions
from faqd.deploy.write_bundle import Calibration, export_run, quantize_after_training
from faqd.errors import UserError
from faqd.files import read_json, write_json, written_beside
from faqd.quant import FLOAT_BITS
from faqd.quantize.calibrate import calibrate
from faqd.quantize.capture.capture import capture
from faqd.quantize.config import QuantConfig
from faqd.quantize.prepare import insert_quantizers
from faqd.train.data.cifar import load_cifar
from faqd.train.data.options import DataOptions
from faqd.train.distill import distill
from faqd.train.evaluate import deployable
from faqd.train.loop.calibration_images import CALIBRATION_IMAGES
from faqd.train.loop.distributed import process_group
from faqd.train.recipes import TeacherRecipe, Training, distill_default, open_training
from faqd.train.run.folder import network_input
from faqd.train.run.plan import with_seeds
from faqd.train.run.student import load_student
from faqd.train.teacher import train_teacher

VERSION = 1
BITS = (8, 4)
"""Of weights and activations."""
BUNDLED = 2000
"""Evaluation images of a bundle at most: verify and the bench go through all of them several times."""
METRIC = f"{scenes.__file__}:segmentation"
STUDIES = {
    "mobilenet": Study(
        Training(epochs=8, batch_size=100, lr=0.1, warmup=0.05, clip_norm=5.0),
        open_training(1, 100, 200),
    ),
    "segmenter": Study(
        Training(epochs=20, batch_size=50, lr=0.1, warmup=0.05, clip_norm=5.0),
        open_training(1, 50, 400),
    ),
}


def train(work: Work) -> None:
    """The teacher and all students, where they are not finished yet."""
    if work.dense:
        if not work.scenes.is_file():
            published = load_cifar("cifar10", work.data_root, download=False, with_labels=True, say=say)
            photos, labels = published.batches[0]
            scenes.write_scenes(photos, np.asarray(labels), work.scenes)
        data = DataOptions(**work.data)
        train_on_scenes(work.spec, data, work.scenes, work.study.teacher, work.teacher, say, work.processes)
    else:
        recipe = TeacherRecipe(f"float {work.network}", "cifar10", work.spec, work.study.teacher)
        train_teacher(recipe, DataOptions(**work.data), work.teacher, True, say, work.processes)
    base = replace(distill_default(), about=f"{work.network}, label-free", training=work.study.student)
    variants = [replace(base, weight_bits=bits, act_bits=bits) for bits in BITS]
    recipes = with_seeds(variants, work.seeds, work.lesson.teacher)
    members = [(each, work.run(each.weight_bits, each.training.data_seed)) for each in recipes]
    distill(members, work.lesson, None, True, say, work.processes)


def judged(work: Work) -> list[Judged]:
    """What every network made of the evaluation images, of which each that is measured is kept as a file."""
    found = [_judged(work, FLOAT, FLOAT_BITS, 0, lambda: work.lesson.teacher.network)]
    for bits in BITS:
        for seed in range(work.seeds):
            found.append(_judged(work, PTQ, bits, seed, partial(quantized, work, bits, seed)))
    for bits in BITS:
        for seed in range(work.seeds):
            found.append(_judged(work, DISTILLED, bits, seed, partial(_trained, work.run(bits, seed))))
    return found


def _trained(run_folder: Path) -> Any:
    return deployable(load_student(run_folder))


def quantized(work: Work, bits: int, seed: int) -> Any:
    """The teacher quantized after training on the `seed`-th block of calibration images; the first is the one that
    `faqd-deploy ptq` takes."""
    dataset = work.lesson.dataset
    images = dataset.train.images[seed * CALIBRATION_IMAGES : (seed + 1) * CALIBRATION_IMAGES]
    if len(images) < CALIBRATION_IMAGES:
        raise UserError(f"--limit: {len(dataset.train)} training images are too few for seed {seed} of calibration.")
    inputs = network_input(images, dataset.preprocess)
    student = insert_quantizers(capture(work.lesson.teacher.network, inputs[:2]), QuantConfig(bits, bits), inputs[:2])
    student.network.eval()
    calibrate(student, inputs.split(128), "mse")
    return deployable(student)


def _judged(work: Work, method: str, bits: int, seed: int, network: Callable[[], Any]) -> Judged:
    path = work.folder / "cells" / f"{method}-w{bits}a{bits}-s{seed}.npz"
    if not path.is_file():
        counts = counted(work, work.seen_by(network()))
        with written_beside(path) as temporary, temporary.open("wb") as file:
            np.savez(file, counts=counts)
        shown = {name: round(100 * float(figure(counts.sum(0))), 2) for name, figure in figures(work).items()}
        say(f"{path.stem}: " + ", ".join(f"{name} {value} %" for name, value in shown.items()))
    with np.load(path) as file:
        return Judged(method, f"{bits}/{bits}", seed, file["counts"])


def counted(work: Work, seen: NDArray[Any]) -> NDArray[np.int64]:
    """(N, 3): pixels, or one image; those of the right class; those of the teacher's. Then those of each class in both
    and in either, (N, 2 classes), where there are pixels."""
    places = tuple(range(1, seen.ndim))
    total = np.full(len(seen), int(np.prod(seen.shape[1:])), np.int64)
    columns = [total, (seen == work.targets).sum(places), (seen == work.taught).sum(places)]
    made = np.stack(columns, 1).astype(np.int64)
    if work.dense:
        made = np.concatenate([made, scenes.class_counts(seen, work.targets).reshape(len(seen), -1)], 1)
    return made


def figures(work: Work) -> dict[str, Figure]:
    """What is reported, from counts summed over images."""
    shares: dict[str, Figure] = {
        "pixel_accuracy" if work.dense else "top1": lambda counts: counts[..., 1] / counts[..., 0],
    }
    if work.dense:
        shares["mean_iou"] = lambda counts: scenes.mean_iou(counts[..., 3:].reshape(*counts.shape[:-1], 2, -1))
    return {**shares, "agreement": lambda counts: counts[..., 2] / counts[..., 0]}


def benched(work: Work) -> dict[str, Any]:
    """Bundles of the first seed, verified, and their accuracy on onnxruntime as `faqd-bench` has it."""
    path = work.folder / "bench.json"
    if path.is_file():
        return dict(read_json(path))
    for bits in BITS:
        _bundled(work.bundle(PTQ, bits), partial(_quantize, work, bits))
        _bundled(work.bundle(DISTILLED, bits), partial(_export, work, bits))
    folders = [work.bundle(method, bits) for bits in BITS for method in (PTQ, DISTILLED)]
    backend = OnnxruntimeBackend(torch.get_num_threads(), "asked for")
    os.environ["FAQD_SCENES"] = str(work.scenes)
    metric = load_metric(METRIC) if work.dense else None
    record = bench([load_bundle(f) for f in folders], backend, Options(skip_latency=True), metric=metric).result
    teacher, *students = (entry for entry in record["networks"] if entry["role"] != "float")
    found = {
        "evaluation": record["evaluation"],
        "teacher": _benched(teacher),
        "students": {
            folder.name: {"verify": bundle["verify"], **_benched(entry)}
            for folder, bundle, entry in zip(folders, record["bundles"], students, strict=True)
        },
    }
    write_json(path, found)
    return found


def _bundled(out: Path, make: Callable[[Path], Any]) -> None:
    if not (out / MANIFEST).is_file():
        say(f"{out.name}: bundle")
        make(out)


def _quantize(work: Work, bits: int, out: Path) -> None:
    teacher = work.spec if work.dense else str(work.teacher)
    given = {**asdict(DataOptions(**work.data)), **({} if work.dense else {"source": None, "resize": None})}
    quantize_after_training(
        teacher,
        work.weights,
        given,
        QuantConfig(bits, bits),
        Calibration(images=CALIBRATION_IMAGES),
        out,
        BundleOptions(BUNDLED),
        say,
    )


def _export(work: Work, bits: int, out: Path) -> None:
    export_run(work.run(bits, 0), out, BundleOptions(BUNDLED), say)


def _benched(entry: dict[str, Any]) -> dict[str, Any]:
    kept = {key: entry["accuracy"][key] for key in ("top1", "gap_to_teacher", "agreement", "snr_db")}
    return {**kept, "metric": entry["metric"]}


@click.command(help=(__doc__ or "").splitlines()[0])
@click.option("--network", type=click.Choice(list(STUDIES)), required=True, help="Train this one.")
@click.option("--data-root", type=click.Path(path_type=Path), required=True, help="Where cifar-10-batches-py is.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Keep runs and finished cells here.")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(1), help="Repeat with so many seeds.")
@click.option("--teacher-steps", type=click.IntRange(1), help="Rehearse: train the teacher so many iterations.")
@click.option("--steps", type=click.IntRange(1), help="Train every student so many iterations.")
@click.option("--limit", type=click.IntRange(1), help="Use only so many training images.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1), help="CPU threads for torch.")
@json_option
def command(
    network: str,
    data_root: Path,
    out: Path,
    seeds: int,
    teacher_steps: int | None,
    steps: int | None,
    limit: int | None,
    threads: int,
    json_target: str | None,
) -> None:
    torch.set_num_threads(threads)
    study = STUDIES[network]
    study = Study(
        replace(study.teacher, steps=teacher_steps or study.teacher.steps),
        replace(study.student, steps=steps or study.student.steps),
    )
    claim(out, {"network": network, "seeds": seeds, "limit": limit, **asdict(study)})
    with process_group("cpu") as processes:
        if processes.size > 1:
            raise UserError("torchrun: this command trains in one process; start it by itself.")
        work = Work(network, study, out, data_root, limit, seeds, processes)
        with going_on(out):
            train(work)
    found = judged(work)
    measures = figures(work)
    dataset = work.lesson.dataset
    result = {
        "version": VERSION,
        "what": f"{network} trained here, quantized after training and distilled without labels; deployed integers",
        "command": shlex.join(["python", "-m", "faqd.benchmarks.studies.own_networks", *sys.argv[1:]]),
        "environment": environment(),
        "versions": {"faqd": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "threads": torch.get_num_threads(),
        "study": read_json(out / STUDY),
        "parameters": sum(p.numel() for p in work.lesson.teacher.network.parameters()),
        "training_images": len(dataset.train),
        "images": len(work.inputs),
        "unit": "scenes" if work.dense else "images",
        "seeds": seeds,
        "figures": list(measures),
        "training_s": {
            run.name: training_seconds(run)
            for run in [work.teacher, *(work.run(b, s) for b in BITS for s in range(seeds))]
        },
        "table": rows(found, measures),
        "bundles": benched(work),
    }
    click.echo(markdown(result), err=json_target == "-")
    emit_json(json_target, result)


def main() -> None:
    run(command)


if __name__ == "__main__":
    main()
