"""Images as Python objects, and the table of the same rows: nothing is lost on the way, or back.

A table has ``image_id`` and ``image_path``; ``image`` (encoded bytes) or ``image_data`` (pixels),
``embedding``, ``aesthetic_score``, ``error`` and ``dropped_by`` where any image has one; and one
column for each metadata key. A key whose name is taken becomes ``source_NAME``.

Metadata lies in plain Arrow columns where they give back exactly what was put in, types and all,
and as JSON text (``large_string``) elsewhere. What JSON has no form for is tagged::

    NaN, infinity        {"$float": "nan"}
    int from 2**63       {"$int": "0x8000000000000000"}
    tuple                {"$tuple": [...]}
    dict                 {"$dict": [[key, value], ...]} where a key is no string or begins with $
    bytes                {"$bytes": base64}
    Decimal              {"$decimal": "1.50"}
    date                 {"$date": "2024-02-29"}
    datetime, time       {"$datetime": "2024-02-29T12:00:00", "fold": 0, "zone": "Europe/Paris"}
    timedelta            {"$timedelta": [days, seconds, microseconds]}
    NumPy scalar, array  {"$scalar": base64, "dtype": "<U3"}, {"$array": base64, "dtype", "shape"}

What was done to a column is noted under ``aesthetic_filter_images`` in its field's metadata and in
the schema's, since many a step keeps only one of the two: ``{"key": NAME}`` of a renamed column,
``{"encoding": "json"}``, ``{"numpy": "float32"}`` of a plain column of NumPy scalars.
"""

from __future__ import annotations

import base64
import datetime
import json
import math
import numbers
import os
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from decimal import Decimal
from typing import Any, SupportsIndex, overload
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from aesthetic_filter.errors import ImageError, UsageError, WrongEmbeddingsError
from aesthetic_filter.table import (
    COSINE,
    DROPPED_BY,
    EMBEDDING,
    ERROR,
    HEIGHT,
    IMAGE,
    IMAGE_DATA,
    IMAGE_ID,
    IMAGE_PATH,
    NORM,
    NULL_EMBEDDING,
    NULL_VALUES,
    SCORE,
    SHA256,
    WIDTH,
    carried_names,
    is_embedding_type,
)

METADATA_KEYS = "metadata_keys"
"""The column that lists a row's metadata keys, where not all rows have the same in one order."""

EMBEDDING_FORM = "embedding_form"
"""The column that says what an embedding was, where it is no (D,) array of the column's dtype."""

_FORM = pa.struct({"dtype": pa.string(), "shape": pa.list_(pa.int64())})
_PIXELS = pa.struct(
    {"data": pa.large_binary(), "shape": pa.list_(pa.int64()), "dtype": pa.string()}
)
_NOTE = b"aesthetic_filter_images"
_DEEPEST = 60  # Arrow refuses lists nested more than 100 deep

_OWN = (
    *(IMAGE_ID, IMAGE_PATH, IMAGE, IMAGE_DATA, EMBEDDING, EMBEDDING_FORM),
    *(SCORE, ERROR, DROPPED_BY, METADATA_KEYS),
)
_FACTS = {
    WIDTH: pa.int32(),
    HEIGHT: pa.int32(),
    SHA256: pa.string(),
    NORM: pa.float32(),
    COSINE: pa.float32(),
}
"""Metadata that the package itself writes: these keys keep their names if the type is right."""

_ARROW_REFUSES = (pa.ArrowException, TypeError, ValueError, OverflowError, AttributeError)


@dataclass(eq=False, repr=False)
class ImageObject:
    """One image, by the field names of NVIDIA NeMo Curator.

    Attributes:
        image_path: where its bytes are: a path or URI.
        image_id: unique in its collection.
        metadata: whatever else is known of it, by name.
        image_data: (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) uint8 pixels, grey, RGB or RGBA; or
            its encoded bytes; or None.
        embedding: (D,) float16, float32 or float64; a list or torch tensor will do; or None.
        aesthetic_score: the head's prediction; None where there is none.
        error: why there is no score.
        dropped_by: the rule or stage that dropped it.

    Two are equal if all their values are: of the same type and, of arrays, of the same dtype; NaN
    equals NaN.
    """

    image_path: str = ""
    image_id: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    image_data: NDArray[Any] | bytes | None = None
    embedding: Any = None
    aesthetic_score: float | None = None
    error: str | None = None
    dropped_by: str | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ImageObject):
            return NotImplemented
        return all(_same(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))

    def __repr__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        shown = ", ".join(
            f"{name}={_shown(value)}"
            for name, value in given.items()
            if value is not None and not (isinstance(value, str | dict) and not value)
        )
        return f"{type(self).__name__}({shown})"


