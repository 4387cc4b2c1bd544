"""Keep scores up to a limit."""

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
class MaxScore:
    """Keep a row whose score is at most ``score``; exactly equal is kept."""

    score: float
    order: int = 30

    def __post_init__(self) -> None:
        if not math.isfinite(self.score):
            raise SelectionError(f"max-score takes a number, not {self.score}")

    @property
    def label(self) -> str:
        return f"max-score {self.score:g}"

    def condition(self, rows: str, database: Database, scratch: str) -> Condition:
        return Condition(f"r.aesthetic_score <= {float(self.score)!r}::FLOAT")


def _build(text: str, modifiers: Modifiers) -> MaxScore:
    return MaxScore(number("--max-score", text))


OPTION = Option("--max-score", "SCORE", "Keep scores of at most SCORE.", _build)
