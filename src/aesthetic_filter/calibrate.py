"""What a threshold would do, estimated from a sample that people labelled.

A label file and scores give precision, recall and F1 of every threshold, for the whole data set and
with 95% intervals, and the threshold for a target. The sample is stratified: a label counts for as
many images as its stratum has for each one that was looked at. Ignoring that gives a wrong answer.

**Estimates.** Each measure is a ratio of two weighted sums over the labelled images (precision: the
keeps among those at or above the threshold, by those; recall: the keeps at or above it, by the
keeps; F1: twice the keeps at or above it, by those at or above it and the keeps). Their variance is
that of a ratio under stratified sampling, linearised (W. G. Cochran, Sampling Techniques, 3rd ed.
1977, sections 5.6 and 6.11; a stratum that was labelled whole adds none). A stratum of few labels
often shows no spread at all; so its spread is smoothed, by four observations of the spread that the
share of keeps in it and its neighbours would have.

**Intervals** are Wilson's with the effective sample size (N. Dean and M. Pagano, Evaluating
confidence interval methods for binomial proportions in clustered surveys, 2015). `tests/
test_calibrate.py` measures how often they cover the truth.

**The threshold** for a target is where the measure, made monotonic by isotonic regression, reaches
it; where labels are few, where a logistic curve does, averaged over the scores of the whole data
set. Its interval holds every threshold at which the target lies within the interval of the measure,
the ends of which are made monotonic first.

**How well the score separates** keep from drop is the area under the ROC curve: the chance that an
image to keep scores higher than one to drop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from aesthetic_filter.database import PART, ROW, ROWS, SCORED, quote
from aesthetic_filter.errors import MissingExtraError, UsageError
from aesthetic_filter.interval import Interval
from aesthetic_filter.table import IMAGE_ID, SCORE, printable

if TYPE_CHECKING:
    from aesthetic_filter.labels import Labels
    from aesthetic_filter.scores import Scores

F64 = NDArray[np.float64]

Z = 1.959963984540054
"""The normal quantile of a two-sided 95% interval."""

PRIOR, NEIGHBOURS = 4, 0.5
"""Observations by which a stratum's spread is smoothed, and how much the next stratum counts there.

