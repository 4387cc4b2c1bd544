"""Draw landscapes of nowhere: pictures to try the report and the review on, without photographs.

    python scripts/make_landscapes.py FOLDER [COUNT]

Skies, suns and hills by formula, seeded, so the same each time; some are spoiled on purpose
(overexposed, blurred, noisy, tilted), as photographs are. Each lies in a folder named for its
season. They are synthetic: what a score says of them, it says of no photograph.
"""

from __future__ import annotations

import colorsys
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

SEED = 20_260_101
SEASONS = {"spring": 0.30, "summer": 0.15, "autumn": 0.06, "winter": 0.58}
"""Each with the hue of its hills."""

SPOILED = ("overexposed", "blurred", "noisy", "tilted")
SIZES = ((480, 320), (320, 400), (400, 400))


def main(folder: Path, count: int) -> None:
    """Draw so many landscapes into ``folder``."""
    for number in range(count):
        chance = np.random.default_rng([SEED, number])
        season = list(SEASONS)[number % len(SEASONS)]
        size = SIZES[int(chance.integers(len(SIZES)))]
        image = landscape(chance, SEASONS[season], *size)
        if chance.random() < 0.35:
            image = spoil(image, SPOILED[int(chance.integers(len(SPOILED)))], chance)
        path = folder / season / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=88)
    print(f"{folder}: {count:,} drawn landscapes")


def landscape(chance: np.random.Generator, hue: float, width: int, height: int) -> Image.Image:
    """A sky with a sun behind some ranges of hills."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    y, x = y / height, x / width
    dusk = chance.uniform(0.02, 0.12)
    top = colour((0.55 + chance.uniform(0, 0.15)) % 1, chance.uniform(0.3, 0.8), 0.85)
    low = colour(dusk, chance.uniform(0.3, 0.8), chance.uniform(0.85, 1))
    blend = np.clip(y / 0.7, 0, 1)[..., None] ** chance.uniform(0.8, 1.6)
    pixels = top * (1 - blend) + low * blend
    sun_x, sun_y, radius = chance.uniform(0.15, 0.85), chance.uniform(0.15, 0.5), 0.05
    far = np.hypot((x - sun_x) * width / height, y - sun_y)
    glow = np.exp(-far / chance.uniform(0.08, 0.25))[..., None]
    pixels = pixels * (1 - 0.7 * glow) + colour(0.13, 0.3, 1) * 0.7 * glow
    pixels[far < radius] = colour(0.14, 0.15, 1)
    ranges = int(chance.integers(2, 6))
    for number in range(ranges):
        depth = (number + 1) / ranges
        line = 0.45 + 0.4 * depth - ridge(chance, x[0], 0.16 - 0.06 * depth)
        tone = colour(
            (hue + chance.uniform(-0.05, 0.05)) % 1, 0.2 + 0.5 * depth, 0.75 - 0.5 * depth
        )
        shade = (1 - 0.35 * np.clip((y - line) / 0.4, 0, 1))[..., None]
        pixels = np.where((y > line)[..., None], tone * shade, pixels)
    return Image.fromarray((np.clip(pixels, 0, 1) * 255).astype(np.uint8))


def ridge(chance: np.random.Generator, x: NDArray[np.float32], size: float) -> NDArray[np.float32]:
    """The outline of a range of hills: a few sines."""
    line = np.zeros_like(x)
    for octave in range(1, 6):
        line += np.sin(x * chance.uniform(2, 4) * 2**octave + chance.uniform(0, 6)) / 2**octave
    return (size * line).astype(np.float32)


def colour(hue: float, saturation: float, value: float) -> NDArray[np.float32]:
    """RGB, (3,), 0 to 1."""
    return np.array(colorsys.hsv_to_rgb(hue, saturation, value), np.float32)


def spoil(image: Image.Image, how: str, chance: np.random.Generator) -> Image.Image:
    """What goes wrong with photographs."""
    if how == "blurred":
        return image.filter(ImageFilter.GaussianBlur(chance.uniform(3, 8)))
    if how == "tilted":
        return image.rotate(chance.uniform(8, 20), Image.Resampling.BICUBIC, fillcolor="black")
    pixels = np.asarray(image, np.float32)
    noise = chance.normal(0, 45, pixels.shape)
    pixels = pixels + noise if how == "noisy" else pixels * 1.9 + 60
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python scripts/make_landscapes.py FOLDER [COUNT]")
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) == 3 else 400)
