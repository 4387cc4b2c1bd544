"""How fast the vision tower is on this machine's processor, side by side with transformers.

    python benchmarks/bench_tower.py            full size, random weights: about two minutes
    python benchmarks/bench_tower.py --quick    a tiny tower: does it run?
    python benchmarks/bench_tower.py --batches  images/s by batch size, which CPU_BATCH rests on
    python benchmarks/bench_tower.py --agreement  how far embeddings are from transformers'

Rivals take turns, round by round, so that a noisy moment hits all of them; figures are the medians
of the rounds. The share is what the tower reaches of the rate of matrix products alone, round by
round: all its arithmetic, counted from the shapes, over all its time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from aesthetic_filter.clip.tower import (
    CPU_BATCH,
    DTYPES,
    PATCH,
    POSITIONS,
    PROJECTION,
    ROWS,
    choose_precision,
    load_tower,
)
from clip_weights import FULL, write_clip

TINY: dict[str, Any] = {"layers": 2, "width": 128, "mlp": 512}


def measure(quick: bool = False) -> dict[str, Any]:
    """Images/s of the tower and of transformers, and the rates of matrix products.

    Args:
        quick: a tiny tower and few rounds, to see whether it runs; the figures mean nothing.

    Returns:
        "precision": what auto chose; "batch": images at a time; "images/s": of "auto", "float32"
        and "transformers float32"; "GFLOP an image"; "GFLOP/s of products": by precision;
        "share": of those rates, of the tower in "auto" and "float32"; "times transformers": how
        many times as fast "auto" is, round by round.
    """
    size = TINY if quick else FULL
    auto = choose_precision("cpu")
    pixels = some_pixels(CPU_BATCH)
    with tempfile.TemporaryDirectory(prefix="aesthetic-filter-bench-") as folder:
        path = write_clip(Path(folder) / "clip.safetensors", **size, text=False)
        towers = {
            "auto": load_tower(path, precision=auto),
            "float32": load_tower(path, precision="float32"),
        }
        theirs = transformers_tower(path, **size)
    # Pixels to embeddings in each case, so normalising counts; it is a thousandth of the time.
    ways: dict[str, Callable[[], Any]] = {
        name: lambda tower=tower: tower(pixels) for name, tower in towers.items()
    }
    ways["transformers float32"] = lambda: theirs(pixels)
    precisions = {"auto": auto, "float32": "float32"}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    rates: dict[str, list[float]] = {name: [] for name in precisions}
    with torch.inference_mode():
        for number in range(3 if quick else 6):
            found = {name: took(way) for name, way in ways.items()}
            best = {name: product_rate(p, **size) for name, p in precisions.items()}
            if number:  # the first round warms up
                for name, time_taken in found.items():
                    seconds[name].append(time_taken / CPU_BATCH)
                for name, rate in best.items():
                    rates[name].append(rate)
    work = flops(**size)
    pairs = {name: zip(seconds[name], rates[name], strict=True) for name in precisions}
    against = zip(seconds["transformers float32"], seconds["auto"], strict=True)
    return {
        "precision": auto,
        "batch": CPU_BATCH,
        "images/s": {name: 1 / median(values) for name, values in seconds.items()},
        "GFLOP an image": work / 1e9,
        "GFLOP/s of products": {precisions[n]: median(v) / 1e9 for n, v in rates.items()},
        "share": {name: median(work / s / rate for s, rate in pairs[name]) for name in precisions},
        "times transformers": median(a / b for a, b in against),
    }


def main() -> None:
    """Print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny tower: does it run?")
    parser.add_argument("--batches", action="store_true", help="images/s by batch size")
    parser.add_argument("--agreement", action="store_true", help="with transformers")
    asked = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    if asked.batches:
        by_batch(asked.quick)
        return
    if asked.agreement:
        agreement(asked.quick)
        return
    found = measure(asked.quick)
    print(
        f"auto is {found['precision']}; {found['GFLOP an image']:.1f} GFLOP an image; "
        f"{found['batch']} images at a time\n"
    )
    print(f"  {'':<22}{'images/s':>10}{'share':>8}")
    for name, speed in found["images/s"].items():
        share = f"{found['share'][name]:.0%}" if name in found["share"] else ""
        print(f"  {name:<22}{speed:>10.3f}{share:>8}")
    print()
    for precision, rate in found["GFLOP/s of products"].items():
        print(f"  products in {precision}: {rate:.0f} GFLOP/s")
    print(f"  auto is {found['times transformers']:.2f} times as fast as transformers in float32")


