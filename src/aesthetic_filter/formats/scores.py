"""A scores folder made from images, read for the embeddings in it: a new head re-embeds nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from pyarrow import compute

from aesthetic_filter.errors import ShardError, SourceError
from aesthetic_filter.formats import Shard, Wanted
from aesthetic_filter.formats.parquet import batches, open_parquet
from aesthetic_filter.storage import File, Source
from aesthetic_filter.table import (
    COSINE,
    DROPPED_BY,
    EMBEDDING,
    ERROR,
    IMAGE_COLUMNS,
    METADATA_KEY,
    NORM,
    SCORE,
    with_column,
)

DESCRIPTION = "a scores folder made from images"
PRECEDENCE = 3
GIVES = "embedding"

RUN_FILE = "_run.json"
ENDING_OF_PARTS = ".parquet"

MADE_FROM = ("images", "encoder", "preprocessing")
"""What the new scores take over of the old ones' provenance."""


def matches(source: Source) -> bool:
    """Whether this is a scores folder."""
    parts = any(file.name.endswith(ENDING_OF_PARTS) for file in source.files)
    return parts and bool(source.filesystem.exists(f"{source.root}/{RUN_FILE}"))


def shards(source: Source) -> list[Shard]:
    """One for each part, under the name of the shard that it was made from.

    Raises:
        SourceError: the scores were not made from images, so there are no embeddings in them.
    """
    parts = [file for file in source.files if file.name.endswith(ENDING_OF_PARTS)]
    stamp = _stamp(source, parts[0])
    if "images" not in stamp or stamp.get("format") == "scores":
        made_from = stamp.get("source", "")
        raise SourceError(
            f"{source.uri}: these scores hold no embeddings; "
            f"score what they were made from instead: {made_from}"
        )
    return [Shard(file.name.removesuffix(ENDING_OF_PARTS), (file,)) for file in parts]


def read(source: Source, shard: Shard, wanted: Wanted) -> Iterator[pa.Table]:
    """The part's rows, less what its head made of them; a failed image keeps its reason."""
    file = shard.files[0]
    with open_parquet(source, file) as parquet:
        names = parquet.schema_arrow.names
        if EMBEDDING not in names:
            raise ShardError(shard.name, "its part holds no embeddings")
        kept = [name for name in names if name not in (SCORE, NORM, COSINE)]
        if wanted.others is not None:
            kept = [name for name in kept if name in (*IMAGE_COLUMNS, *wanted.others)]
        for rows in batches(parquet, kept):
            # A reason that is the head's, not the image's, is the new head's to give again.
            failed = compute.is_null(rows.column(EMBEDDING))
            reasons = rows.column(ERROR)
            if DROPPED_BY in kept:  # by a stage of that run; it is not this run's verdict
                before = pa.scalar("never embedded: was dropped by "), rows.column(DROPPED_BY)
                why = compute.binary_join_element_wise(*before, pa.scalar(""))
                reasons = compute.coalesce(reasons, why)
                rows = rows.drop_columns([DROPPED_BY])
            reasons = compute.if_else(failed, reasons, pa.scalar(None, pa.string()))
            yield with_column(rows, ERROR, reasons)


def sample(source: Source, shard: Shard, wanted: Wanted, rows: int) -> pa.Table | None:
    """The embeddings of the part's first rows."""
    with open_parquet(source, shard.files[0]) as parquet:
        for batch in parquet.iter_batches(batch_size=rows, columns=[EMBEDDING]):
            return pa.Table.from_batches([batch]).replace_schema_metadata(
                parquet.schema_arrow.metadata
            )
    return None


def made_from(source: Source) -> dict[str, Any]:
    """Where the images are, and how they were embedded."""
    parts = [file for file in source.files if file.name.endswith(ENDING_OF_PARTS)]
    stamp = _stamp(source, parts[0])
    return {key: stamp[key] for key in MADE_FROM if key in stamp}


def _stamp(source: Source, part: File) -> dict[str, Any]:
    with open_parquet(source, part) as parquet:
        found = (parquet.schema_arrow.metadata or {}).get(METADATA_KEY)
    stamp: dict[str, Any] = json.loads(found) if found else {}
    return stamp
