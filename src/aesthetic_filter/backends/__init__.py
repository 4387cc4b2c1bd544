"""Where the shards are worked on: on this machine, or on a Ray cluster. One module each.

A backend is handed a :class:`Plan` and the shards that are left, and turns each into a finished
part. What happens to a row is the same everywhere: see :mod:`aesthetic_filter.steps`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import pyarrow as pa

from aesthetic_filter.errors import UsageError
from aesthetic_filter.formats import Shard
from aesthetic_filter.heads import Head
from aesthetic_filter.progress import Recorder
from aesthetic_filter.run_folder import Part, RunFolder
from aesthetic_filter.scoring import count_foreign
from aesthetic_filter.stages import ImageEmbeddingStage, Opened
from aesthetic_filter.steps import Step

NAMES = ("local", "ray")


@dataclass(frozen=True)
class Plan:
    """What a run does.

    Attributes:
        folder: where the parts go.
        opened: the source.
        before: the steps before embedding; all of them, where the source has embeddings.
        embedding: the embedding stage; None where the source has embeddings.
        after: the steps after it, scoring among them.
        head: the head.
        keep_images: whether steps after the embedding want ``image``.
        recorder: told of everything that happens.
        keep_going: record a broken shard and go on.
    """

    folder: RunFolder
    opened: Opened
    before: tuple[Step, ...]
    embedding: ImageEmbeddingStage | None
    after: tuple[Step, ...]
    head: Head
    keep_images: bool
    recorder: Recorder
    keep_going: bool

    def write(self, shard: Shard, tables: Iterable[pa.Table]) -> Part:
        """Write a shard's part: its scored rows, in order."""
        counted = ((table, count_foreign(table, self.head)) for table in tables)
        return self.folder.write_part(shard.name, shard.version, counted)

    def broken(self, shard: Shard, why: str) -> None:
        """Record a shard that is left behind."""
        self.recorder.progress.broken[shard.name] = why
        self.folder.part_path(shard.name).unlink(missing_ok=True)  # of what the shard was before


class Backend(Protocol):
    """What a backend looks like from outside. It is a context manager."""

    def __enter__(self) -> Backend: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def describe(self, stage: ImageEmbeddingStage) -> dict[str, Any]:
        """The encoder and the preprocessing that the stage has where the work is done."""
        ...

    def run(self, plan: Plan, shards: Sequence[Shard]) -> list[Part]:
        """Turn each shard into a part; the first failure ends it unless ``plan.keep_going``."""
        ...


def find_backend(
    name: str, *, workers: int | None = None, ray_address: str | None = None
) -> Backend:
    """The backend of this name.

    Raises:
        UsageError: there is none, or an option means nothing to it.
    """
    if name not in NAMES:
        raise UsageError(f"there is no backend {name!r}; there are: {', '.join(NAMES)}")
    if name == "ray":
        from aesthetic_filter.backends.ray import RayBackend

        return RayBackend(ray_address, workers=workers)
    if ray_address is not None:
        raise UsageError("a Ray address goes with the backend ray")
    from aesthetic_filter.backends.local import LocalBackend

    return LocalBackend(workers)
