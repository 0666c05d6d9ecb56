"""Feature affinity with analytic gradients, every form from one factorisation of the difference.

Legend: b samples, C channels, N pixels; S, T (C, N) the normalised maps of student and teacher. With U = S - T,

    D = S'S - T'T = S'U + U'T,

so D keeps its digits where the maps nearly agree and is exactly zero where they are equal: nothing large
cancels. The narrower map is padded with zero channels, which leaves D unchanged. 4 S D is the gradient of
|D|_F^2 with respect to S, and 2 S sign(D) that of sum |D|.

Where N > C, |D|_F^2 and S D need (C, C) matrices only, a known identity for linear kernels (Kornblith et
al., arXiv 1905.00414, section 3), here applied to U and S. With A = SS', P = SU', E = UU', Q = P - E/2:

    |D|_F^2 = 2 (tr(QQ) + <A - P + E/4, E>),    S D = A U + P T = (A - P) U + P S.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from faqd.train.losses.affinity_tiles import Floors, Pair, Tile, floors_of, write_gradient

TILE_ROWS = 256
# Elements of a map handled at once (of a strip of D: four times that): what fits a core's cache, or fills a GPU.
CPU_ELEMENTS = 2**18
GPU_ELEMENTS = 2**24
# Pairs of so many tiles stay in the last cache until the backward pass.
KEPT_TILES = 4
# float32 is kept where its rounding moves the result by about 1e-5, relative; else float64 decides.
CANCELLATION = 3e-3
SMALLEST_L2 = 1e-3
# In float64, an |D|_F^2 below this share of its own terms is round-off: value and gradient are zero.
RELATIVE_FLOOR = 1e-14

# What the backward pass needs of a part: (student, teacher, out, outer) writes outer * gradient to `out` (b, Cs, N).
WriteGradient = Callable[[Tensor, Tensor, Tensor, Tensor], None]
SlopeOf = Callable[[Pair], Tensor]


class AffinityDistance(torch.autograd.Function):
    """(student, teacher, form, floor, columns, generator, dtype) to the scalar, without second derivatives.

    The gradient goes straight into the result of the backward pass, so nothing but small matrices (for l1: the
    slope) and pairs that fit one tile is held until then.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        form: str,
        floor: float,
        columns: int,
        generator: torch.Generator | None,
        dtype: torch.dtype,
    ) -> Tensor:
        # A tensor made in inference mode cannot be saved like this, nor changed in place before the backward pass.
        ctx.save_for_backward(student, None if teacher.is_inference() else teacher)
        ctx.teacher = teacher if teacher.is_inference() else None
        ctx.dtype = dtype
        ctx.parts = []
        values = []
        with _plain_arithmetic(student.device):
            for part in _parts(student, TILE_ROWS // 4 if form == "l1" else 1):
                flat = _flattened(student[part], teacher[part], dtype)
                floors = floors_of(*flat, floor)
                value, write = _distance(*flat, floors, form, columns, generator, ctx.needs_input_grad[0])
                values.append(value)
                ctx.parts.append((part, write))
        return torch.cat(values).mean().to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher = ctx.saved_tensors
        teacher = ctx.teacher if teacher is None else teacher
        # One of the two layouts whose pixels flatten without a copy.
        inner = student.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if inner else torch.contiguous_format
        gradient = torch.empty_like(student, memory_format=layout)
        # Applied before the rounding to half precision, where a small gradient needs its loss scale.
        outer = outer / len(student)
        with _plain_arithmetic(student.device):
            for part, write in ctx.parts:
                write(*_flattened(student[part], teacher[part], ctx.dtype), gradient[part].flatten(2), outer)
        return gradient, None, None, None, None, None, None


def _distance(
    student: Tensor,
    teacher: Tensor,
    floors: Floors,
    form: str,
    columns: int,
    generator: torch.Generator | None,
    differentiable: bool,
) -> tuple[Tensor, WriteGradient]:
    """Values (b,) float64 for maps (b, C, N), and what writes their gradients."""
    if form == "l1":
        return _l1(Pair.of(student, teacher, floors), differentiable)
    if form == "fast":
        assert generator is not None
        return _fast(Pair.of(student, teacher, floors), columns, generator)
    if student.is_cuda:  # A test per sample would make the host wait for the device.
        value, _, write = _l2(student, teacher, floors, torch.float64, form)
        return value, write
    value, sure, write = _l2(student, teacher, floors, student.dtype, form)
    if student.dtype == torch.float64 or bool(sure.all()):
        return value, write
    doubtful = (~sure).nonzero().squeeze(1)
    of_doubtful = floors[0][doubtful], floors[1][doubtful]
    value[doubtful], _, rewrite = _l2(student[doubtful], teacher[doubtful], of_doubtful, torch.float64, form)

    def write_all(student: Tensor, teacher: Tensor, out: Tensor, outer: Tensor) -> None:
        write(student, teacher, out, outer)
        again = torch.empty_like(out[doubtful])
        rewrite(student[doubtful], teacher[doubtful], again, outer)
        out[doubtful] = again

    return value, write_all


def _l2(
    student: Tensor, teacher: Tensor, floors: Floors, dtype: torch.dtype, form: str
) -> tuple[Tensor, Tensor, WriteGradient]:
    """Values (b,), whether the arithmetic of `dtype` was good enough for them, and what writes their gradients."""
    floors = floors[0].to(dtype), floors[1].to(dtype)
    pixels, channels = student.shape[2], max(student.shape[1], teacher.shape[1])
    direct = pixels <= channels
    # The factorised form takes the columns in tiles that fit the cache.
    step = pixels if direct else min(pixels, max(1, _elements(student) // (len(student) * channels)))
    starts = range(0, pixels, step)
    tiles = [Tile(slice(start, start + step), dtype, floors, len(starts) <= KEPT_TILES) for start in starts]
    pairs = (tile.pair(student, teacher) for tile in tiles)
    square, scale, slope_of = _direct(next(pairs)) if direct else _factorised(pairs)
    square = square * (square > RELATIVE_FLOOR * scale)
    sure = square > (CANCELLATION * scale).clamp_min_((SMALLEST_L2 * pixels) ** 2)
    if form == "l2_squared":
        value, steepness = square / pixels**2, (square > 0) * (4 / pixels**2)
    else:
        root = square.sqrt()
        value, steepness = root / pixels, torch.where(root > 0, 2 / pixels / root, 0.0)

    def write(student: Tensor, teacher: Tensor, out: Tensor, outer: Tensor) -> None:
        factor = (steepness * outer).to(dtype).view(-1, 1, 1)
        for tile in tiles:
            pair = tile.pair(student, teacher)
            columns = out[:, :, tile.columns]
            write_gradient(columns, tile.of(student), pair.norms[0], floors[0], slope_of(pair), factor)

    return value, sure, write


def _direct(pair: Pair) -> tuple[Tensor, Tensor, SlopeOf]:
    """|D|_F^2 (b,), what its rounding is relative to, and S D (b, C, N) of a pair, through D itself."""
    half = pair.u.mT @ pair.s.sub(pair.u, alpha=0.5)
    difference = half + half.mT
    square = _total(difference.square())
    scale = (square * _total(pair.u.square()) * _total(pair.s.square())).sqrt()
    return square, scale, lambda pair: pair.s @ difference


def _factorised(pairs: Iterator[Pair]) -> tuple[Tensor, Tensor, SlopeOf]:
    """The same through the (C, C) products of U and S; never forms D."""
    products = _sum(torch.cat([pair.u @ pair.u.mT, pair.s @ pair.halves.mT], dim=2) for pair in pairs)
    e, p, a = products.chunk(3, dim=2)
    outer = a - p
    q = p.sub(e, alpha=0.5)
    square = 2 * _total((q * q.mT).addcmul_(outer.add(e, alpha=0.25), e))
    scale = 4 * (_total(a.square()) * _total(e.square())).sqrt()
    mixing = torch.cat([outer, p], dim=2)
    return square, scale, lambda pair: mixing @ pair.halves


def _sum(products: Iterator[Tensor]) -> Tensor:
    total = next(products)
    for product in products:
        total += product
    return total


def _l1(pair: Pair, differentiable: bool) -> tuple[Tensor, WriteGradient]:
    """Row strips of the upper triangle; what is off the diagonal counts twice.

    The two products are summed one after the other: where no channel is alive in both pixels of a pair, in either map,
    they are equal but for the sign and D is exactly zero. The sign of a rounding error instead would be an arbitrary
    gradient, and at a dead pixel of the student one of the length 1 / eps.
    """
    t = pair.t
    slope = torch.zeros_like(pair.s)
    total = torch.zeros(len(slope), dtype=torch.float64, device=slope.device)
    for start in range(0, pair.pixels, TILE_ROWS):
        stop = min(start + TILE_ROWS, pair.pixels)
        rows = slice(start, stop)
        strip = pair.u[:, :, rows].mT @ t[:, :, start:]
        strip.baddbmm_(pair.s[:, :, rows].mT, pair.u[:, :, start:])
        size = strip.abs()
        total += 2 * size.sum((1, 2)).double() - size[:, :, : stop - start].sum((1, 2)).double()
        if differentiable:
            sign = strip.sign_()
            slope[:, :, start:].baddbmm_(pair.s[:, :, rows], sign)
            slope[:, :, rows].baddbmm_(pair.s[:, :, stop:], sign[:, :, stop - start :].mT)
    norm, floor, steepness = pair.norms[0], pair.floors[0], 2 / pair.pixels**2

    def write(student: Tensor, teacher: Tensor, out: Tensor, outer: Tensor) -> None:
        write_gradient(out, student, norm, floor, slope, steepness * outer)

    return total / pair.pixels**2, write


def _fast(pair: Pair, columns: int, generator: torch.Generator) -> tuple[Tensor, WriteGradient]:
    """D Z from right to left: first (C, columns), then (N, columns)."""
    z = torch.randn(
        (len(pair.halves), pair.pixels, columns),
        generator=generator,
        device=generator.device,
        dtype=pair.halves.dtype,
    ).to(pair.halves.device)
    uz, sz = (pair.halves @ z).chunk(2, dim=1)
    y = (pair.u.mT @ (sz - uz)).baddbmm_(pair.s.mT, uz)
    left, right = pair.s @ torch.cat([z, y], dim=2), torch.cat([y, z], dim=2).mT
    norm, floor, steepness = pair.norms[0], pair.floors[0], 2 / (columns * pair.pixels**2)

    def write(student: Tensor, teacher: Tensor, out: Tensor, outer: Tensor) -> None:
        write_gradient(out, student, norm, floor, left @ right, steepness * outer)

    return _total(y.square()) / (columns * pair.pixels**2), write


def _flattened(student: Tensor, teacher: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    student, teacher = student.to(dtype), teacher.to(dtype)
    if student.shape[2:] != teacher.shape[2:]:
        size = list(student.shape[2:])
        teacher = functional.interpolate(teacher, size=size, mode="bilinear", align_corners=True)
    return student.flatten(2), teacher.flatten(2)


def _parts(student: Tensor, rows: int) -> Iterator[slice]:
    """Slices of the batch; a sample counts as a map of at least `rows` channels."""
    samples = max(1, _elements(student) // (max(student.shape[1], rows) * student.shape[2:].numel()))
    for start in range(0, len(student), samples):
        yield slice(start, start + samples)


def _total(matrices: Tensor) -> Tensor:
    return matrices.sum((1, 2), dtype=torch.float64)


def _elements(like: Tensor) -> int:
    return GPU_ELEMENTS if like.is_cuda else CPU_ELEMENTS


@contextmanager
def _plain_arithmetic(device: torch.device) -> Iterator[None]:
    """float32 means float32: no autocast and no TF32 inside, as before outside."""
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        matmul = torch.backends.cuda.matmul
        before = matmul.fp32_precision
        matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = before
