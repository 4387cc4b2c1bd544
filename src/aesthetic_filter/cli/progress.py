"""How a person sees how far something is: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aesthetic_filter.progress import Progress


@contextmanager
def show_progress(quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """A progress bar on a terminal, a plain line now and then elsewhere, or nothing."""
    if quiet:
        yield _with_notes(lambda _: None)
    elif sys.stderr.isatty():
        with _bar() as show:
            yield show
    else:
        yield _with_notes(Lines())


def _with_notes(
    show: Callable[[Progress], None], say: Callable[[str], None] | None = None
) -> Callable[[Progress], None]:
    """Also print what else a person should know, each line once."""
    said = 0

    def report(progress: Progress) -> None:
        nonlocal said
        for note in progress.notes[said:]:
            (say or (lambda line: print(line, file=sys.stderr)))(f"aesthetic-filter: {note}")
        said = len(progress.notes)
        show(progress)

    return report


def rate(rows: int, seconds: float) -> str:
    """Rows per second, as text."""
    found = rows / max(seconds, 1e-3)
    return f"{found:,.0f}" if found >= 10 else f"{found:.2g}"


class Lines:
    """A line every ten seconds."""

    EVERY = 10.0

    def __init__(self) -> None:
        self._started = self._printed = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        """Print one, if it is time."""
        now = time.monotonic()
        if now - self._printed < self.EVERY:
            return
        self._printed = now
        elapsed = now - self._started
        share = progress.bytes / max(progress.total_bytes, 1)
        left = f", about {elapsed / share - elapsed:,.0f} s left" if share > 0.01 else ""
        print(
            f"{progress.finished:,} of {progress.shards:,} shards, {progress.rows:,} rows, "
            f"{rate(progress.rows, elapsed)} rows/s{left}",
            file=sys.stderr,
            flush=True,
        )


@contextmanager
def _bar() -> Iterator[Callable[[Progress], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[shards]}  {task.fields[rows]}"),
        TimeRemainingColumn(),
    )
    started, shown = time.monotonic(), 0.0
    bar = Bar(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task("", total=None, shards="", rows="")

    def show(progress: Progress) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown < 0.1:
            return
        shown = now
        bar.start()  # not before there is something to show: a download has a bar of its own
        bar.update(
            task,
            total=progress.total_bytes,
            completed=progress.bytes,
            shards=f"{progress.finished:,}/{progress.shards:,} shards",
            rows=f"{progress.rows:,} rows, {rate(progress.rows, now - started)}/s",
        )

    try:
        yield _with_notes(show, lambda line: bar.console.print(line, markup=False))
    finally:
        bar.stop()


@contextmanager
def show_thumbnails(quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar while thumbnails are made, on a terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("images", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
