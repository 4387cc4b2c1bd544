"""How fast images become scores on this machine's processor: decoding, the tower, all of it.

    python benchmarks/bench_images.py                           everything, about ten minutes
    python benchmarks/bench_images.py --only pipeline           or: preprocess, tower
    python benchmarks/bench_images.py --quick                   a tiny tower: does it run?
    python benchmarks/bench_images.py --json bench-images.json  all figures as JSON too

Rivals take turns, round by round, so that a noisy moment hits all of them; figures are medians of
the rounds. The images are photographs, the weights random and of full size, which decides no speed.
What a CUDA device makes of it: ``benchmarks/gpu.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image, ImageOps

import bench_preprocess
import bench_tower
from aesthetic_filter.clip.options import ImageOptions
from aesthetic_filter.clip.preprocess import preprocess as preprocess_image
from aesthetic_filter.clip.tower import CPU_BATCH, choose_precision, load_tower
from bench import _LAUNCHER, Bench, machine_facts, python
from gpu import finish, tower_speed, watched_run, write_folder, write_tars

IMAGES = 72


def main() -> None:
    """Run the sections that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument("--quick", action="store_true", help="a tiny tower: does it run?")
    parser.add_argument("--only", choices=SECTIONS, help="one section")
    parser.add_argument("--one-run", nargs=4, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one_run:
        one_run(*asked.one_run)
        return

    machine = {**machine_facts(), "threads of torch": torch.get_num_threads()}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="aesthetic-filter-bench-") as folder:
        found = Bench(asked.quick, Path(folder))
        for name in [asked.only] if asked.only else SECTIONS:
            load = os.getloadavg()[0]
            print(f"\n{SECTIONS[name].__doc__.splitlines()[0]}  [{name}; load before {load:.1f}]\n")
            SECTIONS[name](found)
    finish(found, machine, started, asked.json)


def preprocess(bench: Bench) -> None:
    """Encoded JPEGs to the pixels that the tower sees, images/s."""
    rows = bench_preprocess.measure(bench.quick)["speed"]
    speeds = {(row["way"], row["size"]): (row["one thread"], row["two threads"]) for row in rows}
    shown = []
    for row in rows:
        one, two = row["one thread"], row["two threads"]
        line = {"what": f"{row['size']} {row['way']}", "one thread": one, "two threads": two}
        line["two of one"] = two / one
        if ("Pillow", row["size"]) in speeds:
            line["two x Pillow"] = two / speeds["Pillow", row["size"]][0]
        for rival in ("Pillow", "transformers"):
            if (rival, row["size"]) in speeds:
                line[f"x {rival}"] = one / speeds[rival, row["size"]][0]
        shown.append(line)
    bench.table("preprocess", shown)
    found = {line["what"]: line for line in shown}
    exact = {size: found[f"{size} exact"] for size in bench_preprocess.SIZES}

    def target(what: str, column: str, wanted: float, lines: dict[str, dict[str, Any]]) -> None:
        if any(column not in line for line in lines.values()):
            bench.note(f"not measured: {what}")
            return
        said = ", ".join(f"{size} {line[column]:.2f}" for size, line in lines.items())
        met = min(line[column] for line in lines.values()) >= wanted
        bench.target(what, f"{wanted:g} times", said, met)

    target("exact on one core, of Pillow", "x Pillow", 1, exact)
    target("exact with two threads, of Pillow with one", "two x Pillow", 1.8, exact)
    target("exact with two threads, of itself with one", "two of one", 1.8, exact)
    target("exact on one core, of transformers", "x transformers", 2, exact)
    for size, wanted in (("12 MP", 8), ("640x480", 1.5)):
        target("fast on one core, of Pillow", "x Pillow", wanted, {size: found[f"{size} fast"]})


def tower(bench: Bench) -> None:
    """The tower alone, images/s."""
    found = bench_tower.measure(bench.quick)
    rows = []
    for name, speed in found["images/s"].items():
        precision = f" ({found['precision']})" if name == "auto" else ""
        row = {"what": name + precision, "images/s": speed}
        if name in found["share"]:
            row["of the products' rate"] = f"{found['share'][name]:.0%}"
        rows.append(row)
    bench.table("tower", rows)
    bench.figures["tower, as measured"] = [found]
    rates = found["GFLOP/s of products"].items()
    said = "; ".join(f"{name} {rate:,.0f} GFLOP/s" for name, rate in rates)
    bench.note(f"products alone: {said}; {found['GFLOP an image']:.1f} GFLOP an image\n")
    if found["precision"] != "bfloat16":
        bench.note("no target: this processor has no fast bfloat16\n")
        return
    times, share = found["times transformers"], found["share"]["auto"]
    bench.target("the tower in auto, of transformers float32", "2.1", f"{times:.2f}", times >= 2.1)
    bench.target(
        "the tower in bfloat16, of the rate of products alone", "75%", f"{share:.0%}", share >= 0.75
    )