@dataclass(init=False, eq=False, repr=False)
class ImageBatch(Sequence[ImageObject]):
    """Images in order. A slice is a batch of the same objects.

    Attributes:
        data: the images.
        dataset_name: what they belong to.
        metadata: what is known of the batch as a whole; ``_metadata`` is the same.
        task_id: NeMo Curator's name for the batch.
    """

    data: list[ImageObject]
    dataset_name: str
    metadata: dict[str, Any]
    task_id: str
    _stage_perf: list[Any]

    def __init__(
        self,
        data: Iterable[ImageObject] = (),
        dataset_name: str = "",
        metadata: dict[str, Any] | None = None,
        task_id: str = "",
        *,
        _stage_perf: list[Any] | None = None,
        _metadata: dict[str, Any] | None = None,
    ) -> None:
        """Only stores.

        Args:
            data: a list is kept as it is.
            dataset_name: what the images belong to.
            metadata: of the whole batch.
            task_id: NeMo Curator's name for the batch.
            _stage_perf: NeMo Curator's timings, kept for its stages; they go into no table.
            _metadata: what NeMo Curator calls ``metadata``.
        """
        self.data = data if isinstance(data, list) else list(data)
        self.dataset_name = dataset_name
        if metadata is None:
            metadata = {} if _metadata is None else _metadata
        self.metadata = metadata
        self.task_id = task_id
        self._stage_perf = [] if _stage_perf is None else _stage_perf

    @property
    def num_items(self) -> int:
        """Number of images."""
        return len(self.data)

    @property
    def _metadata(self) -> dict[str, Any]:
        return self.metadata

    @_metadata.setter
    def _metadata(self, metadata: dict[str, Any]) -> None:
        self.metadata = metadata

    def __len__(self) -> int:
        return len(self.data)

    @overload
    def __getitem__(self, index: SupportsIndex) -> ImageObject: ...
    @overload
    def __getitem__(self, index: slice) -> ImageBatch: ...
    def __getitem__(self, index: SupportsIndex | slice) -> ImageObject | ImageBatch:
        if isinstance(index, slice):
            return replace(self, data=self.data[index])
        return self.data[index]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ImageBatch):
            return NotImplemented
        return (
            self.data == other.data
            and (self.dataset_name, self.task_id) == (other.dataset_name, other.task_id)
            and _same(self.metadata, other.metadata)
        )

    def __repr__(self) -> str:
        given = {"dataset_name": self.dataset_name, "task_id": self.task_id}
        counts = {
            "embedded": sum(image.embedding is not None for image in self),
            "scored": sum(image.aesthetic_score is not None for image in self),
            "failed": sum(image.error is not None for image in self),
        }
        parts = [f"{name}={reprlib.repr(value)}" for name, value in given.items() if value]
        parts.append(f"{len(self):,} image{'s' * (len(self) != 1)}")
        parts += [f"{count:,} {what}" for what, count in counts.items() if count]
        ids = [reprlib.repr(image.image_id) for image in self.data[:3]]
        if len(self) > len(ids):
            ids.append("…")
        listed = f": {', '.join(ids)}" if ids else ""
        return f"{type(self).__name__}({', '.join(parts)}{listed})"

    def to_table(self) -> pa.Table:
        """The images as a table, one row each; :meth:`from_table` gives the same batch again.

        Exactly the same, but for these:

        - ``aesthetic_score`` is float32 in the table: a float that is none is rounded to one.
        - An ``image_path`` that is a ``pathlib.Path`` comes back as a string, ``bytearray`` as
          bytes, an embedding that is a tensor as an array (of bfloat16: float32), the numbers in a
          list as floats.
        - An array comes back as a plain one, contiguous.

        Raises:
            TypeError: a value that no column can give back.
        """
        columns: dict[str, Any] = {
            IMAGE_ID: _text(self, IMAGE_ID),
            IMAGE_PATH: _text(self, IMAGE_PATH),
        }
        columns |= _image_columns(self)
        columns |= _embedding_columns(self)
        if any(image.aesthetic_score is not None for image in self):
            columns[SCORE] = _scores(self)
        for name in (ERROR, DROPPED_BY):
            if any(getattr(image, name) is not None for image in self):
                columns[name] = _text(self, name)
        own, notes, keys = _metadata_columns(self)
        columns |= own
        if keys is not None:
            columns[METADATA_KEYS] = keys
        about = {
            "dataset_name": self.dataset_name,
            "task_id": self.task_id,
            "metadata": self.metadata,
            "columns": notes,
        }
        schema = pa.schema(
            [
                pa.field(name, column.type, metadata=_as_note(notes.get(name), name))
                for name, column in columns.items()
            ],
            metadata=_as_note(about, "the batch (metadata, dataset_name, task_id)"),
        )
        return pa.table(list(columns.values()), schema=schema)

    @classmethod
    def from_table(cls, table: pa.Table) -> ImageBatch:
        """The rows of a table as images: of one that :meth:`to_table` made, or of any other.

        Args:
            table: any columns, none of which has to be there. What is not an attribute of
                :class:`ImageObject` becomes metadata: the source's own columns, and ``width``,
                ``height``, ``image_sha256``, ``embedding_norm`` and ``reference_cosine``. Where a
                row has both ``image`` and ``image_data``, ``image`` is taken.

        Raises:
            UsageError: two columns of one name, one of the vocabulary of the wrong type, or one
                of nanoseconds without pandas to hold them.
            WrongEmbeddingsError: ``embedding`` holds no lists of floating-point numbers.
        """
        names = table.column_names
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise UsageError(f"the table has several columns named {', '.join(twice)}; rename them")
        about = _noted(table.schema.metadata)
        columns: dict[str, list[Any]] = {
            "image_id": _read_text(table, IMAGE_ID, ""),
            "image_path": _read_text(table, IMAGE_PATH, ""),
            "metadata": _read_metadata(table, about.get("columns", {})),
            "image_data": _read_images(table),
            "embedding": _read_embeddings(table),
            "aesthetic_score": _read_scores(table),
            "error": _read_text(table, ERROR),
            "dropped_by": _read_text(table, DROPPED_BY),
        }
        rows = zip(*columns.values(), strict=True)
        return cls(
            [ImageObject(**dict(zip(columns, row, strict=True))) for row in rows],
            about.get("dataset_name", ""),
            about.get("metadata"),
            about.get("task_id", ""),
        )


