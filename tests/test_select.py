"""Selecting against an oracle in plain Python: rules, ties, groups, formats, hostile conditions."""

from __future__ import annotations

import csv
import itertools
import json
import math
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import aesthetic_filter as af
from aesthetic_filter.errors import OutputError, SelectionError
from aesthetic_filter.selection.rule import Modifiers, options
from aesthetic_filter.selection.rules.min_score import MinScore
from aesthetic_filter.selection.rules.where import Where

Run = Callable[..., "subprocess.CompletedProcess[str]"]

FORMATS = ("parquet", "csv", "jsonl", "ids")
PROVENANCE = {"head": {"name": "h", "sha256": "ab"}, "space": "s", "source": "/in"}


# Scores, written with nothing of ours.


@dataclass(frozen=True)
class Row:
    """A row of scores, as the oracle sees it."""

    image_id: str | None
    score: float | None
    error: str | None = None
    source: str | None = None
    width: int | None = None

    @property
    def failed(self) -> bool:
        return self.error is not None or self.score is None or not math.isfinite(self.score)


SCHEMA = pa.schema(
    {
        "image_id": pa.string(),
        "aesthetic_score": pa.float32(),
        "error": pa.string(),
        "source": pa.string(),
        "width": pa.int32(),
    }
)


def write_scores(folder: Path, *tables: pa.Table) -> Path:
    """A scores folder of one part for each table."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp = {b"aesthetic_filter": json.dumps(PROVENANCE).encode()}
    for number, table in enumerate(tables):
        pq.write_table(table.replace_schema_metadata(stamp), folder / f"{number:02}.npy.parquet")
    facts = {"status": "complete", **PROVENANCE}
    (folder / "_run.json").write_text(json.dumps(facts), encoding="utf-8")
    return folder


def table_of(rows: Sequence[Row]) -> pa.Table:
    columns = zip(*((r.image_id, r.score, r.error, r.source, r.width) for r in rows), strict=True)
    filled = list(columns) or [()] * len(SCHEMA)
    return pa.table([pa.array(c, f.type) for c, f in zip(filled, SCHEMA, strict=True)], SCHEMA)


def open_rows(rows: Sequence[Row], folder: Path, cuts: Sequence[int] = ()) -> af.Scores:
    """The rows as scores on disk, cut into parts."""
    edges = [0, *sorted(cuts), len(rows)]
    pieces = [table_of(rows[a:b]) for a, b in itertools.pairwise(edges)]
    return af.open_scores(write_scores(folder, *pieces))


@pytest.fixture
def simple(tmp_path: Path) -> af.Scores:
    """Twelve rows, i00 to i11, of scores 1 to 6.5 in steps of a half; two more failed."""
    rows = [
        Row(f"i{n:02}", 1 + n / 2, source="ab"[n % 2], width=100 * n if n != 5 else None)
        for n in range(12)
    ]
    failed = [Row("bad", None, "embedding is all zeros", "a", 9999), Row("nan", math.nan)]
    return open_rows([*rows[:4], *failed, *rows[4:]], tmp_path / "scores", [3, 3, 9])


# The oracle.


CONDITIONS: dict[str, Callable[[Row], bool]] = {
    "width >= 512": lambda r: r.width is not None and r.width >= 512,
    "NOT (width < 300)": lambda r: r.width is not None and r.width >= 300,
    "source = 'a' OR source IS NULL": lambda r: r.source in ("a", None),
    "\"source\" <> 'a'": lambda r: r.source not in ("a", None),
    "image_id LIKE 'a%' -- those": lambda r: r.image_id is not None and r.image_id[:1] == "a",
    "aesthetic_score > 0 AND width IN (100, 512)": lambda r: r.score > 0 and r.width in (100, 512),
    "false": lambda _: False,
    "NULL::BOOLEAN": lambda _: False,
    "true": lambda _: True,
}


def rank(rows: Sequence[Row], place: int) -> tuple[Any, ...]:
    """Highest score first, then by the id's bytes, those without one last, then as they came."""
    row = rows[place]
    missing = row.image_id is None
    return -row.score, missing, b"" if missing else row.image_id.encode(), place


def fates(
    rows: Sequence[Row],
    *,
    where: str | None = None,
    min_score: float | None = None,
    max_score: float | None = None,
    top: int | None = None,
    top_fraction: float | None = None,
    per: str | None = None,
) -> list[str]:
    """For each row "kept", "failed", or the rule that dropped it."""
    fate = ["failed" if row.failed else "kept" for row in rows]

    def drop(label: str, keep: Callable[[int], bool]) -> None:
        survivors = [n for n, f in enumerate(fate) if f == "kept"]
        for n in survivors:
            if not keep(n):
                fate[n] = label

    if where is not None:
        drop(f"where {where}", lambda n: CONDITIONS[where](rows[n]))
    if min_score is not None:
        drop(f"min-score {min_score:g}", lambda n: rows[n].score >= np.float32(min_score))
    if max_score is not None:
        drop(f"max-score {max_score:g}", lambda n: rows[n].score <= np.float32(max_score))
    if top is not None or top_fraction is not None:
        groups: dict[Any, list[int]] = {}
        for n, row in enumerate(rows):
            if fate[n] == "kept":
                groups.setdefault(getattr(row, per) if per else 0, []).append(n)
        best: set[int] = set()
        for members in groups.values():
            quota = top or math.ceil(Fraction(str(top_fraction)) * len(members))
            best.update(sorted(members, key=lambda n: rank(rows, n))[:quota])
        much = str(top) if top else f"{float(Fraction(str(top_fraction)) * 100):g}%"
        drop(f"top {much}" + (f" per {per}" if per else ""), lambda n: n in best)
    return fate


