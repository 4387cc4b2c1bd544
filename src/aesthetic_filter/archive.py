"""A tar archive as a stream of samples, read to its true end.

``tarfile`` takes some damage for the end of an archive, and so does all that is built on it; here
every archive ends with its mark of the end, or with a reason why not. Nothing is extracted, and
nothing is sought: the archive may be compressed (gzip, zstd) and come from anywhere.
"""

from __future__ import annotations

import gzip
import io
import itertools
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import BinaryIO, Protocol, cast

import pyarrow as pa

from aesthetic_filter.errors import ShardError
from aesthetic_filter.filenames import is_image
from aesthetic_filter.formats import LARGEST_IMAGE, Shard
from aesthetic_filter.storage import Source

LINK = "is a link within the archive, not an image"

# Both as webdataset.tariterators has them: a member's key and extension, and what is no sample.
_KEY = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_META = re.compile(r"__[^/]*__($|/)")

_READ_BYTES = 1 << 16
_LARGEST_HEADER = 16 << 20  # a long name, or a PAX header
_LONGEST_PADDING = 1 << 20  # GNU tar pads to 10 KB, no usual blocking factor to more than this
_BAD_HEADER = "a header is damaged"


def is_meta(name: str) -> bool:
    """Whether WebDataset passes over a member of this name, as one about the archive."""
    return bool(_META.match(name))


def _split_name(name: str) -> tuple[str, str] | None:
    """A member's key and extension; None if it belongs to no sample.

    As WebDataset has it, but for hidden files within folders, such as macOS's ``a/._b.jpg``, which
    it takes for samples of their own.
    """
    match = _KEY.match(name)
    if match is None or is_meta(name) or name.rpartition("/")[2].startswith("."):
        return None
    return match.group(1), match.group(2)


@dataclass(frozen=True)
class Member:
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
        """Whether it is an image, by its extension."""
        return is_image(self.extension)


class _DamageError(Exception):
    """A header that tarfile would take for the archive's end; the message is the reason."""


class _Header(tarfile.TarInfo):
    """Raises :class:`_DamageError` where tarfile is content to find no further member."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _Header:
        try:
            return super().fromtarfile(tar)
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


class Archive:
    """The members of an archive, as they come; the end of iteration is its end, or ``damage``.

    Attributes:
        damage: where iteration ended too early: why, or "" where it is just cut off.
    """

    def __init__(self, content: _Content, name: str) -> None:
        self.damage: str | None = None
        self._content, self._name = content, name
        self._tar: tarfile.TarFile | None = None
        self._samples = 0
        self._last: Member | None = None

    def samples(self) -> Iterator[tuple[str, Iterator[Member]]]:
        """Runs of members with one key."""
        for key, members in itertools.groupby(self._members(), key=attrgetter("key")):
            self._samples += 1
            yield key, members

    def read(self, member: Member) -> bytes | None:
        """The content of the member that came last, or None if it can't be had."""
        if member.problem is not None or self._tar is None:
            return None
        try:
            file = self._tar.extractfile(member.info)
            return file.read() if file is not None else None
        except (ShardError, MemoryError):
            raise
        except Exception as error:
            self.damage = self._reason(error)
            return None

    def describe_damage(self) -> str:
        """In one line, with the number of samples that are whole."""
        last_is_cut = self._last is not None and self._content.given < self._last.end
        why = f" ({self.damage})" if self.damage else ""
        return f"cut short after {self._samples - last_is_cut:,} samples{why}"

    def _members(self) -> Iterator[Member]:
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
            self._last = Member(info.name, *split, problem, end, info)
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
        except (ShardError, MemoryError):
            raise
        except Exception as error:  # whatever its parser stumbles over: ValueError, IndexError, ...
            if self._tar is None:
                raise ShardError(self._name, self._why_none(error)) from None
            self.damage = self._reason(error)
            return None

    def _check_end(self, tar: tarfile.TarFile) -> None:
        """Read what comes behind the mark of the end: a compressed file's checksum is there."""
        padding = 0
        rest = cast(BinaryIO, tar.fileobj)
        while block := rest.read(_READ_BYTES):
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
def open_archive(source: Source, shard: Shard) -> Iterator[Archive]:
    """A shard that is one archive."""
    with source.open(shard.files[0]) as raw:
        yield Archive(_Content(raw, shard.name), shard.name)
