"""Image files in folders. Written, they keep the source's relative paths, with an index beside.

Every file is a row but those whose extension says that they are something else: one with an odd
extension or none is tried, and fails with a reason if it is no image.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from aesthetic_filter.errors import ImageError, OutputError, ShardError
from aesthetic_filter.filenames import OTHER_EXTENSIONS, UniqueNames, is_image, safe_path
from aesthetic_filter.formats import (
    IMAGE_BYTES,
    IMAGE_ROWS,
    LARGEST_IMAGE,
    ImageOutput,
    ImageRow,
    Sample,
    Shard,
    Wanted,
)
from aesthetic_filter.formats import parquet as parquet_format
from aesthetic_filter.prefetch import ahead
from aesthetic_filter.storage import GONE, File, Source, valid_text
from aesthetic_filter.table import ERROR, IMAGE, IMAGE_ID, IMAGE_PATH, SCORE, carried_names

DESCRIPTION = "image files in folders"
PRECEDENCE = 0
GIVES = "image"

WRITES = "folder"
IMAGE_OPTIONS = ("link",)

NUMBERED = True
"""The shards are runs of one listing: a part of a shard beyond the last is stale and may go.

A row is a file, and its id the file's name, wherever the listing has it by now.
"""

GROUP = 4096
"""Files in a shard."""

INDEX = "_index.parquet"
"""The file beside written images that has their rows."""

FILE = "file"
"""The index's column with an image's path relative to the folder."""

WORKERS = 16
"""How many files are read from a remote store at once."""

AHEAD_FILES = 64
AHEAD_BYTES = 64 << 20
"""How many files, and bytes of them, are read ahead from a remote store."""

INDEX_ROWS = 1024

Read = tuple[str, str, bytes | None, str | None]
"""What there is of an image: its id, its address, its bytes or why there are none."""


def matches(source: Source) -> bool:
    """Whether there are image files."""
    return any(is_image(split_extension(file.name)[1]) for file in source.files)


def shards(source: Source) -> list[Shard]:
    """Runs of the listing, of :data:`GROUP` files each."""
    files = [f for f in source.files if _last_extension(f.name).lower() not in OTHER_EXTENSIONS]
    return [
        Shard(f"images-{number:05d}", tuple(files[start : start + GROUP]))
        for number, start in enumerate(range(0, len(files), GROUP))
    ]


def read(source: Source, shard: Shard, wanted: Wanted) -> Iterator[pa.Table]:
    """The images, each with its relative name as its id."""
    with closing(_load_all(source, shard.files)) as contents:
        yield from image_tables(
            (file.name, source.address(file), *loaded)
            for file, loaded in zip(shard.files, contents, strict=True)
        )


def fetch(
    source: Source, shard: Shard, rows: Sequence[int], wanted: Wanted = Wanted()
) -> Iterator[Sample]:
    """The samples of these rows; remote ones are read ahead."""
    if len(rows) and rows[-1] >= len(shard.files):
        raise ShardError(shard.name, f"has {len(shard.files):,} files, no row {rows[-1]:,}")
    files = [shard.files[row] for row in rows]
    if source.is_local:
        for file in files:
            yield _sample(file, partial(_load, source, file), Path(file.path))
    else:
        with closing(_load_all(source, files)) as contents:
            for file, loaded in zip(files, contents, strict=True):
                yield _sample(file, partial(_given, loaded), None)


def write_images(
    folder: Path, rows: Iterator[ImageRow], schema: pa.Schema, options: ImageOutput
) -> None:
    """Write images under their relative paths, sidecars beside them, and ``_index.parquet``.

    A path that would leave the folder, or that is taken, is changed; the index says to what.

    Raises:
        OutputError: a file cannot be linked.
        ShardError: an image is gone from the source.
    """
    others = carried_names([n for n in schema.names if n not in (IMAGE_ID, SCORE)], (FILE,))
    first = [pa.field(IMAGE_ID, pa.string()), pa.field(FILE, pa.string())]
    first += [schema.field(SCORE)] if SCORE in schema.names else []
    fields = [*first, *(schema.field(old).with_name(new) for old, new in others.items())]
    index = pa.schema(fields, schema.metadata)

    def written() -> Iterator[pa.RecordBatch]:
        names = UniqueNames()
        names.take(INDEX)
        held: list[dict[str, Any]] = []
        for row, sample in rows:
            file = _write_sample(folder, names, sample, options.link)
            held.append({others.get(k, k): v for k, v in row.items()} | {FILE: file})
            if len(held) == INDEX_ROWS:
                yield pa.RecordBatch.from_pylist(held, index)
                held = []
        yield pa.RecordBatch.from_pylist(held, index)

    parquet_format.write(folder / INDEX, index, written())


def image_tables(rows: Iterable[Read]) -> Iterator[pa.Table]:
    """Images in batches of at most ``IMAGE_ROWS`` rows and about ``IMAGE_BYTES`` bytes."""
    held: list[Read] = []
    size = 0
    for row in rows:
        held.append(row)
        size += len(row[2] or b"")
        if len(held) == IMAGE_ROWS or size >= IMAGE_BYTES:
            yield image_table(held)
            held, size = [], 0
    if held:
        yield image_table(held)


def image_table(rows: Sequence[Read]) -> pa.Table:
    """One batch of images."""
    ids, addresses, contents, errors = zip(*rows, strict=True) if rows else ((),) * 4
    return pa.table(
        {
            IMAGE_ID: pa.array(ids, pa.string()),
            IMAGE_PATH: pa.array(addresses, pa.string()),
            IMAGE: pa.array(contents, pa.binary()),
            ERROR: pa.array(errors, pa.string()),
        }
    )


def split_extension(name: str) -> tuple[str, str]:
    """A name less its last extension, and that: ``a/b.c.JPG`` gives ``a/b.c`` and ``JPG``."""
    extension = _last_extension(name)
    return (name[: -len(extension) - 1], extension) if extension else (name, "")


def _last_extension(name: str) -> str:
    stem, _, extension = name.rpartition("/")[2].rpartition(".")
    return extension if stem else ""


Loaded = tuple[bytes | None, str | None]
"""A file's bytes, or why there are none."""


