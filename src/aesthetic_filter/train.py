"""A head of one's own: from ratings, or from keep and drop, and CLIP embeddings.

The new head starts from a reference head. With x the L2-normalised embedding and r(x) the
reference head's score, it is

    score(x) = a + b r(x) + d·x,

where the correction d is penalised by its squared length, while a and b are free (b all but free
for labels). So few labels give the reference head recalibrated, many give a direction of their
own, and a reference head that knows nothing about these targets gets b near 0. All of it is affine
in x: the result is one vector and one bias.

How strongly d is held back is chosen by cross-validation within whatever rows a head is fitted on:
the rows that a fold's head is measured on took no part in its fit, nor in that choice.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import warnings
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from aesthetic_filter.errors import MissingExtraError, UsageError
from aesthetic_filter.heads.head import Head, wrong_width
from aesthetic_filter.interval import Interval

Kind = Literal["ridge", "logistic"]
F64 = NDArray[np.float64]
Ints = NDArray[np.int64]

STRENGTHS = (math.inf, *(float(10 ** (half / 2)) for half in range(6, -5, -1)))
"""What the correction's squared length may weigh against a row's squared error, strongest first.

Rows have unit norm and weights a mean of 1, so the same numbers serve any number of rows: a
correction that explains as much as the noise leaves wants a strength near 1 (noise variance over
the variance of a coefficient). Infinity allows no correction.
"""

MIN_GROUPS = 20
MIN_OF_A_CLASS = 5
"""Fewer could all lie in two folds, and then a fit within the rest would know one class only."""

FEW_GROUPS = 50
FEW_OF_A_CLASS = 10

BOOTSTRAPS = 1000
BOOTSTRAP_ROWS = 5000
JACKKNIFE_BLOCKS = 200
"""Up to so many rows intervals are bootstrapped; beyond that, blocks are left out in turn."""

_BLOCK = 4096  # rows whose float64 copies are made at a time
_LARGE = 2**24  # values from which a matrix is kept in float32
_FREE = 3.0  # the reference's coefficient is penalised 1 / _FREE² as much as the correction's


@dataclass(frozen=True)
class Metrics:
    """How well scores agree with the targets of rows that they were not fitted on.

    Attributes:
        srcc: Spearman's rank correlation.
        plcc: Pearson's correlation.
        auc: how often a kept row scores above a dropped one; None for ratings.
    """

    srcc: Interval
    plcc: Interval
    auc: Interval | None


@dataclass(frozen=True)
class Training:
    """A trained head, and what is known about it.

    Attributes:
        head: fitted on all rows that were used.
        kind: ``ridge`` for ratings, ``logistic`` for keep and drop.
        rows: how many rows were used.
        groups: how many of them are different images.
        folds: how many folds the rows were split into.
        strength: how strongly the correction was held back, one of :data:`STRENGTHS`.
        agreement: the correlation of the new head's scores with the reference head's over the rows
            used: 1 where it only recalibrates it, near 0 where it has nothing to do with it.
        ours: the new head on held-out rows.
        reference: the reference head on the same rows.
        measure: what ``better`` compares, ``SRCC`` or ``AUC``.
        better: the new head's measure less the reference head's, on the same rows.
        notes: what to know before it is used, in plain sentences.
    """

    head: Head
    kind: Kind
    rows: int
    groups: int
    folds: int
    strength: float
    agreement: float
    ours: Metrics
    reference: Metrics
    measure: Literal["SRCC", "AUC"]
    better: Interval
    notes: tuple[str, ...]

    def __str__(self) -> str:
        what = "ratings" if self.kind == "ridge" else "keep/drop labels"
        strength = "no correction" if math.isinf(self.strength) else f"strength {self.strength:.3g}"
        lines = [
            f"{self.head.name}: {self.rows:,} {what} of {self.groups:,} different images, "
            f"{self.folds} folds, {strength}, correlation {self.agreement:.2f} with the reference",
            f"{'held-out rows, 95 %':<24}{'this head':<26}reference head",
        ]
        for label, mine, theirs in (
            ("SRCC", self.ours.srcc, self.reference.srcc),
            ("PLCC", self.ours.plcc, self.reference.plcc),
            ("AUC", self.ours.auc, self.reference.auc),
        ):
            if mine is not None:
                lines.append(f"{label:<24}{mine!s:<26}{theirs}")
        lines.append(f"{self.measure + ' gained':<24}{self.better}")
        return "\n".join((*lines, *self.notes))


def train(
    embeddings: ArrayLike,
    targets: ArrayLike,
    ids: Sequence[Hashable],
    *,
    kind: str | None = None,
    name: str,
    reference: Head,
    weights: ArrayLike | None = None,
    folds: int = 5,
    seed: int = 0,
    scale: str = "",
    source: str = "",
    licence: str = "",
) -> Training:
    """Train a head, and measure it and the reference head on held-out rows.

    Args:
        embeddings: (N, width of the reference head) float16, float32 or float64; rows need not be
            normalised. Rows that hold NaN or infinity, or are all zeros, are left out and counted.
        targets: (N,) ratings, or for each row how much of it to keep: 0, 1, or the mean of several
            reviewers. NaN where there is none; such rows are left out and counted.
        ids: N names of the images. Rows of one id, and rows of one embedding, stay in one fold.
        kind: ``ridge`` fits ratings, ``logistic`` keep and drop; default: ``logistic`` where the
            targets are all 0 or 1.
        name: what to call the head.
        reference: the head to start from, to compare with; affine.
        weights: (N,) how many rows of the collection each stands for, in any unit; default: all
            alike. They count in the fit and in the measures. Rows of weight 0 are left out.
        folds: how many; at least 3.
        seed: of the folds and of the intervals; the same seed gives the same result.
        scale: what the scores mean, for the head's provenance; default: a sentence on that. Ratings
            keep their scale. For labels, the log-odds are mapped so that their mean and standard
            deviation over the rows are the reference head's.
        source: where the targets come from, for the head's provenance.
        licence: theirs, likewise.

    Raises:
        MissingExtraError: scikit-learn is not installed.
        UsageError: too few rows, one class only, arrays that do not fit together, and the like.
        WidthError: the embeddings have another width than the reference head's.
        TypeError: the embeddings are not floating-point.
    """
    _need_scikit_learn()
    vectors = np.asarray(embeddings)
    _check_vectors(vectors, ids, reference, folds)
    wanted = _column(targets, len(vectors), "targets")
    weighing = np.ones(len(vectors)) if weights is None else _checked_weights(weights, len(vectors))
    chosen = _checked_kind(kind, wanted)
    measured = reference.measure(vectors)
    used, notes = _usable(measured.failed, wanted, weighing)
    notes += _foreign(reference, measured.cosines[used])
    y, w = wanted[used], weighing[used] / weighing[used].mean() if len(used) else weighing[used]
    groups = group_rows(vectors, ids, used)
    _check_groups(y, groups, chosen, folds)
    fold = assign_folds(y, groups, folds, seed)

    rows = _prepare(vectors, used, y, w, fold, reference)
    heads, strength = _fit_all(rows, chosen, folds)
    scores = _scores(rows, np.array([_folded(rows, theta, reference) for theta in heads]))
    held_out, final = scores[np.arange(len(y)), fold], scores[:, -1]
    ours, theirs, better = compare(
        (held_out, rows.reference), y, w, groups, fold, labels=chosen == "logistic", seed=seed
    )
    vector = _folded(rows, heads[-1], reference)
    if chosen == "logistic":
        vector = _moved(vector, final, rows.reference, w)
    notes += _few(y, groups, chosen) + _verdict(better, strength, reference)
    facts = {"scale": scale or _scale(chosen, y, reference), "source": source, "licence": licence}
    layer = (vector[None, :-1].astype(np.float32), vector[-1:].astype(np.float32))
    return Training(
        head=Head(name, reference.space, (layer,), facts),
        kind=chosen,
        rows=len(y),
        groups=_groups(groups),
        folds=folds,
        strength=strength,
        agreement=float(_correlation(final, rows.reference, w)),
        ours=ours,
        reference=theirs,
        measure="AUC" if chosen == "logistic" else "SRCC",
        better=better,
        notes=tuple(notes),
    )


def group_rows(embeddings: NDArray[Any], ids: Sequence[Hashable], rows: Ints | None = None) -> Ints:
    """Number the different images: rows of one id, or of one embedding, are one image.

    Two embeddings are one where they are the same after normalisation and rounding to float16; what
    is linked through others belongs together too.

    Args:
        embeddings: (N, D) floating-point, finite and not all zeros in the rows looked at.
        ids: N hashable names.
        rows: (M,) which rows to look at; default: all.

    Returns:
        (M,) int64, the image of each row: 0, 1, ... in the order in which they come.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    rows = np.arange(len(embeddings)) if rows is None else rows
    seen: dict[bytes, int] = {}
    named: dict[Hashable, int] = {}
    picture, name = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
    for part in _blocks(len(rows)):
        # + 0.0 makes one zero of the two.
        rounded = _unit_rows(embeddings, rows[part]).astype(np.float16) + np.float16(0)
        for at, row, vector in zip(range(part.start, part.stop), rows[part], rounded, strict=True):
            digest = hashlib.blake2b(vector.tobytes(), digest_size=16).digest()
            picture[at] = seen.setdefault(digest, len(seen))
            name[at] = named.setdefault(ids[row], len(named))
    size = len(seen) + len(named)
    links = coo_array((np.ones(len(rows)), (picture, len(seen) + name)), shape=(size, size))
    _, found = connected_components(links, directed=False)
    groups: Ints = found[picture].astype(np.int64)
    return groups


