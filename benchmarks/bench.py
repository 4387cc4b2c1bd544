"""How fast it is on this machine, side by side with what else there is.

    python benchmarks/bench.py                    everything, about four minutes
    python benchmarks/bench.py --only kernel      one section: kernel, score, select or startup
    python benchmarks/bench.py --quick            small data: does it run? (targets do not apply)
    python benchmarks/bench.py --json bench.json  all figures as JSON too

Rivals take turns, round by round, so that a noisy moment hits both. "best" is the fastest round,
"median" the middle one. Data is synthetic (it decides no speed here): unit vectors around the
direction of real ViT-L/14 embeddings, made in a temporary folder that is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

import aesthetic_filter as af
from aesthetic_filter.formats.npy import row_ids
from aesthetic_filter.kernels import default_threads
from aesthetic_filter.run_folder import open_run_folder, provenance
from aesthetic_filter.table import COSINE, ERROR, IMAGE_ID, NORM, SCORE, vectors_column

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT.parent / "shared" / "heads" / "sac+logos+ava1-l14-linearMSE.pth"
WIDTH = 768
CORES = default_threads()
MILLION = 1_000_000
HEAVY = ("numpy", "pyarrow", "numba", "duckdb", "torch")


@dataclass
class Target:
    """What was to be reached, and what was."""

    what: str
    wanted: str
    measured: str
    met: bool | None  # None where the data was too small to tell


@dataclass
class Bench:
    """What the sections share, and what they find."""

    quick: bool
    folder: Path
    figures: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)

    def size(self, rows: int) -> int:
        """The number of rows to take: a hundredth of it in the quick version."""
        return rows // 100 if self.quick else rows

    def rounds(self, count: int) -> int:
        """The number of rounds to run."""
        return 3 if self.quick else count

    def target(self, what: str, wanted: str, measured: str, met: bool) -> None:
        """Note a target that the issue names."""
        self.targets.append(Target(what, wanted, measured, None if self.quick else met))

    def note(self, text: str) -> None:
        """Say something that one must know to read the figures."""
        self.notes.append(text)
        print(f"  {text}")

    def table(self, section: str, rows: list[dict[str, Any]]) -> None:
        """Print a table, and keep its figures."""
        self.figures.setdefault(section, []).extend(rows)
        names = list(dict.fromkeys(name for row in rows for name in row))
        shown = [[_cell(row.get(name)) for name in names] for row in rows]
        widths = [max(map(len, column)) for column in zip(names, *shown, strict=True)]
        for line in (names, *shown):
            first, *rest = (cell.ljust(w) for cell, w in zip(line, widths, strict=True))
            print("  " + "  ".join([first, *(cell.strip().rjust(len(cell)) for cell in rest)]))
        print()


def main() -> None:
    """Run the sections that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument("--quick", action="store_true", help="small data: does it run?")
    parser.add_argument("--only", choices=SECTIONS, help="one section")
    asked = parser.parse_args()

    machine = machine_facts()
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="aesthetic-filter-bench-") as folder:
        bench = Bench(asked.quick, Path(folder))
        for name in [asked.only] if asked.only else SECTIONS:
            load = os.getloadavg()[0]
            print(f"\n{SECTIONS[name].__doc__.splitlines()[0]}  [{name}; load before {load:.1f}]\n")
            SECTIONS[name](bench)
    print("Targets" + (" (do not apply to --quick)" if asked.quick else ""))
    met = {True: "met", False: "MISSED", None: "-"}
    for target in bench.targets:
        print(f"  {met[target.met]:<7} {target.what}: {target.measured} (wanted: {target.wanted})")
    print(f"\n{time.perf_counter() - started:.0f} s")
    if asked.json:
        found = {
            "machine": machine,
            "quick": asked.quick,
            "targets": [asdict(target) for target in bench.targets],
            "figures": bench.figures,
            "notes": bench.notes,
        }
        asked.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


# In memory.


