"""Find the beautiful images in a collection.

Predict how much people will like each image, from the image or from the CLIP ViT-L/14 embedding
somebody already computed, then filter, rank or sample by that ``aesthetic_score``::

    import aesthetic_filter as af

    head = af.load_head()                        # the reference head, bundled
    scores = head(embeddings)                    # (N, 768) -> (N,) float32
    scores = af.ImageScorer()(images)            # paths, bytes, PIL images, arrays -> (N,) float32
    ds = af.score("photos/", out="scores/")      # resumable; or embeddings, tars, Parquet
    kept = af.open_scores("scores/").select(top_fraction=0.1, per="source")
    print(kept.summary())
    kept.write("kept/")

Names load when they are first used, so importing the package costs nothing.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aesthetic_filter.clip.options import ImageOptions as ImageOptions
    from aesthetic_filter.clip.reward import AestheticReward as AestheticReward
    from aesthetic_filter.errors import AestheticFilterError as AestheticFilterError
    from aesthetic_filter.errors import WrongEmbeddingsError as WrongEmbeddingsError
    from aesthetic_filter.heads import Head as Head
    from aesthetic_filter.heads import load_head as load_head
    from aesthetic_filter.heads import save_head as save_head
    from aesthetic_filter.heads.convert import convert as convert_head
    from aesthetic_filter.images import ImageBatch as ImageBatch
    from aesthetic_filter.images import ImageObject as ImageObject
    from aesthetic_filter.pipeline import Pipeline as Pipeline
    from aesthetic_filter.pipeline import score as score
    from aesthetic_filter.progress import Progress as Progress
    from aesthetic_filter.result import Result as Result
    from aesthetic_filter.scorer import ImageScorer as ImageScorer
    from aesthetic_filter.scorer import Ranked as Ranked
    from aesthetic_filter.scores import Scores as Scores
    from aesthetic_filter.scores import Summary as Summary
    from aesthetic_filter.scores import open_scores as open_scores
    from aesthetic_filter.selection.engine import Counts as Counts
    from aesthetic_filter.selection.engine import Selection as Selection
    from aesthetic_filter.stages import ImageAestheticFilterStage as ImageAestheticFilterStage
    from aesthetic_filter.stages import ImageEmbeddingStage as ImageEmbeddingStage
    from aesthetic_filter.stages import ImageReaderStage as ImageReaderStage
    from aesthetic_filter.stages import ImageWriterStage as ImageWriterStage

    __version__: str

_WHERE = {
    "AestheticFilterError": "errors:AestheticFilterError",
    "AestheticReward": "clip.reward:AestheticReward",
    "WrongEmbeddingsError": "errors:WrongEmbeddingsError",
    "Counts": "selection.engine:Counts",
    "Head": "heads:Head",
    "ImageAestheticFilterStage": "stages:ImageAestheticFilterStage",
    "ImageBatch": "images:ImageBatch",
    "ImageEmbeddingStage": "stages:ImageEmbeddingStage",
    "ImageObject": "images:ImageObject",
    "ImageOptions": "clip.options:ImageOptions",
    "ImageReaderStage": "stages:ImageReaderStage",
    "ImageScorer": "scorer:ImageScorer",
    "ImageWriterStage": "stages:ImageWriterStage",
    "Pipeline": "pipeline:Pipeline",
    "Progress": "progress:Progress",
    "Ranked": "scorer:Ranked",
    "Result": "result:Result",
    "Scores": "scores:Scores",
    "Selection": "selection.engine:Selection",
    "Summary": "scores:Summary",
    "convert_head": "heads:convert",
    "load_head": "heads:load_head",
    "open_scores": "scores:open_scores",
    "save_head": "heads:save_head",
    "score": "pipeline:score",
}

__all__ = [  # noqa: RUF022  (as in _WHERE)
    "AestheticFilterError",
    "AestheticReward",
    "WrongEmbeddingsError",
    "Counts",
    "Head",
    "ImageAestheticFilterStage",
    "ImageBatch",
    "ImageEmbeddingStage",
    "ImageObject",
    "ImageOptions",
    "ImageReaderStage",
    "ImageScorer",
    "ImageWriterStage",
    "Pipeline",
    "Progress",
    "Ranked",
    "Result",
    "Scores",
    "Selection",
    "Summary",
    "convert_head",
    "load_head",
    "open_scores",
    "save_head",
    "score",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("aesthetic-filter")
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module, _, attribute = _WHERE[name].partition(":")
    found: object = getattr(import_module(f"{__name__}.{module}"), attribute)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
