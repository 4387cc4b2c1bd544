"""The report: one page that shows what some scores are, to look at and to send.

Everything is in the page: numbers, charts, thumbnails. Its threshold can be moved, and counts and
images follow; the counts are exact on a grid of round thresholds.
"""

from __future__ import annotations

import base64
import itertools
import json
import math
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aesthetic_filter.calibrate import Population, population
from aesthetic_filter.database import PART, ROW, ROWS, SCORED, quote
from aesthetic_filter.errors import (
    AestheticFilterError,
    MissingExtraError,
    OutputError,
    SelectionError,
)
from aesthetic_filter.heads.head import FOREIGN_BELOW
from aesthetic_filter.pages import CHARTS, render
from aesthetic_filter.pictures import Pictures, Place, make_thumbnail
from aesthetic_filter.prefetch import ahead
from aesthetic_filter.run_folder import read_run_file
from aesthetic_filter.sampling import Drawn, Strata, draw, stratify
from aesthetic_filter.table import (
    COSINE,
    DROPPED_BY,
    ERROR,
    IMAGE_ID,
    IMAGE_PATH,
    NORM,
    SCORE,
    SHA256,
    printable,
)
from aesthetic_filter.whole import write_whole

if TYPE_CHECKING:
    from aesthetic_filter.scores import Scores

MAX_BYTES = 5_000_000
"""How large a page may get, unless asked otherwise."""

PER_BAND, AT_THE_ENDS = 12, 24
"""Images drawn from each band of scores; and of the best, the worst, and around the threshold."""

SIDES, QUALITIES = (320, 256, 208, 168, 128, 96), (82, 74, 66, 58, 50, 40)
"""Longest side in pixels, and quality, of the thumbnails: the first pair with which they fit."""

EXAMPLES = 5
"""Of each reason for failure."""

MOST_GROUPS, MOST_COLUMNS = 12, 8
"""Of a breakdown, and how many breakdowns there are where none was asked for."""

TYPICAL_GROUPS = 300_000
"""Bytes of the breakdowns that :func:`gallery_items` allows for."""

KNOWN = (IMAGE_ID, IMAGE_PATH, SHA256, SCORE, ERROR, NORM, COSINE, DROPPED_BY)
FOLDER = "(folder)"
"""What a breakdown by the folder part of ``image_id`` is called."""

PILLOW_S_LIMIT = 178_956_970
"""``clip.preprocess.MAX_PIXELS``, which is not imported for want of Pillow."""

LONGEST_TEXT = 300
"""Characters shown of a caption or another value."""

LENGTHS, COUNTS = (LONGEST_TEXT, 200, 120, 80, 50, 30), (60, 50, 40, 30, 20, 12)
"""Characters of a value, and values of a row, that are shown: the first pair that leaves room."""


@dataclass(frozen=True)
class Options:
    """What a report shows.

    Attributes:
        threshold: where the slider starts; default: what keeps the best tenth.
        by: columns to break down by; default: all that lend themselves to it.
        seed: of the draw.
        images: whether to show any; False: a table.
        source: where the images are now, if they were moved.
        max_bytes: how large the page may get.
        per_band: images from each band of scores.
    """

    threshold: float | None = None
    by: tuple[str, ...] = ()
    seed: int = 0
    images: bool = True
    source: str | None = None
    max_bytes: int = MAX_BYTES
    per_band: int = PER_BAND


def report(
    scores: Scores,
    out: str | os.PathLike[str],
    options: Options = Options(),
    *,
    command: str = "",
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Path, str]:
    """Write a report.

    Args:
        scores: what to show.
        out: the HTML file; it appears whole or not at all.
        options: what to show of them.
        command: that makes this report again; default: built from the options.
        on_progress: called with (thumbnails made, thumbnails in all).

    Returns:
        The path of the file; and why images are missing from it, or "".

    Raises:
        OutputError: the file cannot be written.
        SelectionError: there is no such column to break down by.
        MissingExtraError: thumbnails are asked for, and Pillow is not installed.
    """
    path = Path(out).expanduser()
    with suppress(OSError):  # such as a name that is too long: writing it says so
        if path.is_dir():
            raise OutputError(f"{path}: is a folder; name a file, such as {path}/report.html")
    command = command or _command(scores, path, options)
    page, problem = make_page(scores, options, command=command, on_progress=on_progress)
    write_page(path, page)
    return path, problem


