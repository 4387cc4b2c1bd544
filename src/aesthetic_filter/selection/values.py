"""Read the values of options, with errors that say what would be right."""

from __future__ import annotations

import math
from fractions import Fraction

from aesthetic_filter.errors import SelectionError


def number(option: str, text: str) -> float:
    """A finite number.

    Raises:
        SelectionError: it is not one.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise SelectionError(f"{option} takes a number, not {text!r}")
    return value


def count(option: str, text: str) -> int:
    """A whole number of at least 1; ``10_000`` and ``10,000`` are fine.

    Raises:
        SelectionError: it is not one.
    """
    try:
        value = int(text.replace(",", ""))
    except ValueError:
        value = 0
    if value < 1:
        raise SelectionError(f"{option} takes a whole number of at least 1, not {text!r}")
    return value


def percentage(option: str, text: str) -> Fraction:
    """``10%`` as the exact fraction 1/10.

    Raises:
        SelectionError: it is not a share above 0 and up to 100%.
    """
    try:
        value = Fraction(text.removesuffix("%").strip()) / 100
    except (ValueError, ZeroDivisionError):
        value = Fraction(0)
    if not 0 < value <= 1:
        raise SelectionError(f"{option} takes a share above 0% and up to 100%, not {text!r}")
    return value
