"""Labels: what people said of images, in a CSV file that anybody can write.

One row is one judgement. Needed are a column that names the image (``image_id``, or another usual
name) and one that says what somebody thought of it: ``label`` (keep, drop, skip) or ``rating`` (a
number). Files that ``aesthetic-filter review`` writes have also who said it and when, and from
which stratum of the scores the image was drawn, so that the sample can be weighted back.

A later row of the same reviewer about the same image replaces the earlier one; an empty label
withdraws it. So a file is only ever appended to, and a label that was saved stays saved.
"""

from __future__ import annotations

import csv
import fcntl
import io
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aesthetic_filter.errors import OutputError, UsageError
from aesthetic_filter.formats.parquet import ID_NAMES
from aesthetic_filter.table import printable

KEEP, DROP, SKIP, WITHDRAWN = "keep", "drop", "skip", ""

COLUMNS = (
    "image_id",
    "label",
    "reviewer",
    "labelled_at",
    "aesthetic_score",
    "stratum",
    "stratum_rows",
)
"""What ``aesthetic-filter review`` writes.

``labelled_at`` is UTC in ISO 8601. ``stratum`` is the range of scores from which the image was
drawn at random, and ``stratum_rows`` how many images the data set has there: together they say how
likely the image was to be looked at.
"""

LABEL_NAMES = ("label", "keep", "decision", "verdict")
RATING_NAMES = ("rating", "mos", "mean_opinion_score", "aesthetic_rating", "stars")
WORDS = {
    **dict.fromkeys(("keep", "kept", "yes", "true", "good", "like", "1"), KEEP),
    **dict.fromkeys(("drop", "dropped", "no", "false", "bad", "dislike", "0"), DROP),
    **dict.fromkeys(("skip", "skipped", "unsure", "?"), SKIP),
    "": WITHDRAWN,
}
"""What people write for keep, drop and skip, in any case of letters."""


@dataclass(frozen=True)
class Label:
    """One judgement.

    Attributes:
        image_id: of which image.
        value: ``keep``, ``drop``, ``skip``, "" (withdrawn), or a rating.
        reviewer: whose; "" where nobody said.
        labelled_at: when, ISO 8601.
        score: the image's ``aesthetic_score`` at that time.
        stratum: the range of scores it was drawn from; "" where it was not.
        stratum_rows: how many images the data set has in that stratum; 0 where unknown.
    """

    image_id: str
    value: str | float
    reviewer: str = ""
    labelled_at: str = ""
    score: float = math.nan
    stratum: str = ""
    stratum_rows: int = 0


@dataclass(frozen=True)
class Agreement:
    """How far reviewers agree on the images that two or more of them judged.

    Attributes:
        images: so many.
        share: of pairs of judgements on one image that are the same; 0 to 1.
        alpha: Krippendorff's alpha for nominal data: 1 is perfect, 0 is chance; NaN where all
            judgements are the same. (K. Krippendorff, Content Analysis, 2nd ed. 2004, chapter 11.)
    """

    images: int
    share: float
    alpha: float

    def __str__(self) -> str:
        alpha = "" if math.isnan(self.alpha) else f", Krippendorff's alpha {self.alpha:.2f}"
        return f"{self.share:.0%} on {self.images:,} images{alpha}"


@dataclass(frozen=True)
class Labels:
    """All that was said of some images, one entry for each image.

    Attributes:
        ids: of the images, in the order in which they were first judged.
        values: (N,) float64. Of keep and drop, the share of reviewers who would keep the image;
            of ratings, their mean.
        kind: "keep" or "rating".
        strata: (N,) int, the number of the stratum each was drawn from; None where the file does
            not say it of every image.
        stratum_rows: (number of strata,) int, how many images the data set has in each.
        reviewers: how many images each judged.
        skipped: images that were looked at and skipped by all who saw them.
        agreement: None where no image was judged twice.
        notes: what a person should know of the file, in sentences.
    """

    ids: tuple[str, ...]
    values: NDArray[np.float64]
    kind: str
    strata: NDArray[np.int64] | None
    stratum_rows: NDArray[np.int64]
    reviewers: Mapping[str, int]
    skipped: int
    agreement: Agreement | None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)


