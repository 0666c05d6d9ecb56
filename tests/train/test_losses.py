"""The distillation losses against a direct float64 reference, where rounding is worst, and at zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from faqd.train.losses import affinity
from faqd.train.losses.distillation import AffinityForm, LogitForm, affinity_loss, logit_loss

EXACT: list[AffinityForm] = ["l1", "l2", "l2_batch", "l2_squared"]
FORMS: list[AffinityForm] = [*EXACT, "fast"]
SMOOTH: list[AffinityForm] = ["l2", "l2_squared"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of tiny operations: on a busy machine, handing them to a second thread takes seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def interpolation(size: int, from_size: int) -> Tensor:
    """(size, from_size) weights of linear interpolation with aligned corners."""
    weights = torch.zeros(size, from_size, dtype=torch.float64)
    for row in range(size):
        position = row * (from_size - 1) / (size - 1) if size > 1 else 0.0
        low = min(int(position), from_size - 1)
        high = min(low + 1, from_size - 1)
        weights[row, low] += 1 - (position - low)
        weights[row, high] += position - low
    return weights


def difference(student: Tensor, teacher: Tensor, floor: float = 0.0) -> Tensor:
    """D (B, N, N), by the definition, in float64."""
    height, width = student.shape[2:]
    rows, columns = interpolation(height, teacher.shape[2]), interpolation(width, teacher.shape[3])
    teacher = torch.einsum("hi,bciw,vw->bchv", rows, teacher.double(), columns)
    cosines: list[Tensor] = []
    for features in (student.double().flatten(2), teacher.flatten(2)):
        lengths = torch.linalg.vector_norm(features, dim=1, keepdim=True)
        typical = lengths.detach().square().mean((1, 2), keepdim=True).sqrt()
        unit = features / (lengths + 1e-5 + floor * typical)
        cosines.append(unit.mT @ unit)
    return cosines[0] - cosines[1]


def reference(student: Tensor, teacher: Tensor, form: str, floor: float = 0.0) -> Tensor:
    d = difference(student, teacher, floor)
    pixels = d.shape[1]
    if form == "l2_batch":
        return d.square().sum().sqrt() / (pixels * len(d))
    if form == "l1":
        return (d.abs().sum((1, 2)) / pixels**2).mean()
    if form == "l2":
        return (d.square().sum((1, 2)).sqrt() / pixels).mean()
    return (d.square().sum((1, 2)) / pixels**2).mean()


def ours(student: Tensor, teacher: Tensor, form: AffinityForm, floor: float = 0.0) -> Tensor:
    return affinity_loss(student, teacher, form, floor=floor, generator=seeded(5))


def with_gradient(
    loss: Callable[[Tensor, Tensor, Any, float], Tensor],
    student: Tensor,
    teacher: Tensor,
    form: str,
    floor: float = 0.0,
) -> tuple[float, Tensor]:
    student = student.detach().requires_grad_()
    value = loss(student, teacher, form, floor)
    (gradient,) = torch.autograd.grad(value, student)
    return value.item(), gradient


def distance(found: Tensor, expected: Tensor) -> float:
    error: Tensor = torch.linalg.vector_norm(found.double() - expected.double())
    return float((error / torch.linalg.vector_norm(expected.double())).item())


def assert_agrees(
    student: Tensor, teacher: Tensor, form: AffinityForm, value: float, gradient: float, floor: float = 0.0
) -> None:
    """`value` and `gradient` are bounds on the relative errors against the reference on the same inputs."""
    expected, expected_gradient = with_gradient(reference, student.double(), teacher.double(), form, floor)
    found, found_gradient = with_gradient(ours, student, teacher, form, floor)
    assert found == pytest.approx(expected, rel=value)
    assert distance(found_gradient, expected_gradient) <= gradient


sizes = st.integers(1, 7)


@settings(max_examples=120, deadline=None)
@given(
    batch=st.integers(1, 3),
    channels=st.tuples(st.integers(2, 9), st.integers(2, 9)),
    size=st.tuples(sizes, sizes),
    teacher_size=st.none() | st.tuples(sizes, sizes),
    form=st.sampled_from(EXACT),
    floor=st.sampled_from([0.0, 1e-3, 0.3]),
    dead=st.floats(0, 0.5),
    seed=st.integers(0, 2**31),
)
def test_any_shape_agrees_with_the_definition(
    batch: int,
    channels: tuple[int, int],
    size: tuple[int, int],
    teacher_size: tuple[int, int] | None,
    form: AffinityForm,
    floor: float,
    dead: float,
    seed: int,
) -> None:
    student = drawn((batch, channels[0], *size), seed)
    teacher = drawn((batch, channels[1], *(teacher_size or size)), seed + 1)
    off = torch.rand((batch, 1, *size), generator=seeded(seed)) < dead
    student.masked_fill_(off, 0.0)
    if off.flatten(1).all(1).any() or student[0, 0].numel() == 1:
        # One live pixel: D is a few 1e-6 on the diagonal, and the derivative of its root means nothing.
        assert math.isfinite(ours(student, teacher, form, floor).item())
        return
    assert_agrees(student, teacher, form, value=1e-9, gradient=3e-7, floor=floor)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 24, 3, 4)])
def test_gradient_is_that_of_the_value(shape: tuple[int, ...], form: AffinityForm) -> None:
    student, teacher = drawn(shape, 0).requires_grad_(), drawn(shape, 1)
    assert torch.autograd.gradcheck(lambda s: ours(s, teacher, form), student, eps=1e-7, atol=1e-6, rtol=1e-5)


def rotated(maps: Tensor, seed: int) -> Tensor:
    square = drawn((maps.shape[1], maps.shape[1]), seed)
    return torch.einsum("cd,bdhw->bchw", torch.linalg.qr(square)[0], maps)


SHAPES = [(3, 16, 16, 16), (3, 16, 32, 32), (3, 32, 4, 4), (3, 64, 8, 8), (2, 8, 24, 24)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", SMOOTH)
@pytest.mark.parametrize("active", [False, True])
def test_float32_unrelated_maps(shape: tuple[int, ...], form: AffinityForm, active: bool) -> None:
    student, teacher = drawn(shape, 1, torch.float32), drawn(shape, 2, torch.float32)
    if active:  # After a ReLU every cosine is positive: the common part cancels.
        student, teacher = student.relu() + 0.3, teacher.relu() + 0.3
    assert_agrees(student, teacher, form, value=3e-6, gradient=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", SMOOTH)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("noise", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
def test_float32_where_student_and_teacher_nearly_agree(
    shape: tuple[int, ...], form: AffinityForm, turned: bool, noise: float
) -> None:
    student = drawn(shape, 3).relu()
    teacher = student + noise * drawn(shape, 4)
    teacher = rotated(teacher, 5) if turned else teacher
    assert_agrees(student.float(), teacher.float(), form, value=1e-4, gradient=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_l1_unrelated_maps(shape: tuple[int, ...]) -> None:
    assert_agrees(drawn(shape, 1, torch.float32), drawn(shape, 2, torch.float32), "l1", 1e-6, 3e-4)


def test_one_doubtful_sample_is_redone_alone() -> None:
    student = drawn((3, 16, 12, 12), 6).relu()
    teacher = drawn((3, 16, 12, 12), 7).relu()
    teacher[1] = rotated(student + 1e-4 * teacher, 8)[1]
    student, teacher = student.float(), teacher.float()
    _, whole = with_gradient(ours, student, teacher, "l2")
    for i in range(3):
        _, alone = with_gradient(reference, student[i : i + 1].double(), teacher[i : i + 1].double(), "l2")
        assert distance(whole[i] * 3, alone[0]) < (1e-2 if i == 1 else 1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(2, 8, 9, 9), (2, 100, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_maps_give_zero_and_a_zero_gradient(
    form: AffinityForm, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    maps = drawn(shape, 9, dtype).relu()
    value, gradient = with_gradient(ours, maps, maps.clone(), form)
    assert value == 0.0
    assert torch.equal(gradient, torch.zeros_like(maps))


@pytest.mark.parametrize("form", SMOOTH)
@pytest.mark.parametrize("shape", [(2, 16, 9, 9), (2, 100, 4, 4)])
def test_permuted_channels_give_zero_and_a_zero_gradient(form: AffinityForm, shape: tuple[int, ...]) -> None:
    maps = drawn(shape, 10, torch.float32).relu()
    value, gradient = with_gradient(ours, maps, maps.flip(1), form)
    assert value == 0.0
    assert torch.equal(gradient, torch.zeros_like(maps))


@pytest.mark.parametrize("form", FORMS)
def test_dead_maps_stay_finite(form: AffinityForm) -> None:
    alive, dead = drawn((2, 8, 5, 5), 11, torch.float32), torch.zeros(2, 8, 5, 5)
    for student, teacher in [(dead, alive), (alive, dead), (dead, dead)]:
        value, gradient = with_gradient(ours, student, teacher, form)
        assert math.isfinite(value)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("form", EXACT)
def test_dead_pixels_have_the_gradient_of_the_definition(form: AffinityForm) -> None:
    student, teacher = drawn((2, 8, 6, 6), 12, torch.float32).relu(), drawn((2, 8, 6, 6), 13, torch.float32)
    student[:, :, 2, 1:4] = 0.0
    assert_agrees(student, teacher, form, value=1e-6, gradient=3e-5)


@pytest.mark.parametrize("form", EXACT)
@pytest.mark.parametrize("shape", [(2, 96, 5, 5), (2, 4, 8, 8), (1, 8, 20, 20)])
def test_dead_pixels_in_both_maps_have_the_gradient_of_the_definition(
    shape: tuple[int, ...], form: AffinityForm
) -> None:
    """Where one pixel is dead in the student and another in the teacher, D is zero, and so is its sign."""
    student, teacher = drawn(shape, 55, torch.float32).relu(), drawn(shape, 56, torch.float32).relu()
    student[:, :, 2:4] = teacher[:, :, 1:3] = teacher[:, :, 4] = 0.0
    assert_agrees(student, teacher, form, value=1e-6, gradient=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(form: AffinityForm, dtype: torch.dtype) -> None:
    student, teacher = drawn((2, 8, 6, 6), 14, dtype), drawn((2, 8, 6, 6), 15, dtype)
    value, gradient = with_gradient(ours, student, teacher, form)
    expected, expected_gradient = with_gradient(ours, student.float(), teacher.float(), form)
    assert value == expected
    assert gradient.dtype == dtype
    assert torch.equal(gradient, expected_gradient.to(dtype))


def test_the_loss_scale_reaches_a_half_precision_gradient() -> None:
    student, teacher = drawn((1, 4, 24, 24), 16, torch.float16) * 200, drawn((1, 4, 24, 24), 17, torch.float16)
    scale = 2.0**20
    _, expected = with_gradient(reference, student.double(), teacher.double(), "l2_squared")
    _, gradient = with_gradient(lambda *maps: scale * ours(*maps), student, teacher, "l2_squared")
    _, unscaled = with_gradient(ours, student, teacher, "l2_squared")
    assert distance(gradient.double() / scale, expected) < 1e-3 < distance(unscaled, expected)


@pytest.mark.parametrize("form", FORMS)
def test_strides_do_not_matter(form: AffinityForm) -> None:
    student, teacher = drawn((3, 6, 7, 5), 18, torch.float32), drawn((3, 6, 7, 5), 19, torch.float32)
    expected, expected_gradient = with_gradient(ours, student, teacher, form)

    def last(x: Tensor) -> Tensor:
        return x.to(memory_format=torch.channels_last)

    def turned(x: Tensor) -> Tensor:
        return x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)

    def sliced(x: Tensor) -> Tensor:
        return torch.stack([x, x], dim=-1).flatten(3)[..., ::2]

    for layout in (last, turned, sliced):
        for a, b in [(layout(student), teacher), (student, layout(teacher)), (layout(student), layout(teacher))]:
            value, gradient = with_gradient(ours, a, b, form)
            assert value == pytest.approx(expected, rel=1e-6)
            assert distance(gradient, expected_gradient) < 1e-5


@pytest.mark.parametrize("form", EXACT)
def test_order_of_samples_and_of_pixels_does_not_matter(form: AffinityForm) -> None:
    student, teacher = drawn((4, 5, 6, 6), 20), drawn((4, 7, 6, 6), 21)
    value, gradient = with_gradient(ours, student, teacher, form)
    samples = torch.tensor([2, 0, 3, 1])
    shuffled, shuffled_gradient = with_gradient(ours, student[samples], teacher[samples], form)
    assert shuffled == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(shuffled_gradient, gradient[samples])
    turned, turned_gradient = with_gradient(ours, student.mT, teacher.mT, form)
    assert turned == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(turned_gradient, gradient.mT)


@pytest.mark.parametrize("form", EXACT)
def test_tiles_and_parts_change_nothing(form: AffinityForm, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = drawn((5, 3, 6, 7), 22), drawn((5, 4, 6, 7), 23)
    value, gradient = with_gradient(ours, student, teacher, form)
    monkeypatch.setattr(affinity, "TILE_ROWS", 5)
    for elements in (2 * 3 * 6 * 7, 50, 4):
        monkeypatch.setattr(affinity, "CPU_ELEMENTS", elements)
        small, small_gradient = with_gradient(ours, student, teacher, form)
        assert small == pytest.approx(value, rel=1e-12)
        torch.testing.assert_close(small_gradient, gradient)


@pytest.mark.parametrize("form", SMOOTH)
@pytest.mark.parametrize("columns", [1, 5, 11, 34, 35])
def test_tiles_of_any_width_take_strides_half_precision_and_doubt(
    form: AffinityForm, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """7 x 5 pixels in tiles of `columns`, the last one narrower; sample 1 of 3 needs float64."""
    student, teacher = drawn((3, 6, 7, 5), 46).relu(), drawn((3, 6, 7, 5), 47).relu()
    teacher[1] = rotated(student + 1e-3 * teacher, 48)[1]
    for dtype, bound in [(torch.float32, 1e-4), (torch.float16, 2e-3)]:
        a, b = student.to(dtype), teacher.to(dtype)
        a, b = a.to(memory_format=torch.channels_last), b.mT.contiguous().mT
        expected, expected_gradient = with_gradient(reference, a.double(), b.double(), form)
        monkeypatch.setattr(affinity, "CPU_ELEMENTS", 3 * 6 * columns)
        monkeypatch.setattr(affinity, "_parts", lambda *_: [slice(0, 3)])
        value, gradient = with_gradient(ours, a, b, form)
        assert value == pytest.approx(expected, rel=1e-5)
        assert gradient.dtype == dtype
        assert distance(gradient[[0, 2]], expected_gradient[[0, 2]]) < bound
        assert distance(gradient[1], expected_gradient[1]) < 1e-2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("elements", [affinity.CPU_ELEMENTS, 40])
def test_a_graph_that_is_kept_gives_its_gradient_again(
    form: AffinityForm, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(affinity, "CPU_ELEMENTS", elements)
    student, teacher = drawn((2, 4, 6, 5), 49, torch.float32).requires_grad_(), drawn((2, 4, 6, 5), 50, torch.float32)
    loss = ours(student, teacher, form)
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    expected = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(loss, student, retain_graph=True)
    assert torch.equal(second, expected)
    with torch.no_grad():
        student.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, student)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("inference", [False, True])
def test_a_teacher_changed_before_the_backward_pass_is_noticed(form: AffinityForm, inference: bool) -> None:
    student = drawn((2, 4, 6, 5), 57, torch.float32).requires_grad_()
    with torch.inference_mode(inference):
        teacher = drawn((2, 4, 6, 5), 58, torch.float32)
    loss = ours(student, teacher, form)
    with pytest.raises(RuntimeError, match=r"[Ii]nplace"):
        teacher.add_(1.0)
        torch.autograd.grad(loss, student)


@pytest.mark.parametrize("form", FORMS)
def test_the_teacher_may_run_in_inference_mode(form: AffinityForm) -> None:
    student, teacher = drawn((2, 4, 6, 5), 53, torch.float32), drawn((2, 3, 3, 4), 54, torch.float32)
    expected, expected_gradient = with_gradient(ours, student, teacher, form)
    with torch.inference_mode():
        copy = teacher.clone()
    value, gradient = with_gradient(ours, student, copy, form)
    assert value == expected
    assert torch.equal(gradient, expected_gradient)


def test_a_large_map_needs_tiles_beside_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is dear: the result is the only tensor of the size of the map."""
    tile = 4 * 256
    monkeypatch.setattr(affinity, "CPU_ELEMENTS", tile)
    student, teacher = drawn((1, 4, 64, 64), 51, torch.float32), drawn((1, 4, 64, 64), 52, torch.float32)
    with Storages() as storages:
        _, gradient = with_gradient(ours, student, teacher, "l2")
    known = {maps.untyped_storage().data_ptr() for maps in (student, teacher, gradient)}
    fresh = [size for pointer, size in storages.largest.items() if pointer not in known]
    assert 0 < max(fresh) <= 2 * tile * 4


