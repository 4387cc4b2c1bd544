"""A text list of ids, to write: one ``image_id`` a line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from aesthetic_filter.errors import OutputError
from aesthetic_filter.table import IMAGE_ID

ENDING = ".txt"


def write(path: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> None:
    """Write the ids.

    Raises:
        OutputError: an id holds a line break, and a list of lines could not be read back.
    """
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for batch in batches:
            ids = batch.column(IMAGE_ID)
            broken = pc.match_substring_regex(ids, "[\r\n]")
            if pc.any(broken).as_py():
                first = ids.filter(broken)[0].as_py()
                raise OutputError(f"image_id {first!r} holds a line break: write jsonl or parquet")
            file.writelines(f"{image_id}\n" for image_id in ids.to_pylist())
