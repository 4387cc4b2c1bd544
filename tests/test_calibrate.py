"""Calibration: against formulas worked out apart, and against simulated reviews of known truth."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import f1_score, precision_score, recall_score, roc_auc_score

import aesthetic_filter as af
from aesthetic_filter.calibrate import (
    Calibration,
    Curve,
    Judged,
    Population,
    Target,
    calibrate,
    calibration,
    judge,
    population,
    round_grid,
)
from aesthetic_filter.errors import UsageError
from aesthetic_filter.labels import Label, gather, read_labels
from aesthetic_filter.review.session import spread
from aesthetic_filter.sampling import Strata, next_stratum
from conftest import Run

F64 = NDArray[np.float64]


# A data set of which everything is known, and reviews of it.


@dataclass(frozen=True)
class World:
    """Images with their scores, and what people would say of each, strata by strata."""

    scores: F64
    keep: NDArray[np.bool_]
    strata: Strata
    members: tuple[NDArray[np.int64], ...]
    everything: Population

    def truth(self, threshold: float) -> tuple[float, float, float]:
        """Precision, recall and F1 over all images."""
        kept = self.scores >= np.float32(threshold)
        hits = np.count_nonzero(kept & self.keep)
        precision, recall = hits / np.count_nonzero(kept), hits / np.count_nonzero(self.keep)
        return precision, recall, 2 * precision * recall / (precision + recall)

    def first_with_precision(self, value: float) -> float:
        grid = self.everything.thresholds
        return float(next(t for t in grid if self.truth(t)[0] >= value))

    def last_with_recall(self, value: float) -> float:
        grid = self.everything.thresholds
        return float(next(t for t in grid[::-1] if self.truth(t)[1] >= value))

    def judged(self, taken: list[int], chance: np.random.Generator) -> Judged:
        """A review that took so many images of each stratum at random."""
        picked = [
            chance.choice(rows, count, replace=False)
            for rows, count in zip(self.members, taken, strict=True)
        ]
        return self.of(np.concatenate(picked))

    def of(self, images: NDArray[np.int64]) -> Judged:
        place = self.strata.of(self.scores[images])
        return Judged(self.scores[images], self.keep[images].astype(float), place, self.strata.rows)


CHANCES: dict[str, Callable[[F64], F64]] = {
    "clear": lambda s: 1 / (1 + np.exp(-3 * (s - 5.3))),
    "weak": lambda s: 1 / (1 + np.exp(-0.8 * (s - 5))),
    "rare": lambda s: 1 / (1 + np.exp(-4 * (s - 6))),
}
"""How likely people are to keep an image of a score."""


@cache
def world(name: str, rows: int = 20_000) -> World:
    chance = np.random.default_rng(sum(map(ord, name)))
    scores = chance.normal(5, 0.7, rows).astype(np.float32).astype(np.float64)
    keep = chance.random(rows) < CHANCES[name](scores)
    low, high = np.quantile(scores, [0.01, 0.99])
    edges = np.linspace(low, high, 11).astype(np.float32)
    place = np.searchsorted(edges, scores, side="right")
    members = tuple(np.flatnonzero(place == k) for k in range(12))
    counts = np.array([len(rows) for rows in members])
    grid = round_grid(float(scores.min()), float(scores.max()))
    from_ = np.array([np.count_nonzero(scores >= np.float32(t)) for t in grid])
    return World(scores, keep, Strata(edges, counts), members, Population(grid, from_, rows))


TRIALS = 500


def covered(inside: list[bool]) -> float:
    return sum(inside) / len(inside)


MEASURES = ("precision", "recall", "f1")


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """95% intervals, over 500 reviews of each world: 93 to 97% of them hold the truth."""
    inside: dict[str, list[float]] = {}
    for name in CHANCES:
        here = world(name)
        thresholds = [4.5, 5.0, 5.5, 6.0]
        truths = np.array([here.truth(t) for t in thresholds])
        area = roc_auc_score(here.keep, here.scores)
        hits: dict[str, list[NDArray[np.bool_]]] = {}
        for trial in range(TRIALS):
            judged = here.judged([25] * 12, np.random.default_rng(trial))
            for place, found in enumerate(judged.measures(thresholds)):
                truth = truths[:, place]
                hit = (found.low <= truth) & (truth <= found.high)
                hits.setdefault(MEASURES[place], []).append(hit)
            for what, interval, value in (
                ("auc", judged.auc(), area),
                ("base rate", judged.base_rate(), here.keep.mean()),
            ):
                hit = np.array([interval.low <= value <= interval.high])
                hits.setdefault(what, []).append(hit)
        for what, found in hits.items():
            shares = np.mean(found, axis=0)
            assert shares.min() >= 0.92, (name, what, shares)  # of a single threshold
            assert shares.max() <= 0.98, (name, what, shares)
            inside.setdefault(what, []).extend(map(float, shares))
    for what, shares in inside.items():
        assert 0.93 <= np.mean(shares) <= 0.97, (what, shares)


@pytest.mark.parametrize(
    ("name", "target"), [("clear", Target("precision", 0.8)), ("weak", Target("recall", 0.8))]
)
def test_the_threshold_s_interval_covers_the_true_threshold(name: str, target: Target) -> None:
    here = world(name)
    truth = (
        here.first_with_precision(target.value)
        if target.measure == "precision"
        else here.last_with_recall(target.value)
    )
    hits, errors, reached = [], [], []
    for trial in range(TRIALS):
        judged = here.judged([25] * 12, np.random.default_rng(trial))
        found = Curve(judged, here.everything).recommend(target)
        hits.append(found.low <= truth <= found.high)
        if found.threshold is not None:
            errors.append(found.threshold - truth)
            reached.append(here.truth(found.threshold)[MEASURES.index(target.measure)])
    assert 0.93 <= np.mean(hits) <= 0.97
    assert len(errors) == TRIALS
    assert abs(np.median(errors)) < 0.1
    assert abs(np.mean(reached) - target.value) < 0.02


def test_a_sampler_that_follows_the_labels_stays_honest() -> None:
    """Going where labels tell most does not make the estimates wrong, and does narrow them."""
    here, target = world("clear"), Target("precision", 0.8)
    truth = here.first_with_precision(0.8)
    hits, widths, plain = [], [], []
    for trial in range(150):
        chance = np.random.default_rng(trial)
        order = [chance.permutation(rows) for rows in here.members]
        taken, learned = [0] * 12, None

        def judged(order: list[NDArray[np.int64]] = order, taken: list[int] = taken) -> Judged:
            some = [rows[:count] for rows, count in zip(order, taken, strict=True)]
            return here.of(np.concatenate(some))

        for number in range(240):
            left = [len(rows) - count for rows, count in zip(order, taken, strict=True)]
            stratum = next_stratum(left, taken, here.strata.rows, learned)
            assert stratum is not None
            taken[stratum] += 1
            if number >= 60 and number % 40 == 0:
                so_far = calibration(judged(), here.everything, target, [], {})
                learned = spread(so_far, here.strata.of, 12, target)
        found = Curve(judged(), here.everything).recommend(target)
        hits.append(found.low <= truth <= found.high)
        assert found.point is not None
        widths.append(found.point.precision.high - found.point.precision.low)
        even = Curve(here.judged([20] * 12, chance), here.everything).recommend(target)
        assert even.point is not None
        plain.append(even.point.precision.high - even.point.precision.low)
    assert np.mean(hits) >= 0.93
    assert np.median(widths) < 0.8 * np.median(plain)


def test_ignoring_how_the_sample_was_drawn_gives_a_wrong_answer() -> None:
    here = world("clear")
    truth = here.truth(5.0)[0]
    weighted, plain = [], []
    for trial in range(100):
        judged = here.judged([25] * 12, np.random.default_rng(trial))
        weighted.append(judged.measures([5.0])[0].estimate[0])
        plain.append(judged.keep[judged.scores >= 5.0].mean())
    assert np.mean(weighted) == pytest.approx(truth, abs=0.01)
    assert np.mean(plain) > truth + 0.15  # the tails, where all are kept, count too much


# Against formulas worked out apart.


@given(
    st.lists(
        st.tuples(st.integers(30, 70), st.booleans(), st.integers(0, 2)), min_size=2, max_size=60
    ),
    st.integers(30, 70),
)
@settings(max_examples=100, deadline=None)
def test_estimates_are_scikit_learn_s_with_weights(
    labels: list[tuple[int, bool, int]], threshold: int
) -> None:
    scores = np.array([s / 10 for s, _, _ in labels])
    keep = np.array([k for _, k, _ in labels])
    strata = np.array([k for _, _, k in labels])
    rows = np.array([500, 40, 900])
    weights = (rows / np.maximum(np.bincount(strata, minlength=3), 1))[strata]
    judged = Judged(scores, keep.astype(float), strata, rows)
    there = scores >= np.float32(threshold / 10)
    found = judged.measures([threshold / 10])
    expected = [
        f(keep, there, sample_weight=weights, zero_division=np.nan)
        for f in (precision_score, recall_score, f1_score)
    ]
    for one, value in zip(found, expected, strict=True):
        if math.isnan(value):
            continue
        assert one.estimate[0] == pytest.approx(value)
        assert 0 <= one.low[0] <= one.estimate[0] + 1e-12
        assert one.estimate[0] - 1e-12 <= one.high[0] <= 1
    if 0 < keep.sum() < len(keep):
        area = judged.auc()
        assert area.estimate == pytest.approx(roc_auc_score(keep, scores, sample_weight=weights))
        assert 0 <= area.low <= area.estimate <= area.high <= 1


def test_a_plain_random_sample_has_wilson_s_own_interval() -> None:
    """One stratum, none of it used up: Wilson (1927), but for the smoothing."""
    keep = np.array([1.0] * 30 + [0.0] * 70)
    judged = Judged(np.full(100, 5.0), keep, np.zeros(100, int), np.array([10**9]))
    found = judged.base_rate()
    z, p, n = 1.959964, 0.3, 100
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert found.estimate == pytest.approx(0.3)
    assert found.low == pytest.approx(centre - half, abs=2e-3)
    assert found.high == pytest.approx(centre + half, abs=2e-3)


def test_nothing_is_uncertain_once_everything_is_labelled() -> None:
    here = world("clear", 400)
    judged = here.of(np.arange(400))
    for threshold in (4.5, 5.5):
        truth = here.truth(threshold)
        for found, value in zip(judged.measures([threshold]), truth, strict=True):
            assert found.low[0] == found.high[0] == pytest.approx(value)


def test_reviewers_who_differ_count_in_parts() -> None:
    judged = Judged(np.array([4.0, 6.0]), np.array([0.0, 0.5]), np.zeros(2, int), np.array([2]))
    precision, recall, _ = judged.measures([5.0])
    assert precision.estimate[0] == 0.5
    assert recall.estimate[0] == 1.0


@given(st.floats(-50, 50), st.floats(0.001, 40))
@settings(deadline=None)
def test_the_grid_is_round_and_spans_the_scores(low: float, width: float) -> None:
    grid = round_grid(low, low + width)
    step = grid[1] - grid[0] if len(grid) > 1 else 1.0
    assert grid[0] <= low + 1e-6
    assert low + width < grid[-1] + step + 1e-6
    assert len(grid) <= 403
    assert all(abs(t - float(f"{t:.12g}")) < 1e-12 for t in grid)


# From files.


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4,000 scores that mean something: a Parquet file, as any program could write."""
    here = world("clear", 4_000)
    path = tmp_path_factory.mktemp("calibrate") / "scores.parquet"
    table = {
        "image_id": [f"{i:05d}.jpg" for i in range(4_000)],
        "aesthetic_score": pa.array(here.scores, pa.float32()),
        "error": pa.nulls(4_000, pa.string()),
    }
    pq.write_table(pa.table(table), path)
    return path


