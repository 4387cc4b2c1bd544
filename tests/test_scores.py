"""Opening scores and looking at them: summaries against NumPy, ranks, thresholds, refusals."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import aesthetic_filter as af
from aesthetic_filter.errors import OutputError
from aesthetic_filter.scores import threshold_steps

FRACTIONS = (0.01, 0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99)
HEAD = {"name": "a head", "sha256": "0123456789abcdef"}
ZEROS, ODD = "embedding is all zeros", "embedding holds NaN or infinity"


def part(path: Path, head: dict[str, str] | None = HEAD, **columns: Any) -> Path:
    """Write a part with nothing of ours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stamp = {"head": head, "space": "a space", "source": "/in", "shard": path.name}
    metadata = {b"aesthetic_filter": json.dumps(stamp).encode()} if head else {}
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path)
    return path


def finish(folder: Path, status: str = "complete", **facts: Any) -> Path:
    text = json.dumps({"status": status, "head": HEAD, **facts})
    (folder / "_run.json").write_text(text, encoding="utf-8")
    return folder


def plain(folder: Path, scores: Sequence[float | None], ids: Sequence[str] | None = None) -> Path:
    """A folder of one part of ids and scores."""
    ids = [f"i{n}" for n in range(len(scores))] if ids is None else ids
    part(
        folder / "a.parquet",
        image_id=pa.array(ids, pa.string()),
        aesthetic_score=pa.array(scores, pa.float32()),
        error=pa.array([None if s is not None else ZEROS for s in scores], pa.string()),
    )
    return finish(folder)


@pytest.fixture
def scored(tmp_path: Path) -> tuple[Path, np.ndarray, np.ndarray, np.ndarray]:
    """Three parts of 5,000 rows with failures; the folder, and what it holds of scored rows."""
    chance = np.random.default_rng(11)
    folder = tmp_path / "scores"
    kept: list[tuple[np.ndarray, ...]] = []
    for number in range(3):
        values = np.round(chance.normal(5, 1.2, 5000), number + 1).astype(np.float32)
        norms = chance.uniform(0.5, 20, 5000).astype(np.float32)
        cosines = chance.uniform(0.3, 0.9, 5000).astype(np.float32)
        errors = [ZEROS if n % 100 == 7 else ODD if n % 250 == 9 else None for n in range(5000)]
        failed = np.array([error is not None for error in errors])
        part(
            folder / f"sub{number}" / "x.parquet",
            image_id=[f"{number}/{n}" for n in range(5000)],
            aesthetic_score=pa.array(values, mask=failed),
            error=pa.array(errors, pa.string()),
            embedding_norm=pa.array(norms, mask=failed),
            reference_cosine=pa.array(cosines, mask=failed),
        )
        kept.append((values[~failed], norms[~failed], cosines[~failed]))
    finish(folder)
    values, norms, cosines = (np.concatenate(column) for column in zip(*kept, strict=True))
    return folder, values, norms, cosines


def nearest_rank(values: Any, fraction: float) -> float:
    ordered = np.sort(np.asarray(values))
    return float(ordered[max(math.ceil(fraction * len(ordered)), 1) - 1])


# The summary.


