"""``score()`` and :class:`Pipeline`: from images or embeddings to scores, and to what is kept.

The whole flow on one screen: :func:`_measure` reads, embeds and scores, and leaves a folder of
scores; :meth:`Pipeline.run` then chooses from it, and writes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from aesthetic_filter.arrangement import (
    Arrangement,
    arrange,
    check_stage,
    describe_stage,
    stage_label,
)
from aesthetic_filter.backends import Plan, find_backend
from aesthetic_filter.clip.options import ImageOptions
from aesthetic_filter.errors import AestheticFilterError, OutputError, PipelineError
from aesthetic_filter.formats import EmbeddingFormat, Format, Shard
from aesthetic_filter.guard import check_source, foreign_source
from aesthetic_filter.heads import Head
from aesthetic_filter.progress import Progress, Recorder
from aesthetic_filter.result import Result
from aesthetic_filter.run_folder import (
    JOURNAL,
    Part,
    RunFolder,
    local_folder,
    open_run_folder,
    provenance,
    read_part,
    read_run_file,
)
from aesthetic_filter.selection.images import check_images
from aesthetic_filter.selection.output import check_folder
from aesthetic_filter.stages import (
    ImageAestheticFilterStage,
    ImageEmbeddingStage,
    ImageReaderStage,
    Opened,
)
from aesthetic_filter.storage import Source
from aesthetic_filter.table import EMBEDDING, IMAGE

if TYPE_CHECKING:
    from aesthetic_filter.scores import Scores

logger = logging.getLogger("aesthetic_filter")


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
    backend: str = "local",
    ray_address: str | None = None,
    num_gpus_per_worker: float | None = None,
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
        backend: "local", or "ray": on a Ray cluster.
        ray_address: the cluster's; default: ``RAY_ADDRESS``, else a Ray of our own.
        num_gpus_per_worker: on Ray, what each worker that embeds holds: see ImageEmbeddingStage.
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
        ClusterError: the Ray cluster cannot be reached.
    """
    reader = ImageReaderStage(
        os.fspath(source), format, embedding_column, image_column, id_column, columns
    )
    embedding = ImageEmbeddingStage(
        model_dir, num_gpus_per_worker=num_gpus_per_worker, options=images or ImageOptions()
    )
    scoring = ImageAestheticFilterStage(model_dir, score_threshold=None, head=head)
    stages = Arrangement(reader, (), embedding, (), scoring, (), None)
    scores, _ = _measure(
        stages,
        out,
        allow_foreign=allow_foreign,
        keep_going=keep_going,
        overwrite=overwrite,
        workers=workers,
        backend=backend,
        ray_address=ray_address,
        on_progress=on_progress,
    )
    return scores