def as_array(pixels: Mapping[str, Any]) -> NDArray[Any]:
    """A value of the column ``image_data`` as the array it was, read-only and uncopied.

    Args:
        pixels: ``data``, ``shape`` and ``dtype``, as Arrow's ``to_pylist`` gives them.

    Raises:
        ImageError: the data is not that of such an array.
    """
    try:
        shape, dtype = tuple(pixels["shape"]), np.dtype(pixels["dtype"])
        if math.prod(shape) * dtype.itemsize == len(pixels["data"]):
            return np.ndarray(shape, dtype, pixels["data"])
    except (TypeError, ValueError):
        pass
    raise ImageError("image_data is not an array of its shape and dtype")


def embedding_vectors(
    objects: Sequence[ImageObject], width: int
) -> tuple[NDArray[Any], dict[int, str]]:
    """The images' embeddings as vectors, their values unchanged.

    Args:
        objects: embeddings of shape (width,) or (1, width), floating-point: arrays, sequences or
            torch tensors, on any device.
        width: the number of values.

    Returns:
        (N, width) vectors: float64 if any embedding is (as those of Python's floats are), float16
        if all are, float32 otherwise. And for each row without a usable one (its vector is then
        zeros) the reason.
    """
    found: dict[int, NDArray[Any]] = {}
    errors: dict[int, str] = {}
    for row, image in enumerate(objects):
        try:
            found[row] = _row(image.embedding, width)
        except ValueError as error:
            errors[row] = str(error)
    dtypes = {values.dtype for values in found.values()} or {np.dtype(np.float32)}
    vectors = np.zeros((len(objects), width), np.result_type(*dtypes))
    for row, values in found.items():
        vectors[row] = values
    return vectors, errors


# Embeddings.


