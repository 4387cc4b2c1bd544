"""Draw images to look at: stratified over the scores, more where it matters.

The range of scores is cut into strata of equal width, with the tails as strata of their own. Within
a stratum the order of images is random (a hash of seed and ``image_id``), and images are taken
in that order; so those that were looked at are a random draw from it, whatever made us take more
from this stratum than from that. That, and how many images each stratum has, is all it takes to
weight the labels back to the whole data set.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aesthetic_filter.database import PART, ROW, ROWS, SCORED, quote
from aesthetic_filter.table import IMAGE_ID, SCORE

if TYPE_CHECKING:
    from aesthetic_filter.scores import Scores

STRATA = 12
"""How many, of a collection large enough: ten of equal width, and two tails."""

TAIL = 0.01
"""Share of the rows beyond which the tails begin."""

FEWEST_ROWS = 8
"""A stratum has at least so many rows, or is joined with its neighbour."""

FIRST_ROUND = 5
"""Labels that every stratum gets before any gets more."""

EXPLORE = 5
"""Every so many-th image comes from the stratum of whose rows the smallest share was taken."""


@dataclass(frozen=True)
class Strata:
    """Ranges of scores that together hold every row once.

    Attributes:
        edges: (strata - 1,) float32, ascending; stratum k holds edges[k-1] <= score < edges[k].
        rows: (strata,) int64, rows of the data set in each.
    """

    edges: NDArray[np.float32]
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def names(self) -> list[str]:
        """What each is called, by its range: ``4.25 to 4.5``; the first is from -inf."""
        marks = ["-inf", *(f"{edge:.6g}" for edge in self.edges), "inf"]
        return [f"{low} to {high}" for low, high in itertools.pairwise(marks)]

    def of(self, scores: Any) -> NDArray[np.int64]:
        """The number of the stratum of each score."""
        found = np.searchsorted(self.edges, np.asarray(scores, np.float32), side="right")
        return found.astype(np.int64)


@dataclass(frozen=True)
class Drawn:
    """A row that was drawn.

    Attributes:
        image_id: as in the scores.
        score: its ``aesthetic_score``.
        part: the number of the scores' file that holds it.
        row: its place in that file.
        stratum: which it was drawn from.
    """

    image_id: str
    score: float
    part: int
    row: int
    stratum: int


def stratify(scores: Scores) -> Strata:
    """Cut the range of scores into strata."""
    ask = scores.database
    rows = f"(SELECT * FROM {ROWS} WHERE {SCORED})"
    found = ask.order_statistics(SCORE, [TAIL, 1 - TAIL], rows)
    if not found or found[0] >= found[1]:
        return Strata(np.zeros(0, np.float32), np.array([scores.scored], np.int64))
    low, high = found
    # Round to what a person can read; the edges are exact all the same, as float32.
    digits = max(0, 2 - int(np.floor(np.log10(max(high - low, 1e-6)))))
    edges = np.unique(np.round(np.linspace(low, high, STRATA - 1), digits).astype(np.float32))
    counted = np.asarray(scores.rows_from(edges), np.int64)
    rows_in = -np.diff(np.concatenate([[scores.scored], counted, [0]]))
    return _joined(edges, rows_in)


def _joined(edges: NDArray[np.float32], rows: NDArray[np.int64]) -> Strata:
    """Join a stratum of few rows with the smaller of its neighbours."""
    cuts, counts = list(edges), [int(n) for n in rows]
    while len(counts) > 1 and min(counts) < FEWEST_ROWS:
        small = counts.index(min(counts))
        with_next = small == 0 or (
            small + 1 < len(counts) and counts[small + 1] <= counts[small - 1]
        )
        first = small if with_next else small - 1
        counts[first : first + 2] = [counts[first] + counts[first + 1]]
        del cuts[first]
    return Strata(np.array(cuts, np.float32), np.array(counts, np.int64))


def draw(scores: Scores, strata: Strata, each: int, seed: int = 0) -> list[list[Drawn]]:
    """The first ``each`` rows of each stratum's random order.

    Args:
        scores: what to draw from.
        strata: as :func:`stratify` gives them.
        each: how many of each stratum, at the most.
        seed: another seed, another order.

    Returns:
        For each stratum its rows in their random order. Of rows with the same ``image_id`` there is
        one: a label could not tell them apart.
    """
    edges = " + ".join(f"({SCORE} >= {float(edge)!r}::FLOAT)::INTEGER" for edge in strata.edges)
    found: list[list[Drawn]] = [[] for _ in range(len(strata))]
    for image_id, score, part, row, stratum in scores.database.rows(
        f"""
        WITH numbered AS (
            SELECT {quote(IMAGE_ID)} AS id, {SCORE} AS score, {PART} AS part, {ROW} AS row,
                   {edges or "0"} AS stratum,
                   md5_number_lower('{int(seed)}:' || {quote(IMAGE_ID)}) AS draw
            FROM {ROWS} WHERE {SCORED} AND {quote(IMAGE_ID)} IS NOT NULL
        )
        SELECT id, score, part, row, stratum FROM numbered
        QUALIFY row_number() OVER (PARTITION BY stratum ORDER BY draw, id, part, row) <= {int(each)}
        ORDER BY stratum, draw, id, part, row
        """
    ):
        found[stratum].append(Drawn(image_id, float(score), int(part), int(row), int(stratum)))
    seen: set[str] = set()
    for rows in found:
        rows[:] = [row for row in rows if not (row.image_id in seen or seen.add(row.image_id))]  # type: ignore[func-returns-value]
    return found


def next_stratum(
    left: Sequence[int],
    taken: Sequence[int],
    rows: NDArray[np.int64],
    spread: NDArray[np.float64] | None,
) -> int | None:
    """From which stratum the next image should come.

    First every stratum gets :data:`FIRST_ROUND`. Then the one is chosen whose next label narrows
    the interval most: the variance of a stratified estimate is the sum over strata of
    ``(rows * spread)² / taken``, so one more label takes
    ``(rows * spread)² / (taken (taken + 1))`` from it (Neyman's allocation, one label at a time).
    Every :data:`EXPLORE`-th goes where a label stands for the most rows.

    Args:
        left: images that can still be drawn from each stratum.
        taken: that were already.
        rows: of the data set in each.
        spread: (strata,) standard deviation, within each stratum, of what is being estimated;
            None where nothing is known yet.

    Returns:
        The number of a stratum, or None where nothing is left.
    """
    open_ = [k for k, n in enumerate(left) if n > 0]
    if not open_:
        return None
    behind = min(open_, key=lambda k: (taken[k], k))
    if spread is None or taken[behind] < FIRST_ROUND:
        return behind
    if sum(taken) % EXPLORE == EXPLORE - 1:
        return max(open_, key=lambda k: (rows[k] / max(taken[k], 1), -k))
    gain = (rows * spread) ** 2 / np.maximum(np.multiply(taken, np.add(taken, 1)), 1)
    best = max(open_, key=lambda k: (gain[k], -k))
    return best if gain[best] > 0 else behind
