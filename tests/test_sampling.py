"""Strata of the scores and draws from them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import aesthetic_filter as af
from aesthetic_filter.sampling import FIRST_ROUND, Strata, draw, next_stratum, stratify


def write(path: Path, scores: NDArray[np.float32], ids: list[str] | None = None) -> Path:
    table = {
        "image_id": ids or [f"{i:06d}" for i in range(len(scores))],
        "aesthetic_score": pa.array(scores, pa.float32()),
        "error": pa.nulls(len(scores), pa.string()),
    }
    pq.write_table(pa.table(table), path)
    return path


@given(
    st.lists(st.floats(0, 10, width=32), min_size=1, max_size=300),
)
@settings(max_examples=40, deadline=None)
def test_every_row_is_in_one_stratum(
    tmp_path_factory: pytest.TempPathFactory, values: list[float]
) -> None:
    scores = np.array(values, np.float32)
    opened = af.open_scores(write(tmp_path_factory.mktemp("s") / "s.parquet", scores))
    strata = stratify(opened)
    assert strata.rows.sum() == len(scores)
    assert np.bincount(strata.of(scores), minlength=len(strata)).tolist() == strata.rows.tolist()
    assert (np.diff(strata.edges) > 0).all()
    assert len(strata) == 1 or strata.rows.min() >= 8
    assert len(set(strata.names)) == len(strata)
    drawn = draw(opened, strata, 1_000)
    assert [len(rows) for rows in drawn] == strata.rows.tolist()
    for number, rows in enumerate(drawn):
        for row in rows:
            assert row.stratum == number
            assert row.score == scores[row.row]
            assert row.image_id == f"{row.row:06d}"


def test_strata_of_a_usual_collection(tmp_path: Path) -> None:
    scores = np.random.default_rng(0).normal(5, 0.7, 20_000).astype(np.float32)
    strata = stratify(af.open_scores(write(tmp_path / "s.parquet", scores)))
    assert len(strata) == 12
    low, high = np.quantile(scores, [0.01, 0.99])
    assert strata.edges[0] == pytest.approx(low, abs=0.02)
    assert strata.edges[-1] == pytest.approx(high, abs=0.02)
    assert np.ptp(np.diff(strata.edges)) < 0.03  # of equal width, but for rounding
    assert strata.names[0].startswith("-inf to ")


def test_a_draw_is_random_and_the_same_each_time(tmp_path: Path) -> None:
    scores = np.random.default_rng(0).normal(5, 0.7, 3_000).astype(np.float32)
    opened = af.open_scores(write(tmp_path / "s.parquet", scores))
    strata = stratify(opened)
    first = draw(opened, strata, 5)
    assert first == draw(opened, strata, 5)
    assert [rows[:3] for rows in draw(opened, strata, 3)] == [rows[:3] for rows in first]
    times: Counter[int] = Counter()
    middle = len(strata) // 2
    for seed in range(200):
        times.update(row.row for row in draw(opened, strata, 20, seed)[middle])
    rows = int(strata.rows[middle])
    # Each of them 200 * 20 / rows times on average; a Poisson count stays within six deviations.
    mean = 4_000 / rows
    assert max(times.values()) < mean + 6 * mean**0.5
    assert len(times) > 0.9 * rows


def test_rows_with_one_id_are_drawn_once(tmp_path: Path) -> None:
    scores = np.linspace(4, 6, 400).astype(np.float32)
    ids = [f"{i // 2:03d}" for i in range(400)]
    opened = af.open_scores(write(tmp_path / "s.parquet", scores, ids))
    drawn = [row.image_id for rows in draw(opened, stratify(opened), 400) for row in rows]
    assert sorted(drawn) == sorted(set(ids))


def test_failed_rows_are_never_drawn(tmp_path: Path) -> None:
    table = {
        "image_id": [str(i) for i in range(100)],
        "aesthetic_score": pa.array([None if i % 2 else i / 10 for i in range(100)], pa.float32()),
        "error": ["broken" if i % 2 else None for i in range(100)],
    }
    pq.write_table(pa.table(table), tmp_path / "s.parquet")
    opened = af.open_scores(tmp_path / "s.parquet")
    drawn = [row for rows in draw(opened, stratify(opened), 100) for row in rows]
    assert sorted(int(row.image_id) for row in drawn) == list(range(0, 100, 2))


def test_first_everyone_gets_a_few_then_those_that_tell_most() -> None:
    rows = np.array([1_000, 1_000, 1_000])
    spread = np.array([0.5, 0.05, 0.05])
    taken = [0, 0, 0]
    for _ in range(3 * FIRST_ROUND):
        taken[next_stratum([900] * 3, taken, rows, spread) or 0] += 1
    assert taken == [FIRST_ROUND] * 3
    for _ in range(100):
        taken[next_stratum([900] * 3, taken, rows, spread) or 0] += 1
    assert taken[0] > 3 * max(taken[1:])
    assert min(taken[1:]) > FIRST_ROUND + 5  # never forgotten


def test_a_stratum_that_is_used_up_is_passed_over() -> None:
    assert next_stratum([0, 3], [9, 0], np.array([9, 3]), None) == 1
    assert next_stratum([0, 0], [9, 3], np.array([9, 3]), None) is None


def test_scores_on_an_edge_lie_above_it() -> None:
    strata = Strata(np.array([5.3], np.float32), np.array([1, 1]))
    assert strata.of([np.float32(5.3), np.nextafter(np.float32(5.3), np.float32(0))]).tolist() == [
        1,
        0,
    ]