SCORES = st.one_of(
    st.sampled_from([-2.5, 0.0, -0.0, 0.5, 5.1, 5.5, 5.5, 6.0]).map(lambda x: float(np.float32(x))),
    st.floats(-12, 12, width=32),
    st.sampled_from([None, math.nan, math.inf, -math.inf]),
)
IDS = st.one_of(
    st.sampled_from(["a", "a", "A", "ä", "", "null", "None", "NULL", "a b", "é", "z😀", "\n", '"']),
    st.none(),
    st.text(max_size=4).filter(lambda s: s.isprintable()),
)
ROWS = st.builds(
    Row,
    IDS,
    SCORES,
    st.sampled_from([None] * 8 + ["embedding is all zeros", ""]),
    st.sampled_from(["a", "b", "", "NULL", None]),
    st.sampled_from([None, 100, 300, 512, 640]),
)


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[Row], list[int]]:
    """Rows, and where they are cut into parts."""
    rows = draw(st.lists(ROWS, max_size=40))
    kind = draw(st.sampled_from(["as they are"] * 6 + ["constant", "all failed"]))
    if kind == "constant":
        rows = [Row(r.image_id, 5.0, None, r.source, r.width) for r in rows]
    if kind == "all failed":
        rows = [Row(r.image_id, r.score, "broken", r.source, r.width) for r in rows]
    return rows, draw(st.lists(st.integers(0, len(rows)), max_size=3))


THRESHOLDS = st.sampled_from([None, None, -3.0, 0.0, 5.1, 5.5, 5.500001, 20.0])


