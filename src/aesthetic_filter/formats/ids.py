"""A text list of ids, to write: one ``image_id`` a line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from aesthetic_filter.errors import OutputError
from aesthetic_filter.table import IMAGE_ID

ENDING = ".txt"


def write(path: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> None:
    """Write the ids.

    Raises:
        OutputError: an id is missing, or holds a line break: a list could not be read back.
    """
    from pyarrow import compute  # here, as other formats need not wait for it

    with path.open("w", encoding="utf-8", newline="\n") as file:
        for batch in batches:
            ids = batch.column(IMAGE_ID)
            if ids.null_count:
                raise OutputError("a row has no image_id to list: write jsonl or parquet")
            broken = compute.match_substring_regex(ids, "[\r\n]")
            if compute.any(broken).as_py():
                first = ids.filter(broken)[0].as_py()
                raise OutputError(f"image_id {first!r} holds a line break: write jsonl or parquet")
            file.writelines(f"{image_id}\n" for image_id in ids.to_pylist())
