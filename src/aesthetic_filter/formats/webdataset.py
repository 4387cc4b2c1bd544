"""WebDataset: tar archives whose members share a key, the name up to the base name's first dot.

A sample is a run of members with one key, by WebDataset's own rule. Archives are read as streams,
never extracted, and to their true end: ``tarfile`` takes some damage for the end of an archive.

Of the members beside the images, ``txt``, ``text``, ``caption``, ``json`` and ``cls`` are columns.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import pyarrow as pa

from aesthetic_filter.errors import CutShortError, ShardError
from aesthetic_filter.filenames import LONGEST_PART, UniqueNames, is_image, safe_path
from aesthetic_filter.formats import (
    IMAGE_BYTES,
    IMAGE_ROWS,
    LARGEST_IMAGE,
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
LINK = "is a link within the archive, not an image"
CUT = "the archive ends in the middle of this file"

_KEY = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_META = re.compile(r"__[^/]*__($|/)")
# Both as webdataset.tariterators has them.

_HELD_BYTES = 64 << 20
# Of a sample's images; one of more is given piece by piece.

_LARGEST_HEADER = 16 << 20
_LONGEST_PADDING = 1 << 20
# GNU tar pads to 10 KB; no usual blocking factor to more than this.

_BAD_HEADER = "a header is damaged"
_READ_BYTES = 1 << 16
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
    with _open(source, shard) as archive:
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
    with _open(source, shard) as archive:
        first = 0
        for key, members in archive.samples():
            found: list[tuple[_Member, bytes]] = []
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
    gone = f"row {min(missing):,} is not there any more"
    raise ShardError(shard.name, f"{gone}: {archive.describe_damage()}" if archive.damage is not None else gone)


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
    ending = next((e for e in sorted(ENDINGS, key=len) if name.lower().endswith(e)), "")
    return name.removesuffix(name[len(name) - len(ending) :])


def _giver(content: bytes) -> Callable[[], bytes]:
    return lambda: content


def _split_name(name: str) -> tuple[str, str] | None:
    """A member's key and extension; None if it belongs to no sample.

    As WebDataset has it, but for hidden files within folders, such as macOS's ``a/._b.jpg``, which
    it takes for samples of their own.
    """
    match = _KEY.match(name)
    if match is None or _META.match(name) or name.rpartition("/")[2].startswith("."):
        return None
    return match.group(1), match.group(2)


@dataclass(frozen=True)
class _Member:
    """A file of a sample.

    Attributes:
        problem: why its content is not read; None: it can be.
        end: the place in the archive at which its content ends.
    """

    name: str
    key: str
    extension: str
    problem: str | None
    end: int
    info: tarfile.TarInfo

    @property
    def is_image(self) -> bool:
        return is_image(self.extension)


class _DamageError(Exception):
    """A header that tarfile would take for the archive's end; the message is the reason."""


