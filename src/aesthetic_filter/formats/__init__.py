"""The formats that come in and go out. Each module here is one, found by being here.

A format module may read a source, write rows, or both. To read it has:

- ``DESCRIPTION``: one line, for the list of formats.
- ``PRECEDENCE``: where two formats match a source, the higher one reads it.
- ``matches(source) -> bool``: whether this format's files are in the source, by their names.
- ``shards(source) -> list[Shard]``: its shards, in order; nothing is read yet if it can be helped.
- ``read(source, shard, wanted) -> Iterator[pa.Table]``: the shard's rows in batches, each with
  ``image_id`` (string), ``embedding`` (see :mod:`aesthetic_filter.table`) and the source's own
  columns; raises :class:`ShardError` for a shard that cannot be read to its end.
- ``sample(source, shard, wanted, rows) -> pa.Table | None``: some of its rows, for a look ahead.

``read`` and ``sample`` also have to be safe to call from several threads at once. To write it has:

- ``ENDING``: of the files it writes, such as ``.csv``.
- ``write(path, schema, batches) -> None``: write all batches to one file.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Protocol, cast

import pyarrow as pa

from aesthetic_filter.errors import OutputError, SourceError
from aesthetic_filter.storage import File, Source

BATCH_ROWS = 4096
"""Rows per batch: 6 MB of float16 vectors, which stay in the last-level cache until scored."""


@dataclass(frozen=True)
class Wanted:
    """Which columns to read.

    Attributes:
        embedding: the embedding column's name; None: found by its type and usual names.
        image_id: the id column's name; None: found by its usual names.
        others: which of the source's other columns to carry through; None: all of them.
    """

    embedding: str | None = None
    image_id: str | None = None
    others: tuple[str, ...] | None = None


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
        """What changes when the content of any of its files does."""
        return ";".join(f"{file.name}:{file.size}:{file.version}" for file in self.files)


class Format(Protocol):
    """What a format module looks like from outside."""

    DESCRIPTION: str
    PRECEDENCE: int

    def matches(self, source: Source) -> bool: ...
    def shards(self, source: Source) -> list[Shard]: ...
    def read(self, source: Source, shard: Shard, wanted: Wanted) -> Iterator[pa.Table]: ...
    def sample(
        self, source: Source, shard: Shard, wanted: Wanted, rows: int
    ) -> pa.Table | None: ...


class Writer(Protocol):
    """What a format module that writes looks like from outside."""

    ENDING: str

    def write(self, path: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> None: ...


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
    """The format of this name, to write.

    Raises:
        OutputError: no format of this name writes.
    """
    writers = {n: m for n, m in _modules().items() if hasattr(m, "write")}
    if name not in writers:
        raise OutputError(f"nothing is written as {name!r}; there are: {', '.join(writers)}")
    return cast(Writer, writers[name])


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
    candidates = {name: known[name]} if name else known
    matching = {n: f for n, f in candidates.items() if f.matches(source)}
    if not matching:
        endings = sorted({_ending(file.name) for file in source.files})
        what = f"{len(source.files)} file(s) ({', '.join(endings[:6])})"
        raise SourceError(
            f"{source.uri}: no embeddings found in {what}"
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
