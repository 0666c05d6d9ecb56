"""What the teacher asks of the student: the same outputs, and the same spatial similarities inside."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from faqd.train.losses.affinity import AffinityDistance

LogitForm = Literal["relative", "mse", "kl"]
AffinityForm = Literal["l1", "l2", "l2_batch", "l2_squared", "fast"]


def logit_loss(student: Tensor, teacher: Tensor, form: LogitForm, temperature: float) -> Tensor:
    """Distance between the outputs of student and teacher, a dimensionless scalar.

    Both have one shape (B, classes, ...): positions after dim 1, as in dense outputs, count like samples.

    - ``mse``: mean of (student - teacher)^2 over batch, positions and classes; `temperature` is not used.
    - ``kl``: T^2 * KL(softmax(teacher / T) || softmax(student / T)), classes summed, batch and positions
      averaged. The released code of arXiv 2302.10899 sums over the batch instead: its weight 1 at batch B is
      the weight B here.

    The teacher receives no gradient. The arithmetic is float32, or float64 where an input is.
    """
    if student.ndim < 2 or student.shape != teacher.shape:
        raise ValueError(
            f"student outputs {tuple(student.shape)} and teacher outputs {tuple(teacher.shape)}: expected one "
            "shape (batch, classes, ...); give the student the teacher's output layer."
        )
    dtype = _arithmetic(student, teacher)
    student, teacher = student.to(dtype), teacher.detach().to(dtype)
    if form == "mse":
        return functional.mse_loss(student, teacher)
    if form == "kl":
        log_student = functional.log_softmax(student / temperature, dim=1)
        log_teacher = functional.log_softmax(teacher / temperature, dim=1)
        divergence = functional.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
        return divergence * (temperature**2 * student.shape[1] / student.numel())
    raise ValueError(f"logit form {form!r}: expected mse or kl; relative is the distance of faqd.train.losses.heads.")


def affinity_loss(
    student: Tensor,
    teacher: Tensor,
    form: AffinityForm,
    *,
    floor: float = 0.0,
    columns: int = 15,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Feature affinity (arXiv 2302.10899): do the same positions resemble each other? A dimensionless scalar.

    student (B, Cs, H, W), teacher (B, Ct, H', W'); channel counts may differ, and where the sizes do the
    teacher is resized to (H, W), bilinearly with aligned corners. With N = H * W, every pixel's column f of
    channels becomes f / (|f| + 1e-5 + floor * r), where r is the root mean square of the lengths |f| in the same map
    of the same sample and counts as a constant; S and T are the resulting (C, N) matrices of one sample and
    D = S'S - T'T is the difference of their cosine similarities. A floor keeps columns that hardly differ from zero,
    whose direction is rounding, from counting as much as the others. The value of a sample is

    - ``l1``: sum |D| / N^2, computed in tiles: memory O(N * tile) instead of O(N^2);
    - ``l2``: |D|_F / N, at exactly equal maps 0 with a zero gradient;
    - ``l2_batch``: no value of a sample: one norm over all B of them, |D|_F / (B * N), as the paper's code has it;
    - ``l2_squared``: |D|_F^2 / N^2; like l2 in O(N * C * min(N, C)) time;
    - ``fast``: |D Z|_F^2 / (columns * N^2) for a standard normal Z (N, columns), drawn afresh for every
      sample from `generator`: an unbiased estimate of l2_squared, relative deviation at most
      sqrt(2 / columns) per sample. The global generator is never touched.

    The result is the mean over the batch, but for l2_batch. The paper's code sums over the batch: its weight w at
    batch B is the weight w * B here (0.1 at batch 100 is 10), for l1 and l2_batch.

    The teacher receives no gradient. Half precision and any strides are welcome; the arithmetic is float32
    or float64, whatever autocast and TF32 settings hold outside. No second derivatives.
    """
    if student.ndim != 4 or teacher.ndim != 4 or student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"student map {tuple(student.shape)} and teacher map {tuple(teacher.shape)}: expected "
            "(batch, channels, height, width) twice with one batch size; choose layers that make feature maps."
        )
    if form not in get_args(AffinityForm):
        raise ValueError(f"affinity form {form!r}: expected {', '.join(get_args(AffinityForm))}.")
    if form == "fast" and (generator is None or columns < 1):
        raise ValueError(
            f"fast affinity with columns={columns}, generator={generator}: expected at least one column and "
            "a generator of its own; pass torch.Generator()."
        )
    dtype = _arithmetic(student, teacher)
    of_sample = "l2_squared" if form == "l2_batch" else form
    distance: Tensor = AffinityDistance.apply(  # type: ignore[no-untyped-call]
        student, teacher.detach(), of_sample, floor, columns, generator, dtype
    )
    if form == "l2_batch":
        # The root of zero has no gradient.
        equal = distance == 0
        distance = torch.where(equal, 0.0, torch.where(equal, 1.0, distance / len(student)).sqrt())
    return distance


def _arithmetic(student: Tensor, teacher: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
