"""Parquet files with a column of encoded images, or of the paths where they lie.

The column is a struct of ``bytes`` and ``path`` as Hugging Face ``datasets`` writes it, plain
binary, or text: paths that are absolute, URIs, or relative to the Parquet file's own folder.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from aesthetic_filter.errors import CutShortError, ImageError, ShardError, SourceError
from aesthetic_filter.filenames import guess_extension
from aesthetic_filter.formats import (
    IMAGE_BYTES,
    IMAGE_ROWS,
    LARGEST_IMAGE,
    ImageOutput,
    ImageRow,
    Sample,
    Shard,
    Wanted,
)
from aesthetic_filter.formats.folder import Read, image_table, split_extension
from aesthetic_filter.formats.npy import row_ids
from aesthetic_filter.formats.parquet import (
    EMBEDDING_NAMES,
    ENDINGS,
    choose_columns,
    open_parquet,
)
from aesthetic_filter.prefetch import ahead
from aesthetic_filter.storage import File, Source, local_path, valid_text
from aesthetic_filter.table import (
    IMAGE,
    IMAGE_COLUMNS,
    IMAGE_ID,
    SCORE,
    carried_names,
    is_embedding_type,
)

DESCRIPTION = ".parquet files with an image column"
PRECEDENCE = 1
GIVES = "image"

WRITES = "parquet"
IMAGE_OPTIONS = ("shard_size",)
INDEX = "kept-*.parquet"

BYTES_NAMES = (
    "image",
    "jpg",
    "jpeg",
    "png",
    "webp",
    "image_bytes",
    "bytes",
    "img",
    "content",
    "data",
)
"""Usual names of a column of encoded images, the likelier first."""

PATH_NAMES = (
    "image_path",
    "path",
    "file_path",
    "filepath",
    "file_name",
    "filename",
    "image",
)
"""Usual names of a column of paths, the likelier first."""

PATH_ROWS = 1024
"""Rows read at once of a column that only has paths."""

WORKERS = 16
AHEAD_FILES = 32
"""How many files are read at once from a remote store, and how many are ahead."""

GROUP_BYTES = 64 << 20
"""Encoded bytes in a row group that is written."""

SIDECARS = "sidecars"
"""The written column with what else a sample has: a list of extensions and their bytes.

