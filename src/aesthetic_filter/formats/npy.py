"""NumPy files: ``.npy`` arrays of shape (N, D), or (D,) for one vector.

Rows have no names of their own, so their ids are ``file#row``; the id of a file with a single
vector is the file's name.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from aesthetic_filter.errors import ShardError, WrongEmbeddingsError
from aesthetic_filter.formats import BATCH_ROWS, Shard, Wanted
from aesthetic_filter.storage import Source
from aesthetic_filter.table import EMBEDDING, IMAGE_ID, vectors_column

DESCRIPTION = ".npy files"
PRECEDENCE = 0
GIVES = "embedding"


def matches(source: Source) -> bool:
    """Whether there are ``.npy`` files."""
    return any(file.name.endswith(".npy") for file in source.files)


def shards(source: Source) -> list[Shard]:
    """One for each ``.npy`` file."""
    return [Shard(file.name, (file,)) for file in source.files if file.name.endswith(".npy")]


def read(source: Source, shard: Shard, wanted: Wanted) -> Iterator[pa.Table]:
    """The rows, with their ids."""
    start = 0
    for vectors, total in read_vectors(source, shard):
        ids = row_ids(shard.name, start, start + len(vectors), total)
        yield pa.table({IMAGE_ID: ids, EMBEDDING: vectors_column(vectors)})
        start += len(vectors)


def sample(source: Source, shard: Shard, wanted: Wanted, rows: int) -> pa.Table | None:
    """Rows from the file's beginning, middle and end."""
    vectors = sample_vectors(source, shard, rows)
    return pa.table({EMBEDDING: vectors_column(vectors)})


def row_ids(name: str, start: int, stop: int, total: int) -> pa.Array:
    """``name#row`` for the rows from start to stop, or ``name`` where it is the only one."""
    if total == 1:
        return pa.array([name] * (stop - start), pa.string())
    prefix = np.frombuffer(f"{name}#".encode(), np.uint8)
    pieces = []
    while start < stop:
        # Rows whose numbers have as many digits: their ids are a matrix of bytes.
        digits = len(str(start))
        end = min(stop, 10**digits)
        width = len(prefix) + digits
        text = np.empty((end - start, width), np.uint8)
        text[:, : len(prefix)] = prefix
        numbers = np.arange(start, end)
        for place in range(width - 1, len(prefix) - 1, -1):
            numbers, last = np.divmod(numbers, 10)
            text[:, place] = last + ord("0")
        offsets = np.arange(0, text.size + 1, width, dtype=np.int32)
        pieces.append(
            pa.StringArray.from_buffers(end - start, pa.py_buffer(offsets), pa.py_buffer(text))
        )
        start = end
    if not pieces:
        return pa.array([], pa.string())
    return pa.concat_arrays(pieces) if len(pieces) != 1 else pieces[0]


def read_vectors(source: Source, shard: Shard) -> Iterator[tuple[NDArray[Any], int]]:
    """Batches of rows (n, D), each with the file's total number of rows.

    Raises:
        ShardError: the file is cut short, or is no array of vectors.
    """
    with source.open(shard.files[0]) as file:
        layout = _read_header(file, shard)
        buffers = _Buffers(BATCH_ROWS * layout.width, layout.dtype)
        for start in range(0, layout.rows, BATCH_ROWS):
            stop = min(start + BATCH_ROWS, layout.rows)
            rows = buffers.take((stop - start) * layout.width).reshape(-1, layout.width)
            _read_rows(file, shard, layout, start, rows)
            yield rows, layout.rows
            del rows
        if not layout.rows:
            yield np.empty((0, layout.width), layout.dtype), 0


