"""The stages of a curation pipeline, under the names that curators know.

A stage is a plain object: it can be pickled, and is light until it is first used, so that weights
load on the worker that needs them. All that is asked of a stage is that it is called with a
``pyarrow.Table`` and gives one: ``ds.map_batches(stage, batch_format="pyarrow")`` takes it as it
is. A stage may also have:

- ``needs``, ``gives``: tuples of column names, by which :class:`Pipeline` checks that it fits.
- ``num_gpus_per_worker``: on Ray, the GPUs that each of its workers holds; a fraction shares one.
- ``setup()``: called once in each worker, before the first table.

Ours also take people's own objects: ``stage.process(batch)`` with an :class:`ImageBatch`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from aesthetic_filter.clip.options import ImageOptions
from aesthetic_filter.errors import ImageError, OutputError, PipelineError, UsageError
from aesthetic_filter.formats import Format, Shard, Wanted, find_format
from aesthetic_filter.heads import Head, load_head
from aesthetic_filter.images import ImageBatch, ImageObject, embedding_vectors
from aesthetic_filter.scoring import score_vectors
from aesthetic_filter.steps import drop_reason, is_threshold_verdict, live_rows, mark_dropped
from aesthetic_filter.storage import Source, list_source, read_address
from aesthetic_filter.table import (
    COSINE,
    DROPPED_BY,
    EMBEDDING,
    ERROR,
    IMAGE_ID,
    SCORE,
    column_vectors,
)

if TYPE_CHECKING:
    from aesthetic_filter.clip.encoder import Encoder

logger = logging.getLogger("aesthetic_filter")

DEFAULT_THRESHOLD = 0.5
"""NeMo Curator's default: on the heads' scale of 1 to 10 it keeps everything."""


@dataclass(frozen=True)
class Opened:
    """A source that has been listed.

    Attributes:
        source: its files.
        format: the format's name.
        reader: the format.
        shards: in order.
        wanted: which columns to read.
    """

    source: Source
    format: str
    reader: Format
    shards: list[Shard]
    wanted: Wanted


@dataclass
class ImageReaderStage:
    """A source of images, or of embeddings somebody already computed. The first stage.

    Iterating over it gives its rows as tables.

    Args:
        source: a folder, file, glob or URI of images, WebDataset tars, Parquet with images, or
            ``.npy`` or Parquet embeddings; or a scores folder made from images.
        format: the source's format; default: told from its file names.
        embedding_column: default: found by its type and usual names.
        image_column: likewise.
        id_column: default: found by its usual names.
        columns: which other columns to carry through; default: all.
    """

    source: str | Path
    format: str | None = None
    embedding_column: str | None = None
    image_column: str | None = None
    id_column: str | None = None
    columns: Sequence[str] | None = None

    @property
    def gives(self) -> tuple[str, ...]:
        """The columns, so far as names tell; ``image`` and ``embedding`` where they don't."""
        from aesthetic_filter.formats import formats

        known = formats()
        if self.format in known:
            return (IMAGE_ID, known[self.format].GIVES)
        ending = str(self.source).rstrip("/*}").rpartition(".")[2].lower()
        given = _GIVES.get(ending)
        return (IMAGE_ID, given) if given else (IMAGE_ID, "image", EMBEDDING)

    def open(self, less: Path | None = None) -> Opened:
        """List the source.

        Args:
            less: a folder whose files are left out: the one that is written to.

        Raises:
            SourceError: nothing to read, or not in a format known here.
        """
        listing = list_source(self.source)
        if less is not None:
            listing = listing.without(less)
        wished = self.format
        if wished is None and self.image_column is not None:
            wished = "parquet-images"
        name, reader = find_format(listing, wished)
        others = None if self.columns is None else tuple(self.columns)
        wanted = Wanted(self.embedding_column, self.id_column, others, self.image_column)
        return Opened(listing, name, reader, reader.shards(listing), wanted)

    def __iter__(self) -> Iterator[pa.Table]:
        opened = self.open()
        for shard in opened.shards:
            yield from opened.reader.read(opened.source, shard, opened.wanted)

    def __str__(self) -> str:
        return f"{type(self).__name__}({str(self.source)!r})"


_GIVES = {
    **dict.fromkeys(("tar", "tgz", "zst", "jpg", "jpeg", "png", "webp"), "image"),
    "npy": EMBEDDING,
}


