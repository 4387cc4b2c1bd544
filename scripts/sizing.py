"""How long a collection takes, and how large its scores become, from rates that you measured.

    python scripts/sizing.py                                    the table in docs/scale.md
    python scripts/sizing.py --gpu-rate 1500 --gpus 32          yours

The rates: `python benchmarks/gpu.py` on your GPU gives ``--gpu-rate``, `make bench-images` gives
``--decode-rate`` and ``--cpu-rate``, `make bench` and `make bench-ray` give ``--embedding-rate``.
"""

from __future__ import annotations

import argparse

COUNTS = (10**6, 10**8, 5 * 10**9)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu-rate", type=float, default=800, help="images/s that one GPU embeds")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--cpu-rate", type=float, default=1.0, help="images/s one core embeds")
    parser.add_argument("--decode-rate", type=float, default=120, help="images/s a core decodes")
    parser.add_argument(
        "--cores", type=int, default=128, help="to decode, or to embed without GPUs"
    )
    parser.add_argument("--embedding-rate", type=float, default=1e6, help="stored ones, rows/s")
    parser.add_argument("--row-bytes", type=float, default=1500, help="of scores, for an image")
    parser.add_argument("--score-bytes", type=float, default=25, help="likewise, for an embedding")
    parser.add_argument("--price", type=float, help="of a GPU for an hour")
    asked = parser.parse_args()
    gpus = min(asked.gpus * asked.gpu_rate, asked.cores * asked.decode_rate)
    cpus = asked.cores / (1 / asked.cpu_rate + 1 / asked.decode_rate)
    slower = "embedding" if gpus == asked.gpus * asked.gpu_rate else "decoding"
    lines = [("images", "with GPUs", "GPU-hours", "without", "core-hours", "scores")]
    for count in COUNTS:
        hours = count / gpus / 3600 * asked.gpus
        lines.append(
            (
                f"{count:.0e}".replace("e+0", "e"),
                duration(count / gpus),
                f"{hours:,.1f}" + (f" (at {hours * asked.price:,.0f})" if asked.price else ""),
                duration(count / cpus),
                f"{count / cpus / 3600 * asked.cores:,.0f}",
                size(count * asked.row_bytes),
            )
        )
    show(lines)
    used = f"{asked.gpus} GPUs and {asked.cores} cores"
    print(f"{used}: {gpus:,.0f} images/s, bound by {slower}; without GPUs {cpus:,.0f}\n")
    lines = [("stored embeddings", "one driver", "to read (float16)", "scores")]
    for count in COUNTS:
        lines.append(
            (
                f"{count:.0e}".replace("e+0", "e"),
                duration(count / asked.embedding_rate),
                size(count * 768 * 2),
                size(count * asked.score_bytes),
            )
        )
    show(lines)


def duration(seconds: float) -> str:
    """Seconds as a person would say them."""
    for unit, length in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.0f} s"


def size(count: float) -> str:
    """Bytes likewise."""
    for unit, length in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= length:
            return f"{count / length:,.3g} {unit}"
    return f"{count:.0f} B"


def show(lines: list[tuple[str, ...]]) -> None:
    """Print a table."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


if __name__ == "__main__":
    main()