def _load(source: Source, file: File) -> Loaded:
    try:
        return source.read_whole(file, LARGEST_IMAGE), None
    except ImageError as error:
        return None, str(error)


def _load_all(source: Source, files: Sequence[File]) -> Generator[Loaded, None, None]:
    def weight(file: File) -> int:
        return file.size if file.size <= LARGEST_IMAGE else 0

    load = partial(_load, source)
    if source.is_local:
        yield from map(load, files)
    else:
        yield from ahead(files, load, WORKERS, AHEAD_FILES, weight=weight, budget=AHEAD_BYTES)


def _given(loaded: Loaded) -> Loaded:
    return loaded


def _sample(file: File, load: Callable[[], Loaded], path: Path | None) -> Sample:
    def read() -> bytes:
        content, why_not = load()
        if content is None:
            raise ShardError(file.name, why_not or "")
        return content

    key, extension = split_extension(file.name)
    return Sample("", key, extension, read, path=path)


def _write_sample(folder: Path, names: UniqueNames, sample: Sample, link: str | None) -> str:
    """Write an image and what belongs to it; gives the image's path relative to the folder."""
    name = f"{sample.key}.{sample.extension}" if sample.extension else sample.key
    name = f"{sample.folder}/{name}" if sample.folder else name
    longest = max((len(e.encode()) for e in sample.sidecars), default=0)
    name = safe_path(name, room=min(max(longest - len(sample.extension.encode()), 0), 64))
    while True:  # until there is a stem that all of them can share
        file = names.take(name)
        stem = _stem(file, sample.extension)
        beside = [(safe_path(f"{stem}.{e}"), content) for e, content in sample.sidecars.items()]
        if not any(other in names for other, _ in beside if other != file):
            break
    target = folder / file
    if link is None:
        _write_new(target, sample.read())
        if sample.path is not None:
            with suppress(OSError):  # its bytes are there: its time is not worth failing for
                kept = sample.path.stat()
                os.utime(target, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        sample.read()  # raises where it is not what was scored
        _link(sample, target, link)
    for other, content in beside:
        _write_new(folder / names.take(other), content)
    return file


def _stem(file: str, extension: str) -> str:
    ending = f".{extension}"
    if extension and file.endswith(ending) and not file.endswith(f"/{ending}"):
        return file[: -len(ending)]
    return split_extension(file)[0]


def _write_new(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        file.write(content)


def _link(sample: Sample, target: Path, kind: str) -> None:
    if sample.path is None:
        raise OutputError(
            "only files of their own can be linked, and "
            f"{sample.folder or sample.key} is in an archive, a table or a remote store: copy"
        )
    if not sample.path.exists():
        raise ShardError(valid_text(str(sample.path)), GONE)
    if kind == "symlink":
        target.symlink_to(sample.path.absolute())
        return
    try:
        # The file itself, where the source has a link to it.
        target.hardlink_to(sample.path.resolve())
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP):
            raise
        raise OutputError(
            f"{valid_text(str(sample.path))}: no hard link to it can be made in {target.parent} "
            f"({error.strerror}); link with --link symlink, or copy"
        ) from None
