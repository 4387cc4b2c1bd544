"""Comparing scores: every number against SciPy and plain Python, and the page in a real browser."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from scipy.stats import pearsonr, spearmanr

import aesthetic_filter as af
from aesthetic_filter.compare import SCATTER, Comparison, Pair, compare, comparison_page
from aesthetic_filter.errors import UsageError
from aesthetic_filter.scores import open_scores
from browser import SIZES, as_address, watched
from conftest import Run
from images import EXACT, REFERENCE, affine, jpeg, rows, write_files

OTHER = "laion-v1"
HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(2)</script>",
    "\"quoted\" and 'single' & <b>bold</b>",
    "two\nlines\tand a tab",
    "{{ 7 * 7 }} ${8} `ls`",
    "ünï/\u202ereversed.jpg",
    "x" * 300,
)


# Scores as one likes, and what should be found in them, worked out with nothing of ours.

Row = tuple[str, float | None]


def scores_file(
    path: Path, found: Sequence[Row], head: str | None = "one", errors: Sequence[int] = ()
) -> af.Scores:
    """A Parquet file with these scores, by a head of this name."""
    why = ["broken" if row in errors else None for row in range(len(found))]
    table = pa.table(
        {
            "image_id": pa.array([image for image, _ in found], pa.string()),
            "aesthetic_score": pa.array([score for _, score in found], pa.float32()),
            "error": pa.array(why, pa.string()),
        }
    )
    if head is not None:
        stamp = {"head": {"name": head, "sha256": head.encode().hex()}}
        table = table.replace_schema_metadata({b"aesthetic_filter": json.dumps(stamp).encode()})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return open_scores(path)


def named(values: Sequence[float] | NDArray[Any], prefix: str = "") -> list[Row]:
    return [(f"{prefix}{row:05d}", float(value)) for row, value in enumerate(values)]


def matched(a: Sequence[Row], b: Sequence[Row]) -> list[tuple[str, int, float, float]]:
    """(id, row in a, score in a, score in b): the first of an id with the first, and so on."""
    there: dict[tuple[str, int], float] = {}
    seen: Counter[str] = Counter()
    for image, score in b:
        if score is not None and np.isfinite(score):
            there[image, seen[image]] = float(np.float32(score))
            seen[image] += 1
    seen.clear()
    found = []
    for row, (image, score) in enumerate(a):
        if score is None or not np.isfinite(score):
            continue
        other = there.get((image, seen[image]))
        seen[image] += 1
        if other is not None:
            found.append((image, row, float(np.float32(score)), other))
    return found


def lower(values: NDArray[Any]) -> NDArray[np.float64]:
    """The share of the others that are lower."""
    below = np.searchsorted(np.sort(values), values, side="left")
    return below / max(len(values) - 1, 1)


def expected(
    a: Sequence[Row], b: Sequence[Row], thresholds: tuple[float, float], n: int
) -> dict[str, Any]:
    both = matched(a, b)
    x, y = (np.array([pair[k] for pair in both]) for k in (2, 3))
    px, py = lower(x), lower(y)
    in_a, in_b = x >= np.float32(thresholds[0]), y >= np.float32(thresholds[1])
    pairs = [
        Pair(image, ax, bx, float(pa_), float(pb), 0, row)
        for (image, row, ax, bx), pa_, pb in zip(both, px, py, strict=True)
    ]

    def best(which: NDArray[np.bool_], rise: Callable[[Pair], float]) -> tuple[Pair, ...]:
        some = [pair for pair, there in zip(pairs, which, strict=True) if there]
        return tuple(sorted(some, key=lambda p: (-rise(p), p.image_id, p.row))[:n])

    return {
        "both": len(both),
        "spearman": float(spearmanr(x, y).statistic),
        "pearson": float(pearsonr(x, y).statistic),
        "mean_change": float((y - x).mean()),
        "kept": (int(in_a.sum()), int(in_b.sum())),
        "sides": tuple(
            int(which.sum()) for which in (in_a & in_b, in_a & ~in_b, ~in_a & in_b, ~in_a & ~in_b)
        ),
        "gained": best(~in_a & in_b, lambda p: p.place_b - p.place_a),
        "lost": best(in_a & ~in_b, lambda p: p.place_a - p.place_b),
        "apart": best(px != py, lambda p: abs(p.place_a - p.place_b)),
    }


def check(found: Comparison, a: Sequence[Row], b: Sequence[Row], n: int = 10) -> None:
    wanted = expected(a, b, found.thresholds, n)
    for name in ("spearman", "pearson", "mean_change"):
        assert getattr(found, name) == pytest.approx(wanted.pop(name), abs=1e-9), name
    assert {name: getattr(found, name) for name in wanted} == wanted


def best_tenth(values: Sequence[float] | NDArray[Any]) -> float:
    """The score of the last of the best tenth, rounded up."""
    ordered = np.sort(np.asarray(values, np.float32))[::-1]
    return float(ordered[-(-len(ordered) // 10) - 1])


# Two heads over the same embeddings.


@pytest.fixture(scope="module")
def two_heads(
    make_embeddings: Callable[..., NDArray[Any]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, NDArray[Any]]:
    """A folder with scores by two heads, of two shards; of the rows four fail."""
    folder = tmp_path_factory.mktemp("two")
    vectors = make_embeddings(2500, seed=3)
    vectors[[5, 1600]] = 0
    vectors[[6, 1601], 3] = np.nan
    (folder / "in").mkdir()
    np.save(folder / "in/0.npy", vectors[:1500])
    np.save(folder / "in/1.npy", vectors[1500:])
    af.score(folder / "in", folder / "a")
    af.score(folder / "in", folder / "b", head=OTHER)
    return folder, vectors


def test_two_heads_over_the_same_embeddings(two_heads: tuple[Path, NDArray[Any]], cli: Run) -> None:
    folder, vectors = two_heads
    a, b = open_scores(folder / "a"), open_scores(folder / "b")
    found = compare(a, b, n=7)
    good = np.ones(len(vectors), np.bool_)
    good[[5, 6, 1600, 1601]] = False
    one, two = affine(vectors[good]), affine(vectors[good], OTHER)
    assert found.both == 2496
    assert found.only == (0, 0)
    assert found.spearman == pytest.approx(spearmanr(one, two).statistic, abs=1e-5)
    assert found.pearson == pytest.approx(pearsonr(one, two).statistic, abs=1e-5)
    assert found.mean_change == pytest.approx((two - one).mean(), abs=1e-5)
    assert not found.same_head
    assert found.names == ((str(folder / "a"), REFERENCE), (str(folder / "b"), OTHER))
    # 2,496 images: the best tenth is 250 of them, and the other head keeps as many.
    assert found.kept == (250, 250)
    assert found.thresholds[0] == pytest.approx(np.sort(one)[-250], abs=1e-5)
    assert found.thresholds[1] == pytest.approx(np.sort(two)[-250], abs=1e-5)

    # The rest exactly, from the scores as they lie in the parts.
    stored = [[(row["image_id"], row["aesthetic_score"]) for row in rows(folder / k)] for k in "ab"]
    got = {
        name: tuple(
            replace(pair, part=0, row=pair.row + 1500 * pair.part) for pair in getattr(found, name)
        )
        for name in ("gained", "lost", "apart")
    }
    check(replace(found, **got), *stored, n=7)
    assert {pair.part for pair in found.apart} == {0, 1}
    assert [len(pairs) for pairs in (found.gained, found.lost, found.apart)] == [7, 7, 7]

    done = cli("compare", folder / "a", folder / "b", "-n", 7, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    sides = told["sides"]
    assert sum(sides.values()) == told["both"] == 2496
    assert [sides["both"] + sides["only_a"], sides["both"] + sides["only_b"]] == told["kept"]
    assert tuple(sides.values()) == found.sides
    assert told["spearman"] == pytest.approx(found.spearman, abs=1e-12)
    for name in ("gained", "lost", "apart"):
        assert [Pair(**pair) for pair in told[name]] == list(getattr(found, name))
    assert "points" not in told


def test_as_text(two_heads: tuple[Path, NDArray[Any]], cli: Run) -> None:
    folder, _ = two_heads
    found = compare(open_scores(folder / "a"), open_scores(folder / "b"))
    done = cli("compare", folder / "a", folder / "b")
    assert done.returncode == 0
    assert done.stdout.rstrip("\n") == str(found)
    lines = {" ".join(line.split()) for line in done.stdout.splitlines()}
    assert "images in both 2,496" in lines
    assert f"both keep {found.sides[0]} {found.sides[0] / 2496:.1%}" in lines
    assert f"neither keeps {found.sides[3]:,} {found.sides[3] / 2496:.1%}" in lines
    assert f"rank correlation {found.spearman:.4f} (Spearman), {found.pearson:.4f} (Pearson)" in (
        lines
    )
    assert "(the heads have scales of their own)" in done.stdout
    assert "only in a" not in done.stdout
    best = found.gained[0]
    assert (
        f"{best.a:.4f} {best.b:.4f} {best.place_a:.1%} {best.place_b:.1%} {best.image_id}" in lines
    )


def test_scores_compared_with_themselves(two_heads: tuple[Path, NDArray[Any]]) -> None:
    scores = open_scores(two_heads[0] / "a")
    found = compare(scores, scores)
    assert found.spearman == pytest.approx(1)
    assert found.pearson == pytest.approx(1)
    assert found.mean_change == 0
    assert found.same_head
    assert found.sides == (250, 0, 0, 2246)
    assert (found.gained, found.lost, found.apart) == ((), (), ())
    assert "scales of their own" not in str(found)
    assert "rise most" not in str(found)


# Ties.


@pytest.mark.parametrize(("seed", "levels"), [(0, 2), (1, 5), (2, 12), (3, 400)])
def test_many_ties(tmp_path: Path, seed: int, levels: int) -> None:
    chance = np.random.default_rng(seed)
    a = chance.integers(0, levels, 300) / 8 - 3
    b = np.round(0.6 * a + chance.integers(0, levels, 300) / 8, 2)
    first = scores_file(tmp_path / "a.parquet", named(a), "one")
    second = scores_file(tmp_path / "b.parquet", named(b)[::-1], "two")
    found = compare(first, second, n=15)
    check(found, named(a), named(b), n=15)
    assert found.thresholds[0] == best_tenth(a)
    # As many, or where a tie makes that impossible, no more than must be.
    kept = int((a >= np.float32(found.thresholds[0])).sum())
    assert found.thresholds[1] == float(np.sort(b.astype(np.float32))[::-1][kept - 1])
    assert found.kept[1] >= kept
    assert compare(first, second, n=15).apart == found.apart


def test_the_lists_are_in_order_and_equals_by_id(tmp_path: Path) -> None:
    a = named([1, 2, 3, 4, 5, 6, 7, 8])
    b = named([1, 2, 7, 8, 5, 6, 3, 4])
    found = compare(
        scores_file(tmp_path / "a.parquet", a),
        scores_file(tmp_path / "b.parquet", b),
        threshold=5.5,
    )
    ids = {name: [p.image_id for p in getattr(found, name)] for name in ("gained", "lost", "apart")}
    assert ids == {
        "gained": ["00002", "00003"],
        "lost": ["00006", "00007"],
        "apart": ["00002", "00003", "00006", "00007"],
    }
    assert found.gained[0] == Pair("00002", 3.0, 7.0, 2 / 7, 6 / 7, 0, 2)
    assert found.sides == (1, 2, 2, 3)
    check(found, a, b)
    assert [len(pairs) for pairs in (found.gained, found.lost, found.apart)] == [2, 2, 4]
    for pairs in (found.gained, found.lost, found.apart):
        moved = [abs(p.place_a - p.place_b) for p in pairs]
        assert all(one >= two for one, two in pairwise(moved))


# Thresholds.


def test_one_head_one_threshold(tmp_path: Path) -> None:
    a = named(np.arange(100) / 10)
    b = [(image, score + 1) for image, score in a if score is not None]
    found = compare(scores_file(tmp_path / "a.parquet", a), scores_file(tmp_path / "b.parquet", b))
    assert found.same_head
    assert found.thresholds == (float(np.float32(9)),) * 2
    assert found.kept == (10, 20)
    check(found, a, b)


@pytest.mark.parametrize("count", [1, 9, 10, 11, 100, 101])
def test_the_best_tenth_is_rounded_up(tmp_path: Path, count: int) -> None:
    chance = np.random.default_rng(count)
    a, b = chance.permutation(count) / 4, chance.permutation(count) / 16
    found = compare(
        scores_file(tmp_path / "a.parquet", named(a), "one"),
        scores_file(tmp_path / "b.parquet", named(b), "two"),
    )
    assert found.kept == (-(-count // 10),) * 2
    assert found.thresholds == (best_tenth(a), best_tenth(b))


@pytest.mark.parametrize(
    ("count", "kept"), [(25, 19), (25, 12), (29, 15), (41, 35), (300, 1), (300, 300), (300, 0)]
)
def test_another_head_keeps_as_many(tmp_path: Path, count: int, kept: int) -> None:
    """Numbers for which a rank worked out as a fraction is one too many, and the ends."""
    chance = np.random.default_rng(count)
    a, b = chance.permutation(count), 100 + chance.permutation(count) / 32
    found = compare(
        scores_file(tmp_path / "a.parquet", named(a), "one"),
        scores_file(tmp_path / "b.parquet", named(b), "two"),
        threshold=count - kept,
    )
    assert found.kept == (kept, kept)
    assert found.thresholds[0] == count - kept
    check(found, named(a), named(b))
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["kept"] == [kept, kept]


def test_thresholds_as_given(tmp_path: Path, cli: Run) -> None:
    chance = np.random.default_rng(5)
    a, b = named(chance.normal(5, 1, 400)), named(chance.normal(0, 2, 400))
    one = scores_file(tmp_path / "a.parquet", a, "one")
    two = scores_file(tmp_path / "b.parquet", b, "two")
    for first, second in ((5.25, -0.5), (4, None), (None, 1.5), (np.float32(5.1), np.float64(0))):
        found = compare(one, two, threshold=first, threshold_b=second)
        check(found, a, b)
        given = [(k, x) for k, x in enumerate((first, second)) if x is not None]
        assert all(found.thresholds[k] == x for k, x in given)
    same = scores_file(tmp_path / "c.parquet", b, "one")
    assert compare(one, same, threshold=4).thresholds == (4, 4)
    assert compare(one, same, threshold=4, threshold_b=1).thresholds == (4, 1)

    done = cli(
        *("compare", "a.parquet", "b.parquet", "--threshold", 5.25, "--threshold-b", -0.5, "--json")
    )
    told = json.loads(done.stdout)
    assert told["thresholds"] == [5.25, -0.5]
    wanted = expected(a, b, (5.25, -0.5), 10)
    assert told["kept"] == list(wanted["kept"])


def test_a_threshold_counts_what_equals_it(tmp_path: Path) -> None:
    """0.1 is no float32: the threshold is rounded as the scores are."""
    a = named([0.1, 0.2, 0.3, 0.05])
    one = scores_file(tmp_path / "a.parquet", a)
    assert compare(one, one, threshold=0.1).kept == (3, 3)
    assert compare(one, one, threshold=0.2).kept == (2, 2)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e39"])
def test_a_threshold_that_is_no_score(tmp_path: Path, value: str) -> None:
    one = scores_file(tmp_path / "a.parquet", named([1, 2]))
    with pytest.raises(UsageError, match="a threshold is a number that a score can have, not"):
        compare(one, one, threshold=float(value))
    with pytest.raises(UsageError, match="a threshold is a number that a score can have, not"):
        compare(one, one, threshold_b=float(value))


# Rows that do not match.


def test_rows_in_only_one_and_rows_that_failed(tmp_path: Path) -> None:
    a: list[Row] = [("p", 1), ("q", 2), ("r", 3), ("s", None), ("t", 5), ("u", 6), ("x", 7)]
    b: list[Row] = [("x", 1), ("u", None), ("t", 3), ("s", 9), ("q", 5), ("y", 8), ("p", 2)]
    one = scores_file(tmp_path / "a.parquet", a, errors=[2])  # r has a score, and an error
    two = scores_file(tmp_path / "b.parquet", b)
    found = compare(one, two, threshold=2)
    # In both with a score: p, q, t, x; only in a: u; only in b: s, y.
    assert (found.both, found.only) == (4, (1, 2))
    left = [(image, None if image == "r" else score) for image, score in a]
    check(found, left, b)
    assert {pair.image_id for pair in found.apart} <= {"p", "q", "t", "x"}
    text = str(found)
    assert "only in a                  1" in text
    assert "only in b                  2" in text


def test_the_same_id_more_than_once(tmp_path: Path) -> None:
    """The first with the first, in the order of the files."""
    a: list[Row] = [("twice", 1), ("once", 2), ("twice", 3), ("thrice", 4), ("twice", 5)]
    b: list[Row] = [("thrice", 7), ("twice", 10), ("thrice", 8), ("twice", 30), ("thrice", 9)]
    found = compare(
        scores_file(tmp_path / "a.parquet", a),
        scores_file(tmp_path / "b.parquet", b),
        threshold=100,
        threshold_b=0,
    )
    assert [(p.image_id, p.a, p.b, p.row) for p in sorted(found.gained, key=lambda p: p.row)] == [
        ("twice", 1, 10, 0),
        ("twice", 3, 30, 2),
        ("thrice", 4, 7, 3),
    ]
    assert (found.both, found.only) == (3, (2, 2))
    check(found, a, b)


def test_an_image_id_that_is_missing_matches_nothing(tmp_path: Path) -> None:
    scores = scores_file(tmp_path / "a.parquet", [("p", 1), ("q", 2)])
    table = pa.table({"image_id": [None, "p"], "aesthetic_score": [1.0, 2.0]})
    pq.write_table(table, tmp_path / "b.parquet")
    found = compare(scores, open_scores(tmp_path / "b.parquet"))
    assert (found.both, found.only) == (1, (1, 1))
    assert found.names[1] == (str(tmp_path / "b.parquet"), "unknown head")
    assert not found.same_head


def test_nothing_in_common(tmp_path: Path, cli: Run) -> None:
    scores_file(tmp_path / "a.parquet", named([1, 2, 3], "a/"))
    scores_file(tmp_path / "b.parquet", [*named([1, 2, 3], "b/"), ("a/00001", None)])
    done = cli("compare", "a.parquet", "b.parquet", "--out", "page.html")
    assert done.returncode == 2
    assert "a.parquet and b.parquet have no scored image in common" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "page.html").exists()


def test_what_is_not_there(tmp_path: Path, cli: Run) -> None:
    scores_file(tmp_path / "a.parquet", named([1, 2, 3]))
    done = cli("compare", "a.parquet", "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert "nowhere: there is nothing there" in done.stderr


@pytest.mark.parametrize("constant", ["a", "b", "both", "one row"])
def test_constant_scores_have_no_correlation(tmp_path: Path, constant: str) -> None:
    values = np.array([1.25]) if constant == "one row" else np.arange(20) / 8
    flat = np.full(20, 5.5)
    a = values if constant in ("b", "one row") else flat
    b = values if constant in ("a", "one row") else flat
    one = scores_file(tmp_path / "a.parquet", named(a), "one")
    two = scores_file(tmp_path / "b.parquet", named(b), "two")
    found = compare(one, two)
    assert np.isnan(found.spearman)
    assert np.isnan(found.pearson)
    assert found.mean_change == pytest.approx(float((b - a).mean()))
    assert sum(found.sides) == len(a)
    assert "rank correlation  not known (Spearman), not known (Pearson)" in str(found)
    told = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert told["spearman"] is None
    assert told["pearson"] is None
    comparison_page(found, one, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text("utf-8")
    assert page.count("<b>not known</b>") == 2
    assert "<b>nan</b>" not in page


def test_fifty_thousand_rows(tmp_path: Path) -> None:
    chance = np.random.default_rng(9)
    a = chance.normal(5, 1, 50_000).astype(np.float32)
    b = (0.5 * a + chance.normal(0, 1, 50_000)).astype(np.float32)
    first, second = named(a), named(b)
    order = chance.permutation(50_000)
    one = scores_file(tmp_path / "a.parquet", first, "one")
    two = scores_file(tmp_path / "b.parquet", [second[k] for k in order], "two")
    found = compare(one, two)
    check(found, first, second)
    assert found.kept == (5000, 5000)
    assert found.thresholds == (best_tenth(a), best_tenth(b))
    # The scatter plot's points are of the images, and the same each time.
    assert len(found.points) == SCATTER
    assert set(found.points) <= set(zip(a.tolist(), b.tolist(), strict=True))
    assert compare(one, two).points == found.points
    comparison_page(found, one, tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 1_000_000
    assert "2,000 of 50,000 images" in (tmp_path / "page.html").read_text("utf-8")


# The page.


class Addresses(HTMLParser):
    """What a page points to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.policy = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del tag
        given = dict(attrs)
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"] or ""
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "action")]


