"""Compare two sets of scores of one data set: two heads, or before and after.

Rows are matched by ``image_id``. Two heads have two scales, so what is compared is above all the
order: Spearman's rank correlation, and where an image stands among all (its percentile). A
threshold on the one is set beside the one on the other that keeps as many images, unless both are
from the same head, or both are given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aesthetic_filter.database import OTHERS, PART, ROW, ROWS, SCORED, Database, quote
from aesthetic_filter.errors import UsageError
from aesthetic_filter.table import IMAGE_ID, SCORE, printable

if TYPE_CHECKING:
    from aesthetic_filter.scores import Scores

SCATTER = 2_000
"""Points of the scatter plot, drawn by a hash of their ``image_id``."""

KEPT_BY_DEFAULT = Fraction(1, 10)
"""Share of the first scores that the threshold keeps, where none is given; rounded up."""

LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Pair:
    """One image in both.

    Attributes:
        image_id: its id.
        a: its score in the first.
        b: its score in the second.
        place_a: the share of images that score lower in the first, 0 to 1.
        place_b: likewise.
        part: the number of the first scores' file that holds it.
        row: its place in that file.
    """

    image_id: str
    a: float
    b: float
    place_a: float
    place_b: float
    part: int
    row: int


@dataclass(frozen=True)
class Comparison:
    """Two sets of scores, side by side.

    Attributes:
        names: of both: path and head.
        both: images with a score in both; all that follows is about these.
        only: images with a score in only the first, and in only the second.
        spearman: rank correlation (mean ranks for ties).
        pearson: correlation.
        thresholds: the two.
        kept: how many each keeps.
        sides: how many both keep, only the first keeps, only the second keeps, and neither.
        gained: images that only the second keeps, those that rise most first.
        lost: images that only the first keeps, those that fall most first.
        apart: images whose places differ most, whichever side.
        points: (a, b) of some images.
        mean_change: mean of b - a.
        same_head: whether both were scored with one head.
    """

    names: tuple[tuple[str, str], tuple[str, str]]
    both: int
    only: tuple[int, int]
    spearman: float
    pearson: float
    thresholds: tuple[float, float]
    kept: tuple[int, int]
    sides: tuple[int, int, int, int]
    gained: tuple[Pair, ...]
    lost: tuple[Pair, ...]
    apart: tuple[Pair, ...]
    points: tuple[tuple[float, float], ...]
    mean_change: float
    same_head: bool

    def as_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        described = dict(vars(self))
        for name in ("gained", "lost", "apart"):
            described[name] = [vars(pair) for pair in described[name]]
        del described["points"]
        for name in ("spearman", "pearson"):
            described[name] = None if math.isnan(described[name]) else described[name]
        described["sides"] = dict(
            zip(("both", "only_a", "only_b", "neither"), self.sides, strict=True)
        )
        return described

    def __str__(self) -> str:
        a, b = self.names
        only_a, only_b = self.only
        lines = [
            f"a               {printable(a[0])}  ({printable(a[1])})",
            f"b               {printable(b[0])}  ({printable(b[1])})",
            f"images in both  {self.both:>14,}",
        ]
        lines += [f"  only in a     {only_a:>14,}"] if only_a else []
        lines += [f"  only in b     {only_b:>14,}"] if only_b else []
        lines += [
            "",
            f"rank correlation  {_number(self.spearman)} (Spearman), "
            f"{_number(self.pearson)} (Pearson)",
            f"mean change       {self.mean_change:+.4f} (b - a)",
            "",
            f"threshold         {self.thresholds[0]:g} in a, {self.thresholds[1]:g} in b"
            + ("" if self.same_head else "  (the heads have scales of their own)"),
            f"  both keep       {self.sides[0]:>12,}{self.sides[0] / self.both:>8.1%}",
            f"  only a keeps    {self.sides[1]:>12,}{self.sides[1] / self.both:>8.1%}",
            f"  only b keeps    {self.sides[2]:>12,}{self.sides[2] / self.both:>8.1%}",
            f"  neither keeps   {self.sides[3]:>12,}{self.sides[3] / self.both:>8.1%}",
        ]
        for title, pairs in (
            ("only b keeps, those that rise most", self.gained),
            ("only a keeps, those that fall most", self.lost),
            ("largest disagreement", self.apart),
        ):
            if pairs:
                lines += ["", f"{title}:", "         a         b   place a   place b  image_id"]
                lines += [
                    f"  {p.a:>8.4f}  {p.b:>8.4f}  {p.place_a:>8.1%}  {p.place_b:>8.1%}  "
                    f"{printable(p.image_id)}"
                    for p in pairs
                ]
        return "\n".join(lines)


def _number(value: float) -> str:
    return "not known" if math.isnan(value) else f"{value:.4f}"


def compare(
    a: Scores,
    b: Scores,
    *,
    threshold: float | None = None,
    threshold_b: float | None = None,
    n: int = 10,
) -> Comparison:
    """Compare two sets of scores of one data set.

    Args:
        a: the first.
        b: the second.
        threshold: on the first; default: what keeps its best tenth.
        threshold_b: on the second; default: the first's, where both are from one head; else what
            keeps as many images.
        n: how many images of each list.

    Raises:
        UsageError: they have no image in common, or a threshold is no number.
    """
    for given in (threshold, threshold_b):
        if given is not None and not abs(given) <= LARGEST:
            raise UsageError(f"a threshold is a number that a score can have, not {given}")
    ask = Database(a.files, b.files)
    try:
        return _compare(ask, a, b, threshold, threshold_b, n)
    finally:
        ask.close()


def _compare(
    ask: Database,
    a: Scores,
    b: Scores,
    threshold: float | None,
    threshold_b: float | None,
    n: int,
) -> Comparison:
    # Where an id occurs more than once, its rows are matched in order.
    numbered = (
        f"SELECT {quote(IMAGE_ID)} AS id, {SCORE} AS s, {PART} AS part, {ROW} AS row, "
        f"row_number() OVER (PARTITION BY {quote(IMAGE_ID)} ORDER BY {PART}, {ROW}) AS k "
        f"FROM {{}} WHERE {SCORED}"
    )
    ask.execute(
        f"CREATE TEMP TABLE pairs AS SELECT x.id, x.s AS a, y.s AS b, x.part, x.row "
        f"FROM ({numbered.format(ROWS)}) x JOIN ({numbered.format(OTHERS)}) y "
        "ON x.id = y.id AND x.k = y.k"
    )
    both = int(ask.row("SELECT count(*) FROM pairs")[0])
    in_a, in_b = (
        int(ask.row(f"SELECT count(*) FROM {view} WHERE {SCORED}")[0]) for view in (ROWS, OTHERS)
    )
    if not both:
        raise UsageError(
            f"{a.path} and {b.path} have no scored image in common: scores of one data set are "
            "compared, by image_id"
        )
    ask.execute(
        "CREATE TEMP TABLE placed AS SELECT *, "
        "rank() OVER (ORDER BY a) + (count(*) OVER (PARTITION BY a) - 1) / 2.0 AS ra, "
        "rank() OVER (ORDER BY b) + (count(*) OVER (PARTITION BY b) - 1) / 2.0 AS rb, "
        "percent_rank() OVER (ORDER BY a) AS pa, percent_rank() OVER (ORDER BY b) AS pb "
        "FROM pairs"
    )
    differ = "(SELECT count(*) > 1 FROM (SELECT DISTINCT {} FROM pairs LIMIT 2))"
    varied = all(ask.row(f"SELECT {differ.format(c)}")[0] for c in "ab")
    spearman, pearson, change = ask.row(
        ("SELECT corr(ra, rb), corr(a, b), " if varied else "SELECT NULL, NULL, ")
        + "avg(b::DOUBLE - a::DOUBLE) FROM placed"
    )
    heads = [scores.provenance.get("head", {}) for scores in (a, b)]
    same_head = heads[0].get("sha256") == heads[1].get("sha256")
    first = None if threshold is None else float(threshold)
    if first is None:
        first = _keeping(ask, "a", math.ceil(KEPT_BY_DEFAULT * both), both)
    second = None if threshold_b is None else float(threshold_b)
    if second is None and same_head:
        second = first
    elif second is None:
        kept = int(ask.row(f"SELECT count(*) FROM pairs WHERE a >= {first!r}::FLOAT")[0])
        second = _keeping(ask, "b", kept, both)
    keeps_a, keeps_b = f"(a >= {first!r}::FLOAT)", f"(b >= {second!r}::FLOAT)"
    sides = ask.row(
        f"SELECT count(*) FILTER (WHERE {keeps_a} AND {keeps_b}), "
        f"count(*) FILTER (WHERE {keeps_a} AND NOT {keeps_b}), "
        f"count(*) FILTER (WHERE NOT {keeps_a} AND {keeps_b}), "
        f"count(*) FILTER (WHERE NOT {keeps_a} AND NOT {keeps_b}) FROM pairs"
    )

    def pairs(condition: str, order: str) -> tuple[Pair, ...]:
        return tuple(
            Pair(str(image), float(x), float(y), float(px), float(py), int(part), int(row))
            for image, x, y, px, py, part, row in ask.rows(
                f"SELECT id, a, b, pa, pb, part, row FROM placed WHERE {condition} "
                f"ORDER BY {order}, id, part, row LIMIT {int(n)}"
            )
        )

    points = ask.rows(
        f"SELECT a::DOUBLE, b::DOUBLE FROM pairs ORDER BY md5_number_lower(id), part, row "
        f"LIMIT {SCATTER}"
    )
    return Comparison(
        names=(_name(a), _name(b)),
        both=both,
        only=(in_a - both, in_b - both),
        spearman=math.nan if spearman is None else float(spearman),
        pearson=math.nan if pearson is None else float(pearson),
        thresholds=(first, second),
        kept=(int(sides[0] + sides[1]), int(sides[0] + sides[2])),
        sides=(int(sides[0]), int(sides[1]), int(sides[2]), int(sides[3])),
        gained=pairs(f"NOT {keeps_a} AND {keeps_b}", "pb - pa DESC"),
        lost=pairs(f"{keeps_a} AND NOT {keeps_b}", "pa - pb DESC"),
        apart=pairs("pa <> pb", "abs(pa - pb) DESC"),
        points=tuple((float(x), float(y)) for x, y in points),
        mean_change=float(change),
        same_head=same_head,
    )


def _keeping(ask: Database, column: str, kept: int, rows: int) -> float:
    """The highest score that keeps at least so many; for none, one above them all."""
    rank = min(rows - kept + 1, rows)  # from below; half a rank less, lest rounding gain one
    found = ask.order_statistics(column, [(rank - 0.5) / rows], "pairs")[0]
    return found if kept else float(np.nextafter(np.float32(found), np.float32(np.inf)))


def _name(scores: Scores) -> tuple[str, str]:
    head: Mapping[str, Any] = scores.provenance.get("head", {})
    return str(scores.path), str(head.get("name", "unknown head"))


def comparison_page(
    found: Comparison,
    a: Scores,
    out: str | Path,
    *,
    images: bool = True,
    source: str | None = None,
    command: str = "",
    on_progress: Callable[[int, int], None] | None = None,
) -> str:
    """Write a comparison as one self-contained page.

    Args:
        found: the comparison.
        a: the first scores, whose images are shown.
        out: the HTML file; it appears whole or not at all.
        images: whether to show any.
        source: where the images are now, if they were moved.
        command: that makes this page again.
        on_progress: called with (thumbnails made, thumbnails in all).

    Returns:
        Why images are missing from it, or "".

    Raises:
        OutputError: it cannot be written.
        MissingExtraError: thumbnails are asked for, and Pillow is not installed.
    """
    from aesthetic_filter.pages import CHARTS, render
    from aesthetic_filter.report import gallery_items, write_page

    lists = {"gained": found.gained, "lost": found.lost, "apart": found.apart}
    places = {(p.part, p.row): p for pairs in lists.values() for p in pairs}
    items, problem = gallery_items(
        a, list(places.values()), images=images, source=source, on_progress=on_progress
    )
    data = {
        "points": found.points,
        "thresholds": found.thresholds,
        "items": {f"{key[0]}:{key[1]}": item for key, item in items.items()},
        "lists": {
            name: [
                {"key": f"{p.part}:{p.row}", "a": p.a, "b": p.b, "pa": p.place_a, "pb": p.place_b}
                for p in pairs
            ]
            for name, pairs in lists.items()
        },
        "heads": [name for _, name in found.names],
    }
    page = render(
        "compare.html",
        (CHARTS, "common.js", "compare.js"),
        title="Two sets of scores compared",
        found=found,
        names=[(printable(path), printable(head)) for path, head in found.names],
        problem=problem,
        command=command,
        data=data,
    )
    write_page(Path(out).expanduser(), page)
    return problem
