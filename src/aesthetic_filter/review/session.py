"""A review: which image comes next, what was said of it, and what follows. Knows no web.

The sample is drawn from strata of the scores (:mod:`aesthetic_filter.sampling`): first a few from
each, then from where one more label tells most about the threshold that is asked for. Every label
is in the label file before it counts.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aesthetic_filter.calibrate import (
    Calibration,
    Judged,
    Target,
    calibration,
    population,
)
from aesthetic_filter.errors import OutputError, UsageError
from aesthetic_filter.labels import DROP, KEEP, SKIP, WITHDRAWN, Label, LabelFile, Labels, gather
from aesthetic_filter.sampling import Drawn, draw, next_stratum, stratify

if TYPE_CHECKING:
    from aesthetic_filter.scores import Scores

DEFAULT_TARGET = Target("precision", 0.9)
"""Nine of ten images that are kept are ones that people would keep."""

SHARED_EVERY = 5
"""Where there are several reviewers, every so many-th image is one that another has judged."""

LEARN_EVERY = 5
"""Labels after which the sampler looks again at where the next ones should come from."""

FEWEST_TO_SHOW = 10
"""Labels of which at least one is a keep and one a drop, before there are any estimates."""


@dataclass
class Reviewer:
    """One person's work.

    Attributes:
        said: key of an item to what was said of it, in order.
        waiting: items that were handed out and not answered, in order.
        served: how many were ever handed out.
    """

    said: dict[int, str] = field(default_factory=dict)
    waiting: list[int] = field(default_factory=list)
    served: int = 0


class Session:
    """A review of some scores, safe to use from several threads.

    Attributes:
        items: what was drawn so far, by key: the only things that can be seen or judged.
        target: what is asked of the threshold.
        size: how many images are to be judged.
    """

    def __init__(
        self,
        scores: Scores,
        labels: str | Path,
        *,
        size: int = 300,
        seed: int = 0,
        target: Target = DEFAULT_TARGET,
    ) -> None:
        """Open a review, or go on with one.

        Raises:
            OutputError: the label file cannot be written, is in use, or is of other scores.
            UsageError: there are no scores, or nothing to draw.
        """
        self.target, self.size = target, size
        self._lock = threading.RLock()
        self._population = population(scores)
        self._provenance = scores.provenance
        self._strata = stratify(scores)
        self._order = draw(scores, self._strata, max(2 * size, 100), seed)
        self.items: list[Drawn] = []
        self._keys: dict[str, int] = {}
        self._reviewers: dict[str, Reviewer] = {}
        self._spread: NDArray[np.float64] | None = None
        self._learned_at = 0
        self._known: tuple[int, Target, Calibration | None] | None = None
        self.file = LabelFile(labels)
        try:
            self._restore()
        except BaseException:
            self.file.close()
            raise

    def _restore(self) -> None:
        """Take up what an earlier review left."""
        names = set(self._strata.names)
        places = {drawn.image_id: drawn for rows in self._order for drawn in rows}
        for label in self.file.labels:
            if label.stratum and label.stratum not in names:
                raise OutputError(
                    f"{self.file.path}: its labels were drawn from other scores "
                    f"(a stratum {label.stratum}); give another file with --labels"
                )
            if label.image_id not in places:
                continue  # of another draw: it counts, but is not shown again
            self._said(label.reviewer, self._key(places[label.image_id]), str(label.value))

    def _key(self, drawn: Drawn) -> int:
        if drawn.image_id not in self._keys:
            self._keys[drawn.image_id] = len(self.items)
            self.items.append(drawn)
        return self._keys[drawn.image_id]

    def _said(self, reviewer: str, key: int, value: str) -> None:
        person = self._reviewers.setdefault(reviewer, Reviewer())
        person.said.pop(key, None)
        if value != WITHDRAWN:
            person.said[key] = value
        if key in person.waiting:
            person.waiting.remove(key)

    def hand_out(self, reviewer: str, count: int = 1) -> list[int]:
        """The keys of the next images for a reviewer: those not answered yet, then new ones."""
        with self._lock:
            person = self._reviewers.setdefault(reviewer, Reviewer())
            while len(person.waiting) < count:
                key = self._draw_for(person)
                if key is None:
                    break
                person.waiting.append(key)
                person.served += 1
            return person.waiting[:count]

    def _draw_for(self, person: Reviewer) -> int | None:
        others = [other for other in self._reviewers.values() if other is not person and other.said]
        seen = {*person.said, *person.waiting}
        if others and person.served % SHARED_EVERY == SHARED_EVERY - 1:
            for other in others:
                for key, value in other.said.items():
                    if value != SKIP and key not in seen:
                        return key
        if self._handed_out() >= self.size:
            # The sample is full. Somebody may have gone without answering; and what others judged
            # and this one has not tells how far they agree.
            everyone = [other for other in self._reviewers.values() if other is not person]
            waiting = (key for other in everyone for key in other.waiting)
            judged = (key for other in others for key in other.said)
            return next((key for key in (*waiting, *judged) if key not in seen), None)
        return self._draw_new()

    def _handed_out(self) -> int:
        """Images that were judged, or lie before somebody."""
        judged = {
            key
            for person in self._reviewers.values()
            for key, value in person.said.items()
            if value != SKIP
        }
        return len(judged.union(*(person.waiting for person in self._reviewers.values())))

    def _draw_new(self) -> int | None:
        taken = [0] * len(self._strata)
        for key in {k for p in self._reviewers.values() for k in (*p.said, *p.waiting)}:
            taken[self.items[key].stratum] += 1
        left = [len(rows) for rows in self._order]
        for item in self.items:
            left[item.stratum] -= 1
        stratum = next_stratum(left, taken, self._strata.rows, self._learn())
        if stratum is None:
            return None
        return self._key(next(d for d in self._order[stratum] if d.image_id not in self._keys))

    def answer(self, reviewer: str, key: int, value: str) -> None:
        """Save what a reviewer says of an image: keep, drop or skip.

        Raises:
            UsageError: there is no such image, or no such answer.
            OutputError: it could not be saved.
        """
        with self._lock:
            if not 0 <= key < len(self.items):
                raise UsageError("there is no such image in this review")
            if value not in (KEEP, DROP, SKIP):
                raise UsageError("an answer is keep, drop or skip")
            self._save(reviewer, key, value)

    def undo(self, reviewer: str) -> int | None:
        """Withdraw a reviewer's last answer; gives its image, which comes next again."""
        with self._lock:
            person = self._reviewers.get(reviewer)
            if person is None or not person.said:
                return None
            key = next(reversed(person.said))
            self._save(reviewer, key, WITHDRAWN)
            person.waiting.insert(0, key)
            return key

    def _save(self, reviewer: str, key: int, value: str) -> None:
        drawn = self.items[key]
        name, rows = self._strata.names[drawn.stratum], int(self._strata.rows[drawn.stratum])
        self.file.add(
            Label(
                drawn.image_id, value, reviewer, score=drawn.score, stratum=name, stratum_rows=rows
            )
        )
        self._said(reviewer, key, value)

    def labels(self) -> Labels:
        """What was said so far."""
        with self._lock:
            return gather(self.file.labels)

    def judged(self) -> Judged | None:
        """The judged images with their weights; None where there are none."""
        labels = self.labels()
        scores = {label.image_id: label.score for label in self.file.labels}
        values = np.array([scores[image] for image in labels.ids], np.float64)
        if labels.strata is None or not len(labels):
            return None
        return Judged(values, labels.values, labels.strata, labels.stratum_rows)

    def estimate(self) -> Calibration | None:
        """What follows from the labels; None where they are too few to say anything."""
        with self._lock:
            count = len(self.file.labels)
            if self._known is None or self._known[:2] != (count, self.target):
                judged = self.judged()
                found = None
                if (
                    judged is not None
                    and len(judged) >= FEWEST_TO_SHOW
                    and 0 < judged.keep.sum() < len(judged)
                ):
                    found = calibration(judged, self._population, self.target, [], self._provenance)
                self._known = (count, self.target, found)
            return self._known[2]

    def _learn(self) -> NDArray[np.float64] | None:
        """The spread within each stratum of what is being estimated, now and then anew."""
        count = len(self.file.labels)
        if self._spread is None or count - self._learned_at >= LEARN_EVERY:
            self._learned_at = count
            found = self.estimate()
            if found is not None:
                self._spread = spread(found, self._strata.of, len(self._strata), self.target)
        return self._spread

    def status(self, reviewer: str) -> dict[str, Any]:
        """How far the review is, and what follows from it, as plain data."""
        with self._lock:
            labels = self.labels()
            person = self._reviewers.get(reviewer, Reviewer())
            found = self.estimate()
            return {
                "judged": len(labels),
                "size": self.size,
                "mine": len(person.said),
                "skipped": labels.skipped,
                "reviewers": dict(labels.reviewers),
                "agreement": None if labels.agreement is None else str(labels.agreement),
                "target": {"measure": self.target.measure, "value": _plain(self.target.value)},
                "estimate": None if found is None else _described(found),
                "needed": FEWEST_TO_SHOW,
            }

    def close(self) -> None:
        """Let go of the label file."""
        self.file.close()