def assign_folds(targets: F64, groups: Ints, folds: int, seed: int) -> Ints:
    """Split rows into folds, whole groups at a time, with much the same targets in each.

    Groups are taken in the order of their mean target, ``folds`` at a time (ties in random order);
    each of these goes to another fold, the largest to the fold with the fewest rows so far.

    Args:
        targets: (N,) float64.
        groups: (N,) int64, 0 to the number of groups less one.
        folds: how many; no more than there are groups.
        seed: of the order.

    Returns:
        (N,) int64, each row's fold; none is empty.
    """
    sizes = np.bincount(groups)
    means = np.bincount(groups, targets) / sizes
    shuffled = np.random.default_rng(seed).permutation(len(sizes))
    order = shuffled[np.argsort(means[shuffled], kind="stable")]
    load = np.zeros(folds, np.int64)
    fold_of = np.empty(len(sizes), np.int64)
    for start in range(0, len(order), folds):
        some = order[start : start + folds]
        some = some[np.argsort(-sizes[some], kind="stable")]
        into = np.argsort(load, kind="stable")[: len(some)]
        fold_of[some] = into
        load[into] += sizes[some]
    assigned: Ints = fold_of[groups]
    return assigned


def compare(
    scores: tuple[F64, F64],
    targets: F64,
    weights: F64,
    groups: Ints,
    fold: Ints,
    *,
    labels: bool,
    seed: int = 0,
) -> tuple[Metrics, Metrics, Interval]:
    """Measure two heads' scores on the same rows.

    Each measure is computed within every fold and averaged over the folds, so that it makes no
    difference that each fold was scored by another fit. Correlations count by the fold's weight,
    AUC by its pairs of a kept and a dropped row. Spearman's is Pearson's of the weighted mid-ranks;
    a row of target t counts for AUC as t kept and 1 - t dropped.

    The intervals resample groups within folds: percentiles of the bootstrap; for more than
    :data:`BOOTSTRAP_ROWS` rows the normal interval with the standard error of the jackknife over
    blocks of groups. They speak of the rows measured on, not of another draw of rows to train on.

    Args:
        scores: two of (N,) float64.
        targets: (N,) float64; from 0 to 1 where ``labels``.
        weights: (N,) float64, positive.
        groups: (N,) int64, 0 to the number of groups less one.
        fold: (N,) int64, one for each group.
        labels: whether the targets are keep and drop: then AUC is measured, and compared.
        seed: of the resampling.

    Returns:
        The measures of either, and the first's AUC (or SRCC) less the second's.
    """
    together = _together(scores, targets, weights, fold, np.ones((1, _groups(groups))), groups)
    small = len(targets) <= BOOTSTRAP_ROWS
    many = (_bootstrap if small else _jackknife)(groups, fold, seed)
    values = _together(scores, targets, weights, fold, many, groups)
    limits = _percentiles if small else _normal_limits

    def interval(estimate: F64, replicates: F64, bounds: tuple[float, float]) -> Interval:
        low, high = np.clip(limits(estimate, replicates), *bounds)
        return Interval(float(estimate[0]), float(low), float(high))

    def metrics(head: int) -> Metrics:
        srcc, plcc = (interval(together[head, m], values[head, m], (-1, 1)) for m in (0, 1))
        auc = interval(together[head, 2], values[head, 2], (0, 1)) if labels else None
        return Metrics(srcc, plcc, auc)

    main = 2 if labels else 0
    gained = interval(
        together[0, main] - together[1, main], values[0, main] - values[1, main], (-2, 2)
    )
    return metrics(0), metrics(1), gained