class Pipeline:
    """Stages in a row: a reader, what is done with each table, and perhaps a writer.

    Args:
        stages: an :class:`ImageReaderStage` first; an :class:`ImageEmbeddingStage`, where the
            source has images; one :class:`ImageAestheticFilterStage`; an
            :class:`ImageWriterStage` last, if there is one. Between them any number of your own:
            picklable objects that are called with a ``pyarrow.Table`` and give one. They may add
            columns and leave rows out; ``needs`` and ``gives`` say which columns they are about.
        name: what the pipeline is called in :meth:`describe`.

    Raises:
        PipelineError: a stage needs what none before it gives.
    """

    def __init__(self, stages: Sequence[Any] = (), *, name: str = "pipeline") -> None:
        self.name = name
        self.stages: list[Any] = []
        for stage in stages:
            self.add_stage(stage)

    def add_stage(self, stage: Any) -> Pipeline:
        """Add a stage at the end; gives the pipeline itself.

        Raises:
            PipelineError: it does not fit there.
        """
        check_stage(self.stages, stage)
        self.stages.append(stage)
        return self

    def describe(self) -> str:
        """The stages with their resources, as text, one line each."""
        lines = [f"{self.name}: {len(self.stages)} stages"]
        rows = [(stage_label(stage), *describe_stage(stage)) for stage in self.stages]
        widths = [max((len(row[place]) for row in rows), default=0) for place in range(4)]
        for number, row in enumerate(rows, 1):
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append(f"  {number}  {'  '.join(cells)}".rstrip())
        return "\n".join(lines)

    def run(
        self,
        backend: str = "local",
        *,
        scores: str | os.PathLike[str] | None = None,
        ray_address: str | None = None,
        allow_foreign: bool = False,
        keep_going: bool = False,
        overwrite: bool = False,
        workers: int | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Result:
        """Run the stages over the whole source. Interrupted, the same again goes on.

        Args:
            backend: "local", or "ray": on a Ray cluster.
            scores: the folder where every row's score is kept, dropped ones' too; default: beside
                the writer's folder, as ``FOLDER-scores``; without a writer, a temporary one.
            ray_address: the cluster's; default: ``RAY_ADDRESS``, else a Ray of our own.
            allow_foreign: score vectors that do not look like the head's embedding space.
            keep_going: record a broken shard and go on.
            overwrite: remove the scores that another run left in ``scores``.
            workers: how many shards are worked on at once; default: what suits the backend.
            on_progress: called after every batch, from any thread.

        Raises:
            PipelineError: a stage is missing, or does not suit the source.
            AestheticFilterError: as :func:`score`, and the writer's.
        """
        stages = arrange(self.stages)
        started = time.monotonic()
        temporary = None
        if scores is None and stages.writer is not None:
            folder = local_folder(stages.writer.output_dir)
            scores = folder.with_name(f"{folder.name}-scores")
        elif scores is None:
            temporary = tempfile.mkdtemp(prefix="aesthetic-filter-")
            scores = Path(temporary) / "scores"
        try:
            measured, progress = _measure(
                stages,
                scores,
                allow_foreign=allow_foreign,
                keep_going=keep_going,
                overwrite=overwrite,
                workers=workers,
                backend=backend,
                ray_address=ray_address,
                on_progress=on_progress,
                strict=True,
            )
        except BaseException:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        if temporary is not None:
            measured.delete_when_done(temporary)
        threshold = stages.scoring.score_threshold
        inside = threshold is None or stages.drops_inside
        selection = measured.everything() if inside else measured.select(min_score=threshold)
        written = None
        if stages.writer is not None:
            writer = stages.writer
            written = selection.write(
                writer.output_dir,
                as_=writer.format,
                with_dropped=writer.with_dropped,
                shard_size=writer.shard_size,
                link=writer.link,
                score_in=writer.score_in,
            )
        seconds = time.monotonic() - started
        kept = temporary is None
        result = Result(measured, selection, threshold, written, progress, backend, seconds, kept)
        if stages.scoring.verbose:
            result.log()
        if result.warning:
            logger.warning("%s: result.summary() shows what others would keep", result.warning)
        return result


def _measure(
    stages: Arrangement,
    out: str | os.PathLike[str],
    *,
    allow_foreign: bool,
    keep_going: bool,
    overwrite: bool,
    workers: int | None,
    backend: str,
    ray_address: str | None,
    on_progress: Callable[[Progress], None] | None,
    strict: bool = False,
) -> tuple[Scores, Progress]:
    """Read, embed, score: from a source to a folder of scores."""
    from aesthetic_filter.scores import open_scores

    folder = local_folder(out)
    engine = find_backend(backend, workers=workers, ray_address=ray_address)
    head = stages.scoring.loaded_head
    opened = stages.reader.open(less=folder)
    embedding = _embedding_for(stages, opened, folder, strict=strict)
    with engine:
        made_from: dict[str, Any] = getattr(opened.reader, "made_from", _nothing)(opened.source)
        if opened.reader.GIVES == IMAGE:
            columns = opened.wanted.describe()
            where = {"source": opened.source.uri, "format": opened.format, "columns": columns}
            made_from = {"images": where, **(engine.describe(embedding) if embedding else {})}
        if stages.writer is not None:  # rather before hours of scoring than after
            check_images("images" in made_from, stages.writer.format)
            check_folder(local_folder(stages.writer.output_dir), apart_from=folder)
        # The published encoder's own embeddings are what they are, however odd the pictures.
        allow_foreign = allow_foreign or made_from.get("encoder", {}).get("published", False)
        if opened.reader.GIVES == EMBEDDING:
            embeddings = cast(EmbeddingFormat, opened.reader)
            listed = (opened.source, opened.shards, opened.wanted)
            check_source(head, embeddings, *listed, allow_foreign=allow_foreign)
        columns = opened.wanted.describe()
        own = stages.identity()
        identity = provenance(head, opened.source.uri, opened.format, columns, made_from, own)
        with open_run_folder(folder, identity, overwrite=overwrite) as run:
            done, todo = _what_is_left(run, opened.reader, opened.shards)
            progress = Progress(
                len(opened.shards), len(done), len(done), {}, sum(s.size for s in todo)
            )
            recorder = Recorder(progress, on_progress)
            run.write_run_file("running")
            before, after = stages.steps(keep_embeddings=opened.reader.GIVES == IMAGE)
            images = stages.wants_images
            plan = Plan(run, opened, before, embedding, after, head, images, recorder, keep_going)
            try:
                done += engine.run(plan, todo)
                facts = _facts(plan, done, allow_foreign=allow_foreign)
            except BaseException as error:
                with contextlib.suppress(AestheticFilterError):
                    run.write_run_file("incomplete", error=str(error) or type(error).__name__)
                raise
            run.write_run_file("incomplete" if progress.broken else "complete", **facts)
    return open_scores(folder), progress


def _embedding_for(
    stages: Arrangement, opened: Opened, folder: Path, *, strict: bool
) -> ImageEmbeddingStage | None:
    """The embedding stage, as precise as the run it goes on with; None if there is nothing for it.

    Raises:
        PipelineError: (strict) it does not suit the source.
    """
    embedding, uri = stages.embedding, opened.source.uri
    if opened.reader.GIVES == EMBEDDING:
        if embedding is not None and strict:
            raise PipelineError(
                f"{uri}: has embeddings ({opened.format}), and ImageEmbeddingStage needs images; "
                "leave it out"
            )
        return None
    if embedding is None:
        if not stages.gives_embeddings:
            raise PipelineError(
                f"{uri}: has images ({opened.format}), and ImageAestheticFilterStage needs "
                "embeddings: put an ImageEmbeddingStage before it"
            )
        return None
    so_far = (read_run_file(folder) or {}).get("encoder", {}).get("precision")
    if so_far is None or embedding.options.precision != "auto":
        return embedding
    return replace(embedding, options=replace(embedding.options, precision=so_far))


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


def _facts(plan: Plan, done: list[Part], *, allow_foreign: bool) -> dict[str, Any]:
    """What the run came to, once every shard has been tried.

    Raises:
        AestheticFilterError: no shard could be read.
        ForeignEmbeddingsError: most rows are foreign after all.
    """
    progress, source = plan.recorder.progress, plan.opened.source
    if not done:
        name, why = min(progress.broken.items())
        raise AestheticFilterError(
            f"{source.uri}: none of its {progress.shards:,} shards can be read; {name}: {why}"
        )
    counts = {key: sum(p.counts[key] for p in done) for key in ("rows", "failed", "foreign")}
    scored = counts["rows"] - counts["failed"]
    if counts["foreign"] * 2 > scored and not allow_foreign:
        raise foreign_source(source, plan.head, counts["foreign"], scored)
    progress.broken |= {part.shard: part.cut for part in done if part.cut}
    plan.recorder.report()  # also where nothing was left to do
    broken = [{"shard": name, "error": why} for name, why in sorted(progress.broken.items())]
    return {"shards": progress.shards, "broken_shards": broken, "scored": scored, **counts}


def _nothing(_: Source) -> dict[str, Any]:
    return {}
