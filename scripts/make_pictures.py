"""Make the pictures that `make demo` scores: drawn by a formula, photographs of nothing.

    python scripts/make_pictures.py FOLDER

Writes twelve JPEGs of soft waves of colour, seeded, so the same each time, and one file that is cut
short on purpose: it fails, with the reason.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

PICTURES, SEED = 12, 20_240_229
SIZES = ((640, 480), (480, 640), (1024, 768))


def main(folder: Path) -> None:
    """Draw the pictures into ``folder``."""
    random = np.random.default_rng(SEED)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(PICTURES):
        width, height = SIZES[number % len(SIZES)]
        y, x = np.mgrid[0:height, 0:width] / min(width, height)
        bands = []
        for _ in range(3):
            across, down, phase = random.uniform(1, 9, 3)
            bands.append(np.sin(across * x + phase) * np.cos(down * y * x + phase))
        pixels = (127.5 + 127.5 * np.stack(bands, axis=-1)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.jpg", quality=90)
    whole = (folder / "00.jpg").read_bytes()
    (folder / "cut-short.jpg").write_bytes(whole[: len(whole) // 2])
    print(f"{folder}: {PICTURES} drawn pictures, and one that is cut short")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/make_pictures.py FOLDER")
    main(Path(sys.argv[1]))