@dataclass(frozen=True, eq=False)
class _Rows:
    """The rows to learn from, and how a block of them becomes a block of features.

    Attributes:
        vectors: (all rows, D), as given.
        used: (N,) which of them.
        targets: (N,) float64.
        weights: (N,) float64 with a mean of 1.
        fold: (N,) int64.
        reference: (N,) float64, the reference head's scores.
        mean: their mean.
        spread: their standard deviation; 1 where that is 0.
        basis: (D, R), orthonormal, its columns span the rows. The best correction lies in their
            span, so this changes nothing but the work where there are fewer rows than values.
        centre: (R,) the mean of the rows in that basis.
    """

    vectors: NDArray[Any]
    used: Ints
    targets: F64
    weights: F64
    fold: Ints
    reference: F64
    mean: float
    spread: float
    basis: F64 | None
    centre: F64

    def features(self, part: slice | Ints) -> F64:
        """(n, R + 1): the centred rows, then the reference's standardised score."""
        x = _unit_rows(self.vectors, self.used[part])
        x = x if self.basis is None else x @ self.basis
        score = (self.reference[part] - self.mean) / self.spread
        return np.column_stack((x - self.centre, score))


def _prepare(
    vectors: NDArray[Any], used: Ints, y: F64, w: F64, fold: Ints, reference: Head
) -> _Rows:
    width = vectors.shape[1]
    basis = np.linalg.qr(_unit_rows(vectors, used).T)[0] if len(used) < width else None
    weight, bias = _vector(reference)
    scores, total = np.empty(len(used)), np.zeros(width)
    for part in _blocks(len(used)):
        x = _unit_rows(vectors, used[part])
        scores[part] = x @ weight + bias
        total += w[part] @ x
    mean, spread = _moments(scores, w)
    centre = total / w.sum()
    centre = centre if basis is None else centre @ basis
    return _Rows(vectors, used, y, w, fold, scores, mean, spread or 1.0, basis, centre)


