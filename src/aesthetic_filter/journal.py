"""What has been embedded of a shard so far, on disk, so that no image is ever embedded twice.

Embedding is the costly step, and a shard may take hours of it. So each embedding is appended to a
file beside the shard's part as soon as it is there, under the sha256 of the image's bytes. A run
that was killed finds them again, and so does one over a shard that has changed since: what an
image's bytes say does not depend on where they lie.

The file is plain records of fixed size: a killed process may leave the last one incomplete, and a
machine that lost its power may leave some zeroed or garbled, which their checksums show.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from aesthetic_filter.clip.encoder import Embedded
from aesthetic_filter.table import EMBEDDING, HEIGHT, SHA256, WIDTH, column_vectors, vectors_column

_RECORD = np.dtype(
    [
        ("checksum", "<u4"),
        ("width", "<i4"),
        ("height", "<i4"),
        ("sha256", "V32"),
        ("vector", "<f2", (768,)),
    ]
)


class Journal:
    """The embeddings of one shard: found by the sha256 of an image's bytes, appended to.

    Args:
        path: the file, made at the first :meth:`add`.
        part: a part made of an earlier version of the shard, whose embeddings are known too.
    """

    def __init__(self, path: Path, part: Path | None = None) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._records = _read(path)
        self._places = {_hex(record): place for place, record in enumerate(self._records)}
        self._table, self._rows = _from_part(part) if part else (None, {})

    def __len__(self) -> int:
        return len(self._places) + len(self._rows)

    def find(self, sha256: str) -> Embedded | None:
        """What is known of the image with this hash."""
        place = self._places.get(sha256)
        if place is not None:
            record = self._records[place]
            return Embedded(record["vector"], int(record["width"]), int(record["height"]), sha256)
        row = self._rows.get(sha256)
        if row is not None and self._table is not None:
            vectors, widths, heights = self._table
            return Embedded(vectors[row], int(widths[row]), int(heights[row]), sha256)
        return None

    def everything(self) -> pa.Table:
        """All that is known: ``image_sha256``, ``width``, ``height``, ``embedding``."""
        found = [self.find(sha256) for sha256 in (*self._places, *self._rows)]
        there = [image for image in found if image is not None]
        vectors = np.array([image.vector for image in there], np.float16).reshape(-1, 768)
        return pa.table(
            {
                SHA256: pa.array([image.sha256 for image in there], pa.string()),
                WIDTH: pa.array([image.width for image in there], pa.int32()),
                HEIGHT: pa.array([image.height for image in there], pa.int32()),
                EMBEDDING: vectors_column(vectors),
            }
        )

    def add(self, images: Iterable[Embedded]) -> None:
        """Append what was not known yet.

        Raises:
            OSError: the file cannot be written.
        """
        known = (self._places, self._rows)
        new = [i for i in images if i.sha256 and not any(i.sha256 in there for there in known)]
        if not new:
            return
        records = np.zeros(len(new), _RECORD)
        for record, image in zip(records, new, strict=True):
            record["width"], record["height"] = image.width, image.height
            record["sha256"] = np.void(bytes.fromhex(image.sha256))
            record["vector"] = image.vector
            record["checksum"] = _checksum(record)
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("ab", buffering=0)
            self._file.truncate(len(self._records) * _RECORD.itemsize)
        self._file.write(records.tobytes())

    def close(self) -> None:
        """Close the file; it stays."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """Close the file and delete it: the part has it all."""
        self.close()
        self._path.unlink(missing_ok=True)


def _read(path: Path) -> NDArray[Any]:
    """The records up to the first that is not whole."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return np.zeros(0, _RECORD)
    records = np.frombuffer(data, _RECORD, len(data) // _RECORD.itemsize)
    for number, record in enumerate(records):
        if record["checksum"] != _checksum(record):
            return records[:number]
    return records


def _checksum(record: Any) -> int:
    return zlib.crc32(record.tobytes()[4:], 1)


def _hex(record: Any) -> str:
    digest: bytes = record["sha256"].tobytes()
    return digest.hex()


_Columns = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]


def _from_part(path: Path) -> tuple[_Columns | None, dict[str, int]]:
    """The embeddings in a part: vectors, widths and heights, and sha256 to row."""
    try:
        table = pq.read_table(path.absolute(), columns=[SHA256, WIDTH, HEIGHT, EMBEDDING])
    except (FileNotFoundError, KeyError, pa.ArrowException):
        return None, {}
    table = table.filter(table.column(EMBEDDING).is_valid())
    if set(table.column_names) != {SHA256, WIDTH, HEIGHT, EMBEDDING} or not table.num_rows:
        return None, {}
    vectors, _ = column_vectors(table.column(EMBEDDING))
    columns = vectors, table.column(WIDTH).to_numpy(), table.column(HEIGHT).to_numpy()
    hashes = table.column(SHA256).to_pylist()
    return columns, {sha256: row for row, sha256 in enumerate(hashes)}