def write_page(path: Path, page: str) -> None:
    """Write a page; it appears whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    # A path that is no text, such as one that is not UTF-8, is no reason for no page.
    content = page.encode("utf-8", errors="backslashreplace")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from None


def make_page(
    scores: Scores,
    options: Options = Options(),
    *,
    command: str = "",
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[str, str]:
    """The report as HTML, and why images are missing from it: see :func:`report`."""
    summary = scores.summary()
    columns = _breakdown_columns(scores, options.by)
    everything = population(scores) if summary.scored else None
    start = _start(everything, options.threshold) if everything is not None else 0
    strata = stratify(scores)
    gallery: list[dict[str, Any]] = []
    problem = ""
    groups: list[dict[str, Any]] = []
    if everything is not None:
        broken_down = (_groups(scores, name, everything, bool(options.by)) for name in columns)
        some = (found for found in broken_down if found is not None)
        groups = list(some if options.by else itertools.islice(some, MOST_COLUMNS))
        more = max(0, len(json.dumps(groups)) - TYPICAL_GROUPS)
        left = replace(options, max_bytes=options.max_bytes - more)
        gallery, problem = _gallery(scores, strata, everything, start, left, on_progress)
    data = {
        "grid": None if everything is None else _grid(everything),
        "start": start,
        "lowest": summary.lowest,
        "highest": summary.highest,
        "scored": summary.scored,
        "rows": summary.rows,
        "gallery": gallery,
        "bands": [
            {"name": name, "rows": int(rows)}
            for name, rows in zip(strata.names, strata.rows, strict=True)
        ],
        "groups": groups,
        "cosines": _cosines(scores) if summary.norms else None,
        "foreign_below": FOREIGN_BELOW,
        "scores": str(scores.path),
    }
    return _render(scores, summary, data, problem, command), problem


def _render(scores: Scores, summary: Any, data: dict[str, Any], problem: str, command: str) -> str:
    return render(
        "report.html",
        (CHARTS, "common.js", "report.js"),
        title=f"Aesthetic scores of {printable(scores.provenance.get('source', scores.path))}",
        summary=summary,
        percentiles=[(f"{p:.0%}", f"{s:.3f}") for p, s in summary.percentiles.items()],
        thresholds=list(summary.thresholds.items()),
        failures=_failures(scores),
        problem=problem,
        has_images=any(item["image"] for item in data["gallery"]),
        facts=provenance_facts(scores.provenance),
        commands=[score_command(scores), command],
        made_at=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        package=f"aesthetic-filter {version('aesthetic-filter')}",
        scores_path=printable(scores.path),
        foreign_below=FOREIGN_BELOW,
        data=data,
    )


def _start(everything: Population, threshold: float | None) -> int:
    """The number of the threshold at which the slider starts."""
    if threshold is not None:
        return int(np.abs(everything.thresholds - threshold).argmin())
    enough = np.flatnonzero(everything.rows_from >= 0.1 * everything.rows)
    return int(enough[-1])


def _grid(everything: Population) -> dict[str, Any]:
    return {
        "thresholds": [float(t) for t in everything.thresholds],
        "rows_from": [int(n) for n in everything.rows_from],
    }


# The gallery.


def _gallery(
    scores: Scores,
    strata: Strata,
    everything: Population,
    start: int,
    options: Options,
    on_progress: Callable[[int, int], None] | None,
) -> tuple[list[dict[str, Any]], str]:
    """The rows that are shown, best first, with thumbnails where they can be had; and why not."""
    chosen = _chosen(scores, strata, float(everything.thresholds[start]), options)
    items, problem = gallery_items(
        scores,
        [place for place, _ in chosen],
        images=options.images,
        source=options.source,
        max_bytes=options.max_bytes,
        on_progress=on_progress,
    )
    found = [
        {
            **items[place.part, place.row],
            "score": place.score,
            "why": sorted(why),
            "band": place.stratum,
        }
        for place, why in chosen
    ]
    return found, problem


def gallery_items(
    scores: Scores,
    places: Sequence[Place],
    *,
    images: bool = True,
    source: str | None = None,
    max_bytes: int = MAX_BYTES,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[tuple[int, int], dict[str, Any]], str]:
    """What a page shows of some rows, by part and row; and, if images are missing, why.

    Args:
        scores: that they are of.
        places: the rows.
        images: whether to show thumbnails.
        source: where the images are now, if they were moved.
        max_bytes: how large the page may get.
        on_progress: called with (thumbnails made, thumbnails in all).

    Raises:
        MissingExtraError: Pillow is not installed.
    """
    facts = _shortened(_facts(scores, places), max_bytes // 4)
    texts = len(json.dumps([[place.image_id for place in places], list(facts.values())]))
    thumbnails: dict[tuple[int, int], Any] = {}
    problem = ""
    if images and "images" in scores.provenance:
        try:
            pictures = Pictures(scores, source)
            thumbnails = _thumbnails(pictures, places, max_bytes - texts, on_progress)
        except MissingExtraError:
            raise
        except AestheticFilterError as error:
            problem = f"The images cannot be shown: {printable(error)}"
        lost = [t for t in thumbnails.values() if isinstance(t, str)]
        if lost and not problem:
            problem = (
                f"{len(lost):,} of {len(thumbnails):,} images cannot be shown: {printable(lost[0])}"
            )
    found = {}
    for place in places:
        shown = thumbnails.get((place.part, place.row))
        image = None
        if shown is not None and not isinstance(shown, str):
            image = {
                "src": "data:image/jpeg;base64," + base64.b64encode(shown.data).decode(),
                "w": shown.width,
                "h": shown.height,
            }
        found[place.part, place.row] = {
            "id": printable(place.image_id),
            "facts": facts.get((place.part, place.row), []),
            "image": image,
            "problem": printable(shown) if isinstance(shown, str) else "",
        }
    return found, problem


def _chosen(
    scores: Scores, strata: Strata, threshold: float, options: Options
) -> list[tuple[Drawn, set[str]]]:
    """The best, the worst, those around the threshold, and some of every band; best first."""
    found: dict[tuple[int, int], tuple[Drawn, set[str]]] = {}

    def add(place: Drawn, why: str) -> None:
        found.setdefault((place.part, place.row), (place, set()))[1].add(why)

    for rows in draw(scores, strata, options.per_band, options.seed):
        for place in rows:
            add(place, "band")
    below, above = f"{SCORE} < {threshold!r}::FLOAT", f"{SCORE} >= {threshold!r}::FLOAT"
    for why, order, condition, count in (
        ("best", "DESC", "true", AT_THE_ENDS),
        ("worst", "ASC", "true", AT_THE_ENDS),
        ("border", "ASC", above, AT_THE_ENDS // 2),
        ("border", "DESC", below, AT_THE_ENDS // 2),
    ):
        for image_id, score, part, row in scores.database.rows(
            f"SELECT {quote(IMAGE_ID)}, {SCORE}::DOUBLE, {PART}, {ROW} FROM {ROWS} "
            f"WHERE {SCORED} AND {condition} "
            f"ORDER BY {SCORE} {order}, {quote(IMAGE_ID)}, {PART}, {ROW} LIMIT {count}"
        ):
            stratum = int(strata.of([score])[0])
            add(Drawn(str(image_id), float(score), int(part), int(row), stratum), why)
    return sorted(found.values(), key=lambda item: (-item[0].score, item[0].image_id))


def _facts(scores: Scores, places: Sequence[Place]) -> dict[tuple[int, int], list[tuple[str, str]]]:
    """What the source says of these rows: column and value, as text."""
    names = [name for name in scores.columns if name not in (IMAGE_ID, SCORE, ERROR, SHA256)]
    if not names or not places:
        return {}
    names.sort(key=lambda name: name in (NORM, COSINE))  # what the source says first
    rows = scores.database.at([(place.part, place.row) for place in places], names)
    return {
        place: [
            (_short(name), _short(value))
            for name, value in zip(names, values, strict=True)
            if value not in (None, "")
        ]
        for place, values in rows.items()
    }


def _shortened(
    facts: dict[tuple[int, int], list[tuple[str, str]]], room: int
) -> dict[tuple[int, int], list[tuple[str, str]]]:
    """The same with shorter texts, and fewer, where they would fill the page."""
    found = facts
    for longest, most in zip(LENGTHS, COUNTS, strict=True):
        found = {
            key: [(name, _short(value, longest)) for name, value in row[:most]]
            for key, row in facts.items()
        }
        if len(json.dumps(list(found.values()))) <= room:
            break
    return found


def _short(value: object, longest: int = LONGEST_TEXT) -> str:
    text = f"{value:.5g}" if isinstance(value, float) else printable(value)
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _thumbnails(
    pictures: Pictures,
    places: Sequence[Place],
    max_bytes: int,
    on_progress: Callable[[int, int], None] | None,
) -> dict[tuple[int, int], Any]:
    """A thumbnail of each row, or why there is none; together they fit the page."""
    room = max_bytes - 700_000  # for the numbers and the chart library
    found: dict[tuple[int, int], Any] = {}
    encoded: dict[tuple[int, int], bytes] = {}

    def shrink(item: tuple[Any, Any]) -> tuple[Any, Any]:
        place, picture = item
        return place, make_thumbnail(picture, SIDES[0], QUALITIES[0])

    workers = os.cpu_count() or 1
    made_of = ahead(pictures.fetch(places), shrink, workers, 2 * workers)
    for done, (place, shown) in enumerate(made_of, start=1):
        found[place.part, place.row] = shown
        if on_progress is not None:
            on_progress(done, len(places))
    with ThreadPoolExecutor(workers) as pool:
        encoded = {key: t.data for key, t in found.items() if not isinstance(t, str)}
        for side, quality in zip(SIDES[1:], QUALITIES[1:], strict=True):
            if _base64(encoded) <= room:
                break
            shrink_again = partial(_again, side=side, quality=quality)
            made = [(key, t) for key, t in found.items() if not isinstance(t, str)]
            again = pool.map(shrink_again, [t for _, t in made])
            fitted = {key: t for (key, _), t in zip(made, again, strict=True)}
            encoded = {key: t.data for key, t in fitted.items()}
            if _base64(encoded) <= room or side == SIDES[-1]:
                found |= fitted
    for key, data in encoded.items():
        room -= 4 * math.ceil(len(data) / 3)
        if room < 0:
            found[key] = "left out, the page is full (--max-mb, or fewer --per-band)"
    return found


def _again(shown: Any, side: int, quality: int) -> Any:
    from aesthetic_filter.clip.preprocess import thumbnail

    return thumbnail(shown.data, side, quality=quality)


def _base64(encoded: Mapping[Any, bytes]) -> int:
    return sum(4 * math.ceil(len(data) / 3) for data in encoded.values())


# Breakdowns.


def _breakdown_columns(scores: Scores, by: Sequence[str]) -> list[str]:
    """Which columns to break down by: those asked for, else all that could be."""
    for name in by:
        if name != FOLDER and name not in scores.columns:
            there = ", ".join(printable(n) for n in scores.columns)
            raise SelectionError(f"there is no column {name!r}; there are: {there}")
    if by:
        return list(by)
    return [FOLDER, *(name for name in scores.columns if name not in KNOWN)]


def _groups(
    scores: Scores, name: str, everything: Population, asked: bool
) -> dict[str, Any] | None:
    """A breakdown: for each group its rows, and how many score at least each threshold.

    None where a column does not lend itself to it: the same value everywhere, or one's own for
    nearly every row; but not where it was asked for.

    Raises:
        SelectionError: it was asked for, and holds lists or the like.
    """
    ask = scores.database
    if name == FOLDER:
        value = f"regexp_extract({quote(IMAGE_ID)}, '(?s)^(.*)/[^/]*$', 1)"
    else:
        value = quote(name)
    kind = ask.row(f"SELECT typeof({value}) FROM {ROWS} LIMIT 1")[0]
    if kind.startswith(("STRUCT", "MAP", "BLOB")) or kind.endswith("]"):
        if asked:
            raise SelectionError(f"{name!r} holds {kind}, by which nothing can be broken down")
        return None
    distinct = int(ask.row(f"SELECT approx_count_distinct({value}) FROM {ROWS}")[0])
    numeric = kind.startswith(
        ("FLOAT", "DOUBLE", "DECIMAL", "TINYINT", "SMALLINT", "INTEGER", "BIGINT", "U", "HUGEINT")
    ) and not kind.startswith("UUID")
    if distinct <= 1 and not asked:
        return None
    if numeric and distinct > MOST_GROUPS:
        group = _ranges(scores, value)
    elif not numeric and distinct > 40 * MOST_GROUPS and not asked:
        return None
    else:
        group = f"{value}::VARCHAR"
    step = _grid_bin(everything)
    counted = ask.rows(
        f"SELECT {group} AS g, {step} AS b, count(*), "
        f"count(*) FILTER (WHERE {SCORED}) FROM {ROWS} GROUP BY g, b"
    )
    size = len(everything.thresholds)
    groups: dict[str | None, NDArray[np.int64]] = {}
    rows: dict[str | None, int] = {}
    for label, bin_, count, scored in counted:
        into = groups.setdefault(label, np.zeros(size + 1, np.int64))
        rows[label] = rows.get(label, 0) + int(count)
        if scored:
            into[int(bin_) + 1] += int(scored)
    largest = sorted(groups, key=lambda label: (-rows[label], str(label)))
    if numeric:
        shown, rest = sorted(largest, key=_by_range), []
    else:
        shown, rest = largest[:MOST_GROUPS], largest[MOST_GROUPS:]
    found = [
        _group("(none)" if x is None else _short(x) or "(empty)", rows[x], groups[x]) for x in shown
    ]
    if rest:
        total = np.sum([groups[x] for x in rest], axis=0)
        found.append(_group(f"{len(rest):,} others", sum(rows[x] for x in rest), total))
    return {"name": printable(name), "groups": found}


def _by_range(label: str | None) -> tuple[bool, float, str]:
    if label is None:
        return True, 0.0, ""
    number = float(label.split(" to ")[0].replace(",", ""))
    return False, math.inf if math.isnan(number) else number, label


def _group(label: str, rows: int, bins: NDArray[np.int64]) -> dict[str, Any]:
    from_ = np.cumsum(bins[::-1])[::-1]
    return {
        "label": label,
        "rows": rows,
        "scored": int(from_[0]),
        "rows_from": [int(n) for n in from_[1:]],
    }


def _grid_bin(everything: Population) -> str:
    """SQL for the number of the last threshold at or below a row's score; -1 below all of them."""
    thresholds = everything.thresholds
    step = float(thresholds[1] - thresholds[0]) if len(thresholds) > 1 else 1.0
    first = float(thresholds[0])
    guess = f"floor(({SCORE}::DOUBLE - {first!r}) / {step!r})::INTEGER"
    # A division may land on the wrong side of a threshold: compare with it, as filter does.
    marks = "[" + ", ".join(repr(float(np.float32(t))) for t in thresholds) + "]::FLOAT[]"
    if (np.diff(thresholds.astype(np.float32)) <= 0).any():  # closer than float32 can tell
        at_least = (f"({SCORE} >= {float(np.float32(t))!r}::FLOAT)::INTEGER" for t in thresholds)
        return f"CASE WHEN {SCORED} THEN {' + '.join(at_least)} - 1 END"
    near = f"least(greatest({guess}, 0), {len(thresholds) - 1})"
    return (
        f"CASE WHEN NOT {SCORED} THEN NULL "
        f"WHEN {near} + 2 <= {len(thresholds)} AND {SCORE} >= ({marks})[{near} + 2] "
        f"THEN {near} + 1 "
        f"WHEN {SCORE} >= ({marks})[{near} + 1] THEN {near} ELSE {near} - 1 END"
    )