def cells(page: Any, name: str) -> list[list[str]]:
    """The rows of a table of images."""
    rows_ = page.locator(f"#list-{name} tr").all()
    return [row.locator("td").all_text_contents() for row in rows_][1:]


def test_the_page_is_self_contained(
    two_heads: tuple[Path, NDArray[Any]], tmp_path: Path, cli: Run
) -> None:
    folder, _ = two_heads
    done = cli("compare", folder / "a", folder / "b", "--out", "deep/page.html", "-n", 3)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("written to deep/page.html\n")
    assert done.stderr == ""
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["page.html"]
    loud = cli("compare", folder / "a", folder / "b", "--out", folder / "page.html", "--json")
    json.loads(loud.stdout)
    assert loud.stderr == f"written to {folder / 'page.html'}\n"
    page = (folder / "page.html").read_text("utf-8")
    seen = Addresses(page)
    assert all(address.startswith("data:") for address in seen.found), seen.found
    assert seen.policy.startswith("default-src 'none'; img-src data:;")
    assert f"aesthetic-filter compare {folder / 'a'} {folder / 'b'}" in page


@pytest.mark.parametrize("size", SIZES)
def test_the_page_in_a_browser(
    two_heads: tuple[Path, NDArray[Any]], tmp_path: Path, browser: Any, size: str
) -> None:
    folder, _ = two_heads
    one, two = open_scores(folder / "a"), open_scores(folder / "b")
    found = compare(one, two, n=5)
    assert comparison_page(found, one, tmp_path / "page.html") == ""
    address = as_address(tmp_path / "page.html")
    with watched(browser, address, size=size, dark=size == "phone", wait="#list-apart td") as seen:
        page = seen.page
        assert seen.complaints == []
        assert seen.outside(address) == []
        assert seen.fits()
        shown = page.locator("section[aria-labelledby=h-sides] td").all_text_contents()
        sides, kept = found.sides, found.kept
        wanted = [sides[0], sides[1], kept[0], sides[2], sides[3], 2496 - kept[0]]
        wanted += [kept[1], 2496 - kept[1], 2496]
        assert shown == [f"{number:,}" for number in wanted]
        facts = page.locator("ul.facts li b").all_text_contents()
        assert facts == [
            "2,496",
            f"{found.spearman:.3f}",
            f"{found.pearson:.3f}",
            f"{found.mean_change:+.3f}",
        ]
        for name in ("gained", "lost", "apart"):
            assert cells(page, name) == [
                [
                    pair.image_id,
                    f"{pair.a:.4f}",
                    f"{pair.b:.4f}",
                    f"{100 * pair.place_a:.1f}%",
                    f"{100 * pair.place_b:.1f}%",
                ]
                for pair in getattr(found, name)
            ]
        counted = page.evaluate(
            "Chart.getChart('scatter').data.datasets.map((set) => set.data.length)"
        )
        x, y = np.array(found.points).T
        differ = (x >= found.thresholds[0]) != (y >= found.thresholds[1])
        assert counted == [2000 - int(differ.sum()), int(differ.sum())]