def test_the_summary_against_numpy(
    scored: tuple[Path, np.ndarray, np.ndarray, np.ndarray],
) -> None:
    folder, values, norms, cosines = scored
    found = af.open_scores(folder).summary()
    assert found.rows == 15_000
    assert found.scored == len(values) == 15_000 - 3 * (50 + 20)
    assert list(found.failures.items()) == [(ZEROS, 150), (ODD, 60)]
    assert found.scored + sum(found.failures.values()) == found.rows
    assert found.mean == pytest.approx(values.astype(np.float64).mean(), abs=1e-9)
    assert (found.lowest, found.highest) == (values.min(), values.max())
    assert dict(found.percentiles) == {f: nearest_rank(values, f) for f in FRACTIONS}
    assert len(found.thresholds) > 5
    for threshold, kept in found.thresholds.items():
        assert kept == np.count_nonzero(values >= np.float32(threshold))
    counts = list(found.thresholds.values())
    assert counts == sorted(counts, reverse=True)
    assert found.norms == (norms.min(), nearest_rank(norms, 0.5), norms.max())
    assert found.foreign == np.count_nonzero(cosines < np.float32(0.35))
    assert found.foreign > 0
    assert (found.status, dict(found.broken)) == ("complete", {})
    assert found.provenance["head"] == HEAD


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.one_of(
            st.floats(-1e6, 1e6, width=32),
            st.sampled_from([5.0, 5.5, -0.0]),
            st.none(),
        ),
        max_size=60,
    )
)
def test_percentiles_are_exact_and_counts_add_up(scores: list[float | None]) -> None:
    values = [s for s in scores if s is not None]
    with tempfile.TemporaryDirectory() as folder:
        found = af.open_scores(plain(Path(folder) / "s", scores)).summary()
    assert found.rows == len(scores)
    assert found.scored == len(values)
    assert dict(found.failures) == ({ZEROS: len(scores) - len(values)} if None in scores else {})
    if not values:
        assert (found.mean, found.lowest, found.highest) == (None, None, None)
        assert dict(found.percentiles) == dict(found.thresholds) == {}
    else:
        assert dict(found.percentiles) == {f: nearest_rank(values, f) for f in FRACTIONS}
        for threshold, kept in found.thresholds.items():
            assert kept == sum(value >= np.float32(threshold) for value in values)
    assert "rows" in str(found)


def test_the_summary_as_text(scored: tuple[Path, np.ndarray, np.ndarray, np.ndarray]) -> None:
    folder, values, _, cosines = scored
    foreign = np.count_nonzero(cosines < np.float32(0.35))
    text = " ".join(str(af.open_scores(folder).summary()).split())
    for words in (
        "rows 15,000",
        "scored 14,790 98.6%",
        "failed 210 1.4%",
        f"{ZEROS} 150",
        f"{ODD} 60",
        f"mean {values.mean():.3f}, from {values.min():.3f} to {values.max():.3f}",
        "percentile 1% 5% 10% 25% 50% 75% 90% 95% 99%",
        "score " + " ".join(f"{nearest_rank(values, f):.3f}" for f in FRACTIONS),
        "a threshold of would keep",
        f"5 {np.count_nonzero(values >= 5):,}",
        f"foreign {foreign:,} scored rows",
        "head a head (0123456789ab)",
        "space a space",
        "source /in",
    ):
        assert words in text
    assert "not complete" not in text


def test_the_summary_of_nothing_but_failures(tmp_path: Path) -> None:
    found = af.open_scores(plain(tmp_path / "s", [None, None, None])).summary()
    assert (found.rows, found.scored) == (3, 0)
    assert found.percentiles == {}
    text = " ".join(str(found).split())
    assert "scored 0 0.0% failed 3 100.0%" in text
    assert "threshold" not in text


def test_the_summary_of_no_rows(tmp_path: Path) -> None:
    found = af.open_scores(plain(tmp_path / "s", [])).summary()
    assert (found.rows, found.scored, found.failures) == (0, 0, {})
    assert "rows 0" in " ".join(str(found).split())


def test_numbers_that_are_none_count_as_failed(tmp_path: Path) -> None:
    path = tmp_path / "theirs.parquet"
    scores = [1.0, math.nan, math.inf, None]
    pq.write_table(pa.table({"image_id": list("abcd"), "aesthetic_score": scores}), path)
    found = af.open_scores(path).summary()
    assert (found.scored, dict(found.failures)) == (1, {"no score": 3})
    assert found.norms is None


def test_equal_scores_have_one_percentile_and_a_few_thresholds(tmp_path: Path) -> None:
    found = af.open_scores(plain(tmp_path / "s", [5.25] * 9)).summary()
    assert set(found.percentiles.values()) == {5.25}
    assert min(found.thresholds) <= 5.25 < max(found.thresholds)
    assert found.thresholds[max(found.thresholds)] == 0


