"""Files from the Hugging Face hub, pinned and checked. The only user of huggingface_hub.

They are kept in the hub's own cache, in its layout; mirrors (``HF_ENDPOINT``), offline mode
(``HF_HUB_OFFLINE``) and credentials work as they do everywhere else. The bytes are fetched here
and not by ``hf_hub_download``, whose current versions throw away what an interrupted download got.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aesthetic_filter.errors import ChecksumError, DownloadError, HeadError, WeightsError

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata

ENCODER_REPO = "openai/clip-vit-large-patch14"
ENCODER_FILE = "model.safetensors"
ENCODER_REVISION = "32bd64288804d66eefd0ccbe215aa642df71cc41"
ENCODER_SHA256 = "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb"
"""Of that file at that revision: by it a copy is known that lies in no cache of the hub."""

MODEL_DIR = "AESTHETIC_FILTER_MODEL_DIR"
"""The environment variable that stands in for ``model_dir``."""

LARGE = 64 << 20
"""Bytes above which a file is not hashed at every use: after a check, a marker says it was good."""

_ENCODER = (ENCODER_REPO, ENCODER_FILE, ENCODER_REVISION)
HUB_ADDRESS = re.compile(r"hf://(?P<repo>[^/@]+/[^/@]+)/(?P<file>[^@]+)@(?P<revision>[^@/]+)")
_HASH = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")
_DISK = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ENOTDIR,
    errno.EEXIST,
}
"""What is the disk's fault, not the network's."""


@dataclass(frozen=True)
class Weights:
    """Which weights, and where they lie.

    Attributes:
        path: the file.
        name: the repository of the published encoder, ``ORG/REPO/FILE`` of another file on the
            hub, otherwise the file's name.
        revision: on the hub; None for a file of one's own.
        sha256: of the file's content.
        published: whether these are OpenAI's published weights: what the hub gave for the pinned
            revision, or a file with their sha256.
    """

    path: Path
    name: str
    revision: str | None
    sha256: str
    published: bool


def encoder_weights(
    weights: str | Path | None = None,
    *,
    model_dir: str | Path | None = None,
    quiet: bool = False,
) -> Weights:
    """The weights of the CLIP encoder; downloaded on first use, then without the network.

    Args:
        weights: a ``.safetensors`` file, or ``hf://ORG/REPO/FILE@REVISION``. Default: OpenAI's
            CLIP ViT-L/14, pinned.
        model_dir: where files from the hub are kept, see :func:`fetch`. A plain folder with
            ``model.safetensors`` right inside works too, for the default; it is not checked
            against the hub, so if its sha256 is not the published one, it is taken for a file of
            one's own (``published`` is False).
        quiet: no progress bar.

    Raises:
        WeightsError: ``weights`` is no such file or address.
        HeadError: the address names a repository that there cannot be.
        DownloadError: not cached, and the hub cannot be reached or has no such file.
        ChecksumError: the file's content is not what the hub said it would be.
    """
    if weights is None:
        plain = _plain_copy(model_dir)
        if plain is not None and cached_encoder(model_dir) is None:
            return _own_file(plain)
        return pull_encoder(model_dir=model_dir, quiet=quiet)
    text = str(weights)
    if text.startswith("hf://"):
        match = HUB_ADDRESS.fullmatch(text)
        if not match:
            raise WeightsError(
                f"{text}: weights on the hub are hf://ORG/REPO/FILE@REVISION; "
                "the revision pins them"
            )
        return _from_hub(match["repo"], match["file"], match["revision"], model_dir, quiet)
    path = Path(weights).expanduser()
    if path.suffix != ".safetensors" or not path.is_file():
        problem = "not a .safetensors file" if path.is_file() else "no such file"
        raise WeightsError(
            f"{text}: {problem}; weights are a .safetensors file, or hf://ORG/REPO/FILE@REVISION"
        )
    return _own_file(path)


def pull_encoder(*, model_dir: str | Path | None = None, quiet: bool = False) -> Weights:
    """The published encoder, from the hub or its cache and from nowhere else.

    Raises:
        DownloadError: not cached, and the hub cannot be reached.
        ChecksumError: the file's content is not what the hub said it would be.
    """
    return _from_hub(*_ENCODER, model_dir, quiet)


def cached_encoder(model_dir: str | Path | None = None) -> Path | None:
    """Where the published encoder lies in the hub's cache, unchecked; None if it does not."""
    return _cached(*_ENCODER, _folder(model_dir))


