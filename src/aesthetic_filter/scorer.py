"""Score images in memory: for a notebook, or inside somebody's generative pipeline."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aesthetic_filter.clip.options import ImageOptions
from aesthetic_filter.errors import ImageError
from aesthetic_filter.heads import Head, load_head

if TYPE_CHECKING:
    from aesthetic_filter.clip.encoder import Embedded, Encoder


@dataclass(frozen=True)
class Ranked:
    """One of the best: as ``ImageScorer.best`` gives it.

    Attributes:
        image: as it was handed in.
        score: the head's prediction.
        index: its place among the candidates.
    """

    image: Any
    score: float
    index: int


class ImageScorer:
    """Predict how much people like images.

    Nothing is loaded before the first image. The scores are those that ``score`` writes for the
    same bytes and the same options: the embedding is rounded to float16 on the way.

    Args:
        head: a head, or what :func:`load_head` takes; default: the reference head.
        model_dir: where weights from the hub are kept; default: the hub's own cache.
        options: how images are decoded and embedded.

    Attributes:
        head: the head.

    Used as a context manager, or closed, it lets go of the device's memory.
    """

    def __init__(
        self,
        head: Head | str | Path | None = None,
        *,
        model_dir: str | Path | None = None,
        options: ImageOptions | None = None,
    ) -> None:
        self.head = head if isinstance(head, Head) else load_head(head, model_dir=model_dir)
        self._model_dir = model_dir
        self._options = options
        self._encoder: Encoder | None = None

    def __call__(self, images: Any) -> NDArray[np.float32]:
        """Score images.

        Args:
            images: a sequence of paths, encoded bytes, PIL images and (H, W), (H, W, 3) or
                (H, W, 4) uint8 arrays, mixed as you like; or a single one of these.

        Returns:
            (N,) float32. NaN, with a warning that says why, where an image cannot be decoded.

        Raises:
            DownloadError: the encoder's weights are neither here nor to be had.
            MissingExtraError: torch or Pillow is not installed.
        """
        measured = self.head.measure(self.embed(images))
        if self._encoder and not self._encoder.weights.published:
            self.head.warn_if_foreign(measured.cosines)
        return measured.scores

    def embed(self, images: Any) -> NDArray[np.float16]:
        """Embed images, as for scoring: (N, 768) float16 of unit norm; NaN where one failed."""
        images = [images] if is_one_image(images) else images
        vectors = np.full((len(images), self.head.width), np.nan, np.float16)
        failures = []
        for number, future in enumerate(self._submit(images)):
            try:
                vectors[number] = future.result().vector
            except ImageError as error:
                failures.append(f"image {number}: {error}")
        if failures:
            more = f", and {len(failures) - 3:,} more" if len(failures) > 3 else ""
            warnings.warn(f"not scored: {'; '.join(failures[:3])}{more}", stacklevel=3)
        return vectors

    def best(self, candidates: Sequence[Any], k: int = 1) -> list[Ranked]:
        """The ``k`` best of some candidates, best first; equal ones in the order they came.

        Candidates that cannot be decoded are not among them, so there may be fewer.
        """
        scores = self(candidates)
        order = np.argsort(-scores, kind="stable")
        chosen = [int(index) for index in order if not np.isnan(scores[index])][:k]
        return [Ranked(candidates[i], float(scores[i]), i) for i in chosen]

    def close(self) -> None:
        """Let go of threads and memory; the next call begins anew."""
        if self._encoder is not None:
            self._encoder.close()
            self._encoder = None

    def __enter__(self) -> ImageScorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.head, self._model_dir, self._options)

    def _submit(self, images: Sequence[Any]) -> Iterator[Future[Embedded]]:
        """Their futures, in order; not many more are on their way than the devices need."""
        from aesthetic_filter.clip.encoder import Encoder

        if self._encoder is None:
            self._encoder = Encoder(self._options, model_dir=self._model_dir)
            self._encoder.on_note = lambda line: warnings.warn(line, stacklevel=2)
        waiting: deque[Future[Embedded]] = deque()
        for image in images:
            if len(waiting) > self._encoder.lookahead:
                yield waiting.popleft()
            waiting.append(self._encoder.submit(image))
        yield from waiting


def is_one_image(images: Any) -> bool:
    """Whether this is a single image rather than several."""
    if isinstance(images, np.ndarray):
        return images.ndim == 2 or (images.ndim == 3 and images.shape[-1] in (1, 3, 4))
    return isinstance(images, str | Path | bytes | bytearray | memoryview) or not hasattr(
        images, "__len__"
    )


def _rebuild(head: Head, model_dir: Any, options: ImageOptions | None) -> ImageScorer:
    return ImageScorer(head, model_dir=model_dir, options=options)