class _Header(tarfile.TarInfo):
    """Raises :class:`_DamageError` where tarfile is content to find no further member."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _Header:
        try:
            return cast(_Header, super().fromtarfile(tar))
        except _END:
            raise
        except _CUT as error:
            raise _DamageError("") from error
        except tarfile.HeaderError as error:
            raise _DamageError(_BAD_HEADER) from error

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        header = super().frombuf(buf, encoding, errors)
        extended = header.type in (*_LONG_NAMES, *_PAX_HEADERS)
        if header.size < 0 or (extended and header.size > _LARGEST_HEADER):
            raise _DamageError(_BAD_HEADER)
        return header


_END = tarfile.EOFHeaderError  # type: ignore[attr-defined]  # a block of zeros
_CUT = (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError)  # type: ignore[attr-defined]
_LONG_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_PAX_HEADERS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)


class _Archive:
    """The members of an archive, as they come; the end of iteration is its end, or ``damage``.

    Attributes:
        damage: where iteration ended too early: why, or "" where it is just cut off.
    """

    def __init__(self, content: _Content, name: str) -> None:
        self.damage: str | None = None
        self._content, self._name = content, name
        self._tar: tarfile.TarFile | None = None
        self._samples = 0
        self._last: _Member | None = None

    def samples(self) -> Iterator[tuple[str, Iterator[_Member]]]:
        """Runs of members with one key."""
        for key, members in itertools.groupby(self._members(), key=attrgetter("key")):
            self._samples += 1
            yield key, members

    def read(self, member: _Member) -> bytes | None:
        """The content of the member that came last, or None if it can't be had."""
        if member.problem is not None or self._tar is None:
            return None
        try:
            file = self._tar.extractfile(member.info)
            return file.read() if file is not None else None
        except ShardError:
            raise
        except Exception as error:
            self.damage = self._reason(error)
            return None

    def describe_damage(self) -> str:
        """In one line, with the number of samples that are whole."""
        last_is_cut = self._last is not None and self._content.given < self._last.end
        why = f" ({self.damage})" if self.damage else ""
        return f"cut short after {self._samples - last_is_cut:,} samples{why}"

    def _members(self) -> Iterator[_Member]:
        while (info := self._next()) is not None:
            split = _split_name(info.name)
            if split is None or not (info.isreg() or info.issym() or info.islnk()):
                continue
            problem = None
            if not info.isreg():
                if not is_image(split[1]):
                    continue
                problem = LINK
            elif info.size > LARGEST_IMAGE:
                problem = f"file is larger than {LARGEST_IMAGE >> 20} MB"
            end = info.offset_data + info.size
            if not info.isreg() or info.issparse():  # its size is not what it takes here
                end = info.offset_data
            self._last = _Member(info.name, *split, problem, end, info)
            yield self._last

    def _next(self) -> tarfile.TarInfo | None:
        """The next member; None at the end, or where there is damage."""
        if self.damage is not None:
            return None
        try:
            if self._tar is None:
                self._tar = tarfile.open(  # noqa: SIM115  # nothing to close: the file is not its own
                    fileobj=self._content,
                    mode="r|",
                    bufsize=_READ_BYTES,
                    tarinfo=_Header,
                    encoding="utf-8",
                    errors="surrogateescape",
                )
            info = self._tar.next()
            self._tar.members = []  # type: ignore[attr-defined]  # it keeps every one otherwise
            if info is None:
                self._check_end(self._tar)
            elif info.size < 0:  # as a PAX header may have it
                raise _DamageError(_BAD_HEADER)
            return info
        except ShardError:
            raise
        except Exception as error:  # whatever its parser stumbles over: ValueError, IndexError, ...
            if self._tar is None:
                raise ShardError(self._name, self._why_none(error)) from None
            self.damage = self._reason(error)
            return None

    def _check_end(self, tar: tarfile.TarFile) -> None:
        """Read what comes behind the mark of the end: a compressed file's checksum is there."""
        padding = 0
        assert tar.fileobj is not None
        while block := tar.fileobj.read(_READ_BYTES):
            padding += len(block)
            if block.count(0) != len(block):
                raise _DamageError("more follows behind its mark of the end")
        if self._content.damage is not None:
            raise _DamageError(self._content.damage)
        if padding > _LONGEST_PADDING:
            raise _DamageError(f"the last {padding:,} bytes are zeros")

    def _reason(self, error: Exception) -> str:
        if self._content.damage is not None:
            return self._content.damage
        if isinstance(error, _DamageError):
            return str(error)
        at_end = isinstance(error, tarfile.ReadError) and "unexpected end" in str(error)
        return "" if at_end else _BAD_HEADER

    def _why_none(self, error: Exception) -> str:
        if self._content.damage:
            return f"damaged before its first file: {self._content.damage}"
        if self._content.damage is None and not self._content.given:
            return "is empty"
        cut = self._content.damage is not None or not str(error)
        return "not a tar archive" + (", or cut short before its first file" if cut else "")