Chosen by simulation; see the tests.
"""

FEWEST_LABELS, FEWEST_OF_EACH = 30, 8
"""Below either, no threshold is recommended without a warning."""

ISOTONIC_FROM = 100
"""Labels from which the fitted curve is isotonic rather than logistic."""

FEWEST_ABOVE = 8
"""A threshold is supported by the labels if so many labelled images are at or above it."""

POST_STRATA, LABELS_EACH = 12, 10
"""Where labels come without strata: strata made from the scores, and labels in each."""

GRID = 400
"""Thresholds on which measures are computed, about so many."""

HALF_WIDTH = 0.05
"""How narrow an interval people are told they could have: plus or minus five points."""


UNKNOWN = Interval(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Judged:
    """Labelled images.

    Attributes:
        scores: (N,) float64.
        keep: (N,) float64, the share of reviewers who would keep the image, 0 to 1.
        strata: (N,) int, from which stratum each was drawn.
        stratum_rows: (strata,) int, images of the data set in each.
    """

    scores: F64
    keep: F64
    strata: NDArray[np.int64]
    stratum_rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.scores)

    @cached_property
    def taken(self) -> NDArray[np.int64]:
        """(strata,) labels in each."""
        return np.bincount(self.strata, minlength=len(self.stratum_rows)).astype(np.int64)

    @cached_property
    def weights(self) -> F64:
        """(N,) for how many images of the data set each label stands."""
        return self._each[self.strata]

    @cached_property
    def _each(self) -> F64:
        """(strata,) for how many images a label of each stratum stands."""
        return np.asarray(np.maximum(self.stratum_rows, self.taken) / np.maximum(self.taken, 1))

    @cached_property
    def _unseen(self) -> F64:
        """(strata,) rows² / labels, times the share of rows that were not labelled."""
        rows = np.maximum(self.stratum_rows, self.taken).astype(np.float64)
        left = 1 - self.taken / np.maximum(rows, 1)
        return rows**2 * left / np.maximum(self.taken, 1)

    def variance(
        self, first: F64, second: F64, step: F64, there: NDArray[Any], total: F64 | float
    ) -> F64:
        """Of a ratio of weighted sums, from its residuals in each stratum.

        Args:
            first: (strata, G) sums of the residuals.
            second: (strata, G) sums of their squares.
            step: (strata, G) by how much a residual changes between a keep and a drop, squared.
            there: (strata, G) whether a stratum has any label in the domain at all.
            total: (G,) the weighted sum below the line.
        """
        n = self.taken.astype(np.float64)[:, None]
        squares = np.maximum(second - np.divide(first**2, n, out=0 * first, where=n > 0), 0)
        smooth = (squares + PRIOR * step * self._expected[:, None]) / (np.maximum(n - 1, 0) + PRIOR)
        return np.asarray(self._unseen @ np.where(there, smooth, 0.0) / np.asarray(total) ** 2)

    @cached_property
    def _expected(self) -> F64:
        """(strata,) the variance of a keep in each stratum, as it and its neighbours have it."""
        places = np.arange(len(self.stratum_rows))
        near = NEIGHBOURS ** np.abs(np.subtract.outer(places, places)).astype(np.float64)
        keeps = near @ np.bincount(self.strata, self.keep, len(places))
        chance = (keeps + 0.5) / (near @ self.taken + 1)
        return np.asarray(chance * (1 - chance))

    def _sums(self, values: F64, above: NDArray[np.bool_]) -> F64:
        """(strata, G) sums of one value (N,) over the labels that are above (N, G) a threshold."""
        inside = self.strata == np.arange(len(self.stratum_rows))[:, None]
        return np.asarray((inside * values) @ above.astype(np.float64))

    def measures(self, thresholds: Any) -> tuple[Measured, Measured, Measured]:
        """Precision, recall and F1 of (G,) thresholds, with their intervals."""
        marks = np.asarray(thresholds, np.float32).astype(np.float64)
        above = self.scores[:, None] >= marks
        everyone = np.ones((len(self), 1), np.bool_)
        y, one = self.keep, np.ones(len(self))
        # In each stratum, over the labels above the threshold, and over all: the sums of the
        # keeps, of their squares, and the number. (A share of reviewers is its own square only
        # where they agree.)
        a, c, b = (self._sums(v, above) for v in (y, y * y, one))
        a_all, c_all = (self._sums(v, everyone) for v in (y, y * y))
        hits, there, keeps = self._each @ a, self._each @ b, float((self._each @ a_all)[0])

        def ratio(top: F64, bottom: F64) -> F64:
            found: F64 = np.divide(top, bottom, out=np.full(len(top), np.nan), where=bottom > 0)
            return found

        p, r = ratio(hits, there), ratio(hits, np.full(len(hits), keeps))
        f = ratio(2 * hits, there + keeps)
        share = b / np.maximum(self.taken, 1)[:, None]  # of each stratum, above the threshold
        n_above = above.sum(axis=0)
        n_keep = np.count_nonzero(y > 0)
        n_either = (above | (y > 0)[:, None]).sum(axis=0)
        with np.errstate(invalid="ignore"):
            of_p = self.variance(a - p * b, c - 2 * p * a + p**2 * b, np.ones_like(b), b > 0, there)
            of_r = self.variance(
                a - r * a_all,
                c * (1 - r) ** 2 + (c_all - c) * r**2,
                share * (1 - r) ** 2 + (1 - share) * r**2,
                b == b,
                keeps or np.nan,
            )
            of_f = self.variance(
                (2 - f) * a - f * b - f * (a_all - a),
                (2 - f) ** 2 * c - 2 * f * (2 - f) * a + f**2 * b + f**2 * (c_all - c),
                share * (2 - f) ** 2 + (1 - share) * f**2,
                b == b,
                there + keeps,
            )
        return (
            wilson(p, of_p, n_above),
            wilson(r, of_r, np.full(len(r), n_keep)),
            wilson(f, of_f, n_either),
        )

    def base_rate(self) -> Interval:
        """The share of all images that people would keep."""
        return self.measures([-np.inf])[0].interval(0)

    def auc(self) -> Interval:
        """The area under the ROC curve, for the whole data set; ties count half.

        Its variance is linearised as that of the ratios (E. DeLong and others, Comparing the areas
        under two or more correlated receiver operating characteristic curves, 1988, with weights).
        """
        keep, drop = self.weights * self.keep, self.weights * (1 - self.keep)
        if keep.sum() <= 0 or drop.sum() <= 0:
            return UNKNOWN
        values, place = np.unique(self.scores, return_inverse=True)
        of_keep, of_drop = (np.bincount(place, w, len(values)) for w in (keep, drop))
        beaten = ((np.cumsum(of_drop) - of_drop / 2) / drop.sum())[place]
        beating = ((keep.sum() - np.cumsum(of_keep) + of_keep / 2) / keep.sum())[place]
        estimate = min(float(keep @ beaten / keep.sum()), 1.0)
        total = float(self.weights.sum())
        residuals = self.keep * (beaten - estimate) * (total / keep.sum())
        residuals += (1 - self.keep) * (beating - estimate) * (total / drop.sum())
        everyone = np.ones((len(self), 1), np.bool_)
        first, second = self._sums(residuals, everyone), self._sums(residuals**2, everyone)
        steps = (beaten - estimate) * (total / keep.sum())
        steps -= (beating - estimate) * (total / drop.sum())
        step = self._sums(steps**2, everyone) / np.maximum(self.taken, 1)[:, None]
        variance = self.variance(first, second, step, first == first, total)
        few = min(self.keep.sum(), (1 - self.keep).sum())
        labels = np.array([max(int(few), 1)])
        return wilson(np.array([estimate]), variance, labels).interval(0)


@dataclass(frozen=True)
class Measured:
    """Estimates (G,) with the ends (G,) of their 95% intervals; NaN, 0 and 1 where unknown."""

    estimate: F64
    low: F64
    high: F64

    def interval(self, place: int) -> Interval:
        """One of them."""
        return Interval(
            float(self.estimate[place]), float(self.low[place]), float(self.high[place])
        )


def wilson(estimate: F64, variance: F64, labels: NDArray[Any]) -> Measured:
    """Wilson's 95% intervals of proportions, from their variances.

    Args:
        estimate: (G,) the proportions.
        variance: (G,) of the estimates; 0 where there is nothing left to be unsure of.
        labels: (G,) how many images each rests on; an estimate of 0 or 1 is moved inwards by half
            of one of them to tell how many independent ones its variance is worth.
    """
    inner = (estimate * labels + 0.5) / (labels + 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        z2 = np.where(variance > 0, Z * Z * variance / (inner * (1 - inner)), 0.0)  # Z² / n
        centre = (estimate + z2 / 2) / (1 + z2)
        half = np.sqrt(np.maximum(estimate * (1 - estimate) * z2 + z2 * z2 / 4, 0)) / (1 + z2)
        low = np.clip(centre - half, 0.0, estimate)
        high = np.clip(centre + half, estimate, 1.0)
    unknown = np.isnan(estimate)
    return Measured(estimate, np.where(unknown, 0.0, low), np.where(unknown, 1.0, high))


@dataclass(frozen=True)
class Population:
    """The scores of the whole data set, on a grid of thresholds.

    Attributes:
        thresholds: (G,) float64, ascending, round numbers.
        rows_from: (G,) int64, how many rows score at least so much: exactly.
        rows: how many have a score.
    """

    thresholds: F64
    rows_from: NDArray[np.int64]
    rows: int

    @cached_property
    def bins(self) -> tuple[F64, NDArray[np.int64]]:
        """(G + 1,) scores that stand for the rows between thresholds, and how many rows."""
        step = float(self.thresholds[1] - self.thresholds[0]) if len(self.thresholds) > 1 else 0.01
        middles = np.concatenate([[self.thresholds[0] - step / 2], self.thresholds + step / 2])
        return middles, -np.diff(np.concatenate([[self.rows], self.rows_from, [0]]))

    def share_from(self, place: int) -> float:
        """The fraction of rows that the threshold of this number keeps."""
        return float(self.rows_from[place]) / max(self.rows, 1)


def population(scores: Scores) -> Population:
    """Count the scores of a data set on a grid of round thresholds from end to end.

    Raises:
        UsageError: there are no scores.
    """
    low, high = scores.database.row(
        f"SELECT min({SCORE})::DOUBLE, max({SCORE})::DOUBLE FROM {ROWS} WHERE {SCORED}"
    )
    if low is None:
        raise UsageError(f"{scores.path}: no row has a score")
    grid = round_grid(float(low), float(high))
    return Population(grid, scores.rows_from(grid), scores.scored)


def round_grid(low: float, high: float) -> F64:
    """About :data:`GRID` round numbers from ``low`` or below it up to ``high``."""
    exponent = math.floor(math.log10(max(high - low, 1e-3) / GRID))
    step = next(
        s
        for s in (m * 10.0 ** (exponent + e) for e in (0, 1) for m in (1, 2, 5))
        if (high - low) / s <= GRID
    )
    digits = max(0, -math.floor(math.log10(step)))
    first, last = math.floor(low / step + 1e-9), math.floor(high / step + 1e-9)
    return np.round(np.arange(first, last + 1) * step, digits)


@dataclass(frozen=True)
class Target:
    """What is asked of a threshold.

    Attributes:
        measure: "precision", "recall", "kept" or "f1" (the best there is).
        value: 0 to 1; for "f1" nothing.
    """

    measure: str
    value: float = math.nan

    def __post_init__(self) -> None:
        if self.measure not in ("precision", "recall", "kept", "f1"):
            raise UsageError(f"there is no target {self.measure!r}: precision, recall, kept or f1")
        if self.measure != "f1" and not 0 < self.value < 1:
            raise UsageError(
                f"a target for {self.measure} lies between 0 and 1, such as 0.9, not {self.value:g}"
            )

    def __str__(self) -> str:
        if self.measure == "f1":
            return "the best F1"
        if self.measure == "kept":
            return f"{self.value:.3g} of the images kept"
        return f"{self.measure} {self.value:.3g}"


@dataclass(frozen=True)
class Point:
    """What a threshold does.

    Attributes:
        threshold: a score.
        kept: images at or above it, exactly.
        share: of the images that have a score.
        precision: of the images kept, the share that people would keep.
        recall: of the images people would keep, the share kept.
        f1: the harmonic mean of both.
        labels: labelled images at or above it.
    """

    threshold: float
    kept: int
    share: float
    precision: Interval
    recall: Interval
    f1: Interval
    labels: int


@dataclass(frozen=True)
class Recommendation:
    """The threshold for a target.

    Attributes:
        target: what was asked.
        threshold: None where no threshold reaches it.
        low: end of its 95% interval; -inf where the labels do not say.
        high: likewise; inf.
        point: what it does; None without a threshold.
        more_labels: about how many more would bring the measure within five points on either side;
            0 where it is, None where nothing can be said.
    """

    target: Target
    threshold: float | None
    low: float
    high: float
    point: Point | None
    more_labels: int | None


class Curve:
    """Precision, recall and F1 of every threshold, and the fitted curve."""

    def __init__(self, judged: Judged, population: Population) -> None:
        self.judged, self.population = judged, population

    @cached_property
    def fitted(self) -> tuple[F64, F64]:
        """(G,) precision and recall of each threshold, as the fitted curve has them."""
        if enough_for_isotonic(self.judged):
            precision, recall, _ = self.direct
            known = np.flatnonzero(~np.isnan(precision.estimate))
            rising = precision.estimate[np.minimum(np.arange(len(recall.estimate)), known[-1])]
            weights = np.maximum(self.labels_from, 1).astype(np.float64)
            return _isotonic(rising, True, weights), recall.estimate  # which falls anyway
        scores, rows = self.population.bins
        chance = logistic_chance(self.judged)(scores)
        good = np.cumsum((rows * chance)[::-1])[::-1][1:]
        there = np.cumsum(rows[::-1])[::-1][1:]
        found = np.divide(good, there, out=np.ones(len(good)), where=there > 0)
        everything = float(rows @ chance)
        return found, good / everything if everything else np.zeros(len(good))

    @cached_property
    def direct(self) -> tuple[Measured, Measured, Measured]:
        """(G,) precision, recall and F1 of each threshold, as the labels alone have them."""
        return self.judged.measures(self.population.thresholds)

    @cached_property
    def labels_from(self) -> NDArray[np.int64]:
        """(G,) labelled images at or above each threshold."""
        ordered = np.sort(self.judged.scores)
        marks = self.population.thresholds.astype(np.float32).astype(np.float64)
        return len(ordered) - np.searchsorted(ordered, marks, side="left")

    @cached_property
    def measured(self) -> tuple[Measured, Measured, Measured]:
        """(G,) precision, recall and F1; the estimate is the fitted curve's.

        It is held within the interval, which is that of the labels alone.
        """
        precision, recall = self.fitted
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        return tuple(  # type: ignore[return-value]
            Measured(np.clip(estimate, found.low, found.high), found.low, found.high)
            for estimate, found in zip((precision, recall, f1), self.direct, strict=True)
        )

    def point(self, place: int) -> Point:
        """What the threshold of this number does."""
        precision, recall, f1 = (each.interval(place) for each in self.measured)
        return Point(
            float(self.population.thresholds[place]),
            int(self.population.rows_from[place]),
            self.population.share_from(place),
            precision,
            recall,
            f1,
            int(self.labels_from[place]),
        )

    def recommend(self, target: Target) -> Recommendation:
        """The threshold for a target, with its interval."""
        supported = np.flatnonzero(self.labels_from >= FEWEST_ABOVE)
        if not len(supported):
            return Recommendation(target, None, -math.inf, math.inf, None, None)
        last = int(supported[-1])
        thresholds = self.population.thresholds[: last + 1]
        precision, recall = (each[: last + 1] for each in self.fitted)
        low, high = -math.inf, math.inf
        if target.measure == "kept":
            shares = self.population.rows_from / max(self.population.rows, 1)
            place = int(np.flatnonzero(shares >= target.value)[-1])
            low = high = float(self.population.thresholds[place])
        elif target.measure == "f1":
            f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
            place = int(np.argmax(f1))
        else:
            measure = precision if target.measure == "precision" else recall
            reached = np.flatnonzero(measure >= target.value)
            measured = self.measured[0 if target.measure == "precision" else 1]
            rising = target.measure == "precision"
            # The measure only rises, or only falls; so must the ends of its interval, or the first
            # threshold at which chance has them reach the target would count.
            ends = measured.low[: last + 1], measured.high[: last + 1]
            # The fewer labels are above a threshold, the less its own interval counts.
            weights = self.labels_from[: last + 1].astype(np.float64)
            lower, upper = (_isotonic(end, rising, weights) for end in ends)
            low, high = _ends(thresholds, (lower <= target.value) & (target.value <= upper))
            if not len(reached):
                return Recommendation(target, None, low, high, None, None)
            place = int(reached[0] if target.measure == "precision" else reached[-1])
            threshold = float(thresholds[place])
            low, high = min(low, threshold), max(high, threshold)
        point = self.point(place)
        interval = point.recall if target.measure == "recall" else point.precision
        return Recommendation(
            target,
            point.threshold,
            low,
            high,
            point,
            more_labels(len(self.judged), interval),
        )


def _isotonic(values: F64, rising: bool, weights: F64 | None = None) -> F64:
    """The curve nearest to these values that only rises, or only falls.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn.isotonic import isotonic_regression
    except ImportError:
        raise _needed() from None
    found = isotonic_regression(values, sample_weight=weights, increasing=rising)
    return np.asarray(found, np.float64)


