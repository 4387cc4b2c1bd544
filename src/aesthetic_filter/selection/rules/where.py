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
            kinds = database.rows(f"DESCRIBE SELECT ({expression}) AS meets FROM {rows} r")
            if [kind for _, kind, *_ in kinds] != ["BOOLEAN"]:
                raise SelectionError(f"it is of type {kinds[0][1]}, not one true or false")
            # Try it once: values that it cannot take, and functions of more rows than one (count,
            # unnest), which have no place in a WHERE, come to light here, not half way.
            database.row(f"SELECT count(*) FROM {rows} r WHERE ({expression})")
        except SelectionError as error:
            columns = ", ".join(database.columns)
            raise SelectionError(
                f"--where {self.sql!r} does not fit: {error}\nThe columns are: {columns}"
            ) from None
        return Condition(f"({expression})")


def _build(text: str, modifiers: Modifiers) -> Where:
    from aesthetic_filter.database import parse_condition

    parse_condition(text)  # before hours of embedding
    return Where(text)


OPTION = Option(
    "--where", "SQL", 'Keep rows that meet a condition, such as "width >= 512".', _build
)