@pytest.mark.parametrize("status", ["running", "incomplete"])
def test_the_summary_says_that_a_run_is_not_complete(tmp_path: Path, status: str) -> None:
    plain(tmp_path / "s", [5.0])
    broken = [{"shard": "b.npy", "error": "cut short"}]
    finish(tmp_path / "s", status, broken_shards=broken)
    found = af.open_scores(tmp_path / "s").summary()
    assert found.status == status
    assert found.broken == {"b.npy": "cut short"}
    assert "not complete" in str(found)
    assert "b.npy: cut short" in str(found)


def test_a_summary_is_plain_data(scored: tuple[Path, np.ndarray, np.ndarray, np.ndarray]) -> None:
    found = af.open_scores(scored[0]).summary()
    assert json.loads(json.dumps(vars(found)))["rows"] == 15_000


# Thresholds.


@given(st.floats(-1e4, 1e4).flatmap(lambda low: st.tuples(st.just(low), st.floats(low, low + 2e4))))
def test_thresholds_are_round_few_and_reach_round_all(ends: tuple[float, float]) -> None:
    low, high = ends
    steps = threshold_steps(low, high)
    assert steps == sorted(set(steps))
    assert 2 <= len(steps) <= 24
    assert steps[0] <= low + 1e-6
    assert steps[-1] > high
    width = steps[1] - steps[0]
    assert np.diff(steps) == pytest.approx(width)
    assert steps[0] / width == pytest.approx(round(steps[0] / width), abs=1e-4)


@pytest.mark.parametrize(
    ("low", "high", "first", "last", "step"),
    [
        (3.2, 6.8, 3.0, 7.0, 0.5),
        (4.9, 5.2, 4.9, 5.25, 0.05),
        (-29.0, 30.0, -30.0, 35.0, 5.0),
        (5.0, 5.0, 5.0, 5.05, 0.05),
    ],
)
def test_thresholds_of_usual_ranges(
    low: float, high: float, first: float, last: float, step: float
) -> None:
    steps = threshold_steps(low, high)
    assert steps[0] == pytest.approx(first, abs=step)
    assert steps[-1] == pytest.approx(last, abs=step)
    assert np.diff(steps) == pytest.approx(step)


# Ranking.


def test_rank_gives_the_best_and_the_worst(
    scored: tuple[Path, np.ndarray, np.ndarray, np.ndarray],
) -> None:
    folder, values, _, _ = scored
    opened = af.open_scores(folder)
    ordered = np.sort(values)
    assert opened.rank(25)["aesthetic_score"].to_pylist() == ordered[::-1][:25].tolist()
    assert opened.rank(25, worst=True)["aesthetic_score"].to_pylist() == ordered[:25].tolist()
    assert opened.rank().num_rows == 20
    assert opened.rank(10**6).num_rows == len(values)
    assert opened.rank(3).column_names == opened.columns


def test_rank_breaks_ties_by_id_and_leaves_out_the_failed(tmp_path: Path) -> None:
    ids = ["d", "b", "c", "a", "é", "B", "b"]
    scores = [5.0, 5.0, 7.0, 5.0, 5.0, 5.0, None]
    opened = af.open_scores(plain(tmp_path / "s", scores, ids))
    assert opened.rank(9)["image_id"].to_pylist() == ["c", "B", "a", "b", "d", "é"]
    worst = opened.rank(9, worst=True)["image_id"].to_pylist()
    assert worst == ["B", "a", "b", "d", "é", "c"]
    assert opened.rank(2)["image_id"].to_pylist() == ["c", "B"]


def test_rank_of_nothing_is_an_empty_table(tmp_path: Path) -> None:
    opened = af.open_scores(plain(tmp_path / "s", [None]))
    assert opened.rank(5).num_rows == 0
    assert opened.rank(5).column_names == ["image_id", "aesthetic_score", "error"]


# Opening.


def test_what_is_open_tells_its_size_columns_and_provenance(
    scored: tuple[Path, np.ndarray, np.ndarray, np.ndarray],
) -> None:
    opened = af.open_scores(str(scored[0]))
    assert len(opened) == 15_000
    assert opened.columns[:3] == ["image_id", "aesthetic_score", "error"]
    assert repr(opened) == f"Scores({str(scored[0])!r}, 15,000 rows in 3 parts)"
    assert opened.provenance == {"head": HEAD, "space": "a space", "source": "/in"}
    ids = opened.table(["image_id"])["image_id"].to_pylist()
    assert ids == [f"{number}/{n}" for number in range(3) for n in range(5000)]