def write_labels(
    path: Path, here: World, images: NDArray[np.int64], *, stratum: bool = True
) -> Path:
    lines = ["image_id,label,reviewer,labelled_at,aesthetic_score,stratum,stratum_rows"]
    names = here.strata.names
    for image in images:
        place = int(here.strata.of(here.scores[image]))
        drawn = f"{names[place]},{here.strata.rows[place]}" if stratum else ","
        said = "keep" if here.keep[image] else "drop"
        lines.append(f"{image:05d}.jpg,{said},ann,,{here.scores[image]:.6g},{drawn}")
    path.write_text("\n".join(lines) + "\n")
    return path


def some(here: World, each: int, seed: int = 0) -> NDArray[np.int64]:
    chance = np.random.default_rng(seed)
    return np.concatenate(
        [chance.choice(rows, min(each, len(rows)), replace=False) for rows in here.members]
    )


def test_the_command_prints_what_follows_and_the_next_command(
    scored: Path, tmp_path: Path, cli: Run
) -> None:
    here = world("clear", 4_000)
    labels = write_labels(tmp_path / "labels.csv", here, some(here, 25))
    ran = cli("calibrate", labels, "--scores", scored, "--target-precision", 0.8)
    assert ran.returncode == 0, ran.stderr
    assert "for precision 0.8: a threshold of" in ran.stdout
    last = ran.stdout.splitlines()[-1]
    assert last.startswith(f"next: aesthetic-filter filter {scored} --out kept --min-score ")
    threshold = float(last.split()[-1])
    kept = np.count_nonzero(here.scores >= np.float32(threshold))
    assert f"  keeps       {kept:,} images, {kept / 4_000:.1%}" in ran.stdout
    as_json = cli("calibrate", labels, "--scores", scored, "--target-precision", 0.8, "--json")
    found = json.loads(as_json.stdout)
    assert found["recommendation"]["threshold"] == threshold
    point = found["recommendation"]["point"]
    assert point["kept"] == kept
    assert point["precision"]["low"] <= here.truth(threshold)[0] <= point["precision"]["high"]
    assert abs(here.truth(threshold)[0] - 0.8) < 0.12
    assert found["labels"] == len(some(here, 25))