def _ranges(scores: Scores, value: str) -> str:
    """SQL for the name of the range in which a number lies; six of about equal size."""
    finite = f"isfinite({value}::DOUBLE)"
    cuts = scores.database.order_statistics(
        f"{value}::DOUBLE",
        [k / 6 for k in range(1, 6)],
        f"(SELECT * FROM {ROWS} WHERE {SCORED} AND {finite})",
    )
    low, high = scores.database.row(
        f"SELECT min({value})::DOUBLE, max({value})::DOUBLE FROM {ROWS} WHERE {finite}"
    )
    if low is None:
        return f"{value}::VARCHAR"
    ends = [low, *(edge for edge in sorted(set(cuts)) if low < edge < high), high]
    names = [f"'{a} to {b}'" for a, b in itertools.pairwise(_told_apart(ends))]
    cases = " ".join(
        f"WHEN {value} < {b!r}::DOUBLE THEN {name}"
        for b, name in zip(ends[1:-1], names[:-1], strict=True)
    )
    return (
        f"CASE WHEN {value} IS NULL THEN NULL WHEN NOT {finite} THEN {value}::VARCHAR "
        f"{cases} ELSE {names[-1]} END"
    )


def _told_apart(numbers: Sequence[float]) -> list[str]:
    """Ascending numbers as text: short, but no two the same."""
    if all(number.is_integer() and abs(number) < 1e15 for number in numbers):
        return [f"{int(number):,}" for number in numbers]
    found: list[str] = []
    for digits in range(6, 18):
        found = [f"{number:,.{digits}g}" for number in numbers]
        if len(set(found)) == len(set(numbers)):
            break
    return found


