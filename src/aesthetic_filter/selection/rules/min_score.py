"""Keep scores from a threshold up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aesthetic_filter.selection.rule import Condition, Modifiers, Option
from aesthetic_filter.selection.values import number

if TYPE_CHECKING:
    from aesthetic_filter.database import Database


@dataclass(frozen=True)
class MinScore:
    """Keep a row whose score is at least ``score``; exactly equal is kept."""

    score: float
    order: int = 20

    @property
    def label(self) -> str:
        return f"min-score {self.score:g}"

    def condition(self, rows: str, database: Database, scratch: str) -> Condition:
        return Condition(f"r.aesthetic_score >= {self.score!r}::FLOAT")


def _build(text: str, modifiers: Modifiers) -> MinScore:
    return MinScore(number("--min-score", text))


OPTION = Option("--min-score", "SCORE", "Keep scores of at least SCORE.", _build)