def kernel(bench: Bench) -> None:
    """Rows in memory to scores, all cores."""
    head = af.load_head()
    read = compile_read()
    best: dict[str, float] = {}
    rows = []
    for dtype, count in ((np.float16, 2 * MILLION), (np.float32, MILLION)):
        vectors = many_vectors(bench.size(count), dtype)
        name = np.dtype(dtype).name
        ours, reads = take_turns(
            bench.rounds(21), lambda v=vectors: head.measure(v), lambda v=vectors: read_all(read, v)
        )
        share = median(b / a for a, b in zip(ours, reads, strict=True))
        best[name] = len(vectors) / min(ours)
        for what, times in ((f"head.measure, {name}", ours), ("only reading the bytes", reads)):
            rows.append(speeds(what, len(vectors), times))
            rows[-1]["GB/s best"] = vectors.nbytes / min(times) / 1e9
        rows[-2]["of reading"] = f"{share:.0%}"
        if name == "float16":
            bench.target(
                "float16 rows in memory, of the speed at which all cores read them",
                "80%",
                f"{share:.0%} (median of pairs; best against best {min(reads) / min(ours):.0%})",
                share >= 0.8,
            )
        del vectors
    try:
        networks = network_speeds(bench)
    except ImportError:
        bench.note("torch is not installed: not compared with the layered network")
        networks = []
    rows += networks
    bench.table("kernel", rows)
    if networks:
        fastest = max(row["Mrows/s best"] for row in networks) * 1e6
        times = {name: speed / fastest for name, speed in best.items()}
        bench.target(
            "rows in memory against the fastest way to run the layered network",
            "200 times",
            f"{times['float16']:.0f} times (float32: {times['float32']:.0f} times)",
            times["float16"] >= 200,
        )


def network_speeds(bench: Bench) -> list[dict[str, Any]]:
    """The reference stage's network in torch float32: batches stacked from a list, and one."""
    import torch

    net = reference_network(bench)
    embeddings = list(many_vectors(bench.size(65_536), np.float32))  # one array each
    whole = torch.from_numpy(np.stack(embeddings))

    def in_batches(size: int) -> None:
        for start in range(0, len(embeddings), size):
            batch = np.stack(embeddings[start : start + size])
            net(torch.from_numpy(batch)).squeeze(1).numpy()

    ways: dict[str, Callable[[], Any]] = {
        f"torch float32 network, list in batches of {size:,}": lambda size=size: in_batches(size)
        for size in (32, 500, 4096)
    }
    ways[f"torch float32 network, one tensor of {len(whole):,}"] = lambda: net(whole)
    with torch.inference_mode():
        times = take_turns(bench.rounds(4), *ways.values())
    return [speeds(what, len(whole), t) for what, t in zip(ways, times, strict=True)]


def reference_network(bench: Bench) -> Any:
    """Linear layers 768-1024-128-64-16-1; without dropout, which does nothing when scoring."""
    import torch

    sizes = (WIDTH, 1024, 128, 64, 16, 1)
    layers = [torch.nn.Linear(a, b) for a, b in pairwise(sizes)]
    if CHECKPOINT.exists():
        state = torch.load(CHECKPOINT, map_location="cpu", weights_only=True)
        for layer, number in zip(layers, (0, 2, 4, 6, 7), strict=True):
            part = {k: state[f"layers.{number}.{k}"] for k in ("weight", "bias")}
            layer.load_state_dict(part)
    else:
        bench.note("the published checkpoint is not here: a network of the same shape instead")
    return torch.nn.Sequential(*layers).eval()


def compile_read() -> Callable[[int, int], int]:
    """``f(address, blocks)``: read blocks of 256 bytes with the widest loads, and or them."""
    from llvmlite import ir
    from numba import njit, types
    from numba.core import cgutils
    from numba.extending import intrinsic

    @intrinsic
    def read_blocks(typing_context, address, blocks):  # type: ignore[no-untyped-def]  # noqa: ARG001
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]  # noqa: ARG001
            i64 = ir.IntType(64)
            block = ir.VectorType(i64, 32)
            start = builder.inttoptr(args[0], block.as_pointer())
            seen = cgutils.alloca_once_value(builder, ir.Constant(block, [0] * 32))
            with cgutils.for_range(builder, args[1]) as loop:
                found = builder.load(builder.gep(start, [loop.index]), align=8)
                builder.store(builder.or_(builder.load(seen), found), seen)
            total = builder.load(seen)
            lanes = [builder.extract_element(total, ir.IntType(32)(n)) for n in range(32)]
            result = lanes[0]
            for lane in lanes[1:]:
                result = builder.or_(result, lane)
            return result

        return types.int64(address, blocks), codegen

    @njit("int64(int64, int64)", nogil=True)
    def read(address, blocks):  # type: ignore[no-untyped-def]
        return read_blocks(address, blocks)

    return read  # type: ignore[no-any-return]


