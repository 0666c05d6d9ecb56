"""The student of a recipe: which network it is, what it starts from, and the trained one of a finished run."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from faqd.errors import UserError
from faqd.quantize.capture.capture import capture
from faqd.quantize.config import QuantConfig
from faqd.quantize.equalize import with_products
from faqd.quantize.prepare import insert_quantizers
from faqd.quantize.student import Student
from faqd.train.networks.own_tensors import own_tensors, put_tensors
from faqd.train.networks.source import NetworkSource, architecture_source
from faqd.train.networks.tensor_files import read_tensors
from faqd.train.recipes import DistillRecipe
from faqd.train.run.folder import WEIGHTS, fill, finished, load_exactly, read_record, refuse_other_bits
from faqd.train.run.lesson import Teacher, output_shapes

_AS_PREPARED: dict[str, Any] = {"equalized": []}
"""What the record of a run whose student was not looked at before training says of it."""


def start_of(recipe: DistillRecipe, teacher: Teacher) -> str:
    """What the student starts from: teacher, scratch, or the folder of a run."""
    same = student_source(recipe.arch, teacher) == teacher.source
    if recipe.init == "teacher" and not same:
        raise UserError("--init teacher: student and teacher are different networks; use --init scratch.")
    return recipe.init or ("teacher" if same else "scratch")


def student_source(arch: str | None, teacher: Teacher) -> NetworkSource:
    """The student's network: the teacher's own, or `arch`: one of the zoo with the teacher's number of outputs, or a
    FILE.py:callable, module:callable, FILE.pt2 or FILE.onnx. UserError where its outputs are not the teacher's."""
    if arch is None or arch == teacher.source.architecture:
        return teacher.source
    theirs = output_shapes(teacher.network, teacher.source, "as the student's")
    shapes = list(theirs.values())
    source = architecture_source(arch, teacher.source.channels, teacher.source.pixels, shapes[0][-1])
    if source.architecture is not None and (len(shapes) > 1 or len(shapes[0]) != 2):
        raise UserError(
            f"--arch {arch}: the teacher has no single vector of class scores that the zoo could imitate; give a "
            "student with its outputs as FILE.py:callable, module:callable, FILE.pt2 or FILE.onnx."
        )
    if source.architecture is None and source != teacher.source:
        ours = output_shapes(source.build().eval(), source, "as the teacher's")
        if ours != theirs:
            raise UserError(
                f"--arch {arch}: for 2 images its outputs are {_listed(ours)}, and the teacher's {_listed(theirs)}; a "
                "student has outputs of the same names and shapes."
            )
    return source


def _listed(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())


def new_student(recipe: DistillRecipe, source: NetworkSource, teacher: Teacher, example: Tensor) -> Student:
    """The student before training: the teacher's weights, fresh ones, or those of the run `recipe.init` names.

    All its parameters learn: code that freezes a teacher means the teacher. A filter that is a buffer stays as it is.
    """
    torch.manual_seed(recipe.training.seed)
    network = source.build()
    for parameter in network.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    if recipe.init == "teacher":
        put_tensors(network, own_tensors(teacher.network))
    elif recipe.init != "scratch":
        _load_float(network, source, Path(str(recipe.init)))
    return insert_quantizers(capture(network, example), recipe_bits(recipe), example)


def _load_float(network: nn.Module, source: NetworkSource, folder: Path) -> None:
    """Fill `network` with the float weights of a finished run of either kind, whatever its bits were."""
    if not folder.is_dir():
        raise UserError(f"--init {folder}: expected teacher, scratch or the folder of a run.")
    if NetworkSource.from_json(finished(folder)["network"], folder) != source:
        raise UserError(f"--init {folder}: that run trained another network than {source.name}.")
    if finished(folder).get("untrained", _AS_PREPARED)["equalized"]:
        raise UserError(
            f"--init {folder}: that run is equalized, its weights belong to its products; start from the teacher."
        )
    state = read_tensors(folder / WEIGHTS)
    latent = {re.sub(r"\.parametrizations\.weight\.original$", ".weight", key): state[key] for key in state}
    wanted = own_tensors(network)
    # What evaluation does not use, such as a head for training alone, no run keeps.
    kept = {key: latent.get(key, value) for key, value in wanted.items()}
    if lost := [key for key in latent if key.endswith((".weight", ".bias")) and key not in wanted]:
        raise UserError(
            f"--init {folder}: the run keeps {lost[0]}, which {source.name} computes from other tensors, as a weight "
            "norm does; start from the teacher, or build the network without it."
        )
    fill(network, kept, folder / WEIGHTS)


def recipe_bits(recipe: DistillRecipe) -> QuantConfig:
    return _bits(asdict(recipe))


def _bits(asked: dict[str, Any]) -> QuantConfig:
    """What a recipe, as a run records it, asks of the quantizers."""
    return QuantConfig(
        asked["weight_bits"],
        asked["act_bits"],
        asked["target"],
        asked["scales"] == "channel",
        asked["rounding"],
        asked["scale_gradient"],
        tuple(asked.get("exclude", ())),
        asked.get("strict", False),
        asked.get("asymmetric") == "always",
        asked.get("attention", "float"),
    )


def load_student(folder: Path) -> Student:
    """The trained student of a finished distillation run, in evaluation mode."""
    record = read_record(folder)
    if record["kind"] != "distill":
        raise UserError(f"{folder}: holds a teacher; distil a student from it first, or use `faqd-deploy ptq`.")
    source = NetworkSource.from_json(record["network"], folder)
    bits, start = _bits(record["recipe"]), record.get("untrained", _AS_PREPARED)
    captured = with_products(capture(source.build(), source.example()), start["equalized"])
    bits = replace(bits, asymmetric=start.get("asymmetric", bits.asymmetric))
    student = insert_quantizers(captured, bits, source.example())
    load_exactly(student.network, folder / WEIGHTS)
    refuse_other_bits(folder, record)
    student.network.eval()
    return student