@st.composite
def rule_sets(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of select, at least one rule among them."""
    chosen: dict[str, Any] = {
        "where": draw(st.sampled_from([None, None, *CONDITIONS])),
        "min_score": draw(THRESHOLDS),
        "max_score": draw(THRESHOLDS),
    }
    best = draw(st.sampled_from([None, "top", "top_fraction"]))
    if best == "top":
        chosen["top"] = draw(st.sampled_from([1, 2, 3, 5, 100]))
    if best == "top_fraction":
        chosen["top_fraction"] = draw(st.sampled_from([0.01, 0.1, 1 / 3, 0.5, 1.0]))
    if best:
        chosen["per"] = draw(st.sampled_from([None, "source", "width", "image_id"]))
    chosen = {name: value for name, value in chosen.items() if value is not None}
    return chosen or {"min_score": 0.0}


def named(rows: Sequence[Row]) -> list[str | None]:
    return [row.image_id for row in rows]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(tables(), rule_sets())
def test_every_combination_of_rules_against_the_oracle(
    table: tuple[list[Row], list[int]], rules: dict[str, Any]
) -> None:
    rows, cuts = table
    wanted = fates(rows, **rules)
    counted = Counter(wanted)
    with tempfile.TemporaryDirectory() as folder:
        selection = open_rows(rows, Path(folder) / "s", cuts).select(**rules)
        counts = selection.counts
        assert counts.rows == len(rows)
        assert counts.kept == len(selection) == counted.pop("kept", 0)
        assert counts.failed == counted.pop("failed", 0)
        assert {k: n for k, n in counts.dropped.items() if n} == counted
        assert counts.kept + sum(counts.dropped.values()) + counts.failed == counts.rows
        kept = [row for row, fate in zip(rows, wanted, strict=True) if fate == "kept"]
        assert selection.table()["image_id"].to_pylist() == named(kept)
        if "per" in rules:
            everyone = Counter(str(getattr(r, rules["per"])) for r in rows)
            assert {g: n for g, (n, _) in counts.groups.items()}.items() <= everyone.items() or (
                "None" in everyone  # a group named None beside the rows without one
            )

        selection.write(Path(folder) / "out", with_dropped=True)
        dropped = pq.read_table(Path(folder) / "out" / "dropped.parquet")
        failed = pq.read_table(Path(folder) / "out" / "failed.parquet")
        assert list(
            zip(dropped["image_id"].to_pylist(), dropped["dropped_by"].to_pylist(), strict=True)
        ) == [
            (row.image_id, fate)
            for row, fate in zip(rows, wanted, strict=True)
            if fate not in ("kept", "failed")
        ]
        assert failed["image_id"].to_pylist() == named(
            [row for row, fate in zip(rows, wanted, strict=True) if fate == "failed"]
        )


# Single rules, by hand.


def kept_ids(scores: af.Scores, **rules: Any) -> list[str]:
    return scores.select(**rules).table()["image_id"].to_pylist()


def test_thresholds_keep_what_is_exactly_on_them(simple: af.Scores) -> None:
    assert kept_ids(simple, min_score=5.5) == ["i09", "i10", "i11"]
    assert kept_ids(simple, max_score=1.5) == ["i00", "i01"]
    assert kept_ids(simple, min_score=2.0, max_score=3.0) == ["i02", "i03", "i04"]


def test_a_threshold_means_the_float32_that_a_score_can_be(tmp_path: Path) -> None:
    scores = open_rows([Row("x", float(np.float32(5.1)))], tmp_path / "s")
    assert float(np.float32(5.1)) < 5.1
    assert kept_ids(scores, min_score=5.1) == ["x"]
    assert kept_ids(scores, max_score=5.1) == ["x"]
    assert kept_ids(scores, min_score=np.float64(5.1)) == ["x"]
    assert kept_ids(scores, min_score=np.float32(5.1)) == ["x"]


def test_top_counts_and_shares(simple: af.Scores) -> None:
    assert kept_ids(simple, top=2) == ["i10", "i11"]
    assert kept_ids(simple, top=1, per="source") == ["i10", "i11"]
    assert kept_ids(simple, top_fraction=0.25) == ["i09", "i10", "i11"]
    assert kept_ids(simple, top_fraction=0.26) == ["i08", "i09", "i10", "i11"]  # 3.12, rounded up
    assert kept_ids(simple, top_fraction=0.01, per="source") == ["i10", "i11"]
    assert kept_ids(simple, top_fraction=1.0) == [f"i{n:02}" for n in range(12)]


def test_rules_apply_in_their_order_whatever_the_order_given(simple: af.Scores) -> None:
    rules = {"top": 2, "where": "width < 600", "max_score": 3.0}
    for order in itertools.permutations(rules):
        selection = simple.select(**{name: rules[name] for name in order})
        assert selection.table()["image_id"].to_pylist() == ["i03", "i04"]
        assert dict(selection.counts.dropped) == {
            "where width < 600": 7,
            "max-score 3": 0,
            "top 2": 3,
        }
        assert [rule.label for rule in selection.rules] == list(selection.counts.dropped)


def test_ties_break_by_id_and_then_by_the_order_of_the_source(tmp_path: Path) -> None:
    rows = [Row(i, 5.0, width=n) for n, i in enumerate(["c", "b", "a", "b", None, "b"])]
    scores = open_rows(rows, tmp_path / "s", [2, 4])
    widths = [scores.select(top=k).table()["width"].to_pylist() for k in range(1, 7)]
    assert widths == [[2], [1, 2], [1, 2, 3], [1, 2, 3, 5], [0, 1, 2, 3, 5], [0, 1, 2, 3, 4, 5]]


def test_the_same_rule_twice_still_adds_up(simple: af.Scores) -> None:
    counts = simple.select(Where("width > 300"), Where("width > 300")).counts
    assert (counts.kept, dict(counts.dropped)) == (7, {"where width > 300": 5})


def test_one_scores_object_gives_many_selections(simple: af.Scores) -> None:
    for _ in range(3):
        for k in range(1, 13):
            assert len(simple.select(top=k)) == k
            assert len(simple.select(sample=k)) == k


def test_columns_named_like_anything_are_only_columns(tmp_path: Path) -> None:
    names = ["g", "b", "n", "why", "r", "c", "e", "id", "part", "row", "score", "draw", "turn"]
    names += ["band", "scores", "order", "select", 'say "hi"', "it's", "x", "meets", "dropped_by"]
    table = pa.table(
        {
            "image_id": [f"i{n}" for n in range(6)],
            "aesthetic_score": pa.array([1, 2, 3, 4, 5, 6], pa.float32()),
            **{name: ["u", "v", "u", "v", "u", "v"] for name in names},
        }
    )
    scores = af.open_scores(write_scores(tmp_path / "s", table))
    assert scores.summary().rows == 6
    assert scores.rank(1)['say "hi"'].to_pylist() == ["v"]
    for name in names:
        selection = scores.select(top=1, sample=1, per=name)
        assert selection.table()["image_id"].to_pylist() == ["i4", "i5"]
        assert selection.counts.groups == {"u": (3, 1), "v": (3, 1)}
    selection.write(tmp_path / "out", with_dropped=True)
    dropped = pq.read_table(tmp_path / "out" / "dropped.parquet")
    assert dropped["dropped_by"].to_pylist() == ["top 1 per dropped_by"] * 4


def test_columns_that_differ_only_in_case_keep_their_values(tmp_path: Path) -> None:
    table = pa.table(
        {
            "image_id": ["a", "b"],
            "aesthetic_score": pa.array([1, 2], pa.float32()),
            "WIDTH": [1, 2],
            "width": [30, 40],
        }
    )
    scores = af.open_scores(write_scores(tmp_path / "s", table))
    kept = scores.select(min_score=2).table().to_pylist()[0]
    assert [v for k, v in kept.items() if k.lower().startswith("width")] == [2, 40]
    assert scores.rank(1).to_pylist() == [kept]


def test_the_number_of_rows_is_that_of_the_source_for_each_group(simple: af.Scores) -> None:
    counts = simple.select(top=2, per="source").counts
    assert counts.groups == {"a": (7, 2), "b": (6, 2), "(none)": (1, 0)}
    shown = str(counts)
    for line in ("rows 14 100.0%", "kept 4 28.6%", "dropped 8 57.1%", "failed 2 14.3%"):
        assert line in " ".join(shown.split())
    assert "top 2 per source" in shown


def test_nonsense_is_refused(simple: af.Scores) -> None:
    nonsense: list[dict[str, Any]] = [
        {},
        {"top": 0},
        {"top": -3},
        {"top_fraction": 0},
        {"top_fraction": 1.01},
        {"top_fraction": math.nan},
        {"top": 1, "top_fraction": 0.5},
        {"sample": 0},
        {"min_score": math.nan},
        {"per": "source"},
        {"per": "source", "min_score": 1},
    ]
    for rules in nonsense:
        with pytest.raises(SelectionError):
            simple.select(**rules)


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("--top", "0"),
        ("--top", "-1"),
        ("--top", "1.5"),
        ("--top", "many"),
        ("--top", "0%"),
        ("--top", "101%"),
        ("--top", "x%"),
        ("--top", "1/0%"),
        ("--sample", "0"),
        ("--sample", "5%"),
        ("--min-score", "high"),
        ("--min-score", "nan"),
        ("--max-score", "inf"),
    ],
)
def test_an_options_text_that_makes_no_sense_is_shown(flag: str, text: str) -> None:
    option = next(o for o in options() if o.flag == flag)
    with pytest.raises(SelectionError) as refused:
        option.build(text, Modifiers())
    assert flag in str(refused.value)
    assert repr(text) in str(refused.value)


@pytest.mark.parametrize(
    ("flag", "text", "label"),
    [
        ("--top", "10,000", "top 10,000"),
        ("--top", "10_000", "top 10,000"),
        ("--top", "0.1%", "top 0.1%"),
        ("--top", "12.5 %", "top 12.5%"),
        ("--top", "100%", "top 100%"),
        ("--sample", "7", "sample 7"),
        ("--min-score", "5.5", "min-score 5.5"),
        ("--max-score", "-1", "max-score -1"),
        ("--where", "a > 1", "where a > 1"),
    ],
)
def test_an_options_text_makes_a_rule(flag: str, text: str, label: str) -> None:
    option = next(o for o in options() if o.flag == flag)
    assert option.build(text, Modifiers()).label == label


def test_an_unknown_group_column_lists_those_there_are(simple: af.Scores) -> None:
    for rules in ({"top": 1}, {"sample": 1}):
        with pytest.raises(SelectionError) as refused:
            simple.select(per="sauce", **rules)
        assert "'sauce'" in str(refused.value)
        assert "image_id, aesthetic_score, error, source, width" in str(refused.value)


# Samples.


def bands(rows: Sequence[Row]) -> Counter[int]:
    return Counter(math.floor(row.score / 0.5) for row in rows)


def assert_even(drawn: Sequence[Row], rows: Sequence[Row], count: int) -> None:
    """As many from each band as from any other, but for those that have no more."""
    assert len(drawn) == min(count, len(rows))
    there, taken = bands(rows), bands(drawn)
    left = [taken[band] for band in there if taken[band] < there[band]]
    assert max(taken.values(), default=0) <= min(left, default=math.inf) + 1


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    tables(),
    st.integers(1, 45),
    st.integers(-5, 5),
    st.sampled_from([None, "source"]),
    THRESHOLDS,
)
def test_a_sample_is_even_over_the_bands_of_scores(
    table: tuple[list[Row], list[int]],
    count: int,
    seed: int,
    per: str | None,
    min_score: float | None,
) -> None:
    rows = [Row(r.image_id, r.score, r.error, r.source, n) for n, r in enumerate(table[0])]
    rules = {"min_score": min_score} if min_score is not None else {}
    survivors = [
        row
        for row in rows
        if not row.failed and (min_score is None or row.score >= np.float32(min_score))
    ]
    with tempfile.TemporaryDirectory() as folder:
        scores = open_rows(rows, Path(folder) / "s", table[1])

        def draw(count: int) -> list[int]:
            selection = scores.select(sample=count, seed=seed, per=per, **rules)
            return selection.table()["width"].to_pylist()

        places = draw(count)
        drawn = [rows[place] for place in places]
        groups = {row.source for row in survivors} if per else {None}
        for group in groups:
            assert_even(
                [row for row in drawn if not per or row.source == group],
                [row for row in survivors if not per or row.source == group],
                count,
            )
        assert places == sorted(places)
        assert places == draw(count)
        assert set(places) <= set(draw(count + 3))


def test_seeds_draw_differently_and_fairly(tmp_path: Path) -> None:
    rows = [Row(f"i{n}", 5.25) for n in range(100)]
    scores = open_rows(rows, tmp_path / "s")
    draws = [tuple(kept_ids(scores, sample=20, seed=seed)) for seed in range(100)]
    assert len(set(draws)) == 100
    often = Counter(itertools.chain.from_iterable(draws))
    # Each of 100 rows is drawn with probability 0.2, 100 times: 20 +- 4; five sigma either way.
    assert len(often) == 100
    assert min(often.values()) > 0
    assert max(often.values()) < 40


# Order and bytes.


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """72,000 rows in three parts, with groups, ties, failures, and a nested column."""
    chance = np.random.default_rng(3)
    pieces = []
    for part in range(3):
        size = 24_000
        scores = np.round(chance.normal(5, 1, size), 2).astype(np.float32)
        errors = [None if n % 1000 else "embedding is all zeros" for n in range(size)]
        pieces.append(
            pa.table(
                {
                    "image_id": [f"{part}/{n:05}" for n in chance.permutation(size)],
                    "aesthetic_score": pa.array(scores, mask=np.arange(size) % 1000 == 0),
                    "error": pa.array(errors, pa.string()),
                    "source": [f"s{n % 7}" for n in range(size)],
                    "tags": [[f"t{n % 3}", None] for n in range(size)],
                }
            )
        )
    return write_scores(tmp_path / "many", *pieces)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("as_", FORMATS)
def test_the_same_command_gives_the_same_bytes(
    tmp_path: Path, many: Path, as_: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = duckdb.connect
    written = []
    for threads in (1, 4):

        def with_threads(config: dict[str, Any], threads: int = threads) -> Any:
            return connect(config={**config, "threads": threads})

        monkeypatch.setattr(duckdb, "connect", with_threads)
        selection = af.open_scores(many).select(
            where="source <> 's3'", top_fraction=0.4, sample=9000, per="source", seed=4
        )
        folder = tmp_path / f"{as_}{len(written)}"
        selection.write(folder, as_=as_, with_dropped=as_ != "ids")
        written.append(contents(folder))
    assert written[0] == written[1]
    assert len(written[0]) == (4 if as_ != "ids" else 2)


def test_what_is_kept_is_in_the_order_of_the_source(tmp_path: Path, many: Path) -> None:
    source = pa.concat_tables(pq.read_table(p) for p in sorted(many.glob("*.parquet")))
    ids, scores = source["image_id"].to_pylist(), source["aesthetic_score"].to_pylist()
    wanted = [i for i, s in zip(ids, scores, strict=True) if s is not None and s >= 6]
    path = af.open_scores(many).select(min_score=6).write(tmp_path / "kept")
    assert pq.read_table(path)["image_id"].to_pylist() == wanted
    assert len(wanted) > 8_000


@pytest.mark.timeout(60)
def test_the_best_hundredth_of_two_million(tmp_path: Path) -> None:
    size = 2_000_000
    chance = np.random.default_rng(8)
    scores = np.round(chance.normal(5, 0.7, size), 3).astype(np.float32)  # with many ties
    number = chance.permutation(size)
    digits = (number[:, None] // 10 ** np.arange(6, -1, -1) % 10 + ord("0")).astype(np.uint8)
    offsets = pa.py_buffer(np.arange(0, 7 * size + 1, 7, dtype=np.int32))
    ids = pa.StringArray.from_buffers(size, offsets, pa.py_buffer(digits))
    table = pa.table({"image_id": ids, "aesthetic_score": scores})
    folder = write_scores(tmp_path / "s", table.slice(0, 1_500_000), table.slice(1_500_000))

    started = time.monotonic()
    selection = af.open_scores(folder).select(top_fraction=0.01)
    path = selection.write(tmp_path / "kept")
    assert time.monotonic() - started < 10

    best = np.sort(np.lexsort((number, -scores))[: size // 100])
    kept = pq.read_table(path)
    assert kept["aesthetic_score"].to_numpy().tolist() == scores[best].tolist()
    assert kept["image_id"].to_pylist() == [f"{n:07}" for n in number[best]]
    assert selection.counts.dropped == {"top 1%": size - size // 100}


# Conditions that are malformed, or hostile.

SECRET = "do not read me"


@pytest.fixture
def bystander(tmp_path: Path) -> Path:
    """A file that no condition may read."""
    path = tmp_path / "bystander.csv"
    path.write_text(SECRET, encoding="utf-8")
    return path


MALFORMED = [
    "",
    "   ",
    "width >",
    "width > 1)",
    "(width > 1",
    "width > 1; SELECT 1",
    "width > 1, width > 2",
    "width > 1 ORDER BY width",
    "width > 1 LIMIT 1",
    "width > 1 UNION SELECT true",
    "width > 1) OR (1 = 1",
    "width > 1 /*",
    "ATTACH 'x.db'",
    "DROP VIEW scores",
    "PRAGMA database_list",
    "SET memory_limit = '1GB'",
    "width > ?",
    "width > $1",
    "nosuch > 1",
    "nosuch(width)",
    "width + 1",
    "'yes'",
    "NULL",
    "*",
    "COLUMNS(*) > 1",
    "COLUMNS('width|error') IS NULL",
    "count(*) > 1",
    "row_number() OVER () = 1",
    "unnest([true, false])",
    "image_id::INTEGER > 1",
]


@pytest.mark.parametrize("condition", MALFORMED)
def test_a_malformed_condition_is_shown_with_the_complaint(
    simple: af.Scores, tmp_path: Path, condition: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SelectionError) as refused:
        simple.select(where=condition)
    message = str(refused.value)
    assert repr(condition) in message
    assert "Error" in message or "type" in message
    assert "__fate" not in message  # nothing of our own query
    assert sorted(tmp_path.rglob("*")) == before
    assert len(simple.select(where="true")) == 12  # and no harm is done


HOSTILE = [
    "1=1); COPY (SELECT 1) TO '{made}'; --",
    "1=1; COPY (SELECT 1) TO '{made}'",
    "EXISTS (COPY (SELECT 1) TO '{made}')",
    "(COPY (SELECT 1) TO '{made}') IS NULL",
    "1=1); ATTACH '{made}' AS other; --",
    "1=1); EXPORT DATABASE '{made}'; --",
    "1=1); INSTALL httpfs; LOAD httpfs; --",
    "1=1); SET enable_external_access = true; --",
    "length((SELECT content FROM read_text('{secret}'))) > 0",
    "(SELECT count(*) FROM read_csv('{secret}')) > 0",
    "(SELECT count(*) FROM read_csv_auto('{secret}')) >= 0",
    "(SELECT count(*) FROM read_blob('{secret}')) > 0",
    "(SELECT count(*) FROM read_json('{secret}')) > 0",
    "(SELECT count(*) FROM read_parquet('{other}')) > 0",
    "(SELECT count(*) FROM '{secret}') > 0",
    '(SELECT count(*) FROM "{secret}") > 0',
    "(SELECT count(*) FROM parquet_metadata('{other}')) > 0",
    "(SELECT count(*) FROM glob('{folder}/*')) > 0",
    "(SELECT count(*) FROM sniff_csv('{secret}')) > 0",
    "image_id IN (SELECT column0 FROM read_csv('{secret}', header = false))",
    "image_id IN (TABLE '{secret}')",
    "true UNION SELECT content = '' FROM read_text('{secret}')",
    "(SELECT count(*) FROM read_text('/etc/hostname')) > 0",
    "(SELECT count(*) FROM read_csv('http://127.0.0.1:9/x.csv')) > 0",
    "(SELECT count(*) FROM read_parquet('s3://bucket/x.parquet')) > 0",
    "getenv('HOME') <> ''",
    "(SELECT count(*) FROM duckdb_secrets(redact = false) WHERE load_extension('httpfs')) > 0",
]


@pytest.mark.parametrize("condition", HOSTILE)
def test_a_condition_can_neither_write_nor_read_other_files(
    simple: af.Scores, tmp_path: Path, bystander: Path, condition: str
) -> None:
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"image_id": ["x"]}), other)
    made = tmp_path / "made"
    condition = condition.format(made=made, secret=bystander, other=other, folder=tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    with pytest.raises(SelectionError) as refused:
        simple.select(where=condition).counts  # noqa: B018
    assert SECRET not in str(refused.value)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_a_hostile_condition_on_the_command_line_is_a_short_message(
    simple: af.Scores, tmp_path: Path, cli: Run, bystander: Path
) -> None:
    for condition in ("width >", f"1=1); COPY (SELECT 1) TO '{tmp_path}/made'; --"):
        done = cli("filter", simple.path, "--out", "kept", "--where", condition)
        assert done.returncode == 2
        assert condition in done.stderr
        assert "Parser Error" in done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout == ""
    assert not (tmp_path / "made").exists()
    assert not (tmp_path / "kept").exists()
    assert bystander.exists()


# Writing.


HOSTILE_IDS = [
    'quo"ted',
    '"',
    "com,ma",
    "new\nline",
    "carriage\r\nreturn",
    "tab\tbed",
    "ünïcödé/Größe",
    "图像",
    "😀👩‍👩‍👧‍👦",
    "  spaces  ",
    "'; DROP VIEW scores; --",
    "back\\slash",
    "=1+1",
    "null",
    "",
    "\u2028line separator",
    "e\u0301",
    "-",
]


@pytest.fixture
def hostile(tmp_path: Path) -> af.Scores:
    """Rows of hostile ids, with columns of many types."""
    size = len(HOSTILE_IDS)
    values = np.random.default_rng(1).normal(5, 1, size).astype(np.float32)
    values[:3] = [0.1, 5.2366, 1e-7]
    table = pa.table(
        {
            "image_id": HOSTILE_IDS,
            "aesthetic_score": values,
            "error": pa.nulls(size, pa.string()),
            "caption": [None, *HOSTILE_IDS[1:]],
            "width": pa.array([None, *range(1, size)], pa.int64()),
            "tags": [["a", None, 'b"\n'], None, *[[]] * (size - 2)],
            "box": [{"x": 1, "name": "n\n"}, None, *[{"x": None, "name": '"'}] * (size - 2)],
            "taken": pa.array([0, None] * (size // 2), pa.timestamp("us")),
            "digest": [b"\x00\xff", None, *[b"abc"] * (size - 2)],
            "ratio": [math.nan, math.inf, *[0.1] * (size - 2)],
            "public": [None, True, *[False] * (size - 2)],
        }
    )
    return af.open_scores(write_scores(tmp_path / "s", table))


def test_parquet_holds_the_columns_as_they_were(hostile: af.Scores, tmp_path: Path) -> None:
    kept = pq.read_table(hostile.select(min_score=-99).write(tmp_path / "kept"))
    source = pq.read_table(next((tmp_path / "s").glob("*.parquet")))
    assert kept.column_names == source.column_names
    for name in kept.column_names:
        if name != "ratio":  # NaN is not equal to itself
            assert kept[name].to_pylist() == source[name].to_pylist()
    assert kept.schema.field("aesthetic_score").type == pa.float32()


def test_csv_reads_back_with_the_csv_module(hostile: af.Scores, tmp_path: Path) -> None:
    path = hostile.select(min_score=-99).write(tmp_path / "kept", as_="csv")
    assert path == tmp_path / "kept" / "kept.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image_id"] for row in rows] == HOSTILE_IDS
    assert [row["caption"] for row in rows] == ["", *HOSTILE_IDS[1:]]
    assert [row["aesthetic_score"] for row in rows[:3]] == ["0.1", "5.2366", "1e-7"]
    scores = hostile.table(["aesthetic_score"])["aesthetic_score"].to_numpy()
    assert [np.float32(row["aesthetic_score"]) for row in rows] == scores.tolist()
    assert json.loads(rows[0]["tags"]) == ["a", None, 'b"\n']
    assert rows[1]["tags"] == ""
    assert json.loads(rows[0]["box"]) == {"x": 1, "name": "n\n"}
    assert rows[0]["taken"].startswith("1970-01-01 00:00:00")
    assert (rows[0]["width"], rows[1]["width"]) == ("", "1")
    assert (rows[0]["public"], rows[1]["public"]) == ("", "true")


def test_json_lines_read_back_with_the_json_module(hostile: af.Scores, tmp_path: Path) -> None:
    path = hostile.select(min_score=-99).write(tmp_path / "kept", as_="jsonl")
    text = path.read_bytes().decode()
    lines = text.split("\n")
    assert lines.pop() == ""
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [row["image_id"] for row in rows] == HOSTILE_IDS
    assert [row["caption"] for row in rows] == [None, *HOSTILE_IDS[1:]]
    assert '"aesthetic_score": 0.1,' in lines[0]  # not 0.10000000149011612
    assert '"aesthetic_score": 5.2366,' in lines[1]
    scores = hostile.table(["aesthetic_score"])["aesthetic_score"].to_numpy()
    assert [np.float32(row["aesthetic_score"]) for row in rows] == scores.tolist()
    assert rows[0]["tags"] == ["a", None, 'b"\n']
    assert rows[0]["box"] == {"x": 1, "name": "n\n"}
    assert rows[0]["taken"] == "1970-01-01T00:00:00"
    assert rows[0]["digest"] == "AP8="  # base64
    assert [row["ratio"] for row in rows[:3]] == [None, None, 0.1]


def test_ids_are_one_a_line(hostile: af.Scores, tmp_path: Path) -> None:
    selection = hostile.select(where="NOT contains(image_id, chr(10))")
    path = selection.write(tmp_path / "kept", as_="ids")
    wanted = [i for i in HOSTILE_IDS if "\n" not in i]
    assert path.name == "kept.txt"
    assert path.read_bytes().decode().split("\n") == [*wanted, ""]


def test_an_id_that_breaks_a_line_is_not_listed(hostile: af.Scores, tmp_path: Path) -> None:
    selection = hostile.select(min_score=-99)
    with pytest.raises(OutputError, match=r"new\\nline.*jsonl or parquet"):
        selection.write(tmp_path / "kept", as_="ids")
    assert list((tmp_path / "kept").iterdir()) == []


def test_a_missing_id_is_not_listed(tmp_path: Path) -> None:
    scores = open_rows([Row("a", 1.0), Row(None, 2.0)], tmp_path / "s")
    with pytest.raises(OutputError, match="no image_id"):
        scores.select(top=2).write(tmp_path / "kept", as_="ids")
    assert scores.select(top=2).write(tmp_path / "kept").exists()


def test_an_unknown_format_lists_those_there_are(simple: af.Scores, tmp_path: Path) -> None:
    with pytest.raises(OutputError) as refused:
        simple.select(top=1).write(tmp_path / "kept", as_="xlsx")
    for name in ("'xlsx'", *FORMATS):
        assert name in str(refused.value)
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("as_", FORMATS)
def test_what_is_kept_of_nothing_is_an_empty_file(
    simple: af.Scores, tmp_path: Path, as_: str
) -> None:
    selection = simple.select(min_score=100)
    path = selection.write(tmp_path / "kept", as_=as_)
    assert selection.table().num_rows == 0
    assert selection.table().column_names == simple.columns
    if as_ == "parquet":
        assert pq.read_table(path).column_names == simple.columns
    elif as_ == "csv":
        with path.open(newline="") as file:
            assert list(csv.reader(file)) == [simple.columns]
    else:
        assert path.read_bytes() == b""


def test_kept_dropped_and_failed_say_where_they_come_from(
    simple: af.Scores, tmp_path: Path
) -> None:
    folder = tmp_path / "kept"
    simple.select(min_score=2, top=3).write(folder, with_dropped=True)
    assert sorted(contents(folder)) == [
        "_selection.json",
        "dropped.parquet",
        "failed.parquet",
        "kept.parquet",
    ]
    for name in ("kept", "dropped", "failed"):
        stamp = json.loads(pq.read_schema(folder / f"{name}.parquet").metadata[b"aesthetic_filter"])
        assert {key: stamp[key] for key in PROVENANCE} == PROVENANCE
        assert stamp["selection"] == ["min-score 2", "top 3"]
    described = json.loads((folder / "_selection.json").read_text(encoding="utf-8"))
    assert described["rules"] == ["min-score 2", "top 3"]
    assert described["counts"] == {
        "rows": 14,
        "kept": 3,
        "dropped": {"min-score 2": 2, "top 3": 7},
        "failed": 2,
    }
    assert {key: described["scores"][key] for key in PROVENANCE} == PROVENANCE
    assert pq.read_table(folder / "failed.parquet")["error"].to_pylist() == [
        "embedding is all zeros",
        None,
    ]


def test_what_is_kept_can_be_opened_and_chosen_from_again(
    simple: af.Scores, tmp_path: Path
) -> None:
    simple.select(min_score=4).write(tmp_path / "kept", with_dropped=True)
    again = af.open_scores(tmp_path / "kept")
    assert len(again) == 6
    assert kept_ids(again, top=2) == ["i10", "i11"]
    again.select(top=2).write(tmp_path / "fewer")
    assert len(af.open_scores(tmp_path / "fewer")) == 2
    assert af.open_scores(tmp_path / "fewer").provenance["head"] == PROVENANCE["head"]
    dropped = af.open_scores(tmp_path / "kept" / "dropped.parquet")
    assert kept_ids(dropped, top=1) == ["i05"]


def test_another_selection_replaces_the_older_one_whole(simple: af.Scores, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    simple.select(top=3).write(folder, as_="csv", with_dropped=True)
    assert sorted(contents(folder)) == ["_selection.json", "dropped.csv", "failed.csv", "kept.csv"]
    (folder / "kept.csv.unfinished").write_text("of a killed one", encoding="utf-8")
    simple.select(top=2).write(folder, as_="jsonl")
    assert sorted(contents(folder)) == ["_selection.json", "kept.jsonl"]
    simple.select(top=1).write(folder)
    assert sorted(contents(folder)) == ["_selection.json", "kept.parquet"]
    assert len(af.open_scores(folder)) == 1
    assert json.loads((folder / "_selection.json").read_text())["counts"]["kept"] == 1


def test_a_selection_that_fails_leaves_the_older_one_as_it_was(
    tmp_path: Path,
) -> None:
    # The id that cannot be listed comes in a later batch: much is written by then.
    rows = [Row(f"i{n}", 5.0) for n in range(70_000)] + [Row("a\nb", 1.0)]
    scores = open_rows(rows, tmp_path / "s")
    folder = tmp_path / "kept"
    scores.select(min_score=2).write(folder, as_="ids")
    before = contents(folder)
    with pytest.raises(OutputError, match="line break"):
        scores.select(min_score=0).write(folder, as_="ids")
    assert contents(folder) == before


@pytest.mark.parametrize("stranger", ["holiday.jpg", "kept.parquet", "sub"])
def test_a_folder_of_other_files_is_not_written_into(
    simple: af.Scores, tmp_path: Path, stranger: str
) -> None:
    path = tmp_path / "kept" / stranger
    path.parent.mkdir()
    if stranger == "sub":
        path.mkdir()
    else:
        path.write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match=stranger):
        simple.select(top=1).write(tmp_path / "kept")
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == [stranger]


def test_a_folder_of_scores_is_not_written_into(simple: af.Scores, tmp_path: Path) -> None:
    before = contents(tmp_path / "scores")
    for place in ("scores", "scores/kept", "scores/a/b"):
        with pytest.raises(OutputError, match="scores"):
            simple.select(top=1).write(tmp_path / place)
    assert contents(tmp_path / "scores") == before


def test_a_file_or_a_closed_place_is_no_folder(simple: af.Scores, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for place in ("file", "file/kept"):
        with pytest.raises(OutputError, match="file"):
            simple.select(top=1).write(tmp_path / place)
    with pytest.raises(OutputError, match="local folder"):
        simple.select(top=1).write("s3://bucket/kept")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


# Scores that others made.


def test_a_parquet_file_of_ids_and_scores_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "theirs.parquet"
    pq.write_table(
        pa.table({"aesthetic_score": [1.5, None, 3.5, math.nan], "image_id": [3, 20, 100, 4]}), path
    )
    scores = af.open_scores(path)
    selection = scores.select(top=1)
    assert selection.table()["image_id"].to_pylist() == ["100"]
    assert (selection.counts.kept, selection.counts.failed) == (1, 2)
    assert scores.provenance == {}
    selection.write(tmp_path / "kept", as_="ids")
    assert (tmp_path / "kept" / "kept.txt").read_text() == "100\n"


@pytest.mark.parametrize(
    "values",
    [
        pa.array([3, 1, 2], pa.int64()),
        pa.array([3, 1, 2], pa.float64()),
        pa.array([3, 1, 2], pa.float16()),
        pa.array([3, 1, 2]).cast(pa.decimal128(20, 1)),
    ],
    ids=lambda values: str(values.type),
)
def test_scores_of_any_kind_of_number(tmp_path: Path, values: pa.Array) -> None:
    path = tmp_path / "theirs.parquet"
    pq.write_table(pa.table({"image_id": ["a", "b", "c"], "aesthetic_score": values}), path)
    scores = af.open_scores(path)
    assert kept_ids(scores, top=2) == ["a", "c"]
    assert kept_ids(scores, min_score=2.5) == ["a"]
    assert scores.summary().percentiles[0.5] == 2
    assert kept_ids(scores, sample=3) == ["a", "b", "c"]


# Order of parts and rules as objects of one's own.


def test_a_rule_of_ones_own(simple: af.Scores) -> None:
    @dataclass(frozen=True)
    class Odd:
        order: int = 45
        label: str = "odd"

        def condition(self, rows: str, database: Any, scratch: str) -> Any:
            from aesthetic_filter.selection.rule import Condition

            assert database.row(f"SELECT count(*) FROM {rows}") == (4,)
            assert scratch
            return Condition("r.width % 200 = 0")

    selection = simple.select(Odd(), MinScore(1.0), top=4)
    assert selection.table()["image_id"].to_pylist() == ["i08", "i10"]
    assert dict(selection.counts.dropped) == {"min-score 1": 0, "top 4": 8, "odd": 2}


@pytest.fixture
def filtered(simple: af.Scores, cli: Run) -> Iterator[subprocess.CompletedProcess[str]]:
    return cli(
        "filter",
        simple.path,
        "--out",
        "kept",
        *("--where", "width >= 200", "--top", "50%", "--per", "source", "--with-dropped"),
    )


def test_the_command_line_prints_what_adds_up(
    filtered: subprocess.CompletedProcess[str], tmp_path: Path
) -> None:
    assert filtered.returncode == 0, filtered.stderr
    words = " ".join(filtered.stdout.split())
    # Nine rows are at least 200 wide: i02 to i11 without i05; five of source a, four of b.
    for line in ("rows 14", "kept 5", "dropped 7", "where width >= 200 3", "failed 2"):
        assert line in words
    assert "top 50% per source 4" in words
    kept = pq.read_table(tmp_path / "kept" / "kept.parquet")["image_id"].to_pylist()
    assert kept == ["i06", "i08", "i09", "i10", "i11"]
