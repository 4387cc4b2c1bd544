"""Which stages a pipeline has, in which order, and whether they fit together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from aesthetic_filter.errors import PipelineError
from aesthetic_filter.identity import FUNCTIONS, short_digest, told
from aesthetic_filter.stages import (
    ImageAestheticFilterStage,
    ImageEmbeddingStage,
    ImageReaderStage,
    ImageWriterStage,
)
from aesthetic_filter.steps import LeaveOut, OwnStep, ScoreStep, Step, fingerprint, name_fingerprint
from aesthetic_filter.table import EMBEDDING, IMAGE, IMAGE_DATA

OwnStage = Callable[[pa.Table], pa.Table]

_ONCE = (ImageEmbeddingStage, ImageAestheticFilterStage)


@dataclass(frozen=True)
class Arrangement:
    """A pipeline's stages by what they are for.

    Attributes:
        reader: the source.
        before: the user's own stages before the embedding, or before the scoring.
        embedding: the embedding stage; None where the source has embeddings.
        between: own stages between embedding and scoring.
        scoring: the filter stage.
        after: own stages after it.
        writer: where what is kept goes, if anywhere.
    """

    reader: ImageReaderStage
    before: tuple[OwnStage, ...]
    embedding: ImageEmbeddingStage | None
    between: tuple[OwnStage, ...]
    scoring: ImageAestheticFilterStage
    after: tuple[OwnStage, ...]
    writer: ImageWriterStage | None

    @property
    def drops_inside(self) -> bool:
        """Whether the threshold is applied as the rows go by, since own stages follow it.

        If not, choosing comes last, and another threshold scores nothing again.
        """
        return bool(self.after)

    @property
    def wants_images(self) -> bool:
        """Whether stages after the embedding may look at the images themselves."""
        keeps = self.embedding is None or not self.embedding.remove_image_data
        return keeps and bool(self.between or self.after)

    @property
    def gives_embeddings(self) -> bool:
        """Whether one of the user's own stages does."""
        return any(EMBEDDING in _columns(stage, "gives") for stage in self.before)

    def identity(self) -> list[str]:
        """What makes the user's own stages what they are, for the provenance."""
        named = [_identity(stage) for stage in self.before]
        if self.between:
            named += [type(self.embedding).__name__, *map(_identity, self.between)]
        if self.drops_inside:
            threshold = self.scoring.score_threshold
            named.append(f"score_threshold {threshold if threshold is None else float(threshold)}")
        return named + [_identity(stage) for stage in self.after]

    def steps(self, *, keep_embeddings: bool) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
        """What is done with each table before it is embedded, and after."""
        threshold = self.scoring.score_threshold if self.drops_inside else None
        scoring = ScoreStep(
            self.scoring.loaded_head, threshold, num_gpus=self.scoring.num_gpus_per_worker
        )
        gone = (IMAGE, IMAGE_DATA) if keep_embeddings else (IMAGE, IMAGE_DATA, EMBEDDING)
        before: list[Step] = [*map(_own, self.before)]
        after: list[Step] = [*map(_own, self.between), scoring, *map(_own, self.after)]
        if self.embedding is None and keep_embeddings:
            before.insert(0, fingerprint)
            after.append(name_fingerprint)
        return tuple(before), (*after, LeaveOut(gone))


def arrange(stages: Sequence[Any]) -> Arrangement:
    """The stages by what they are for.

    Raises:
        PipelineError: there is no source, or nothing that scores.
    """
    if not stages:
        raise PipelineError("a pipeline needs stages: an ImageReaderStage first")
    scoring = _only(stages, ImageAestheticFilterStage)
    if scoring is None:
        raise PipelineError(
            "a pipeline needs an ImageAestheticFilterStage; score_threshold=None keeps everything"
        )
    embedding = _only(stages, ImageEmbeddingStage)
    writer = stages[-1] if isinstance(stages[-1], ImageWriterStage) else None
    middle = list(stages[1:-1] if writer else stages[1:])
    place = middle.index(scoring)
    first, after = middle[:place], middle[place + 1 :]
    before, between = first, []
    if embedding is not None:
        place = first.index(embedding)
        before, between = first[:place], first[place + 1 :]
    return Arrangement(
        stages[0], tuple(before), embedding, tuple(between), scoring, tuple(after), writer
    )


