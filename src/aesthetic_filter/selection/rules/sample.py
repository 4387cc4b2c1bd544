"""Draw rows at random, evenly over the range of scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aesthetic_filter.errors import SelectionError
from aesthetic_filter.selection.rule import Condition, Modifiers, Option
from aesthetic_filter.selection.values import count

if TYPE_CHECKING:
    from aesthetic_filter.database import Database

BAND = 0.5
"""How wide a score band is, in points."""


@dataclass(frozen=True)
class Sample:
    """Keep ``count`` rows, as many from each band of scores as it has and the others leave room.

    Which rows of a band is decided by a hash of the seed and ``image_id``: the same draw each
    time, and nearly the same when the source grows.

    Attributes:
        count: how many.
        seed: another seed, another draw.
        per: a column; so many are then drawn from each of its values.
    """

    count: int
    seed: int = 0
    per: str | None = None
    order: int = 50

    def __post_init__(self) -> None:
        if self.count < 1:
            raise SelectionError(f"sample takes a whole number of at least 1, not {self.count}")

    @property
    def label(self) -> str:
        return f"sample {self.count:,}" + (f" per {self.per}" if self.per else "")

    def condition(self, rows: str, database: Database, scratch: str) -> Condition:
        """Deal the bands out in turns: everyone's first row, everyone's second, up to ``count``."""
        from aesthetic_filter.database import PART, ROW
        from aesthetic_filter.selection.engine import group_expression

        group = group_expression(self.per, database)
        database.execute(f"""
            CREATE TEMP TABLE {scratch}_drawn AS
            WITH shuffled AS (
                SELECT {group} AS g, floor(r.aesthetic_score / {BAND}) AS band, r.image_id AS id,
                       r.{PART} AS part, r.{ROW} AS row,
                       md5_number_lower({self.seed} || ':' || r.image_id) AS draw
                FROM {rows} r
            ), dealt AS (
                SELECT *, row_number() OVER (
                    PARTITION BY g, band ORDER BY draw, id, part, row
                ) AS turn
                FROM shuffled QUALIFY turn <= {self.count}
            )
            SELECT part, row FROM dealt
            QUALIFY row_number() OVER (PARTITION BY g ORDER BY turn, draw, id, part, row)
                <= {self.count}
        """)
        return Condition(
            "c.row IS NOT NULL",
            f"LEFT JOIN {scratch}_drawn c ON c.part = r.{PART} AND c.row = r.{ROW}",
        )


def _build(text: str, modifiers: Modifiers) -> Sample:
    return Sample(count("--sample", text), modifiers.seed, modifiers.per)


OPTION = Option(
    "--sample", "N", "Draw N rows, evenly over the range of scores (of each group: --per).", _build
)
