"""Keep rows that meet a SQL condition over any of their columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aesthetic_filter.errors import SelectionError
from aesthetic_filter.selection.rule import Condition, Modifiers, Option

if TYPE_CHECKING:
    from aesthetic_filter.database import Database


@dataclass(frozen=True)
class Where:
    """Keep a row for which ``sql`` is true, a DuckDB expression such as ``width >= 512``.

    It can read the columns of the row and nothing else.
    """

    sql: str
    order: int = 10

    @property
    def label(self) -> str:
        return f"where {self.sql}"

    def condition(self, rows: str, database: Database, scratch: str) -> Condition:
        from aesthetic_filter.database import parse_condition

        expression = parse_condition(self.sql)
        try:
            described = database.rows(f"DESCRIBE SELECT ({expression}) AS meets FROM {rows} r")
        except SelectionError as error:
            raise SelectionError(f"--where {self.sql!r} does not fit: {error}") from None
        kind = described[0][1]
        if kind != "BOOLEAN":
            raise SelectionError(
                f"--where {self.sql!r} gives a value of type {kind}, not true or false"
            )
        return Condition(f"({expression})")


def _build(text: str, modifiers: Modifiers) -> Where:
    return Where(text)


OPTION = Option(
    "--where", "SQL", 'Keep rows that meet a condition, such as "width >= 512".', _build
)
