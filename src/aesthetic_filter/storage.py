"""Where files are: local paths, globs and URIs. The only user of fsspec."""

from __future__ import annotations

import os
import posixpath
import re
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO, cast

from aesthetic_filter.errors import ImageError, MissingExtraError, ShardError, SourceError
from aesthetic_filter.filenames import is_image

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
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")

MOST_NAMES = 1_000_000
"""How many names the braces in a location may stand for."""

WORKERS = 16
"""How many requests are made of a remote store at once."""

GONE = "file is gone"

MADE_HERE = ("_run.json", "_selection.json")
"""Files that only folders have which this program wrote."""


@dataclass(frozen=True)
class File:
    r"""One file of a source.

    Attributes:
        name: its path relative to the source's root, with ``/``; unique within the source, and
            valid text: bytes that are not UTF-8 are written out, as ``\xff``.
        path: its path within the file system, as it really is.
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

    def address(self, file: File) -> str:
        """Where a file is, as a person would write it: a path on this machine, or a URI."""
        path = file.path if self.is_local else str(self.filesystem.unstrip_protocol(file.path))
        return valid_text(path)

    def read_whole(self, file: File, largest: int) -> bytes:
        """All bytes of a file.

        Args:
            file: one of ``files``.
            largest: of more bytes than this, nothing is read.

        Raises:
            ImageError: it is gone, too large, or cannot be read; the message is the reason.
        """
        if self.is_local:
            return _read_local(file.path, largest)
        return _read_remote(self.filesystem, file.path, file.size, largest)

    def resolve(self, path: str, beside: File) -> str:
        """The address that a path stands for which is written in a file.

        Args:
            path: a URI, absolute, or relative to the folder that ``beside`` is in. An absolute one
                is on this machine, wherever ``beside`` is.
            beside: the file it is written in.
        """
        if "://" in path:
            return path
        if self.is_local:
            return posixpath.normpath(posixpath.join(posixpath.dirname(beside.path), path))
        if path.startswith("/"):
            return posixpath.normpath(path)
        folder = str(self.filesystem.unstrip_protocol(beside.path)).rpartition("/")[0]
        scheme, _, rest = folder.partition("://")
        return f"{scheme}://{posixpath.normpath(posixpath.join(rest, path))}"

    def read_path(self, path: str, largest: int, beside: File) -> bytes:
        """All bytes of the file that a path stands for, as ``resolve`` takes it.

        Raises:
            ImageError: it is gone, too large, or cannot be read; the message is the reason.
            MissingExtraError: the URI's scheme needs a package that is not installed.
        """
        address = self.resolve(path, beside)
        protocols = self.filesystem.protocol
        own = address.partition("://")[0] in (
            (protocols,) if isinstance(protocols, str) else protocols
        )
        if not own or local_path(address) is not None:
            return read_address(address, largest)
        path = self.filesystem._strip_protocol(address)
        return _read_remote(self.filesystem, path, None, largest)

    @property
    def is_local(self) -> bool:
        """Whether the files lie on this machine."""
        return "file" in self.filesystem.protocol


def natural_order(name: str) -> list[str | int]:
    """A key to sort names by, in which ``x_2`` comes before ``x_10``."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def list_source(location: str | os.PathLike[str]) -> Source:
    """List the files of a folder (with its subfolders), a single file, a glob or a URI.

    Braces stand for what a shell would make of them: ``{00000..00999}.tar``, ``{train,val}/*.jpg``.

    Files and folders whose name begins with ``.`` or ``_`` are left out, as Spark, Hive and Hugging
    Face do, unless named outright; but cameras begin names with ``_`` too, so images are not.

    Raises:
        SourceError: there is nothing, or something that the braces name is not there.
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
    except _MissingError as error:
        raise SourceError(f"{location}: {error}") from None
    except OSError as error:
        raise SourceError(f"{location}: cannot be listed: {error}") from None
    except Exception as error:  # each store raises its own kinds: no credentials, no such bucket
        raise SourceError(f"{location}: cannot be listed: {error}") from None
    files = tuple(
        File(name, info["name"], int(info.get("size") or 0), _version(info))
        for name, info in sorted(_valid_names(found), key=lambda item: natural_order(item[0]))
    )
    if not files:
        is_folder = filesystem.isdir(path) if not _GLOB & set(path) else False
        problem = "holds no files" if is_folder else "there is nothing there"
        raise SourceError(f"{location}: {problem}")
    return Source(text, files, root, filesystem)


Infos = dict[str, dict[str, Any]]
"""What the file system says of each path."""


def _find(filesystem: Any, path: str) -> tuple[Infos, str]:
    """The files by relative name, and the root that the names are relative to."""
    path = path.rstrip("/") or "/"
    patterns, fixed = _expand(filesystem, path)
    if patterns != [path]:
        root = fixed
        return _find_all(filesystem, patterns, root), root
    if _GLOB & set(path) and not filesystem.exists(path):
        parts = path.split("/")
        first = next(i for i, part in enumerate(parts) if _GLOB & set(part))
        root = "/".join(parts[:first])
        files = _find_glob(filesystem, path)
    elif filesystem.isfile(path):
        root = path.rpartition("/")[0]
        info = filesystem.info(path)
        return {path.rpartition("/")[2]: info}, root
    else:
        root = path
        files = filesystem.find(path, detail=True)
    named = {_relative(p, root): info for p, info in files.items()}
    made_here = {folder for name in named if (folder := _folder_made_here(name))}
    return {
        name: info
        for name, info in named.items()
        if not _hidden(name) and not any(name.startswith(folder) for folder in made_here)
    }, root


def _folder_made_here(name: str) -> str:
    """The folder below the source's that a file shows to be one of scores, or of a selection.

    Whoever chooses from a folder into a folder below does not want to choose from that again.
    """
    folder, slash, base = name.rpartition("/")
    return f"{folder}{slash}" if base in MADE_HERE else ""


def _find_glob(filesystem: Any, pattern: str) -> Infos:
    """The files that a glob matches, and those in the folders it does, by path."""
    files: Infos = {}
    for path, info in filesystem.glob(pattern, detail=True).items():
        files |= _inside(filesystem, path, info)
    return files


def _inside(filesystem: Any, path: str, info: dict[str, Any]) -> Infos:
    """A file, or the files in a folder."""
    if info["type"] != "file" and filesystem.isdir(path):  # a link is of neither type
        return cast(Infos, filesystem.find(path, detail=True))
    return {path: info}


def _relative(path: str, root: str) -> str:
    # A store may answer with or without a leading slash, or with the protocol's bucket in front.
    prefix = root.strip("/") + "/" if root.strip("/") else ""
    return path.lstrip("/").removeprefix(prefix)


class _MissingError(Exception):
    """Braces that name too much, or what is not there."""


def _expand(filesystem: Any, path: str) -> tuple[list[str], str]:
    """What the braces in a path stand for, and the folder before the first brace or glob.

    Braces that belong to a name which is there as it stands are not expanded.

    Raises:
        _MissingError: they stand for too many names.
    """
    pieces: list[list[str]] = []
    place, count = 0, 1
    if not _BRACES.search(path) or _is_there(filesystem, path):
        return [path], path
    for group in _BRACES.finditer(path):
        if count == 1 and not _GLOB & set(path[: group.start()]):
            slash = path.find("/", group.end())
            if slash > 0 and _is_there(filesystem, path[:slash]):
                continue
        meant = _alternatives(group[1])
        if meant is None:
            continue
        count *= len(meant)
        if count > MOST_NAMES:
            raise _too_many()
        pieces += [[path[place : group.start()]], meant]
        place = group.end()
    if not pieces:
        return [path], path
    pieces.append([path[place:]])
    patterns = list(dict.fromkeys("".join(parts) for parts in product(*pieces)))
    before = re.split(r"[*?\[]", pieces[0][0])[0]
    return patterns, before.rpartition("/")[0]


def _is_there(filesystem: Any, path: str) -> bool:
    try:
        return bool(filesystem.exists(path))
    except PermissionError:  # its files may be read all the same, where they are named
        return False


def _alternatives(body: str) -> list[str] | None:
    """What one pair of braces stands for; None: itself.

    Raises:
        _MissingError: too many names.
    """
    span = _RANGE.fullmatch(body)
    if not span:
        return body.split(",") if "," in body else None
    first, last = int(span[1]), int(span[2])
    if abs(last - first) >= MOST_NAMES:
        raise _too_many()
    padded = any(re.match(r"-?0\d", text) for text in span.groups())
    width = max(map(len, span.groups())) if padded else 0
    step = 1 if first <= last else -1
    return [f"{number:0{width}d}" for number in range(first, last + step, step)]


def _too_many() -> _MissingError:
    return _MissingError(f"its braces name more than {MOST_NAMES:,} files")


def _find_all(filesystem: Any, patterns: list[str], root: str) -> Infos:
    """The files that expanded braces name or match, by name relative to ``root``.

    Raises:
        _MissingError: a path without glob characters is not there.
    """
    found: Infos = {}
    named: Infos = {}
    missing: list[str] = []
    lone: list[str] = []
    folders: dict[str, list[str]] = {}
    for pattern in patterns:
        folder, _, base = pattern.rstrip("/").rpartition("/")
        folders.setdefault(folder, []).append(base)
    for folder, bases in folders.items():
        globs = [base for base in bases if _GLOB & set(base)]
        many_folders = bool(_GLOB & set(folder)) and not filesystem.exists(folder)
        if many_folders or any("**" in base for base in globs):
            for base in bases:
                found |= _find_glob(filesystem, f"{folder}/{base}")
            continue
        listing = _list_folder(filesystem, folder, one_by_one=not globs, names=len(bases))
        if listing is None:
            lone += [f"{folder}/{base}" for base in bases if base not in globs]
            for base in globs:
                found |= _find_glob(filesystem, f"{folder}/{base}")
            continue
        named |= {f"{folder}/{base}": listing[base] for base in bases if base in listing}
        missing += [f"{folder}/{b}" for b in bases if b not in listing and b not in globs]
        matches = _matcher(globs)
        for base, info in listing.items():
            if matches(base):
                found |= _inside(filesystem, info["name"], info)
    for path, its in zip(lone, _ask_each(filesystem, lone), strict=True):
        if its is None:
            missing.append(path)
        else:
            named[path] = its
    if missing:
        names = [_relative(path, root) for path in missing]
        shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        raise _MissingError(
            f"{len(names):,} of the {len(patterns):,} names in its braces are not there: {shown}"
        )
    files = {_relative(path, root): info for path, info in found.items()}
    files = {name: info for name, info in files.items() if not _hidden(name)}
    for path, info in named.items():  # outright: only what lies below can be hidden
        for inside, one in _inside(filesystem, info["name"], info).items():
            below = _relative(inside, path)
            if inside.strip("/") == path.strip("/") or not _hidden(below):
                files[_relative(inside, root)] = one
    return files


def _list_folder(filesystem: Any, folder: str, one_by_one: bool, names: int) -> Infos | None:
    """What is in a folder, by name; None where asking for each name costs less, or is all one can.

    A local file's own record costs next to nothing, and a web server has no listings.
    """
    protocols = (
        {filesystem.protocol} if isinstance(filesystem.protocol, str) else set(filesystem.protocol)
    )
    if protocols & {"http", "https"} or (one_by_one and (names == 1 or "file" in protocols)):
        return None
    try:
        entries = filesystem.ls(folder, detail=True)
    except FileNotFoundError:
        return {}
    except OSError:  # may be read, but not listed
        return None
    return {info["name"].rstrip("/").rpartition("/")[2]: info for info in entries}


def _ask_each(filesystem: Any, paths: list[str]) -> list[dict[str, Any] | None]:
    """What the file system says of each path; None for those that are not there."""

    def ask(path: str) -> dict[str, Any] | None:
        try:
            return cast(dict[str, Any], filesystem.info(path))
        except FileNotFoundError:
            return None

    if len(paths) < 2 or "file" in filesystem.protocol:
        return [ask(path) for path in paths]
    with ThreadPoolExecutor(WORKERS, thread_name_prefix="aesthetic-filter-list") as pool:
        return list(pool.map(ask, paths))


def _matcher(globs: list[str]) -> Callable[[str], object]:
    from fsspec.utils import glob_translate

    if not globs:
        return re.compile(r"(?!)").match
    return re.compile("|".join(f"(?:{glob_translate(glob)})" for glob in globs)).match


def valid_text(text: str) -> str:
    r"""The text with bytes that were no UTF-8, as the file system's names may have, as ``\xff``."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return os.fsencode(text).decode("utf-8", "backslashreplace")
    return text


