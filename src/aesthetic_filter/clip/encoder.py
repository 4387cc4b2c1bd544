"""Images to embeddings: decoded in threads, embedded in batches on one or several devices.

An :class:`Encoder` takes one image at a time from any thread and gives a future. Whoever reads
ahead therefore keeps the devices busy, whatever shard the images belong to; a batch is whatever has
been decoded by the time a device is free. It knows nothing of tables, shards or scores.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aesthetic_filter.clip.options import ImageOptions
from aesthetic_filter.errors import AestheticFilterError, UsageError

if TYPE_CHECKING:
    import torch

    from aesthetic_filter.clip.preprocess import Pixels, Preprocessing
    from aesthetic_filter.clip.tower import Tower
    from aesthetic_filter.clip.weights import Weights

GPU_BATCH = 256
"""Images in a batch on a GPU: 40,000 rows in each product, enough to fill the largest."""


@dataclass(frozen=True)
class Embedded:
    """An image's embedding.

    Attributes:
        vector: (768,) float16, L2-normalised before it was rounded.
        width: of the image as displayed, in pixels.
        height: likewise.
        sha256: of the encoded bytes, in hex; "" where there were none (an array, say).
    """

    vector: NDArray[np.float16]
    width: int
    height: int
    sha256: str


@dataclass(frozen=True)
class Decoded:
    """An image that was decoded elsewhere.

    Attributes:
        pixels: what the encoder sees of it.
        sha256: of the encoded bytes, in hex; "" where there were none.
    """

    pixels: Pixels
    sha256: str


class Encoder:
    """CLIP ViT-L/14 behind a queue. Nothing is loaded before the first image.

    Args:
        options: device, precision and the rest.
        model_dir: where the weights are kept; default: the hub's own cache.
        precision: what "auto" stands for, where an earlier run has decided that.
        quiet: no progress bar while the weights are fetched.

    Attributes:
        weights: which weights, and where they lie.
        on_note: called with a line that a person should read, from any thread.

    Raises:
        DownloadError: the weights are not here and cannot be fetched.
        UsageError: there is no such device or precision.
        MissingExtraError: torch or Pillow is not installed.
    """

    def __init__(
        self,
        options: ImageOptions | None = None,
        *,
        model_dir: str | Path | None = None,
        precision: str | None = None,
        quiet: bool = False,
    ) -> None:
        from aesthetic_filter.clip.tower import DTYPES, choose_precision, resolve_device
        from aesthetic_filter.clip.weights import encoder_weights

        self.options = options = options or ImageOptions()
        self.preprocessing = preprocessing_for(options)
        if options.precision not in ("auto", *DTYPES):
            known = ", ".join(("auto", *DTYPES))
            raise UsageError(f"there is no precision {options.precision!r}; there are: {known}")
        self.devices: list[torch.device] = resolve_device(options.device)
        self.weights: Weights = encoder_weights(options.weights, model_dir=model_dir, quiet=quiet)
        self.precision: str = options.precision
        if self.precision == "auto":
            self.precision = precision or choose_precision(self.devices[0])
        self.on_note: Callable[[str], None] = lambda _: None
        self._queue = _Queue()
        self._stopped = threading.Event()
        self._starting = threading.Lock()
        self._threads: list[threading.Thread] = []

    def describe(self) -> dict[str, Any]:
        """What an embedding depends on, as plain data: encoder and preprocessing."""
        return {
            "encoder": {
                "name": self.weights.name,
                "revision": self.weights.revision,
                "sha256": self.weights.sha256,
                "precision": self.precision,
                "published": self.weights.published,
            },
            "preprocessing": vars(self.preprocessing),
        }

    @property
    def batch_size(self) -> int:
        """Images in a batch, unless memory runs out."""
        from aesthetic_filter.clip.tower import CPU_BATCH

        default = CPU_BATCH if self.devices[0].type == "cpu" else GPU_BATCH
        return self.options.batch_size or default

    @property
    def lookahead(self) -> int:
        """Images that should be on their way: the batches under way, and the next to be decoded."""
        return 2 * len(self.devices) * self.batch_size + 16

    def submit(
        self, image: Any, known: Callable[[str], Embedded | None] | None = None
    ) -> Future[Embedded]:
        """Embed an image, sooner or later.

        Args:
            image: encoded bytes, a path, a PIL image or an array, as ``preprocess`` takes them; or
                one that was decoded elsewhere.
            known: asked with the sha256 of encoded bytes; what it gives is the answer, and the
                image is not decoded.

        Returns:
            A future; it raises :class:`ImageError` where the image cannot be decoded.
        """
        self._start()
        future: Future[Embedded] = Future()
        if isinstance(image, Decoded):
            self._queue.put(_Job(image.pixels, image.sha256, future))
            return future
        try:
            task = self._decoders.submit(self._decode, image, known, future)
        except RuntimeError:  # closed since
            raise StoppedError from None

        def given_up(task: Future[None]) -> None:
            if task.cancelled():  # before its turn came: nobody else would ever tell
                future.set_exception(StoppedError())

        task.add_done_callback(given_up)
        return future

    def start(self) -> None:
        """Load the weights now, rather than with the first image."""
        self._start()

    def close(self) -> None:
        """Stop at once: what has not been embedded is given up."""
        with self._starting:
            self._stopped.set()
            if self._threads:
                self._decoders.shutdown(wait=True, cancel_futures=True)
                self._queue.close()
                for thread in self._threads:
                    thread.join()
                self._threads = []

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @cached_property
    def _decoders(self) -> ThreadPoolExecutor:
        from aesthetic_filter.kernels import default_threads

        threads = self.options.threads or default_threads()
        return ThreadPoolExecutor(threads, thread_name_prefix="aesthetic-filter-decode")

    def _start(self) -> None:
        if self._threads and not self._stopped.is_set():
            return
        with self._starting:
            if self._stopped.is_set():
                raise StoppedError
            if self._threads:
                return
            from aesthetic_filter.clip.tower import load_tower

            towers = [
                load_tower(self.weights.path, device=device, precision=self.precision)
                for device in self.devices
            ]
            self._threads = [
                threading.Thread(
                    target=_Server(tower, self).run,
                    name=f"aesthetic-filter-{tower.device}",
                    daemon=True,
                )
                for tower in towers
            ]
            for thread in self._threads:
                thread.start()

    def _decode(
        self,
        image: Any,
        known: Callable[[str], Embedded | None] | None,
        future: Future[Embedded],
    ) -> None:
        from aesthetic_filter.clip.preprocess import preprocess

        try:
            digest = ""
            if isinstance(image, bytes | bytearray | memoryview):
                digest = hashlib.sha256(image).hexdigest()
                found = known(digest) if known else None
                if found is not None:
                    future.set_result(found)
                    return
            self._queue.put(_Job(preprocess(image, self.preprocessing), digest, future))
        except BaseException as error:  # whatever it is, it belongs to whoever asked
            future.set_exception(error)


def preprocessing_for(options: ImageOptions) -> Preprocessing:
    """How images are decoded, of all the options."""
    from aesthetic_filter.clip.preprocess import Preprocessing

    chosen = {"max_pixels": options.max_pixels} if options.max_pixels is not None else {}
    return Preprocessing(
        decode=options.decode,
        exif=options.exif,
        allow_truncated=options.allow_truncated,
        **chosen,
    )


class StoppedError(Exception):
    """The encoder was closed before it came to the image."""


@dataclass(frozen=True)
class _Job:
    """A decoded image on its way through a device."""

    pixels: Pixels
    sha256: str
    future: Future[Embedded]

    def done(self, vector: NDArray[np.float32]) -> None:
        half = vector.astype(np.float16)
        self.future.set_result(Embedded(half, self.pixels.width, self.pixels.height, self.sha256))


class _Queue:
    """Decoded images that wait for a device. Its length is bounded by who submits."""

    def __init__(self) -> None:
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, job: _Job) -> None:
        with self._changed:
            if self._closed:
                job.future.set_exception(StoppedError())
                return
            self._jobs.append(job)
            self._changed.notify()

    def take(self, most: int, *, wait: bool) -> list[_Job]:
        """Up to ``most`` images; none at the end, or if there are none and ``wait`` is not set."""
        with self._changed:
            while wait and not self._jobs and not self._closed:
                self._changed.wait()
            return [self._jobs.popleft() for _ in range(min(most, len(self._jobs)))]

    def close(self) -> None:
        with self._changed:
            self._closed = True
            left, self._jobs = list(self._jobs), deque()
            self._changed.notify_all()
        for job in left:
            job.future.set_exception(StoppedError())


@dataclass(frozen=True)
class _Launched:
    """A batch under way on a device."""

    jobs: list[_Job]
    vectors: torch.Tensor  # on the processor, complete once `ready` says so
    ready: Any  # a CUDA event, or None

    def deliver(self) -> None:
        if self.ready is not None:
            self.ready.synchronize()
        for job, vector in zip(self.jobs, self.vectors.numpy(), strict=True):
            job.done(vector)


class _Server:
    """One device: takes what is decoded, a batch at a time, one batch ahead on a GPU."""

    def __init__(self, tower: Tower, encoder: Encoder) -> None:
        self._tower = tower
        self._encoder = encoder
        self._batch = encoder.batch_size
        self._asynchronous = tower.device.type == "cuda"
        self._staging: deque[torch.Tensor] = deque()

    def run(self) -> None:
        from aesthetic_filter.clip.tower import Stopped

        under_way: _Launched | None = None
        queue = self._encoder._queue
        while True:
            jobs = queue.take(self._batch, wait=under_way is None)
            if not jobs and under_way is None:
                return
            try:
                launched = self._launch(jobs) if jobs else None
            except Stopped:
                for job in jobs:
                    job.future.set_exception(StoppedError())
                launched = None
            except BaseException as error:
                for job in jobs:
                    job.future.set_exception(error)
                launched = None
            if under_way is not None:
                self._deliver(under_way)
            under_way = launched
            if under_way is not None and not self._asynchronous:
                self._deliver(under_way)
                under_way = None

    def _deliver(self, launched: _Launched) -> None:
        try:
            launched.deliver()
        except BaseException as error:  # a device reports late what went wrong early
            for job in launched.jobs:
                if not job.future.done():
                    job.future.set_exception(error)

    def _launch(self, jobs: list[_Job]) -> _Launched:
        """Begin to embed a batch; in halves, from here on, where memory runs out."""
        import torch

        done: list[torch.Tensor] = []
        left = jobs
        while left:
            now = left[: self._batch]
            try:
                done.append(self._embed(now))
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or len(now) == 1:
                    raise _explained(error, self._tower) from error
                self._batch = max(1, len(now) // 2)
                if self._asynchronous:
                    torch.cuda.empty_cache()
                self._encoder.on_note(
                    f"{self._tower.device}: out of memory with {len(now)} images at once; "
                    f"going on with {self._batch}"
                )
                continue
            left = left[len(now) :]
        ready = None
        if self._asynchronous:
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self._tower.device))
        if len(done) > 1 and ready is not None:
            ready.synchronize()
        return _Launched(jobs, done[0] if len(done) == 1 else torch.cat(done), ready)

    def _embed(self, jobs: list[_Job]) -> torch.Tensor:
        import torch

        shape = (len(jobs), *jobs[0].pixels.values.shape)
        staged = self._asynchronous
        pixels = self._stage(shape) if staged else torch.empty(shape, dtype=torch.uint8)
        together = pixels.numpy()
        for place, job in enumerate(jobs):
            together[place] = job.pixels.values
        with torch.inference_mode():
            moved = pixels.to(self._tower.device, non_blocking=True)
            vectors = self._tower(moved, should_stop=self._encoder._stopped.is_set)
            if not self._asynchronous:
                return vectors.cpu()
            home = torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=True)
            return home.copy_(vectors, non_blocking=True)

    def _stage(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Page-locked memory to copy from; three in turn, as two batches may be under way."""
        import torch

        if len(self._staging) < 3:
            size = (self._encoder.batch_size, *shape[1:])
            self._staging.append(torch.empty(size, dtype=torch.uint8, pin_memory=True))
        self._staging.rotate()
        return self._staging[0][: shape[0]]


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the machine, has no memory left."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return "out of memory" in text or "can't allocate memory" in text


def _explained(error: BaseException, tower: Tower) -> BaseException:
    if not out_of_memory(error):
        return error
    return AestheticFilterError(
        f"{tower.device}: out of memory with a single image; free some, or give another --device"
    )
