"""One function per experiment. A recipe sets everything; options of the command line override it field by field."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from faqd.errors import UserError
from faqd.quant import FLOAT_BITS, Rounding, Target

if TYPE_CHECKING:
    # Modules with torch, which who lists recipes need not have.
    from faqd.quantize.config import Attention
    from faqd.quantize.quantizers.activation import ScaleGradient
    from faqd.quantize.without_training import Asymmetric, CalibrationMethod, Equalize
    from faqd.train.losses.distillation import AffinityForm, LogitForm

    DistillAffinity = AffinityForm | Literal["none"]
TeacherDtype = Literal["fp32", "bf16"]
Autocast = Literal["none", "bf16", "fp16"]
OptimizerName = Literal["sgd", "relative"]
Decode = Literal["full", "reduced"]


@dataclass(frozen=True)
class Training:
    """The schedule. Iterations are epochs of the data, or exactly `steps`; the rate falls to zero as a cosine.

    batch_size: 0 for one that suits the size of the images. accumulate: into how many parts a batch is cut, one after
    another. views: the crops and mirrorings in which an image is shown, None for new ones every time. decode: reduced
    for JPEG files in batches at a part of their size, where that suffices. optimizer: sgd, or relative, whose steps are
    shares of what is learned. lr: the peak rate. momentum, weight_decay and clip_norm (of the total gradient, None for
    no clipping) are those of sgd. warmup: the first part, in which the rate rises. frozen_norm: the last part, in which
    batch-norm statistics stand still; 1 keeps them as they came. For optimizer, lr, warmup and frozen_norm a recipe may
    leave None: where the student starts then decides (`usual_training`), and how far from its teacher for the lr of
    relative steps (`relative_rate`).
    """

    epochs: int
    batch_size: int
    lr: float | None = None
    steps: int | None = None
    optimizer: OptimizerName | None = "sgd"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    clip_norm: float | None = None
    frozen_norm: float | None = 0.1
    warmup: float | None = 0.0
    seed: int = 0
    data_seed: int = 0
    accumulate: int = 1
    views: int | None = None
    decode: Decode = "full"


RELATIVE_WARMUP = 0.05
RATES = {1: 1e-2, 2: 1e-2, 3: 5e-3, 4: 5e-3}
"""Of relative steps by weight bits, where the student says nothing of what its teacher does; above 4 bits, USUAL_RATE:
a finer grid has less far to go from one code to the next."""
USUAL_RATE, SMALLEST_DISTANCE = 2e-3, 1e-4
LARGEST_BATCH, SMALLEST_BATCH = 100, 8
BATCH_PIXELS = 2**20
"""What a batch holds between those two: 100 images of 100 pixels a side, 20 of 224."""


def usual_training(training: Training, scratch: bool, image_pixels: int) -> Training:
    """`training` with what it leaves open filled in, but for the lr of relative steps. image_pixels: of one image.

    A student that starts from float weights keeps their batch-norm statistics: re-estimating them would move every
    layer away from the teacher, whose augmentation we may not know (docs/decisions.md has the measurement).
    """
    optimizer = training.optimizer or ("sgd" if scratch else "relative")
    usual: dict[str, Any] = {
        "optimizer": optimizer,
        "lr": None if optimizer == "relative" else 0.05 if scratch else 0.002,
        "warmup": RELATIVE_WARMUP if optimizer == "relative" else 0.0,
        "frozen_norm": 0.1 if scratch else 1.0,
    }
    batch_size = training.batch_size or max(SMALLEST_BATCH, min(LARGEST_BATCH, BATCH_PIXELS // image_pixels))
    unset = {name: value for name, value in usual.items() if getattr(training, name) is None}
    return replace(training, batch_size=batch_size, **unset)


def relative_rate(distance: float, weight_bits: int) -> float:
    """The usual rate of relative steps for a student whose outputs are at this distance untrained (losses/heads.py).

    The distance is a square, the weights' errors that made it are not. A student that says nothing of what its teacher
    does has a distance of 1 or more, and farther is no farther to go.
    """
    return RATES.get(weight_bits, USUAL_RATE) * math.sqrt(min(1.0, max(SMALLEST_DISTANCE, distance)))


@dataclass(frozen=True)
class TeacherRecipe:
    """How a float teacher is trained, with labels."""

    about: str
    data: str
    arch: str
    training: Training


@dataclass(frozen=True)
class DistillRecipe:
    """How a student is distilled, without labels unless label_weight is above 0.

    data, arch, init: None for what the command line says, the teacher's own network, and its weights where the
    student is that network. The record of a run has them filled in. exclude: regular expressions of places kept float.
    strict: whether what has no integer form is refused. attention: what activations are multiplied by activations in.
    scale_step: the share of itself by which an activation's scale may change in one iteration, None for any.
    teacher_cache: whether what the teacher says of a training image is read from files.
    calibration, equalize, asymmetric: how a student with its teacher's weights begins
    (`faqd.quantize.without_training`).
    logit: None for relative with relative steps, and for mse with sgd. select: FILE.py:function, the measure by which
    the best weights are told; None for the distance of the outputs.
    """

    about: str
    training: Training
    data: str | None = None
    arch: str | None = None
    weight_bits: int = 8
    act_bits: int = 8
    target: Target = "tensorrt"
    scales: Literal["channel", "tensor"] = "channel"
    rounding: Rounding = "nearest"
    scale_gradient: ScaleGradient = "lsq"
    scale_step: float | None = 0.02
    calibration: CalibrationMethod = "auto"
    equalize: Equalize = "auto"
    asymmetric: Asymmetric = "auto"
    exclude: tuple[str, ...] = ()
    strict: bool = False
    attention: Attention = "float"
    init: str | None = None
    logit: LogitForm | None = "mse"
    logit_weight: float = 1.0
    temperature: float = 4.0
    affinity: DistillAffinity = "l2"
    affinity_weight: float = 1.0
    affinity_floor: float = 0.0
    columns: int = 15
    teacher_dtype: TeacherDtype = "fp32"
    teacher_cache: bool = False
    autocast: Autocast = "none"
    adaptors: bool = False
    label_weight: float = 0.0
    select: str | None = None


Recipe = TeacherRecipe | DistillRecipe


LEAST_BITS = 4
"""Of weights and of activations: with fewer, training changes more than any start."""


def has_a_choice_of_starts(recipe: DistillRecipe) -> bool:
    """Whether a student may begin equalized, or with other scales than the first (`faqd.train.run.untrained_start`)."""
    bits = (recipe.weight_bits, recipe.act_bits)
    return recipe.init != "scratch" and min(bits) >= LEAST_BITS and FLOAT_BITS not in bits


def digits_teacher() -> TeacherRecipe:
    return TeacherRecipe(
        "float ResNet-20 on the 8-pixel digits of scikit-learn, seconds on a CPU",
        "digits",
        "resnet20",
        Training(epochs=20, batch_size=64, lr=0.1, warmup=0.1),
    )


def cifar10_teacher() -> TeacherRecipe:
    return TeacherRecipe(
        "float ResNet-20 on CIFAR-10, the schedule of the released FAQD code",
        "cifar10",
        "resnet20",
        Training(epochs=200, batch_size=100, lr=0.1, weight_decay=1e-4, warmup=0.01),
    )


def distill_default() -> DistillRecipe:
    return DistillRecipe(
        "8-bit student from its own teacher: a short fine-tuning for any data",
        open_training(epochs=20),
        logit=None,
        affinity_floor=1e-3,
    )


def open_training(epochs: int, batch_size: int = 0, steps: int | None = None) -> Training:
    """A schedule that leaves to the student's start how it steps."""
    return Training(epochs, batch_size, None, steps, None, clip_norm=20.0, frozen_norm=None, warmup=None)


