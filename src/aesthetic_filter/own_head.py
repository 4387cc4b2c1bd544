"""A head of one's own, from a label file and the embeddings that some scores were made from."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from aesthetic_filter.calibrate import Judged, places_of
from aesthetic_filter.errors import SpaceError, UsageError
from aesthetic_filter.heads.head import Head
from aesthetic_filter.stored import stored_embeddings
from aesthetic_filter.table import printable
from aesthetic_filter.train import Training, train

if TYPE_CHECKING:
    from aesthetic_filter.labels import Labels
    from aesthetic_filter.scores import Scores


def train_head(
    labels: Labels,
    scores: Scores,
    *,
    name: str,
    reference: Head,
    folds: int = 5,
    seed: int = 0,
    labels_path: str | Path | None = None,
    licence: str = "",
) -> Training:
    """Train a head on labels or ratings: see :func:`aesthetic_filter.train.train`.

    Labels that say from which stratum their images were drawn count for as many images as they
    stand for.

    Args:
        labels: keep and drop, or ratings.
        scores: whose images they are of; where the embeddings are is told by them.
        name: what to call the head.
        reference: the head to start from, and to compare with.
        folds: of the cross-validation.
        seed: of the folds.
        labels_path: the file the labels are from, for the head's provenance.
        licence: of the labels, likewise.

    Raises:
        UsageError: no label is of an image in these scores, or they are too few.
        SpaceError: the scores' embeddings are not of the reference head's space.
        ShardError: embeddings are gone, or have changed since they were scored.
        MissingExtraError: scikit-learn is not installed.
    """
    space = scores.provenance.get("space", reference.space)
    if space != reference.space:
        raise SpaceError(
            f"{scores.path}: its embeddings are of {space}, the head {reference.name!r} is for "
            f"{reference.space}; name a head of that space to start from"
        )
    places = places_of(labels.ids, scores)
    known = np.array([image in places for image in labels.ids], np.bool_)
    if not known.any():
        raise UsageError("no label is of an image that has a score here")
    ids = [image for image in labels.ids if image in places]
    vectors = stored_embeddings(scores, [places[image][1:] for image in ids], reference.width)
    weights = None
    if labels.strata is not None:
        values = np.array([places[image][0] for image in ids], np.float64)
        weights = Judged(
            values, labels.values[known], labels.strata[known], labels.stratum_rows
        ).weights
    trained = train(
        vectors,
        labels.values[known],
        ids,
        kind="logistic" if labels.kind == "keep" else "ridge",
        name=name,
        reference=reference,
        weights=weights,
        folds=folds,
        seed=seed,
        licence=licence,
    )
    facts = {**trained.head.provenance, "source": _source(labels, scores, trained, labels_path)}
    head = Head(trained.head.name, trained.head.space, trained.head.layers, facts)
    notes = trained.notes
    if not known.all():
        lost = int(np.count_nonzero(~known))
        notes = (f"labels of images without a score here, left out: {lost:,}", *notes)
    return replace(trained, head=head, notes=(*labels.notes, *notes))


def _source(
    labels: Labels, scores: Scores, trained: Training, labels_path: str | Path | None
) -> str:
    """Where the head comes from, in one line."""
    what = "keep/drop labels" if labels.kind == "keep" else "ratings"
    said = f"trained on {trained.rows:,} {what}"
    if labels_path is not None:
        digest = hashlib.sha256(Path(labels_path).expanduser().read_bytes()).hexdigest()
        said += f" ({printable(Path(labels_path).name)}, sha256 {digest[:12]})"
    who = ", ".join(printable(name) for name in labels.reviewers if name)
    said += f" by {who}" if who else ""
    source = scores.provenance.get("source")
    said += f", embeddings of {source}" if source else ""
    mine = trained.ours.auc if trained.measure == "AUC" else trained.ours.srcc
    theirs = trained.reference.auc if trained.measure == "AUC" else trained.reference.srcc
    return (
        f"{said}; {trained.kind}, {trained.folds} folds: held-out {trained.measure} {mine}, "
        f"the head it started from {theirs}"
    )
