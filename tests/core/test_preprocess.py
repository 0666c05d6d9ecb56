"""The one preprocessing against slow formulas that share nothing with it."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray

from faqd.errors import UserError
from faqd.preprocess import LETTERBOX_GREY, Preprocess, Resize

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def photo(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def preprocess(height: int, width: int, resize: Resize = "stretch") -> Preprocess:
    return Preprocess(height, width, MEAN, STD, resize)


def slow_resize(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.float64]:
    """Every output pixel on its own, in rational numbers until the last step."""
    rows = [weights(image.shape[0], height, y) for y in range(height)]
    columns = [weights(image.shape[1], width, x) for x in range(width)]
    result = np.zeros((height, width, 3))
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            for h, a in row.items():
                for w, b in column.items():
                    result[y, x] += float(a * b) * image[h, w]
    return result


def weights(source: int, target: int, position: int) -> dict[int, Fraction]:
    ratio = Fraction(source, target)
    centre = (position + Fraction(1, 2)) * ratio
    reach = max(Fraction(1), ratio)
    found = {i: 1 - abs(i + Fraction(1, 2) - centre) / reach for i in range(source)}
    positive = {i: weight for i, weight in found.items() if weight > 0}
    return {i: weight / sum(positive.values()) for i, weight in positive.items()}


@pytest.mark.parametrize("size", [(9, 13), (3, 4), (8, 5), (1, 1), (17, 6), (24, 10)])
@pytest.mark.parametrize("wanted", [(6, 6), (12, 5), (1, 9), (9, 13)])
def test_resize_is_the_triangle_filter(size: tuple[int, int], wanted: tuple[int, int]) -> None:
    image = photo(*size)
    found = preprocess(*wanted).fit(image)
    exact = slow_resize(image, *wanted)
    assert found.dtype == np.uint8 and found.shape == (*wanted, 3)
    assert np.abs(found - exact).max() <= 0.5 + 1e-4


def test_a_constant_image_stays_constant() -> None:
    assert np.unique(preprocess(224, 224).fit(np.full((375, 500, 3), 255, np.uint8))).tolist() == [255]


@pytest.mark.parametrize("channels", ["rgb", "bgr", "grey"])
def test_normalise_is_the_formula_in_the_order_of_the_channels(channels: str) -> None:
    count = 1 if channels == "grey" else 3
    record = Preprocess(4, 5, MEAN[:count], STD[:count], channels=channels)  # type: ignore[arg-type]
    image = photo(4, 5)
    found = record.normalise(record.fit(image)[None])
    planes = {
        "rgb": np.moveaxis(image, 2, 0),
        "bgr": np.moveaxis(image, 2, 0)[::-1],
        "grey": np.rint(image @ np.array([0.299, 0.587, 0.114]))[None],
    }[channels]
    wanted = np.stack([(p / 255 - m) / s for p, m, s in zip(planes, MEAN, STD, strict=False)])
    assert found.dtype == np.float32 and found.flags.c_contiguous
    np.testing.assert_allclose(found[0], wanted, atol=2e-6)


def test_letterbox_keeps_the_shape_and_frames_it_in_grey() -> None:
    found = preprocess(20, 20, "letterbox").fit(np.zeros((30, 60, 3), np.uint8))
    assert found.shape == (20, 20, 3)
    assert (found[5:15] == 0).all()
    assert (found[:5] == LETTERBOX_GREY).all() and (found[15:] == LETTERBOX_GREY).all()


@pytest.mark.parametrize("size", [(30, 60), (60, 30), (33, 77), (20, 20), (19, 21)])
def test_crop_takes_the_centre_of_the_covering_image(size: tuple[int, int]) -> None:
    height, width = size
    image = np.zeros((*size, 3), np.uint8)
    image[..., 0] = np.linspace(0, 255, width).astype(np.uint8)
    image[..., 1] = np.linspace(0, 255, height).astype(np.uint8)[:, None]
    found = preprocess(20, 20, "crop").fit(image).astype(int)
    assert found.shape == (20, 20, 3)
    for plane, length in ((0, width), (1, height)):
        # The middle of a ramp is kept; what is cut off at both ends is equal.
        assert abs(found[..., plane].mean() - image[..., plane].mean()) < 7
        span = found[..., plane].max() - found[..., plane].min()
        assert span == pytest.approx(255 * min(size) / length, abs=20)


def test_a_record_survives_json() -> None:
    record = preprocess(5, 6, "crop")
    assert Preprocess.from_json(record.to_json()) == record


@pytest.mark.parametrize(("mean", "std"), [((0.5,), (0.5,)), (MEAN, (0.1, 0.0, 0.1))])
def test_wrong_mean_and_std_are_refused(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match="--std"):
        Preprocess(4, 4, mean, std)
