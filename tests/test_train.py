"""Training: known truths are found, and nothing is claimed that the rows do not show."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from aesthetic_filter.errors import MissingExtraError, UsageError, WidthError
from aesthetic_filter.heads import Head, load_head, save_head
from aesthetic_filter.heads.head import CLIP_VIT_L_14
from aesthetic_filter.interval import Interval
from aesthetic_filter.train import (
    STRENGTHS,
    Metrics,
    Training,
    assign_folds,
    compare,
    group_rows,
    train,
)

Make = Callable[..., NDArray[Any]]


@pytest.fixture(scope="session")
def reference() -> Head:
    return load_head()


def direction(seed: int) -> NDArray[np.float64]:
    return np.random.default_rng([7, seed]).standard_normal(768)


def standard(values: NDArray[Any]) -> NDArray[np.float64]:
    values = values.astype(np.float64)
    return (values - values.mean()) / values.std()


def along(vectors: NDArray[Any], weight: NDArray[Any]) -> NDArray[np.float64]:
    """Each row's standardised component along a direction."""
    unit = vectors.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    return standard(unit @ weight)


def rank_correlation(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float(spearmanr(a, b).statistic)


def weight_of(head: Head) -> NDArray[np.float64]:
    return head.layers[0][0][0].astype(np.float64)


def test_a_direction_is_recovered_from_5000_ratings(make_embeddings: Make, reference: Head) -> None:
    vectors, fresh = make_embeddings(5000), make_embeddings(3000, seed=1, dtype=np.float32)
    truth = direction(0)
    noise = np.random.default_rng(0).standard_normal(5000)
    ratings = 5 + along(vectors, truth) + 0.5 * noise
    made = train(vectors, ratings, range(5000), folds=4, name="mine", reference=reference)
    assert made.kind == "ridge"
    assert (made.rows, made.groups, made.folds, made.measure) == (5000, 5000, 4, "SRCC")
    found = rank_correlation(made.head.measure(fresh).scores, along(fresh, truth))
    assert found > 0.95
    # The best that held-out rows allow is 1 / sqrt(1 + 0.25) for Pearson's.
    assert 0.82 < made.ours.plcc.low < made.ours.plcc.estimate < made.ours.plcc.high < 0.9
    assert made.better.low > 0.5
    assert made.ours.auc is None
    assert made.reference.auc is None
    assert made.notes == ()
    assert abs(made.agreement) < 0.3
    # Ratings keep their scale.
    assert made.head.measure(fresh).scores.mean() == pytest.approx(5, abs=0.05)


@pytest.mark.parametrize("kind", ["ridge", "logistic"])
def test_200_labels_do_not_lose_what_the_reference_knows(
    make_embeddings: Make, reference: Head, kind: str
) -> None:
    gained = []
    for seed in range(6):
        vectors, fresh = make_embeddings(200, seed=seed), make_embeddings(2000, seed=100 + seed)

        def truth(x: NDArray[Any], seed: int = seed) -> NDArray[np.float64]:
            return along(x, weight_of(reference)) + along(x, direction(seed))

        targets = truth(vectors) + np.random.default_rng(seed).standard_normal(200)
        if kind == "logistic":
            targets = (targets > 0.5).astype(np.float64)
        made = train(
            vectors, targets, range(200), kind=kind, name="mine", reference=reference, seed=seed
        )
        ours, theirs = (h.measure(fresh).scores for h in (made.head, reference))
        gained.append(rank_correlation(ours, truth(fresh)) - rank_correlation(theirs, truth(fresh)))
    assert np.mean(gained) > 0
    assert min(gained) > -0.05


def test_a_reference_that_points_the_wrong_way_is_turned_round(
    make_embeddings: Make, reference: Head
) -> None:
    vectors, fresh = make_embeddings(200), make_embeddings(1000, seed=1)
    ratings = -along(vectors, weight_of(reference))
    made = train(vectors, ratings, range(200), name="mine", reference=reference)
    scores = made.head.measure(fresh).scores
    assert rank_correlation(scores, -along(fresh, weight_of(reference))) > 0.99
    assert made.agreement < -0.99
    assert made.reference.srcc.estimate < -0.99


@pytest.mark.parametrize("kind", ["ridge", "logistic"])
def test_targets_that_have_nothing_to_do_with_the_images_are_said_to(
    make_embeddings: Make, reference: Head, kind: str
) -> None:
    targets = np.random.default_rng(4).integers(0, 2, 400)
    vectors = make_embeddings(400)
    made = train(vectors, targets, range(400), kind=kind, name="mine", reference=reference)
    assert made.better.low <= 0
    assert any("reference head" in note and "keep using" in note for note in made.notes)
    assert any(note in str(made) for note in made.notes)


def test_copies_under_other_ids_do_not_leak(make_embeddings: Make, reference: Head) -> None:
    rng = np.random.default_rng(0)
    vectors = np.repeat(make_embeddings(150), 4, axis=0)
    labels = np.repeat(rng.integers(0, 2, 150), 4)  # by heart: all four copies tell
    made = train(vectors, labels, [f"copy {i}" for i in range(600)], name="m", reference=reference)
    assert made.kind == "logistic"
    assert (made.rows, made.groups) == (600, 150)
    assert made.ours.auc is not None
    assert made.ours.auc.low < 0.5 < made.ours.auc.high
    # Four copies are no more evidence than one: Hanley and McNeil's standard error is 0.047.
    assert made.ours.auc.high - made.ours.auc.low > 0.12


def test_rows_of_one_id_or_one_embedding_are_one_image(make_embeddings: Make) -> None:
    vectors = make_embeddings(6, dtype=np.float32)
    vectors[3] = 2 * vectors[0]  # the same, not normalised
    vectors[5] = vectors[1]
    groups = group_rows(vectors, ["a", "b", "c", "d", "d", "e"])
    # 0 and 3 are one picture, 3 and 4 one id: all three belong together.
    assert groups.tolist() == [0, 1, 2, 0, 0, 1]
    assert group_rows(vectors, ["a", "b", "c", "d", "d", "e"], np.array([4, 2, 3])).tolist() == [
        *(0, 1, 0),
    ]


@settings(max_examples=60, deadline=None)
@given(
    links=st.lists(st.tuples(st.integers(0, 14), st.integers(0, 14)), min_size=1, max_size=40),
)
def test_groups_are_what_ids_and_pictures_link(links: list[tuple[int, int]]) -> None:
    pictures = np.eye(15, 16)
    pictures[:, 15] = 1
    groups = group_rows(pictures[[p for p, _ in links]], [f"id {i}" for _, i in links])
    # The same by brute force: spread the smallest number until nothing changes.
    slow = list(range(len(links)))
    for _ in links:
        for i, (p, a) in enumerate(links):
            for j, (q, b) in enumerate(links):
                if p == q or a == b:
                    slow[i] = slow[j] = min(slow[i], slow[j])
    same = np.equal.outer(np.array(slow), np.array(slow))
    assert (np.equal.outer(groups, groups) == same).all()
    assert set(groups) == set(range(len(set(slow))))


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=3, max_size=60),
    folds=st.integers(3, 12),
    seed=st.integers(0, 2**32 - 1),
    labels=st.booleans(),
)
def test_groups_stay_whole_and_folds_alike(
    sizes: list[int], folds: int, seed: int, labels: bool
) -> None:
    folds = min(folds, len(sizes))
    groups = np.repeat(np.arange(len(sizes)), sizes)
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 2, len(groups)) if labels else rng.standard_normal(len(groups))
    targets = targets.astype(np.float64)
    fold = assign_folds(targets, groups, folds, seed)
    assert (fold == assign_folds(targets, groups, folds, seed)).all()
    assert set(fold) == set(range(folds))
    for group in range(len(sizes)):
        assert len(set(fold[groups == group])) == 1
    counts = [len(set(groups[fold == k])) for k in range(folds)]
    assert max(counts) - min(counts) <= 1