def distill_digits() -> DistillRecipe:
    return replace(
        distill_default(),
        about="8-bit student on the digits of scikit-learn, seconds on a CPU",
        data="digits",
        training=open_training(epochs=15, batch_size=64),
    )


def distill_cifar10() -> DistillRecipe:
    return replace(
        distill_default(),
        about="8-bit ResNet-20 student on CIFAR-10, 200 epochs",
        data="cifar10",
        training=open_training(epochs=200, batch_size=100),
    )


def distill_cifar10_w4a4() -> DistillRecipe:
    return replace(distill_cifar10(), about="4W4A ResNet-20 student on CIFAR-10, 200 epochs", weight_bits=4, act_bits=4)


def reference_code() -> DistillRecipe:
    """docs/recipes.md lists it against the released code of arXiv 2302.10899, choice by choice."""
    return DistillRecipe(
        "4W4A ResNet-20 on CIFAR-10 with the choices of the paper's released code",
        Training(epochs=200, batch_size=100, lr=0.01, frozen_norm=0.0, clip_norm=20.0),
        data="cifar10",
        arch="resnet20-reference",
        weight_bits=4,
        act_bits=4,
        scales="tensor",
        rounding="ceil",
        scale_gradient="mean",
        scale_step=None,
        init="scratch",
        affinity="l1",
        affinity_weight=10.0,
        adaptors=True,
        exclude=(r"^stem\.", r"\bshortcut\b", r"^classifier$"),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "digits-teacher": digits_teacher,
    "cifar10-resnet20-teacher": cifar10_teacher,
    "default": distill_default,
    "digits": distill_digits,
    "cifar10-resnet20": distill_cifar10,
    "cifar10-resnet20-w4a4": distill_cifar10_w4a4,
    "reference-code": reference_code,
}


def teacher_recipe(name: str) -> TeacherRecipe:
    recipe = _named(name)
    if not isinstance(recipe, TeacherRecipe):
        raise UserError(f"--recipe {name}: this one is for distill; `faqd-train recipes` lists all.")
    return recipe


def distill_recipe(name: str) -> DistillRecipe:
    recipe = _named(name)
    if not isinstance(recipe, DistillRecipe):
        raise UserError(f"--recipe {name}: this one is for teacher; `faqd-train recipes` lists all.")
    return recipe


def _named(name: str) -> Recipe:
    if name not in RECIPES:
        raise UserError(f"--recipe {name}: unknown; choose {', '.join(RECIPES)}.")
    return RECIPES[name]()


def overridden(recipe: Any, options: dict[str, Any]) -> Any:
    """`recipe` with every option that is not None put into its field, of the recipe or of its training."""
    given = {key: value for key, value in options.items() if value is not None}
    training = {key: given.pop(key) for key in list(given) if hasattr(recipe.training, key)}
    return replace(recipe, **given, training=replace(recipe.training, **training))


def recipe_json(recipe: Recipe) -> dict[str, Any]:
    return asdict(recipe)
