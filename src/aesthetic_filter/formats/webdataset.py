"""WebDataset: tar archives whose members share a key, the name up to the base name's first dot.

A sample is a run of members with one key, by WebDataset's own rule. Archives are read as streams,
never extracted, and to their true end: ``tarfile`` takes some damage for the end of an archive.

Of the members beside the images, ``txt``, ``text``, ``caption``, ``json`` and ``cls`` are columns.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from aesthetic_filter.archive import Archive, Member, is_meta, open_archive
from aesthetic_filter.errors import CutShortError, ShardError
from aesthetic_filter.filenames import (
    LONGEST_PART,
    UniqueNames,
    guess_extension,
    is_image,
    safe_path,
)
from aesthetic_filter.formats import (
    IMAGE_BYTES,
    IMAGE_ROWS,
    ImageOutput,
    ImageRow,
    Sample,
    Shard,
    Wanted,
    parquet,
)
from aesthetic_filter.storage import Source, valid_text
from aesthetic_filter.table import (
    ERROR,
    IMAGE,
    IMAGE_COLUMNS,
    IMAGE_ID,
    IMAGE_PATH,
    SCORE,
    carried_names,
    printable,
)

DESCRIPTION = "WebDataset .tar archives of images"
PRECEDENCE = 2  # img2dataset puts a Parquet index beside each archive
GIVES = "image"

IMAGE_OPTIONS = ("shard_size", "score_in")
INDEX = "[0-9]*.parquet"

ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.zstd")
TEXTS = ("txt", "text", "caption", "json", "cls")
"""The extensions that are columns too."""

SHARD = "shard"
MEMBER = "member"
"""The index's columns that say where an image was written."""

NO_IMAGE = "sample holds no image"
CUT = "the archive ends in the middle of this file"

_HELD_BYTES = 64 << 20  # of a sample's images: one of more is given piece by piece

_SCORE_JSON = f"{SCORE}.json"
_INDEX_ROWS = 4096


def matches(source: Source) -> bool:
    """Whether there are tar archives."""
    return any(_is_archive(file.name) for file in source.files)


def shards(source: Source) -> list[Shard]:
    """One for each archive."""
    return [Shard(file.name, (file,)) for file in source.files if _is_archive(file.name)]


def read(source: Source, shard: Shard, wanted: Wanted) -> Iterator[pa.Table]:
    """A row for each image, and for each sample without one.

    Raises:
        ShardError: not a tar archive.
        CutShortError: it is cut short or damaged, or goes on behind its end.
    """
    columns = [name for name in TEXTS if wanted.others is None or name in wanted.others]
    with open_archive(source, shard) as archive:
        rows = _rows(archive, shard.name, source.address(shard.files[0]), columns)
        yield from _tables(rows, carried_names(columns, IMAGE_COLUMNS))
        if archive.damage is not None:
            raise CutShortError(shard.name, archive.describe_damage())


def fetch(
    source: Source, shard: Shard, rows: Sequence[int], wanted: Wanted = Wanted()
) -> Iterator[Sample]:
    """The samples of these rows, in one pass.

    Raises:
        ShardError: a row is not there any more.
    """
    missing = set(rows)
    folder = _without_ending(shard.name)
    if not missing:
        return
    with open_archive(source, shard) as archive:
        first = 0
        for key, members in archive.samples():
            found: list[tuple[Member, bytes]] = []
            sidecars: dict[str, bytes] = {}
            too_large = ""
            row = first
            for member in members:
                if member.is_image:
                    content = archive.read(member) if row in missing else None
                    if content is not None:
                        found.append((member, content))
                        missing.discard(row)
                    row += 1
                elif member.problem is not None:
                    too_large = member.name
                elif (content := archive.read(member)) is not None:
                    sidecars[member.extension] = content
            if found and too_large:
                raise ShardError(shard.name, f"{printable(too_large)} is too large to be copied")
            for member, content in found:
                yield Sample(folder, key, member.extension, _giver(content), sidecars)
            if not missing:
                return
            first = max(row, first + 1)
    why = "" if archive.damage is None else f": {archive.describe_damage()}"
    raise ShardError(shard.name, f"row {min(missing):,} is not there any more{why}")


