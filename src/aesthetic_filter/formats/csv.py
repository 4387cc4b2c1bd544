"""Comma-separated values, to write."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.csv

from aesthetic_filter.formats.jsonl import as_json

ENDING = ".csv"


def write(path: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> None:
    """Write rows under a header line; lists and structs become JSON."""
    flat = pa.schema([(f.name, _flat(f.type)) for f in schema])
    with pyarrow.csv.CSVWriter(path, flat) as writer:
        for batch in batches:
            columns = [
                column.cast(kind)
                if column.type == kind or not _nested(column.type)
                else _json_column(column)
                for column, kind in zip(batch.columns, flat.types, strict=True)
            ]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=flat))


def _flat(kind: pa.DataType) -> pa.DataType:
    if _nested(kind):
        return pa.string()
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _nested(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    )


def _json_column(column: pa.Array) -> pa.Array:
    values = column.to_pylist()
    return pa.array([None if value is None else as_json(value) for value in values], pa.string())
