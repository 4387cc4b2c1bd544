"""Keep scores from a threshold up."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aesthetic_filter.errors import SelectionError
from aesthetic_filter.selection.rule import Condition, Modifiers, Option
from aesthetic_filter.selection.values import number

if TYPE_CHECKING:
    from aesthetic_filter.database import Database


@dataclass(frozen=True)
class MinScore:
    """Keep a row whose score is at least ``score``; exactly equal is kept."""

    score: float
    order: int = 20

    def __post_init__(self) -> None:
        if not math.isfinite(self.score):
            raise SelectionError(f"min-score takes a number, not {self.score}")

    @property
    def label(self) -> str:
        return f"min-score {self.score:g}"

    def condition(self, rows: str, database: Database, scratch: str) -> Condition:
        return Condition(f"r.aesthetic_score >= {float(self.score)!r}::FLOAT")


def _build(text: str, modifiers: Modifiers) -> MinScore:
    return MinScore(number("--min-score", text))


OPTION = Option("--min-score", "SCORE", "Keep scores of at least SCORE.", _build)
