"""Read ahead: the next batches are fetched in a thread while the present one is worked on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar, cast

T = TypeVar("T")

_END = object()


def prefetch(items: Iterable[T], depth: int = 2) -> Iterator[T]:
    """Yield the items in order, up to ``depth`` of them fetched ahead.

    An exception in the source is raised here, after the items before it. Leaving the loop early
    stops the thread.
    """
    ready: queue.Queue[object] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(item: object) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def fetch() -> None:
        last: object = _END
        try:
            for item in items:
                if not put(item):
                    return
        except BaseException as error:  # whatever it is, it belongs to the consumer
            last = _Raised(error)
        put(last)

    thread = threading.Thread(target=fetch, name="aesthetic-filter-prefetch", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not _END:
            if isinstance(item, _Raised):
                raise item.error
            yield cast(T, item)
    finally:
        stopped.set()
        thread.join()


class _Raised:
    def __init__(self, error: BaseException) -> None:
        self.error = error
