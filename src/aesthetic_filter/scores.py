"""Scores: open them, look at them, choose from them. Nothing here scores anything again."""

from __future__ import annotations

import json
import os
import shutil
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from aesthetic_filter.database import PART, ROW, ROWS, SCORED, Database, quote
from aesthetic_filter.errors import OutputError, SelectionError
from aesthetic_filter.heads.head import FOREIGN_BELOW
from aesthetic_filter.run_folder import RUN_FILE, list_parts, read_run_file
from aesthetic_filter.selection.engine import Selection, check_selection
from aesthetic_filter.selection.output import SELECTION_FILE
from aesthetic_filter.selection.rule import Rule
from aesthetic_filter.selection.rules.max_score import MaxScore
from aesthetic_filter.selection.rules.min_score import MinScore
from aesthetic_filter.selection.rules.sample import Sample
from aesthetic_filter.selection.rules.top import Top
from aesthetic_filter.selection.rules.where import Where
from aesthetic_filter.storage import natural_order
from aesthetic_filter.table import COSINE, DROPPED_BY, EMBEDDING, ERROR, METADATA_KEY, NORM, SCORE

PERCENTILES = (0.01, 0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99)


@dataclass(frozen=True)
class Summary:
    """What a scores folder holds.

    Attributes:
        rows: all of them; scored and failed add up to it.
        scored: rows with a score.
        failures: reason to number of rows, the most frequent first.
        mean: of the scores; None where there are none.
        lowest: score.
        highest: score.
        percentiles: fraction to score (nearest rank, exact).
        thresholds: score to how many rows are at or above it.
        norms: minimum, median and maximum of the embeddings' L2 norms; None where not stored.
        foreign: scored rows that do not look like the head's embedding space.
        broken: shard to reason, for shards that could not be read.
        status: "complete", "running", "incomplete", or "" where there is no run file.
        provenance: head, source and the rest, as in ``_run.json``.
    """

    rows: int
    scored: int
    failures: Mapping[str, int]
    mean: float | None
    lowest: float | None
    highest: float | None
    percentiles: Mapping[float, float]
    thresholds: Mapping[float, int]
    norms: tuple[float, float, float] | None
    foreign: int
    broken: Mapping[str, str]
    status: str
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        total = max(self.rows, 1)
        lines = [
            f"rows            {self.rows:>14,}",
            f"  scored        {self.scored:>14,}{self.scored / total:>9.1%}",
            f"  failed        {self.rows - self.scored:>14,}{1 - self.scored / total:>9.1%}",
        ]
        lines += [f"    {why:<38}{count:>14,}" for why, count in self.failures.items()]
        if self.scored:
            lines += ["", self.distribution()]
        if self.norms:
            low, middle, high = self.norms
            lines += ["", f"norms           {low:.4g} to {high:.4g}, median {middle:.4g}"]
        if self.foreign:
            lines += [
                f"foreign         {self.foreign:,} scored rows do not look like the head's space "
                f"({COSINE} < {FOREIGN_BELOW})"
            ]
        head, get = self.provenance.get("head", {}), self.provenance.get
        lines += [""]
        lines += [f"head            {head.get('name', 'unknown')} ({head.get('sha256', '')[:12]})"]
        encoder = get("encoder")
        if encoder:
            encoder = f"{encoder['name']}@{encoder['revision'][:7]}, {encoder['precision']}"
        for label, value in (
            ("space", get("space")),
            ("encoder", encoder),
            ("source", get("source")),
            ("format", get("format")),
            ("made by", get("package")),
        ):
            lines += [f"{label:<16}{value}"] if value else []
        if self.status not in ("", "complete"):
            lines += [
                "",
                "not complete: the run is under way, was interrupted, or left shards behind; "
                "the same `aesthetic-filter score` goes on with it",
            ]
        lines += [f"  broken shard  {name}: {why}" for name, why in self.broken.items()]
        return "\n".join(lines)

    def distribution(self) -> str:
        """The scores' percentiles, and what each threshold would keep, as text."""
        total = max(self.rows, 1)
        lines = [
            f"score           mean {self.mean:.3f}, from {self.lowest:.3f} to {self.highest:.3f}",
            "  percentile  " + "".join(f"{p:>8.0%}" for p in self.percentiles),
            "  score       " + "".join(f"{s:>8.3f}" for s in self.percentiles.values()),
            "",
            "a threshold of        would keep",
        ]
        lines += [
            f"  {threshold:>8g}        {kept:>14,}{kept / total:>9.1%}"
            for threshold, kept in self.thresholds.items()
        ]
        return "\n".join(lines)


