"""Parquet files with a column of embeddings, an id, and whatever else the source knows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from aesthetic_filter.errors import ShardError, SourceError
from aesthetic_filter.formats import BATCH_ROWS, Shard, Wanted
from aesthetic_filter.formats.npy import row_ids
from aesthetic_filter.storage import File, Source
from aesthetic_filter.table import (
    COSINE,
    EMBEDDING,
    EMBEDDING_COLUMNS,
    IMAGE,
    IMAGE_ID,
    IMAGE_PATH,
    NORM,
    SCORE,
    SHA256,
    carried_names,
    is_embedding_type,
)

DESCRIPTION = ".parquet files with an embedding column"
PRECEDENCE = 0
GIVES = "embedding"

ENDING = ".parquet"
GROUP_ROWS = 131_072
"""Rows per row group that is written."""

ENDINGS = (".parquet", ".parq", ".pq")

EMBEDDING_NAMES = (
    "embedding",
    "image_embedding",
    "img_emb",
    "clip_embedding",
    "image_embeddings",
    "clip_embeddings",
    "embeddings",
    "image_features",
    "features",
    "emb",
    "vector",
)
"""Usual names of an embedding column, the likelier first (NeMo Curator, clip-retrieval, LAION)."""

ID_NAMES = (
    "image_id",
    "id",
    "key",
    "uid",
    "sample_id",
    "image_path",
    "file_name",
    "filename",
    "path",
    "url",
)
"""Usual names of an id column, the likelier first (NeMo Curator, clip-retrieval, DataComp)."""


def matches(source: Source) -> bool:
    """Whether there are Parquet files."""
    return any(file.name.endswith(ENDINGS) for file in source.files)


def shards(source: Source) -> list[Shard]:
    """One for each Parquet file."""
    return [Shard(file.name, (file,)) for file in source.files if file.name.endswith(ENDINGS)]


def read(source: Source, shard: Shard, wanted: Wanted) -> Iterator[pa.Table]:
    """The rows: ``image_id``, ``embedding``, and the source's other columns under their names."""
    file = shard.files[0]
    with open_parquet(source, file) as parquet:
        vectors = embedding_column(parquet.schema_arrow, file, wanted.embedding)
        columns = choose_columns(parquet.schema_arrow, file, wanted, leave_out=vectors)
        start, total = 0, parquet.metadata.num_rows
        for rows in batches(parquet, [vectors, *columns.names]):
            made = row_ids(file.name, start, start + rows.num_rows, total)
            yield columns.describe(rows, rows.column(vectors), made)
            start += rows.num_rows


def sample(source: Source, shard: Shard, wanted: Wanted, rows: int) -> pa.Table | None:
    """The embeddings of the file's first rows."""
    file = shard.files[0]
    with open_parquet(source, file) as parquet:
        name = embedding_column(parquet.schema_arrow, file, wanted.embedding)
        for batch in parquet.iter_batches(batch_size=rows, columns=[name]):
            return pa.table({EMBEDDING: batch.column(name)}, metadata=parquet.schema_arrow.metadata)
    return None