def write_images(
    folder: Path, rows: Iterator[ImageRow], schema: pa.Schema, options: ImageOutput
) -> None:
    """Write shards ``00000.tar``, ... of ``shard_size`` samples, and an index beside each.

    Bytes and extensions are the source's. So is the key, if it is safe, free and has no dot in its
    base name; a taken one gets its archive's path in front, then a number. Images of one sample
    that follow one another share a key. The same rows give the same bytes.

    With ``score_in="json"`` the score (the best, of several images) goes into the sample's json as
    ``aesthetic_score``; beside a json that is no object it goes into ``KEY.aesthetic_score.json``.

    Raises:
        ShardError: an image is gone from the source.
    """
    with _Writer(folder, schema, options) as writer:
        for row, sample in rows:
            writer.add(row, sample)


# Reading


def _is_archive(name: str) -> bool:
    return name.lower().endswith(ENDINGS)


def _without_ending(name: str) -> str:
    ending = next(ending for ending in ENDINGS if name.lower().endswith(ending))
    return name[: -len(ending)]


def _giver(content: bytes) -> Callable[[], bytes]:
    return lambda: content


@dataclass(frozen=True)
class _Row:
    image_id: str
    path: str
    image: bytes | None
    error: str | None
    texts: dict[str, str]

    @property
    def size(self) -> int:
        return len(self.image or b"") + sum(map(len, self.texts.values()))


def _rows(archive: Archive, shard: str, address: str, columns: Sequence[str]) -> Iterator[_Row]:
    """A shard's rows; in a very large sample a text belongs to the images behind it."""
    taken: dict[str, int] = {}

    def row(name: str, member: Member, image: bytes | None, error: str | None) -> _Row:
        image_id = _free_id(valid_text(f"{shard}/{name}"), taken)
        return _Row(image_id, valid_text(f"{address}#{member.name}"), image, error, texts)

    for key, members in archive.samples():
        texts: dict[str, str] = {}
        held: list[tuple[Member, bytes | None]] = []
        beside: list[Member] = []
        several = False
        for member in members:
            if not member.is_image:
                beside.append(member)
                column = member.extension.lower()
                if column in columns and (text := archive.read(member)) is not None:
                    texts[column] = _decode(column, text)
                continue
            size = sum(len(content or b"") for _, content in held)
            if held and (len(held) == IMAGE_ROWS or size >= _HELD_BYTES):
                several = True
                for image, content in held:
                    error = None if content is not None else image.problem or CUT
                    yield row(f"{key}.{image.extension}", image, content, error)
                held, texts = [], dict(texts)
            held.append((member, archive.read(member)))
        several = several or len(held) > 1
        for image, content in held:
            name = f"{key}.{image.extension}" if several else key
            error = None if content is not None else image.problem or CUT
            yield row(name, image, content, error)
        if not held:
            kinds = ", ".join(printable(e) for e in sorted({m.extension for m in beside})[:5])
            yield row(key, beside[0], None, f"{NO_IMAGE} ({kinds})")


def _free_id(image_id: str, taken: dict[str, int]) -> str:
    """The id, or the first free one of ``id#2``, ``id#3``, ...; ``taken`` has the last number."""
    free, number = image_id, taken.get(image_id, 1)
    while free in taken:
        number += 1
        free = f"{image_id}#{number}"
    taken[image_id] = number
    taken[free] = taken.get(free, 1)
    return free


def _decode(column: str, content: bytes) -> str:
    text = content.decode("utf-8", "replace")
    return text.strip() if column == "cls" else text