def _row(value: Any, width: int) -> NDArray[Any]:
    """An embedding of shape (width,); raises ValueError with the reason there is none."""
    if value is None:
        raise ValueError(NULL_EMBEDDING)
    array = _floats(value)
    if array.ndim == 2 and len(array) == 1:
        array = array[0]
    if array.ndim != 1:
        raise ValueError(f"embedding has shape {array.shape}, not ({width},)")
    if len(array) != width:
        raise ValueError(f"embedding has {len(array)} values, not {width}")
    return array.astype(_stored_dtype(array.dtype), copy=False)


def _floats(value: Any) -> NDArray[Any]:
    """An embedding as an array of floats; raises ValueError with the reason there is none."""
    try:
        array = np.asarray(_tensor_values(value) if hasattr(value, "detach") else value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError("embedding is not an array of numbers") from None
    if np.ma.is_masked(value):
        raise ValueError(NULL_VALUES)
    if array.dtype.hasobject:
        if any(x is None for x in array.flat):
            raise ValueError(NULL_VALUES)
        raise ValueError("embedding is not an array of numbers")
    if array.dtype.kind != "f":
        raise ValueError(f"embedding holds {array.dtype} values; embeddings are floating-point")
    if array.dtype.itemsize > 8:
        with np.errstate(over="ignore"):
            exact = np.array_equal(array.astype(np.float64), array, equal_nan=True)
        if not exact:
            raise ValueError(f"embedding holds {array.dtype} values that float64 cannot hold")
    return array


def _tensor_values(tensor: Any) -> Any:
    host = tensor.detach().cpu()
    try:
        return host.numpy()
    except TypeError:  # NumPy has no bfloat16; float32 holds all its values
        return host.float().numpy()


def _stored_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(f"f{min(dtype.itemsize, 8)}")


@dataclass(frozen=True, eq=False)
class _Stored:
    """An embedding as a column holds it.

    Attributes:
        values: 1-D float16, float32 or float64.
        missing: which of them are null; None: none is.
        form: what the embedding was; None: ``values``.
    """

    values: NDArray[Any]
    missing: NDArray[np.bool_] | None
    form: dict[str, Any] | None


def _store(value: Any) -> _Stored:
    sequence = next((kind for kind in (list, tuple) if isinstance(value, kind)), None)
    missing = None
    if sequence and any(x is None for x in value):
        missing = np.array([x is None for x in value])
        value = [math.nan if x is None else x for x in value]
    array = _floats(value)
    values = array.reshape(-1).astype(_stored_dtype(array.dtype), copy=False)
    if sequence:
        return _Stored(values, missing, _form(sequence.__name__, array))
    plain = array.ndim == 1 and array.dtype == values.dtype
    return _Stored(values, missing, None if plain else _form(str(array.dtype), array))


def _form(dtype: str, array: NDArray[Any]) -> dict[str, Any]:
    return {"dtype": dtype, "shape": array.shape}


def _embedding_columns(batch: ImageBatch) -> dict[str, pa.Array]:
    """``embedding``: a list of one width and dtype where that fits all, of the widest otherwise."""
    stored: dict[int, _Stored] = {}
    for row, image in enumerate(batch):
        try:
            if image.embedding is not None:
                stored[row] = _store(image.embedding)
        except ValueError as error:
            kind = type(image.embedding).__qualname__
            raise TypeError(f"{_place(batch, row)}: {error} (embedding is a {kind})") from None
    if not stored:
        return {}
    dtype = np.result_type(*{s.values.dtype for s in stored.values()})
    one_kind = len({(s.values.dtype, len(s.values)) for s in stored.values()}) == 1
    width = len(next(iter(stored.values())).values)
    fixed = one_kind and width > 0
    hole = _Stored(np.zeros(width if fixed else 0, dtype), None, None)
    rows = [stored.get(row, hole) for row in range(len(batch))]
    values = np.concatenate([s.values for s in rows], dtype=dtype)
    nulls = None
    if any(s.missing is not None for s in rows):
        clear = [np.zeros(len(s.values), bool) if s.missing is None else s.missing for s in rows]
        nulls = np.concatenate(clear)
    flat = pa.array(values, mask=nulls)
    absent = pa.array([row not in stored for row in range(len(batch))])
    if fixed:
        column = pa.FixedSizeListArray.from_arrays(flat, width, mask=absent)
    else:
        offsets = np.cumsum([0, *(len(s.values) for s in rows)])
        column = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat, mask=absent)
    columns = {EMBEDDING: column}
    forms: list[dict[str, Any] | None] = [None] * len(batch)
    for row, each in stored.items():
        differs = each.values.dtype != dtype
        forms[row] = each.form or (_form(str(each.values.dtype), each.values) if differs else None)
    if any(form is not None for form in forms):
        columns[EMBEDDING_FORM] = pa.array(forms, _FORM)
    return columns