def verify_encoder(*, model_dir: str | Path | None = None) -> Weights:
    """Read the whole of the published encoder and compare its checksum; never downloads.

    Raises:
        DownloadError: it is not here.
        ChecksumError: it is damaged, or a plain copy of another file.
    """
    path, plain = cached_encoder(model_dir), _plain_copy(model_dir)
    if path is not None:
        _check(path, _address(*_ENCODER), known=ENCODER_SHA256, again=True)
        return _hub_file(path, *_ENCODER)
    if plain is None:
        where = "" if _folder(model_dir) is None else f" --model-dir {_folder(model_dir)}"
        raise DownloadError(
            f"the CLIP encoder is not in {_where(model_dir)}; "
            f"`aesthetic-filter models pull{where}` fetches it"
        )
    found = _own_file(plain)
    if not found.published:
        raise ChecksumError(
            f"{plain}: its checksum is {found.sha256[:12]}…, the published file's is "
            f"{ENCODER_SHA256[:12]}…: damaged, or other weights"
        )
    return found


def fetch(
    repo: str,
    file: str,
    revision: str,
    *,
    model_dir: str | Path | None = None,
    quiet: bool = False,
) -> Path:
    """The local path of a file on the hub; downloaded on first use, then without the network.

    An interrupted download goes on where it stood, also after ``kill -9``. Of several processes
    that want the same file one downloads it, and the others wait.

    Args:
        repo: ``ORG/REPO``.
        file: the file's path within the repository.
        revision: a commit, tag or branch.
        model_dir: where files are kept, in the layout of the hub's cache; default: the environment
            variable ``AESTHETIC_FILTER_MODEL_DIR``, or that cache.
        quiet: no progress bar. There is none either where standard error is no terminal.

    Raises:
        HeadError: ``repo`` is no name that a repository can have.
        DownloadError: the hub cannot be reached, or has no such file, and none is cached.
        ChecksumError: the file's content is not what the hub said it would be.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    folder = _folder(model_dir)
    address = _address(repo, file, revision)
    try:
        path = _cached(repo, file, revision, folder)
    except ValueError as error:
        raise HeadError(f"{address}: {error}") from None
    if path is None:
        try:
            # Asked outright: the download would try for half a minute where there is no network.
            remote = get_hf_file_metadata(hf_hub_url(repo, file, revision=revision))
            _download(repo, file, revision, remote, folder, quiet=quiet)
            # Links what was downloaded to its name.
            path = Path(hf_hub_download(repo, file, revision=revision, cache_dir=folder))
        except (DownloadError, ChecksumError):
            raise
        except RepositoryNotFoundError:
            problem = f"the hub has no repository {repo} (or it is private: `hf auth login`)"
            raise DownloadError(f"{address}: {problem}") from None
        except RevisionNotFoundError:
            raise DownloadError(f"{address}: {repo} has no revision {revision}") from None
        except LocalEntryNotFoundError as error:
            raise DownloadError(_out_of_reach(repo, file, revision, folder, error)) from None
        except EntryNotFoundError:
            raise DownloadError(f"{address}: {repo} has no file {file} at {revision}") from None
        except Exception as error:  # each HTTP library that the hub's client has used has its own
            if isinstance(error, OSError) and error.errno in _DISK:
                problem = f"cannot be kept in {_where(folder)}: {error.strerror}"
                raise DownloadError(f"{address}: {problem}") from None
            raise DownloadError(_out_of_reach(repo, file, revision, folder, error)) from None
    known = ENCODER_SHA256 if (repo, file, revision) == _ENCODER else None
    _check(path, address, known=known)
    return path


def _address(repo: str, file: str, revision: str) -> str:
    return f"hf://{repo}/{file}@{revision}"


def _folder(model_dir: str | Path | None) -> str | None:
    """Where files from the hub are kept; None is the hub's own cache."""
    chosen = model_dir or os.environ.get(MODEL_DIR)
    return str(Path(chosen).expanduser()) if chosen else None


