"""From a table of embeddings to a table of scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from aesthetic_filter.heads import Head
from aesthetic_filter.heads.head import wrong_width
from aesthetic_filter.table import (
    COSINE,
    EMBEDDING,
    ERROR,
    IMAGE_ID,
    NORM,
    RESULT_COLUMNS,
    SCORE,
    column_vectors,
)


def score_table(table: pa.Table, head: Head, *, threads: int | None = None) -> pa.Table:
    """Score one batch.

    Args:
        table: ``image_id``, ``embedding`` and any other columns; where a row has an ``error``, that
            is why it has no embedding.
        head: the head.
        threads: how many may share the rows.

    Returns:
        The table with ``aesthetic_score``, ``error``, ``embedding_norm`` and ``reference_cosine``
        instead of ``embedding``. A failed row has an error and nulls.

    Raises:
        WidthError: the vectors have another width than the head's.
    """
    vectors, problems = column_vectors(table.column(EMBEDDING), head.width)
    errors = {**problems, **_given_errors(table)}
    if vectors.shape[1] != head.width and table.num_rows:
        raise wrong_width(vectors.shape[1], head)
    vectors = vectors.reshape(-1, head.width)
    made = (IMAGE_ID, EMBEDDING, *RESULT_COLUMNS)  # what the head says, whatever a stage has added
    kept = [name for name in table.column_names if name not in made]
    carried = {name: table.column(name) for name in kept}
    results = score_vectors(vectors, errors, head, threads=threads)
    return pa.table({IMAGE_ID: table.column(IMAGE_ID), **results, **carried})


def score_vectors(
    vectors: np.ndarray[Any, Any],
    errors: dict[int, str],
    head: Head,
    *,
    threads: int | None = None,
) -> dict[str, pa.Array]:
    """The result columns for some vectors.

    Args:
        vectors: (N, width) of the head.
        errors: row to reason, for the rows that have no vector.
        head: the head.
        threads: how many may share the rows.
    """
    measured = head.measure(vectors, threads=threads)
    errors = dict(errors)
    for row in np.flatnonzero(measured.failed).tolist():
        errors.setdefault(row, measured.error(row) or "")
    failed: Any = None
    reasons: Any = pa.nulls(len(vectors), pa.string())
    if errors:
        failed = np.zeros(len(vectors), np.bool_)
        failed[list(errors)] = True
        reasons = pa.array([errors.get(row) for row in range(len(vectors))], pa.string())
    return {
        SCORE: pa.array(measured.scores, mask=failed),
        ERROR: reasons,
        NORM: pa.array(measured.norms, mask=failed),
        COSINE: pa.array(measured.cosines, mask=failed),
    }


def count_foreign(scored: pa.Table, head: Head) -> int:
    """How many of a scored table's rows do not look like the head's embedding space."""
    cosines = scored.column(COSINE).to_numpy()
    return int(np.count_nonzero(head.foreign(cosines)))


def _given_errors(table: pa.Table) -> dict[int, str]:
    """Row to reason, for the rows that came with one."""
    if ERROR not in table.column_names:
        return {}
    column = table.column(ERROR)
    if column.null_count == len(column):
        return {}
    return {row: why for row, why in enumerate(column.to_pylist()) if why is not None}