def _tables(rows: Iterable[_Row], columns: dict[str, str]) -> Iterator[pa.Table]:
    """Rows in batches, at least one, if an empty one; with the columns that any of its rows has."""

    def table() -> pa.Table:
        present = {name for row in held for name in row.texts}
        return pa.table(
            {
                IMAGE_ID: pa.array([row.image_id for row in held], pa.string()),
                IMAGE_PATH: pa.array([row.path for row in held], pa.string()),
                IMAGE: pa.array([row.image for row in held], pa.binary()),
                ERROR: pa.array([row.error for row in held], pa.string()),
                **{
                    new: pa.array([row.texts.get(name) for row in held], pa.string())
                    for name, new in columns.items()
                    if name in present
                },
            }
        )

    held: list[_Row] = []
    size, given = 0, False
    for row in rows:
        held.append(row)
        size += row.size
        if len(held) == IMAGE_ROWS or size >= IMAGE_BYTES:
            yield table()
            held, size, given = [], 0, True
    if held or not given:
        yield table()


# Writing


class _Writer:
    """Writes samples one after another into shards; what it holds is one shard's index."""

    def __init__(self, folder: Path, schema: pa.Schema, options: ImageOutput) -> None:
        self._folder, self._options = folder, options
        self._columns = carried_names(schema.names, (SHARD, MEMBER))
        self._index = _index_schema(schema, self._columns)
        self._keys = UniqueNames(files=False)
        self._shards = 0
        self._shard: _ShardWriter | None = None
        self._sample: _SampleWriter | None = None

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        if self._shard is None:
            return
        if failed is None:
            self._end_sample()
            self._end_shard()
        else:
            self._shard.tar.close()

    def add(self, row: dict[str, Any], sample: Sample) -> None:
        """Write one image; the same sample's next one joins it."""
        content = sample.read()
        extension = _image_extension(sample.extension, content)
        writer = self._sample
        if writer is None or not writer.joins(sample, extension):
            self._end_sample()
            writer = self._sample = self._begin_sample(sample, extension)
        renamed = {self._columns.get(name, name): value for name, value in row.items()}
        writer.write_image(extension, content, renamed)

    def _begin_sample(self, sample: Sample, extension: str) -> _SampleWriter:
        if self._shard is not None and self._shard.samples == self._options.shard_size:
            self._end_shard()
        if self._shard is None:
            self._shard = _ShardWriter(self._folder / f"{self._shards:05d}.tar", self._index)
            self._shards += 1
        self._shard.samples += 1
        extensions = [extension, *map(_safe_extension, sample.sidecars)]
        if self._options.score_in == "json":
            extensions.append(_SCORE_JSON)
        return _SampleWriter(self._shard, sample, _new_key(sample, extensions, self._keys))

    def _end_sample(self) -> None:
        if self._sample is not None:
            self._sample.end(with_score=self._options.score_in == "json")
            self._sample = None

    def _end_shard(self) -> None:
        if self._shard is not None:
            self._shard.end()
            self._shard = None


