"""Where files are: local paths, globs and URIs. The only user of fsspec."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

from aesthetic_filter.errors import MissingExtraError, ShardError, SourceError

_EXTRAS = {
    "s3": "s3",
    "s3a": "s3",
    "gs": "gcs",
    "gcs": "gcs",
    "abfs": "azure",
    "abfss": "azure",
    "az": "azure",
}
_GLOB = set("*?[")


@dataclass(frozen=True)
class File:
    """One file of a source.

    Attributes:
        name: its path relative to the source's root, with ``/``; unique within the source.
        path: its path within the file system.
        size: in bytes.
        version: what changes when its content does (modification time, or the store's ETag).
    """

    name: str
    path: str
    size: int
    version: str


@dataclass(frozen=True)
class Source:
    """The files under a path, glob or URI, listed once.

    Attributes:
        uri: what the user gave, made absolute where it is a local path.
        files: by name, hidden ones left out.
        root: the folder that the names are relative to, as a path within the file system.
        filesystem: an fsspec file system.
    """

    uri: str
    files: tuple[File, ...]
    root: str
    filesystem: Any

    def open(self, file: File) -> BinaryIO:
        """Open a file for reading in binary.

        Raises:
            ShardError: it is no longer there, or may not be read.
        """
        try:
            if self.is_local:
                return Path(file.path).open("rb", buffering=0)
            return cast(BinaryIO, self.filesystem.open(file.path, "rb"))
        except FileNotFoundError:
            raise ShardError(file.name, "it was there when the run began and is gone now") from None
        except OSError as error:
            raise ShardError(file.name, error.strerror or str(error)) from None

    def without(self, folder: Path) -> Source:
        """The same source less what lies in ``folder``: a run does not read what it writes."""
        if not self.is_local:
            return self
        inside = os.path.normpath(folder.absolute()) + "/"
        files = tuple(file for file in self.files if not file.path.startswith(inside))
        if not files:
            raise SourceError(f"{self.uri}: holds no files but those in {folder}")
        return replace(self, files=files)

    @property
    def is_local(self) -> bool:
        """Whether the files lie on this machine."""
        return "file" in self.filesystem.protocol


def natural_order(name: str) -> list[str | int]:
    """A key to sort names by, in which ``x_2`` comes before ``x_10``."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def list_source(location: str | os.PathLike[str]) -> Source:
    """List the files of a folder (with its subfolders), a single file, a glob or a URI.

    Files and folders whose name begins with ``.`` or ``_`` are left out, as Spark, Hive and Hugging
    Face do, unless named outright.

    Raises:
        SourceError: there is nothing.
        MissingExtraError: the URI's scheme needs a package that is not installed.
    """
    import fsspec

    text = os.fspath(location)
    scheme = text.partition("://")[0] if "://" in text else "file"
    if scheme == "file" and "://" not in text:
        text = os.path.normpath(Path(text).expanduser().absolute())
    try:
        filesystem, path = fsspec.core.url_to_fs(text)
    except ImportError as error:
        if scheme in _EXTRAS:
            need = f"{location}: reading {scheme}:// needs a package that is not installed"
            raise MissingExtraError(need, _EXTRAS[scheme]) from None
        raise SourceError(f"{location}: {error}") from None
    except ValueError as error:
        raise SourceError(f"{location}: {error}") from None
    try:
        found, root = _find(filesystem, path)
    except FileNotFoundError:
        found, root = {}, path
    except OSError as error:
        raise SourceError(f"{location}: cannot be listed: {error}") from None
    except Exception as error:  # each store raises its own kinds: no credentials, no such bucket
        raise SourceError(f"{location}: cannot be listed: {error}") from None
    files = tuple(
        File(name, info["name"], int(info.get("size") or 0), _version(info))
        for name, info in sorted(found.items(), key=lambda item: natural_order(item[0]))
    )
    if not files:
        is_folder = filesystem.isdir(path) if not _GLOB & set(path) else False
        problem = "holds no files" if is_folder else "there is nothing there"
        raise SourceError(f"{location}: {problem}")
    return Source(text, files, root, filesystem)


def _find(filesystem: Any, path: str) -> tuple[dict[str, dict[str, Any]], str]:
    """The files by relative name, and the root that the names are relative to."""
    path = path.rstrip("/") or "/"
    if _GLOB & set(path) and not filesystem.exists(path):
        parts = path.split("/")
        first = next(i for i, part in enumerate(parts) if _GLOB & set(part))
        root = "/".join(parts[:first])
        matched = filesystem.glob(path, detail=True)
        files: dict[str, dict[str, Any]] = {}
        for p, info in matched.items():
            if info["type"] != "file" and filesystem.isdir(p):  # a link is of neither type
                files |= filesystem.find(p, detail=True)
            else:
                files[p] = info
    elif filesystem.isfile(path):
        root = path.rpartition("/")[0]
        info = filesystem.info(path)
        return {path.rpartition("/")[2]: info}, root
    else:
        root = path
        files = filesystem.find(path, detail=True)
    # A store may answer with or without a leading slash, or with the protocol's bucket in front.
    prefix = root.strip("/") + "/" if root.strip("/") else ""
    named = {p.lstrip("/").removeprefix(prefix): info for p, info in files.items()}
    return {name: info for name, info in named.items() if not _hidden(name)}, root


def _hidden(name: str) -> bool:
    return any(part.startswith((".", "_")) for part in name.split("/"))


def _version(info: dict[str, Any]) -> str:
    for key in ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated"):
        if info.get(key) is not None:
            return str(info[key]).strip('"')
    return ""