def test_a_share_to_keep_needs_no_estimate(scored: Path, tmp_path: Path) -> None:
    here = world("clear", 4_000)
    labels = write_labels(tmp_path / "labels.csv", here, some(here, 10))
    found = calibrate(read_labels(labels), af.open_scores(scored), Target("kept", 0.1))
    assert found.recommendation is not None
    assert found.recommendation.point is not None
    threshold = found.recommendation.threshold
    assert threshold == found.recommendation.low == found.recommendation.high
    assert 0.1 <= found.recommendation.point.share < 0.104


def test_labels_without_strata_are_weighted_by_score(scored: Path, tmp_path: Path) -> None:
    """A sample that takes far too many good ones, as people's own label files do."""
    here = world("clear", 4_000)
    errors = []
    for seed in range(20):
        chance = np.random.default_rng(seed)
        odds = np.exp(1.5 * here.scores)
        images = chance.choice(4_000, 250, replace=False, p=odds / odds.sum())
        labels = write_labels(tmp_path / f"{seed}.csv", here, images, stratum=False)
        judged, notes = judge(read_labels(labels), af.open_scores(scored))
        assert "do not say how their images were drawn" in notes[0]
        assert judged.weights.sum() == pytest.approx(4_000)
        errors.append(judged.base_rate().estimate - here.keep.mean())
        plain = here.keep[images].mean() - here.keep.mean()
        assert plain > 0.2
    assert abs(np.mean(errors)) < 0.04


