"""The formats that come in and go out. Each module here is one, found by being here.

A format module may read a source, write rows, write images, or all three. To read it has:

- ``DESCRIPTION``: one line, for the list of formats.
- ``PRECEDENCE``: where two formats match a source, the higher one reads it.
- ``GIVES``: ``"embedding"`` or ``"image"``, the column that its tables have.
- ``matches(source) -> bool``: whether this format's files are in the source, by their names where
  these tell.
- ``shards(source) -> list[Shard]``: its shards, in order; nothing is read yet if it can be helped.
- ``read(source, shard, wanted) -> Iterator[pa.Table]``: the shard's rows in batches; raises
  :class:`ShardError` for a shard that cannot be read to its end.

Tables of embeddings have ``image_id`` (string), ``embedding`` (see :mod:`aesthetic_filter.table`)
and the source's own columns, and their format also has:

- ``sample(source, shard, wanted, rows) -> pa.Table | None``: some of its rows, to look ahead.
- ``made_from(source) -> dict``, if it knows: what the embeddings were made from.

Tables of images have ``image_id``, ``image_path`` (both string), ``image`` (binary: the encoded
bytes, null where they cannot be had), ``error`` (string: why not) and the source's own columns, in
batches of at most :data:`IMAGE_ROWS` rows and about :data:`IMAGE_BYTES` bytes. What cannot be read
for one image is that row's ``error``; :class:`CutShortError` after the last row says that the shard
ends too early. Their format also has:

- ``fetch(source, shard, rows, wanted) -> Iterator[Sample]``: the samples at these row numbers
  (ascending, as ``read`` counts them), with their bytes as they lie in the source and what belongs
  to them.
- ``NUMBERED = True``, if the shards are runs of one listing, and a row's id is its file's name: a
  part beyond the last is stale.

``read``, ``sample`` and ``fetch`` also have to be safe to call from several threads at once.

In both, a source's column whose name is taken becomes ``source_NAME`` (``table.carried_names``).

To write rows a module has:

- ``ENDING``: of the files it writes, such as ``.csv``.
- ``write(path, schema, batches) -> None``: write all batches to one file.

To write images it has:

- ``IMAGE_OPTIONS``: which fields of :class:`ImageOutput` it heeds.
- ``INDEX``: a glob of the Parquet files in which it lists the rows.
- ``write_images(folder, rows, schema, options) -> None``: write all samples into an empty folder.
- ``WRITES`` (if it is not the module's name): what ``--as`` calls it.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast

import pyarrow as pa

from aesthetic_filter.errors import OutputError, SourceError
from aesthetic_filter.storage import File, Source

BATCH_ROWS = 4096
"""Rows per batch: 6 MB of float16 vectors, which stay in the last-level cache until scored."""

IMAGE_ROWS = 64
IMAGE_BYTES = 8 << 20
"""Rows, and about how many encoded bytes, a batch of images has at most."""

LARGEST_IMAGE = 512 << 20
"""Encoded bytes above which a file is refused as an image: nothing is read of it."""


@dataclass(frozen=True)
class Wanted:
    """Which columns to read.

    Attributes:
        embedding: the embedding column's name; None: found by its type and usual names.
        image_id: the id column's name; None: found by its usual names.
        others: which of the source's other columns to carry through; None: all of them.
        image: the column of images, or of their paths; None: found by its type and usual names.
    """

    embedding: str | None = None
    image_id: str | None = None
    others: tuple[str, ...] | None = None
    image: str | None = None

    def describe(self) -> dict[str, Any]:
        """As plain data, for the provenance."""
        described = {"embedding": self.embedding, "image_id": self.image_id, "others": self.others}
        return described | ({"image": self.image} if self.image else {})


@dataclass(frozen=True)
class Shard:
    """A piece of a source that is read from beginning to end and gives one output part.

    Attributes:
        name: unique within the source.
        files: the file with the embeddings, then those that go with it.
    """

    name: str
    files: tuple[File, ...]

    @property
    def size(self) -> int:
        """Bytes, all files together."""
        return sum(file.size for file in self.files)

    @property
    def version(self) -> str:
        """What changes when the content of any of its files does: a digest where they are many."""
        text = ";".join(f"{file.name}:{file.size}:{file.version}" for file in self.files)
        return text if len(self.files) <= 8 else sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Sample:
    """One image of a source, whole: its bytes, its name, and what belongs to it.

    Attributes:
        folder: of an image within an archive, the archive's path within the source, less its
            ending: ``a/00000`` for a member of ``a/00000.tar``; "" for a file of its own.
        key: the image's name within ``folder``, with ``/``, less its extension: a WebDataset key
            for a tar's member, ``holidays/DSC.0001`` for the file ``holidays/DSC.0001.JPG``. As
            the source has it: not to be trusted as a path.
        extension: of the image, as the source has it: ``JPG``, ``left.png``; no leading dot.
        read: gives the encoded bytes, untouched; raises :class:`ShardError` where they are gone.
        sidecars: what else the source has under the same key: extension to bytes.
        path: the image's own file on this machine, if it is one.
    """

    folder: str
    key: str
    extension: str
    read: Callable[[], bytes]
    sidecars: Mapping[str, bytes] = field(default_factory=dict)
    path: Path | None = None


@dataclass(frozen=True)
class ImageOutput:
    """How images are written.

    Attributes:
        shard_size: samples in a shard.
        link: "hard" or "symlink" instead of a copy; None: copy.
        score_in: "json" also puts the score into each sample's json.
    """

    shard_size: int = 10_000
    link: str | None = None
    score_in: str | None = None


ImageRow = tuple[dict[str, Any], Sample]
"""A kept row as it stands in the scores (column to value), and its sample."""


class Format(Protocol):
    """What a format module that reads looks like from outside."""

    DESCRIPTION: str
    PRECEDENCE: int
    GIVES: str

    def matches(self, source: Source) -> bool: ...
    def shards(self, source: Source) -> list[Shard]: ...
    def read(self, source: Source, shard: Shard, wanted: Wanted) -> Iterator[pa.Table]: ...


class EmbeddingFormat(Format, Protocol):
    """One that reads embeddings."""

    def sample(
        self, source: Source, shard: Shard, wanted: Wanted, rows: int
    ) -> pa.Table | None: ...


class ImageFormat(Format, Protocol):
    """One that reads images."""

    def fetch(
        self, source: Source, shard: Shard, rows: Sequence[int], wanted: Wanted
    ) -> Iterator[Sample]: ...


class Writer(Protocol):
    """What a format module that writes rows looks like from outside."""

    ENDING: str

    def write(self, path: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> None: ...


class ImageWriter(Protocol):
    """What a format module that writes images looks like from outside."""

    IMAGE_OPTIONS: tuple[str, ...]
    INDEX: str

    def write_images(
        self, folder: Path, rows: Iterator[ImageRow], schema: pa.Schema, options: ImageOutput
    ) -> None: ...


@cache
def _modules() -> dict[str, ModuleType]:
    return {
        module.name.replace("_", "-"): import_module(f"{__name__}.{module.name}")
        for module in pkgutil.iter_modules(__path__)
    }


def formats() -> dict[str, Format]:
    """The formats that can be read, by name (the module's, with ``-`` for ``_``)."""
    return {n: cast(Format, m) for n, m in _modules().items() if hasattr(m, "read")}


def find_writer(name: str) -> Writer:
    """The format of this name, to write rows.

    Raises:
        OutputError: no format of this name writes.
    """
    writers = {n: m for n, m in _modules().items() if hasattr(m, "write")}
    if name not in writers:
        known = ", ".join(sorted({*writers, *image_writers()}))
        raise OutputError(f"nothing is written as {name!r}; there are: {known}")
    return cast(Writer, writers[name])


def image_writers() -> dict[str, ImageWriter]:
    """The formats that images can be written in, by the name that ``--as`` gives them."""
    return {
        getattr(module, "WRITES", name): cast(ImageWriter, module)
        for name, module in _modules().items()
        if hasattr(module, "write_images")
    }


def find_format(source: Source, name: str | None = None) -> tuple[str, Format]:
    """The format that reads a source.

    Args:
        source: what to read.
        name: a format's name; default: told from the file names.

    Raises:
        SourceError: no such format, none that reads these files, or more than one that could.
    """
    known = formats()
    if name is not None and name not in known:
        raise SourceError(f"there is no format {name!r}; there are: {list_formats()}")
    if name is not None and known[name].shards(source):  # whoever names one knows best
        return name, known[name]
    candidates = {name: known[name]} if name else known
    matching = {n: f for n, f in candidates.items() if f.matches(source)}
    if not matching:
        endings = sorted({_ending(file.name) for file in source.files})
        what = f"{len(source.files)} file(s) ({', '.join(endings[:6])})"
        raise SourceError(
            f"{source.uri}: neither images nor embeddings found in {what}"
            + (f" as {name}" if name else "")
            + f"; formats: {list_formats()}"
        )
    highest = max(f.PRECEDENCE for f in matching.values())
    chosen = {n: f for n, f in matching.items() if highest == f.PRECEDENCE}
    if len(chosen) > 1:
        raise SourceError(
            f"{source.uri}: holds files of several formats: {' and '.join(chosen)}; "
            "say which to read with --format, or give a glob"
        )
    return next(iter(chosen.items()))


def list_formats() -> str:
    """The formats in one line, for error messages."""
    return "; ".join(f"{name} ({module.DESCRIPTION})" for name, module in formats().items())


def _ending(name: str) -> str:
    base = name.rpartition("/")[2]
    return "." + base.rpartition(".")[2] if "." in base else "no ending"
