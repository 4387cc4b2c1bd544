"""What happens to the tables of a shard, one after the other: the same on every backend.

A step takes a table and gives one with the same rows in the same order: a row that a step can do
nothing for, or that a stage has dropped, stays in it with ``error`` or ``dropped_by`` set, and is
passed over by the steps that follow. So every row that was read arrives at the end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import compute

from aesthetic_filter.errors import AestheticFilterError, StageError
from aesthetic_filter.guard import check_space
from aesthetic_filter.heads import Head
from aesthetic_filter.scoring import score_table
from aesthetic_filter.table import DROPPED_BY, EMBEDDING, ERROR, IMAGE, SCORE, SHA256, with_column

Step = Callable[[pa.Table], pa.Table]

_PLACE = "__aesthetic_filter_place"
_BELOW = f"{SCORE} < "
_DIGEST = "__aesthetic_filter_sha256"


@dataclass(frozen=True)
class ScoreStep:
    """Score the embeddings; rows below a threshold are dropped here, if there is one.

    Attributes:
        head: the head.
        threshold: rows with a lower score are marked as dropped; None: all stay.
        threads: how many may share a table's rows.
        num_gpus: on Ray, the GPUs that each of its workers holds.
    """

    head: Head
    threshold: float | None = None
    threads: int = 1
    num_gpus: float = 0.0

    def __call__(self, table: pa.Table) -> pa.Table:
        """The table with its results; raises :class:`WrongEmbeddingsError` as ``score`` does."""
        check_space(self.head, table)
        live = compute.any(live_rows(table)).as_py()
        if EMBEDDING not in table.column_names and not live:  # none came to one's own encoder
            none = pa.nulls(len(table), pa.list_(pa.float16(), self.head.width))
            table = table.append_column(EMBEDDING, none)
        scored = score_table(table, self.head, threads=self.threads)
        scored = scored.append_column(EMBEDDING, table.column(EMBEDDING))
        if DROPPED_BY in scored.column_names:  # before it had an embedding: that is no fault
            dropped = compute.is_valid(scored.column(DROPPED_BY))
            given = table.column(ERROR) if ERROR in table.column_names else pa.nulls(len(table))
            errors = compute.if_else(dropped, given.cast(pa.string()), scored.column(ERROR))
            scored = with_column(scored, ERROR, errors)
        return mark_dropped(scored, self.threshold)


def mark_dropped(table: pa.Table, threshold: float | None) -> pa.Table:
    """A scored table with ``dropped_by`` where the score is below the threshold."""
    if threshold is None:
        return table
    below = compute.less(table.column(SCORE), pa.scalar(threshold, pa.float32()))
    marks = pa.nulls(len(table), pa.string())
    if DROPPED_BY in table.column_names:  # a threshold's verdict is given again, others stay
        marks = table.column(DROPPED_BY)
        judged = compute.starts_with(marks, _BELOW).fill_null(False)
        marks = compute.if_else(judged, pa.scalar(None, pa.string()), marks)
        table = with_column(table, DROPPED_BY, marks)
    live = compute.and_(below.fill_null(False), live_rows(table))
    marks = compute.if_else(live, pa.scalar(drop_reason(threshold)), marks)
    return with_column(table, DROPPED_BY, marks)


def drop_reason(threshold: float) -> str:
    """What stands in ``dropped_by`` of a row below the threshold."""
    return f"{_BELOW}{threshold:g}"


def is_threshold_verdict(mark: str) -> bool:
    """Whether what stands in ``dropped_by`` is the verdict of a threshold, not of a stage."""
    return mark.startswith(_BELOW)


@dataclass(frozen=True)
class OwnStep:
    """A stage of the user's own: any ``Table -> Table`` callable.

    It is handed the rows that are neither failed nor dropped, and no empty table. Rows that it
    leaves out are dropped by it; columns that it adds are carried through.

    Attributes:
        stage: the callable.
        label: what it is called in ``dropped_by`` and in messages.
    """

    stage: Callable[[pa.Table], pa.Table]
    label: str

    @property
    def num_gpus(self) -> float:
        """On Ray, the GPUs that each of its workers holds."""
        return float(getattr(self.stage, "num_gpus_per_worker", 0) or 0)

    @property
    def has_setup(self) -> bool:
        """Whether it has something to load, and so should stay where it has done so."""
        return hasattr(self.stage, "setup")

    def setup(self) -> None:
        """Let the stage load what it needs, if there is a way to tell it.

        Raises:
            StageError: it cannot.
        """
        if not self.has_setup:
            return
        try:
            self.stage.setup()  # type: ignore[attr-defined]
        except AestheticFilterError:
            raise
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            raise StageError(f"{self.label}: its setup failed: {why}") from error

    def __call__(self, table: pa.Table) -> pa.Table:
        """All rows; raises :class:`StageError` where the stage fails or loses what it must not."""
        places = pa.array(np.arange(table.num_rows))
        numbered = table.append_column(_PLACE, places)
        passed = live_rows(table)
        live = numbered.filter(passed)
        if not live.num_rows:
            return table
        given = self._apply(live)
        kept = given.column(_PLACE)
        gone = compute.invert(compute.is_in(live.column(_PLACE), value_set=pa.array(kept)))
        aside = [numbered.filter(compute.invert(passed)), _dropped(live.filter(gone), self.label)]
        pieces = [given, *(piece for piece in aside if piece.num_rows)]
        together = pa.concat_tables(pieces, promote_options="permissive")
        order = np.argsort(together.column(_PLACE).to_numpy(), kind="stable")
        return together.take(pa.array(order)).drop_columns([_PLACE])

    def _apply(self, live: pa.Table) -> pa.Table:
        try:
            given = self.stage(live)
        except AestheticFilterError:
            raise
        except Exception as error:
            raise StageError(f"{self.label}: {type(error).__name__}: {error}") from error
        if not isinstance(given, pa.Table):
            raise StageError(f"{self.label}: gave a {type(given).__name__}, not a pyarrow.Table")
        names = given.column_names
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise StageError(
                f"{self.label}: gave the column {twice!r} twice; to change one, use set_column"
            )
        lost = [name for name in live.column_names if name not in given.column_names]
        lost = [name for name in lost if name not in (IMAGE, _PLACE)]
        if lost:
            raise StageError(
                f"{self.label}: lost the column {lost[0]!r}; a stage adds columns and may leave "
                "rows out, the rest it passes on"
            )
        places = given.column(_PLACE).to_numpy() if _PLACE in given.column_names else np.zeros(0)
        if _PLACE not in given.column_names or len(np.unique(places)) != len(places):
            raise StageError(
                f"{self.label}: made up rows or lost the column {_PLACE!r}, which tells which row "
                "is which; pass all columns on, and no row twice"
            )
        return given


def fingerprint(table: pa.Table) -> pa.Table:
    """A step: the sha256 of each image, as it was read, for a pipeline with an encoder of its own.

    By it a writer knows that an image is still the one that was scored.
    """
    images = (cell.as_py() for cell in table.column(IMAGE))
    digests = [None if i is None else hashlib.sha256(i).hexdigest() for i in images]
    return table.append_column(_DIGEST, pa.array(digests, pa.string()))


def name_fingerprint(table: pa.Table) -> pa.Table:
    """A step: what :func:`fingerprint` found becomes ``image_sha256``, if no stage gave that."""
    if SHA256 in table.column_names:
        return table.drop_columns([_DIGEST])
    return table.rename_columns([SHA256 if n == _DIGEST else n for n in table.column_names])


def live_rows(table: pa.Table) -> Any:
    """Which rows are neither failed nor dropped: a boolean array."""
    live = pa.array(np.ones(table.num_rows, np.bool_))
    for name in (ERROR, DROPPED_BY):
        if name in table.column_names:
            live = compute.and_(live, compute.is_null(table.column(name)))
    return live


def _dropped(rows: pa.Table, label: str) -> pa.Table:
    marks = pa.array([label] * rows.num_rows, pa.string())
    return with_column(rows, DROPPED_BY, marks)


@dataclass(frozen=True)
class LeaveOut:
    """Drop columns that nothing needs any more."""

    columns: Sequence[str]

    def __call__(self, table: pa.Table) -> pa.Table:
        """The table without them."""
        return table.drop_columns([name for name in self.columns if name in table.column_names])
