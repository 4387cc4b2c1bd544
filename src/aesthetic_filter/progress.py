"""How far a run is, and what a person should hear of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import pyarrow as pa

from aesthetic_filter.formats import Shard
from aesthetic_filter.table import EMBEDDING, SCORE


@dataclass
class Progress:
    """How far a run is; handed to ``on_progress`` again and again.

    Attributes:
        shards: how many there are.
        reused: how many an earlier run had finished.
        finished: how many are finished, the reused ones among them.
        broken: shard name to reason, for those left behind (``keep_going``).
        total_bytes: of all shards that this run has to read.
        bytes: of those, how many are read, about.
        rows: scored or failed in this run.
        failed: of those, rows without a score.
        embedded: images whose embeddings are kept, so that they are not embedded again.
        notes: what else a person should know, such as a batch that did not fit into memory.
    """

    shards: int
    reused: int
    finished: int
    broken: dict[str, str]
    total_bytes: int
    bytes: int = 0
    rows: int = 0
    failed: int = 0
    embedded: int = 0
    notes: list[str] = field(default_factory=list)


class Recorder:
    """Keeps a :class:`Progress` true and reports it. Safe to call from several threads.

    Attributes:
        progress: as it is now.
    """

    def __init__(self, progress: Progress, report: Callable[[Progress], None] | None) -> None:
        self.progress = progress
        self._report_to = report
        self._lock = threading.Lock()
        self._under_way: dict[str, int] = {}  # shard name to bytes read of it, about
        self._bytes_done = 0

    def rows(self, shard: Shard, table: pa.Table, size: int) -> None:
        """Some rows of a shard have their results; ``size`` bytes were read for them."""
        with self._lock:
            # A compressed shard gives more bytes than it has: it counts as whole when it is.
            size += self._under_way.get(shard.name, 0)
            self._under_way[shard.name] = min(size, shard.size)
            self.progress.rows += table.num_rows
            self.progress.failed += table.column(SCORE).null_count
            if EMBEDDING in table.column_names:
                self.progress.embedded += len(table) - table.column(EMBEDDING).null_count
            self._report()

    def note(self, line: str) -> None:
        """Something that a person should know."""
        with self._lock:
            self.progress.notes.append(line)
            self._report()

    def done(self, shard: Shard, *, finished: bool) -> None:
        """Nothing more comes of a shard."""
        with self._lock:
            self.progress.finished += finished
            self._under_way.pop(shard.name, None)
            self._bytes_done += shard.size
            self._report()

    def report(self) -> None:
        """Report where it stands, also where nothing has happened since."""
        with self._lock:
            self._report()

    def _report(self) -> None:
        self.progress.bytes = self._bytes_done + sum(self._under_way.values())
        if self._report_to:
            self._report_to(self.progress)