def read_labels(
    path: str | Path,
    *,
    keep_from: float | None = None,
    id_column: str | None = None,
    label_column: str | None = None,
) -> Labels:
    """Read labels or ratings.

    Args:
        path: a CSV file with a header, or one of tab-separated values.
        keep_from: take ratings for labels: a rating of at least this is a keep.
        id_column: which column names the image; default: found by its usual names.
        label_column: which says what was thought of it; likewise.

    Raises:
        UsageError: it cannot be read, or holds no labels.
    """
    found, kind, notes = read_label_rows(path, id_column=id_column, label_column=label_column)
    if kind == "rating" and keep_from is not None:
        found = [_as_keep(label, keep_from) for label in found]
        kind = "keep"
    elif keep_from is not None:
        raise UsageError(f"{path}: holds labels, not ratings; --keep-from goes with ratings")
    return gather(found, kind, notes)


def read_label_rows(
    path: str | Path, *, id_column: str | None = None, label_column: str | None = None
) -> tuple[list[Label], str, list[str]]:
    """The judgements in a file as they stand, "keep" or "rating", and notes.

    Raises:
        UsageError: it cannot be read, or holds no labels.
    """
    path = Path(path).expanduser()
    try:
        text = _decoded(path.read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UsageError(f"{path}: labels cannot be read: {why}") from None
    header, rows, torn = _rows_of(text)
    if not header:
        raise UsageError(f"{path}: is empty; labels are a CSV file with image_id and label")
    notes = ["the last line was cut short and is left out"] if torn else []
    names = {name.strip().lower(): name for name in header}
    by_id = _column(path, header, names, id_column, ID_NAMES, "image")
    by_label = _column(
        path, header, names, label_column, (*LABEL_NAMES, *RATING_NAMES), "label or rating"
    )
    texts = [row.get(by_label, "").strip() for row in rows]
    kind = _kind(texts)
    found = []
    for number, (row, text) in enumerate(zip(rows, texts, strict=True), start=2):
        value: str | float = text.lower()
        if kind == "rating":
            value = _rating(text)
        elif value in WORDS:
            value = WORDS[text.lower()]
        else:
            raise UsageError(
                f"{path}, row {number}: {by_label} is {printable(text)!r}; "
                "labels are keep, drop or skip, and ratings are numbers"
            )
        found.append(
            Label(
                row[by_id],
                value,
                row.get("reviewer", "") or "",
                row.get("labelled_at", "") or "",
                _number(row.get("aesthetic_score")),
                row.get("stratum", "") or "",
                int(_number(row.get("stratum_rows"), 0.0)),
            )
        )
    return found, kind, notes


def gather(found: Iterable[Label], kind: str = "keep", notes: Sequence[str] = ()) -> Labels:
    """One entry for each image: the last word of each reviewer, then the mean over reviewers.

    Args:
        found: judgements, in the order in which they were made.
        kind: "keep" or "rating".
        notes: carried along.
    """
    last: dict[tuple[str, str], Label] = {}
    for label in found:
        if label.value == WITHDRAWN:
            last.pop((label.image_id, label.reviewer), None)
        else:
            last[label.image_id, label.reviewer] = label
    votes: dict[str, list[float]] = {}
    drawn: dict[str, tuple[str, int]] = {}
    reviewers: Counter[str] = Counter()
    skipped: set[str] = set()
    for label in last.values():
        if label.stratum:
            drawn[label.image_id] = (label.stratum, label.stratum_rows)
        if label.value == SKIP:
            skipped.add(label.image_id)
            continue
        reviewers[label.reviewer] += 1
        value = float(label.value == KEEP) if isinstance(label.value, str) else label.value
        votes.setdefault(label.image_id, []).append(value)
    ids = tuple(votes)
    strata, stratum_rows = _strata(ids, drawn)
    notes = list(notes)
    if strata is None and drawn:
        notes.append(
            "not every label says from which stratum its image was drawn: weights are made from "
            "the scores instead"
        )
    return Labels(
        ids=ids,
        values=np.array([math.fsum(v) / len(v) for v in votes.values()], np.float64),
        kind=kind,
        strata=strata,
        stratum_rows=stratum_rows,
        reviewers=dict(reviewers),
        skipped=len(skipped - votes.keys()),
        agreement=_agreement(votes.values()) if kind == "keep" else None,
        notes=tuple(notes),
    )


def _strata(
    ids: Sequence[str], drawn: Mapping[str, tuple[str, int]]
) -> tuple[NDArray[np.int64] | None, NDArray[np.int64]]:
    """Number the strata in the order of their scores, and say how many images each has."""
    if not ids or any(image not in drawn or drawn[image][1] < 1 for image in ids):
        return None, np.zeros(0, np.int64)
    rows: dict[str, int] = {}
    for image in ids:
        name, count = drawn[image]
        rows[name] = max(rows.get(name, 0), count)
    names = sorted(rows, key=_lower_edge)
    number = {name: place for place, name in enumerate(names)}
    return (
        np.array([number[drawn[image][0]] for image in ids], np.int64),
        np.array([rows[name] for name in names], np.int64),
    )


def _lower_edge(stratum: str) -> tuple[float, str]:
    return _number(stratum.partition(" to ")[0], -math.inf), stratum


def _agreement(votes: Iterable[Sequence[float]]) -> Agreement | None:
    """Krippendorff's alpha for two values, with images judged by any number of people."""
    units = [(sum(v), len(v)) for v in votes if len(v) > 1]
    if not units:
        return None
    same = sum((k * (k - 1) + (n - k) * (n - k - 1)) / (n * (n - 1)) for k, n in units)
    # Coincidences: each unit of n values counts n, shared out over its pairs.
    total = sum(n for _, n in units)
    differ = sum(2 * k * (n - k) / (n - 1) for k, n in units)
    keeps = sum(k for k, _ in units)
    expected = 2 * keeps * (total - keeps) / (total - 1)
    alpha = 1 - differ / expected if expected else math.nan
    return Agreement(len(units), same / len(units), alpha)


def _as_keep(label: Label, keep_from: float) -> Label:
    if isinstance(label.value, str):
        return label
    value = KEEP if label.value >= keep_from else DROP
    return Label(**{**vars(label), "value": value})


def _kind(texts: Sequence[str]) -> str:
    """Whether a column holds ratings: numbers, and others among them than 0 and 1."""
    said = [text for text in texts if WORDS.get(text.lower()) not in (SKIP, WITHDRAWN)]
    numbers = all(math.isfinite(_number(text)) for text in said)
    return "rating" if numbers and not all(text in WORDS for text in said) else "keep"


def _rating(text: str) -> str | float:
    known = WORDS.get(text.lower())
    return known if known in (SKIP, WITHDRAWN) else _number(text)


def _number(text: str | None, otherwise: float = math.nan) -> float:
    try:
        value = float(text or "")
    except ValueError:
        return otherwise
    return value if math.isfinite(value) else otherwise


def _column(
    path: Path,
    header: Sequence[str],
    names: Mapping[str, str],
    given: str | None,
    usual: Sequence[str],
    what: str,
) -> str:
    if given is not None:
        if given not in header:
            raise UsageError(f"{path}: has no column {given!r}; it has {', '.join(header)}")
        return given
    for name in usual:
        if name in names:
            return names[name]
    raise UsageError(
        f"{path}: no column names the {what}: it has {', '.join(map(printable, header))}; "
        f"expected {usual[0]!r}, or say which with an option"
    )


def _decoded(data: bytes) -> str:
    """The text of a file, but for a last character that a crash cut in two."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.end < len(data) or error.reason != "unexpected end of data":
            raise
        return data[: error.start].decode("utf-8-sig")


def _rows_of(text: str) -> tuple[list[str], list[dict[str, str]], bool]:
    """Header, rows, and whether the last line is torn (as by a crash of the machine)."""
    first = text.split("\n", 1)[0]
    delimiter = "\t" if "\t" in first and "," not in first else ","
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    records: list[list[str]] = []
    torn = False
    try:
        records.extend(record for record in reader if record)
    except csv.Error:
        torn = True
    if not records:
        return [], [], torn
    header, *rest = records
    if rest and len(rest[-1]) < len(header) and not text.endswith("\n"):
        rest.pop()
        torn = True
    return header, [dict(zip(header, record, strict=False)) for record in rest], torn


class LabelFile:
    """Labels being made: a file that is only appended to, and locked while it is open.

    Every label is on the disk before :meth:`add` returns.

    Attributes:
        labels: all judgements in the file, in order.
    """

    def __init__(self, path: str | Path) -> None:
        """Open or create a label file.

        Raises:
            OutputError: it cannot be written, is in use, or is not one of ours.
        """
        self.path = Path(path).expanduser()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written: {error.strerror}") from None
        try:
            self.labels = self._start()
        except BaseException:
            os.close(self._file)
            raise

    def _start(self) -> list[Label]:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputError(
                f"{self.path}: another review is writing to it; reviewers share one: "
                "they open the address that it printed"
            ) from None
        if os.fstat(self._file).st_size == 0:
            self._append(COLUMNS)
            return []
        data = self.path.read_bytes()
        try:
            text = _decoded(data)
        except UnicodeDecodeError:
            text = ""
        header, _, torn = _rows_of(text)
        if tuple(header) != COLUMNS:
            raise OutputError(
                f"{self.path}: holds something else ({', '.join(header[:4])}…); "
                "give another file with --labels"
            )
        if torn or not data.endswith(b"\n"):
            self._mend(data)
        return read_label_rows(self.path)[0]

    def _mend(self, data: bytes) -> None:
        """Cut off a last line that a crash left unfinished: it was never acknowledged."""
        while data:
            data = data[: data[:-1].rfind(b"\n") + 1]
            header, rows, torn = _rows_of(_decoded(data))
            if not torn and all(len(row) == len(header) for row in rows):
                break
        os.ftruncate(self._file, len(data))

    def add(self, label: Label) -> None:
        """Save one judgement, or, with an empty value, withdraw it.

        Raises:
            OutputError: the disk is full, or gone. The file is then as it was.
        """
        score = "" if math.isnan(label.score) else f"{label.score:.9g}"
        rows = label.stratum_rows or ""
        value, when = label.value, label.labelled_at or now()
        self._append((label.image_id, value, label.reviewer, when, score, label.stratum, rows))
        self.labels.append(label)

    def _append(self, values: Iterable[Any]) -> None:
        line = io.StringIO()
        values = list(map(str, values))
        # The writer leaves a lone carriage return unquoted, the reader takes it for a line's end.
        returns = any("\r" in value for value in values)
        csv.writer(
            line, lineterminator="\n", quoting=csv.QUOTE_ALL if returns else csv.QUOTE_MINIMAL
        ).writerow(values)
        data = line.getvalue().encode()
        before = os.fstat(self._file).st_size
        try:
            if os.write(self._file, data) != len(data):
                raise OSError(None, "the disk is full")
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, before)
            raise OutputError(f"{self.path}: a label was not saved: {error.strerror}") from None

    def close(self) -> None:
        """Let go of the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def now() -> str:
    """The time, UTC, in ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
