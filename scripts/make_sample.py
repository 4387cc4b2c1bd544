"""Make the sample that `make demo` scores: synthetic embeddings, not those of any real image.

    python scripts/make_sample.py FOLDER

Writes 2,000 made-up CLIP ViT-L/14 embeddings as float16 into four Parquet shards, seeded, so the
same each time. A vector is the direction in which real ViT-L/14 image embeddings point (the
reference direction that ships with the package) plus an offset for its made-up source plus
noise, at the length that CLIP gives before normalisation. Its cosine to that direction is then
near 0.6, as a real one's is, so its score is plausible, but it says nothing about any picture.

A few rows are broken on purpose, to show what becomes of them:

    6 have no embedding, 4 hold NaN, 2 are all zeros: they fail, with the reason;
    12 point somewhere else, as another encoder's would: they are scored, and counted as foreign.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from aesthetic_filter.heads.head import reference_direction

ROWS, SHARDS, SEED = 2_000, 4, 20_240_229
SOURCES = ("photographs", "paintings", "renders", "screenshots")
SIZES = ((384, 256), (640, 480), (1024, 768), (1600, 1200))


def main(folder: Path) -> None:
    """Write the shards into ``folder``."""
    random = np.random.default_rng(SEED)
    direction = reference_direction().astype(np.float64)
    offsets = random.standard_normal((len(SOURCES), 768)) * 0.5
    which = random.integers(len(SOURCES), size=ROWS)
    noise = random.standard_normal((ROWS, 768)) + offsets[which]
    vectors = 0.6 * direction + 0.8 * noise / np.linalg.norm(noise, axis=1, keepdims=True)
    order = random.permutation(ROWS)
    missing, nan, zero, foreign = np.split(order[:24], [6, 10, 12])
    vectors[foreign] = random.standard_normal((len(foreign), 768)) / np.sqrt(768)
    vectors *= random.normal(16, 1.5, size=(ROWS, 1))
    vectors[nan, 7] = np.nan
    vectors[zero] = 0

    values = pa.array(vectors.astype(np.float16).reshape(-1))
    present = np.ones(ROWS, np.bool_)
    present[missing] = False
    embeddings = pa.FixedSizeListArray.from_arrays(values, 768, mask=pa.array(~present))
    sizes = np.array(SIZES)[random.integers(len(SIZES), size=ROWS)]
    table = pa.table(
        {
            "image_id": [f"{SOURCES[s]}/{row:05d}.jpg" for row, s in enumerate(which)],
            "source": [SOURCES[s] for s in which],
            "width": pa.array(sizes[:, 0], pa.int32()),
            "height": pa.array(sizes[:, 1], pa.int32()),
            "embedding": embeddings,
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    per_shard = ROWS // SHARDS
    for shard in range(SHARDS):
        part = table.slice(shard * per_shard, per_shard)
        pq.write_table(part, folder / f"sample-{shard}.parquet", compression="zstd")
    print(f"{folder}: {ROWS:,} synthetic embeddings in {SHARDS} shards")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