def read_all(read: Callable[[int, int], int], array: NDArray[Any]) -> None:
    """Read an array's bytes with all cores."""
    address, size, step = array.ctypes.data, array.nbytes, 16 << 20
    for _ in _pool.map(
        lambda at: read(address + at, min(step, size - at) // 256), range(0, size, step)
    ):
        pass


_pool = ThreadPoolExecutor(CORES)


# From files to files.


def score(bench: Bench) -> None:
    """`aesthetic-filter score`: the whole process, page cache and compiled code warm."""
    shards, shard_rows = 16, bench.size(4 * MILLION) // 16
    names = ("npy-4", "npy-1", "plain", "default")
    four, one, plain, default = (bench.folder / name for name in names)
    write_npy_shards(bench, four, shards, shard_rows)
    one.mkdir()
    for path in sorted(four.iterdir())[: shards // 4]:
        (one / path.name).hardlink_to(path)
    parquet_rows = bench.size(MILLION) // 8
    write_parquet_shards(plain, 8, parquet_rows, use_dictionary=["url"])
    write_parquet_shards(default, 2, parquet_rows // 2, use_dictionary=True)
    sources = {
        "float16 .npy, 16 shards": (four, shards * shard_rows),
        "float16 .npy, 4 shards": (one, shards // 4 * shard_rows),
        "float16 Parquet, plain, 8 files": (plain, 8 * parquet_rows),
        "float16 Parquet, dictionary, 2 files": (default, parquet_rows // 2 * 2),
    }
    out = bench.folder / "scores"
    runs: dict[str, list[Run]] = {name: [] for name in sources}
    for number in range(bench.rounds(5) + 1):
        for name, (source, _) in sources.items():
            into_page_cache(source)
            ran = command("score", source, "--out", out, "--quiet")
            if number:  # the first one warms up
                runs[name].append(ran)
            shutil.rmtree(out)
    rows = []
    for name, (_, count) in sources.items():
        row = speeds(name, count, [run.seconds for run in runs[name]])
        row["rows"] = count
        row["s best"] = min(run.seconds for run in runs[name])
        row["CPU s"] = median(run.cpu for run in runs[name])
        row["peak MB"] = max(run.peak for run in runs[name]) / 1e6
        rows.append(row)
    bench.table("score", rows)
    bench.note(
        "pyarrow gives float16 a dictionary unless told not to, and reads it back at a fifth of "
        "the speed;\n  without one (use_dictionary=False) reading is bound by its decoding of "
        "list levels"
    )
    shutil.rmtree(four)
    peaks = [row["peak MB"] for row in rows[:2]]
    for row, wanted in ((rows[0], 2.0), (rows[2], 0.5)):
        bench.target(
            f"score {row['what']}, {row['rows']:,} rows",
            f"{wanted:g} million rows/s",
            f"{row['Mrows/s best']:.2f} million (median {row['Mrows/s median']:.2f})",
            row["Mrows/s best"] >= wanted,
        )
    bench.target(
        f"peak memory of {rows[0]['rows']:,} and of {rows[1]['rows']:,} rows",
        "below 500 MB, the same within 15%",
        f"{peaks[0]:.0f} MB and {peaks[1]:.0f} MB",
        max(peaks) < 500 and max(peaks) <= 1.15 * min(peaks),
    )


def write_npy_shards(bench: Bench, folder: Path, shards: int, rows: int) -> None:
    """Shards of the same vectors, each in another order; links to one file where disk is short."""
    folder.mkdir()
    vectors = many_vectors(rows, np.float16)
    enough = shutil.disk_usage(folder).free > 3 * shards * vectors.nbytes
    if not enough:
        bench.note("too little room for distinct shards: all are links to one file")
    for number in range(shards):
        path = folder / f"img_emb_{number:02d}.npy"
        if enough or number == 0:
            np.save(path, np.roll(vectors, number * rows // shards, axis=0))
        else:
            path.hardlink_to(folder / "img_emb_00.npy")


def write_parquet_shards(
    folder: Path, files: int, rows: int, use_dictionary: bool | list[str]
) -> None:
    """Files with image_id, embedding, url and width; else as pyarrow writes them by default."""
    folder.mkdir()
    vectors = many_vectors(rows, np.float16)
    for number in range(files):
        ids = row_ids(f"part-{number}", 0, rows, rows)
        urls = row_ids(f"https://example.org/{number}/images", 0, rows, rows)
        widths = np.random.default_rng(number).integers(200, 2000, rows).astype(np.int32)
        columns = {
            "image_id": ids,
            "embedding": vectors_column(np.roll(vectors, number * 1000, axis=0)),
            "url": urls,
            "width": widths,
        }
        path = folder / f"part-{number}.parquet"
        pq.write_table(pa.table(columns), path, use_dictionary=use_dictionary)


def into_page_cache(folder: Path) -> None:
    """Read all files, so that no run waits for the disk."""
    buffer = bytearray(8 << 20)
    for path in sorted(folder.iterdir()):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


# Choosing.


def select(bench: Bench) -> None:
    """`aesthetic-filter filter` on scores with ids: the whole process."""
    count = bench.size(20 * MILLION)
    scores = bench.folder / "many-scores"
    write_scores(scores, parts=20, rows=count // 20)
    rules = {
        "--top 1%": ["--top", "1%"],
        "--top 1% --per source": ["--top", "1%", "--per", "source"],
        "--top 1% --where 'width >= 512'": ["--top", "1%", "--where", "width >= 512"],
    }
    runs: dict[str, list[Run]] = {name: [] for name in rules}
    for _ in range(bench.rounds(3)):
        for name, given in rules.items():
            into_page_cache(scores)
            kept = bench.folder / "kept"
            runs[name].append(command("filter", scores, "--out", kept, "--quiet", *given))
            shutil.rmtree(kept)
    rows = [
        {
            "what": f"{name}, of {count:,}",
            "s best": min(run.seconds for run in found),
            "s median": median(run.seconds for run in found),
            "CPU s": median(run.cpu for run in found),
            "peak MB": max(run.peak for run in found) / 1e6,
        }
        for name, found in runs.items()
    ]
    bench.table("select", rows)
    slowest, peak = max(run.seconds for run in runs["--top 1%"]), rows[0]["peak MB"]
    bench.target(
        f"the top 1% of {count:,} scores with ids",
        "under 15 s and 2 GB",
        f"{rows[0]['s median']:.1f} s (slowest {slowest:.1f} s), {peak:.0f} MB",
        slowest < 15 and peak < 2000,
    )


def write_scores(folder: Path, parts: int, rows: int) -> None:
    """A scores folder of made-up scores, as `score` writes them; one row in 1,000 failed."""
    head = af.load_head()
    random = np.random.default_rng(0)
    identity = provenance(head, "synthetic", "parquet", {})
    with open_run_folder(folder, identity) as run:
        for number in range(parts):
            failed = random.random(rows) < 0.001

            def floats(mean: float, spread: float, where: NDArray[Any] = failed) -> pa.Array:
                values = mean + spread * random.standard_normal(rows, dtype=np.float32)
                return pa.array(values, pa.float32(), mask=where)

            name = f"shard_{number:04d}"
            reasons = pa.array(np.full(rows, "embedding is all zeros"), pa.string(), mask=~failed)
            sources = pa.DictionaryArray.from_arrays(
                pa.array(random.integers(0, 8, rows), pa.int32()), [f"source {n}" for n in range(8)]
            )
            columns = {
                IMAGE_ID: row_ids(name, 0, rows, rows),
                SCORE: floats(5.2, 0.6),
                ERROR: reasons,
                NORM: floats(10, 0.5),
                COSINE: floats(0.6, 0.05),
                "source": sources.cast(pa.string()),
                "width": pa.array(random.integers(200, 2000, rows), pa.int32()),
            }
            run.write_part(name, "1", [(pa.table(columns), 0)])
        run.write_run_file("complete")


# Starting.


def startup(bench: Bench) -> None:
    """Starting: interpreter alone, import, help."""
    ask_help = "import aesthetic_filter.cli as c; c.app(['--help'], standalone_mode=False)"
    ways = {
        "python -c pass": ["-c", "pass"],
        "python -c 'import aesthetic_filter'": ["-c", "import aesthetic_filter"],
        "aesthetic-filter --help": ["-m", "aesthetic_filter", "--help"],
    }
    times = take_turns(
        11, *(lambda given=given: python(*given) for given in ways.values()), warm_up=2
    )
    rows = [
        {"what": what, "ms median": 1e3 * median(t), "ms best": 1e3 * min(t)}
        for what, t in zip(ways, times, strict=True)
    ]
    for row in rows:
        row["over pass"] = row["ms median"] - rows[0]["ms median"]
    bench.table("startup", rows)
    loaded = f"\nimport sys; print('loaded:', *({{*{HEAVY}}} & set(sys.modules)))"
    found = {
        what: python("-c", code + loaded).rpartition("loaded:")[2].split()
        for what, code in (("import", "import aesthetic_filter"), ("--help", ask_help))
    }
    bench.target(
        "import and --help load none of " + ", ".join(HEAVY),
        "none",
        "; ".join(f"{what}: {', '.join(names) or 'none'}" for what, names in found.items()),
        not any(found.values()),
    )


# What they all use.


def many_vectors(count: int, dtype: Any) -> NDArray[Any]:
    """(count, 768) unit vectors whose cosine to the reference direction is about 0.6."""
    reference = af.load_head().reference
    random = np.random.default_rng(1)
    distinct = random.standard_normal((min(count, 250_000), WIDTH), dtype=np.float32)
    distinct *= 0.8 / np.sqrt(WIDTH)
    distinct += 0.6 * reference
    distinct /= np.linalg.norm(distinct, axis=1, keepdims=True)
    vectors = np.empty((count, WIDTH), dtype)
    vectors[: len(distinct)] = distinct
    for start in range(len(distinct), count, len(distinct)):
        part = vectors[start : start + len(distinct)]
        part[:] = vectors[: len(part)]
    return vectors


def take_turns(rounds: int, *ways: Callable[[], Any], warm_up: int = 1) -> tuple[list[float], ...]:
    """Time each way once in each round; the first rounds do not count."""
    times: tuple[list[float], ...] = tuple([] for _ in ways)
    for number in range(warm_up + rounds):
        for way, found in zip(ways, times, strict=True):
            started = time.perf_counter()
            way()
            if number >= warm_up:
                found.append(time.perf_counter() - started)
    return times


def speeds(what: str, rows: int, times: list[float]) -> dict[str, Any]:
    """Millions of rows per second."""
    millions = rows / 1e6
    return {
        "what": what,
        "Mrows/s best": millions / min(times),
        "Mrows/s median": millions / median(times),
    }


@dataclass(frozen=True)
class Run:
    """One run of a command: seconds on the clock, seconds of processor, peak bytes resident."""

    seconds: float
    cpu: float
    peak: int


# The peak that the system reports for a process is at least that of the one that started it: so a
# small one starts the command.
_LAUNCHER = """
import json, os, subprocess, sys, time
started = time.perf_counter()
process = subprocess.Popen(sys.argv[1:])
_, status, usage = os.wait4(process.pid, 0)
seconds = time.perf_counter() - started
unit = 1 if sys.platform == "darwin" else 1024
cpu = usage.ru_utime + usage.ru_stime
print(json.dumps([status, seconds, cpu, usage.ru_maxrss * unit]))
"""


def command(*given: Any) -> Run:
    """Run `aesthetic-filter` in a process of its own, as from a shell."""
    words = [sys.executable, "-m", "aesthetic_filter", *map(str, given)]
    status, seconds, cpu, peak = json.loads(python("-c", _LAUNCHER, *words))
    if status:
        raise SystemExit(f"aesthetic-filter {' '.join(map(str, given))}: failed")
    return Run(seconds, cpu, peak)


def python(*given: str) -> str:
    """Run the interpreter; what it printed."""
    ran = subprocess.run([sys.executable, *given], stdout=subprocess.PIPE, text=True, check=True)
    return ran.stdout


def machine_facts() -> dict[str, Any]:
    """What the figures depend on."""
    facts: dict[str, Any] = {
        "cpu": next(_cpu_models(), platform.processor() or platform.machine()),
        "cores": CORES,
        "memory GB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "system": platform.system(),
        "python": platform.python_version(),
    }
    for package in ("numpy", "pyarrow", "llvmlite", "numba", "duckdb", "torch"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = None
    try:
        git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
        facts["commit"] = subprocess.run(
            git, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        facts["commit"] = None
    return facts


def _cpu_models() -> Iterator[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        if line.startswith("model name"):
            yield line.partition(":")[2].strip()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "kernel": kernel,
    "score": score,
    "select": select,
    "startup": startup,
}

if __name__ == "__main__":
    main()
