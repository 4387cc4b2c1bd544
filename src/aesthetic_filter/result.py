"""What a pipeline's run came to."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from aesthetic_filter.progress import Progress
from aesthetic_filter.steps import drop_reason
from aesthetic_filter.table import DROPPED_BY, ERROR, IMAGE_ID, SCORE

if TYPE_CHECKING:
    from aesthetic_filter.scores import Scores
    from aesthetic_filter.selection.engine import Counts, Selection

logger = logging.getLogger("aesthetic_filter")


@dataclass(frozen=True)
class Result:
    """What a pipeline's run came to.

    Attributes:
        scores: the scores of all rows, kept or not.
        selection: which rows are kept.
        threshold: the filter stage's ``score_threshold``.
        written: where the writer wrote what is kept; None where there was none.
        progress: how the run went: shards, rows, notes.
        backend: where it ran.
        seconds: how long it took.
        scores_are_kept: whether the scores stay when this object goes.
    """

    scores: Scores
    selection: Selection
    threshold: float | None
    written: Path | None
    progress: Progress
    backend: str
    seconds: float
    scores_are_kept: bool = True

    @property
    def counts(self) -> Counts:
        """How many rows were kept, dropped and failed; they add up."""
        return self.selection.counts

    @property
    def broken(self) -> Mapping[str, str]:
        """Shard name to reason, for the shards that could not be read, or not to their end."""
        return self.progress.broken

    def table(self) -> pa.Table:
        """The kept rows, in the order of the source, as one table in memory."""
        return self.selection.table()

    @property
    def warning(self) -> str:
        """That the threshold keeps everything, or nothing, of what comes to it; else ""."""
        if self.threshold is None:
            return ""
        counts = self.counts
        last = counts.dropped.get(f"min-score {self.threshold:g}", 0)
        below = last + counts.dropped.get(drop_reason(self.threshold), 0)
        if counts.kept and not below:
            what = "everything"
        elif not counts.kept and (last or below == sum(counts.dropped.values()) > 0):
            what = "nothing"  # not where it may be the stages after it that dropped the rest
        else:
            return ""
        return f"score_threshold {self.threshold:g} keeps {what}"

    def summary(self) -> str:
        """Rows kept, dropped and failed, where they are, and how long it took, as text."""
        counts, progress = self.counts, self.progress
        lines = [str(self.scores.provenance.get("source", "")), str(counts)]
        lines += [f"    {why}: {n:,}" for why, n in self._failures.items()]
        lines += [f"broken shard {name}: {why}" for name, why in sorted(self.broken.items())]
        if self.scores_are_kept:
            lines.append(f"scores in {self.scores.path}")
        if self.written is not None:
            lines.append(f"written to {self.written}")
        rate = progress.rows / max(self.seconds, 1e-3)
        again = f", {progress.reused:,} shards from before" if progress.reused else ""
        lines.append(
            f"{self.seconds:.1f} s, {progress.rows:,} rows at {rate:,.3g} rows/s, "
            f"{self.backend}{again}"
        )
        whole = self.scores.summary() if self.warning else None
        if whole is not None and whole.scored:
            shown = whole.distribution()
            lines += ["", f"{self.warning}; what others would keep:", "", shown]
        return "\n".join(lines)

    def log(self) -> None:
        """Log each drop and each failure, and the totals, as ``verbose`` asks for."""
        for fate in ("dropped", "failed"):
            for batch in self.selection.batches(fate):
                for row in batch.to_pylist():
                    if fate == "failed":
                        logger.info("%s: failed: %s", row[IMAGE_ID], row[ERROR])
                    else:
                        logger.info(
                            "%s: dropped: %s, %s %s",
                            row[IMAGE_ID],
                            row[DROPPED_BY],
                            SCORE,
                            row[SCORE],
                        )
        dropped = sum(self.counts.dropped.values())
        counted = (self.counts.kept, dropped, self.counts.failed)
        logger.info("kept %d, dropped %d, failed %d", *counted)

    @property
    def _failures(self) -> Mapping[str, int]:
        return self.scores.summary().failures if self.counts.failed else {}