def by_batch(quick: bool) -> None:
    """Images/s for several batch sizes, in turn."""
    counts = (1, 2, 3, 4, 6, 8, 12, 16)
    with tempfile.TemporaryDirectory(prefix="aesthetic-filter-bench-") as folder:
        # Six blocks tell it as well as twenty-four: they are all alike.
        size = TINY if quick else {**FULL, "layers": 6}
        path = write_clip(Path(folder) / "clip.safetensors", **size, text=False)
        towers = {name: load_tower(path, precision=name) for name in ("bfloat16", "float32")}
    batches = {count: some_pixels(count) for count in counts}
    print("images/s of a quarter of the tower, medians\n")
    print(f"  {'batch':<12}" + "".join(f"{count:>8}" for count in counts))
    for name, tower in towers.items():
        times: dict[int, list[float]] = {count: [] for count in counts}
        for number in range(3 if quick else 5):
            for count, pixels in batches.items():
                seconds = took(lambda tower=tower, pixels=pixels: tower(pixels))
                if number:
                    times[count].append(count / seconds)
        print(f"  {name:<12}" + "".join(f"{median(v):>8.2f}" for v in times.values()))


def agreement(quick: bool) -> None:
    """How far embeddings are from transformers' in float32, and from another batch size's."""
    size = TINY if quick else FULL
    pixels = photographs(4)
    with tempfile.TemporaryDirectory(prefix="aesthetic-filter-bench-") as folder:
        path = write_clip(Path(folder) / "clip.safetensors", **size, text=False)
        towers = {name: load_tower(path, precision=name) for name in ("float32", "bfloat16")}
        theirs = transformers_tower(path, **size)
    print(f"\n  {'':<12}{'cosine distance':>16}{'difference':>12}{'by batch of 1, 2, 3':>21}")
    with torch.inference_mode():
        wanted = torch.nn.functional.normalize(theirs(pixels), dim=-1).double()
        for name, tower in towers.items():
            found = tower(pixels)
            distance = 1 - torch.cosine_similarity(found.double(), wanted)
            moved = max((tower(pixels[:n]) - found[:n]).abs().max().item() for n in (1, 2, 3))
            difference = (found - wanted).abs().max().item()
            print(f"  {name:<12}{distance.max():>16.1e}{difference:>12.1e}{moved:>21.1e}")


def photographs(count: int) -> torch.Tensor:
    """(count, 224, 224, 3) uint8: real ones where there are some, else noise."""
    from aesthetic_filter.clip.preprocess import preprocess

    folder = Path(__file__).resolve().parents[2] / "shared" / "preprocess" / "images"
    found = sorted(folder.glob("*.jpg"))[:count]
    if len(found) < count:
        return some_pixels(count)
    return torch.from_numpy(np.stack([preprocess(path).values for path in found]))


def flops(*, layers: int, width: int, mlp: int) -> float:
    """Multiplications and additions for one image, in the last block only those really done."""

    def block(rows: int) -> float:
        """``rows`` ask, all positions answer."""
        queries_and_out = 2 * rows * width * 2 * width
        keys_and_values = 2 * POSITIONS * width * 2 * width
        attention = 2 * 2 * rows * POSITIONS * width
        return queries_and_out + keys_and_values + attention + 2 * rows * width * mlp * 2

    patches = 2 * (POSITIONS - 1) * 3 * PATCH**2 * width
    projection = 2 * ROWS * width * PROJECTION
    return patches + (layers - 1) * block(POSITIONS) + block(ROWS) + projection


def product_rate(precision: str, *, layers: int, width: int, mlp: int) -> float:
    """The best rate of the block's products alone, and of a large square one: FLOP/s."""
    del layers
    rows, dtype, rate = CPU_BATCH * POSITIONS, DTYPES[precision], 0.0
    shapes = [(rows, width, 3 * width), (rows, width, width), (rows, width, mlp)]
    for m, k, n in (*shapes, (rows, mlp, width), (2 * width, 2 * width, 2 * width)):
        x, weight, bias = (torch.randn(*s).to(dtype) for s in ((m, k), (n, k), (n,)))
        for _ in range(4):
            taken = took(
                lambda x=x, weight=weight, bias=bias: torch.nn.functional.linear(x, weight, bias)
            )
            rate = max(rate, 2 * m * k * n / taken)
    return rate


def transformers_tower(path: Path, *, layers: int, width: int, mlp: int) -> Callable[..., Any]:
    """The same weights in transformers: pixels to its projected embeddings."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from aesthetic_filter.clip.tower import normalise

    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=mlp,
        projection_dim=PROJECTION,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        image_size=224,
        patch_size=PATCH,
    )
    model = CLIPVisionModelWithProjection(config).eval()
    found = model.load_state_dict(load_file(path), strict=False)
    assert not found.missing_keys, found.missing_keys
    return lambda pixels: model(normalise(pixels)).image_embeds


def some_pixels(count: int) -> torch.Tensor:
    """(count, 224, 224, 3) uint8."""
    random = np.random.default_rng(0)
    return torch.from_numpy(random.integers(0, 256, (count, 224, 224, 3), dtype=np.uint8))


def took(way: Callable[[], Any]) -> float:
    """Seconds."""
    started = time.perf_counter()
    way()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
