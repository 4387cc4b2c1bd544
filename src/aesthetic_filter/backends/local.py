"""Work on this machine: shards in threads, images through one encoder."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from aesthetic_filter import kernels
from aesthetic_filter.backends import Plan
from aesthetic_filter.errors import ShardError, SourceError, WrongEmbeddingsError
from aesthetic_filter.formats import Shard
from aesthetic_filter.journal import Journal
from aesthetic_filter.prefetch import prefetch
from aesthetic_filter.run_folder import Part, unwritable
from aesthetic_filter.stages import ImageEmbeddingStage
from aesthetic_filter.steps import OwnStep, ScoreStep, Step

if TYPE_CHECKING:
    from aesthetic_filter.clip.encoder import Encoder


class LocalBackend:
    """Several shards at once, each in a thread of its own.

    Args:
        workers: how many; default: the processors, for images 2, so that the end of one shard
            idles no device.
    """

    def __init__(self, workers: int | None = None) -> None:
        self._workers = workers
        self._encoder: Encoder | None = None

    def __enter__(self) -> LocalBackend:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._encoder is not None:
            self._encoder.close()

    def describe(self, stage: ImageEmbeddingStage) -> dict[str, Any]:
        """The encoder and the preprocessing, ready for :meth:`run`."""
        from aesthetic_filter.clip.encoder import Encoder

        self._encoder = Encoder(stage.options, model_dir=stage.model_dir)
        return self._encoder.describe()

    def run(self, plan: Plan, shards: Sequence[Shard]) -> list[Part]:
        """Turn the shards into parts."""
        images = plan.opened.reader.GIVES == "image"
        workers = self._workers or (2 if images else kernels.default_threads())
        workers = max(1, min(workers, len(shards)))
        job = _Job(plan, self._encoder, max(1, kernels.default_threads() // workers))
        parts: list[Part] = []
        waiting: dict[Future[Part], Shard] = {}
        left = iter(shards)
        with ThreadPoolExecutor(workers, thread_name_prefix="aesthetic-filter-shard") as pool:
            try:
                waiting = {pool.submit(job.work_on, s): s for s in islice(left, 2 * workers)}
                while waiting:
                    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                        shard = waiting.pop(future)
                        part = _result(plan, shard, future)
                        parts += [part] if part else []
                        plan.recorder.done(shard, finished=part is not None)
                        waiting |= {pool.submit(job.work_on, s): s for s in islice(left, 1)}
            finally:
                job.stop.set()
                if self._encoder is not None:
                    self._encoder.close()
                pool.shutdown(wait=True, cancel_futures=True)
                # Interrupted: some may have been finished while the others were given up.
                whole = [f for f in waiting if not f.cancelled() and f.exception() is None]
                plan.recorder.progress.finished += len(whole)
        return parts


def _result(plan: Plan, shard: Shard, future: Future[Part]) -> Part | None:
    """A shard's part; None where the shard is broken and that is put up with."""
    try:
        return future.result()
    except (ShardError, SourceError, WrongEmbeddingsError) as error:
        if not plan.keep_going:
            raise
        plan.broken(shard, getattr(error, "reason", str(error)))
        return None
    except OSError as error:
        raise unwritable(plan.folder.path, error) from None


class _StoppedError(Exception):
    """Raised in a worker to give up its shard because the run is ending."""


class _Job:
    """What the workers share."""

    def __init__(self, plan: Plan, encoder: Encoder | None, threads: int) -> None:
        self.plan = plan
        self.encoder = encoder
        self.stop = threading.Event()
        self._one_at_a_time = threading.Lock()
        self._before = [_with_threads(step, threads) for step in plan.before]
        self._after = [_with_threads(step, threads) for step in plan.after]
        if encoder is not None:
            encoder.on_note = plan.recorder.note
        for step in (*plan.before, *plan.after):
            if isinstance(step, OwnStep):
                step.setup()

    def work_on(self, shard: Shard) -> Part:
        journal = self.plan.folder.journal(shard.name) if self.encoder else None
        sizes = _Sizes()
        try:
            tables = self._apply(self._before, self._tables(shard, sizes))
            if self.encoder is not None and journal is not None:
                tables = self._embedded(tables, self.encoder, journal)
            scored = self._apply(self._after, tables)
            part = self.plan.write(shard, self._recorded(shard, scored, sizes))
        except WrongEmbeddingsError as error:
            raise type(error)(f"{shard.name}: {error}") from None
        finally:
            if journal is not None:
                journal.close()
        if journal is not None:
            journal.remove()
        return part

    def _recorded(
        self, shard: Shard, tables: Iterable[pa.Table], sizes: _Sizes
    ) -> Iterator[pa.Table]:
        for table in tables:
            self.plan.recorder.rows(shard, table, sizes.of(table))
            yield table

    def _tables(self, shard: Shard, sizes: _Sizes) -> Iterator[pa.Table]:
        opened = self.plan.opened
        tables = opened.reader.read(opened.source, shard, opened.wanted)
        for table in tables if opened.source.is_local else prefetch(tables):
            if self.stop.is_set():
                raise _StoppedError
            sizes.add(table)
            yield table

    def _embedded(
        self, tables: Iterable[pa.Table], encoder: Encoder, journal: Journal
    ) -> Iterator[pa.Table]:
        from aesthetic_filter.clip.encoder import StoppedError
        from aesthetic_filter.embedding import embed_tables

        try:
            yield from embed_tables(tables, encoder, journal, keep_images=self.plan.keep_images)
        except StoppedError:
            raise _StoppedError from None

    def _apply(self, steps: Sequence[Step], tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        for table in tables:
            done = table
            for step in steps:
                if self.stop.is_set():
                    raise _StoppedError
                if isinstance(step, OwnStep):  # which need not be safe to call from many threads
                    with self._one_at_a_time:
                        done = step(done)
                else:
                    done = step(done)
            yield done


def _with_threads(step: Step, threads: int) -> Step:
    return replace(step, threads=threads) if isinstance(step, ScoreStep) else step


class _Sizes:
    """The bytes that were read for the rows of a shard, in the order of the rows."""

    def __init__(self) -> None:
        self._read: deque[tuple[int, int]] = deque()  # rows, bytes

    def add(self, table: pa.Table) -> None:
        self._read.append((table.num_rows, table.nbytes))

    def of(self, table: pa.Table) -> int:
        """About the bytes of the next rows, as many as the table has."""
        left, size = table.num_rows, 0
        while self._read and left >= self._read[0][0]:
            rows, read = self._read.popleft()
            left, size = left - rows, size + read
        if left and self._read:
            rows, read = self._read[0]
            self._read[0] = (rows - left, read - read * left // rows)
            size += read * left // rows
        return size
