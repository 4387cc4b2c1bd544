"""The images behind some scores, to look at: read from where they lie, nothing extracted.

What cannot be had costs only itself: an image that is gone, has changed since it was scored, or
cannot be decoded gives the reason instead.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from aesthetic_filter.errors import AestheticFilterError, MissingExtraError, ShardError
from aesthetic_filter.formats import ImageFormat, Shard, Wanted, formats
from aesthetic_filter.run_folder import read_part
from aesthetic_filter.storage import list_source
from aesthetic_filter.table import SHA256

if TYPE_CHECKING:
    from aesthetic_filter.scores import Scores


class Place(Protocol):
    """A row of the scores: which it is, and where it lies."""

    @property
    def image_id(self) -> str:
        """As in the scores."""

    @property
    def part(self) -> int:
        """The number of the scores' file that holds it."""

    @property
    def row(self) -> int:
        """Its place in that file."""


P = TypeVar("P", bound=Place)


@dataclass(frozen=True)
class Picture:
    """An image, or why there is none.

    Attributes:
        data: the encoded bytes, as they lie in the source; None where there are none.
        problem: why; "" where there are.
    """

    data: bytes | None
    problem: str = ""


class Pictures:
    """The images of some scores."""

    def __init__(self, scores: Scores, source: str | None = None) -> None:
        """Look at the source; nothing is read yet.

        Args:
            scores: made from images.
            source: where the images are now, if they were moved.

        Raises:
            SourceError: there is no such source any more.
            OutputError: the scores were made from embeddings, or chosen from others.
        """
        from aesthetic_filter.selection.images import no_images

        images = scores.provenance.get("images")
        if images is None or read_part(scores.files[0]) is None:
            raise no_images()
        self._scores = scores
        self._listing = list_source(source or images["source"])
        self._reader = cast(ImageFormat, formats()[images["format"]])
        self._wanted = Wanted(**images["columns"])
        self._numbered = getattr(self._reader, "NUMBERED", False)
        self._files = {file.name: file for file in self._listing.files}
        self._shards = {shard.name: shard for shard in self._reader.shards(self._listing)}

    def fetch(self, places: Sequence[P]) -> Iterator[tuple[P, Picture]]:
        """The images of these rows, in the order in which they lie in the source.

        An archive is read once for all of its rows among them.
        """
        hashes = self._hashes(places)
        ordered = sorted(places, key=lambda place: (place.part, place.row))
        for number, group in itertools.groupby(ordered, key=lambda place: place.part):
            rows = list(group)
            for place, picture in self._of_part(number, rows):
                expected = hashes.get((place.part, place.row))
                if picture.data is not None and expected is not None:
                    found = hashlib.sha256(picture.data).hexdigest()
                    if found != expected:
                        picture = Picture(None, "has changed since it was scored")
                yield place, picture

    def _of_part(self, number: int, rows: list[P]) -> Iterator[tuple[P, Picture]]:
        part = read_part(self._scores.files[number])
        if part is None:
            gone = f"{self._scores.files[number].name} is no part of a scores folder"
            yield from ((row, Picture(None, gone)) for row in rows)
            return
        if self._numbered:  # each image is a file: one that is gone costs only itself
            there = [row for row in rows if row.image_id in self._files]
            for row in rows:
                if row.image_id not in self._files:
                    yield row, Picture(None, "is gone from the source")
            while there:
                files = Shard(part.shard, tuple(self._files[row.image_id] for row in there))
                done = 0
                for row, picture in self._of_shard(files, there, list(range(len(there)))):
                    yield row, picture
                    done += 1
                    if picture.data is None:
                        break
                if not done:
                    yield from ((row, Picture(None, "cannot be read")) for row in there)
                    return
                there = there[done:]
            return
        shard = self._shards.get(part.shard)
        if shard is None:
            yield from ((row, Picture(None, f"{part.shard} is gone")) for row in rows)
            return
        yield from self._of_shard(shard, rows, [row.row for row in rows])

    def _of_shard(
        self, shard: Shard, rows: list[P], places: list[int]
    ) -> Iterator[tuple[P, Picture]]:
        done = 0
        try:
            samples = self._reader.fetch(self._listing, shard, places, self._wanted)
            for row, sample in zip(rows, samples, strict=False):
                try:
                    picture = Picture(sample.read())
                except (AestheticFilterError, OSError) as error:
                    picture = Picture(None, _why(error))
                done += 1
                yield row, picture
        except (AestheticFilterError, OSError) as error:
            yield from ((row, Picture(None, _why(error))) for row in rows[done:])

    def _hashes(self, places: Sequence[Place]) -> dict[tuple[int, int], str]:
        if SHA256 not in self._scores.columns:
            return {}
        here = [(place.part, place.row) for place in places]
        found = self._scores.database.at(here, [SHA256])
        return {place: str(value) for place, (value,) in found.items() if value is not None}


def make_thumbnail(picture: Picture, side: int, quality: int = 80) -> Any:
    """A small JPEG of a picture, or the reason why there is none.

    Args:
        picture: the image.
        side: the longest side, in pixels.
        quality: of the JPEG.

    Returns:
        ``clip.preprocess.Thumbnail``, or a str.

    Raises:
        MissingExtraError: Pillow is not installed.
    """
    from aesthetic_filter.errors import ImageError

    if picture.data is None:
        return picture.problem
    try:
        from aesthetic_filter.clip.preprocess import thumbnail
    except MissingExtraError:
        raise MissingExtraError("thumbnails need Pillow", "web") from None
    try:
        return thumbnail(picture.data, side, quality=quality)
    except ImageError as error:
        return str(error)


def _why(error: Exception) -> str:
    if isinstance(error, ShardError):
        return error.reason
    return str(error) or type(error).__name__