def _needed() -> MissingExtraError:
    return MissingExtraError("calibrating needs scikit-learn", "learn")


def _ends(thresholds: F64, within: NDArray[np.bool_]) -> tuple[float, float]:
    """The first and the last threshold at which the target is within the measure's interval.

    An end is infinite where it still is at the last threshold that the labels support.
    """
    places = np.flatnonzero(within)
    if not len(places):
        return math.inf, -math.inf
    low = -math.inf if places[0] == 0 else float(thresholds[places[0]])
    high = math.inf if places[-1] == len(within) - 1 else float(thresholds[places[-1]])
    return low, high


def more_labels(labels: int, interval: Interval) -> int | None:
    """How many more labels would make an interval as narrow as :data:`HALF_WIDTH` on either side.

    A width goes with the square root of the number of labels.
    """
    half = (interval.high - interval.low) / 2
    if not math.isfinite(half) or not labels:
        return None
    needed = labels * (half / HALF_WIDTH) ** 2 - labels
    return max(0, math.ceil(needed / 10) * 10)


def enough_for_isotonic(judged: Judged) -> bool:
    """Whether the labels are enough for a curve that follows them wherever they go."""
    few = min(judged.keep.sum(), (1 - judged.keep).sum())
    return len(judged) >= ISOTONIC_FROM and bool(few >= 2 * FEWEST_OF_EACH)


