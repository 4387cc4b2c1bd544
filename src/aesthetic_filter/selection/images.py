"""The images of kept rows, fetched from where they lie, with their bytes checked on the way."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import pyarrow as pa

from aesthetic_filter.database import PART, ROW
from aesthetic_filter.errors import OutputError, ShardError
from aesthetic_filter.formats import (
    ImageFormat,
    ImageRow,
    Sample,
    Shard,
    Wanted,
    find_format,
    formats,
    image_writers,
)
from aesthetic_filter.run_folder import read_part
from aesthetic_filter.storage import list_source
from aesthetic_filter.table import IMAGE_ID, SHA256

T = TypeVar("T")

FETCHED_AT_ONCE = 65_536
"""Kept rows of one shard that are gathered before the shard is read for them."""


def kept_images(
    batches: Iterator[pa.RecordBatch],
    parts: Sequence[Path],
    provenance: Mapping[str, Any],
    source: str | None = None,
) -> Iterator[ImageRow]:
    """The kept rows with their images, in order.

    Args:
        batches: the rows, with :data:`PART` and :data:`ROW`.
        parts: the files of the scores.
        provenance: of the scores.
        source: where the images are now; default: where they were.

    Raises:
        OutputError: the scores were not made from images, or not from these.
        SourceError: the images' source is gone.
        ShardError: an image is gone, or is not the one that was scored.
    """
    images = provenance.get("images")
    if images is None:
        raise no_images()
    listing = list_source(source or images["source"])
    reader = cast(ImageFormat, formats()[images["format"]])
    wanted = Wanted(**images["columns"])
    shards = {shard.name: shard for shard in reader.shards(listing)}
    files = {file.name: file for file in listing.files}
    numbered = getattr(reader, "NUMBERED", False)
    for number, rows in itertools.groupby(_rows(batches), key=lambda row: row[PART]):
        found = read_part(parts[number])
        if found is None:
            raise OutputError(
                f"{parts[number]}: is no part of a scores folder; "
                "filter the scores that it was chosen from"
            )
        while some := list(itertools.islice(rows, FETCHED_AT_ONCE)):
            if numbered:  # the listing may have changed since: a row is wherever its file is
                shard = Shard(found.shard, tuple(_named(row[IMAGE_ID], files) for row in some))
                places = list(range(len(some)))
            else:
                shard = _named(found.shard, shards)
                places = [row[ROW] for row in some]
            fetched = reader.fetch(listing, shard, places, wanted)
            for row, sample in zip(some, fetched, strict=True):
                kept = {name: row[name] for name in row if name not in (PART, ROW)}
                yield kept, _checked(sample, row, shard)


def check_source_for(source: str, as_: str) -> None:
    """Refuse a source whose scores could never be written like that.

    Raises:
        OutputError: images are to be written, and it holds embeddings.
        SourceError: there is nothing that could be scored.
    """
    _, reader = find_format(list_source(source))
    check_images(reader.GIVES == "image", as_)


def check_images(there: bool, as_: str) -> None:
    """Refuse to write images where there are none.

    Raises:
        OutputError: images are to be written, and what is scored has only embeddings.
    """
    can_be_rows = as_ not in image_writers() or as_ == "parquet"
    if not there and not can_be_rows:
        raise no_images()


def no_images() -> OutputError:
    """The one message where images are to be written, and there are only embeddings."""
    return OutputError(
        "these scores were made from embeddings, so there are no images to write; "
        "write the rows, --as index, csv, jsonl or ids"
    )


def _rows(batches: Iterator[pa.RecordBatch]) -> Iterator[dict[str, Any]]:
    for batch in batches:
        yield from batch.to_pylist()


def _named(name: str, there: Mapping[str, T]) -> T:
    if name not in there:
        raise ShardError(name, "it was there when it was scored and is gone now")
    return there[name]


def _checked(sample: Sample, row: Mapping[str, Any], shard: Shard) -> Sample:
    def read() -> bytes:
        data = sample.read()
        if hashlib.sha256(data).hexdigest() != row[SHA256]:
            problem = f"{row[IMAGE_ID]} has changed since it was scored: score the source again"
            raise ShardError(shard.name, problem)
        return data

    return replace(sample, read=read)
