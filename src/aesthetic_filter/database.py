"""Queries over score files of any size. The only user of DuckDB.

The database can read the score files it is opened on, and nothing else: no other file, no
network, no extension, no setting. So a condition that a user brings along can't either.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from aesthetic_filter.errors import AestheticFilterError, OutputError, SelectionError
from aesthetic_filter.table import EMBEDDING, ERROR, IMAGE_ID, SCORE

ROWS = "scores"
"""The view of all rows: the files' columns, and :data:`PART` and :data:`ROW`."""

OTHERS = "other_scores"
"""The view of the rows of other scores, where two are compared."""

PART, ROW = "__part", "__row"
"""Where a row lies: the number of its file, and of the row within it."""

SCORED = f"({ERROR} IS NULL AND {SCORE} IS NOT NULL AND isfinite({SCORE}))"
"""SQL for whether a row has a score; true or false, never NULL."""

_NUMBERS = ("FLOAT", "DOUBLE", "DECIMAL", "TINYINT", "SMALLINT", "INTEGER", "BIGINT")

_numbers = itertools.count()

BINS = 4096
BATCH_ROWS = 65_536


class Database:
    """An open, locked-down database over some Parquet files of scores.

    Attributes:
        files: in order; :data:`PART` counts them.
        columns: of the view :data:`ROWS`.
    """

    def __init__(self, files: Sequence[Path], others: Sequence[Path] = ()) -> None:
        """Open it.

        Args:
            files: of the scores.
            others: of other scores, to compare: the view :data:`OTHERS`.
        """
        import duckdb

        self._error = duckdb.Error
        self._spill = tempfile.mkdtemp(prefix="aesthetic-filter-")
        self._connection = duckdb.connect(
            config={
                "autoinstall_known_extensions": False,
                "autoload_known_extensions": False,
                "temp_directory": self._spill,
                "memory_limit": f"{max(1000, 64 * (os.cpu_count() or 1))}MB",
                "preserve_insertion_order": False,
            }
        )
        self._turns = threading.Lock()
        self.files = tuple(files)
        self._close = weakref.finalize(self, _close, self._connection, self._spill)
        execute = self._connection.execute
        execute(f"SET allowed_paths = {_list([str(f.absolute()) for f in (*files, *others)])}")
        execute("SET enable_external_access = false")
        execute("SET lock_configuration = true")
        self.columns = self._open_view(ROWS, files)
        if others:
            self._open_view(OTHERS, others)

    def _open_view(self, view: str, paths: Sequence[Path]) -> list[str]:
        names = [str(path.absolute()) for path in paths]
        files = f"read_parquet({_list(names)}, union_by_name = true, hive_partitioning = false)"
        try:
            # Names that differ only in case are one name in SQL: the later becomes NAME_1.
            there = {name: kind for name, kind, *_ in self.rows(f"DESCRIBE SELECT * FROM {files}")}
        except SelectionError as error:
            raise OutputError(f"{names[0]}: cannot be read: {error}") from None
        for needed in (IMAGE_ID, SCORE):
            if needed not in there:
                raise OutputError(f"{names[0]}: holds no scores: it has no column {needed!r}")
        if not there[SCORE].startswith(_NUMBERS):
            raise OutputError(f"{names[0]}: its {SCORE} is {there[SCORE]}, not a number")
        score = SCORE if there[SCORE] in ("FLOAT", "DOUBLE") else f"{SCORE}::DOUBLE AS {SCORE}"
        why = ERROR if ERROR in there else f"NULL::VARCHAR AS {ERROR}"
        # Embeddings are a thousand times as large as all else, and stay where they are.
        rest = [name for name in there if name not in (IMAGE_ID, SCORE, ERROR, EMBEDDING)]
        columns = ", ".join([f"{IMAGE_ID}::VARCHAR AS {IMAGE_ID}", score, why, *map(quote, rest)])
        self._connection.execute(
            f"CREATE VIEW {view} AS "
            f"SELECT {columns}, file_index AS {PART}, file_row_number AS {ROW} FROM {files}"
        )
        return [IMAGE_ID, SCORE, ERROR, *rest]

    def close(self) -> None:
        """Let go of memory and spilled files."""
        self._close()

    def execute(self, sql: str) -> None:
        """Run a statement for its effect."""
        self._run(sql)

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """All rows of a small result. Several threads may ask at once; they take turns."""
        with self._turns:
            found: list[tuple[Any, ...]] = self._run(sql).fetchall()
        return found

    def row(self, sql: str) -> tuple[Any, ...]:
        """The one row of a result."""
        return self.rows(sql)[0]

    def stream(self, sql: str) -> Iterator[pa.RecordBatch]:
        """A result of any size in batches."""
        try:
            yield from self._connection.sql(sql).to_arrow_reader(BATCH_ROWS)
        except (self._error, pa.ArrowException) as error:
            raise _explained(error) from None

    def empty(self, sql: str) -> pa.Table:
        """A table of no rows with the columns of a result."""
        try:
            return self._connection.sql(f"SELECT * FROM ({sql}) LIMIT 0").to_arrow_table()
        except self._error as error:
            raise _explained(error) from None

    @contextmanager
    def attached(self, table: pa.Table) -> Iterator[str]:
        """Make a table in memory one that queries can name, for a while; gives its name."""
        name = f"attached_{next(_numbers)}"
        with self._turns:
            self._connection.register(name, table)
        try:
            yield name
        finally:
            with self._turns:
                self._connection.unregister(name)

    def at(
        self, places: Iterable[tuple[int, int]], columns: Sequence[str]
    ) -> dict[tuple[int, int], tuple[Any, ...]]:
        """The values of some columns in the rows at these places: (part, row)."""
        parts, rows = zip(*places, strict=True) if (places := list(places)) else ((), ())
        wanted = pa.table({"p": pa.array(parts, pa.int64()), "r": pa.array(rows, pa.int64())})
        listed = ", ".join(map(quote, columns))
        with self.attached(wanted) as name:
            found = self.rows(
                f"SELECT {PART}, {ROW}, {listed} FROM {ROWS} "
                f"JOIN {name} ON {PART} = p AND {ROW} = r"
            )
        return {(int(part), int(row)): tuple(values) for part, row, *values in found}

    def _run(self, sql: str) -> Any:
        try:
            return self._connection.execute(sql)
        except self._error as error:
            raise _explained(error) from None

    def order_statistics(
        self, column: str, fractions: Sequence[float], rows: str = ROWS
    ) -> list[float]:
        """Exact percentiles (nearest rank) of a float column, in bounded memory.

        A histogram tells which bin holds each rank; float32 values within one bin are few, and
        are counted one by one.

        Args:
            column: a column name, or any expression.
            fractions: between 0 and 1.
            rows: a table, view or parenthesised query.

        Returns:
            One value for each fraction; an empty list where the column has no values.
        """
        there = f"(SELECT {column} AS x FROM {rows} WHERE {column} IS NOT NULL)"
        low, high, count = self.row(f"SELECT min(x), max(x), count(*) FROM {there}")
        if not count:
            return []
        bin_of = bin_expression("x", low, high)
        histogram = self.rows(f"SELECT {bin_of} AS b, count(*) FROM {there} GROUP BY b ORDER BY b")
        found = []
        for fraction in fractions:
            rank = min(max(math.ceil(fraction * count), 1), count)
            number, rank = _holder(histogram, rank)
            values = self.rows(
                f"SELECT x, count(*) FROM {there} WHERE {bin_of} = {number} GROUP BY x ORDER BY x"
            )
            found.append(float(_holder(values, rank)[0]))
        return found