def _fit_all(rows: _Rows, kind: Kind, folds: int) -> tuple[list[F64], float]:
    """The coefficients fitted without each fold, then those of all rows, and their strength.

    Coefficients are (R + 2,): the correction, the reference's, the intercept.
    """
    grams = np.stack([_gram(rows, np.flatnonzero(rows.fold == k)) for k in range(folds)])
    strengths = _strengths(grams)
    training = [np.flatnonzero(rows.fold != k) for k in range(folds)] + [np.arange(len(rows.used))]
    gram = grams.sum(axis=0)
    sums = [*(gram - one for one in grams), gram]
    fitted = [_ridge(one, (s,))[0] for one, s in zip(sums, strengths, strict=True)]
    if kind == "logistic":
        matrix = _matrix(rows)
        fitted = [
            _logistic(rows, matrix, train, s, one, theta)
            for train, s, one, theta in zip(training, strengths, sums, fitted, strict=True)
        ]
    return fitted, strengths[-1]


def _gram(rows: _Rows, members: Ints) -> F64:
    """The weighted products of [features, 1, target] with one another: (R + 3, R + 3)."""
    width = len(rows.centre) + 3
    total = np.zeros((width, width))
    for part in _blocks(len(members)):
        some = members[part]
        block = np.column_stack((rows.features(some), np.ones(len(some)), rows.targets[some]))
        block *= np.sqrt(rows.weights[some])[:, None]
        total += block.T @ block
    return total


def _ridge(gram: F64, strengths: Sequence[float]) -> F64:
    """Least squares with the correction held back: (number of strengths, R + 2) coefficients.

    The free coefficients, of the reference and the intercept, are eliminated first (Frisch, Waugh
    and Lovell); one eigendecomposition of what is left then serves every strength.
    """
    size = gram[-2, -2]
    means = gram[-2] / size
    centred = gram - size * np.outer(means, means)
    own = centred[:-3, -3]  # of each feature with the reference's score
    along = centred[-3, -3]
    slope = own / along if along > 1e-12 * size else np.zeros_like(own)
    rest = centred[:-3, :-3] - np.outer(slope, own)
    right = centred[:-3, -1] - slope * centred[-3, -1]
    values, vectors = np.linalg.eigh(rest)
    held = np.maximum(values, 0)[:, None] + np.asarray(strengths)
    correction = ((vectors.T @ right)[:, None] / held).T @ vectors.T
    trust = (centred[-3, -1] - correction @ own) / along if along > 1e-12 * size else 0.0
    trust = np.broadcast_to(trust, len(strengths))
    intercept = means[-1] - correction @ means[:-3] - trust * means[-3]
    return np.column_stack((correction, trust, intercept))


