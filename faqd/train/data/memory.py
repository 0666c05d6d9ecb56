"""Images have to fit into memory: told before the first is decoded."""

from __future__ import annotations

import os

from faqd.errors import UserError


def refuse_beyond_memory(source: str, count: int, height: int, width: int, channels: int) -> None:
    """UserError where so many images, one byte a value, are larger than this machine's memory."""
    needed, there = count * height * width * channels, _memory()
    if there is not None and needed > there:
        raise UserError(
            f"{source}: {count:,} images of {height}x{width} take {needed / 2**30:,.0f} GiB, and this machine has "
            f"{there / 2**30:,.0f}; give a smaller --image-size, or less data."
        )


def _memory() -> int | None:
    """Bytes; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