def test_populations_are_counted_exactly(scored: Path) -> None:
    here, found = world("clear", 4_000), population(af.open_scores(scored))
    for threshold, count in zip(found.thresholds, found.rows_from, strict=True):
        assert count == np.count_nonzero(here.scores >= np.float32(threshold))
    assert found.rows == 4_000


def of(keep: list[int], scores: list[float], target: Target | None = None) -> Calibration:
    judged = Judged(
        np.array(scores), np.array(keep, float), np.zeros(len(keep), int), np.array([4_000])
    )
    return calibration(judged, world("clear", 4_000).everything, target, [], {})


def test_too_few_labels_are_called_too_few() -> None:
    found = of([1, 0] * 10, [5.5, 4.5] * 10)
    assert any("too few labels: 10 keep and 10 drop" in note for note in found.notes)
    enough = of([1, 0] * 30, [5.5, 4.5] * 30)
    assert not any("too few" in note for note in enough.notes)


def test_a_score_that_separates_nothing_is_called_that() -> None:
    chance = np.random.default_rng(1)
    found = of(list(chance.integers(0, 2, 300)), list(chance.normal(5, 0.7, 300)))
    assert found.separation.low <= 0.5 <= found.separation.high
    assert any("does not separate keep from drop" in note for note in found.notes)


