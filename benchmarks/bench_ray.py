"""The same work on this machine and on Ray, side by side on the same processors.

    python benchmarks/bench_ray.py                               everything, some minutes
    python benchmarks/bench_ray.py --only embeddings             or: images, stage
    python benchmarks/bench_ray.py --quick                       small data: does it run?
    python benchmarks/bench_ray.py --reference-python PYTHON     NeMo Curator too, if that has it
    python benchmarks/bench_ray.py --json bench-ray.json         all figures as JSON too

Rivals take turns, round by round; figures are medians of the rounds. Ray is started once, and has
run once before anything is measured, so that its worker processes are there; what that takes is
reported apart. Memory is sampled while a run is under way: shared memory, which is the object
store's, and the proportional set size (PSS) of the driver and of Ray's workers together.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import ray

import aesthetic_filter as af
import bench_tower
from aesthetic_filter.clip.preprocess import preprocess as preprocess_image
from bench import Bench, machine_facts, many_vectors
from bench_images import photographs
from gpu import finish, write_tars

SHARDS = 8
REFERENCE = Path(__file__).with_name("nemo_curator_reference.py")


def main() -> None:
    """Run the sections that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument("--quick", action="store_true", help="small data: does it run?")
    parser.add_argument("--only", choices=SECTIONS, help="one section")
    parser.add_argument(
        "--reference-python", metavar="PYTHON", help="an interpreter that has NeMo Curator"
    )
    asked = parser.parse_args()
    machine = machine_facts()
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    started = time.perf_counter()
    ray.init(
        num_cpus=len(os.sched_getaffinity(0)),
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    ray_starts = time.perf_counter() - started
    with tempfile.TemporaryDirectory(prefix="aesthetic-filter-bench-") as folder:
        found = Bench(asked.quick, Path(folder))
        found.note(f"Ray {ray.__version__} starts in {ray_starts:.1f} s")
        for name in [asked.only] if asked.only else SECTIONS:
            load = os.getloadavg()[0]
            print(f"\n{SECTIONS[name].__doc__.splitlines()[0]}  [{name}; load before {load:.1f}]\n")
            SECTIONS[name](found, asked.reference_python)
    ray.shutdown()
    finish(found, machine, started, asked.json)


def embeddings(bench: Bench, _: str | None) -> None:
    """2 million stored embeddings (float16 .npy, 3 GB, in the page cache) to scores."""
    rows = bench.size(2_000_000)
    source = write_vectors(bench.folder / "embeddings", rows)
    runs = side_by_side(bench, source, rounds=5)
    show(bench, "embeddings", rows, runs)
    ratio = middle(runs["ray"]) / middle(runs["local"])
    bench.target("2 M embeddings, Ray's time of the local one's", "2", f"{ratio:.2f}", ratio <= 2)


def images(bench: Bench, _: str | None) -> None:
    """JPEGs of 640x480 in tars through a small tower, so that decoding dominates."""
    count = 200 if bench.quick else 2_400
    weights = bench_tower.write_clip(bench.folder / "small.safetensors", **bench_tower.TINY)
    jpegs = photographs()
    preprocess_image(jpegs[0])  # compiled, and cached on disk
    options = af.ImageOptions(device="cpu", precision="float32", weights=weights)
    few = write_tars(bench.folder / "few", jpegs, 8, archives=SHARDS)
    source = write_tars(bench.folder / "tars", jpegs, count, archives=SHARDS)
    starts = side_by_side(bench, few, rounds=3, images=options, allow_foreign=True)
    runs = side_by_side(bench, source, rounds=3, images=options, allow_foreign=True)
    start = {name: middle(found) for name, found in starts.items()}
    show(bench, "images", count, runs, start)
    rates = {n: (count - 8) / (middle(found) - start[n]) for n, found in runs.items()}
    share = rates["ray"] / rates["local"]
    bench.note(
        "start: a run over eight images, which starts the encoder's worker; the rate is that of "
        "the others\n"
    )
    bench.target("images, Ray's rate of the local one", "80%", f"{share:.0%}", share >= 0.8)


def stage(bench: Bench, reference: str | None) -> None:
    """The filter stage on objects in memory, and a whole pipeline, of the same embeddings."""
    rows = bench.size(200_000)
    source = write_vectors(bench.folder / "some", rows, shards=2)
    vectors = np.concatenate([np.load(path) for path in sorted(source.iterdir())])
    filter_stage = af.ImageAestheticFilterStage(score_threshold=4.5)
    batches = [
        af.ImageBatch(
            [
                af.ImageObject(image_id=str(row), embedding=vectors[row].astype(np.float32))
                for row in range(start, min(start + 500, rows))
            ]
        )
        for start in range(0, min(rows, 50_000), 500)
    ]
    count = sum(map(len, batches))
    filter_stage.setup()
    filter_stage.process(batches[0])

    def process() -> None:
        for batch in batches:
            filter_stage.process(batch)

    def pipeline(backend: str) -> None:
        af.Pipeline([af.ImageReaderStage(source), filter_stage]).run(backend)

    pipeline("ray")
    found: dict[str, list[float]] = {"process": [], "local": [], "ray": []}
    for _ in range(bench.rounds(5)):
        found["process"].append(count / took(process))
        found["local"].append(rows / took(lambda: pipeline("local")))
        found["ray"].append(rows / took(lambda: pipeline("ray")))
    table = [
        {"what": "process(), batches of 500", "rows/s": median(found["process"])},
        {"what": "pipeline, local", "rows/s": median(found["local"])},
        {"what": "pipeline, Ray", "rows/s": median(found["ray"])},
    ]
    if reference is not None:
        theirs = reference_speeds(reference, source, 2_000 if bench.quick else 20_000)
        version = theirs["version"]
        table[0]["NeMo Curator"] = theirs["stage_rows_per_s"]
        for line in table[1:]:
            line["NeMo Curator"] = theirs["pipeline_rows_per_s"]
        for line in table:
            line["times"] = line["rows/s"] / line["NeMo Curator"] if line["NeMo Curator"] else None
        bench.note(f"NeMo Curator {version}, executor {theirs['executor']}")
        bench.figures["NeMo Curator"] = [theirs]
    else:
        bench.note("NeMo Curator was not measured: --reference-python names an interpreter with it")
    bench.table("stage", table)


def reference_speeds(python: str, source: Path, rows: int) -> dict[str, Any]:
    """What NeMo Curator makes of the first shard's embeddings, in its own environment."""
    command = [
        python,
        str(REFERENCE),
        "--embeddings",
        str(min(source.iterdir())),
        "--rows",
        str(rows),
    ]
    command += ["--pipeline-rows", str(5 * rows)]  # it takes seconds to start
    # Its Ray must not find ours.
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise SystemExit(f"{python}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


Runs = dict[str, list[dict[str, float]]]


def side_by_side(bench: Bench, source: Path, rounds: int, **options: Any) -> Runs:
    """Score a source on both backends in turn, once more than is measured."""
    runs: Runs = {"local": [], "ray": []}
    for number in range(1 + bench.rounds(rounds)):
        for backend, found in runs.items():
            out = bench.folder / "out"
            shutil.rmtree(out, ignore_errors=True)
            with sampled() as peaks:
                seconds = took(lambda: af.score(source, out, backend=backend, **options))  # noqa: B023
            if number:
                found.append({"seconds": seconds, **peaks})
            elif backend == "ray":
                bench.note(f"Ray's first run takes {seconds:.1f} s: its workers start\n")
    return runs


def show(
    bench: Bench, section: str, count: int, runs: Runs, start: dict[str, float] | None = None
) -> None:
    """A line for each backend."""
    lines = []
    for backend, found in runs.items():
        line: dict[str, Any] = {"what": backend, "seconds": middle(found)}
        if start:
            line["start s"] = start[backend]
        line["rows/s"] = count / (middle(found) - (start[backend] if start else 0))
        line["rounds s"] = " ".join(f"{run['seconds']:.2f}" for run in found)
        line["object store MB"] = max(run["store"] for run in found) / 1e6
        line["memory MB"] = max(run["memory"] for run in found) / 1e6
        lines.append(line)
    bench.table(section, lines)


def middle(runs: list[dict[str, float]]) -> float:
    """The median of their seconds."""
    return median(run["seconds"] for run in runs)


def took(way: Callable[[], Any]) -> float:
    """Seconds."""
    started = time.perf_counter()
    way()
    return time.perf_counter() - started


@contextlib.contextmanager
def sampled(every: float = 0.2) -> Iterator[dict[str, float]]:
    """Peaks of the object store and of the processes' memory, in bytes."""
    peaks = {"store": 0.0, "memory": 0.0}
    over = threading.Event()

    def sample() -> None:
        while not over.wait(every):
            peaks["store"] = max(peaks["store"], store_bytes())
            peaks["memory"] = max(peaks["memory"], resident_bytes())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        over.set()
        thread.join()


def store_bytes() -> float:
    """Shared memory in use on this machine: nearly all of it the object store's.

    The store keeps the pages that it has once used, so this is the most that any run so far needed.
    """
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith("Shmem:"))


def resident_bytes() -> float:
    """The proportional set size of this process and of Ray's workers."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            name = (folder / "cmdline").read_bytes()
            if name.startswith(b"ray::") or int(folder.name) == os.getpid():
                lines = (folder / "smaps_rollup").read_text().splitlines()
                total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total * 1024.0


def write_vectors(folder: Path, rows: int, shards: int = SHARDS) -> Path:
    """float16 embeddings in ``.npy`` files, in the page cache since they were just written."""
    folder.mkdir()
    for number in range(shards):
        np.save(folder / f"{number:02d}.npy", many_vectors(rows // shards, np.float16))
    return folder


SECTIONS: dict[str, Callable[[Bench, str | None], None]] = {
    "embeddings": embeddings,
    "images": images,
    "stage": stage,
}

if __name__ == "__main__":
    sys.exit(main())