def test_each_fold_gets_its_share_of_a_rare_class() -> None:
    targets = np.zeros(1000)
    targets[:10] = 1
    fold = assign_folds(targets, np.arange(1000), 5, 0)
    assert np.bincount(fold[:10], minlength=5).tolist() == [2] * 5
    assert np.bincount(fold).tolist() == [200] * 5
    assert not (fold == assign_folds(targets, np.arange(1000), 5, 1)).all()


def test_ridge_is_the_closed_form(make_embeddings: Make, reference: Head) -> None:
    vectors = make_embeddings(900, dtype=np.float32)
    rng = np.random.default_rng(1)
    weights = rng.uniform(0.2, 3, 900)
    ratings = along(vectors, direction(1)) + along(vectors, weight_of(reference))
    ratings += rng.standard_normal(900)
    made = train(vectors, ratings, range(900), name="m", reference=reference, weights=weights)
    x = vectors.astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    design = np.column_stack((x, x @ weight_of(reference), np.ones(900)))
    w = weights / weights.mean()
    penalty = np.diag([*[made.strength] * 768, 0, 0])
    assert 0 < made.strength < np.inf
    theta = np.linalg.solve(design.T * w @ design + penalty, design.T @ (w * ratings))
    fresh = make_embeddings(100, seed=5, dtype=np.float32)
    y = fresh.astype(np.float64)
    y /= np.linalg.norm(y, axis=1, keepdims=True)
    expected = np.column_stack((y, y @ weight_of(reference), np.ones(100))) @ theta
    np.testing.assert_allclose(made.head.measure(fresh).scores, expected, atol=2e-5)