class _ShardWriter:
    """One tar and its index."""

    def __init__(self, path: Path, index: pa.Schema) -> None:
        self.path, self.samples = path, 0
        # PAX headers only where a plain one cannot say it: a long name, or one that isn't ASCII.
        self.tar = tarfile.TarFile.open(path, "w", format=tarfile.PAX_FORMAT, encoding="utf-8")
        self._index = index
        self._rows: list[dict[str, Any]] = []
        self._batches: list[pa.RecordBatch] = []

    def add_member(self, name: str, content: bytes) -> None:
        info = tarfile.TarInfo(name)  # whose owner, time and mode are always the same
        info.size = len(content)
        self.tar.addfile(info, io.BytesIO(content))
        self.tar.members = []  # type: ignore[attr-defined]  # it keeps every one otherwise

    def list_row(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        if len(self._rows) == _INDEX_ROWS:
            self._pack_rows()

    def end(self) -> None:
        self.tar.close()
        self._pack_rows()
        parquet.write(self.path.with_suffix(".parquet"), self._index, iter(self._batches))

    def _pack_rows(self) -> None:
        self._batches.append(pa.RecordBatch.from_pylist(self._rows, self._index))
        self._rows = []


class _SampleWriter:
    """One sample: its images as they come, then what belongs to them."""

    def __init__(self, shard: _ShardWriter, sample: Sample, key: str) -> None:
        self._shard, self._sample, self._key = shard, sample, key
        self._used: set[str] = set()
        self._scores: list[float] = []

    def joins(self, sample: Sample, extension: str) -> bool:
        """Whether this is another image of the same sample, which has no such image yet."""
        mine = self._sample
        return (
            (mine.folder, mine.key) == (sample.folder, sample.key)
            and mine.sidecars == sample.sidecars
            and extension.lower() not in self._used
            and _fits(self._key, extension)
        )

    def write_image(self, extension: str, content: bytes, row: dict[str, Any]) -> None:
        """Write an image, and its row into the index."""
        self._used.add(extension.lower())
        if row.get(SCORE) is not None:
            self._scores.append(row[SCORE])
        member = f"{self._key}.{extension}"
        self._shard.add_member(member, content)
        self._shard.list_row(row | {SHARD: self._shard.path.name, MEMBER: member})

    def end(self, *, with_score: bool) -> None:
        sidecars = self._sample.sidecars
        if with_score and self._scores:
            sidecars = _with_score(sidecars, max(self._scores))
        for given, content in sidecars.items():
            extension = _safe_extension(given)
            while extension.lower() in self._used:  # readers refuse a name that comes twice
                extension = f"source.{extension}"
            self._used.add(extension.lower())
            self._shard.add_member(f"{self._key}.{extension}", content)


def _index_schema(schema: pa.Schema, columns: dict[str, str]) -> pa.Schema:
    """``image_id``, ``shard``, ``member``, ``aesthetic_score``, then the schema's other columns."""
    fields = {old: schema.field(old).with_name(new) for old, new in columns.items()}
    first = [fields.pop(IMAGE_ID)] if IMAGE_ID in fields else []
    where = [pa.field(SHARD, pa.string()), pa.field(MEMBER, pa.string())]
    score = [fields.pop(SCORE)] if SCORE in fields else []
    return pa.schema([*first, *where, *score, *fields.values()], schema.metadata)


def _new_key(sample: Sample, extensions: Sequence[str], keys: UniqueNames) -> str:
    """A key that no sample has yet and that WebDataset reads as one, with these extensions."""
    room = 1 + max(len(e.encode()) for e in extensions)

    def allowed(name: str) -> str:
        above, slash, base = safe_path(name, room).rpartition("/")
        key = above + slash + base.replace(".", "_")
        if any(is_meta(f"{key}.{e}") for e in extensions):
            key = f"x{key[1:]}"
        return key

    key = allowed(sample.key)
    if key in keys and sample.folder:
        above, slash, base = sample.key.rpartition("/")
        key = allowed(f"{above}{slash}{sample.folder.replace('/', '_')}_{base}")
    return keys.take(key, room)


def _fits(key: str, extension: str) -> bool:
    return len(f"{key.rpartition('/')[2]}.{extension}".encode()) <= LONGEST_PART


def _safe_extension(extension: str) -> str:
    return safe_path(extension.replace("/", "_").replace("\\", "_"), LONGEST_PART - 100)


def _image_extension(extension: str, content: bytes) -> str:
    """The source's, or if that is no image's, the one that the content should have."""
    return _safe_extension(extension) if is_image(extension) else guess_extension(content)


def _with_score(sidecars: Mapping[str, bytes], score: float) -> dict[str, bytes]:
    name = next((e for e in sidecars if e.lower() == "json"), "json")
    try:
        data = json.loads(sidecars.get(name, b"{}"))
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        name, data = _SCORE_JSON, {}
    return dict(sidecars) | {name: json.dumps(data | {SCORE: score}).encode()}
