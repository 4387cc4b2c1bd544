"""The kept rows without their images, to write: a Parquet file of the scores' columns."""

from __future__ import annotations

from aesthetic_filter.formats import parquet

ENDING = ".parquet"

write = parquet.write