def test_fewer_rows_than_values_is_the_same_closed_form(
    make_embeddings: Make, reference: Head
) -> None:
    vectors = make_embeddings(300, dtype=np.float64)
    rng = np.random.default_rng(1)
    ratings = along(vectors, direction(1)) * 3 + rng.standard_normal(300) * 0.3
    made = train(vectors, ratings, range(300), name="m", reference=reference)
    assert 0 < made.strength < np.inf
    x = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    design = np.column_stack((x, x @ weight_of(reference), np.ones(300)))
    penalty = np.diag([*[made.strength] * 768, 0, 0])
    theta = np.linalg.solve(design.T @ design + penalty, design.T @ ratings)
    fresh = make_embeddings(100, seed=5, dtype=np.float64)
    y = fresh / np.linalg.norm(fresh, axis=1, keepdims=True)
    expected = np.column_stack((y, y @ weight_of(reference), np.ones(100))) @ theta
    np.testing.assert_allclose(made.head.measure(fresh).scores, expected, atol=5e-5)


def test_the_logistic_head_is_the_plain_one(make_embeddings: Make, reference: Head) -> None:
    vectors, fresh = make_embeddings(400), make_embeddings(500, seed=9)
    logit = along(vectors, direction(2)) * 3 + along(vectors, weight_of(reference))
    labels = (logit + np.random.default_rng(2).logistic(size=400) > 0).astype(np.float64)
    made = train(vectors, labels, range(400), name="m", reference=reference)
    assert 0 < made.strength < np.inf
    # Another solver, other coordinates, no reference to start from but a column of its scores.
    x = vectors.astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    features = np.column_stack((x - x.mean(0), 3 * along(vectors, weight_of(reference))))
    p = labels.mean()
    plain = LogisticRegression(C=1 / (made.strength * p * (1 - p)), tol=1e-8, max_iter=5000)
    plain.fit(features, labels)
    unit = fresh.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    slope = weight_of(reference) / (x @ weight_of(reference)).std()
    expected = unit @ (plain.coef_[0, :-1] + 3 * plain.coef_[0, -1] * slope)
    found = np.corrcoef(made.head.measure(fresh).scores, expected)[0, 1]
    assert found > 0.9999