def check_stage(before: Sequence[Any], stage: Any) -> None:
    """Refuse a stage that does not fit behind those before it.

    Raises:
        PipelineError: it does not, and why.
    """
    label = stage_label(stage)
    if not before:
        if not isinstance(stage, ImageReaderStage):
            raise PipelineError(
                f"{label}: stands first, where the source has to be: an ImageReaderStage"
            )
        return
    if isinstance(before[-1], ImageWriterStage):
        raise PipelineError(f"{label}: nothing can follow {stage_label(before[-1])}")
    if isinstance(stage, ImageReaderStage):
        raise PipelineError(f"{label}: a pipeline has one source, and it stands first")
    if isinstance(stage, type):
        raise PipelineError(f"{label}: is a class; give an object: {stage.__name__}(...)")
    if isinstance(stage, _ONCE) and any(isinstance(s, type(stage)) for s in before):
        raise PipelineError(f"{label}: there is one already; its results would be overwritten")
    if isinstance(stage, _ONCE) and type(stage).__call__ not in (c.__call__ for c in _ONCE):
        raise PipelineError(
            f"{label}: has a __call__ of its own, which a pipeline would not use; let it be a "
            "class of its own, with `needs` and `gives`"
        )
    if not callable(stage) and not isinstance(stage, ImageWriterStage):
        raise PipelineError(f"{label}: cannot be called with a table")
    given = [name for s in before for name in _columns(s, "gives")]
    for need in _columns(stage, "needs"):
        if need not in given:
            raise PipelineError(
                f"{label}: needs {need!r}, which no stage before it gives"
                f"{_HINTS.get(need, '')} (so far: {', '.join(dict.fromkeys(given))})"
            )


_HINTS = {
    EMBEDDING: ": put an ImageEmbeddingStage before it",
    "aesthetic_score": ": put an ImageAestheticFilterStage before it",
}


def stage_label(stage: Any) -> str:
    """What a stage is called: its ``name``, or its class's, or the function's."""
    name = getattr(stage, "name", None)
    if isinstance(name, str):
        return name
    named = stage if hasattr(stage, "__qualname__") else type(stage)
    return str(named.__qualname__)


def describe_stage(stage: Any) -> tuple[str, str, str]:
    """A stage's columns, its resources on Ray, and its settings, as text."""
    needs, gives = _columns(stage, "needs"), _columns(stage, "gives")
    flow = " -> ".join(filter(None, (", ".join(needs), ", ".join(gives))))
    if isinstance(stage, ImageReaderStage | ImageWriterStage):
        resources = ""
    elif isinstance(stage, ImageEmbeddingStage) and stage.num_gpus_per_worker is None:
        resources = "GPUs: 0.25 each, if there are any"
    else:
        gpus = getattr(stage, "num_gpus_per_worker", 0) or 0
        resources = f"GPUs: {gpus:g} each" if gpus else "processors"
    return flow, resources, _settings(stage)


def _settings(stage: Any) -> str:
    if isinstance(stage, ImageReaderStage):
        return str(stage.source)
    if isinstance(stage, ImageWriterStage):
        return f"{stage.output_dir} ({stage.format})"
    if isinstance(stage, ImageAestheticFilterStage):
        threshold = stage.score_threshold
        return "only scores" if threshold is None else f"score_threshold {threshold:g}"
    if isinstance(stage, ImageEmbeddingStage):
        size = stage.model_inference_batch_size
        return f"batches of {size}" if size else ""
    return ""


def _columns(stage: Any, attribute: str) -> tuple[str, ...]:
    names = getattr(stage, attribute, ())
    return (names,) if isinstance(names, str) else tuple(names)


def _identity(stage: Any) -> str:
    """What tells a stage from another one, or from itself with other settings, in any process."""
    described = told(stage)
    if not isinstance(stage, FUNCTIONS):
        return described
    return f"{stage_label(stage)} {short_digest(described)}"


def _own(stage: OwnStage) -> OwnStep:
    return OwnStep(stage, stage_label(stage))


def _only(stages: Sequence[Any], kind: type) -> Any:
    return next((stage for stage in stages if isinstance(stage, kind)), None)