def _valid_names(found: Infos) -> Iterator[tuple[str, dict[str, Any]]]:
    odd = []
    for name, info in found.items():
        valid = valid_text(name)
        if valid == name:
            yield name, info
        else:
            odd.append((valid, info))
    taken: set[str] = set()
    for name, info in odd:
        stem, dot, extension = name.rpartition(".")
        new, number = name, 2
        while new in found or new in taken:  # a name that really has a backslash in it
            new, number = f"{stem}~{number}{dot}{extension}", number + 1
        taken.add(new)
        yield new, info


def local_path(address: str) -> str | None:
    """The path on this machine that an address is, if it is one."""
    if "://" not in address:
        return address
    return address.partition("://")[2] if address.startswith("file://") else None


def read_address(address: str, largest: int) -> bytes:
    """All bytes of the file that a path on this machine, or a URI, stands for.

    Raises:
        ImageError: it is gone, too large, or cannot be read; the message is the reason.
        MissingExtraError: the URI's scheme needs a package that is not installed.
    """
    local = local_path(address)
    if local is not None:
        return _read_local(local, largest)
    filesystem = _file_system(address.partition("://")[0])
    return _read_remote(filesystem, filesystem._strip_protocol(address), None, largest)


@cache
def _file_system(scheme: str) -> Any:
    """The file system of a scheme.

    Raises:
        ImageError: there is none.
        MissingExtraError: it needs a package that is not installed.
    """
    import fsspec

    try:
        return fsspec.filesystem(scheme)
    except ImportError as error:
        if scheme in _EXTRAS:
            need = f"reading {scheme}:// needs a package that is not installed"
            raise MissingExtraError(need, _EXTRAS[scheme]) from None
        raise ImageError(f"file cannot be read: {error}") from None
    except ValueError:
        raise ImageError(f"file cannot be read: {scheme}:// is not known") from None