def test_labels_give_scores_on_the_references_scale(make_embeddings: Make, reference: Head) -> None:
    vectors = make_embeddings(500)
    rng = np.random.default_rng(3)
    weights = rng.uniform(0.5, 2, 500)
    noisy = along(vectors, weight_of(reference)) + 0.5 * rng.standard_normal(500)
    made = train(vectors, noisy > 1, range(500), name="m", reference=reference, weights=weights)
    ours, theirs = (h.measure(vectors).scores.astype(np.float64) for h in (made.head, reference))
    means = [np.average(s, weights=weights) for s in (ours, theirs)]
    variances = [np.cov(s, aweights=weights) for s in (ours, theirs)]
    assert means[0] == pytest.approx(means[1], abs=1e-4)
    assert variances[0] == pytest.approx(variances[1], rel=1e-3)
    assert reference.name in made.head.provenance["scale"]


def test_several_reviewers_count_like_each_alone(make_embeddings: Make, reference: Head) -> None:
    vectors, fresh = make_embeddings(150), make_embeddings(200, seed=8)
    chance = 1 / (1 + np.exp(-2 * along(vectors, weight_of(reference))))
    reviews = np.random.default_rng(1).random((150, 4)) < chance[:, None]
    # With nothing but ids to tell that four rows are one image.
    apart = train(
        np.repeat(vectors, 4, axis=0),
        reviews.ravel(),
        np.repeat(np.arange(150), 4),
        kind="logistic",
        name="m",
        reference=reference,
        weights=np.full(600, 0.25),
    )
    mean = reviews.mean(axis=1)
    together = train(vectors, mean, range(150), kind="logistic", name="m", reference=reference)
    scores = [t.head.measure(fresh).scores for t in (apart, together)]
    assert rank_correlation(*scores) > 0.98
    assert together.groups == apart.groups == 150


@pytest.mark.parametrize("kind", ["ridge", "logistic"])
def test_weights_undo_a_biased_sample(kind: str) -> None:
    """One taste where x₀ > 0, another where not, and few rows of the latter in the sample."""
    rng = np.random.default_rng(6)
    vectors = rng.standard_normal((12000, 16))
    side = vectors[:, 0] > 0
    taken = np.flatnonzero(side | (rng.random(12000) < 0.1))
    targets = np.where(side, vectors[:, 1], vectors[:, 2]) + 0.2 * rng.standard_normal(12000)
    if kind == "logistic":
        targets = (targets > 0).astype(np.float64)
    layer = rng.standard_normal((1, 16)).astype(np.float32), np.zeros(1, np.float32)
    start = Head("start", "elsewhere", (layer,))

    def share_of_the_rare_taste(weights: NDArray[Any] | None) -> float:
        given = (vectors[taken], targets[taken], taken.tolist())
        made = train(*given, kind=kind, name="m", reference=start, weights=weights)
        first, second = weight_of(made.head)[1:3]
        return float(second / (first + second))

    # By symmetry half; in the sample, without weights, one row of eleven is of that taste.
    assert share_of_the_rare_taste(None) < 0.2
    assert share_of_the_rare_taste(np.where(side[taken], 1.0, 10.0)) == pytest.approx(0.5, abs=0.06)


def test_measures_are_scipys_and_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    y, w = rng.integers(0, 2, 300).astype(np.float64), rng.uniform(0.1, 2, 300)
    scores = np.round(y + rng.standard_normal(300), 1), rng.standard_normal(300)
    groups, one = np.arange(300), np.zeros(300, np.int64)
    ours, theirs, better = compare(scores, y, np.ones(300), groups, one, labels=True)
    assert ours.srcc.estimate == pytest.approx(rank_correlation(scores[0], y))
    assert theirs.plcc.estimate == pytest.approx(np.corrcoef(scores[1], y)[0, 1])
    aucs = [roc_auc_score(y, s) for s in scores]
    assert ours.auc is not None
    assert ours.auc.estimate == pytest.approx(aucs[0])
    assert better.estimate == pytest.approx(aucs[0] - aucs[1])
    weighted, _, _ = compare(scores, y, w, groups, one, labels=True)
    assert weighted.auc is not None
    assert weighted.auc.estimate == pytest.approx(roc_auc_score(y, scores[0], sample_weight=w))
    cov = np.cov(scores[0], y, aweights=w)
    expected = cov[0, 1] / np.sqrt(cov[0, 0] * cov[1, 1])
    assert weighted.plcc.estimate == pytest.approx(expected)