def pipeline(bench: Bench) -> None:
    """From JPEGs on disk to scores, against the tower alone on as many images.

    Each run is a process of its own, in turn with the tower in this one, half of the images before
    it and half after.
    """
    size = bench_tower.TINY if bench.quick else bench_tower.FULL
    images = 16 if bench.quick else IMAGES
    weights = bench_tower.write_clip(bench.folder / "clip.safetensors", **size, text=False)
    precision = choose_precision("cpu")
    alone = load_tower(weights, precision=precision)
    jpegs = photographs()
    sources = {
        "folder": write_folder(bench.folder / "folder", jpegs, images),
        "WebDataset tar": write_tars(bench.folder / "tar", jpegs, images, archives=1),
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sources}

    def half() -> tuple[float, float]:
        """Seconds of the tower for half of the images, on the clock and of the processor."""
        batches = images // 2 // CPU_BATCH
        started, cpu = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            for _ in range(batches):
                alone(pixels)
        return time.perf_counter() - started, time.process_time() - cpu

    pixels = bench_tower.some_pixels(CPU_BATCH)
    # In a thread of its own, as the encoder has it: with more than one thread that computes, OpenMP
    # waits in another way, which shows where the machine has other work.
    thread = ThreadPoolExecutor(1)
    thread.submit(tower_speed, alone, CPU_BATCH, 1).result()
    for number in range(2 if bench.quick else 3):
        before = thread.submit(half).result()
        for name, source in sources.items():
            run = run_alone(source, bench.folder / f"{name} {number}", weights, precision)
            if run["rows"] != images or run["failed"]:
                raise SystemExit(f"{name}: {run['rows']} rows, {run['failed']} failed")
            after = thread.submit(half).result()
            run["tower alone s"], run["tower alone CPU s"] = map(
                sum, zip(before, after, strict=True)
            )
            run["share"] = run["tower alone s"] / run["seconds"]
            run["CPU share"] = run["tower alone CPU s"] / run["CPU s"]
            before = after
            runs[name].append(run)
    rows = []
    for name, found in runs.items():
        middle = {key: median(run[key] for run in found) for key in found[0]}
        rows.append(
            {
                "what": f"{name}, {images} JPEGs",
                "images/s": middle["images/s"],
                "tower alone": images / middle["tower alone s"],
                "share": f"{middle['share']:.1%}",
                "rounds": " ".join(f"{run['share']:.0%}" for run in found),
                "by CPU s": f"{middle['CPU share']:.1%}",
                "seconds": middle["seconds"],
                "in tower": middle["tower s"],
                "decode CPU s": middle["decode CPU s"],
                "mean batch": middle["mean batch"],
                "load s": middle["load s"],
                "peak MB": max(run["peak"] for run in found) / 1e6,
            }
        )
    bench.table("pipeline", rows)
    bench.figures["pipeline, all runs"] = [
        {"what": name, **run} for name, found in runs.items() for run in found
    ]
    said = median(run["checksum s"] for found in runs.values() for run in found)
    bench.note(
        f"640x480, quality 90; {precision}, batches of {CPU_BATCH}. Each run is a process of its "
        "own, which has imported torch and compiled\n  the resizing before. Its seconds are those "
        "of the whole `score()` less those within the two functions that load the weights:\n"
        f"  the tower's, and the one that computes their file's checksum ({said:.1f} s). Nothing "
        "else is left out. By CPU s: the same share in\n  seconds of the processor, which other "
        "work on the machine disturbs less. The peak counts the pages of the mapped weights file\n"
    )
    for row, found in zip(rows, runs.values(), strict=True):
        share = median(run["share"] for run in found)
        bench.target(
            f"{row['what']}, of the tower alone",
            "95%",
            f"{share:.1%} (rounds: {row['rounds']}; by CPU s {row['by CPU s']})",
            share >= 0.95,
        )


def run_alone(source: Path, out: Path, weights: Path, precision: str) -> dict[str, Any]:
    """:func:`one_run` in a process of its own; with "peak", its peak bytes resident."""
    words = [sys.executable, __file__, "--one-run", *map(str, (source, out, weights)), precision]
    printed = python("-c", _LAUNCHER, *words).splitlines()
    status, _, _, peak = json.loads(printed[-1])
    if status:
        raise SystemExit(f"scoring {source} failed")
    return {**json.loads(printed[-2]), "peak": peak}


def one_run(source: str, out: str, weights: str, precision: str) -> None:
    """Score a source, and print what it took."""
    preprocess_image(bench_preprocess.jpeg(Image.new("RGB", (300, 300))))
    options = ImageOptions(device="cpu", weights=weights, precision=precision)
    print(json.dumps(watched_run(Path(source), Path(out), options)))


def photographs() -> list[bytes]:
    """Photographs of 640x480 in JPEG: those of bench_preprocess, and mirrored, and upside down."""
    found = []
    for image in bench_preprocess.photographs():
        upright = ImageOps.fit(image, (640, 480), Image.Resampling.LANCZOS)
        turned = (upright, ImageOps.mirror(upright), ImageOps.flip(upright))
        found += map(bench_preprocess.jpeg, turned)
    return found


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "preprocess": preprocess,
    "tower": tower,
    "pipeline": pipeline,
}

if __name__ == "__main__":
    main()
