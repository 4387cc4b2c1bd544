"""How fast images become what CLIP sees, side by side with what else there is.

    python benchmarks/bench_preprocess.py           about a minute
    python benchmarks/bench_preprocess.py --quick   few rounds: does it run?

From encoded JPEG (quality 90) in memory to pixels, images per second: this package's exact and fast
ways; Pillow's open, convert, resize and crop, as OpenAI does it; and the CLIP image processor of
transformers that stands on Pillow. Rivals take turns, round by round; each figure is the median
round's. The images are photographs of ../shared/golden, resized; where that is absent, noise on
gradients. At the end: how far the fast way moves pixels of those photographs.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from aesthetic_filter.clip.preprocess import SIZE, Preprocessing, preprocess

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"
SIZES = {"640x480": (640, 480), "1024x768": (1024, 768), "12 MP": (4000, 3000)}
FAST = Preprocessing(decode="fast")

Way = Callable[[bytes], Any]


def measure(quick: bool = False) -> dict[str, Any]:
    """Images per second and how far the fast way moves pixels.

    Returns:
        "speed": a list of {"size", "way", "one thread", "two threads"}, images per second;
        "moved": a list of {"image", "size", "mean", "max"}, in levels of 255.
    """
    speed = []
    found = photographs()
    for size, (width, height) in SIZES.items():
        images = [
            jpeg(image.resize((width, height), Image.Resampling.LANCZOS))
            for image in (found[:2] if quick else found[:4])
        ]
        work = images * (1 if width > 2000 else 8)
        ways = all_ways()
        times: dict[tuple[str, int], list[float]] = {(w, n): [] for w in ways for n in (1, 2)}
        with ThreadPoolExecutor(2) as pool:
            for number in range(3 if quick else 10):
                for (name, threads), seconds in times.items():
                    started = time.perf_counter()
                    if threads == 1:
                        for data in work:
                            ways[name](data)
                    else:
                        list(pool.map(ways[name], work))
                    if number:  # the first round does not count
                        seconds.append(time.perf_counter() - started)
        for name in ways:
            one, two = (len(work) / median(times[name, n]) for n in (1, 2))
            speed.append({"size": size, "way": name, "one thread": one, "two threads": two})
    return {"speed": speed, "moved": moved_pixels()}


def all_ways() -> dict[str, Way]:
    """What is compared; transformers only where it is installed."""
    ways: dict[str, Way] = {
        "exact": preprocess,
        "fast": lambda data: preprocess(data, FAST),
        "Pillow": plain,
    }
    try:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    except ImportError:
        return ways
    processor = CLIPImageProcessorPil()
    ways["transformers"] = lambda data: processor(Image.open(io.BytesIO(data)), return_tensors="np")
    return ways


def plain(data: bytes) -> NDArray[np.uint8]:
    """OpenAI's recipe, as torchvision carries it out with Pillow."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = image.size
    if width <= height:
        new = SIZE, int(SIZE * height / width)
    else:
        new = int(SIZE * width / height), SIZE
    image = image.resize(new, Image.Resampling.BICUBIC)
    left, top = round((new[0] - SIZE) / 2.0), round((new[1] - SIZE) / 2.0)
    return np.array(image.crop((left, top, left + SIZE, top + SIZE)))


def moved_pixels() -> list[dict[str, Any]]:
    """How far the fast way moves pixels, for each photograph large enough to be scaled down."""
    folders = (SHARED / "golden", SHARED / "preprocess" / "images")
    files = [path for folder in folders if folder.is_dir() for path in sorted(folder.glob("*.jpg"))]
    named = [(path.name, path.read_bytes()) for path in files]
    if named:
        named += [
            (f"{path.name}, 12 MP", jpeg(image.resize(SIZES["12 MP"], Image.Resampling.LANCZOS)))
            for path, image in zip(files, photographs(), strict=False)
        ][:4]
    rows = []
    for name, data in named:
        exact, fast = preprocess(data), preprocess(data, FAST)
        moved = np.abs(exact.values.astype(int) - fast.values)
        if moved.any():
            size = f"{exact.width}x{exact.height}"
            row = {"image": name, "size": size, "mean": float(moved.mean()), "max": moved.max()}
            rows.append(row)
    return rows


def photographs() -> list[Image.Image]:
    """Photographs, or what stands for them."""
    files = sorted((SHARED / "golden").glob("*.jpg"))
    if files:
        return [Image.open(path).convert("RGB") for path in files]
    y, x = np.mgrid[0:1200, 0:1600]
    gradient = np.stack([x / 8, y / 6, (x + y) / 12], axis=-1)
    noise = np.random.default_rng(0).normal(0, 10, gradient.shape)
    return [Image.fromarray((gradient + noise).clip(0, 255).astype(np.uint8))] * 4


def jpeg(image: Image.Image) -> bytes:
    """Encoded at quality 90."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds: does it run?")
    found = measure(parser.parse_args().quick)
    plain_one = {row["size"]: row["one thread"] for row in found["speed"] if row["way"] == "Pillow"}
    print(f"{'images/s':<24}{'one thread':>12}{'two threads':>13}{'x Pillow on one thread':>26}")
    for row in found["speed"]:
        one, two, base = row["one thread"], row["two threads"], plain_one[row["size"]]
        print(f"{row['size']:<10}{row['way']:<14}{one:>12.1f}{two:>13.1f}", end="")
        print(f"{one / base:>18.2f}{two / base:>8.2f}")
    print(f"\n{'fast: pixels moved, of 255':<48}{'size':>12}{'mean':>8}{'max':>6}")
    for row in found["moved"]:
        print(f"{row['image']:<48}{row['size']:>12}{row['mean']:>8.2f}{row['max']:>6}")
    if found["moved"]:
        mean = sum(row["mean"] for row in found["moved"]) / len(found["moved"])
        print(f"{'all':<60}{mean:>8.2f}{max(row['max'] for row in found['moved']):>6}")


if __name__ == "__main__":
    main()