def _holder(counted: Sequence[tuple[Any, ...]], rank: int) -> tuple[Any, int]:
    """Of (value, count) pairs in order: the value that holds a rank, and the rank within it."""
    for value, count in counted:
        if rank <= count:
            return value, rank
        rank -= count
    raise AssertionError("a rank beyond the last row")


def bin_expression(column: str, low: float, high: float) -> str:
    """SQL for the number of the histogram bin, 0 to :data:`BINS`, in which a value lies."""
    scale = BINS / (high - low) if high > low and math.isfinite(high - low) else 0.0
    return f"CAST(floor(({column}::DOUBLE - {low!r}::DOUBLE) * {scale!r}::DOUBLE) AS INTEGER)"


def quote(name: str) -> str:
    """A column name as SQL."""
    return '"' + name.replace('"', '""') + '"'


def text(value: str) -> str:
    """A string as SQL."""
    return "'" + value.replace("'", "''") + "'"


def parse_condition(condition: str) -> str:
    """One SQL expression, in DuckDB's own spelling, and nothing that could end it early.

    Raises:
        SelectionError: it is malformed, or more than one expression.
    """
    import duckdb

    try:
        return str(duckdb.SQLExpression(condition))
    except duckdb.Error as error:
        raise SelectionError(f"--where {condition!r} is malformed: {_complaint(error)}") from None


def _list(values: Sequence[str]) -> str:
    return "[" + ", ".join(text(value) for value in values) + "]"


def _explained(error: Exception) -> AestheticFilterError:
    import duckdb

    if isinstance(error, duckdb.IOException | duckdb.OutOfMemoryException | pa.ArrowException):
        return AestheticFilterError(f"the query could not be finished: {_complaint(error)}")
    return SelectionError(_complaint(error))


def _complaint(error: Exception) -> str:
    """What DuckDB says, less the query of ours in which it found it."""
    return str(error).partition("\n\nLINE ")[0].strip()


def _close(connection: Any, spill: str) -> None:
    connection.close()
    shutil.rmtree(spill, ignore_errors=True)
