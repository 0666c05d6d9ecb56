"""A source of images that is opened: listed, its labels read where they are wanted, and nothing decoded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from faqd.preprocess import Channels
from faqd.train.data.listing import Listing

Classes = tuple[str, ...] | None
Labels = NDArray[np.int64] | None


@dataclass(frozen=True)
class Opened:
    """labels: (N,), None where there are none or they are not wanted. size: height and width where the source tells
    them of all its images. channels: what these are without --channels."""

    files: Listing
    labels: Labels = None
    classes: Classes = None
    size: tuple[int, int] | None = None
    channels: Channels = "rgb"
