"""Pictures of the user's in the report, such as boxes of the float network beside those of the student."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path

from faqd.errors import UserError

MOST, MOST_BYTES = 24, 2**24
"""Pictures, and bytes of all of them: a page that opens at once."""
_SIGNATURES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}


@dataclass(frozen=True)
class Picture:
    """name: of the file without its suffix. uri: the picture itself, for an img element."""

    name: str
    uri: str


def pictures_in(folder: Path) -> list[Picture]:
    """The PNG and JPEG files of a folder, by their names. UserError where there are none, or too many for a page."""
    if not folder.is_dir():
        raise UserError(f"--pictures {folder}: no such folder.")
    found, size = [], 0
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        content = path.read_bytes()
        kind = next((kind for signature, kind in _SIGNATURES.items() if content.startswith(signature)), None)
        if kind is not None:
            found.append(Picture(path.stem, f"data:{kind};base64,{b64encode(content).decode()}"))
            size += len(content)
        if len(found) > MOST or size > MOST_BYTES:
            raise UserError(
                f"--pictures {folder}: more than {MOST} pictures or {MOST_BYTES >> 20} MiB of them; a page is to open "
                "at once."
            )
    if not found:
        raise UserError(f"--pictures {folder}: holds no PNG or JPEG file.")
    return found
