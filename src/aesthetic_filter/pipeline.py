"""``score()``: from images or embeddings to a folder of scores. The whole flow on one screen."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa

from aesthetic_filter import kernels
from aesthetic_filter.clip.options import ImageOptions
from aesthetic_filter.errors import (
    AestheticFilterError,
    OutputError,
    ShardError,
    SourceError,
    WrongEmbeddingsError,
)
from aesthetic_filter.formats import EmbeddingFormat, Format, Shard, Wanted, find_format
from aesthetic_filter.guard import check_source, check_space, foreign_source
from aesthetic_filter.heads import Head, load_head
from aesthetic_filter.heads.head import wrong_width
from aesthetic_filter.prefetch import prefetch
from aesthetic_filter.run_folder import (
    JOURNAL,
    Part,
    RunFolder,
    local_folder,
    open_run_folder,
    provenance,
    read_part,
    read_run_file,
    unwritable,
)
from aesthetic_filter.storage import Source, list_source
from aesthetic_filter.table import (
    COSINE,
    EMBEDDING,
    ERROR,
    IMAGE_ID,
    NORM,
    SCORE,
    column_vectors,
)

if TYPE_CHECKING:
    from aesthetic_filter.clip.encoder import Encoder
    from aesthetic_filter.scores import Scores


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


def score(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    head: Head | str | Path | None = None,
    model_dir: str | Path | None = None,
    format: str | None = None,
    embedding_column: str | None = None,
    image_column: str | None = None,
    id_column: str | None = None,
    columns: Sequence[str] | None = None,
    images: ImageOptions | None = None,
    allow_foreign: bool = False,
    keep_going: bool = False,
    overwrite: bool = False,
    workers: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Scores:
    """Score every image, or every embedding, of a source; one output part for each of its shards.

    Interrupted at any moment, the same call again goes on where it stopped; no image is embedded
    twice. The embeddings of images stay in the parts, so a folder of scores is a source too:
    scoring it with another head embeds nothing.

    Args:
        source: a folder, file, glob or URI of images, WebDataset tars, Parquet with images, or
            ``.npy`` or Parquet embeddings; or a scores folder made from images.
        out: the scores folder, on this machine.
        head: a head, or what :func:`load_head` takes; default: the reference head.
        model_dir: where weights from the hub are kept; default: the hub's own cache.
        format: the source's format; default: told from its file names.
        embedding_column: default: found by its type and usual names.
        image_column: likewise.
        id_column: default: found by its usual names.
        columns: which other columns to carry through; default: all.
        images: how images are decoded and embedded.
        allow_foreign: score vectors that do not look like the head's embedding space.
        keep_going: record a broken shard and go on.
        overwrite: remove the scores that another run left in ``out``.
        workers: how many shards are worked on at once; default: the processors, for images 2.
        on_progress: called after every batch, from any thread.

    Returns:
        The scores, open.

    Raises:
        SourceError: nothing to read, or not in a format known here.
        OutputError: ``out`` holds something else, is in use, or cannot be written.
        WrongEmbeddingsError: the vectors are not what the head was trained on.
        DownloadError: images, and the encoder's weights are neither here nor to be had.
        MissingExtraError: something that is not installed is needed.
        ShardError: a shard is broken and ``keep_going`` is not set; finished parts stay.
    """
    from aesthetic_filter.scores import open_scores

    folder = local_folder(out)
    head = head if isinstance(head, Head) else load_head(head, model_dir=model_dir)
    listing = list_source(source).without(folder)
    if format is None and image_column is not None:
        format = "parquet-images"
    format_name, reader = find_format(listing, format)
    shards = reader.shards(listing)
    others = None if columns is None else tuple(columns)
    wanted = Wanted(embedding_column, id_column, others, image_column)
    encoder = _encoder(images, model_dir, folder) if reader.GIVES == "image" else None
    made_from = _made_from(reader, listing, encoder, format_name, wanted)
    # The published encoder's own embeddings are what they are, however odd the pictures.
    allow_foreign = allow_foreign or made_from.get("encoder", {}).get("published", False)
    if encoder is None:
        embeddings = cast(EmbeddingFormat, reader)
        check_source(head, embeddings, listing, shards, wanted, allow_foreign=allow_foreign)

    identity = provenance(head, listing.uri, format_name, wanted.describe(), made_from)
    with (
        encoder or contextlib.nullcontext(),
        open_run_folder(folder, identity, overwrite=overwrite) as run,
    ):
        done, todo = _what_is_left(run, reader, shards)
        progress = Progress(len(shards), len(done), len(done), {}, sum(s.size for s in todo))
        run.write_run_file("running")
        job = _Job(run, reader, listing, head, wanted, progress, on_progress or _ignore, encoder)
        try:
            done += _run_all(job, todo, workers or _workers(reader), keep_going)
            facts = _facts(job, done, allow_foreign=allow_foreign)
        except BaseException as error:
            with contextlib.suppress(AestheticFilterError):
                run.write_run_file("incomplete", error=str(error) or type(error).__name__)
            raise
        run.write_run_file("incomplete" if progress.broken else "complete", **facts)
    return open_scores(folder)


def score_table(table: pa.Table, head: Head, *, threads: int | None = None) -> tuple[pa.Table, int]:
    """Score one batch.

    Args:
        table: ``image_id``, ``embedding`` and any other columns; where a row has an ``error``, that
            is why it has no embedding.
        head: the head.
        threads: how many may share the rows.

    Returns:
        The table with ``aesthetic_score``, ``error``, ``embedding_norm`` and ``reference_cosine``
        instead of ``embedding``, and how many of its rows look foreign. A failed row has an
        error and nulls.

    Raises:
        WidthError: the vectors have another width than the head's.
    """
    vectors, problems = column_vectors(table.column(EMBEDDING), head.width)
    errors = _given_errors(table)
    errors = {**problems, **errors}
    if vectors.shape[1] != head.width and table.num_rows:
        raise wrong_width(vectors.shape[1], head)
    vectors = vectors.reshape(-1, head.width)
    measured = head.measure(vectors, threads=threads)
    for row in np.flatnonzero(measured.failed).tolist():
        errors.setdefault(row, measured.error(row) or "")
    failed: Any = None
    reasons: Any = pa.nulls(table.num_rows, pa.string())
    if errors:
        failed = np.zeros(table.num_rows, np.bool_)
        failed[list(errors)] = True
        reasons = pa.array([errors.get(row) for row in range(table.num_rows)], pa.string())
    results = {
        SCORE: pa.array(measured.scores, mask=failed),
        ERROR: reasons,
        NORM: pa.array(measured.norms, mask=failed),
        COSINE: pa.array(measured.cosines, mask=failed),
    }
    kept = [name for name in table.column_names if name not in (IMAGE_ID, EMBEDDING, ERROR)]
    carried = {name: table.column(name) for name in kept}
    scored = pa.table({IMAGE_ID: table.column(IMAGE_ID), **results, **carried})
    return scored, int(np.count_nonzero(head.foreign(measured.cosines)))


def _given_errors(table: pa.Table) -> dict[int, str]:
    """Row to reason, for the rows that came with one."""
    if ERROR not in table.column_names:
        return {}
    column = table.column(ERROR)
    if column.null_count == len(column):
        return {}
    return {row: why for row, why in enumerate(column.to_pylist()) if why is not None}


def _encoder(images: ImageOptions | None, model_dir: str | Path | None, folder: Path) -> Encoder:
    """The encoder for a run: as precise as the one it goes on with, unless that was said."""
    from aesthetic_filter.clip.encoder import Encoder

    so_far = (read_run_file(folder) or {}).get("encoder", {})
    return Encoder(images, model_dir=model_dir, precision=so_far.get("precision"))


def _made_from(
    reader: Format, listing: Source, encoder: Encoder | None, format_name: str, wanted: Wanted
) -> dict[str, Any]:
    """Where the images are that the scores begin with, and how they were embedded, if known."""
    if encoder is None:
        known: dict[str, Any] = getattr(reader, "made_from", _nothing)(listing)
        return known
    where = {"source": listing.uri, "format": format_name, "columns": wanted.describe()}
    return {"images": where, **encoder.describe()}


def _facts(job: _Job, done: list[Part], *, allow_foreign: bool) -> dict[str, Any]:
    """What the run came to, once every shard has been tried.

    Raises:
        AestheticFilterError: no shard could be read.
        ForeignEmbeddingsError: most rows are foreign after all.
    """
    progress, uri = job.progress, job.source.uri
    if not done:
        name, why = min(progress.broken.items())
        raise AestheticFilterError(
            f"{uri}: none of its {progress.shards:,} shards can be read; {name}: {why}"
        )
    counts = {key: sum(p.counts[key] for p in done) for key in ("rows", "failed", "foreign")}
    scored = counts["rows"] - counts["failed"]
    if counts["foreign"] * 2 > scored and not allow_foreign:
        raise foreign_source(job.source, job.head, counts["foreign"], scored)
    progress.broken |= {part.shard: part.cut for part in done if part.cut}
    with job.lock:  # also where nothing was left to do
        job.report(progress)
    broken = [{"shard": name, "error": why} for name, why in sorted(progress.broken.items())]
    return {"shards": progress.shards, "broken_shards": broken, "scored": scored, **counts}


def _workers(reader: Format) -> int:
    """Shards worked on at once; of images two, so that the end of one idles no device."""
    return 2 if reader.GIVES == "image" else kernels.default_threads()


def _nothing(_: Source) -> dict[str, Any]:
    return {}


@dataclass
class _Job:
    """What the workers share."""

    run: RunFolder
    reader: Format
    source: Source
    head: Head
    wanted: Wanted
    progress: Progress
    report: Callable[[Progress], None]
    encoder: Encoder | None = None
    threads: int = 1

    def __post_init__(self) -> None:
        if self.encoder:
            self.encoder.on_note = self.note
        self.stop = threading.Event()
        self.lock = threading.Lock()
        self.under_way: dict[str, int] = {}  # shard name to bytes read of it, about
        self.bytes_done = 0

    def score_shard(self, shard: Shard) -> Part:
        try:
            if self.encoder:
                return self._score_images(shard, self.encoder)
            tables = self._tables(shard)
            scored = (self._score(shard, table, table.nbytes) for table in tables)
            return self.run.write_part(shard.name, shard.version, scored)
        except WrongEmbeddingsError as error:
            raise type(error)(f"{shard.name}: {error}") from None

    def _score_images(self, shard: Shard, encoder: Encoder) -> Part:
        from aesthetic_filter.clip.encoder import StoppedError
        from aesthetic_filter.embedding import embed_tables

        journal = self.run.journal(shard.name)
        try:
            tables = embed_tables(self._tables(shard), encoder, journal)
            scored = (self._score(shard, table, read) for table, read in tables)
            part = self.run.write_part(shard.name, shard.version, scored)
        except StoppedError:
            raise _StoppedError from None
        finally:
            journal.close()
        journal.remove()
        return part

    def _tables(self, shard: Shard) -> Iterator[pa.Table]:
        tables = self.reader.read(self.source, shard, self.wanted)
        for table in tables if self.source.is_local else prefetch(tables):
            if self.stop.is_set():
                raise _StoppedError
            yield table

    def _score(self, shard: Shard, table: pa.Table, read: int) -> tuple[pa.Table, int]:
        if self.stop.is_set():
            raise _StoppedError
        check_space(self.head, table, shard.name)
        scored, foreign = score_table(table, self.head, threads=self.threads)
        if self.encoder:  # what was costly stays
            scored = scored.append_column(EMBEDDING, table.column(EMBEDDING))
        with self.lock:
            # A compressed shard gives more bytes than it has: it counts as whole when it is.
            read += self.under_way.get(shard.name, 0)
            self.under_way[shard.name] = min(read, shard.size)
            self.progress.rows += scored.num_rows
            self.progress.failed += scored.column(SCORE).null_count
            if self.encoder:
                self.progress.embedded += len(table) - table.column(EMBEDDING).null_count
            self._report()
        return scored, foreign

    def note(self, line: str) -> None:
        with self.lock:
            self.progress.notes.append(line)
            self._report()

    def shard_done(self, shard: Shard) -> None:
        with self.lock:
            self.under_way.pop(shard.name, None)
            self.bytes_done += shard.size
            self._report()

    def _report(self) -> None:
        self.progress.bytes = self.bytes_done + sum(self.under_way.values())
        self.report(self.progress)


class _StoppedError(Exception):
    """Raised in a worker to give up its shard because the run is ending."""


def _run_all(job: _Job, shards: list[Shard], workers: int, keep_going: bool) -> list[Part]:
    """Score the shards, several at a time; the first failure ends the run unless ``keep_going``."""
    parts = []
    waiting: dict[Future[Part], Shard] = {}
    workers = max(1, min(workers, len(shards)))
    job.threads = max(1, kernels.default_threads() // workers)
    left = iter(shards)
    with ThreadPoolExecutor(workers, thread_name_prefix="aesthetic-filter-shard") as pool:
        try:
            waiting = {pool.submit(job.score_shard, s): s for s in islice(left, 2 * workers)}
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    shard = waiting.pop(future)
                    part = _result(job, shard, future, keep_going)
                    if part is not None:
                        parts.append(part)
                        job.progress.finished += 1
                    job.shard_done(shard)
                    waiting |= {pool.submit(job.score_shard, s): s for s in islice(left, 1)}
        finally:
            job.stop.set()
            if job.encoder:
                job.encoder.close()
            pool.shutdown(wait=True, cancel_futures=True)
            # Interrupted: some may have been finished while the others were given up.
            whole = [f for f in waiting if not f.cancelled() and f.exception() is None]
            job.progress.finished += len(whole)
    return parts


def _result(job: _Job, shard: Shard, future: Future[Part], keep_going: bool) -> Part | None:
    """A shard's part; None where the shard is broken and that is put up with."""
    try:
        return future.result()
    except (ShardError, SourceError, WrongEmbeddingsError) as error:
        if not keep_going:
            raise
        job.progress.broken[shard.name] = getattr(error, "reason", str(error))
        job.run.part_path(shard.name).unlink(missing_ok=True)  # of what the shard was before
        return None
    except OSError as error:
        raise unwritable(job.run.path, error) from None


def _what_is_left(
    run: RunFolder, reader: Format, shards: list[Shard]
) -> tuple[list[Part], list[Shard]]:
    """The parts that are finished, and the shards that are not."""
    done, todo = [], []
    for shard in shards:
        part = run.finished(shard.name, shard.version)
        if part is None:
            todo.append(shard)
        else:
            done.append(part)
    names = {shard.name for shard in shards}
    paths = run.parts()
    parts = map(read_part, paths) if len(paths) > len(done) else ()
    gone = [part for part in parts if part and part.shard not in names]
    if getattr(reader, "NUMBERED", False):  # the listing may have become shorter
        for part in gone:
            part.path.unlink()
        for path in run.path.glob(f"*{JOURNAL}"):
            if path.name.removesuffix(JOURNAL) not in names:
                path.unlink()
    elif gone:
        raise OutputError(
            f"{run.path}: holds scores of {len(gone)} shard(s) that the source no longer has "
            f"({gone[0].shard}…). Give another --out, or --overwrite to begin again"
        )
    return done, todo


def _ignore(_: Progress) -> None:
    pass