def _where(model_dir: str | Path | None) -> str:
    return _folder(model_dir) or "the hub's cache"


def _plain_copy(model_dir: str | Path | None) -> Path | None:
    """A copy of the encoder right inside the folder, as people put it there by hand."""
    folder = _folder(model_dir)
    path = Path(folder or "", ENCODER_FILE)
    return path if folder is not None and path.is_file() else None


def _cached(repo: str, file: str, revision: str, folder: str | None) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            hf_hub_download(repo, file, revision=revision, cache_dir=folder, local_files_only=True)
        )
    except LocalEntryNotFoundError:
        return None


def _from_hub(
    repo: str, file: str, revision: str, model_dir: str | Path | None, quiet: bool
) -> Weights:
    path = fetch(repo, file, revision, model_dir=model_dir, quiet=quiet)
    return _hub_file(path, repo, file, revision)


def _hub_file(path: Path, repo: str, file: str, revision: str) -> Weights:
    """What a file in the hub's cache is, once it was checked."""
    default = (repo, file, revision) == _ENCODER
    blob = _blob(path)
    if blob is not None and len(blob.name) == 64:
        sha256 = blob.name
    else:
        sha256 = ENCODER_SHA256 if default else _sha256(path)
    published = default or sha256 == ENCODER_SHA256
    name = repo if default else f"{repo}/{file}"
    return Weights(path.absolute(), name, revision, sha256, published)


def _own_file(path: Path) -> Weights:
    path = path.absolute()
    sha256 = _sha256(path)
    if sha256 == ENCODER_SHA256:
        return Weights(path, ENCODER_REPO, ENCODER_REVISION, sha256, published=True)
    return Weights(path, path.name, None, sha256, published=False)


def _download(
    repo: str,
    file: str,
    revision: str,
    remote: HfFileMetadata,
    folder: str | None,
    *,
    quiet: bool,
) -> None:
    """Put a file's content into the cache, under the hash that names it there.

    What is there of it lies beside, in ``HASH.incomplete``; the hub's own tools know that name. It
    gets its final name only when its checksum is right.

    Raises:
        DownloadError: the connection broke and did not come back.
        ChecksumError: the content is not what the hub said it would be.
        OSError: it cannot be written.
    """
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.file_download import http_get, repo_folder_name
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, not marked
        WeakFileLock,
        build_hf_headers,
    )

    if remote.etag is None or not _HASH.fullmatch(remote.etag):
        return  # left to the hub's client; what it makes of it will not pass the check
    address = _address(repo, file, revision)
    cache = Path(folder or constants.HF_HUB_CACHE)
    name = repo_folder_name(repo_id=repo, repo_type="model")
    blob = cache / name / "blobs" / remote.etag
    lock = cache / ".locks" / name / f"{remote.etag}.lock"  # where the hub's client has it
    lock.parent.mkdir(parents=True, exist_ok=True)
    blob.parent.mkdir(parents=True, exist_ok=True)
    beside = blob.with_name(f"{blob.name}.incomplete")
    with WeakFileLock(lock):
        if blob.exists():
            return
        with beside.open("ab") as out:
            if remote.size is None or out.tell() > remote.size:
                out.truncate(0)
                out.seek(0)
            if remote.size is None or out.tell() < remote.size:
                try:
                    with _progress(quiet):
                        http_get(
                            hf_hub_url(repo, file, revision=revision),
                            out,
                            resume_size=out.tell(),
                            headers=build_hf_headers(),
                            expected_size=remote.size,
                            displayed_filename=file,
                        )
                except Exception as error:
                    if isinstance(error, OSError) and error.errno in _DISK:
                        raise
                    raise DownloadError(
                        f"{address}: the download broke off ({_reason(error)}); "
                        "what came is kept, and the same command goes on from there"
                    ) from None
            out.flush()
            os.fsync(out.fileno())  # a power cut must not leave a good name on half a file
        actual = _digest(beside, remote.etag)
        if actual != remote.etag:
            beside.unlink()
            raise ChecksumError(
                f"{address}: its checksum is {actual[:12]}…, the hub said {remote.etag[:12]}…: "
                "not used, and deleted. Try again"
            )
        beside.replace(blob)
        _mark(blob)


