"""clip-retrieval's output: ``img_emb/img_emb_0.npy`` beside ``metadata/metadata_0.parquet``.

https://github.com/rom1504/clip-retrieval. The numbers may be padded with zeros, in either folder.
Ids and all other columns come from the metadata; text embeddings (``text_emb/``) are left alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import pyarrow as pa

from aesthetic_filter.errors import ShardError, SourceError
from aesthetic_filter.formats import Shard, Wanted, npy
from aesthetic_filter.formats.parquet import batches, choose_columns, open_parquet
from aesthetic_filter.storage import File, Source, list_source
from aesthetic_filter.table import vectors_column

DESCRIPTION = "img_emb/img_emb_0.npy beside metadata/metadata_0.parquet"
PRECEDENCE = 1
GIVES = "embedding"

_VECTORS = re.compile(r"(?:(?P<folder>.*)/)?img_emb_(?P<number>\d+)\.npy")
_METADATA = re.compile(r"(?:(?P<folder>.*)/)?metadata_(?P<number>\d+)\.parquet")


def matches(source: Source) -> bool:
    """Whether there are numbered ``img_emb`` files with metadata, here or in the folder beside."""
    return bool(_numbered(source, _VECTORS)) and bool(_metadata(source))


def shards(source: Source) -> list[Shard]:
    """One for each pair of files.

    Raises:
        SourceError: an embedding file has no metadata file of its number, or there are two of one.
    """
    metadata = _metadata(source)
    found = []
    for number, files in sorted(_numbered(source, _VECTORS).items()):
        if number not in metadata:
            raise SourceError(
                f"{files[0].name}: its metadata file, number {number[1]}, is not there; "
                "read the vectors alone with --format npy"
            )
        for same in (files, metadata[number]):
            if len(same) > 1:
                raise SourceError(
                    f"{same[0].name} and {same[1].name} have the same number: remove one"
                )
        found.append(Shard(files[0].name, (files[0], metadata[number][0])))
    return found


def read(source: Source, shard: Shard, wanted: Wanted) -> Iterator[pa.Table]:
    """The rows of both files, side by side."""
    vectors_file, metadata_file = shard.files
    with open_parquet(source, metadata_file) as parquet:
        expected, described = npy.count_rows(source, shard), parquet.metadata.num_rows
        if expected != described:
            raise ShardError(
                vectors_file.name,
                f"has {expected:,} rows, but {metadata_file.name} beside it has {described:,}",
            )
        columns = choose_columns(parquet.schema_arrow, metadata_file, wanted)
        # At least one column: tables without any do not know how many rows they have.
        descriptions = _Rows(batches(parquet, columns.names or parquet.schema_arrow.names[:1]))
        start = 0
        for vectors, total in npy.read_vectors(source, shard):
            made = npy.row_ids(vectors_file.name, start, start + len(vectors), total)
            rows = descriptions.take(len(vectors))
            yield columns.describe(rows, vectors_column(vectors), made)
            start += len(vectors)


def sample(source: Source, shard: Shard, wanted: Wanted, rows: int) -> pa.Table | None:
    """Rows from the vector file's beginning, middle and end."""
    return npy.sample(source, shard, wanted, rows)


def _numbered(source: Source, pattern: re.Pattern[str]) -> dict[tuple[str, int], list[File]]:
    """Files by their place (the folder above theirs) and number."""
    found: dict[tuple[str, int], list[File]] = {}
    for file in source.files:
        match = pattern.fullmatch(file.name)
        if match:
            place = (match["folder"] or "").rpartition("/")[0]
            found.setdefault((place, int(match["number"])), []).append(file)
    return found


def _metadata(source: Source) -> dict[tuple[str, int], list[File]]:
    found = _numbered(source, _METADATA)
    if found or not source.root.endswith("/img_emb"):
        return found
    # The user gave img_emb/ itself: the metadata lies beside it.
    try:
        beside = list_source(
            source.filesystem.unstrip_protocol(source.root[: -len("img_emb")] + "metadata")
        )
    except SourceError:
        return {}
    return {
        place: [replace(file, name=f"../metadata/{file.name}") for file in files]
        for place, files in _numbered(beside, _METADATA).items()
    }


class _Rows:
    """A stream of tables from which any number of rows can be taken at a time."""

    def __init__(self, tables: Iterator[pa.Table]) -> None:
        self._tables = tables
        self._held = next(tables)

    def take(self, count: int) -> pa.Table:
        while self._held.num_rows < count:
            self._held = pa.concat_tables([self._held, next(self._tables)])
        taken, self._held = self._held.slice(0, count), self._held.slice(count)
        return taken