def test_hostile_ids_are_text(tmp_path: Path, browser: Any) -> None:
    count = len(HOSTILE)
    a = [(image, float(row)) for row, image in enumerate(HOSTILE)]
    b = [(image, float(count - row)) for row, image in enumerate(HOSTILE)]
    one = scores_file(tmp_path / "<i>a</i>.parquet", a, "<b>head</b></script>\x1b[2J")
    two = scores_file(tmp_path / "b.parquet", b, "two")
    found = compare(one, two, n=20)
    assert all(line.isprintable() for line in str(found).split("\n"))
    command = "compare '</pre><script>alert(3)</script>'"
    comparison_page(found, one, tmp_path / "page.html", command=command)
    address = as_address(tmp_path / "page.html")
    assert all(p.startswith("data:") for p in Addresses((tmp_path / "page.html").read_text()).found)
    with watched(browser, address, size="phone", wait="#list-apart table") as seen:
        alerts: list[str] = []
        seen.page.on("dialog", lambda dialog: (alerts.append(dialog.message), dialog.dismiss()))
        seen.page.reload()
        seen.page.wait_for_selector("#list-apart table")
        assert alerts == []
        assert seen.complaints == []
        assert seen.outside(address) == []
        assert seen.fits()
        shown = {
            image for name in ("gained", "lost", "apart") for image, *_ in cells(seen.page, name)
        }
        moved = {p.image_id for p in (*found.gained, *found.lost, *found.apart)}
        wanted = {
            image.replace("\n", "\\n").replace("\t", "\\t").replace("\u202e", "\\u202e")
            for image in moved
        }
        assert shown == wanted
        assert len(moved) >= count - 1
        assert seen.page.locator("main img, main b").count() == 0
        assert seen.page.locator("pre").text_content() == command
        assert "<b>head</b></script>" in seen.page.locator("header dl").text_content()