A map would say the same, but Hugging Face ``datasets`` has no such type.
"""

NULL_IMAGE = "image is null"

_STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})
_SIDECARS = pa.list_(pa.struct({"extension": pa.string(), "bytes": pa.binary()}))
_LOOKED_AT = 16


def matches(source: Source) -> bool:
    """Whether the first Parquet file that can be read has images and no embeddings.

    Beside ``.npy`` files a table is taken for what is known about their rows.
    """
    if any(file.name.endswith(".npy") for file in source.files):
        return False
    for file in [f for f in source.files if f.name.endswith(ENDINGS)][:_LOOKED_AT]:
        try:
            with open_parquet(source, file) as parquet:
                schema = parquet.schema_arrow
        except ShardError:
            continue
        return _has_images(schema)
    return False


def shards(source: Source) -> list[Shard]:
    """One for each Parquet file."""
    return [Shard(file.name, (file,)) for file in source.files if file.name.endswith(ENDINGS)]


def read(source: Source, shard: Shard, wanted: Wanted) -> Iterator[pa.Table]:
    """The images, and the source's other columns.

    Raises:
        SourceError: no column holds images, or several might.
        ShardError: not Parquet, damaged in its first rows, or gone.
        CutShortError: damaged further on.
    """
    file = shard.files[0]
    with open_parquet(source, file) as parquet:
        schema = parquet.schema_arrow
        image = image_column(schema, file, wanted.image)
        columns = choose_columns(schema, file, wanted, leave_out=image.name)
        carried = carried_names(columns.carried, IMAGE_COLUMNS)
        total, start = parquet.metadata.num_rows, 0
        paths = _PathIds(file.name)
        names = [image.name, *(name for name in columns.names if name != image.name)]
        try:
            for table in _group_batches(parquet, image, names):
                cells = image.cells(table, start)
                made: Any = row_ids(file.name, start, start + table.num_rows, total)
                if columns.image_id:
                    given = replace(columns, carried=()).describe(table, made, made)
                    made = given.column(IMAGE_ID)
                ids = made.to_pylist()
                if columns.image_id is None:
                    ids = [paths.make(c.path) or i for c, i in zip(cells, ids, strict=True)]
                others = table.select(columns.carried).rename_columns(list(carried.values()))
                yield from _tables(source, file, cells, ids, others)
                start += table.num_rows
        except (pa.ArrowException, OSError, EOFError) as error:
            if not start:
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CutShortError(
                file.name, f"cannot be read beyond row {start:,} of {total:,} ({reason})"
            ) from None
        if not total:
            others = schema.empty_table().select(columns.carried)
            yield _beside(image_table([]), others.rename_columns(list(carried.values())))


def fetch(
    source: Source, shard: Shard, rows: Sequence[int], wanted: Wanted = Wanted()
) -> Iterator[Sample]:
    """The samples of these rows; remote files are read ahead.

    Args:
        source: the source.
        shard: the shard.
        rows: their numbers, ascending.
        wanted: which column holds the images, if it was given.

    Raises:
        ShardError: the rows cannot be read, or are not there.
    """
    file = shard.files[0]
    folder = file.name.rpartition(".")[0]
    with open_parquet(source, file) as parquet:
        image = image_column(parquet.schema_arrow, file, wanted.image if wanted else None)
        if len(rows) and rows[-1] >= parquet.metadata.num_rows:
            count = parquet.metadata.num_rows
            raise ShardError(file.name, f"has {count:,} rows, no row {rows[-1]:,}")
        cells = _chosen(parquet, image, list(rows))

        def sample(cell: _Cell) -> Sample:
            return _sample(source, file, folder, cell)

        if image.bytes is None:
            yield from ahead(cells, sample, WORKERS, AHEAD_FILES)
        else:
            yield from map(sample, cells)


def write_images(
    folder: Path, rows: Iterator[ImageRow], schema: pa.Schema, options: ImageOutput
) -> None:
    """Write images into ``kept-00000.parquet`` and on, as Hugging Face ``datasets`` has them.

    The bytes are stored as they are, uncompressed. What samples have besides is in the column
    ``sidecars``, if any has something.

    Raises:
        ShardError: an image is gone from the source.
    """
    files = _Files(folder, schema)
    held: list[dict[str, Any]] = []
    size = count = 0
    try:
        for row, sample in rows:
            content = sample.read()
            name = f"{sample.key}.{sample.extension}" if sample.extension else sample.key
            image = {"bytes": content, "path": _writable(name)}
            beside = [
                {"extension": _writable(extension), "bytes": its}
                for extension, its in sample.sidecars.items()
            ]
            if beside and not files.sidecars:
                files.write(held)
                held, size = [], 0
                files.add_sidecars()
            held.append(files.renamed(row) | {IMAGE: image, SIDECARS: beside or None})
            size += len(content) + sum(map(len, sample.sidecars.values()))
            count += 1
            if size >= GROUP_BYTES or count == options.shard_size:
                files.write(held)
                held, size = [], 0
            if count == options.shard_size:
                files.next()
                count = 0
        files.write(held)
    finally:
        files.close()


@dataclass(frozen=True)
class _Cell:
    """A row's image as the table has it.

    Attributes:
        row: its number in the file.
        content: the bytes.
        path: where they lie, or what they were called.
    """

    row: int
    content: bytes | None
    path: str | None


@dataclass(frozen=True)
class ImageColumn:
    """The column with the images.

    Attributes:
        name: of the column.
        bytes: the struct's field with the bytes; "" where the column itself has them; None where
            there are only paths.
        path: the same for paths.
    """

    name: str
    bytes: str | None
    path: str | None

    def cells(self, table: pa.Table, start: int) -> list[_Cell]:
        """A batch's images; ``start`` is the number of its first row in the file."""
        contents = self._values(table, self.bytes, pa.binary())
        paths = self._values(table, self.path, pa.string())
        return [
            _Cell(start + place, content, path)
            for place, (content, path) in enumerate(zip(contents, paths, strict=True))
        ]

    def _values(self, table: pa.Table, field: str | None, kind: pa.DataType) -> list[Any]:
        from pyarrow import compute  # here, as other formats need not wait for it

        if field is None:
            return [None] * table.num_rows
        column: Any = table.column(self.name)
        if field:  # a null struct's fields are null too
            column = compute.struct_field(column, field)
        if pa.types.is_dictionary(column.type):
            column = column.cast(kind)
        try:
            values: list[Any] = column.to_pylist()
        except UnicodeDecodeError:  # Parquet does not check that text is UTF-8
            raw = column.cast(pa.binary()).to_pylist()
            values = [None if v is None else v.decode(errors="backslashreplace") for v in raw]
        return values


