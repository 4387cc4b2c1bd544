"""How long it takes to look at scores and to learn from them, on this machine.

    python benchmarks/bench_learn.py                     everything, about three minutes
    python benchmarks/bench_learn.py --quick             small data: does it run?
    python benchmarks/bench_learn.py --json learn.json   the figures as JSON too

Each task runs in a process of its own, from start to end, so its time has Python's start in it and
its memory is its own. Data is synthetic and lies in a temporary folder that is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import aesthetic_filter as af
from aesthetic_filter.heads.head import reference_direction


def main() -> None:
    """Measure, print a table, and write JSON if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    trained, looked = (5_000, 50_000) if options.quick else (100_000, 5_000_000)
    if options.make:
        make(options.make, trained, looked)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        # In a process of its own: a child's peak memory begins with its parent's.
        again = [sys.executable, __file__, "--make", scratch, *["--quick"][: options.quick]]
        subprocess.run(again, check=True)
        found = {name: measure(folder, command) for name, command in tasks(trained, looked).items()}
    print(f"{'task':<52}{'seconds':>9}{'peak memory':>14}")
    for name, (seconds, peak) in found.items():
        print(f"{name:<52}{seconds:>9.1f}{peak / 1e6:>11,.0f} MB")
    if options.json:
        figures = {name: {"seconds": s, "peak_bytes": p} for name, (s, p) in found.items()}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def tasks(trained: int, looked: int) -> dict[str, list[str]]:
    """What is measured: name to arguments."""
    train = ["--scores", "scores", "--out", "head.safetensors"]
    return {
        f"train, {trained:,} ratings": ["train", "ratings.csv", *train],
        f"train, {trained:,} keep/drop": ["train", "labels.csv", *train],
        f"report, {looked:,} rows": ["report", "many.parquet", "--out", "r.html"],
        f"calibrate, 300 labels, {looked:,} rows": [
            *("calibrate", "few.csv", "--scores", "many.parquet", "--target-precision", "0.8")
        ],
        f"compare, {looked:,} rows each": ["compare", "many.parquet", "others.parquet"],
    }


def measure(folder: Path, arguments: list[str]) -> tuple[float, int]:
    """Seconds and peak bytes of one command."""
    command = [sys.executable, "-m", "aesthetic_filter", *arguments]
    started = time.perf_counter()
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{arguments}: exit code {process.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024
    return time.perf_counter() - started, usage.ru_maxrss * unit


def make(folder: Path, trained: int, looked: int) -> None:
    """Embeddings with ratings and labels that they explain in part, and many plain scores."""
    chance = np.random.default_rng(0)
    reference = reference_direction().astype(np.float32)
    vectors = chance.standard_normal((trained, 768), np.float32)
    vectors *= 0.8 / np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors += 0.6 * reference
    taste = chance.standard_normal(768).astype(np.float32)
    liked = vectors @ taste
    liked = (liked - liked.mean()) / liked.std() + chance.normal(0, 0.7, trained)
    np.save(folder / "embeddings.npy", vectors.astype(np.float16))
    af.score(folder / "embeddings.npy", folder / "scores")
    ids = af.open_scores(folder / "scores").table(["image_id"])["image_id"].to_pylist()
    for name, column, values in (
        ("ratings", "rating", np.round(5 + liked, 2)),
        ("labels", "label", np.where(liked > 0.5, "keep", "drop")),
    ):
        lines = [f"{i},{value}" for i, value in zip(ids, values, strict=True)]
        (folder / f"{name}.csv").write_text(f"image_id,{column}\n" + "\n".join(lines) + "\n")
    scores = chance.normal(5, 0.7, looked).astype(np.float32)
    others = (scores + chance.normal(0, 0.3, looked)).astype(np.float32)
    names = pa.array([f"shard-{i % 97:03d}/{i:09d}.jpg" for i in range(looked)])
    for name, values in (("many", scores), ("others", others)):
        table = {
            "image_id": names,
            "aesthetic_score": values,
            "error": pa.nulls(looked, pa.string()),
            "width": chance.integers(200, 4_000, looked),
        }
        pq.write_table(pa.table(table), folder / f"{name}.parquet")
    some = chance.choice(looked, 300, replace=False)
    keep = chance.random(300) < 1 / (1 + np.exp(-3 * (scores[some] - 5.3)))
    lines = [f"{names[int(i)]},{int(k)}" for i, k in zip(some, keep, strict=True)]
    (folder / "few.csv").write_text("image_id,label\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