def _read_local(path: str, largest: int) -> bytes:
    try:
        # A pipe would make a blocking open wait for its other end.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise ImageError("file cannot be read: not a regular file")
            _check_size(found.st_size, largest)
            with os.fdopen(descriptor, "rb", buffering=0, closefd=False) as file:
                return cast(bytes, file.read())
        finally:
            os.close(descriptor)
    except (FileNotFoundError, NotADirectoryError):
        raise ImageError(GONE) from None
    except (OSError, ValueError) as error:  # a null byte in a path is a ValueError
        raise _unreadable(error) from None


def _read_remote(filesystem: Any, path: str, size: int | None, largest: int) -> bytes:
    try:
        if size is None:
            size = filesystem.info(path).get("size")
        _check_size(size or 0, largest)
        return cast(bytes, filesystem.cat_file(path))
    except (ImageError, MissingExtraError):
        raise
    except FileNotFoundError:
        raise ImageError(GONE) from None
    except Exception as error:  # each store raises its own kinds
        raise _unreadable(error) from None


def _check_size(size: int, largest: int) -> None:
    if size > largest:
        raise ImageError(f"file is larger than {largest >> 20} MB")


def _unreadable(error: Exception) -> ImageError:
    """The reason without the path, so that it is the same for all files."""
    reason = getattr(error, "strerror", None) or getattr(error, "message", None)
    if isinstance(error, ValueError) and not reason:
        reason = str(error)
    return ImageError(f"file cannot be read: {reason or type(error).__name__}")


def _hidden(name: str) -> bool:
    parts = name.split("/")
    if any(part.startswith(".") for part in parts):
        return True
    # Cameras begin names with "_" too: _DSC0001.JPG.
    return not is_image(parts[-1]) and any(part.startswith("_") for part in parts)


def _version(info: dict[str, Any]) -> str:
    for key in ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated"):
        if info.get(key) is not None:
            return str(info[key]).strip('"')
    return ""
