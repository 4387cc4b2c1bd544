"""The stored embeddings of some scored rows: beside the scores, or where they were scored from."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from aesthetic_filter.errors import OutputError, ShardError
from aesthetic_filter.formats import Shard, Wanted, formats
from aesthetic_filter.run_folder import Part, read_part
from aesthetic_filter.storage import Source, list_source
from aesthetic_filter.table import EMBEDDING, column_vectors

if TYPE_CHECKING:
    from aesthetic_filter.scores import Scores


def stored_embeddings(
    scores: Scores, places: Sequence[tuple[int, int]], width: int | None = None
) -> NDArray[Any]:
    """The embeddings of these rows, in the order in which they are given.

    Args:
        scores: that the rows are of.
        places: of each row, the number of the scores' file and its place there.
        width: how many values an embedding must have; default: as most of those beside it.

    Returns:
        (N, D), float16 or float32, as they are stored; a row without a usable one is NaN.

    Raises:
        OutputError: the scores are no scores folder: nothing tells where the embeddings are.
        SourceError: the source is gone.
        ShardError: a shard is gone, cannot be read, or has changed since it was scored.
    """
    ordered = sorted(range(len(places)), key=lambda number: places[number])
    found: NDArray[Any] | None = None
    source: tuple[Source, dict[str, Shard]] | None = None
    for number, group in itertools.groupby(ordered, key=lambda n: places[n][0]):
        wanted = list(group)
        part = read_part(scores.files[number])
        if part is None:
            raise OutputError(
                f"{scores.files[number]}: is no part of a scores folder, so nothing tells where "
                "its embeddings are; give the scores that it was chosen from"
            )
        rows = [places[n][1] for n in wanted]
        if EMBEDDING in pq.read_schema(part.path.absolute()).names:
            tables = _beside(part.path, rows)
        else:
            source = source or _source(scores)
            tables = _again(scores, source, part)
        vectors = _pick(tables, rows, part, width)
        if found is None:
            found = np.full((len(places), vectors.shape[1]), np.nan, vectors.dtype)
        if found.dtype != vectors.dtype:  # shards of one source may differ
            found = found.astype(np.result_type(found, vectors))
        found[wanted] = vectors
    return np.zeros((0, 0), np.float32) if found is None else found


def _beside(path: Path, rows: Sequence[int]) -> Iterator[tuple[int, pa.ChunkedArray]]:
    """The column of embeddings of those row groups that hold any of the rows, with their start."""
    wanted = np.asarray(rows)
    with pq.ParquetFile(path.absolute()) as file:
        start = 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if ((wanted >= start) & (wanted < start + count)).any():
                yield start, file.read_row_group(group, columns=[EMBEDDING]).column(0)
            start += count


def _source(scores: Scores) -> tuple[Source, dict[str, Shard]]:
    get = scores.provenance.get
    listing = list_source(str(get("source")))
    return listing, {shard.name: shard for shard in formats()[str(get("format"))].shards(listing)}


def _again(
    scores: Scores, source: tuple[Source, dict[str, Shard]], part: Part
) -> Iterator[tuple[int, pa.ChunkedArray]]:
    listing, shards = source
    shard = shards.get(part.shard)
    if shard is None:
        raise ShardError(part.shard, "it was there when it was scored and is gone now")
    if shard.version != part.version:
        raise ShardError(part.shard, "has changed since it was scored: score the source again")
    reader = formats()[str(scores.provenance["format"])]
    columns = dict(scores.provenance.get("columns") or {})
    wanted = Wanted(columns.get("embedding"), columns.get("image_id"), ())
    start = 0
    for table in reader.read(listing, shard, wanted):
        yield start, table.column(EMBEDDING)
        start += table.num_rows


def _pick(
    columns: Iterator[tuple[int, pa.ChunkedArray]],
    rows: Sequence[int],
    part: Part,
    width: int | None,
) -> NDArray[Any]:
    """These rows (ascending) of a column that comes in pieces; NaN where one has no embedding."""
    wanted = np.asarray(rows)
    found: list[NDArray[Any]] = []
    taken = 0
    for start, column in columns:
        stop = start + len(column)
        here = wanted[(wanted >= start) & (wanted < stop)] - start
        if not len(here):
            continue
        vectors, errors = column_vectors(column, width)
        some = vectors[here].copy()
        some[np.isin(here, list(errors))] = np.nan
        found.append(some)
        taken += len(here)
        if taken == len(wanted):
            break
    if taken != len(wanted):
        raise ShardError(part.shard, f"has no row {int(wanted[taken]):,} any more")
    return np.concatenate(found)
