"""Tables of images to tables of embeddings: many images on their way at once, rows in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future

import numpy as np
import pyarrow as pa
from pyarrow import compute

from aesthetic_filter.clip.encoder import Embedded, Encoder
from aesthetic_filter.errors import CutShortError, ImageError
from aesthetic_filter.journal import Journal
from aesthetic_filter.table import (
    EMBEDDING,
    ERROR,
    HEIGHT,
    IMAGE,
    SHA256,
    WIDTH,
    vectors_column,
)

WINDOW_BYTES = 128 << 20
"""Encoded bytes of one shard that may be on their way at once."""

EMBEDDING_WIDTH = 768


def embed_tables(
    tables: Iterable[pa.Table], encoder: Encoder, journal: Journal
) -> Iterator[tuple[pa.Table, int]]:
    """Embed the images of a shard.

    Args:
        tables: as a format gives them: ``image``, ``error`` and other columns.
        encoder: shared with other shards.
        journal: what is known of this shard, and where to note what comes to be known.

    Yields:
        For each table, one with ``width``, ``height``, ``image_sha256``, ``error`` and
        ``embedding`` (float16) instead of ``image``, and how many encoded bytes it had.
    """
    waiting: deque[_Waiting] = deque()
    rows = size = 0
    cut: CutShortError | None = None
    try:
        for table in _slices(tables, encoder.batch_size):
            while len(waiting) > 1 and (
                rows + table.num_rows > encoder.lookahead or size > WINDOW_BYTES
            ):
                done = waiting.popleft()
                rows, size = rows - done.table.num_rows, size - done.size
                yield done.finish(journal)
            waiting.append(_start(table, encoder, journal))
            rows, size = rows + table.num_rows, size + waiting[-1].size
    except CutShortError as error:  # what came before it is on its way
        cut = error
    while waiting:
        yield waiting.popleft().finish(journal)
    if cut is not None:
        raise cut


def _slices(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of at most so many, so that what is done shows early."""
    for table in tables:
        yield from (table.slice(start, rows) for start in range(0, max(table.num_rows, 1), rows))


class _Waiting:
    """A table whose images are on their way."""

    def __init__(self, table: pa.Table, size: int, futures: list[Future[Embedded] | None]) -> None:
        self.table = table
        self.size = size
        self._futures = futures

    def finish(self, journal: Journal) -> tuple[pa.Table, int]:
        found: list[Embedded | None] = []
        reasons = self.table.column(ERROR).to_pylist()
        for row, future in enumerate(self._futures):
            try:
                found.append(future.result() if future else None)
            except ImageError as error:
                found.append(None)
                reasons[row] = str(error)
        journal.add(image for image in found if image)
        vectors = np.zeros((len(found), EMBEDDING_WIDTH), np.float16)
        for row, image in enumerate(found):
            if image:
                vectors[row] = image.vector
        there = pa.array([image is not None for image in found], pa.bool_())
        values = vectors_column(vectors)
        embeddings = pa.FixedSizeListArray.from_arrays(
            values.values, EMBEDDING_WIDTH, mask=compute.invert(there)
        )
        columns = {
            **{
                name: self.table.column(name)
                for name in self.table.column_names
                if name not in (IMAGE, ERROR)
            },
            WIDTH: pa.array([image.width if image else None for image in found], pa.int32()),
            HEIGHT: pa.array([image.height if image else None for image in found], pa.int32()),
            SHA256: pa.array([image.sha256 if image else None for image in found], pa.string()),
            ERROR: pa.array(reasons, pa.string()),
            EMBEDDING: embeddings,
        }
        return pa.table(columns), self.size


def _start(table: pa.Table, encoder: Encoder, journal: Journal) -> _Waiting:
    images = table.column(IMAGE).to_pylist()
    futures = [None if image is None else encoder.submit(image, journal.find) for image in images]
    size = sum(len(image) for image in images if image is not None)
    return _Waiting(table.drop_columns([IMAGE]), size, futures)
