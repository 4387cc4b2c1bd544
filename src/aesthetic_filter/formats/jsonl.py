"""JSON Lines, to write: one object a row."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

ENDING = ".jsonl"


def write(path: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> None:
    """Write rows; dates become ISO 8601, binary becomes base64, NaN and infinity become null."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for batch in batches:
            columns = [_values(column) for column in batch.columns]
            for row in zip(*columns, strict=True):
                file.write(as_json(dict(zip(batch.schema.names, row, strict=True))) + "\n")


def as_json(value: Any, indent: int | None = None) -> str:
    """A value as JSON, in one line unless it is to be indented."""
    plain = _plain(value)
    return json.dumps(plain, ensure_ascii=False, allow_nan=False, default=str, indent=indent)


def _values(column: pa.Array) -> list[Any]:
    if pa.types.is_float32(column.type):
        # The shortest decimals that mean the same float32, not those of the float64 it widens to.
        return column.cast(pa.string()).cast(pa.float64()).to_pylist()  # type: ignore[no-any-return]
    return column.to_pylist()  # type: ignore[no-any-return]


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.isoformat() if hasattr(value, "isoformat") else value