def test_a_weight_of_two_is_two_rows() -> None:
    rng = np.random.default_rng(0)
    y, scores = rng.integers(0, 5, 100).astype(np.float64), rng.integers(0, 9, 100) * 1.0
    twice = rng.integers(1, 3, 100)
    one = np.zeros(100, np.int64)
    made, _, _ = compare((scores, y), y, twice * 1.0, np.arange(100), one, labels=False)
    expected = rank_correlation(np.repeat(scores, twice), np.repeat(y, twice))
    assert made.srcc.estimate == pytest.approx(expected)


def test_each_fold_may_have_a_scale_of_its_own() -> None:
    rng = np.random.default_rng(0)
    y = rng.standard_normal(1000)
    fold = rng.integers(0, 5, 1000)
    scores = y * np.array([1, 3, 10, 0.1, 2])[fold] + np.array([0, 50, -7, 3, 1000])[fold]
    ours, _, _ = compare((scores, y), y, np.ones(1000), np.arange(1000), fold, labels=False)
    assert ours.srcc.estimate == pytest.approx(1)
    assert ours.plcc.estimate == pytest.approx(1)


def pairs_of_rows(images: int, rng: np.random.Generator) -> tuple[NDArray[Any], ...]:
    """Two rows for each image: groups, labels, and scores with a true AUC of Φ(1/√2) and of ½."""
    y = rng.integers(0, 2, images).astype(np.float64)
    scores = y + rng.standard_normal(images), rng.standard_normal(images)
    return tuple(np.repeat(a, 2) for a in (np.arange(images), y, *scores))


def test_intervals_cover() -> None:
    rng = np.random.default_rng(11)
    hits = np.zeros(3)
    for seed in range(100):
        groups, y, *scores = pairs_of_rows(60, rng)
        both = (scores[0], scores[1])
        fold = assign_folds(y, groups, 3, seed)
        ours, theirs, better = compare(both, y, np.ones(120), groups, fold, labels=True, seed=seed)
        assert ours.auc is not None
        known = ((ours.auc, 0.760250), (theirs.srcc, 0), (better, 0.260250))
        hits += [interval.low <= truth <= interval.high for interval, truth in known]
    # 95 ± 2.2; rows taken for independent of their copies would give 83.
    assert hits.min() >= 89


def test_many_rows_have_intervals_as_wide_as_theory_says() -> None:
    groups, y, *scores = pairs_of_rows(4000, np.random.default_rng(2))
    fold = assign_folds(y, groups, 3, 0)
    both = (scores[0], scores[1])
    ours, theirs, _ = compare(both, y, np.ones(8000), groups, fold, labels=True)
    # DeLong's standard error, of the images: how the classes' placements vary.
    kept, dropped = scores[0][::2][y[::2] == 1], np.sort(scores[0][::2][y[::2] == 0])
    above = np.searchsorted(dropped, kept) / len(dropped)
    below = 1 - np.searchsorted(np.sort(kept), dropped) / len(kept)
    error = np.sqrt(above.var() / len(kept) + below.var() / len(dropped))
    assert ours.auc is not None
    assert (ours.auc.high - ours.auc.low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.2)
    null = 1 / np.sqrt(4000 - 1)
    assert (theirs.srcc.high - theirs.srcc.low) / (2 * 1.96 * null) == pytest.approx(1, abs=0.2)


