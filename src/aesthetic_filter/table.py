"""The vocabulary of columns; the one place where Arrow columns become NumPy vectors and back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from aesthetic_filter.errors import WrongEmbeddingsError

IMAGE_ID = "image_id"
IMAGE_PATH = "image_path"
IMAGE = "image"
IMAGE_DATA = "image_data"
WIDTH = "width"
HEIGHT = "height"
SHA256 = "image_sha256"
EMBEDDING = "embedding"
SCORE = "aesthetic_score"
ERROR = "error"
NORM = "embedding_norm"
COSINE = "reference_cosine"
DROPPED_BY = "dropped_by"

RESULT_COLUMNS = {
    SCORE: pa.float32(),
    ERROR: pa.string(),
    NORM: pa.float32(),
    COSINE: pa.float32(),
}
"""What scoring adds to a table.

A source's own column of one of these names becomes ``source_NAME``.
"""

EMBEDDING_COLUMNS = (IMAGE_ID, EMBEDDING, IMAGE_DATA, DROPPED_BY, *RESULT_COLUMNS)
"""The names that a source of embeddings can't use for columns of its own."""

IMAGE_COLUMNS = (IMAGE_PATH, IMAGE, WIDTH, HEIGHT, SHA256, *EMBEDDING_COLUMNS)
"""The names that a source of images can't use for columns of its own."""

METADATA_KEY = b"aesthetic_filter"
"""The key, in a file's schema metadata, under which its provenance lies as JSON."""

NULL_EMBEDDING = "embedding is null"
NULL_VALUES = "embedding has missing values"


def printable(value: object) -> str:
    """A value from a source as it may be shown: line breaks and terminal escapes made visible."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(value)
    )


def carried_names(names: Iterable[str], taken: Iterable[str]) -> dict[str, str]:
    """What the source's own columns are called beside ours: ``source_NAME`` where NAME is taken."""
    names, taken = list(names), set(taken)
    free = set(names) - taken
    found = {}
    for name in names:
        new = name
        while new in taken or (new != name and new in free):
            new = f"source_{new}"
        taken.add(new)
        found[name] = new
    return found


def with_column(table: pa.Table, name: str, values: pa.Array | pa.ChunkedArray) -> pa.Table:
    """A table with these values in a column: where it is, if there is one, else as the last."""
    if name in table.column_names:
        return table.set_column(table.column_names.index(name), name, values)
    return table.append_column(name, values)


def vectors_column(vectors: NDArray[Any]) -> pa.FixedSizeListArray:
    """(N, D) float16, float32 or float64 vectors as an Arrow column, uncopied if contiguous."""
    native = vectors.astype(vectors.dtype.newbyteorder("="), copy=False)
    values = pa.array(np.ascontiguousarray(native).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(values, vectors.shape[1])


def column_vectors(
    column: pa.Array | pa.ChunkedArray, width: int | None = None
) -> tuple[NDArray[Any], dict[int, str]]:
    """An embedding column as vectors, without a copy where Arrow's layout allows it.

    Args:
        column: fixed_size_list, list, large_list or fixed-shape tensor, of halffloat, float or
            double; nulls allowed, sliced and chunked arrays too.
        width: the number of values a row of a list column must have; default: as most rows.

    Returns:
        (N, D) vectors, and for each row that holds no usable one (its vector is then zeros) the
        reason.

    Raises:
        WrongEmbeddingsError: a column of another type.
    """
    array = _one_array(column)
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if isinstance(array, pa.FixedSizeListArray):
        wide, errors = _fixed(array)
    elif isinstance(array, pa.ListArray | pa.LargeListArray):
        wide, errors = _ragged(array, width)
    else:
        raise WrongEmbeddingsError(
            f"an embedding column holds lists of floating-point numbers, not {array.type}"
        )
    return wide, errors


def is_embedding_type(kind: pa.DataType) -> bool:
    """Whether a column of this type can hold embeddings."""
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    lists = (pa.types.is_fixed_size_list, pa.types.is_list, pa.types.is_large_list)
    return any(check(kind) for check in lists) and pa.types.is_floating(kind.value_type)


def _one_array(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    if not isinstance(column, pa.ChunkedArray):
        return column
    if column.num_chunks == 1:  # as it is: to combine even one chunk copies it
        return column.chunk(0)
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def _fixed(array: pa.FixedSizeListArray) -> tuple[NDArray[Any], dict[int, str]]:
    width = array.type.list_size
    values = array.values.slice(array.offset * width, len(array) * width)
    return _reshape(array, values, width)


def _ragged(
    array: pa.ListArray | pa.LargeListArray, width: int | None
) -> tuple[NDArray[Any], dict[int, str]]:
    offsets = array.offsets.to_numpy()
    lengths = np.diff(offsets)
    present = array.is_valid().to_numpy(zero_copy_only=False)
    if width is None:
        width = _most_common(lengths[present])
    fits = present & (lengths == width)
    if len(array) and fits.all():
        values = array.values.slice(offsets[0], len(array) * width)
        return _reshape(array, values, width)
    errors = {
        int(row): f"embedding has {lengths[row]} values, not {width}"
        for row in np.flatnonzero(present & ~fits)
    }
    good = array.filter(pa.array(fits)).flatten()
    spread = np.zeros((len(array), width), good.type.to_pandas_dtype())
    rows = np.flatnonzero(fits)
    if len(rows):
        missing = np.zeros(len(array), np.bool_)
        spread[rows] = good.fill_null(0).to_numpy().reshape(len(rows), width)
        if good.null_count:
            missing[rows] = _has_null(good, width)
            errors |= {int(row): NULL_VALUES for row in np.flatnonzero(missing)}
    errors |= {int(row): NULL_EMBEDDING for row in np.flatnonzero(~present)}
    spread[sorted(errors)] = 0
    return spread, errors


def _reshape(array: pa.Array, values: pa.Array, width: int) -> tuple[NDArray[Any], dict[int, str]]:
    if not pa.types.is_floating(values.type):
        raise WrongEmbeddingsError(
            f"an embedding column holds lists of floating-point numbers, not {array.type}"
        )
    if not array.null_count and not values.null_count:
        return values.to_numpy(zero_copy_only=True).reshape(len(array), width), {}
    errors: dict[int, str] = {}
    vectors = values.fill_null(0).to_numpy().reshape(len(array), width).copy()
    if values.null_count:
        errors |= {int(row): NULL_VALUES for row in np.flatnonzero(_has_null(values, width))}
    nulls = ~array.is_valid().to_numpy(zero_copy_only=False)
    errors |= {int(row): NULL_EMBEDDING for row in np.flatnonzero(nulls)}
    vectors[sorted(errors)] = 0
    return vectors, errors


def _has_null(values: pa.Array, width: int) -> NDArray[np.bool_]:
    missing = values.is_null().to_numpy(zero_copy_only=False).reshape(-1, width)
    found: NDArray[np.bool_] = missing.any(axis=1)
    return found


def _most_common(lengths: NDArray[Any]) -> int:
    if not len(lengths):
        return 0
    values, counts = np.unique(lengths, return_counts=True)
    return int(values[counts.argmax()])