class Storages(TorchDispatchMode):
    """Bytes of every storage that an operation returned, the largest one at each address."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.largest: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            storage = result.untyped_storage()
            self.largest[storage.data_ptr()] = max(storage.nbytes(), self.largest.get(storage.data_ptr(), 0))
        return result


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]
    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("form", FORMS)
def test_no_tensor_grows_with_the_square_of_the_pixels(form: AffinityForm) -> None:
    pixels = 64 * 64
    student, teacher = drawn((1, 4, 64, 64), 24, torch.float32), drawn((1, 4, 64, 64), 25, torch.float32)
    with LargestTensor() as largest:  # type: ignore[no-untyped-call]
        with_gradient(ours, student, teacher, form)
    bound = pixels * affinity.TILE_ROWS if form == "l1" else pixels * 2 * 15
    assert 0 < largest.elements <= bound


@pytest.mark.parametrize("form", FORMS)
def test_autocast_and_no_grad_change_nothing(form: AffinityForm) -> None:
    student, teacher = drawn((2, 8, 6, 6), 26, torch.float32), drawn((2, 8, 6, 6), 27, torch.float32)
    value, gradient = with_gradient(ours, student, teacher, form)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, inside_gradient = with_gradient(ours, student, teacher, form)
    assert inside == value
    assert torch.equal(inside_gradient, gradient)
    with torch.no_grad():
        assert ours(student, teacher, form).item() == value


@pytest.mark.parametrize("form", FORMS)
def test_the_teacher_learns_nothing(form: AffinityForm) -> None:
    student, teacher = drawn((2, 3, 4, 4), 28).requires_grad_(), drawn((2, 3, 4, 4), 29).requires_grad_()
    torch.autograd.backward(ours(student, teacher, form))
    assert student.grad is not None
    assert teacher.grad is None


def test_fast_is_unbiased_in_value_and_gradient() -> None:
    student, teacher = drawn((1, 6, 4, 5), 30), drawn((1, 6, 4, 5), 31)
    d = difference(student, teacher)[0]
    exact, exact_gradient = with_gradient(ours, student, teacher, "l2_squared")
    generator, columns, draws = seeded(32), 5, 3000
    copies = student.expand(draws, -1, -1, -1).clone().requires_grad_()
    loss = affinity_loss(copies, teacher.expand(draws, -1, -1, -1), "fast", columns=columns, generator=generator)
    (gradients,) = torch.autograd.grad(loss, copies)
    deviation = exact * math.sqrt(2 * torch.linalg.matrix_power(d, 4).trace().item() / columns)
    deviation /= (d @ d).trace().item()
    assert abs(loss.item() - exact) < 4 * deviation / math.sqrt(draws)
    assert 4 * deviation / math.sqrt(draws) < 0.05 * exact
    spread = (gradients * draws).std(0) / math.sqrt(draws)
    assert ((gradients.sum(0) - exact_gradient[0]).abs() < 5 * spread).all()


def test_fast_has_the_deviation_of_its_columns() -> None:
    student, teacher = drawn((1, 6, 4, 5), 33), drawn((1, 6, 4, 5), 34)
    d = difference(student, teacher)[0]
    generator = seeded(35)
    for columns in (2, 15):
        values = torch.stack(
            [affinity_loss(student, teacher, "fast", columns=columns, generator=generator) for _ in range(600)]
        )
        expected = math.sqrt(2 * torch.linalg.matrix_power(d, 4).trace().item() / columns) / d.numel()
        assert values.std().item() == pytest.approx(expected, rel=0.25)


def test_fast_draws_afresh_from_its_own_generator_only() -> None:
    student, teacher = drawn((3, 4, 5, 5), 36), drawn((3, 4, 5, 5), 37)
    before = torch.get_rng_state()
    generator = seeded(38)
    first, second = (affinity_loss(student, teacher, "fast", generator=generator).item() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first != second
    generator.manual_seed(38)
    assert affinity_loss(student, teacher, "fast", generator=generator).item() == first
    once = affinity_loss(student[:1], teacher[:1], "fast", generator=seeded(39)).item()
    twice = affinity_loss(
        student[:1].expand(2, -1, -1, -1), teacher[:1].expand(2, -1, -1, -1), "fast", generator=seeded(39)
    )
    assert twice.item() != once


@pytest.mark.parametrize("dense", [(), (3, 4)])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_logit_losses_by_the_definition(dense: tuple[int, ...], temperature: float) -> None:
    student, teacher = drawn((5, 7, *dense), 40), drawn((5, 7, *dense), 41) * 3
    assert logit_loss(student, teacher, "mse", temperature).item() == pytest.approx(
        float(np.mean((student.numpy() - teacher.numpy()) ** 2))
    )

    def softmax(x: Tensor) -> Any:
        e = np.exp(x.numpy() / temperature)
        return e / e.sum(axis=1, keepdims=True)

    p, q = softmax(teacher), softmax(student)
    divergence = (p * np.log(p / q)).sum(axis=1).mean()
    assert logit_loss(student, teacher, "kl", temperature).item() == pytest.approx(temperature**2 * divergence)


def test_kl_gradient_is_the_difference_of_probabilities() -> None:
    student, teacher = drawn((4, 6), 42).requires_grad_(), drawn((4, 6), 43).requires_grad_()
    torch.autograd.backward(logit_loss(student, teacher, "kl", 2.0))
    expected = 2.0 * ((student / 2).softmax(1) - (teacher / 2).softmax(1)) / 4
    torch.testing.assert_close(student.grad, expected.detach())
    assert teacher.grad is None


def test_logit_losses_in_half_precision_and_at_equality() -> None:
    student, teacher = drawn((4, 6), 44, torch.float16), drawn((4, 6), 45, torch.float16)
    forms: list[LogitForm] = ["mse", "kl"]
    for form in forms:
        found = logit_loss(student, teacher, form, 3.0)
        assert found.dtype == torch.float32
        assert found.item() == logit_loss(student.float(), teacher.float(), form, 3.0).item()
        assert logit_loss(teacher, teacher.clone(), form, 3.0).item() == 0.0


def test_what_does_not_fit_is_refused_with_a_cure() -> None:
    with pytest.raises(ValueError, match="one shape"):
        logit_loss(torch.zeros(2, 3), torch.zeros(2, 1), "mse", 1.0)
    with pytest.raises(ValueError, match="mse or kl"):
        logit_loss(torch.zeros(2, 3), torch.zeros(2, 3), "ce", 1.0)  # type: ignore[arg-type]
    maps = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match="feature maps"):
        affinity_loss(maps, maps.flatten(2), "l2")
    with pytest.raises(ValueError, match="batch"):
        affinity_loss(maps, maps[:1], "l2")
    with pytest.raises(ValueError, match="l2_squared"):
        affinity_loss(maps, maps, "l3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="generator"):
        affinity_loss(maps, maps, "fast")
    with pytest.raises(ValueError, match="columns=0"):
        affinity_loss(maps, maps, "fast", columns=0, generator=seeded(0))