def _read_embeddings(table: pa.Table) -> list[Any]:
    if EMBEDDING not in table.column_names or pa.types.is_null(table.schema.field(EMBEDDING).type):
        return [None] * table.num_rows
    column = table.column(EMBEDDING)
    if not is_embedding_type(column.type):
        raise WrongEmbeddingsError(
            f"an embedding column holds lists of floating-point numbers, not {column.type}"
        )
    forms: list[Any] = [None] * table.num_rows
    if EMBEDDING_FORM in table.column_names:
        forms = _typed(table, EMBEDDING_FORM, _FORM).to_pylist()
    vectors = [
        scalar.values
        for chunk in column.chunks
        for scalar in (chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk)
    ]
    return [_restored(values, form) for values, form in zip(vectors, forms, strict=True)]


def _restored(stored: pa.Array | None, form: dict[str, Any] | None) -> Any:
    """One embedding again; a form that does not fit is that of an embedding since replaced."""
    if stored is None:
        return None
    dtype = form["dtype"] if form else None
    if stored.null_count:
        listed = stored.to_pylist()
        return tuple(listed) if dtype == "tuple" else listed
    values = np.array(stored.to_numpy(zero_copy_only=False))
    if form is None or math.prod(form["shape"]) != len(values):
        return values
    shaped = values.reshape(form["shape"])
    if dtype == "list":
        return shaped.tolist()
    if dtype == "tuple":
        return tuple(shaped.tolist())
    with np.errstate(all="ignore"):
        cast = shaped.astype(dtype)
    return cast if np.array_equal(cast, shaped, equal_nan=True) else values


# Images, texts, scores.


def _place(batch: ImageBatch, row: int) -> str:
    return f"image {row} ({reprlib.repr(batch[row].image_id)})"


def _text(batch: ImageBatch, name: str) -> pa.Array:
    values = []
    for row, image in enumerate(batch):
        value = getattr(image, name)
        if name == IMAGE_PATH and isinstance(value, os.PathLike):
            value = os.fspath(value)
        if value is not None and not isinstance(value, str):
            kind = type(value).__qualname__
            raise TypeError(f"{_place(batch, row)}: {name} is a {kind}; give a str")
        if value is not None and not _is_unicode(value):
            raise TypeError(f"{_place(batch, row)}: {name} is a str that is not valid Unicode")
        values.append(value)
    return pa.array(values, pa.string())


def _read_text(table: pa.Table, name: str, default: str | None = None) -> list[str | None]:
    if name not in table.column_names:
        return [default] * table.num_rows
    found: list[str | None] = _typed(table, name, pa.string()).to_pylist()
    return found


def _scores(batch: ImageBatch) -> pa.Array:
    for row, image in enumerate(batch):
        score = image.aesthetic_score
        if score is not None and (isinstance(score, bool) or not isinstance(score, numbers.Real)):
            kind = type(score).__qualname__
            raise TypeError(f"{_place(batch, row)}: aesthetic_score is a {kind}; give a float")
    scores = [image.aesthetic_score for image in batch]
    return pa.array([None if s is None else float(s) for s in scores], pa.float32())


def _read_scores(table: pa.Table) -> list[float | None]:
    if SCORE not in table.column_names:
        return [None] * table.num_rows
    found: list[float | None] = _typed(table, SCORE, pa.float64()).to_pylist()
    return found


def _typed(table: pa.Table, name: str, kind: pa.DataType) -> pa.ChunkedArray:
    column = table.column(name)
    try:
        if _is_text(column.type) and kind != pa.string():
            raise pa.ArrowInvalid  # else texts would pass for bytes
        return column.cast(kind)
    except pa.ArrowException:
        raise UsageError(
            f"column {name!r} should hold {kind}, not {column.type}; rename it"
        ) from None


def _is_text(kind: pa.DataType) -> bool:
    checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(check(kind) for check in checks)