def test_no_changes_are_said_to_be_none(tmp_path: Path, browser: Any) -> None:
    one = scores_file(tmp_path / "a.parquet", named(np.arange(30)))
    comparison_page(compare(one, one), one, tmp_path / "page.html")
    address = as_address(tmp_path / "page.html")
    with watched(browser, address, wait="#list-apart p") as seen:
        for name in ("gained", "lost", "apart"):
            assert seen.page.locator(f"#list-{name}").text_content() == "None."
        assert seen.complaints == []


# Images.


@pytest.fixture(scope="module")
def of_images(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images scored by two heads."""
    folder = tmp_path_factory.mktemp("images")
    write_files(folder / "photos", {f"{k:02d} & co.jpg": jpeg(k, 40) for k in range(12)})
    af.score(folder / "photos", folder / "a", images=EXACT, model_dir=model_dir)
    af.score(folder / "a", folder / "b", head=OTHER)
    return folder


@pytest.mark.parametrize("size", ["tablet", "phone"])
def test_images_are_shown(of_images: Path, tmp_path: Path, browser: Any, size: str) -> None:
    one, two = open_scores(of_images / "a"), open_scores(of_images / "b")
    found = compare(one, two, n=4)
    assert found.apart
    told: list[tuple[int, int]] = []
    problem = comparison_page(
        found, one, tmp_path / "page.html", on_progress=lambda *now: told.append(now)
    )
    assert problem == ""
    images = {p.image_id for p in (*found.gained, *found.lost, *found.apart)}
    assert told[-1] == (len(images), len(images))
    address = as_address(tmp_path / "page.html")
    with watched(browser, address, size=size, wait="#list-apart figure img") as seen:
        page = seen.page
        figures = page.locator("#list-apart figure")
        assert figures.count() == len(found.apart)
        for number, pair in enumerate(found.apart):
            assert figures.nth(number).locator(".name").text_content() == pair.image_id
            assert figures.nth(number).locator("figcaption b").text_content() == (
                f"{pair.a:.2f} → {pair.b:.2f}"
            )
        sizes = page.evaluate(
            "Promise.all([...document.querySelectorAll('figure img')]"
            ".map((i) => i.decode().then(() => [i.naturalWidth, i.naturalHeight])))"
        )
        assert sizes
        assert all(found == [40, 40] for found in sizes)
        figures.first.click()
        dialog = page.locator("#viewer")
        assert dialog.locator("h2").text_content() == found.apart[0].image_id
        text = dialog.locator("dl").text_content()
        assert f"score in a{found.apart[0].a:.4f}" in text
        assert f"score in b{found.apart[0].b:.4f}" in text
        page.keyboard.press("ArrowRight")
        assert dialog.locator("h2").text_content() == found.apart[1].image_id
        page.keyboard.press("Escape")
        assert not dialog.is_visible()
        assert seen.complaints == []
        assert seen.outside(address) == []
        assert seen.fits()


def test_no_images_if_they_are_not_wanted(of_images: Path, tmp_path: Path) -> None:
    one, two = open_scores(of_images / "a"), open_scores(of_images / "b")
    assert comparison_page(compare(one, two), one, tmp_path / "page.html", images=False) == ""
    assert "data:image/jpeg" not in (tmp_path / "page.html").read_text("utf-8")


def test_a_source_that_vanished_costs_only_the_images(
    of_images: Path, tmp_path: Path, cli: Run, browser: Any
) -> None:
    away = of_images / "photos"
    moved = away.with_name("moved")
    away.rename(moved)
    try:
        done = cli("compare", of_images / "a", of_images / "b", "-o", "page.html", "--json")
        found = compare(open_scores(of_images / "a"), open_scores(of_images / "b"))
        scores = open_scores(of_images / "a")
        problem = comparison_page(found, scores, tmp_path / "moved.html", source=str(moved))
    finally:
        moved.rename(away)
    assert done.returncode == 0
    assert json.loads(done.stdout)["both"] == 12
    assert "The images cannot be shown" in done.stderr
    address = as_address(tmp_path / "page.html")
    with watched(browser, address, wait="#list-apart table") as seen:
        assert "The images cannot be shown" in seen.page.locator("p.warn").text_content()
        assert [row[0] for row in cells(seen.page, "apart")] == [p.image_id for p in found.apart]
        assert seen.complaints == []
    assert problem == ""
    assert "data:image/jpeg" in (tmp_path / "moved.html").read_text("utf-8")


def test_one_image_that_vanished_costs_only_itself(of_images: Path, tmp_path: Path) -> None:
    found = compare(open_scores(of_images / "a"), open_scores(of_images / "b"), n=6)
    shutil.copytree(of_images / "photos", tmp_path / "photos")
    (tmp_path / "photos" / found.apart[0].image_id).unlink()
    problem = comparison_page(
        found, open_scores(of_images / "a"), tmp_path / "p.html", source=str(tmp_path / "photos")
    )
    assert problem.startswith("1 of ")
    assert "is gone from the source" in problem
    assert "data:image/jpeg" in (tmp_path / "p.html").read_text("utf-8")


def test_a_page_that_cannot_be_written(tmp_path: Path, cli: Run) -> None:
    scores_file(tmp_path / "a.parquet", named([1, 2, 3]))
    (tmp_path / "page.html").mkdir()
    done = cli("compare", "a.parquet", "a.parquet", "--out", "page.html")
    assert done.returncode == 2
    assert "page.html: cannot be written" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"a.parquet", "page.html"}