def spread(found: Calibration, stratum_of: Any, strata: int, target: Target) -> NDArray[np.float64]:
    """(strata,) standard deviation of what decides the threshold, within each stratum.

    Of precision, only what lies above the threshold counts; of recall, what lies on either side
    moves it in opposite directions.
    """
    judged = found.curve.judged
    chosen = found.recommendation or found.best
    threshold = chosen.threshold
    if threshold is None:  # out of reach so far: look where the best precision is
        threshold = float(np.quantile(judged.scores, 0.8))
    place = stratum_of(judged.scores)
    count = np.bincount(place, minlength=strata)
    keeps = np.bincount(place, judged.keep, strata)
    chance = (keeps + 0.5) / (count + 1)
    above = np.bincount(place, judged.scores >= threshold, strata) / np.maximum(count, 1)
    deviation = np.sqrt(chance * (1 - chance))
    if target.measure == "precision":
        return np.asarray(deviation * np.sqrt(above))
    if target.measure == "kept":
        return np.asarray(deviation * np.sqrt(above))
    recall = float(found.curve.measured[1].estimate[_place(found, threshold)])
    return np.asarray(deviation * np.where(above > 0.5, 1 - recall, max(recall, 0.05)))


def _place(found: Calibration, threshold: float) -> int:
    return int(np.abs(found.curve.population.thresholds - threshold).argmin())


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _described(found: Calibration) -> dict[str, Any]:
    """An estimate for the page: numbers, and the curves at about a hundred thresholds."""
    described = found.as_dict()
    curve = found.curve
    precision, recall, _ = curve.measured
    scores = curve.judged.scores
    first = int(np.searchsorted(curve.population.thresholds, scores.min()))
    last = int(np.searchsorted(curve.population.thresholds, scores.max(), side="right"))
    step = max(1, (last - first) // 100)
    places: Sequence[int] = range(first, last, step)
    described["curve"] = {
        "threshold": [float(curve.population.thresholds[i]) for i in places],
        "precision": [_plain(float(precision.estimate[i])) for i in places],
        "low": [_plain(float(precision.low[i])) for i in places],
        "high": [_plain(float(precision.high[i])) for i in places],
        "recall": [_plain(float(recall.estimate[i])) for i in places],
    }
    del described["points"]
    return described