def test_a_saved_head_scores_the_same(
    make_embeddings: Make, reference: Head, tmp_path: Path
) -> None:
    vectors = make_embeddings(100)
    facts = {"source": "our own ratings", "licence": "CC0-1.0", "scale": "1 to 10"}
    ratings = along(vectors, direction(0))
    made = train(vectors, ratings, range(100), name="mine", reference=reference, **facts)
    save_head(made.head, tmp_path / "mine.safetensors")
    loaded = load_head(tmp_path / "mine.safetensors")
    assert (loaded.name, loaded.space, loaded.affine) == ("mine", CLIP_VIT_L_14, True)
    assert {key: loaded.provenance[key] for key in facts} == facts
    assert loaded.provenance["checkpoint"] == ""
    np.testing.assert_array_equal(loaded(vectors), made.head(vectors))


def test_the_same_seed_gives_the_same_result(make_embeddings: Make, reference: Head) -> None:
    vectors = make_embeddings(200)
    labels = along(vectors, direction(0)) > 0
    first, again, other = (
        train(vectors, labels, range(200), name="m", reference=reference, seed=seed)
        for seed in (1, 1, 2)
    )
    assert first.head.sha256 == again.head.sha256
    assert (first.ours, first.better, first.notes) == (again.ours, again.better, again.notes)
    assert first.ours != other.ours


def test_rows_that_cannot_be_used_are_left_out_and_counted(
    make_embeddings: Make, reference: Head
) -> None:
    vectors = make_embeddings(205, dtype=np.float32)
    ratings = along(vectors, direction(0))
    good = train(vectors[:200], ratings[:200], range(200), name="m", reference=reference)
    vectors[200, 5], vectors[201, 0], vectors[202] = np.nan, np.inf, 0
    ratings[203] = np.nan
    weights = np.ones(205)
    weights[204] = 0
    made = train(vectors, ratings, range(205), name="m", reference=reference, weights=weights)
    assert made.rows == 200
    assert made.notes[:3] == (
        "3 rows left out: no usable embedding (it holds NaN or infinity, or is all zeros)",
        "1 row left out: no target",
        "1 row left out: weight 0",
    )
    assert made.head.sha256 == good.head.sha256


def test_norms_and_dtypes_make_no_difference(make_embeddings: Make, reference: Head) -> None:
    exact, fresh = make_embeddings(200), make_embeddings(100, seed=3)
    ratings = along(exact, direction(0)) + along(exact, weight_of(reference))
    norms = np.random.default_rng(0).uniform(0.5, 30, (200, 1))
    scores = [
        train(x, ratings, range(200), name="m", reference=reference).head.measure(fresh).scores
        for x in (exact, exact.astype(np.float32), exact.astype(np.float64) * norms)
    ]
    np.testing.assert_allclose(scores[1], scores[0], atol=1e-5)
    np.testing.assert_allclose(scores[2], scores[0], atol=1e-5)


def test_a_head_of_another_width_and_a_constant_one() -> None:
    rng = np.random.default_rng(0)
    flat = Head("flat", "elsewhere", ((np.zeros((1, 8), np.float32), np.ones(1, np.float32)),))
    vectors = rng.standard_normal((300, 8))
    truth = along(vectors, np.arange(8.0))
    for targets in (truth, truth > 0):
        made = train(vectors, targets, range(300), name="m", reference=flat)
        assert made.head.space == "elsewhere"
        assert made.ours.srcc.estimate > 0.8
        assert made.reference.srcc.estimate == 0
        assert made.agreement == 0
    with pytest.raises(WidthError, match="8 values each"):
        train(vectors, truth, range(300), name="m", reference=load_head())


def test_few_labels_are_said_to_be_few(make_embeddings: Make, reference: Head) -> None:
    vectors = make_embeddings(40)
    labels = np.zeros(40)
    labels[:6] = 1
    made = train(vectors, labels, range(40), name="m", reference=reference)
    assert any("only 40 different images" in note for note in made.notes)
    assert any("only 6 images are kept" in note for note in made.notes)