# Failures, norms, provenance.


def _failures(scores: Scores) -> list[dict[str, Any]]:
    """Reasons why rows have no score, the most frequent first, with examples."""
    rows = scores.database.rows(
        f"SELECT why, count(*) OVER (PARTITION BY why) AS n, id FROM "
        f"(SELECT {scores.why_not_scored} AS why, {quote(IMAGE_ID)} AS id, "
        f"{PART} AS part, {ROW} AS row "
        f"FROM {ROWS} WHERE NOT {SCORED}) "
        f"QUALIFY row_number() OVER (PARTITION BY why ORDER BY part, row) <= {EXAMPLES} "
        "ORDER BY n DESC, why, part, row"
    )
    found: dict[str, dict[str, Any]] = {}
    for reason, count, image_id in rows:
        entry = found.setdefault(
            reason, {"reason": printable(reason), "count": int(count), "examples": []}
        )
        entry["examples"].append(_short(image_id))
    return list(found.values())


def _cosines(scores: Scores) -> dict[str, Any] | None:
    """A histogram of the rows' cosines to where the head's space points."""
    step = 0.02
    rows = scores.database.rows(
        f"SELECT floor({COSINE}::DOUBLE / {step})::INTEGER AS b, count(*) FROM {ROWS} "
        f"WHERE {SCORED} AND isfinite({COSINE}) GROUP BY b ORDER BY b"
    )
    if not rows:
        return None
    return {"step": step, "bins": [[int(b), int(n)] for b, n in rows]}


