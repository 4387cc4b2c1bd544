"""The folder a selection is written to: replaced whole, or left as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aesthetic_filter.errors import OutputError
from aesthetic_filter.run_folder import scores_around, write_json
from aesthetic_filter.whole import UNFINISHED, write_whole

SELECTION_FILE = "_selection.json"
FILES_FILE = "_files.jsonl"
"""Where the files of a selection with images are listed: one path, as JSON, on a line."""

ROW_FILES = ("kept", "dropped", "failed")

_STAGING = ".new"


@contextmanager
def replaced(folder: Path, describe: Callable[[], Mapping[str, Any]]) -> Iterator[Path]:
    """Write a selection into a folder: everything of it appears, or nothing.

    What an earlier selection left there goes; what others put beside it stays.

    Args:
        folder: made if it is not there.
        describe: gives what goes into ``_selection.json``, once the files are written.

    Yields:
        An empty folder to write into.

    Raises:
        OutputError: the folder holds something else, or cannot be written.
    """
    check_folder(folder)
    staging = folder / _STAGING
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        yield staging
        _swap(folder, staging, describe())
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _swap(folder: Path, staging: Path, description: Mapping[str, Any]) -> None:
    new = [_relative(path, staging) for path in staging.rglob("*") if not path.is_dir()]
    rows_only = all(_is_row_file(name) for name in new)
    old = _ours(folder)
    for name in set(new) - set(old):
        if (folder / name).exists():
            raise OutputError(
                f"{folder / name}: is in the way, and no earlier selection wrote it; "
                "move it, or give another folder"
            )
    # First what makes all of it ours: killed from here on, the same again mends it.
    if not rows_only or (folder / FILES_FILE).exists():
        _list_files(folder, sorted({*old, *new}))
    write_json(folder / SELECTION_FILE, description)
    for name in new:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (staging / name).replace(path)
    for name in set(old) - set(new):
        (folder / name).unlink(missing_ok=True)
        _remove_empty(folder, (folder / name).parent)
    if rows_only:
        (folder / FILES_FILE).unlink(missing_ok=True)
    else:
        _list_files(folder, sorted(new))


def _ours(folder: Path) -> list[str]:
    """What an earlier selection, whole or interrupted, left in the folder."""
    try:
        lines = (folder / FILES_FILE).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]
    except FileNotFoundError:
        return [path.name for path in folder.iterdir() if _is_row_file(path.name)]


def _is_row_file(name: str) -> bool:
    return name.partition(".")[0] in ROW_FILES and "/" not in name


def _list_files(folder: Path, names: list[str]) -> None:
    lines = "".join(f"{json.dumps(name)}\n" for name in names)
    write_whole(folder / FILES_FILE, lines.encode())


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _remove_empty(folder: Path, inner: Path) -> None:
    while inner != folder and inner.exists() and not any(inner.iterdir()):
        inner.rmdir()
        inner = inner.parent


def check_folder(folder: Path, *, apart_from: Path | None = None) -> None:
    """Refuse a folder that a selection cannot be written to.

    Args:
        folder: the folder.
        apart_from: where scores will be; neither may lie in the other.

    Raises:
        OutputError: it holds something else, is none, or is not apart from the scores.
    """
    for there in (folder, *folder.parents):
        if there.is_file():
            raise OutputError(f"{there}: is a file; give a folder")
    if apart_from is not None:
        one, other = folder.resolve(), apart_from.resolve()
        if one.is_relative_to(other) or other.is_relative_to(one):
            raise OutputError(
                f"{folder}: what is kept and the scores, {apart_from}, need folders apart"
            )
    if scores_around(folder):
        raise OutputError(
            f"{folder}: lies in a folder of scores; give another for what is kept of them"
        )
    if folder.is_dir() and not (folder / SELECTION_FILE).exists():
        own = {_STAGING, FILES_FILE, FILES_FILE + UNFINISHED, SELECTION_FILE + UNFINISHED}
        strangers = [
            path.name
            for path in folder.iterdir()
            if path.name not in own and not path.name.endswith(UNFINISHED)
        ]
        if strangers:
            raise OutputError(
                f"{folder}: holds other files ({', '.join(sorted(strangers)[:3])}…); "
                "give an empty or a new folder"
            )