class Scores:
    """Scores on disk. Made by :func:`open_scores`.

    Attributes:
        path: what was opened.
        files: the Parquet files, in order.
        provenance: what they say of themselves: head, space, source, format, package.
    """

    def __init__(self, path: Path, files: list[Path], provenance: Mapping[str, Any]) -> None:
        self.path = path
        self.files = tuple(files)
        self.provenance = provenance

    def __repr__(self) -> str:
        return f"Scores({str(self.path)!r}, {len(self):,} rows in {len(self.files):,} parts)"

    def __len__(self) -> int:
        return self._rows

    @cached_property
    def _rows(self) -> int:
        return int(self.database.row(f"SELECT count(*) FROM {ROWS}")[0])

    @cached_property
    def database(self) -> Database:
        """For queries over all rows; opened on first use."""
        return Database(self.files)

    @cached_property
    def scored(self) -> int:
        """How many rows have a score."""
        return int(self.database.row(f"SELECT count(*) FROM {ROWS} WHERE {SCORED}")[0])

    @property
    def why_not_scored(self) -> str:
        """SQL for the reason why a row has no score."""
        marked = "stages" in self.provenance and DROPPED_BY in self.columns
        by_stage = f"'dropped by ' || {DROPPED_BY}, " if marked else ""
        return f"coalesce({ERROR}, {by_stage}'no score')"

    def rows_from(self, thresholds: NDArray[Any]) -> NDArray[np.int64]:
        """How many rows score at least each threshold, exactly.

        Args:
            thresholds: (N,), ascending; compared as float32, as ``filter --min-score`` does.

        Returns:
            (N,) int64.
        """
        marks = np.asarray(thresholds, np.float32)
        counted = np.zeros(len(marks) + 1, np.int64)
        for batch in self.database.stream(f"SELECT {SCORE} FROM {ROWS} WHERE {SCORED}"):
            values = batch.column(0).to_numpy(zero_copy_only=False)
            counted += np.bincount(
                np.searchsorted(marks, values, side="right"), minlength=len(counted)
            )
        return counted[:0:-1].cumsum()[::-1]

    @property
    def columns(self) -> list[str]:
        """The names of all columns."""
        return list(self.database.columns)

    def select(
        self,
        *rules: Rule,
        where: str | None = None,
        min_score: float | None = None,
        max_score: float | None = None,
        top: int | None = None,
        top_fraction: float | None = None,
        per: str | None = None,
        sample: int | None = None,
        seed: int = 0,
    ) -> Selection:
        """Choose rows; rules combine, each applied to what those before it left.

        Args:
            rules: rules as objects, of your own too.
            where: a SQL condition over the columns, such as ``"width >= 512"``.
            min_score: keep scores of at least this.
            max_score: keep scores of at most this.
            top: keep so many of the best, equal scores by ``image_id``.
            top_fraction: keep this share of the best, rounded up.
            per: a column: ``top`` and ``sample`` then hold within each of its values.
            sample: draw so many, evenly over the range of scores.
            seed: of the draw.

        Raises:
            SelectionError: no rule, or one that makes no sense.
        """
        if per is not None and top is None and top_fraction is None and sample is None:
            raise SelectionError("per goes with top, top_fraction or sample")
        chosen = list(rules)
        if where is not None:
            chosen.append(Where(where))
        if min_score is not None:
            chosen.append(MinScore(min_score))
        if max_score is not None:
            chosen.append(MaxScore(max_score))
        if top is not None and top_fraction is not None:
            raise SelectionError("give top or top_fraction, not both")
        if top is not None:
            chosen.append(Top(count=top, per=per))
        if top_fraction is not None:
            if not 0 < top_fraction <= 1:
                raise SelectionError(f"top_fraction is above 0 and up to 1, not {top_fraction}")
            chosen.append(Top(share=Fraction(str(top_fraction)), per=per))
        if sample is not None:
            chosen.append(Sample(sample, seed, per))
        check_selection(chosen)
        return Selection(self.database, chosen, self.provenance)

    def everything(self) -> Selection:
        """All rows that have a score."""
        return Selection(self.database, (), self.provenance)

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows, in the order of the source, as one table in memory.

        Args:
            columns: which; default: all but the embeddings.
        """
        tables = []
        for file in self.files:
            names = pq.read_schema(file.absolute()).names if columns is None else list(columns)
            wanted = names if columns else [name for name in names if name != EMBEDDING]
            tables.append(pq.read_table(file.absolute(), columns=wanted))
        return pa.concat_tables(
            [t.replace_schema_metadata(None) for t in tables], promote_options="default"
        )

    def rank(self, n: int = 20, *, worst: bool = False) -> pa.Table:
        """The ``n`` best rows, best first, or worst first; equal scores by ``image_id``."""
        order = "ASC" if worst else "DESC"
        columns = ", ".join(quote(name) for name in self.columns)
        rows = list(
            self.database.stream(
                f"SELECT {columns} FROM {ROWS} WHERE {SCORED} "
                f"ORDER BY {SCORE} {order}, image_id, {PART}, {ROW} LIMIT {int(n)}"
            )
        )
        schema = self.database.empty(f"SELECT {columns} FROM {ROWS}").schema
        return pa.Table.from_batches(rows, schema)

    def summary(self) -> Summary:
        """Counts, percentiles, what each threshold would keep, failures by reason, provenance."""
        ask = self.database
        scored_rows = f"(SELECT * FROM {ROWS} WHERE {SCORED})"
        has_norms = {NORM, COSINE} <= set(self.columns)
        foreign = f"count(*) FILTER (WHERE {COSINE} < {FOREIGN_BELOW}::FLOAT)" if has_norms else "0"
        scored, mean, lowest, highest, strange = ask.row(
            f"SELECT count(*), avg({SCORE}), min({SCORE}), max({SCORE}), {foreign} "
            f"FROM {scored_rows}"
        )
        failures = dict(
            ask.rows(
                f"SELECT {self.why_not_scored}, count(*) FROM {ROWS} "
                f"WHERE NOT {SCORED} GROUP BY 1 ORDER BY 2 DESC, 1"
            )
        )
        percentiles = ask.order_statistics(SCORE, PERCENTILES, scored_rows)
        thresholds = threshold_steps(percentiles[0], percentiles[-1]) if percentiles else []
        kept = ask.row(
            "SELECT count(*)"
            + "".join(f", count(*) FILTER (WHERE {SCORE} >= {t!r}::FLOAT)" for t in thresholds)
            + f" FROM {scored_rows}"
        )[1:]
        norms = None
        if has_norms and scored:
            least, most = ask.row(f"SELECT min({NORM}), max({NORM}) FROM {scored_rows}")
            norms = (least, ask.order_statistics(NORM, [0.5], scored_rows)[0], most)
        run = self._run_file or {}
        return Summary(
            rows=len(self),
            scored=scored,
            failures=failures,
            mean=mean,
            lowest=lowest,
            highest=highest,
            percentiles=dict(zip(PERCENTILES, percentiles, strict=False)),
            thresholds=dict(zip(thresholds, kept, strict=True)),
            norms=norms,
            foreign=strange,
            broken={b["shard"]: b["error"] for b in run.get("broken_shards", [])},
            status=run.get("status", ""),
            provenance=self.provenance,
        )

    def delete_when_done(self, folder: str) -> None:
        """Delete a folder once neither these scores nor anything chosen from them is in use."""
        weakref.finalize(self.database, shutil.rmtree, folder, ignore_errors=True)

    @cached_property
    def _run_file(self) -> dict[str, Any] | None:
        return read_run_file(self.path) if self.path.is_dir() else None


def open_scores(path: str | os.PathLike[str]) -> Scores:
    """Open a scores folder, a folder that ``filter`` wrote, or one Parquet file with scores.

    Raises:
        OutputError: there are no scores, or scores of different heads.
    """
    path = Path(path).expanduser()
    if path.is_file():
        files = [path]
    elif (path / SELECTION_FILE).exists():
        described = json.loads((path / SELECTION_FILE).read_text(encoding="utf-8"))
        found = path.glob(described.get("index", "kept.parquet"))
        files = sorted(found, key=lambda file: natural_order(file.name))
        if not files:
            raise OutputError(f"{path}: its kept rows are not Parquet; open the scores instead")
    elif read_run_file(path) is not None:
        files = list_parts(path)
        if not files:
            raise OutputError(
                f"{path}: no part is finished yet; run `aesthetic-filter score` again"
            )
    elif path.exists():
        raise OutputError(f"{path}: holds no scores; make some with `aesthetic-filter score`")
    else:
        raise OutputError(f"{path}: there is nothing there")
    return Scores(path, files, _common_provenance(path, files))


def is_scores(path: str | os.PathLike[str]) -> bool:
    """Whether :func:`open_scores` should open this, rather than ``score`` score it.

    True too of what is not there: that is the clearer mistake.
    """
    text = os.fspath(path)
    place = Path(text).expanduser()
    if place.is_dir():
        return (place / SELECTION_FILE).exists() or (place / RUN_FILE).exists()
    if place.is_file():
        try:
            return SCORE in pq.read_schema(place.absolute()).names
        except (pa.ArrowException, OSError):
            return False
    return "://" not in text and not set("*?[{") & set(text)


def threshold_steps(low: float, high: float) -> list[float]:
    """Round thresholds from below ``low`` to above ``high``: about a dozen."""
    step = next((s for s in (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5) if high - low <= 12 * s), 10.0)
    while high - low > 20 * step:
        step *= 10
    first, last = int(low // step), int((high + step * 1e-6) // step) + 1  # 5.25 // 0.05 is 104
    return [round(number * step, 6) for number in range(first, last + 1)]


def _common_provenance(path: Path, files: list[Path]) -> dict[str, Any]:
    """What all files say of themselves.

    Raises:
        OutputError: they were scored with different heads.
    """
    common: dict[str, Any] = {}
    heads: dict[str, str] = {}
    for file in files:
        try:
            stamp = (pq.read_schema(file.absolute()).metadata or {}).get(METADATA_KEY)
        except (pa.ArrowException, OSError) as error:
            raise OutputError(f"{file}: cannot be read as Parquet ({error})") from None
        found = json.loads(stamp) if stamp else {}
        head = found.get("head", {})
        heads[head.get("sha256", "")] = head.get("name", "unknown")
        common = found
    if len(heads) > 1:
        raise OutputError(
            f"{path}: holds scores of different heads ({', '.join(sorted(heads.values()))}); "
            "they cannot be compared"
        )
    for key in ("shard", "shard_version"):
        common.pop(key, None)
    return common