def provenance_facts(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Where scores come from, as names and values."""
    head, get = provenance.get("head", {}), provenance.get
    encoder, images = get("encoder") or {}, get("images") or {}
    preprocessing = get("preprocessing") or {}
    facts = [
        ("head", head.get("name", "")),
        ("head sha256", head.get("sha256", "")),
        ("scale", head.get("scale", "")),
        ("head's source", head.get("source", "")),
        ("head's licence", head.get("licence", "")),
        ("space", get("space", "")),
        ("encoder", f"{encoder['name']}@{encoder['revision']}" if encoder else ""),
        ("precision", encoder.get("precision", "")),
        ("preprocessing", ", ".join(f"{k} {v}" for k, v in preprocessing.items())),
        ("source", get("source", "")),
        ("format", get("format", "")),
        ("images", images.get("source", "") if images.get("source") != get("source") else ""),
        ("stages", "; ".join(map(str, get("stages", [])))),
        ("made by", get("package", "")),
    ]
    return [(name, printable(value)) for name, value in facts if value]


def score_command(scores: Scores) -> str:
    """The command that makes these scores again, as far as they say.

    Empty for what ``score`` does not write: rows chosen from scores, a single file, and what a
    pipeline with stages of one's own made.
    """
    get = scores.provenance.get
    if not get("source") or get("stages") or get("selection"):
        return ""
    if not scores.path.is_dir() or read_run_file(scores.path) is None:
        return ""
    head = get("head", {}).get("name", "")
    words = ["aesthetic-filter", "score", str(get("source")), "--out", str(scores.path)]
    words += ["--head", head] if head else []
    words += ["--format", str(get("format"))] if get("format") else []
    columns = get("columns") or {}
    for key, option in (
        ("embedding", "--embedding-column"),
        ("image", "--image-column"),
        ("image_id", "--id-column"),
    ):
        words += [option, str(columns[key])] if columns.get(key) else []
    if columns.get("others") is not None:
        words += ["--columns", ",".join(columns["others"])]
    encoder, preprocessing = get("encoder") or {}, get("preprocessing") or {}
    words += ["--precision", str(encoder["precision"])] if encoder.get("precision") else []
    if encoder and not encoder.get("published", True):
        words += ["--weights", str(encoder["name"])]
    if preprocessing.get("max_pixels", PILLOW_S_LIMIT) != PILLOW_S_LIMIT:
        words += ["--max-pixels", str(preprocessing["max_pixels"])]
    words += ["--decode", "fast"] if preprocessing.get("decode") == "fast" else []
    words += ["--ignore-exif"] if preprocessing.get("exif") is False else []
    words += ["--allow-truncated"] if preprocessing.get("allow_truncated") else []
    return shlex.join(words)


def _command(scores: Scores, path: Path, options: Options) -> str:
    words = ["aesthetic-filter", "report", str(scores.path), "--out", str(path)]
    if options.threshold is not None:
        words += ["--threshold", repr(float(options.threshold))]
    words += ["--seed", str(options.seed)]
    words += [word for name in options.by for word in ("--by", name)]
    words += [] if options.images else ["--no-images"]
    words += ["--source", options.source] if options.source else []
    if options.max_bytes != MAX_BYTES:
        words += ["--max-mb", repr(options.max_bytes / 1e6)]
    words += ["--per-band", str(options.per_band)] if options.per_band != PER_BAND else []
    return shlex.join(words)
