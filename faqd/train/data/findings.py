"""What is found out about image files as they are read, and how it is told."""

from __future__ import annotations

from dataclasses import dataclass, field

from faqd.errors import UserError
from faqd.train.data.decode import Picture
from faqd.train.data.listing import Say

BROKEN_PERCENT = 1
"""More files than this that cannot be read say that something else is wrong."""
BITS = 14
"""Cameras have up to so many; 16-bit files in which no pixel has more are theirs, and dark."""


@dataclass
class Findings:
    """broken: by name, what is wrong with a file. deep: of each 16-bit file what Picture has. transparent: names."""

    broken: dict[str, str] = field(default_factory=dict)
    deep: list[int] = field(default_factory=list)
    transparent: list[str] = field(default_factory=list)

    def see(self, file: str, picture: Picture | str) -> None:
        if isinstance(picture, str):
            self.broken[file] = picture
            return
        if not picture.shows:
            self.transparent.append(file)
        if picture.deep is not None:
            self.deep.append(picture.deep)

    def refuse_many_broken(self, title: str, count: int, percent: int = BROKEN_PERCENT) -> None:
        """count: of the files that were read."""
        if 100 * len(self.broken) > percent * count:
            raise UserError(
                f"{self.broken_in_words(title, count)}; more than {percent} % are too many to skip. Repair, shrink, "
                "convert or remove them."
            )

    def broken_in_words(self, title: str, count: int) -> str:
        return f"{title}: " + ", ".join(self._named(reason, count) for reason in dict.fromkeys(self.broken.values()))

    def _named(self, reason: str, count: int) -> str:
        files = sorted(file for file, why in self.broken.items() if why == reason)
        return f"{len(files)} of {count} images {reason} ({', '.join(files[:5])}{', …' * (len(files) > 5)})"

    def tell_strange(self, title: str, count: int, say: Say) -> None:
        """Whether no 16-bit file uses its 16 bits, and what shows nothing."""
        if self.deep and max(self.deep) < 2 ** (BITS - 8):
            bits = 8 + max(self.deep).bit_length()
            say(
                f"{title}: no pixel of the {len(self.deep)} images of 16 bits passes {2**bits - 1}, but for one in a "
                f"thousand, as of {bits}-bit data; the upper 8 of 16 bits are taken, so that they load dark. Where "
                f"they hold {bits} bits, write them again with values shifted up by {16 - bits} bits."
            )
        if self.transparent:
            say(
                f"{title}: {len(self.transparent)} of {count} images are transparent everywhere "
                f"({min(self.transparent)}), so that a viewer shows nothing; their colours are read as if they were "
                "not."
            )