class _Reader(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Content(io.RawIOBase):
    """An archive's bytes, decompressed, to be read from the beginning.

    Damage to the compressed data looks like the end, so that nothing before it is lost.

    Attributes:
        damage: why the compressed data could not be read further; "" where they are cut off.
        given: bytes read so far.
    """

    def __init__(self, raw: BinaryIO, name: str) -> None:
        self.damage: str | None = None
        self.given = 0
        compressed = _Raw(raw, name)
        start = compressed.peek(4)
        self._decompress: Callable[[int], bytes]
        if start.startswith(b"\x1f\x8b"):
            # Gives what there is before it raises, which read() does not.
            self._decompress = gzip.GzipFile(fileobj=cast(BinaryIO, compressed)).read1
        elif start == b"\x28\xb5\x2f\xfd":
            stream = pa.PythonFile(compressed, mode="r")
            self._decompress = _by_block(pa.CompressedInputStream(stream, "zstd"))
        else:
            self._decompress = compressed.read

    def read(self, size: int = -1, /) -> bytes:
        """Up to ``size`` bytes; none at the end."""
        if self.damage is not None:
            return b""
        try:
            found = self._decompress(size)
        except EOFError:
            self.damage = ""
            return b""
        except (OSError, zlib.error, pa.ArrowException) as error:
            cut = "truncated" in str(error).lower()
            self.damage = "" if cut else "its compressed data are damaged"
            return b""
        self.given += len(found)
        return found


def _by_block(stream: _Reader) -> Callable[[int], bytes]:
    """Reads a tar's block at a time: an error takes no more than that of what comes before it."""
    failed: list[Exception] = []

    def read(size: int) -> bytes:
        if failed:
            raise failed[0]
        blocks = []
        try:
            for _ in range(max(size // tarfile.BLOCKSIZE, 1)):
                blocks.append(stream.read(tarfile.BLOCKSIZE))
                if len(blocks[-1]) < tarfile.BLOCKSIZE:
                    break
        except (OSError, pa.ArrowException) as error:
            failed.append(error)
            if not any(blocks):
                raise
        return b"".join(blocks)

    return read


class _Raw:
    """A file that may not be sought in, with its first bytes to be looked at.

    Failing to read it is a :class:`ShardError`, to tell it from damage to what is in it.
    """

    closed = False  # PyArrow asks

    def __init__(self, raw: BinaryIO, name: str) -> None:
        self._raw, self._name = raw, name
        self._start = b""

    def peek(self, size: int) -> bytes:
        while len(self._start) < size and (more := self._read(size - len(self._start))):
            self._start += more
        return self._start

    def read(self, size: int = -1) -> bytes:
        if not self._start:
            return self._read(size)
        size = len(self._start) if size < 0 else size
        found, self._start = self._start[:size], self._start[size:]
        return found

    def close(self) -> None:
        """Nothing: whoever opened it closes it."""

    def _read(self, size: int) -> bytes:
        try:
            return self._raw.read(size)
        except OSError as error:
            reason = f"cannot be read: {error.strerror or error}"
            raise ShardError(self._name, reason) from None


@contextmanager
def _open(source: Source, shard: Shard) -> Iterator[_Archive]:
    with source.open(shard.files[0]) as raw:
        yield _Archive(_Content(raw, shard.name), shard.name)


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


def _rows(archive: _Archive, shard: str, address: str, columns: Sequence[str]) -> Iterator[_Row]:
    """A shard's rows. Of a very large sample, a text is the rows' that come behind it."""
    taken: set[str] = set()

    def row(name: str, member: _Member, image: bytes | None, error: str | None) -> _Row:
        image_id = _free_id(valid_text(f"{shard}/{name}"), taken)
        return _Row(image_id, valid_text(f"{address}#{member.name}"), image, error, texts)

    for key, members in archive.samples():
        texts: dict[str, str] = {}
        held: list[tuple[_Member, bytes | None]] = []
        beside: list[_Member] = []
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


def _free_id(image_id: str, taken: set[str]) -> str:
    """The id, or the first of ``id#2``, ``id#3``, ... that is not taken yet."""
    free, number = image_id, 1
    while free in taken:
        number += 1
        free = f"{image_id}#{number}"
    taken.add(free)
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
        if self._sample is None or not self._sample.joins(sample, extension):
            self._end_sample()
            if self._shard is not None and self._shard.samples == self._options.shard_size:
                self._end_shard()
            if self._shard is None:
                self._shard = _ShardWriter(self._folder / f"{self._shards:05d}.tar", self._index)
                self._shards += 1
            self._shard.samples += 1
            extensions = [extension, *map(_safe_extension, sample.sidecars)]
            if self._options.score_in == "json":
                extensions.append(_SCORE_JSON)
            key = _new_key(sample, extensions, self._keys)
            self._sample = _SampleWriter(self._shard, sample, key)
        member = self._sample.write_image(extension, content, row.get(SCORE))
        assert self._shard is not None
        where = {SHARD: self._shard.path.name, MEMBER: member}
        self._shard.list_row({self._columns.get(k, k): v for k, v in row.items()} | where)

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

    def write_image(self, extension: str, content: bytes, score: float | None) -> str:
        """Write an image and give its member's name."""
        self._used.add(extension.lower())
        if score is not None:
            self._scores.append(score)
        member = f"{self._key}.{extension}"
        self._shard.add_member(member, content)
        return member

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
        if any(_META.match(f"{key}.{e}") for e in extensions):
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
    return _safe_extension(extension) if is_image(extension) else _guess_extension(content)


def _guess_extension(content: bytes) -> str:
    for extension, signature in _SIGNATURES:
        if re.match(signature, content, re.DOTALL):
            return extension
    return "img"


_SIGNATURES = (
    ("jpg", rb"\xff\xd8\xff"),
    ("png", rb"\x89PNG\r\n\x1a\n"),
    ("gif", rb"GIF8[79]a"),
    ("webp", rb"RIFF....WEBP"),
    ("avif", rb"....ftypavi[fs]"),
    ("heic", rb"....ftyp(heic|heix|hevc|heim|heis|mif1|msf1)"),
    ("tif", rb"II[\x2a\x2b]\x00|MM\x00[\x2a\x2b]"),
    ("jxl", rb"\xff\x0a|\x00\x00\x00\x0cJXL "),
    ("jp2", rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51"),
    ("bmp", rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\x00\x00\x00"),
    ("psd", rb"8BPS"),
    ("qoi", rb"qoif"),
    ("ppm", rb"P[1-6]\s"),
    ("ico", rb"\x00\x00\x01\x00"),
)


def _with_score(sidecars: Mapping[str, bytes], score: float) -> dict[str, bytes]:
    name = next((e for e in sidecars if e.lower() == "json"), "json")
    try:
        data = json.loads(sidecars.get(name, b"{}"))
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        name, data = _SCORE_JSON, {}
    return dict(sidecars) | {name: json.dumps(data | {SCORE: score}).encode()}
