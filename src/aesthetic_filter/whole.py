"""Files that appear whole or not at all."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

UNFINISHED = ".unfinished"
"""The ending of a file that is being written."""


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside its place, then put it there.

    Raises:
        OSError: it cannot be written; what was there before still is.
    """
    beside = path.with_name(path.name + UNFINISHED)
    try:
        beside.write_bytes(content)
        beside.replace(path)
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