def _image_columns(batch: ImageBatch) -> dict[str, pa.Array]:
    encoded: list[bytes | None] = [None] * len(batch)
    pixels: list[dict[str, Any] | None] = [None] * len(batch)
    for row, image in enumerate(batch):
        data: Any = image.image_data
        if isinstance(data, bytes | bytearray | memoryview):
            encoded[row] = bytes(data)
        elif isinstance(data, np.ndarray) and not isinstance(data, np.ma.MaskedArray):
            if not _is_plain(data.dtype):
                raise TypeError(f"{_place(batch, row)}: image_data is an array of {data.dtype}")
            pixels[row] = {"data": data.tobytes(), "shape": data.shape, "dtype": str(data.dtype)}
        elif data is not None:
            kind = type(data).__qualname__
            raise TypeError(f"{_place(batch, row)}: image_data is a {kind}; give an array or bytes")
    columns = {}
    if any(data is not None for data in encoded):
        columns[IMAGE] = pa.array(encoded, pa.binary())
    if any(data is not None for data in pixels):
        columns[IMAGE_DATA] = pa.array(pixels, _PIXELS)
    return columns


def _read_images(table: pa.Table) -> list[Any]:
    images: list[Any] = [None] * table.num_rows
    if IMAGE_DATA in table.column_names:
        for row, pixels in enumerate(_typed(table, IMAGE_DATA, _PIXELS)):
            if pixels.is_valid:
                images[row] = as_array(pixels.as_py()).copy()
    if IMAGE in table.column_names:
        for row, data in enumerate(_typed(table, IMAGE, pa.large_binary())):
            if data.is_valid:
                images[row] = data.as_py()
    return images


# Metadata.


def _metadata_columns(
    batch: ImageBatch,
) -> tuple[dict[str, pa.Array], dict[str, dict[str, str]], pa.Array | None]:
    """A column for each key, what has to be noted of it, and where needed each row's keys."""
    keys = list(dict.fromkeys(key for image in batch for key in image.metadata))
    for key in keys:
        if not isinstance(key, str) or not _is_unicode(key):
            raise TypeError(f"metadata key {key!r} is a {type(key).__qualname__}, no column's name")
    encoded = {key: _encode(key, [image.metadata.get(key) for image in batch]) for key in keys}
    fitting = {key for key, kind in _FACTS.items() if key in keys and encoded[key][0].type == kind}
    names = carried_names(keys, {*_OWN, *_FACTS} - fitting)
    notes = {
        names[key]: note | ({} if names[key] == key else {"key": key})
        for key, (_, note) in encoded.items()
    }
    columns = {names[key]: column for key, (column, _) in encoded.items()}
    given = [list(image.metadata) for image in batch]
    listed = None
    if any(found != keys for found in given):
        listed = pa.array(given, pa.list_(pa.string()))
    return columns, {name: note for name, note in notes.items() if note}, listed


def _encode(key: str, values: list[Any]) -> tuple[pa.Array, dict[str, str]]:
    """A key's values as a column that gives them back, and what has to be noted of it."""
    what = f"metadata key {key!r}"
    for value in values:
        _check_nesting(value, what)
    for kind in (_FACTS.get(key), None, *_nanosecond_types(values)):
        plain = _exact(values, kind)
        if plain is not None:
            return plain, {}
    dtypes = {str(v.dtype) if isinstance(v, np.generic) else None for v in values if v is not None}
    dtype = dtypes.pop()
    if not dtypes and dtype in _NUMPY_COLUMNS:
        kind = pa.from_numpy_dtype(np.dtype(dtype))
        plain = _exact(values, kind, np.dtype(dtype).type)
        if plain is not None:
            return plain, {"numpy": dtype}
    texts = [None if value is None else _json(value, what) for value in values]
    return pa.array(texts, pa.large_string()), {"encoding": "json"}


def _nanosecond_types(values: list[Any]) -> list[pa.DataType]:
    """The type of pandas' Timestamps or Timedeltas, which Arrow takes for their base classes."""
    first: Any = next((value for value in values if value is not None), None)
    if hasattr(first, "nanosecond"):
        return [pa.timestamp("ns", None if first.tzinfo is None else str(first.tzinfo))]
    return [pa.duration("ns")] if hasattr(first, "nanoseconds") else []


_NUMPY_COLUMNS = {
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64"),
}