def _strengths(grams: F64) -> list[float]:
    """The strength to fit each fold's training rows with, then the one for all rows.

    Each is chosen by leaving out the training rows' own folds in turn; the strongest of equals.
    Labels are treated as numbers here: the first step of the logistic fit is just this least
    squares problem, its strength divided by the labels' variance.
    """
    folds, everything = len(grams), grams.sum(axis=0)
    loss = np.zeros((folds, folds, len(STRENGTHS)))
    for k in range(folds):
        for j in range(k + 1):
            rest = everything - grams[k] - (grams[j] if j != k else 0)
            theta = _ridge(rest, STRENGTHS)
            loss[k, j], loss[j, k] = _errors(grams[j], theta), _errors(grams[k], theta)
    alone = np.arange(folds)
    whole = loss[alone, alone].sum(axis=0)
    loss[alone, alone] = 0
    best = [int(np.argmin(row)) for row in (*loss.sum(axis=1), whole)]
    return [STRENGTHS[at] for at in best]


def _errors(gram: F64, theta: F64) -> F64:
    """The sum of squared errors of each row of coefficients, from the products alone."""
    signed = np.column_stack((theta, -np.ones(len(theta))))
    errors: F64 = np.einsum("si,si->s", signed @ gram, signed)
    return errors


def _matrix(rows: _Rows) -> NDArray[Any]:
    """The features of all rows: float32 where they are many; the reference's all but free."""
    shape = (len(rows.used), len(rows.centre) + 1)
    matrix = np.empty(shape, np.float32 if math.prod(shape) > _LARGE else np.float64)
    for part in _blocks(len(rows.used)):
        matrix[part] = rows.features(part)
    matrix[:, -1] *= _FREE
    return matrix


def _logistic(
    rows: _Rows, matrix: NDArray[Any], train: Ints, strength: float, gram: F64, start: F64
) -> F64:
    """The coefficients (R + 2,) of the log-odds; a label between 0 and 1 counts as both.

    ``start`` is the least squares solution, from which the log-odds are near: it divides by the
    labels' variance p (1 - p), as the strength is multiplied by it.
    """
    from sklearn.linear_model import LogisticRegression

    y, w = rows.targets[train], rows.weights[train]
    both = (y > 0) & (y < 1)
    label = np.concatenate((y > 0, np.zeros(np.count_nonzero(both), np.bool_)))
    weight = np.concatenate((np.where(y > 0, w * y, w), (w * (1 - y))[both]))
    again = np.concatenate((train, train[both]))
    first = matrix.shape[1] - 1 if math.isinf(strength) else 0
    x = matrix[again, first:]

    p = float(gram[-1, -2] / gram[-2, -2])
    penalty = 1.0 if math.isinf(strength) else strength * p * (1 - p)
    near = start / (p * (1 - p))
    # The mean gradient that is small enough: of many rows it is not known any better than that.
    tol = 1e-4 if matrix.dtype == np.float64 else 1e-3
    model = LogisticRegression(C=1 / penalty, solver="newton-cholesky", tol=tol, warm_start=True)
    model.coef_ = near[None, first:-1] / np.append(np.ones(len(near) - 2 - first), _FREE)
    model.intercept_ = np.array([math.log(p / (1 - p)) + (start[-1] - p) / (p * (1 - p))])
    with warnings.catch_warnings():
        # Where the solver must take another way, or stops short of the last digits, the fit is
        # still a fit: how good it is shows on the held-out rows.
        warnings.simplefilter("ignore")
        model.fit(x, label, sample_weight=weight)
    theta = np.zeros(matrix.shape[1] + 1)
    theta[first:-1] = model.coef_[0]
    theta[-2] *= _FREE
    theta[-1] = model.intercept_[0]
    return theta