def image_column(schema: pa.Schema, file: File, given: str | None) -> ImageColumn:
    """The column with the images.

    Structs of bytes come first, then usual names of binary columns, of path columns, and the only
    binary column whatever its name.

    Raises:
        SourceError: there is none, or more than one and none has a usual name.
    """
    if given is not None and given not in schema.names:
        raise SourceError(
            f"{file.name}: there is no column {given!r} for --image-column; there are: "
            f"{', '.join(schema.names)}"
        )
    fields = [field for field in schema if given in (None, field.name)]
    twice = [f.name for f in fields if schema.names.count(f.name) > 1]
    structs = [found for f in fields if (found := _struct_column(f)) is not None]
    plain = [ImageColumn(f.name, "", None) for f in fields if _is_bytes(f.type)]
    paths = [ImageColumn(f.name, None, "") for f in fields if _is_text(f.type)]
    chosen: ImageColumn | None
    if given is not None:
        chosen = next(iter([*structs, *plain, *paths]), None)
        if chosen is None:
            raise SourceError(
                f"{file.name}: the column {given!r} holds {fields[0].type}, neither images nor "
                "paths; name another with --image-column"
            )
    else:
        chosen = _usual(structs, BYTES_NAMES) or (structs[0] if len(structs) == 1 else None)
        if not structs:
            chosen = _usual(plain, BYTES_NAMES) or _usual(paths, PATH_NAMES)
            chosen = chosen or (plain[0] if len(plain) == 1 else None)
    if chosen is None:
        candidates = [column.name for column in structs or plain]
        problem = (
            f"several columns could be images ({', '.join(candidates)})"
            if candidates
            else f"no column holds images (there are: {', '.join(schema.names)})"
        )
        raise SourceError(f"{file.name}: {problem}; name it with --image-column")
    if chosen.name in twice:
        raise SourceError(f"{file.name}: has several columns named {chosen.name!r}")
    return chosen


def _has_images(schema: pa.Schema) -> bool:
    """Whether this is a table of images.

    A table with embeddings is not; but lists of numbers of any name (boxes, say) beside images are
    not taken for embeddings.
    """
    vectors = [field.name for field in schema if is_embedding_type(field.type)]
    structs = any(_struct_column(field) for field in schema)
    plain = [field.name for field in schema if _is_bytes(field.type)]
    paths = any(field.name in PATH_NAMES and _is_text(field.type) for field in schema)
    if vectors:
        usual = structs or any(name in BYTES_NAMES for name in plain)
        return usual and not any(name in EMBEDDING_NAMES for name in vectors)
    return structs or bool(plain) or paths


def _struct_column(field: pa.Field) -> ImageColumn | None:
    kind = field.type
    if not pa.types.is_struct(kind):
        return None
    names = [kind.field(place).name for place in range(kind.num_fields)]
    if "bytes" not in names or not _is_bytes(kind.field("bytes").type):
        return None
    has_path = "path" in names and _is_text(kind.field("path").type)
    return ImageColumn(field.name, "bytes", "path" if has_path else None)


