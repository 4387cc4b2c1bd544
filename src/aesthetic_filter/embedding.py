"""Tables of images to tables of embeddings: many images on their way at once, rows in order."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from pyarrow import compute

from aesthetic_filter.clip.encoder import Embedded, Encoder
from aesthetic_filter.errors import CutShortError, ImageError
from aesthetic_filter.formats import LARGEST_IMAGE
from aesthetic_filter.images import as_array
from aesthetic_filter.journal import Journal
from aesthetic_filter.storage import read_address
from aesthetic_filter.table import (
    DROPPED_BY,
    EMBEDDING,
    ERROR,
    HEIGHT,
    IMAGE,
    IMAGE_DATA,
    IMAGE_PATH,
    SHA256,
    WIDTH,
    column_vectors,
    vectors_column,
    with_column,
)

if TYPE_CHECKING:
    from aesthetic_filter.clip.preprocess import Preprocessing

WINDOW_BYTES = 128 << 20
"""Encoded bytes of one shard that may be on their way at once."""

EMBEDDING_WIDTH = 768

PIXELS = "__pixels"
"""The column of what the encoder sees of an image, while it is on its way: 224 x 224 x 3 bytes."""

_NOTHING = np.zeros(0, np.float16)

NO_IMAGE = "there is no image data, and no path to read it from"


def embed_tables(
    tables: Iterable[pa.Table],
    encoder: Encoder,
    journal: Journal | None = None,
    *,
    keep_images: bool = False,
) -> Iterator[pa.Table]:
    """Embed the images of a shard.

    Args:
        tables: ``image`` (encoded bytes), ``image_data`` (pixels) or ``image_path``, of which the
            first that a row has is used; ``error`` where there is none; other columns.
        encoder: shared with other shards.
        journal: what is known of this shard, and where to note what comes to be known.
        keep_images: leave ``image`` and ``image_data`` in the tables.

    Yields:
        The tables with ``width``, ``height``, ``image_sha256``, ``error`` and ``embedding``
        (float16); a row that cannot be embedded has an ``error`` and nulls.
    """
    waiting: deque[_Waiting] = deque()
    rows = size = 0
    cut: CutShortError | None = None
    try:
        for table in slices(tables, encoder.batch_size):
            while len(waiting) > 1 and (
                rows + table.num_rows > encoder.lookahead or size > WINDOW_BYTES
            ):
                done = waiting.popleft()
                rows, size = rows - done.table.num_rows, size - done.size
                yield done.finish(journal)
            waiting.append(_start(table, encoder, journal, keep_images))
            rows, size = rows + table.num_rows, size + waiting[-1].size
    except CutShortError as error:  # what came before it is on its way
        cut = error
    while waiting:
        yield waiting.popleft().finish(journal)
    if cut is not None:
        raise cut


def slices(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of at most so many, so that what is done shows early."""
    for table in tables:
        yield from (table.slice(start, rows) for start in range(0, max(table.num_rows, 1), rows))


def read_images(table: pa.Table) -> tuple[list[Any], list[str | None]]:
    """What there is of each row's image, and why there is none.

    Args:
        table: as :func:`embed_tables` takes it.

    Returns:
        For each row encoded bytes, an array of pixels, or None; and its error, or None. A row that
        has an error, or was dropped, is not looked at.
    """
    errors = _column(table, ERROR)
    dropped = _column(table, DROPPED_BY)
    encoded, pixels, paths = (_column(table, name) for name in (IMAGE, IMAGE_DATA, IMAGE_PATH))
    images: list[Any] = [None] * table.num_rows
    for row in range(table.num_rows):
        if errors[row] is not None or dropped[row] is not None:
            continue
        try:
            if encoded[row] is not None:
                images[row] = encoded[row]
            elif pixels[row] is not None:
                images[row] = as_array(pixels[row])
            elif paths[row]:
                images[row] = read_address(paths[row], LARGEST_IMAGE)
            else:
                errors[row] = NO_IMAGE
        except ImageError as error:
            errors[row] = str(error)
    return images, errors


def _column(table: pa.Table, name: str) -> list[Any]:
    there = name in table.column_names
    return table.column(name).to_pylist() if there else [None] * table.num_rows


def image_facts(table: pa.Table, found: Sequence[Embedded | None]) -> dict[str, Any]:
    """The table's columns less those that embedding makes, then what is known of the images."""
    made = (WIDTH, HEIGHT, SHA256, ERROR, EMBEDDING)
    return {
        **{name: table.column(name) for name in table.column_names if name not in made},
        WIDTH: pa.array([image.width if image else None for image in found], pa.int32()),
        HEIGHT: pa.array([image.height if image else None for image in found], pa.int32()),
        SHA256: pa.array(
            [(image.sha256 or None) if image else None for image in found], pa.string()
        ),
    }


