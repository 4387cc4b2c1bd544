"""Work ahead in threads: the next batches, or files, are fetched while the present one is used."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar, cast

T = TypeVar("T")
R = TypeVar("R")

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


def ahead(
    items: Iterable[T],
    work: Callable[[T], R],
    workers: int,
    depth: int,
    *,
    weight: Callable[[T], int] | None = None,
    budget: int = 0,
) -> Iterator[R]:
    """Yield ``work(item)`` for each item, in order, several at a time.

    An exception, of the work or of the source of items, is raised here after the results before it.
    Leaving the loop early drops what has not begun and waits for what has.

    Args:
        items: taken in this thread, as they are needed.
        work: called in any of the threads.
        workers: how many threads.
        depth: how many items may be under way or finished and not yet yielded.
        weight: of an item; default: all weigh nothing.
        budget: what these items may weigh together; a heavier one goes alone.
    """
    left = iter(items)
    taken: list[T] = []  # an item that has yet to find room
    waiting: deque[tuple[Future[R], int]] = deque()
    held, failure, more = 0, None, True
    pool = ThreadPoolExecutor(workers, thread_name_prefix="aesthetic-filter-ahead")
    try:
        while True:
            while more and len(waiting) < depth:
                if not taken:
                    try:
                        taken.append(next(left))
                    except StopIteration:
                        more = False
                        break
                    except Exception as error:  # those before it come first
                        more, failure = False, error
                        break
                heavy = weight(taken[0]) if weight else 0
                if waiting and held + heavy > budget:
                    break
                held += heavy
                waiting.append((pool.submit(work, taken.pop()), heavy))
            if not waiting:
                break
            future, heavy = waiting.popleft()
            yield future.result()
            del future
            held -= heavy
        if failure is not None:
            raise failure
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Raised:
    def __init__(self, error: BaseException) -> None:
        self.error = error