def _is_bytes(kind: pa.DataType) -> bool:
    checks = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return any(check(kind) for check in checks)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(check(kind) for check in checks)


def _usual(columns: list[ImageColumn], names: Iterable[str]) -> ImageColumn | None:
    by_name = {column.name: column for column in columns}
    return next((by_name[name] for name in names if name in by_name), None)


def _group_batches(
    parquet: pq.ParquetFile, image: ImageColumn, columns: list[str], groups: Iterable[int] = ()
) -> Iterator[pa.Table]:
    """The rows in batches that end with their row group: damage in the next costs none of this.

    Args:
        parquet: the file.
        image: its column of images.
        columns: what to read.
        groups: the numbers of the row groups; default: all.
    """
    for group in groups or range(parquet.metadata.num_row_groups):
        for batch in parquet.iter_batches(
            batch_size=_rows_at_once(parquet, image, group),
            row_groups=[group],
            columns=columns,
            use_threads=False,
        ):
            yield pa.Table.from_batches([batch])


def _rows_at_once(parquet: pq.ParquetFile, image: ImageColumn, number: int) -> int:
    """How many rows of a row group to decode at once: about a batch's bytes of images."""
    if image.bytes is None:
        return PATH_ROWS
    group = parquet.metadata.row_group(number)
    size = sum(
        chunk.total_uncompressed_size
        for chunk in map(group.column, range(group.num_columns))
        if chunk.path_in_schema.split(".")[0] == image.name
    )
    usual = max(int(size) // max(int(group.num_rows), 1), 1)
    return max(1, min(IMAGE_ROWS, IMAGE_BYTES // usual))


class _PathIds:
    """Ids made of paths; a path that comes again gets ``#2`` behind it, then ``#3``."""

    def __init__(self, shard: str) -> None:
        self._shard = shard
        self._seen: dict[str, int] = {}

    def make(self, path: str | None) -> str | None:
        """The id; None where there is no path."""
        if not path:
            return None
        number = self._seen.get(path, 0) + 1
        name = path
        while number > 1 and (name := f"{path}#{number}") in self._seen:
            number += 1
        self._seen[path] = number
        self._seen.setdefault(name, 1)
        return f"{self._shard}/{name}"


def _tables(
    source: Source, file: File, cells: list[_Cell], ids: list[str], others: pa.Table
) -> Iterator[pa.Table]:
    """The batches that these rows make."""
    address = source.address(file)

    def load(cell: _Cell) -> tuple[str, bytes | None, str | None]:
        here = f"{address}#{cell.row}"
        if cell.content is not None:
            if len(cell.content) > LARGEST_IMAGE:
                return here, None, f"image is larger than {LARGEST_IMAGE >> 20} MB"
            return here, cell.content, None
        if cell.path is None:
            return here, None, NULL_IMAGE
        where = valid_text(source.resolve(cell.path, file))
        try:
            return where, source.read_path(cell.path, LARGEST_IMAGE, file), None
        except ImageError as error:
            return where, None, str(error)

    def load_all() -> Generator[tuple[str, bytes | None, str | None], None, None]:
        addresses = (source.resolve(c.path, file) for c in cells if c.path and c.content is None)
        if any(local_path(address) is None for address in addresses):
            yield from ahead(cells, load, WORKERS, AHEAD_FILES)
        else:
            yield from map(load, cells)

    held: list[Read] = []
    size = first = 0
    with closing(load_all()) as loaded:
        for image_id, row in zip(ids, loaded, strict=True):
            held.append((image_id, *row))
            size += len(row[1] or b"")
            if len(held) == IMAGE_ROWS or size >= IMAGE_BYTES or first + len(held) == len(cells):
                yield _beside(image_table(held), others.slice(first, len(held)))
                first += len(held)
                held, size = [], 0


def _beside(images: pa.Table, others: pa.Table) -> pa.Table:
    for name in others.column_names:
        images = images.append_column(others.schema.field(name), others.column(name))
    return images


def _chosen(parquet: pq.ParquetFile, image: ImageColumn, rows: list[int]) -> Iterator[_Cell]:
    """The images of these rows; row groups without any are not read."""
    before = 0
    place = 0
    for number in range(parquet.metadata.num_row_groups):
        count = parquet.metadata.row_group(number).num_rows
        stop = place
        while stop < len(rows) and rows[stop] < before + count:
            stop += 1
        wanted = deque(rows[place:stop])
        start, place = before, stop
        before += count
        if not wanted:
            continue
        for table in _group_batches(parquet, image, [image.name], [number]):
            while wanted and wanted[0] < start + table.num_rows:
                row = wanted.popleft()
                yield from image.cells(table.slice(row - start, 1), row)
            start += table.num_rows
            if not wanted:
                break


def _sample(source: Source, file: File, folder: str, cell: _Cell) -> Sample:
    """A row's sample; a remote file is read at once, a local one when it is asked for."""
    content, path, why_not = cell.content, None, NULL_IMAGE
    load: Callable[[], bytes] | None = None
    if content is None and cell.path:
        place = local_path(source.resolve(cell.path, file))
        path = None if place is None else Path(place)

        def load() -> bytes:
            return source.read_path(cell.path or "", LARGEST_IMAGE, file)

        if path is None:
            try:
                content = load()
            except ImageError as error:
                why_not = str(error)
            load = None

    def read() -> bytes:
        if content is not None:
            return content
        if load is None:
            raise ShardError(file.name, f"row {cell.row:,}: {why_not}")
        try:
            return load()
        except ImageError as error:
            raise ShardError(file.name, f"row {cell.row:,}: {error}") from None

    key, extension = split_extension(_name(cell.path)) if cell.path else ("", "")
    if not extension.isalnum() or len(extension) > 10:
        key = f"{key}.{extension}" if extension else key
        try:
            extension = guess_extension(read())
        except ShardError:
            extension = "img"
    return Sample(folder, key or f"{cell.row:09d}", extension, read, path=path)


def _name(path: str) -> str:
    """What an image is called by its path: whole if it is relative, else its last part."""
    scheme, uri, rest = path.partition("://")
    if uri:
        if scheme in ("http", "https"):
            rest = rest.partition("?")[0].partition("#")[0]
        return rest.rpartition("/")[2]
    return path.rpartition("/")[2] if path.startswith("/") else os.path.normpath(path)


def _writable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


class _Files:
    """The Parquet files that are written, one after another, all with the same columns."""

    def __init__(self, folder: Path, rows: pa.Schema) -> None:
        self.sidecars = False
        self._folder = folder
        others = [name for name in rows.names if name not in (IMAGE_ID, SCORE)]
        self._names = carried_names(others, (IMAGE_ID, IMAGE, SCORE, SIDECARS))
        fields = [pa.field(IMAGE_ID, pa.string()), pa.field(IMAGE, _STRUCT)]
        fields += [rows.field(SCORE)] if SCORE in rows.names else []
        fields += [rows.field(old).with_name(new) for old, new in self._names.items()]
        self._schema = with_features(pa.schema(fields, rows.metadata))
        self._number = 0
        self._writer: pq.ParquetWriter | None = None

    def renamed(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row under the names of the columns that are written."""
        return {self._names.get(name, name): value for name, value in row.items()}

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Write rows as a row group of the present file."""
        if rows:
            self._open().write_table(pa.Table.from_pylist(rows, self._schema))

    def next(self) -> None:
        """Finish the present file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            self._number += 1

    def close(self) -> None:
        """Finish; without rows there is one file of none."""
        if not self._number:
            self._open()
        self.next()

    def add_sidecars(self) -> None:
        """Give all files the column of sidecars: those written so far are written again."""
        self.sidecars = True
        under_way = self._writer is not None
        count = self._number + under_way
        self.next()
        self._schema = with_features(self._schema.append(pa.field(SIDECARS, _SIDECARS)))
        for number in range(count):
            self._number = number
            path = self._path()
            old = path.rename(path.with_suffix(".old"))
            with pq.ParquetFile(old) as parquet:
                for group in range(parquet.metadata.num_row_groups):
                    table = parquet.read_row_group(group)
                    nothing = pa.nulls(table.num_rows, _SIDECARS)
                    table = table.append_column(SIDECARS, nothing)
                    self._open().write_table(table.cast(self._schema))
            old.unlink()
            if not under_way or number + 1 < count:
                self.next()
        if not under_way:
            self._number = count

    def _path(self) -> Path:
        return self._folder / f"kept-{self._number:05d}.parquet"

    def _open(self) -> pq.ParquetWriter:
        if self._writer is None:
            self._writer = _images_writer(self._path(), self._schema)
        return self._writer


def _images_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    leaves = _leaves(schema)
    images = [leaf for leaf in leaves if leaf.startswith(f"{IMAGE}.")]
    return pq.ParquetWriter(
        path.absolute(),
        schema,
        compression={leaf: "none" if leaf in images else "zstd" for leaf in leaves},
        use_dictionary=[leaf for leaf in leaves if leaf not in (*images, IMAGE_ID)],
        # A page is ended between batches: of the usual 1,024 images one would be 100 MB and more.
        write_batch_size=16,
    )


def _leaves(schema: pa.Schema) -> list[str]:
    """The paths of the columns that Parquet makes of these."""
    empty = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), empty)
    with pq.ParquetFile(pa.BufferReader(empty.getvalue())) as parquet:
        return [parquet.schema.column(n).path for n in range(len(parquet.schema.names))]


def with_features(schema: pa.Schema) -> pa.Schema:
    """The schema with what tells Hugging Face ``datasets`` that ``image`` is to be decoded.

    It is a JSON of each column's feature under the key ``huggingface``
    (``datasets.Features.arrow_schema``). Where a column has a type that ``datasets`` doesn't know,
    there is none.
    """
    metadata = {k: v for k, v in (schema.metadata or {}).items() if k != b"huggingface"}
    try:
        features = {
            field.name: {"_type": "Image"} if field.name == IMAGE else _feature(field.type)
            for field in schema
        }
    except ValueError:
        return schema.with_metadata(metadata)
    text = json.dumps({"info": {"features": features}})
    return schema.with_metadata({**metadata, b"huggingface": text.encode()})


def _feature(kind: pa.DataType) -> Any:
    """A column's feature as JSON.

    Raises:
        ValueError: ``datasets`` has no such type.
    """
    if pa.types.is_dictionary(kind):  # datasets reads the values
        return _feature(kind.value_type)
    if pa.types.is_struct(kind):
        fields = [kind.field(place) for place in range(kind.num_fields)]
        return {field.name: _feature(field.type) for field in fields}
    if pa.types.is_large_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "LargeList"}
    if pa.types.is_list(kind):
        return [_feature(kind.value_type)]
    if pa.types.is_fixed_size_list(kind):
        feature = _feature(kind.value_type)
        return {"feature": feature, "length": kind.list_size, "_type": "Sequence"}
    return {"dtype": _dtype(kind), "_type": "Value"}


_DTYPES = {
    pa.null(): "null",
    pa.bool_(): "bool",
    pa.float16(): "float16",
    pa.float32(): "float32",
    pa.float64(): "float64",
    pa.date32(): "date32",
    pa.date64(): "date64",
    pa.binary(): "binary",
    pa.large_binary(): "large_binary",
    pa.string(): "string",
    pa.large_string(): "large_string",
}


def _dtype(kind: pa.DataType) -> str:
    if kind in _DTYPES:
        return _DTYPES[kind]
    if pa.types.is_integer(kind) or pa.types.is_time(kind) or pa.types.is_duration(kind):
        return str(kind)
    if pa.types.is_timestamp(kind):
        return f"timestamp[{kind.unit}, tz={kind.tz}]" if kind.tz else f"timestamp[{kind.unit}]"
    if pa.types.is_decimal128(kind):
        return f"decimal128({kind.precision}, {kind.scale})"
    if pa.types.is_decimal256(kind):
        return f"decimal256({kind.precision}, {kind.scale})"
    raise ValueError(str(kind))
