"""An estimate with its confidence interval."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% confidence interval; NaN where nothing is known.

    Attributes:
        estimate: the likeliest value.
        low: the lower end.
        high: the upper end.
    """

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.estimate):
            return "not known"
        return f"{self.estimate:.3f} ({self.low:.3f} to {self.high:.3f})"