def _folded(rows: _Rows, theta: F64, reference: Head) -> F64:
    """Coefficients as one vector in the normalised embedding and, last, a bias: (D + 1,)."""
    correction, trust, intercept = theta[:-2], theta[-2] / rows.spread, theta[-1]
    weight, bias = _vector(reference)
    own = correction if rows.basis is None else rows.basis @ correction
    constant = intercept - rows.centre @ correction + trust * (bias - rows.mean)
    return np.append(own + trust * weight, constant)


def _scores(rows: _Rows, vectors: F64) -> F64:
    """(N, number of vectors) scores of the rows, by vectors as :func:`_folded` gives them."""
    out = np.empty((len(rows.used), len(vectors)))
    for part in _blocks(len(rows.used)):
        x = _unit_rows(rows.vectors, rows.used[part])
        out[part] = x @ vectors[:, :-1].T + vectors[:, -1]
    return out


def _moved(vector: F64, scores: F64, onto: F64, weights: F64) -> F64:
    """The vector whose scores have the mean and the spread of ``onto`` instead."""
    (mean, spread), (new_mean, new_spread) = _moments(scores, weights), _moments(onto, weights)
    moved = vector * (new_spread / spread if spread else 0.0)
    moved[-1] += new_mean - (mean * new_spread / spread if spread else 0.0)
    return moved


def _vector(head: Head) -> tuple[F64, float]:
    weight, bias = head.layers[0]
    return weight[0].astype(np.float64), float(bias[0])


def _moments(values: F64, weights: F64) -> tuple[float, float]:
    mean = float(np.average(values, weights=weights))
    return mean, math.sqrt(np.average((values - mean) ** 2, weights=weights))


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, min(start + _BLOCK, count)) for start in range(0, count, _BLOCK))


def _unit_rows(vectors: NDArray[Any], which: Ints) -> F64:
    """Some rows as float64 of unit norm; the largest value first, lest its square overflow."""
    x = vectors[which].astype(np.float64)
    x /= np.abs(x).max(axis=1, keepdims=True)
    x /= np.sqrt(np.einsum("ij,ij->i", x, x))[:, None]
    return x