def embeddings_column(found: Sequence[Embedded | None]) -> pa.Array:
    """Embeddings as a column: fixed_size_list<float16>, null where there is none."""
    vectors = np.zeros((len(found), EMBEDDING_WIDTH), np.float16)
    for row, image in enumerate(found):
        if image:
            vectors[row] = image.vector
    there = pa.array([image is not None for image in found], pa.bool_())
    return pa.FixedSizeListArray.from_arrays(
        vectors_column(vectors).values, EMBEDDING_WIDTH, mask=compute.invert(there)
    )


def decode_table(
    table: pa.Table, options: Preprocessing, known: Callable[[str], Embedded | None] | None
) -> pa.Table:
    """Decode the images of a table, for a device that is elsewhere.

    Args:
        table: as :func:`embed_tables` takes it.
        options: how to decode them.
        known: asked with the sha256 of encoded bytes; what it gives needs no decoding.

    Returns:
        The table with :data:`PIXELS`, and with ``width``, ``height``, ``image_sha256``, ``error``
        and, of what is known, ``embedding``.
    """
    from aesthetic_filter.clip.preprocess import preprocess

    images, errors = read_images(table)
    found: list[Embedded | None] = [None] * len(images)
    pixels: list[bytes | None] = [None] * len(images)
    for row, image in enumerate(images):
        if image is None:
            continue
        digest = hashlib.sha256(image).hexdigest() if isinstance(image, bytes) else ""
        answer = known(digest) if known and digest else None
        if answer is None:
            try:
                decoded = preprocess(image, options)
            except ImageError as error:
                errors[row] = str(error)
                continue
            pixels[row] = decoded.values.tobytes()
            answer = Embedded(_NOTHING, decoded.width, decoded.height, digest)
        found[row] = answer
    columns = image_facts(table, found)
    columns[ERROR] = pa.array(errors, pa.string())
    there = [image if image is not None and image.vector.size else None for image in found]
    columns[EMBEDDING] = embeddings_column(there)
    columns[PIXELS] = pa.array(pixels, pa.binary())
    return pa.table(columns, metadata=table.schema.metadata)


def encode_tables(tables: Sequence[pa.Table], encoder: Encoder) -> list[pa.Table]:
    """Embed what :func:`decode_table` decoded: all tables together fill the encoder's batches."""
    waiting = [_submit_pixels(table, encoder) for table in tables]
    return [
        _with_embeddings(table, futures) for table, futures in zip(tables, waiting, strict=True)
    ]


def _submit_pixels(table: pa.Table, encoder: Encoder) -> list[Future[Embedded] | None]:
    from aesthetic_filter.clip.encoder import Decoded
    from aesthetic_filter.clip.preprocess import SIZE, Pixels

    futures: list[Future[Embedded] | None] = []
    for content in table.column(PIXELS):
        buffer = content.as_buffer()
        if buffer is None:
            futures.append(None)
            continue
        values = np.frombuffer(buffer, np.uint8).reshape(SIZE, SIZE, 3)
        futures.append(encoder.submit(Decoded(Pixels(values, 0, 0), "")))
    return futures


def _with_embeddings(table: pa.Table, futures: Sequence[Future[Embedded] | None]) -> pa.Table:
    known, _ = column_vectors(table.column(EMBEDDING), EMBEDDING_WIDTH)
    there = table.column(EMBEDDING).is_valid().to_pylist()
    found: list[Embedded | None] = []
    for row, future in enumerate(futures):
        if future is not None:
            found.append(future.result())
        else:
            found.append(Embedded(known[row], 0, 0, "") if there[row] else None)
    return with_column(table, EMBEDDING, embeddings_column(found)).drop_columns([PIXELS])


class _Waiting:
    """A table whose images are on their way."""

    def __init__(
        self,
        table: pa.Table,
        size: int,
        errors: list[str | None],
        futures: list[Future[Embedded] | None],
    ) -> None:
        self.table = table
        self.size = size
        self._errors = errors
        self._futures = futures

    def finish(self, journal: Journal | None) -> pa.Table:
        found: list[Embedded | None] = []
        reasons = self._errors
        for row, future in enumerate(self._futures):
            try:
                found.append(future.result() if future else None)
            except ImageError as error:
                found.append(None)
                reasons[row] = str(error)
        if journal is not None:
            journal.add(image for image in found if image)
        columns = image_facts(self.table, found)
        columns[ERROR] = pa.array(reasons, pa.string())
        columns[EMBEDDING] = embeddings_column(found)
        return pa.table(columns, metadata=self.table.schema.metadata)


def _start(
    table: pa.Table, encoder: Encoder, journal: Journal | None, keep_images: bool
) -> _Waiting:
    images, errors = read_images(table)
    known = journal.find if journal is not None else None
    futures = [None if image is None else encoder.submit(image, known) for image in images]
    size = sum(len(image) for image in images if isinstance(image, bytes))
    return _Waiting(table if keep_images else without_images(table), size, errors, futures)


def without_images(table: pa.Table) -> pa.Table:
    """A table less its images."""
    return table.drop_columns([n for n in (IMAGE, IMAGE_DATA) if n in table.column_names])
