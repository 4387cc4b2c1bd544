"""Rows come out in the order of the source's shards, numbers counted as numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import aesthetic_filter as af
from aesthetic_filter.errors import SourceError
from aesthetic_filter.storage import list_source

Make = Callable[..., np.ndarray]


def test_shard_ten_comes_after_shard_two(tmp_path: Path, make_embeddings: Make) -> None:
    source = tmp_path / "in"
    (source / "a").mkdir(parents=True)
    names = ["a/x_1.npy", "a/x_2.npy", "a/x_10.npy", "a_3.npy"]
    for number, name in enumerate(names):
        np.save(source / name, make_embeddings(2, seed=number))
    assert [file.name for file in list_source(source).files] == names
    ids = af.score(source, tmp_path / "out").table(["image_id"])["image_id"].to_pylist()
    assert ids == [f"{name}#{row}" for name in names for row in (0, 1)]


def test_an_output_inside_the_source_is_known_however_it_is_spelt(
    tmp_path: Path, make_embeddings: Make
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    np.save(source / "x.npy", make_embeddings(3))
    for out in (source / "out", source / ".." / "in" / "out"):
        assert len(af.score(source, out)) == 3


def test_a_shard_of_something_else_among_good_ones(tmp_path: Path, make_embeddings: Make) -> None:
    source = tmp_path / "in"
    source.mkdir()
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(make_embeddings(3).reshape(-1)), 768)
    pq.write_table(pa.table({"embedding": vectors}), source / "good.parquet")
    pq.write_table(pa.table({"caption": ["a", "b"]}), source / "other.parquet")
    with pytest.raises(SourceError, match=r"other\.parquet: no column holds embeddings"):
        af.score(source, tmp_path / "stops")
    scores = af.score(source, tmp_path / "goes-on", keep_going=True)
    assert len(scores) == 3
    assert list(scores.summary().broken) == ["other.parquet"]
