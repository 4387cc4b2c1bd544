"""Keep the best: so many, or such a share, of all rows or of each group."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from aesthetic_filter.errors import SelectionError
from aesthetic_filter.selection.rule import Condition, Modifiers, Option
from aesthetic_filter.selection.values import count, percentage

if TYPE_CHECKING:
    from aesthetic_filter.database import Database


@dataclass(frozen=True)
class Top:
    """Keep the highest scores; among equal scores those that come first by ``image_id``.

    Attributes:
        count: how many; or
        share: which share of the rows, rounded up, so that no group goes empty.
        per: a column; the quota then holds within each of its values.
    """

    count: int | None = None
    share: Fraction | None = None
    per: str | None = None
    order: int = 40

    def __post_init__(self) -> None:
        if (self.count is None) == (self.share is None):
            raise SelectionError("top takes a count or a share")
        if self.count is not None and self.count < 1:
            raise SelectionError(f"top takes a whole number of at least 1, not {self.count}")
        if self.share is not None and not 0 < self.share <= 1:
            raise SelectionError(
                f"top takes a share above 0 and up to 1, not {float(self.share):g}"
            )

    @property
    def label(self) -> str:
        much = f"{self.count:,}" if self.share is None else f"{float(self.share * 100):g}%"
        return f"top {much}" + (f" per {self.per}" if self.per else "")

    def condition(self, rows: str, database: Database, scratch: str) -> Condition:
        """Find each group's last kept row without sorting the others.

        A histogram over the scores tells in which bin a group's quota ends; only that bin's rows
        are put in order.
        """
        from aesthetic_filter.database import PART, ROW, bin_expression
        from aesthetic_filter.selection.engine import group_expression

        low, high = database.row(f"SELECT min(aesthetic_score), max(aesthetic_score) FROM {rows}")
        if low is None:
            return Condition("false")
        group = group_expression(self.per, database)
        bin_of = bin_expression("r.aesthetic_score", low, high)
        if self.share is None:
            quota = str(self.count)
        else:
            top, bottom = self.share.numerator, self.share.denominator
            quota = f"((sum(n) OVER (PARTITION BY g))::HUGEINT * {top} + {bottom - 1}) // {bottom}"
        database.execute(f"""
            CREATE TEMP TABLE {scratch}_edges AS
            WITH bins AS (
                SELECT {group} AS g, {bin_of} AS b, count(*) AS n FROM {rows} r GROUP BY 1, 2
            ), quotas AS (
                SELECT g, b, {quota} - (sum(n) OVER (PARTITION BY g ORDER BY b DESC) - n) AS need
                FROM bins
            )
            SELECT g, b, need FROM quotas WHERE need > 0
            QUALIFY row_number() OVER (PARTITION BY g ORDER BY b) = 1
        """)
        database.execute(f"""
            CREATE TEMP TABLE {scratch}_last AS
            SELECT e.g, r.aesthetic_score AS score, r.image_id AS id,
                   r.{PART} AS part, r.{ROW} AS row
            FROM {rows} r JOIN {scratch}_edges e
              ON {group} IS NOT DISTINCT FROM e.g AND {bin_of} = e.b
            QUALIFY row_number() OVER (
                PARTITION BY e.g ORDER BY r.aesthetic_score DESC, r.image_id, r.{PART}, r.{ROW}
            ) = least(e.need, count(*) OVER (PARTITION BY e.g))
        """)
        return Condition(
            f"r.aesthetic_score > c.score OR (r.aesthetic_score = c.score AND "
            f"(r.image_id, r.{PART}, r.{ROW}) <= (c.id, c.part, c.row))",
            f"LEFT JOIN {scratch}_last c ON {group} IS NOT DISTINCT FROM c.g",
        )


def _build(text: str, modifiers: Modifiers) -> Top:
    if text.endswith("%"):
        return Top(share=percentage("--top", text), per=modifiers.per)
    return Top(count=count("--top", text), per=modifiers.per)


OPTION = Option("--top", "K|P%", "Keep the K best, or the best P% (of each group: --per).", _build)
