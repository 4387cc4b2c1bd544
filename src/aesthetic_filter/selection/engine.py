"""Choose rows by rules, over scores of any size; nothing is scored again.

Every row ends as kept, dropped (by the first rule that did not keep it) or failed (it has no
score), and the three add up to the input.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from aesthetic_filter.database import PART, ROW, ROWS, SCORED, Database, quote, text
from aesthetic_filter.errors import OutputError, SelectionError
from aesthetic_filter.formats import (
    ImageOutput,
    ImageWriter,
    Writer,
    find_writer,
    image_writers,
)
from aesthetic_filter.run_folder import local_folder
from aesthetic_filter.selection.images import kept_images
from aesthetic_filter.selection.output import ROW_FILES, replaced
from aesthetic_filter.selection.rule import Rule
from aesthetic_filter.table import DROPPED_BY, METADATA_KEY, printable

_FATE = "__fate"
"""NULL: kept so far; otherwise the number of the rule that dropped the row, or one of these."""

_FAILED, _BY_STAGE = -1, -2
_numbers = itertools.count()


@dataclass(frozen=True)
class Counts:
    """How the rows of a selection ended; kept, dropped and failed add up to rows.

    Attributes:
        rows: all of them.
        kept: by all rules.
        dropped: rule label to how many it dropped, in the order of the rules.
        failed: those without a score.
        groups: for a selection with quotas, group to (rows, kept), the largest first, at most 20.
    """

    rows: int
    kept: int
    dropped: Mapping[str, int]
    failed: int
    groups: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def __str__(self) -> str:
        width = max(map(len, (*self.dropped, *self.groups, "dropped"))) + 2
        total = max(self.rows, 1)

        def line(name: str, count: int, indent: int) -> str:
            share = f"{count / total:7.1%}"
            return f"{' ' * indent}{name:<{width + 4 - indent}}{count:>14,}{share:>9}"

        lines = [line("rows", self.rows, 2), line("kept", self.kept, 2)]
        lines.append(line("dropped", sum(self.dropped.values()), 2))
        lines += [line(label, count, 4) for label, count in self.dropped.items()]
        lines.append(line("failed", self.failed, 2))
        if self.groups:
            lines.append("  kept of each group")
            lines += [
                f"    {name:<{width}}{kept:>14,}{kept / max(rows, 1):>9.1%} of {rows:,}"
                for name, (rows, kept) in self.groups.items()
            ]
        return "\n".join(lines)


class Selection:
    """The rows that some rules keep, drop and pass over. Made by ``Scores.select``.

    Attributes:
        rules: in the order in which they are applied.
    """

    def __init__(
        self, database: Database, rules: Sequence[Rule], provenance: Mapping[str, Any]
    ) -> None:
        self.rules = tuple(sorted(rules, key=lambda rule: rule.order))
        self._database = database
        self._provenance = provenance
        # A pipeline's own stages may have dropped rows; elsewhere the column is somebody's own.
        self._by_stage = "stages" in provenance and DROPPED_BY in database.columns
        self._decided = self._decide()

    def _decide(self) -> str:
        """A parenthesised query of all rows with their fate, one rule around the other."""
        by_stage = f"WHEN {DROPPED_BY} IS NOT NULL THEN {_BY_STAGE}" if self._by_stage else ""
        fate = f"CASE {by_stage} WHEN NOT {SCORED} THEN {_FAILED} END"
        decided = f"(SELECT *, {fate} AS {_FATE} FROM {ROWS})"
        for number, rule in enumerate(self.rules):
            survivors = f"(SELECT * FROM {decided} WHERE {_FATE} IS NULL)"
            scratch = f"rule_{next(_numbers)}"
            found = rule.condition(survivors, self._database, scratch)
            fate = f"CASE WHEN r.{_FATE} IS NULL AND coalesce({found.keep}, false) IS FALSE "
            fate += f"THEN {number} ELSE r.{_FATE} END"
            decided = f"(SELECT r.* REPLACE ({fate} AS {_FATE}) FROM {decided} r {found.join})"
        return decided

    @cached_property
    def counts(self) -> Counts:
        """How the rows ended."""
        by_fate = dict(
            self._database.rows(f"SELECT {_FATE}, count(*) FROM {self._decided} GROUP BY {_FATE}")
        )
        per = next((p for rule in self.rules if (p := getattr(rule, "per", None))), None)
        groups = {}
        if per is not None:
            groups = {
                "(none)" if name is None else printable(name): (rows, kept)
                for name, rows, kept in self._database.rows(
                    f"SELECT {quote(per)}, count(*), count(*) FILTER (WHERE {_FATE} IS NULL) "
                    f"FROM {self._decided} GROUP BY 1 ORDER BY 2 DESC, {quote(per)}::VARCHAR "
                    "LIMIT 20"
                )
            }
        dropped: dict[str, int] = {}
        if self._by_stage:
            dropped |= self._database.rows(
                f"SELECT {DROPPED_BY}, count(*) FROM {self._decided} WHERE {_FATE} = {_BY_STAGE} "
                "GROUP BY 1 ORDER BY 2 DESC, 1"
            )
        for number, rule in enumerate(self.rules):  # two rules may have the same label
            dropped[rule.label] = dropped.get(rule.label, 0) + by_fate.get(number, 0)
        return Counts(
            rows=sum(by_fate.values()),
            kept=by_fate.get(None, 0),
            dropped=dropped,
            failed=by_fate.get(_FAILED, 0),
            groups=groups,
        )

    def __len__(self) -> int:
        return self.counts.kept

    def summary(self) -> str:
        """Rows kept, dropped by each rule, and failed, as text."""
        return str(self.counts)

    def table(self) -> pa.Table:
        """The kept rows, in the order of the source, as one table in memory."""
        batches = list(self.batches())
        if not batches:
            return self._empty("kept")
        return pa.Table.from_batches(batches)

    def write(
        self,
        folder: str | Path,
        *,
        as_: str = "index",
        with_dropped: bool = False,
        shard_size: int = 10_000,
        link: str | None = None,
        score_in: str | None = None,
        source: str | None = None,
    ) -> Path:
        """Write what was kept, in the order of the source.

        Args:
            folder: where to; made if it is not there. A selection written there before is
                replaced whole.
            as_: the rows as index (``kept.parquet``), csv, jsonl, or ids (text, one id a line);
                the images, where the scores were made from images, as webdataset, folder, or
                parquet.
            with_dropped: also write the dropped rows, with the rule that dropped each, and the
                failed.
            shard_size: images in a tar or Parquet file.
            link: "hard" or "symlink": link the images into a folder instead of copying them.
            score_in: "json": also put the score into each sample's json.
            source: where the images are now, if they have been moved.

        Returns:
            The path of the kept rows, or the folder of the images.

        Raises:
            OutputError: the folder holds something else, or cannot be written.
            ShardError: an image is gone, or has changed since it was scored.
        """
        folder = local_folder(folder)
        options = ImageOutput(shard_size, link, score_in)
        check_output(as_, options)
        image_writer = image_writers().get(as_)
        if image_writer and ("images" in self._provenance or as_ != "parquet"):
            self._write_images(folder, image_writer, options, with_dropped, source)
            return folder
        writer = find_writer(as_)
        with replaced(folder, self.describe) as staging:
            for name in ROW_FILES if with_dropped else ROW_FILES[:1]:
                self._write_rows(staging / f"{name}{writer.ENDING}", name, writer)
        return folder / f"{ROW_FILES[0]}{writer.ENDING}"

    def batches(self, fate: str = "kept") -> Iterator[pa.RecordBatch]:
        """The rows that are "kept", "dropped" (with ``dropped_by``) or "failed", however many."""
        return self._database.stream(self._query(fate))

    def _write_images(
        self,
        folder: Path,
        writer: ImageWriter,
        options: ImageOutput,
        with_dropped: bool,
        source: str | None,
    ) -> None:
        with replaced(folder, lambda: {**self.describe(), "index": writer.INDEX}) as staging:
            batches = self._database.stream(self._query("kept", places=True))
            images = kept_images(batches, self._database.files, self._provenance, source)
            writer.write_images(staging, images, self._schema("kept"), options)
            for name in ROW_FILES[1:] if with_dropped else ():
                index = find_writer("index")
                self._write_rows(staging / f"_{name}{index.ENDING}", name, index)

    def _write_rows(self, path: Path, fate: str, writer: Writer) -> None:
        writer.write(path, self._schema(fate), self.batches(fate))

    def describe(self) -> dict[str, Any]:
        """The selection as plain data: its rules, its counts, and where the scores come from."""
        return {
            "rules": [rule.label for rule in self.rules],
            "counts": {
                "rows": self.counts.rows,
                "kept": self.counts.kept,
                "dropped": dict(self.counts.dropped),
                "failed": self.counts.failed,
            },
            "scores": dict(self._provenance),
        }

    def _query(self, fate: str, *, places: bool = False) -> str:
        order = f"ORDER BY {PART}, {ROW}"
        columns = ", ".join(quote(name) for name in self._database.columns)
        columns += f", {PART}, {ROW}" if places else ""
        if fate == "kept":
            return f"SELECT {columns} FROM {self._decided} WHERE {_FATE} IS NULL {order}"
        if fate == "failed":
            return f"SELECT {columns} FROM {self._decided} WHERE {_FATE} = {_FAILED} {order}"
        names = " ".join(f"WHEN {n} THEN {text(rule.label)}" for n, rule in enumerate(self.rules))
        names += f" WHEN {_BY_STAGE} THEN {DROPPED_BY if self._by_stage else 'NULL'}"
        columns = ", ".join(quote(name) for name in self._database.columns if name != DROPPED_BY)
        return (
            f"SELECT {columns}, CASE {_FATE} {names} END AS {DROPPED_BY} "
            f"FROM {self._decided} WHERE {_FATE} >= 0 OR {_FATE} = {_BY_STAGE} {order}"
        )

    def _empty(self, fate: str) -> pa.Table:
        return self._database.empty(self._query(fate))

    def _schema(self, fate: str) -> pa.Schema:
        provenance = {**self._provenance, "selection": [rule.label for rule in self.rules]}
        schema: pa.Schema = self._empty(fate).schema
        return schema.with_metadata({METADATA_KEY: json.dumps(provenance).encode()})


def group_expression(per: str | None, database: Database) -> str:
    """SQL for a row's group; one constant where there are no groups.

    Raises:
        SelectionError: there is no such column.
    """
    if per is None:
        return "0"
    if per not in database.columns:
        raise SelectionError(
            f"--per {per!r}: there is no such column; there are: {', '.join(database.columns)}"
        )
    return f"r.{quote(per)}"


def check_selection(
    rules: Sequence[Rule], as_: str = "index", options: ImageOutput = ImageOutput()
) -> None:
    """Refuse what could never be carried out, whatever the scores.

    Raises:
        SelectionError: there is no rule.
        OutputError: nothing is written like that, or an option means nothing for it.
    """
    if not rules:
        raise SelectionError(
            "a selection needs at least one rule, such as --min-score 5.5 or --top 10%"
        )
    check_output(as_, options)


def check_output(as_: str, options: ImageOutput) -> None:
    """Refuse a way of writing that there is not.

    Raises:
        OutputError: nothing is written like that, or an option means nothing for it.
    """
    heeded: Sequence[str] = ()
    if as_ in image_writers():
        heeded = image_writers()[as_].IMAGE_OPTIONS
    else:
        find_writer(as_)
    if options.link not in (None, "hard", "symlink"):
        raise OutputError(f"--link is hard or symlink, not {options.link!r}")
    if options.score_in not in (None, "json"):
        raise OutputError(f"--score-in is json, not {options.score_in!r}")
    if options.shard_size < 1:
        raise OutputError(f"--shard-size is 1 or more, not {options.shard_size}")
    for name, value in vars(options).items():
        if value != getattr(ImageOutput(), name) and name not in heeded:
            raise OutputError(f"--{name.replace('_', '-')} means nothing --as {as_}")