def _exact(
    values: list[Any], kind: pa.DataType | None = None, read: Callable[[Any], Any] | None = None
) -> pa.Array | None:
    """An Arrow column that gives the values back, or None."""
    try:
        column = pa.array(values, kind)
        found = column.to_pylist()
        if read is not None:
            found = [None if value is None else read(value) for value in found]
    except _ARROW_REFUSES:
        return None
    return column if _same(found, values) else None


def _read_metadata(table: pa.Table, notes: Mapping[str, Any]) -> list[dict[str, Any]]:
    names = [name for name in table.column_names if name not in _OWN]
    columns: dict[str, list[Any]] = {}
    for name in names:
        note = _noted(table.schema.field(name).metadata) or notes.get(name, {})
        key = note.get("key", name)
        if key in names or key in columns:  # another column has that name by now
            key = name
        try:
            columns[key] = _decode(table.column(name), note)
        except ValueError as error:  # pyarrow, of nanoseconds where there is no pandas
            raise UsageError(f"column {name!r} cannot be read as Python values: {error}") from None
    every = list(columns)
    listed: list[Any] = [None] * table.num_rows
    if METADATA_KEYS in table.column_names:
        listed = _typed(table, METADATA_KEYS, pa.list_(pa.string())).to_pylist()
    rows = []
    for row, own in enumerate(listed):
        keys = every
        if own is not None:
            present = [key for key in own if key in columns]
            added = [k for k in every if k not in own and columns[k][row] is not None]
            keys = present + added
        rows.append({key: columns[key][row] for key in keys})
    return rows


def _decode(column: pa.ChunkedArray, note: Mapping[str, str]) -> list[Any]:
    values: list[Any] = column.to_pylist()
    if note.get("encoding") == "json" and _is_text(column.type):
        return [None if value is None else _from_json(value) for value in values]
    if "numpy" in note and column.type == pa.from_numpy_dtype(np.dtype(note["numpy"])):
        read = np.dtype(note["numpy"]).type
        return [None if value is None else read(value) for value in values]
    return values


def _as_note(note: Mapping[str, Any] | None, what: str) -> dict[bytes, str] | None:
    return {_NOTE: _json(dict(note), what)} if note else None


