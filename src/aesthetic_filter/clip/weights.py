"""Files from the Hugging Face hub, pinned and checked. The only user of huggingface_hub.

The hub's own cache does the keeping: resumed downloads, mirrors (``HF_ENDPOINT``), offline mode
(``HF_HUB_OFFLINE``) and credentials work as they do everywhere else.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from aesthetic_filter.errors import ChecksumError, DownloadError, HeadError


def fetch(repo: str, file: str, revision: str, *, model_dir: str | Path | None = None) -> Path:
    """The local path of a file on the hub; downloaded on first use, then without the network.

    Args:
        repo: ``ORG/REPO``.
        file: the file's path within the repository.
        revision: a commit, tag or branch.
        model_dir: where files are kept, in the layout of the hub's cache; default: that cache.

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

    folder = None if model_dir is None else str(Path(model_dir).expanduser())
    address = f"hf://{repo}/{file}@{revision}"

    def get(*, local_only: bool) -> Path:
        return Path(
            hf_hub_download(
                repo, file, revision=revision, cache_dir=folder, local_files_only=local_only
            )
        )

    try:
        path = get(local_only=True)
    except ValueError as error:
        raise HeadError(f"{address}: {error}") from None
    except LocalEntryNotFoundError:
        try:
            # Asked outright: the download would try for half a minute where there is no network.
            get_hf_file_metadata(hf_hub_url(repo, file, revision=revision))
            path = get(local_only=False)
        except RepositoryNotFoundError:
            problem = f"the hub has no repository {repo} (or it is private: `hf auth login`)"
            raise DownloadError(f"{address}: {problem}") from None
        except RevisionNotFoundError:
            raise DownloadError(f"{address}: {repo} has no revision {revision}") from None
        except LocalEntryNotFoundError as error:
            raise DownloadError(_out_of_reach(address, model_dir, error)) from None
        except EntryNotFoundError:
            raise DownloadError(f"{address}: {repo} has no file {file} at {revision}") from None
        except Exception as error:  # each HTTP library that the hub's client has used has its own
            raise DownloadError(_out_of_reach(address, model_dir, error)) from None
    _check(path, address)
    return path


def _check(path: Path, address: str) -> None:
    """Compare a cached file with the hash that the hub gave for it.

    The cache names each blob by it: the sha256 of a large file, git's sha1 of a small one.
    """
    blob = path.resolve()
    expected = blob.name
    if len(expected) not in (40, 64) or not set(expected) <= set("0123456789abcdef"):
        raise ChecksumError(
            f"{address}: {path} stands in no cache that knows its checksum; fetch it with a file "
            "system that has symbolic links, or give the file's path instead"
        )
    data = blob.read_bytes()
    if len(expected) == 64:
        actual = hashlib.sha256(data).hexdigest()
    else:
        actual = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    if actual != expected:
        raise ChecksumError(
            f"{address}: its checksum is {actual[:12]}…, the hub said {expected[:12]}…: "
            f"not used. Delete {blob} and try again"
        )


def _out_of_reach(address: str, model_dir: str | Path | None, error: Exception) -> str:
    where = f"{model_dir}" if model_dir else "the hub's cache"
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return (
        f"{address}: not in {where}, and the hub cannot be reached ({reason}). "
        "Fetch it where there is a network and copy it here: give --model-dir, or the file's path"
    )