def test_embeddings_of_another_encoder_are_pointed_out(reference: Head) -> None:
    vectors = np.random.default_rng(0).standard_normal((60, 768))
    made = train(vectors, vectors[:, 0], range(60), name="m", reference=reference)
    assert "60 of 60 rows do not look like OpenAI's CLIP ViT-L/14" in made.notes[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": np.ones(40)}, "the labels keep 40 images and drop 0: training needs at least"),
        ({"targets": np.full(40, 3.5)}, "all 40 ratings are 3.5"),
        ({"targets": np.arange(39)}, "there are 40 embeddings but 39 targets"),
        ({"targets": ["good"] * 40}, "targets must be numbers"),
        ({"targets": [np.inf] * 40}, "targets must be finite: row 0"),
        ({"targets": np.arange(40), "kind": "logistic"}, "one is 2: if these are ratings"),
        ({"kind": "forest"}, "trained as 'ridge' or 'logistic', not 'forest'"),
        ({"ids": range(39)}, "there are 40 embeddings but 39 ids"),
        ({"ids": [i % 7 for i in range(40)]}, "40 usable rows of 7 different images are too few"),
        ({"weights": np.ones(3)}, "there are 40 embeddings but 3 weights"),
        ({"weights": -np.ones(40)}, "weights must be 0 or more: row 0 has -1"),
        ({"weights": np.zeros(40)}, "0 usable rows of 0 different images are too few"),
        ({"folds": 2}, "at least 3 folds, not 2"),
        ({"folds": 41}, "with 41 folds needs at least 41"),
        ({"embeddings": np.ones(768)}, r"embeddings must be \(rows, 768\)"),
        ({"embeddings": np.ones((40, 512))}, "512 values each .*ViT-B/32"),
    ],
)
def test_what_cannot_be_trained_says_so_in_a_line(
    make_embeddings: Make, reference: Head, change: dict[str, Any], message: str
) -> None:
    given = {
        "embeddings": make_embeddings(40),
        "targets": np.arange(40) % 2,
        "ids": range(40),
        "name": "m",
        "reference": reference,
        **change,
    }
    with pytest.raises((UsageError, WidthError), match=message) as caught:
        train(**given)
    assert "\n" not in str(caught.value)


def test_a_head_with_layers_is_no_start(make_embeddings: Make) -> None:
    pair = np.eye(768, dtype=np.float32), np.zeros(768, np.float32)
    last = np.ones((1, 768), np.float32), np.zeros(1, np.float32)
    layered = Head("layered", CLIP_VIT_L_14, (pair, last))
    with pytest.raises(UsageError, match="'layered' has layers with ReLU"):
        train(make_embeddings(40), np.arange(40), range(40), name="m", reference=layered)


def test_without_scikit_learn_the_extra_is_named(
    make_embeddings: Make, reference: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match="scikit-learn") as caught:
        train(make_embeddings(40), np.arange(40), range(40), name="m", reference=reference)
    assert caught.value.install == 'pip install "aesthetic-filter[learn]"'


def test_a_training_reads_as_a_short_table() -> None:
    half, more = Interval(0.5, 0.45, 0.55), Interval(0.75, 0.7, 0.8)
    layer = np.ones((1, 768), np.float32), np.zeros(1, np.float32)
    made = Training(
        head=Head("mine", CLIP_VIT_L_14, (layer,)),
        kind="logistic",
        rows=1200,
        groups=1150,
        folds=5,
        strength=STRENGTHS[0],
        agreement=0.5,
        ours=Metrics(half, half, more),
        reference=Metrics(half, half, half),
        measure="AUC",
        better=Interval(0.25, 0.2, 0.3),
        notes=("a note",),
    )
    lines = str(made).splitlines()
    assert len(lines) == 7
    assert "1,200 keep/drop labels of 1,150 different images" in lines[0]
    assert "no correction" in lines[0]
    assert lines[4].split("  ")[0] == "AUC"
    assert "0.750 (0.700 to 0.800)" in lines[4]
    assert "0.250 (0.200 to 0.300)" in lines[5]
    assert lines[6] == "a note"
    assert len(str(dataclasses.replace(made, ours=Metrics(half, half, None))).splitlines()) == 6
    assert max(map(len, lines[1:])) < 100
