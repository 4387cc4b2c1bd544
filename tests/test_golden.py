"""Scores that others published for real images, where the real encoder is on the machine."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import aesthetic_filter as af
from aesthetic_filter.clip.weights import ENCODER_SHA256, verify_encoder


@pytest.fixture(scope="module")
def model_dir() -> Path:
    folder = os.environ.get("AESTHETIC_FILTER_MODEL_DIR")
    if not folder:
        pytest.skip("AESTHETIC_FILTER_MODEL_DIR names no folder with CLIP ViT-L/14's weights")
    try:
        found = verify_encoder(model_dir=folder).sha256
    except af.AestheticFilterError as error:
        found = str(error)
    if found != ENCODER_SHA256:
        pytest.skip(f"AESTHETIC_FILTER_MODEL_DIR has not CLIP ViT-L/14's own weights: {found}")
    return Path(folder)


@pytest.fixture(scope="module")
def scorer(model_dir: Path) -> Iterator[af.ImageScorer]:
    # The scripts that published these scores take photographs as they lie.
    options = af.ImageOptions(exif=False, precision="float32")
    with af.ImageScorer(model_dir=model_dir, options=options) as scorer:
        yield scorer


def test_published_scores(scorer: af.ImageScorer, shared: Path) -> None:
    golden = shared / "golden"
    with (golden / "published_scores.csv").open(newline="") as file:
        published = list(csv.DictReader(file))
    names = sorted({row["file"] for row in published})
    embeddings = dict(zip(names, scorer.embed([golden / name for name in names]), strict=True))
    differences = {}
    for row in published:
        head = af.load_head(shared / "heads" / f"{row['head']}.pth")
        found = float(head.measure(embeddings[row["file"]][np.newaxis]).scores[0])
        if abs(found - float(row["score"])) > float(row["abs_tolerance"]):
            differences[row["file"], row["head"]] = found, float(row["score"])
    assert len(published) >= 12
    assert differences == {}


def test_real_embeddings_look_like_what_they_are(scorer: af.ImageScorer, shared: Path) -> None:
    images = sorted((shared / "golden").glob("*.[jp][pn]g"))
    cosines = scorer.head.measure(scorer.embed(images)).cosines
    assert cosines.min() > 0.35