def _together(scores: tuple[F64, F64], y: F64, w: F64, fold: Ints, many: F64, groups: Ints) -> F64:
    """SRCC, PLCC and AUC of two heads, averaged over folds: (2, 3, B).

    ``many`` is (B, groups): how often each group counts in each replicate.
    """
    total, sizes = np.zeros((2, 3, len(many))), np.zeros((3, len(many)))
    for k in range(int(fold.max()) + 1):
        rows = np.flatnonzero(fold == k)
        step = max(1, 4_000_000 // len(rows))
        for start in range(0, len(many), step):
            part = slice(start, start + step)
            weights = w[rows] * many[part, groups[rows]]
            values, size = _within([s[rows] for s in scores], y[rows], weights)
            total[:, :, part] += values * size
            sizes[:, part] += size
    with np.errstate(invalid="ignore"):
        averaged: F64 = total / sizes
    return averaged


def _within(scores: list[F64], y: F64, weights: F64) -> tuple[F64, F64]:
    """(2, 3, B) measures within one fold for (B, n) weights, and (3, B) how much they count."""
    kept, dropped = weights * y, weights * (1 - y)
    pairs = kept.sum(axis=1) * dropped.sum(axis=1)
    ranks = _midranks(y, weights)
    values = np.empty((2, 3, len(weights)))
    for head, score in enumerate(scores):
        values[head, 0] = _correlation(_midranks(score, weights), ranks, weights)
        values[head, 1] = _correlation(score, y, weights)
        won = (kept * _midranks(score, dropped)).sum(axis=1)
        values[head, 2] = won / np.where(pairs > 0, pairs, 1)
    size = weights.sum(axis=1) * (_spread(y, weights) > 0)
    return values, np.stack((size, size, pairs))


def _midranks(values: F64, weights: F64) -> F64:
    """For (B, n) weights, the weight below each value and half of the weight at it: (B, n)."""
    order = np.argsort(values, kind="stable")
    new = np.append(True, np.diff(values[order]) > 0)
    at = np.add.reduceat(weights[:, order], np.flatnonzero(new), axis=1)
    middle = np.cumsum(at, axis=1) - at / 2
    place = np.empty(len(values), np.int64)
    place[order] = np.cumsum(new) - 1
    ranks: F64 = middle[:, place]
    return ranks


def _correlation(a: F64, b: F64, weights: F64) -> F64:
    """Pearson's weighted correlation over the last axis; 0 where either is constant."""
    a, b = (x - _mean(x, weights)[..., None] for x in (a, b))
    both = np.sqrt(_spread(a, weights) * _spread(b, weights))
    covariance = (weights * a * b).sum(axis=-1)
    found: F64 = np.where(both > 0, covariance / np.where(both > 0, both, 1), 0.0)
    return found


def _spread(a: F64, weights: F64) -> F64:
    """The weighted sum of squares about the mean; 0, not rounding dust, where ``a`` is constant."""
    squares = (weights * (a - _mean(a, weights)[..., None]) ** 2).sum(axis=-1)
    dust = 1e-24 * (weights * a**2).sum(axis=-1)
    found: F64 = np.where(squares > dust, squares, 0.0)
    return found


def _mean(a: F64, weights: F64) -> F64:
    size = weights.sum(axis=-1)
    mean: F64 = (weights * a).sum(axis=-1) / np.where(size > 0, size, 1)
    return mean


def _bootstrap(groups: Ints, fold: Ints, seed: int) -> F64:
    """(BOOTSTRAPS, groups) float64: how often each group is drawn, fold by fold."""
    rng = np.random.default_rng([seed, 1])
    drawn = np.zeros((BOOTSTRAPS, _groups(groups)))
    for k in range(int(fold.max()) + 1):
        members = np.unique(groups[fold == k])
        share = np.full(len(members), 1 / len(members))
        drawn[:, members] = rng.multinomial(len(members), share, size=BOOTSTRAPS)
    return drawn


def _jackknife(groups: Ints, fold: Ints, seed: int) -> F64:
    """(JACKKNIFE_BLOCKS, groups) float64: all groups but a random block of them, block by block."""
    del fold  # blocks cut across the folds
    count = _groups(groups)
    block = np.random.default_rng([seed, 1]).permutation(count) % JACKKNIFE_BLOCKS
    kept: F64 = (block[None] != np.arange(JACKKNIFE_BLOCKS)[:, None]).astype(np.float64)
    return kept


def _percentiles(estimate: F64, replicates: F64) -> tuple[float, float]:
    del estimate
    if np.isnan(replicates).all():
        return math.nan, math.nan
    low, high = np.nanquantile(replicates, (0.025, 0.975))
    return float(low), float(high)


def _normal_limits(estimate: F64, replicates: F64) -> tuple[float, float]:
    count = len(replicates)
    error = math.sqrt((count - 1) / count * float(((replicates - replicates.mean()) ** 2).sum()))
    return float(estimate[0]) - 1.96 * error, float(estimate[0]) + 1.96 * error


def _need_scikit_learn() -> None:
    if importlib.util.find_spec("sklearn") is None:
        raise MissingExtraError("training a head needs scikit-learn", "learn")


def _check_vectors(
    vectors: NDArray[Any], ids: Sequence[Hashable], reference: Head, folds: int
) -> None:
    if vectors.ndim != 2:
        raise UsageError(f"embeddings must be (rows, {reference.width}), not {vectors.shape}")
    if vectors.shape[1] != reference.width:
        raise wrong_width(vectors.shape[1], reference)
    if not reference.affine:
        raise UsageError(
            f"the head {reference.name!r} has layers with ReLU: "
            "training starts from an affine head, such as the bundled ones"
        )
    if len(ids) != len(vectors):
        raise UsageError(f"there are {len(vectors):,} embeddings but {len(ids):,} ids")
    if folds < 3:
        raise UsageError(f"training needs at least 3 folds, not {folds}")


def _column(values: ArrayLike, count: int, what: str) -> F64:
    try:
        column: F64 = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        raise UsageError(f"{what} must be numbers") from None
    if column.shape != (count,):
        given = f"{len(column):,}" if column.ndim == 1 else f"an array {column.shape}"
        raise UsageError(f"there are {count:,} embeddings but {given} {what}")
    if np.isinf(column).any():
        raise UsageError(f"{what} must be finite: row {int(np.isinf(column).argmax())} is not")
    return column


def _checked_weights(weights: ArrayLike, count: int) -> F64:
    column = _column(weights, count, "weights")
    bad = ~(column >= 0)
    if bad.any():
        row = int(bad.argmax())
        raise UsageError(f"weights must be 0 or more: row {row} has {column[row]:g}")
    return column


def _checked_kind(kind: str | None, targets: F64) -> Kind:
    known = targets[~np.isnan(targets)]
    if kind == "ridge" or (kind is None and not np.isin(known, (0, 1)).all()):
        return "ridge"
    if kind not in (None, "logistic"):
        raise UsageError(f"a head is trained as 'ridge' or 'logistic', not {kind!r}")
    outside = known[(known < 0) | (known > 1)]
    if len(outside):
        raise UsageError(
            f"labels lie from 0 (drop) to 1 (keep), but one is {outside[0]:g}: "
            "if these are ratings, train with kind='ridge'"
        )
    return "logistic"


def _check_groups(y: F64, groups: Ints, kind: Kind, folds: int) -> None:
    count = _groups(groups)
    if count < max(MIN_GROUPS, folds):
        raise UsageError(
            f"{len(y):,} usable rows of {count:,} different images are too few: training with "
            f"{folds} folds needs at least {max(MIN_GROUPS, folds)}, and some hundreds to be of use"
        )
    if kind == "ridge" and y.min() == y.max():
        raise UsageError(
            f"all {len(y):,} ratings are {y[0]:g}: a head learns from images rated differently"
        )
    if kind == "logistic":
        kept, dropped = _classes(y, groups)
        if min(kept, dropped) < MIN_OF_A_CLASS:
            raise UsageError(
                f"the labels keep {kept:g} images and drop {dropped:g}: "
                f"training needs at least {MIN_OF_A_CLASS} of either"
            )


def _classes(y: F64, groups: Ints) -> tuple[float, float]:
    """How many images are kept, and how many dropped."""
    kept = float((np.bincount(groups, y) / np.bincount(groups)).sum())
    return kept, _groups(groups) - kept


def _groups(groups: Ints) -> int:
    return int(groups.max()) + 1 if len(groups) else 0


def _usable(failed: NDArray[np.bool_], targets: F64, weights: F64) -> tuple[Ints, list[str]]:
    """Which rows can be learnt from, and a note on each kind that cannot."""
    blank, idle = np.isnan(targets), weights == 0
    left_out = {
        "no usable embedding (it holds NaN or infinity, or is all zeros)": failed,
        "no target": blank & ~failed,
        "weight 0": idle & ~blank & ~failed,
    }
    counts = {why: int(np.count_nonzero(which)) for why, which in left_out.items()}
    notes = [f"{n:,} row{'s' if n > 1 else ''} left out: {why}" for why, n in counts.items() if n]
    return np.flatnonzero(~(failed | blank | idle)), notes


def _foreign(reference: Head, cosines: NDArray[np.float32]) -> list[str]:
    count = int(np.count_nonzero(reference.foreign(cosines)))
    if not count:
        return []
    return [
        f"{count:,} of {len(cosines):,} rows do not look like {reference.takes}: "
        "if they come from another encoder, or from text, what is learnt from them is worthless"
    ]


def _few(y: F64, groups: Ints, kind: Kind) -> list[str]:
    count, notes = _groups(groups), []
    if count < FEW_GROUPS:
        notes.append(f"only {count} different images: too few to rely on these numbers")
    if kind == "logistic":
        kept, dropped = _classes(y, groups)
        if min(kept, dropped) < FEW_OF_A_CLASS:
            notes.append(
                f"only {min(kept, dropped):g} images are {'kept' if kept < dropped else 'dropped'}:"
                " too few labels of that kind to rely on these numbers"
            )
    return notes


def _verdict(better: Interval, strength: float, reference: Head) -> list[str]:
    notes = []
    if math.isinf(strength):
        notes.append(
            f"the targets bear out no direction of their own: this is {reference.name} recalibrated"
        )
    if better.high < 0:
        notes.append(f"worse than the reference head: keep using {reference.name}")
    elif not better.low > 0:
        notes.append(
            f"no better than the reference head, for all that these rows show: "
            f"keep using {reference.name}"
        )
    return notes


def _scale(kind: Kind, y: F64, reference: Head) -> str:
    if kind == "ridge":
        return f"the ratings' own, which lie from {y.min():g} to {y.max():g}"
    return (
        "log-odds to be kept, moved onto the scale of "
        f"{reference.name}: its mean and standard deviation over the labelled rows"
    )