def test_parts_of_different_columns_are_one_table(tmp_path: Path) -> None:
    score = pa.array([1.0], pa.float32())
    part(tmp_path / "s" / "a.parquet", image_id=["a"], aesthetic_score=score, width=[640])
    part(tmp_path / "s" / "b.parquet", image_id=["b"], aesthetic_score=score, url=["http://x"])
    opened = af.open_scores(finish(tmp_path / "s"))
    assert set(opened.columns) == {"image_id", "aesthetic_score", "error", "width", "url"}
    kept = opened.select(where="width IS NULL").table().to_pylist()
    assert [(row["image_id"], row["url"], row["width"]) for row in kept] == [
        ("b", "http://x", None)
    ]
    assert opened.table()["width"].to_pylist() == [640, None]


def test_scores_of_two_heads_do_not_mix(tmp_path: Path) -> None:
    score = pa.array([1.0], pa.float32())
    other = {"name": "another", "sha256": "ff"}
    part(tmp_path / "s" / "a.parquet", image_id=["a"], aesthetic_score=score)
    part(tmp_path / "s" / "b.parquet", other, image_id=["b"], aesthetic_score=score)
    finish(tmp_path / "s")
    with pytest.raises(OutputError, match=r"different heads \(a head, another\)"):
        af.open_scores(tmp_path / "s")


def test_a_part_that_does_not_say_its_head_does_not_mix_either(tmp_path: Path) -> None:
    score = pa.array([1.0], pa.float32())
    part(tmp_path / "s" / "a.parquet", image_id=["a"], aesthetic_score=score)
    part(tmp_path / "s" / "b.parquet", None, image_id=["b"], aesthetic_score=score)
    finish(tmp_path / "s")
    with pytest.raises(OutputError, match="different heads"):
        af.open_scores(tmp_path / "s")


def nothing(folder: Path) -> None:
    assert not folder.exists()


def empty(folder: Path) -> None:
    folder.mkdir()


def unfinished(folder: Path) -> None:
    folder.mkdir()
    finish(folder, "running")


def damaged(folder: Path) -> None:
    path = plain(folder, [5.0]) / "a.parquet"
    path.write_bytes(path.read_bytes()[:-20])


def other_columns(folder: Path) -> None:
    part(folder / "a.parquet", image_id=["a"], score=[1.0])
    finish(folder)


def words_for_scores(folder: Path) -> None:
    part(folder / "a.parquet", image_id=["a"], aesthetic_score=["high"])
    finish(folder)


def torn_run_file(folder: Path) -> None:
    plain(folder, [5.0])
    (folder / "_run.json").write_text('{"status": "comp', encoding="utf-8")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (nothing, "there is nothing there"),
        (empty, "holds no scores; make some with `aesthetic-filter score`"),
        (unfinished, "no part is finished yet"),
        (damaged, r"a\.parquet: cannot be read"),
        (other_columns, "no column 'aesthetic_score'"),
        (words_for_scores, "aesthetic_score is VARCHAR, not a number"),
        (torn_run_file, r"_run\.json: cannot be read"),
    ],
)
def test_what_cannot_be_opened_says_why(
    tmp_path: Path, make: Callable[[Path], None], says: str
) -> None:
    make(tmp_path / "s")
    with pytest.raises(OutputError, match=says) as refused:
        af.open_scores(tmp_path / "s").summary()
    assert str(tmp_path / "s") in str(refused.value)


def test_a_selection_that_is_not_parquet_cannot_be_opened(tmp_path: Path) -> None:
    opened = af.open_scores(plain(tmp_path / "s", [5.0, 6.0]))
    opened.select(top=1).write(tmp_path / "kept", as_="csv")
    with pytest.raises(OutputError, match="not Parquet"):
        af.open_scores(tmp_path / "kept")


def test_a_file_that_is_not_parquet_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match="cannot be read as Parquet"):
        af.open_scores(tmp_path / "notes.txt")