def logistic_chance(judged: Judged) -> Callable[[F64], F64]:
    """The chance that people keep an image, by logistic regression on its score.

    With the labels' weights. Where all labels are the same, or the score says nothing or the
    opposite, it is the same for all scores.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    keep, weights = judged.keep, judged.weights / judged.weights.mean()
    mean = float(weights @ keep / weights.sum())
    if keep.min() == keep.max():
        return lambda scores: np.full(len(scores), mean)
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise _needed() from None
    centre, width = float(judged.scores.mean()), float(judged.scores.std()) or 1.0
    # A share of reviewers is so much keep and so much drop.
    x = ((np.concatenate([judged.scores, judged.scores]) - centre) / width)[:, None]
    y = np.repeat([1, 0], len(keep))
    w = np.concatenate([weights * keep, weights * (1 - keep)])
    logistic = LogisticRegression(C=10.0).fit(x[w > 0], y[w > 0], w[w > 0])
    slope, start = float(logistic.coef_[0, 0]), float(logistic.intercept_[0])
    if slope <= 0:
        return lambda scores: np.full(len(scores), mean)
    return lambda scores: 1 / (1 + np.exp(-(start + slope * (scores - centre) / width)))


@dataclass(frozen=True)
class Calibration:
    """What labels say of scores.

    Attributes:
        labels: images that have both.
        keeps: of those, the ones that people would keep.
        separation: area under the ROC curve.
        base_rate: the share of all images that people would keep.
        points: what round thresholds do.
        recommendation: the threshold for the target.
        best: the threshold of the best F1.
        notes: what a person must know, in sentences.
        curve: of every threshold.
        provenance: of the scores.
    """

    labels: int
    keeps: float
    separation: Interval
    base_rate: Interval
    points: tuple[Point, ...]
    recommendation: Recommendation | None
    best: Recommendation
    notes: tuple[str, ...]
    curve: Curve
    provenance: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """As plain data, for JSON; what is not known is None."""

        def plain(value: Any) -> Any:
            if isinstance(value, float):
                return value if math.isfinite(value) else None
            if isinstance(value, tuple):
                return [plain(v) for v in value]
            if hasattr(value, "__dataclass_fields__"):
                return {key: plain(v) for key, v in vars(value).items()}
            return value

        fields = ("labels", "keeps", "separation", "base_rate", "recommendation", "best", "points")
        head = self.provenance.get("head", {})
        return {
            "head": {"name": head.get("name"), "sha256": head.get("sha256")},
            **{name: plain(getattr(self, name)) for name in fields},
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        lines = [
            f"labels          {self.labels:,}: {_count(self.keeps)} keep, "
            f"{_count(self.labels - self.keeps)} drop",
            f"would be kept   {self.base_rate} of all images",
            f"separation      {self.separation} area under the ROC curve; 0.5 is chance",
            "",
            "threshold         kept            precision               recall                   F1",
        ]
        lines += [_row(point) for point in self.points]
        chosen = [found for found in (self.recommendation, self.best) if found is not None]
        for found in chosen:
            lines += ["", *_recommended(found)]
        lines += ["", *(f"note: {note}" for note in self.notes)] if self.notes else []
        return "\n".join(lines)


def _count(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


def _row(point: Point) -> str:
    def cell(interval: Interval) -> str:
        return f"{interval.estimate:.2f} ({interval.low:.2f} to {interval.high:.2f})"

    return (
        f"{point.threshold:>9g} {point.kept:>8,} {point.share:>6.1%}"
        f"  {cell(point.precision):>19}  {cell(point.recall):>19}  {cell(point.f1):>19}"
    )


def _recommended(found: Recommendation) -> list[str]:
    if found.threshold is None or found.point is None:
        return [f"for {found.target}: no threshold reaches it, as far as these labels tell"]
    ends = ""
    if found.target.measure in ("precision", "recall"):
        ends = f"  (95%: {_end(found.low)} to {_end(found.high)})"
    point = found.point
    return [
        f"for {found.target}: a threshold of {found.threshold:g}{ends}",
        f"  keeps       {point.kept:,} images, {point.share:.1%}",
        f"  precision   {point.precision}",
        f"  recall      {point.recall}",
        f"  F1          {point.f1}",
    ]


def _end(value: float) -> str:
    return f"{value:g}" if math.isfinite(value) else "not known"


def judge(labels: Labels, scores: Scores) -> tuple[Judged, list[str]]:
    """The labelled images with their scores and weights, and what a person should know.

    Raises:
        UsageError: the labels are ratings, or of other images.
    """
    if labels.kind == "rating":
        low, high = float(labels.values.min()), float(labels.values.max())
        raise UsageError(
            f"these are ratings, from {low:g} to {high:g}: say with --keep-from from which one on "
            "an image is to be kept"
        )
    found = scores_of(labels.ids, scores)
    known = np.array([image in found for image in labels.ids], np.bool_)
    notes = list(labels.notes)
    if not known.any():
        example = printable(labels.ids[0]) if labels.ids else ""
        raise UsageError(
            "no label is of an image in these scores"
            + (f" (the first is of {example!r})" if example else ": there are none")
        )
    if not known.all():
        notes.append(f"labels of images without a score here: {np.count_nonzero(~known):,}")
    values = np.array([found[image] for image in labels.ids if image in found], np.float64)
    keep = labels.values[known]
    if labels.strata is not None:
        return Judged(values, keep, labels.strata[known], labels.stratum_rows), notes
    strata, rows = _strata_of(values, scores)
    notes.append(
        "the labels do not say how their images were drawn; they are weighted as if, among images "
        "of nearly the same score, each had been equally likely"
    )
    return Judged(values, keep, strata, rows), notes


def _strata_of(values: F64, scores: Scores) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Strata made afterwards, each with about as many labels."""
    count = int(min(max(len(values) // LABELS_EACH, 1), POST_STRATA))
    inner = np.quantile(values, np.arange(1, count) / count, method="higher")
    edges = np.unique(inner.astype(np.float32))
    edges = edges[edges > np.float32(values.min())]  # none without a label
    rows_from = np.concatenate([[scores.scored], scores.rows_from(edges), [0]])
    strata = np.searchsorted(edges, values.astype(np.float32), side="right")
    return strata.astype(np.int64), -np.diff(rows_from)


def scores_of(ids: tuple[str, ...], scores: Scores) -> dict[str, float]:
    """The score of each of these images that has one; of images with the same id the first."""
    return {image: score for image, (score, *_) in places_of(ids, scores).items()}


def places_of(ids: tuple[str, ...], scores: Scores) -> dict[str, tuple[float, int, int]]:
    """The score, part and row of each of these images that has a score."""
    with scores.database.attached(pa.table({"wanted": pa.array(ids, pa.string())})) as wanted:
        rows = scores.database.rows(
            f"SELECT {quote(IMAGE_ID)}, {SCORE}::DOUBLE, {PART}, {ROW} FROM {ROWS} "
            f"WHERE {SCORED} AND {quote(IMAGE_ID)} IN (SELECT wanted FROM {wanted}) "
            f"ORDER BY {PART} DESC, {ROW} DESC"
        )
    return {image: (float(score), int(part), int(row)) for image, score, part, row in rows}


def calibrate(labels: Labels, scores: Scores, target: Target | None = None) -> Calibration:
    """Precision, recall and F1 of every threshold, and the threshold for a target.

    Args:
        labels: keep and drop (:func:`aesthetic_filter.labels.read_labels`).
        scores: of the whole data set.
        target: what is asked of the threshold; default: only the best F1.

    Raises:
        UsageError: ratings, no labels of these images, or all alike.
        MissingExtraError: scikit-learn is not installed.
    """
    judged, notes = judge(labels, scores)
    return calibration(judged, population(scores), target, notes, scores.provenance)


def calibration(
    judged: Judged,
    everything: Population,
    target: Target | None,
    notes: list[str],
    provenance: Mapping[str, Any],
) -> Calibration:
    """:func:`calibrate`, of images that are judged already."""
    curve = Curve(judged, everything)
    separation = judged.auc()
    recommendation = None if target is None else curve.recommend(target)
    return Calibration(
        labels=len(judged),
        keeps=float(judged.keep.sum()),
        separation=separation,
        base_rate=judged.base_rate(),
        points=tuple(curve.point(place) for place in _round_places(curve)),
        recommendation=recommendation,
        best=curve.recommend(Target("f1")),
        notes=(*notes, *verdict(judged, separation, recommendation)),
        curve=curve,
        provenance=provenance,
    )


def _round_places(curve: Curve) -> list[int]:
    """About a dozen thresholds where there are labels on either side."""
    supported = np.flatnonzero(
        (curve.labels_from >= FEWEST_ABOVE)
        & (curve.labels_from <= len(curve.judged) - min(FEWEST_ABOVE, len(curve.judged) // 4))
    )
    if not len(supported):
        return []
    thresholds = curve.population.thresholds[supported]
    for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5, 1.0, 2.0, 2.5, 5.0, 10.0):
        near = np.abs(thresholds / step - np.round(thresholds / step)) < 1e-6
        if np.count_nonzero(near) <= 14:
            return [int(place) for place in supported[near]]
    return [int(place) for place in supported[:: max(1, len(supported) // 12)]]


def verdict(
    judged: Judged, separation: Interval, recommendation: Recommendation | None
) -> list[str]:
    """What must be said of labels and score, plainly."""
    said = []
    keeps, drops = float(judged.keep.sum()), float((1 - judged.keep).sum())
    if min(keeps, drops) == 0:
        what = "keep" if keeps else "drop"
        said.append(f"all labels are {what}: nothing can be said of any threshold; label more")
        return said
    if len(judged) < FEWEST_LABELS or min(keeps, drops) < FEWEST_OF_EACH:
        said.append(
            f"too few labels: {_count(keeps)} keep and {_count(drops)} drop; below "
            f"{FEWEST_LABELS}, or {FEWEST_OF_EACH} of either, do not rely on these numbers"
        )
    elif separation.low <= 0.5:
        said.append(
            "the score does not separate keep from drop: the area under the ROC curve may be 0.5, "
            "which is chance; no threshold on this score gives what these labels ask for. "
            "Try another head, or train one (`aesthetic-filter train`)"
            if separation.high < 0.75
            else "whether the score separates keep from drop is not certain yet: label more"
        )
    if recommendation is not None and recommendation.target.measure in ("precision", "recall"):
        measure = recommendation.target.measure
        if recommendation.more_labels:
            said.append(
                f"about {recommendation.more_labels:,} more labels would bring the {measure} at "
                "this threshold to within five points either way"
            )
    return said