def write(path: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> None:
    """Write rows to one file, in row groups of the same size whatever the batches."""
    with rows_writer(path, schema) as writer:
        for table in regroup(batches, schema):
            writer.write_table(table)


def rows_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """A Parquet writer with the encodings that suit scores.

    Ids share prefixes (delta encoding), the rest repeats (dictionaries) but for what is different
    in every row, and for scores, which are noise in their low bits: their bytes are stored in
    streams, of which the upper ones compress.
    """
    results = (SCORE, NORM, COSINE)
    unique = (IMAGE_ID, IMAGE_PATH, SHA256, EMBEDDING, IMAGE)
    split = [f.name for f in schema if f.name in results and f.type in (pa.float32(), pa.float64())]
    return pq.ParquetWriter(
        path.absolute(),
        schema,
        compression="zstd",
        compression_level=1,
        use_dictionary=[f.name for f in schema if f.name not in (*unique, *split)],
        column_encoding={
            **{
                field.name: "DELTA_BYTE_ARRAY"
                for field in schema
                if field.name in (IMAGE_ID, IMAGE_PATH) and field.type == pa.string()
            },
            **dict.fromkeys(split, "BYTE_STREAM_SPLIT"),
        },
    )


def regroup(
    batches: Iterable[pa.RecordBatch | pa.Table], schema: pa.Schema, rows: int = GROUP_ROWS
) -> Iterator[pa.Table]:
    """The same rows in tables of ``rows`` rows each, the last one shorter."""
    held: list[pa.Table] = []
    count = 0
    for batch in batches:
        table = pa.Table.from_batches([batch]) if isinstance(batch, pa.RecordBatch) else batch
        held.append(table if table.schema.equals(schema) else table.cast(schema))
        count += table.num_rows
        while count >= rows:
            together = pa.concat_tables(held)
            yield together.slice(0, rows)
            held, count = [together.slice(rows)], count - rows
    if count:
        yield pa.concat_tables(held)


@contextmanager
def open_parquet(source: Source, file: File) -> Iterator[pq.ParquetFile]:
    """A Parquet file, streamed column chunk by column chunk.

    Raises:
        ShardError: not Parquet, cut short, damaged, or gone.
    """
    with source.open(file) as raw:
        try:
            with pq.ParquetFile(raw, pre_buffer=False, buffer_size=1 << 20) as parquet:
                yield parquet
        except (pa.ArrowException, OSError, EOFError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ShardError(file.name, f"not a whole Parquet file ({reason})") from None


def embedding_column(schema: pa.Schema, file: File, given: str | None) -> str:
    """The name of the embedding column.

    Raises:
        SourceError: there is none, or more than one and none has a usual name.
    """
    if given is not None:
        _check_there(schema, file, given, "--embedding-column")
        return given
    candidates: list[str] = [field.name for field in schema if is_embedding_type(field.type)]
    for name in EMBEDDING_NAMES:
        if name in candidates:
            return name
    if len(candidates) == 1:
        return candidates[0]
    problem = (
        f"several columns could be embeddings ({', '.join(candidates)})"
        if candidates
        else f"no column holds embeddings (there are: {', '.join(schema.names)})"
    )
    raise SourceError(f"{file.name}: {problem}; name it with --embedding-column")


@dataclass(frozen=True)
class Columns:
    """Which columns of a file describe its rows.

    Attributes:
        file: the file's name.
        image_id: the id column's name, or None where the source has none.
        carried: the names of those carried through.
    """

    file: str
    image_id: str | None
    carried: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """All of them, each once."""
        return list(dict.fromkeys([*([self.image_id] if self.image_id else []), *self.carried]))

    def describe(self, rows: pa.Table, embeddings: Any, made_ids: pa.Array) -> pa.Table:
        """A batch as the format gives it: ids, embeddings, carried columns.

        A row without an id of its own gets the made-up one; a carried column whose name is taken
        becomes ``source_NAME``.

        Raises:
            SourceError: the id column is no text, and nothing that could be written as text.
        """
        ids: Any = made_ids
        if self.image_id:
            from pyarrow import compute  # here, as other formats need not wait for it

            try:
                given = rows.column(self.image_id).cast(pa.string())
            except pa.ArrowException as error:
                raise SourceError(
                    f"{self.file}: the id column {self.image_id!r} cannot be read as text "
                    f"({error}); name another with --id-column"
                ) from None
            ids = compute.coalesce(given, made_ids)
        table = {IMAGE_ID: ids, EMBEDDING: embeddings}
        taken = set(EMBEDDING_COLUMNS)
        if IMAGE in self.carried and not _may_hold_images(rows.schema.field(IMAGE).type):
            taken.add(IMAGE)  # a link, say: images themselves are for stages to see, not to keep
        for name, new in carried_names(self.carried, taken).items():
            table[new] = rows.column(name)
        return pa.table(table, metadata=rows.schema.metadata)


def choose_columns(
    schema: pa.Schema, file: File, wanted: Wanted, *, leave_out: str | None = None
) -> Columns:
    """The id column, and the other columns to carry through.

    Raises:
        SourceError: a column that was asked for is not there, or there twice.
    """
    if wanted.image_id is not None:
        _check_there(schema, file, wanted.image_id, "--id-column")
    for name in wanted.others or ():
        _check_there(schema, file, name, "--columns")
    texts = {field.name for field in schema if not pa.types.is_nested(field.type)}
    image_id = wanted.image_id or next((name for name in ID_NAMES if name in texts), None)
    chosen = schema.names if wanted.others is None else wanted.others
    # An id column of another name is carried too, under its own name and with its own type.
    used = {leave_out, IMAGE_ID if image_id == IMAGE_ID else None}
    columns = Columns(file.name, image_id, tuple(name for name in chosen if name not in used))
    twice = [name for name in columns.names if schema.names.count(name) > 1]
    if twice:
        raise SourceError(
            f"{file.name}: has several columns named {twice[0]!r}; choose others with --columns"
        )
    return columns


def batches(parquet: pq.ParquetFile, columns: list[str]) -> Iterator[pa.Table]:
    """The file's rows in batches, at least one, if an empty one."""
    schema = parquet.schema_arrow
    for batch in parquet.iter_batches(batch_size=BATCH_ROWS, columns=columns, use_threads=False):
        yield pa.Table.from_batches([batch]).replace_schema_metadata(schema.metadata)
    if not parquet.metadata.num_rows:
        yield schema.empty_table().select(columns)


def _may_hold_images(kind: pa.DataType) -> bool:
    binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return pa.types.is_struct(kind) or any(check(kind) for check in binary)


def _check_there(schema: pa.Schema, file: File, name: str, option: str) -> None:
    if name not in schema.names:
        raise SourceError(
            f"{file.name}: there is no column {name!r} for {option}; there are: "
            f"{', '.join(schema.names)}"
        )