@dataclass
class ImageEmbeddingStage:
    """Images to 768-d CLIP ViT-L/14 embeddings, float16, L2-normalised.

    An image comes from ``image`` (encoded bytes), ``image_data`` (pixels) or ``image_path``,
    whichever a row has first. A broken image costs only itself: its row gets an ``error``.

    Args:
        model_dir: where the encoder's weights are kept; default: the hub's own cache.
        num_gpus_per_worker: on Ray, the GPUs that each worker holds; default: 0.25 where the
            cluster has GPUs, none where it has not. Means nothing elsewhere.
        model_inference_batch_size: images embedded at once; default: what suits the device.
        verbose: log how many images were embedded, and each that was not.
        remove_image_data: drop ``image`` and ``image_data`` once they are embedded.
        name: what messages call the stage.
        options: how images are decoded and embedded.

    Nothing is loaded before the first image. The weights load once in a process, however many
    copies of the stage there are.
    """

    model_dir: str | Path | None = None
    num_gpus_per_worker: float | None = None
    model_inference_batch_size: int | None = None
    verbose: bool = False
    remove_image_data: bool = False
    name: str | None = None
    options: ImageOptions = field(default_factory=ImageOptions)

    needs = ("image",)
    gives = (EMBEDDING,)

    def __post_init__(self) -> None:
        _check_gpus(self, self.num_gpus_per_worker)
        _check_batch(self, self.model_inference_batch_size)
        if self.model_inference_batch_size is not None:
            self.options = replace(self.options, batch_size=self.model_inference_batch_size)

    def setup_on_node(self, *_: object) -> None:
        """Fetch the weights, if they are not there: once on each machine. Optional.

        Raises:
            DownloadError: the hub cannot be reached and the weights are not cached.
        """
        from aesthetic_filter.clip.weights import encoder_weights

        encoder_weights(self.options.weights, model_dir=self.model_dir)

    def setup(self, *_: object) -> None:
        """Load the weights. Optional: the first image does it.

        Raises:
            DownloadError: the weights are neither here nor to be had.
            MissingExtraError: torch or Pillow is not installed.
        """
        self.encoder.start()

    @property
    def encoder(self) -> Encoder:
        """The encoder, which all copies of the stage in this process share."""
        return _shared_encoder(self.options, self.model_dir)

    def close(self) -> None:
        """Let go of the weights' memory; the next image loads them again."""
        _close_encoder(self.options, self.model_dir)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Embed a table's images.

        Args:
            table: with ``image``, ``image_data`` or ``image_path``.

        Returns:
            The same rows with ``width``, ``height``, ``image_sha256``, ``embedding``
            (fixed_size_list<float16, 768>) and ``error``.
        """
        from aesthetic_filter.embedding import embed_tables

        made = embed_tables([table], self.encoder, keep_images=not self.remove_image_data)
        embedded = pa.concat_tables(made)
        if self.verbose:
            self._log(embedded)
        return embedded

    def process(self, batch: ImageBatch) -> ImageBatch:
        """Set ``embedding`` on each image of a batch, (768,) float16, or ``error``.

        ``image_data`` may be encoded bytes, or an (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) uint8
        array: grey, RGB or RGBA. Without it the file at ``image_path`` is read.

        Returns:
            The same batch: all images, in order.
        """
        from aesthetic_filter.formats import LARGEST_IMAGE

        futures: list[Any] = []
        for image in batch:
            image.error, image.embedding = None, None
            try:
                futures.append(self.encoder.submit(_content(image, LARGEST_IMAGE)))
            except ImageError as error:
                futures.append(None)
                image.error = str(error)
        for image, future in zip(batch, futures, strict=True):
            try:
                if future is not None:
                    image.embedding = future.result().vector
            except (ImageError, TypeError, ValueError) as error:
                image.error = str(error)
            if self.remove_image_data:
                image.image_data = None
        if self.verbose:
            failed = [image for image in batch if image.error is not None]
            for image in failed:
                logger.info("%s: not embedded: %s", image.image_id, image.error)
            logger.info("embedded %d of %d images", len(batch) - len(failed), len(batch))
        return batch

    def _log(self, table: pa.Table) -> None:
        reasons = table.column(ERROR)
        for name, why in zip(_names(table), reasons.to_pylist(), strict=True):
            if why is not None:
                logger.info("%s: not embedded: %s", name, why)
        logger.info("embedded %d of %d images", reasons.null_count, table.num_rows)


@dataclass
class ImageAestheticFilterStage:
    """Score embeddings with an aesthetic head, and keep what is ``>= score_threshold``.

    Args:
        model_dir: where a head from the hub is kept; the usual heads ship with the package.
        num_gpus_per_worker: on Ray, the GPUs that each worker holds. A score is one dot product,
            which a processor does as the data goes by: the default is none.
        model_inference_batch_size: rows scored at once; the scores are the same, bit for bit.
        score_threshold: rows with a lower score are dropped; equal is kept. None: only score. The
            default is NeMo Curator's, and keeps about everything: choose one from the summary.
        verbose: log each drop, and the totals.
        name: what messages call the stage.
        head: a head, or what :func:`load_head` takes; default: the reference head.
        keep_dropped: keep what is dropped or failed too, with ``dropped_by`` or ``error`` set.

    A missing embedding, or one with NaN or of another width, fails on its own, with an ``error``.
    Rows need not be normalised: that happens inside.
    """

    model_dir: str | Path | None = None
    num_gpus_per_worker: float = 0.0
    model_inference_batch_size: int | None = None
    score_threshold: float | None = DEFAULT_THRESHOLD
    verbose: bool = False
    name: str | None = None
    head: Head | str | Path | None = None
    keep_dropped: bool = False

    needs = (EMBEDDING,)
    gives = (SCORE,)

    def __post_init__(self) -> None:
        _check_gpus(self, self.num_gpus_per_worker)
        _check_batch(self, self.model_inference_batch_size)
        threshold = self.score_threshold
        if threshold is not None and not np.isfinite(threshold):
            raise UsageError(f"{type(self).__name__}: score_threshold is a number, not {threshold}")

    def setup_on_node(self, *_: object) -> None:
        """Fetch the head, if it comes from the hub: once on each machine. Optional."""
        self.setup()

    def setup(self, *_: object) -> None:
        """Load the head. Optional: the first table does it.

        Raises:
            HeadError: no such head.
            DownloadError: it is on a hub that cannot be reached.
        """
        self.loaded_head  # noqa: B018  (kept)

    @cached_property
    def loaded_head(self) -> Head:
        """The head itself."""
        if isinstance(self.head, Head):
            return self.head
        return load_head(self.head, model_dir=self.model_dir)

    def __getstate__(self) -> Mapping[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "loaded_head"}

    def __call__(self, table: pa.Table) -> pa.Table:
        """Score a table's embeddings and drop what is below the threshold.

        Args:
            table: with ``embedding``: lists of float16, float32 or float64.

        Returns:
            The kept rows, in order, with ``aesthetic_score`` (float32), ``error``,
            ``embedding_norm`` and ``reference_cosine``; with ``keep_dropped`` all rows, and
            ``dropped_by`` of those dropped.

        Raises:
            PipelineError: there is no column of embeddings.
        """
        if EMBEDDING not in table.column_names:
            raise PipelineError(
                f"{type(self).__name__}: there is no column {EMBEDDING!r}; there are: "
                f"{', '.join(table.column_names)}"
            )
        scored = self._score(table)
        marked = mark_dropped(scored, self.score_threshold)
        if self.verbose:
            self._log(marked)
        return marked if self.keep_dropped else scored.filter(live_rows(marked))

    def process(self, batch: ImageBatch) -> ImageBatch:
        """Set ``aesthetic_score`` on every image of a batch and keep what is good enough.

        Returns:
            A batch of the kept images, the same objects, in order. An image without a usable
            embedding has an ``error``, no score, and is not kept; with ``keep_dropped`` all are.
        """
        head = self.loaded_head
        vectors, errors = embedding_vectors(batch, head.width)
        errors |= {
            row: image.error
            for row, image in enumerate(batch)
            if image.error is not None and image.embedding is None
        }
        results = self._in_pieces(vectors, errors)
        for image, score, why in zip(
            batch, results[SCORE].to_pylist(), results[ERROR].to_pylist(), strict=True
        ):
            image.aesthetic_score, image.error = score, why
            below = self.score_threshold is not None and why is None
            drops = below and np.float32(score) < np.float32(self.score_threshold)
            if image.dropped_by is None or is_threshold_verdict(image.dropped_by):
                # What another stage dropped stays so; what a threshold did is judged again.
                image.dropped_by = drop_reason(self.score_threshold or 0.0) if drops else None
        kept = [i for i in batch if i.error is None and i.dropped_by is None]
        if self.verbose:
            self._log_all((i.image_id, i.aesthetic_score, i.error, i.dropped_by) for i in batch)
        return replace(batch, data=list(batch) if self.keep_dropped else kept)

    def _score(self, table: pa.Table) -> pa.Table:
        head = self.loaded_head
        column = table.column(EMBEDDING)
        vectors, errors = column_vectors(column, head.width)
        if vectors.shape[1] != head.width:  # a fixed-size list of another width
            why = f"embedding has {vectors.shape[1]} values, not {head.width}"
            errors = dict.fromkeys(range(len(vectors)), why) | errors
            vectors = np.zeros((len(vectors), head.width), np.float32)
        if ERROR in table.column_names:
            given = enumerate(table.column(ERROR).to_pylist())
            errors |= {row: why for row, why in given if why is not None}
        results = self._in_pieces(vectors.reshape(-1, head.width), errors)
        self._warn_if_foreign(results[COSINE])
        names = [name for name in table.column_names if name not in results]
        columns = {**{name: table.column(name) for name in names}, **results}
        return pa.table(columns, metadata=table.schema.metadata)

    def _in_pieces(
        self, vectors: np.ndarray[Any, Any], errors: Mapping[int, str]
    ) -> dict[str, pa.Array]:
        """The results, ``model_inference_batch_size`` rows at a time."""
        size = self.model_inference_batch_size or max(len(vectors), 1)
        pieces = []
        for start in range(0, max(len(vectors), 1), size):
            stop = start + size
            own = {row - start: why for row, why in errors.items() if start <= row < stop}
            pieces.append(score_vectors(vectors[start:stop], own, self.loaded_head))
        if len(pieces) == 1:
            return pieces[0]
        return {name: pa.concat_arrays([p[name] for p in pieces]) for name in pieces[0]}

    def _warn_if_foreign(self, cosines: pa.Array) -> None:
        values = cosines.to_numpy(zero_copy_only=False)
        self.loaded_head.warn_if_foreign(values)

    def _log(self, table: pa.Table) -> None:
        columns = [table.column(SCORE).to_pylist(), table.column(ERROR).to_pylist()]
        marked = DROPPED_BY in table.column_names
        dropped = table.column(DROPPED_BY).to_pylist() if marked else [None] * table.num_rows
        self._log_all(zip(_names(table), *columns, dropped, strict=True))

    def _log_all(self, rows: Any) -> None:
        kept = dropped = failed = 0
        for name, score, why, by in rows:
            if why is not None:
                failed += 1
                logger.info("%s: failed: %s", name, why)
            elif by is not None:
                dropped += 1
                scored = "none" if score is None else f"{score:.4f}"
                logger.info("%s: dropped: %s, %s %s", name, by, SCORE, scored)
            else:
                kept += 1
        logger.info("kept %d, dropped %d, failed %d", kept, dropped, failed)


@dataclass
class ImageWriterStage:
    """Where what is kept goes. The last stage.

    Args:
        output_dir: a folder; what an earlier selection left there is replaced whole.
        format: the images as "webdataset", "folder" or "parquet"; or the rows as "index"
            (Parquet), "csv", "jsonl" or "ids".
        shard_size: images in a tar or Parquet file.
        link: "hard" or "symlink": link the images into a folder instead of copying them.
        score_in: "json": also put the score into each sample's json.
        with_dropped: also write the rows of what was dropped, with the reason, and of what failed.

    Images are the source's own bytes: nothing is encoded again.
    """

    output_dir: str | Path
    format: str = "webdataset"
    shard_size: int = 10_000
    link: str | None = None
    score_in: str | None = None
    with_dropped: bool = False

    needs = (SCORE,)

    def __post_init__(self) -> None:
        from aesthetic_filter.formats import ImageOutput
        from aesthetic_filter.selection.engine import check_output

        try:
            check_output(self.format, ImageOutput(self.shard_size, self.link, self.score_in))
        except OutputError as error:
            raise PipelineError(f"{type(self).__name__}: {error}") from None

    def __str__(self) -> str:
        return f"{type(self).__name__}({str(self.output_dir)!r}, format={self.format!r})"


def _check_gpus(stage: object, gpus: float | None) -> None:
    if gpus is not None and (gpus < 0 or (gpus > 1 and gpus != int(gpus))):
        raise UsageError(
            f"{type(stage).__name__}: num_gpus_per_worker is a fraction of a GPU or a whole number "
            f"of them, not {gpus}"
        )


def _check_batch(stage: object, size: int | None) -> None:
    if size is not None and size < 1:
        raise UsageError(
            f"{type(stage).__name__}: model_inference_batch_size is 1 or more, not {size}"
        )


def _names(table: pa.Table) -> list[str]:
    if IMAGE_ID not in table.column_names:
        return [f"row {row}" for row in range(table.num_rows)]
    names: list[str] = table.column(IMAGE_ID).to_pylist()
    return names


def _content(image: ImageObject, largest: int) -> Any:
    """An image's bytes or pixels.

    Raises:
        ImageError: there are none.
    """
    from aesthetic_filter.embedding import NO_IMAGE

    if image.image_data is not None:
        return image.image_data
    if not image.image_path:
        raise ImageError(NO_IMAGE)
    return read_address(str(image.image_path), largest)


_encoders: dict[Any, Encoder] = {}
_encoders_lock = threading.Lock()


def _shared_encoder(options: ImageOptions, model_dir: str | Path | None) -> Encoder:
    from aesthetic_filter.clip.encoder import Encoder

    key = (options, str(model_dir) if model_dir is not None else None)
    with _encoders_lock:
        if key not in _encoders:
            _encoders[key] = Encoder(options, model_dir=model_dir)
            _encoders[key].on_note = logger.warning
        return _encoders[key]


def _close_encoder(options: ImageOptions, model_dir: str | Path | None) -> None:
    key = (options, str(model_dir) if model_dir is not None else None)
    with _encoders_lock:
        encoder = _encoders.pop(key, None)
    if encoder is not None:
        encoder.close()