@pytest.mark.parametrize("value", [0, 1])
def test_labels_that_are_all_alike_say_nothing(value: int) -> None:
    found = of([value] * 50, list(np.linspace(4, 6, 50)), Target("precision", 0.9))
    what = "keep" if value else "drop"
    assert any(f"all labels are {what}" in note for note in found.notes)
    assert str(found)
    json.dumps(found.as_dict(), allow_nan=False)


def test_a_target_out_of_reach_is_called_that() -> None:
    chance = np.random.default_rng(0)
    scores = chance.normal(5, 0.7, 300)
    keep = chance.random(300) < 0.3
    found = of(list(keep.astype(int)), list(scores), Target("precision", 0.95))
    assert found.recommendation is not None
    assert found.recommendation.threshold is None
    assert "for precision 0.95: no threshold reaches it" in str(found)


def test_more_labels_are_asked_for_by_the_square_of_the_width() -> None:
    here = world("clear")
    few = Curve(here.judged([20] * 12, np.random.default_rng(1)), here.everything)
    found = few.recommend(Target("precision", 0.8))
    assert found.more_labels is not None
    assert found.point is not None
    width = found.point.precision.high - found.point.precision.low
    assert found.more_labels == pytest.approx(240 * (width / 0.1) ** 2 - 240, abs=10)


@pytest.mark.parametrize("measure", ["precision", "recall", "kept"])
@pytest.mark.parametrize("value", [0.0, 1.0, 90.0, math.nan])
def test_a_target_is_a_share(measure: str, value: float) -> None:
    with pytest.raises(UsageError, match=r"between 0 and 1, such as 0\.9"):
        Target(measure, value)


@pytest.mark.parametrize(
    ("content", "arguments", "expected"),
    [
        ("image_id,rating\n00001.jpg,7\n", [], "from 7 to 7: say with --keep-from"),
        ("image_id,label\nother.jpg,keep\n", [], "no label is of an image in these scores"),
        ("image_id,label\n", [], "no label is of an image in these scores: there are none"),
        ("name,label\na,keep\n", [], "no column names the image"),
        ("image_id,label\n00001.jpg,maybe\n", [], "row 2: label is 'maybe'"),
        ("", [], "is empty"),
        (
            "image_id,label\n00001.jpg,keep\n",
            ["--target-precision", "0.9", "--target-recall", "0.9"],
            "give one target",
        ),
        ("image_id,label\n00001.jpg,keep\n", ["--keep-from", "3"], "goes with ratings"),
    ],
)
def test_mistakes_are_explained(
    scored: Path, tmp_path: Path, cli: Run, content: str, arguments: list[str], expected: str
) -> None:
    (tmp_path / "labels.csv").write_text(content)
    ran = cli("calibrate", "labels.csv", "--scores", scored, *arguments)
    assert ran.returncode == 2
    assert expected in ran.stderr
    assert "Traceback" not in ran.stderr


def test_ratings_become_labels(scored: Path, tmp_path: Path, cli: Run) -> None:
    here = world("clear", 4_000)
    images = some(here, 12)
    lines = [f"{i:05d}.jpg,{8 if here.keep[i] else 3}" for i in images]
    (tmp_path / "ratings.csv").write_text("image_id,rating\n" + "\n".join(lines) + "\n")
    ran = cli("calibrate", "ratings.csv", "--scores", scored, "--keep-from", 6, "--json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["keeps"] == np.count_nonzero(here.keep[images])


def test_labels_of_images_without_a_score_are_counted(scored: Path) -> None:
    labels = gather(
        [Label("00001.jpg", "keep"), Label("gone.jpg", "keep"), Label("00002.jpg", "drop")]
    )
    judged, notes = judge(labels, af.open_scores(scored))
    assert len(judged) == 2
    assert "labels of images without a score here: 1" in notes
