"""Wrong input shows: other widths, other encoders, other embedding spaces.

A wrong vector does not show in its score (a 768-d vector of another encoder scores a plausible 4
to 6.6), so the source is looked at before anything is scored, and counted while it is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from aesthetic_filter.errors import (
    AestheticFilterError,
    ForeignEmbeddingsError,
    ShardError,
    SourceError,
    SpaceError,
    WrongEmbeddingsError,
)
from aesthetic_filter.formats import EmbeddingFormat, Shard, Wanted
from aesthetic_filter.heads.head import FOREIGN_BELOW, Head, wrong_width
from aesthetic_filter.storage import Source
from aesthetic_filter.table import EMBEDDING, METADATA_KEY, column_vectors

SAMPLED_SHARDS = 16
SAMPLED_ROWS = 64


def check_source(
    head: Head,
    reader: EmbeddingFormat,
    source: Source,
    shards: Sequence[Shard],
    wanted: Wanted,
    *,
    allow_foreign: bool,
) -> None:
    """Look at some rows of some shards, evenly spread, before the run begins.

    A shard that cannot be read, or that holds something else, is left for the run to report, unless
    none is as it should be.

    Raises:
        SourceError: none of the shards has an embedding column that can be found.
        WrongEmbeddingsError: none of them has vectors of floating-point numbers.
        WidthError: none of them has vectors of the head's width.
        ForeignEmbeddingsError: most rows are of another encoder, or of text.
        SpaceError: the embeddings carry the stamp of another space.
    """
    places = np.unique(np.linspace(0, len(shards) - 1, SAMPLED_SHARDS).round().astype(int))
    cosines = []
    problem: AestheticFilterError | None = None
    for shard in (shards[place] for place in places):
        try:
            table = reader.sample(source, shard, wanted, SAMPLED_ROWS)
        except ShardError:
            continue
        except (SourceError, WrongEmbeddingsError) as error:
            problem = problem or error
            continue
        if table is None or not table.num_rows:
            continue
        check_space(head, table, shard.name)
        vectors, _ = column_vectors(table.column(EMBEDDING))
        if vectors.shape[1] != head.width:
            problem = problem or wrong_width(vectors.shape[1], head)
            continue
        cosines.append(head.measure(vectors).cosines)
    if not cosines:
        if problem is not None:
            raise problem
        return
    together = np.concatenate(cosines)
    together = together[~np.isnan(together)]
    foreign = int(np.count_nonzero(head.foreign(together)))
    if foreign * 2 > len(together) and not allow_foreign:
        raise foreign_source(source, head, foreign, len(together), float(np.median(together)))


def check_space(head: Head, table: pa.Table, where: str = "") -> None:
    """Refuse embeddings stamped with another space than the head's.

    Raises:
        SpaceError: they are.
    """
    stamp = (table.schema.metadata or {}).get(METADATA_KEY)
    space = json.loads(stamp).get("space") if stamp else None
    if space and space != head.space:
        raise SpaceError(
            f"{where}{': its' if where else 'its'} embeddings are stamped {space}; "
            f"the head {head.name!r} needs {head.space}"
        )


def foreign_source(
    source: Source, head: Head, foreign: int, rows: int, median: float | None = None
) -> ForeignEmbeddingsError:
    """The one message for a source of foreign embeddings."""
    middle = "" if median is None else f" (median {median:.2f})"
    return ForeignEmbeddingsError(
        f"{source.uri}: {foreign:,} of {rows:,} rows looked at are not {head.takes}: "
        f"their cosine to where those point is below {FOREIGN_BELOW}{middle}.\n"
        "They look like another encoder's, or like text; scores for them would mean nothing. "
        "If you know better: --allow-foreign"
    )