def sample_vectors(source: Source, shard: Shard, rows: int) -> NDArray[Any]:
    """Up to ``rows`` rows: as many each from the file's beginning, middle and end."""
    with source.open(shard.files[0]) as file:
        layout = _read_header(file, shard)
        if layout.rows <= rows:
            count, starts = layout.rows, [0]
        else:
            count = -(-rows // 3)
            starts = [0, (layout.rows - count) // 2, layout.rows - count]
        found = np.empty((len(starts), count, layout.width), layout.dtype)
        for start, part in zip(starts, found, strict=True):
            _read_rows(file, shard, layout, start, part)
        return found.reshape(-1, layout.width)


def count_rows(source: Source, shard: Shard) -> int:
    """How many rows the file's header promises."""
    with source.open(shard.files[0]) as file:
        return _read_header(file, shard).rows


@dataclass(frozen=True)
class _Layout:
    rows: int
    width: int
    dtype: np.dtype[Any]
    columns_first: bool
    offset: int


def _read_header(file: BinaryIO, shard: Shard) -> _Layout:
    name = shard.files[0].name
    try:
        version = np.lib.format.read_magic(file)
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        if version not in readers:
            raise ShardError(name, f"written in .npy version {version}, which is not read here")
        shape, columns_first, dtype = _parse(readers[version], file)
    except (ValueError, EOFError, SyntaxError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ShardError(name, f"not a .npy file, or cut short in its header ({reason})") from None
    if dtype.kind != "f" or dtype.itemsize > 8:
        raise WrongEmbeddingsError(
            f"{name}: holds {dtype} values; embeddings are float16, float32 or float64"
        )
    if len(shape) == 1 and shape[0]:
        shape = (1, shape[0])
    if len(shape) != 2:
        raise WrongEmbeddingsError(f"{name}: has shape {shape}; embeddings are (rows, values)")
    layout = _Layout(shape[0], shape[1], dtype, columns_first and shape[0] > 1, file.tell())
    promised = layout.offset + shape[0] * shape[1] * dtype.itemsize
    actual = file.seek(0, 2)
    if actual < promised:
        whole = max(actual - layout.offset, 0) // max(shape[1] * dtype.itemsize, 1)
        raise ShardError(
            name, f"cut short: its header promises {shape[0]:,} rows, {whole:,} are there"
        )
    return layout


_PARSING = threading.Lock()


def _parse(read: Callable[[BinaryIO], Any], file: BinaryIO) -> Any:
    """NumPy's reading of a header, which is Python to it.

    CPython 3.11 may fail to parse two pieces of Python at once in two threads, with a
    ``SystemError`` about its own recursion depth (github.com/python/cpython/issues/106905).
    """
    place = file.tell()
    with _PARSING:
        try:
            return read(file)
        except SystemError:
            file.seek(place)
            return read(file)


def _read_rows(
    file: BinaryIO, shard: Shard, layout: _Layout, start: int, into: NDArray[Any]
) -> None:
    """Read ``len(into)`` rows from row ``start`` on."""
    if not layout.columns_first:
        row_bytes = layout.width * layout.dtype.itemsize
        _fill(file, shard, layout.offset + start * row_bytes, into)
        return
    columns = np.empty((layout.width, len(into)), layout.dtype)
    for number, column in enumerate(columns):
        place = layout.offset + (number * layout.rows + start) * layout.dtype.itemsize
        _fill(file, shard, place, column)
    into[:] = columns.T


class _Buffers:
    """Memory to read into, used again once nothing refers to it any more.

    Fresh memory for every batch would cost as much in page faults as the reading itself.
    """

    def __init__(self, size: int, dtype: np.dtype[Any]) -> None:
        self._size, self._dtype = size, dtype
        self._buffers: list[NDArray[Any]] = []

    def take(self, count: int) -> NDArray[Any]:
        for number in range(len(self._buffers)):
            # Referred to by this list and by getrefcount's own argument, by no view of it.
            if sys.getrefcount(self._buffers[number]) == 2:
                return self._buffers[number][:count]
        self._buffers.append(np.empty(self._size, self._dtype))
        return self._buffers[-1][:count]


def _fill(file: BinaryIO, shard: Shard, place: int, into: NDArray[Any]) -> None:
    view = memoryview(into.data).cast("B") if into.size else memoryview(b"")
    name = shard.files[0].name
    try:
        file.seek(place)
        while len(view):
            got = file.readinto(view)  # type: ignore[attr-defined]
            if not got:
                raise ShardError(name, f"ends at byte {file.tell():,} in the middle of its rows")
            view = view[got:]
    except OSError as error:
        raise ShardError(name, f"cannot be read: {error.strerror or error}") from None