@contextmanager
def _progress(quiet: bool) -> Iterator[None]:
    """Whether the hub's client may show its progress bar; it shows none without a terminal."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, not marked
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if not quiet or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _check(path: Path, address: str, *, known: str | None = None, again: bool = False) -> None:
    """Compare a cached file with the hash that the hub gave for it.

    The cache names each blob by it: the sha256 of a large file, git's sha1 of a small one.

    Args:
        path: of the file in the cache.
        address: for messages.
        known: its sha256, for a copy of the cache that has files where there were links.
        again: hash it even where a marker says that it was found good before.

    Raises:
        ChecksumError: the content is another, or nothing tells what it should be.
    """
    blob = _blob(path)
    expected = known if blob is None else blob.name
    blob = blob or path
    if expected is None or not _HASH.fullmatch(expected):
        raise ChecksumError(
            f"{address}: {path} stands in no cache that knows its checksum; fetch it with a file "
            "system that has symbolic links, or give the file's path instead"
        )
    if not again and _is_marked(blob):
        return
    actual = _digest(blob, expected)
    if actual != expected:
        raise ChecksumError(
            f"{address}: its checksum is {actual[:12]}…, the hub said {expected[:12]}…: "
            f"not used. Delete {blob} and try again"
        )
    _mark(blob)


def _blob(path: Path) -> Path | None:
    """What a cached file is a link to: that bears the hash. None if it is no link.

    One step only: the blob may be a link itself, to a store that other caches share, where it is
    named by another hash.
    """
    if not path.is_symlink():
        return None
    return Path(os.path.normpath(path.parent.resolve() / path.readlink()))


def _digest(path: Path, like: str) -> str:
    """The file's sha256, or git's sha1 if ``like`` is one."""
    if len(like) == 64:
        return _sha256(path)
    with path.open("rb") as file:
        start = b"blob %d\0" % path.stat().st_size
        return hashlib.file_digest(
            file, lambda: hashlib.sha1(start, usedforsecurity=False)
        ).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _marker(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.checked")


def _state(blob: Path) -> str:
    """What changes when a file is written to or replaced; a copy has another inode as well."""
    found = blob.stat()
    return f"size {found.st_size} mtime_ns {found.st_mtime_ns} inode {found.st_ino}\n"


def _is_marked(blob: Path) -> bool:
    try:
        return _marker(blob).read_text(encoding="ascii") == _state(blob)
    except (OSError, ValueError):
        return False


def _mark(blob: Path) -> None:
    """Note beside a large file that its content was found good."""
    if blob.stat().st_size <= LARGE or _is_marked(blob):
        return
    beside = blob.with_name(f"{blob.name}.{os.getpid()}.checked")
    with suppress(OSError):  # the cache may be read-only: then it is checked each time
        beside.write_text(_state(blob), encoding="ascii")
        beside.replace(_marker(blob))


def _reason(error: Exception) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return next((line.rstrip(".") for line in lines if line), type(error).__name__)


def _out_of_reach(repo: str, file: str, revision: str, folder: str | None, error: Exception) -> str:
    problem = (
        f"{_address(repo, file, revision)}: not in {_where(folder)}, "
        f"and the hub cannot be reached ({_reason(error)})."
    )
    if (repo, file, revision) != _ENCODER:
        return problem + (
            " Fetch it where there is a network and copy it here: give --model-dir, "
            "or the file's path"
        )
    return problem + (
        "\nEither (1) run `aesthetic-filter models pull --model-dir DIR` where there is a network "
        f"and copy DIR here; (2) give such a DIR as --model-dir (or {MODEL_DIR}); "
        "or (3) score existing embeddings instead of images"
    )