def _noted(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    found: dict[str, Any] = _from_json((metadata or {}).get(_NOTE, b"{}"))
    return found


def _is_unicode(text: str) -> bool:
    """Whether it is without lone surrogates, which Arrow cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_plain(dtype: np.dtype[Any]) -> bool:
    """Whether the dtype is all in its name, and its values are all in their bytes."""
    try:
        return not dtype.hasobject and np.dtype(str(dtype)) == dtype
    except TypeError:
        return False


def _check_nesting(value: Any, what: str, above: tuple[int, ...] = ()) -> None:
    """Raise TypeError for what holds itself: at that, Arrow would end the process."""
    if isinstance(value, dict):
        inner: Iterable[Any] = value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        inner = value
    elif isinstance(value, np.ndarray) and value.dtype.hasobject:
        inner = value.flat
    else:
        return
    if id(value) in above or len(above) > _DEEPEST:
        kind = type(value).__qualname__
        raise TypeError(f"{what} holds a {kind} within itself, or nested too deep for a table")
    for each in inner:
        _check_nesting(each, what, (*above, id(value)))


def _same(a: Any, b: Any) -> bool:
    """Whether two values are the same, types and order of keys too; NaN is the same as NaN."""
    if isinstance(a, np.generic) and isinstance(b, np.generic):
        return a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        if a.dtype.hasobject:
            return all(map(_same, a.flat, b.flat))
        return bool(
            a.tobytes() == b.tobytes() or np.array_equal(a, b, equal_nan=a.dtype.kind in "fc")
        )
    if isinstance(a, float):
        return (a == b and math.copysign(1, a) == math.copysign(1, b)) or (a != a and b != b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return _same(list(a), list(b)) and all(map(_same, a.values(), b.values()))
    if isinstance(a, datetime.datetime | datetime.time | Decimal):
        return repr(a) == repr(b)
    if hasattr(a, "detach"):
        return _same(_tensor_values(a), _tensor_values(b))
    return bool(a == b)


def _json(value: Any, what: str) -> str:
    """A value as JSON text; raises TypeError if the text would not give it back."""
    _check_nesting(value, what)
    try:
        text = json.dumps(_tagged(value), allow_nan=False)
    except TypeError as error:
        raise TypeError(f"{what} holds a {error}, which a table cannot give back") from None
    if not _same(_from_json(text), value):
        kind = type(value).__qualname__
        raise TypeError(f"{what} holds a {kind} that a table cannot give back")
    return text


def _from_json(text: str | bytes) -> Any:
    return json.loads(text, object_hook=_untagged)


def _tagged(value: Any) -> Any:
    """What JSON can write; raises TypeError with the name of a type that has no form here."""
    kind = type(value)
    if value is None or kind in (bool, str):
        return value
    if kind is int:
        return value if abs(value) < 2**63 else {"$int": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else {"$float": str(value)}
    if kind is list:
        return [_tagged(each) for each in value]
    if kind is tuple:
        return {"$tuple": [_tagged(each) for each in value]}
    if kind is dict:
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: _tagged(each) for key, each in value.items()}
        return {"$dict": [[_tagged(key), _tagged(each)] for key, each in value.items()]}
    if kind is bytes:
        return {"$bytes": _base64(value)}
    if kind is Decimal:
        return {"$decimal": str(value)}
    if kind is datetime.date:
        return {"$date": value.isoformat()}
    if kind is datetime.timedelta:
        return {"$timedelta": [value.days, value.seconds, value.microseconds]}
    if kind in (datetime.datetime, datetime.time):
        clock = value.replace(tzinfo=None, fold=0).isoformat()
        return {f"${kind.__name__}": clock, "fold": value.fold, "zone": _tagged_zone(value.tzinfo)}
    if isinstance(value, np.generic) and _is_plain(value.dtype):
        return {"$scalar": _base64(value.tobytes()), "dtype": str(value.dtype)}
    if kind is np.ndarray and _is_plain(value.dtype):
        content = {"$array": _base64(value.tobytes()), "dtype": str(value.dtype)}
        return {**content, "shape": list(value.shape)}
    raise TypeError(kind.__qualname__)


def _untagged(found: dict[str, Any]) -> Any:
    """The value of a JSON object: of :func:`json.loads`, which comes to the innermost first."""
    tag = next(iter(found), "")
    if not tag.startswith("$"):
        return found
    body = found[tag]
    match tag:
        case "$int":
            return int(body, 16)
        case "$float":
            return float(body)
        case "$tuple":
            return tuple(body)
        case "$dict":
            return dict(body)
        case "$bytes":
            return base64.b64decode(body)
        case "$decimal":
            return Decimal(body)
        case "$date":
            return datetime.date.fromisoformat(body)
        case "$timedelta":
            return datetime.timedelta(*body)
        case "$datetime":
            moment = datetime.datetime.fromisoformat(body)
            return moment.replace(fold=found["fold"], tzinfo=_zone(found["zone"]))
        case "$time":
            clock = datetime.time.fromisoformat(body)
            return clock.replace(fold=found["fold"], tzinfo=_zone(found["zone"]))
        case "$scalar":
            return np.ndarray((), found["dtype"], base64.b64decode(body))[()]
        case "$array":
            shape, dtype = tuple(found["shape"]), found["dtype"]
            return np.ndarray(shape, dtype, base64.b64decode(body)).copy()
    raise UsageError(f"a value tagged {tag}, which this version does not know")


def _tagged_zone(zone: datetime.tzinfo | None) -> Any:
    """A zone's name in the time zone database, or an offset from UTC and perhaps its name."""
    if zone is None:
        return None
    if type(zone) is ZoneInfo and zone.key is not None:
        return zone.key
    if type(zone) is datetime.timezone:
        offset, name = zone.utcoffset(None), zone.tzname(None)
        named = [name] if zone.__reduce__()[1][1:] else []
        return [_tagged(offset), *named]
    raise TypeError(type(zone).__qualname__)


def _zone(zone: Any) -> datetime.tzinfo | None:
    if zone is None:
        return None
    return ZoneInfo(zone) if isinstance(zone, str) else datetime.timezone(*zone)


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _shown(value: Any) -> str:
    """A value in few words."""
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value):,} bytes>"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"<{tuple(value.shape)} {value.dtype}>"
    if isinstance(value, list | tuple):
        return f"<{len(value):,} values>"
    return repr(value) if isinstance(value, float) else reprlib.repr(value)
