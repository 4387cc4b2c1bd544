"""How fast images become scores on a CUDA device, from JPEGs to parts, and where the time goes.

    python benchmarks/gpu.py                  everything, some minutes
    python benchmarks/gpu.py --images 2000    fewer images from end to end
    python benchmarks/gpu.py --quick          a tiny tower: does it run?
    python benchmarks/gpu.py --json gpu.json  all figures as JSON too

The package runs as it does for anyone: ``aesthetic_filter.score`` on folders and tars of JPEGs. The
images are noise with the spectrum of photographs, no two files alike; the weights are random, of
full size. Both are made in a temporary folder. It needs no network, and of the package's
dependencies only torch, numpy, pyarrow, pillow and safetensors (without numba it says what it does
instead); uninstalled it runs with PYTHONPATH=src.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

import aesthetic_filter as af
from aesthetic_filter import kernels
from aesthetic_filter.clip import preprocess as preprocessing
from aesthetic_filter.clip import tower as towers
from aesthetic_filter.clip import weights as weight_files
from aesthetic_filter.clip.encoder import GPU_BATCH, Encoder, out_of_memory
from aesthetic_filter.clip.options import ImageOptions
from aesthetic_filter.clip.preprocess import SIZE, Pixels, Preprocessing
from bench import Bench, machine_facts
from bench_tower import FULL, TINY, flops, some_pixels, write_clip

SIZES = {"640x480": (640, 480), "1024x768": (1024, 768)}
DISTINCT = 48
TARS = 4


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument("--quick", action="store_true", help="a tiny tower: does it run?")
    parser.add_argument("--images", type=int, metavar="N", help="images from end to end")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.device != "cpu" and not torch.cuda.is_available():
        print("gpu.py: torch sees no CUDA device here", file=sys.stderr)
        raise SystemExit(2)
    device = torch.device("cpu") if asked.device == "cpu" else torch.device("cuda", 0)
    machine = {**machine_facts(), **device_facts(device)}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="aesthetic-filter-bench-") as folder:
        bench = Bench(asked.quick, Path(folder))
        fill_in_what_is_missing(bench)
        measure(bench, device, asked.images or (64 if asked.quick else 8192))
    finish(bench, machine, started, asked.json)


def measure(bench: Bench, device: torch.device, images: int) -> None:
    """All of it, on this device."""
    size = TINY if bench.quick else FULL
    work = flops(**size)
    weights = write_clip(bench.folder / "clip.safetensors", **size, text=False)
    precision = towers.choose_precision(device)
    tower = towers.load_tower(weights, device=device, precision=precision)
    rates = product_rates(bench, device)
    tower_alone(bench, tower, work, rates["bfloat16"])
    jpegs = {name: photographs(*shape) for name, shape in SIZES.items()}
    decode_alone(bench, jpegs)
    copy_alone(bench, device)
    agreement(bench, device, weights, jpegs["640x480"])
    end_to_end(bench, tower, weights, jpegs, images, work)


# One thing at a time.


def product_rates(bench: Bench, device: torch.device) -> dict[str, float]:
    """FLOP/s of a large square product; the best of several."""
    rates = {}
    rows = []
    for name in ("float16", "bfloat16"):
        seconds = [product_seconds(bench, device, name) for _ in range(bench.rounds(10))]
        rates[name] = _product_flops(bench) / min(seconds)
        middle = _product_flops(bench) / median(seconds) / 1e12
        rows.append(
            {"what": f"{name} product", "TFLOP/s best": rates[name] / 1e12, "median": middle}
        )
    bench.table("products", rows)
    return rates


def product_seconds(bench: Bench, device: torch.device, precision: str) -> float:
    """Seconds of one product, of some in a row."""
    width, times = (256, 2) if bench.quick else (8192, 10)
    a, b = (torch.randn(width, width, device=device).to(towers.DTYPES[precision]) for _ in range(2))
    a @ b
    return seconds_of(device, lambda: [a @ b for _ in range(times)]) / times


def _product_flops(bench: Bench) -> float:
    return 2.0 * (256 if bench.quick else 8192) ** 3


def tower_alone(bench: Bench, tower: towers.Tower, work: float, rate: float) -> None:
    """Images/s by batch size, of pixels that are on the device already."""
    rows = []
    for count in (1, 4) if bench.quick else (1, 8, 32, 64, 128, 256, 512):
        try:
            speed = median(tower_speed(tower, count, bench.rounds(5)))
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            torch.cuda.empty_cache()
            bench.note(f"the tower: no memory for {count} images at once")
            break
        share = f"{speed * work / rate:.0%}"
        row = {"what": f"tower alone, {tower.precision}, batch {count}", "images/s": speed}
        rows.append({**row, "TFLOP/s": speed * work / 1e12, "of bfloat16 rate": share})
    bench.table("tower", rows)
    bench.note(f"{work / 1e9:.1f} GFLOP an image, counted from the shapes\n")


def tower_speed(tower: towers.Tower, count: int, rounds: int) -> list[float]:
    """Images/s of some rounds."""
    pixels = some_pixels(count).to(tower.device)
    times = 1 if tower.device.type == "cpu" else max(2, 1024 // count)
    with torch.inference_mode():
        found = [
            count * times / seconds_of(tower.device, lambda: [tower(pixels) for _ in range(times)])
            for _ in range(rounds + 1)
        ]
    return found[1:]


def decode_alone(bench: Bench, jpegs: dict[str, list[bytes]]) -> None:
    """Images/s of decoding and resizing, by threads: 1, 2, 4 and so on up to the processors."""
    rows = []
    cores = kernels.default_threads()
    steps = sorted({min(2**n, cores) for n in range(cores.bit_length() + 1)})
    for (size, encoded), decode in ((s, d) for s in jpegs.items() for d in ("exact", "fast")):
        way = partial(preprocessing.preprocess, options=Preprocessing(decode=decode))
        for threads in steps:
            work = (encoded * 50)[: (8 if bench.quick else 96) * threads]
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(way, work[:threads]))
                started, cpu = time.perf_counter(), time.process_time()
                list(pool.map(way, work))
                seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
            row = {"what": f"decode {size} {decode}", "threads": threads}
            row |= {"images/s": len(work) / seconds, "of one core": len(work) / cpu}
            rows.append(row)
    bench.table("decode", rows)


def copy_alone(bench: Bench, device: torch.device) -> None:
    """GB/s of a batch of pixels to the device."""
    rows = []
    cuda = device.type == "cuda"
    for pinned in (True, False) if cuda else (False,):
        pixels = some_pixels(8 if bench.quick else GPU_BATCH)
        pixels = pixels.pin_memory() if pinned else pixels
        there = torch.empty_like(pixels, device=device)
        way = partial(there.copy_, pixels, non_blocking=pinned)
        way()
        seconds = seconds_of(device, lambda way=way: [way() for _ in range(20)]) / 20
        row = {"what": f"copy to the device, {'pinned' if pinned else 'pageable'}"}
        row |= {"images at once": len(pixels), "GB/s": pixels.nbytes / seconds / 1e9}
        rows.append({**row, "images/s": len(pixels) / seconds})
    bench.table("copy", rows)


def agreement(bench: Bench, device: torch.device, weights: Path, jpegs: list[bytes]) -> None:
    """Whether the device embeds as float32 on the processor does; 8 images, through the encoder."""
    jpegs = jpegs[:8]
    pixels = np.stack([preprocessing.preprocess(data).values for data in jpegs])
    with torch.inference_mode():
        wanted = towers.load_tower(weights)(torch.from_numpy(pixels)).numpy()
    with Encoder(ImageOptions(device=str(device), weights=weights)) as encoder:
        futures = [encoder.submit(data) for data in jpegs]
        found = np.stack([future.result().vector for future in futures]).astype(np.float32)
        precision = encoder.precision
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1)
    cosine = float(((found * wanted).sum(axis=1) / lengths).min())
    worst = float(np.abs(found - wanted).max())
    row = {"what": f"{precision} on {device} against float32", "images": len(jpegs)}
    bench.table(
        "agreement", [{**row, "lowest cosine": f"{cosine:.6f}", "largest difference": worst}]
    )
    bench.target(
        f"embeddings in {precision} on {device} against float32 on the processor",
        "cosine 0.9999",
        f"{cosine:.6f} at the lowest",
        cosine >= 0.9999,
    )


# All of it.


def end_to_end(
    bench: Bench,
    tower: towers.Tower,
    weights: Path,
    jpegs: dict[str, list[bytes]],
    images: int,
    work: float,
) -> None:
    """From files to scores, runs taking turns with the tower alone."""
    device = tower.device
    sources = {}
    for size, encoded in jpegs.items():
        sources[f"tar {size}"] = write_tars(bench.folder / f"tar-{size}", encoded, images)
        sources[f"folder {size}"] = write_folder(bench.folder / f"folder-{size}", encoded, images)
    plan = [(name, source, "exact") for name, source in sources.items()]
    plan += [(name, source, "fast") for name, source in sources.items() if "tar" in name]
    out = bench.folder / "scores"
    few = write_tars(bench.folder / "few", jpegs["640x480"], 16)
    watched_run(few, out / "few", ImageOptions(device=str(device), weights=weights))
    feeding_alone(bench, device, weights, sources)

    runs: dict[str, list[dict[str, Any]]] = {f"{name} {decode}": [] for name, _, decode in plan}
    alone, rates = [], []
    batch = 4 if device.type == "cpu" else GPU_BATCH
    for number in range(1 if bench.quick else 3):
        for name, source, decode in plan:
            options = ImageOptions(device=str(device), weights=weights, decode=decode)
            found = watched_run(source, out / f"{number} {name} {decode}", options)
            if found["rows"] != images or found["failed"]:
                raise SystemExit(f"{name}: {found['rows']} rows, {found['failed']} failed")
            runs[f"{name} {decode}"].append(found)
        alone += tower_speed(tower, batch, 1)
        rates.append(_product_flops(bench) / product_seconds(bench, device, "bfloat16"))
    rate = median(rates)
    threads = kernels.default_threads()
    rows = []
    for name, found in runs.items():
        run = sorted(found, key=lambda run: run["images/s"])[len(found) // 2]  # the median one
        row = {"what": name, "images/s": run["images/s"]}
        row["of bfloat16 rate"] = f"{run['images/s'] * work / rate:.0%}"
        row["of tower"] = f"{run['images/s'] / median(alone):.0%}"
        row["device busy"] = f"{run['tower s'] / run['seconds']:.0%}"
        row["decoders busy"] = f"{run['decode s'] / run['seconds'] / threads:.0%}"
        row["decode CPU s"] = run["decode CPU s"]
        row |= {key: run[key] for key in ("CPU s", "seconds", "mean batch", "load s")}
        row["bottleneck"] = bottleneck(run, threads)
        rows.append(row)
    bench.table("end to end", rows)
    bench.note(
        f"{images:,} images each; the median of {len(alone)} runs; beside them the tower alone, "
        f"batch {batch}: {median(alone):,.1f} images/s\n  ({median(alone) * work / rate:.0%} of "
        f"the bfloat16 rate, {rate / 1e12:,.1f} TFLOP/s). Seconds are those of the whole run less "
        "those within\n  loading of the weights, and of their checksum. Device busy: from the "
        "begin to the end of each batch's tower,\n  gaps between its kernels included; decoders "
        f"busy: of {threads} threads, waiting for one another included\n"
    )
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 1e9
        bench.note(f"device memory at the peak: {peak:.1f} GB\n")
    for row in rows:
        bench.target(
            f"{row['what']}, of the bfloat16 rate",
            "60%",
            f"{row['of bfloat16 rate']}; bottleneck: {row['bottleneck']}",
            row["images/s"] * work / rate >= 0.6,
        )
    name, source, decode = plan[0]
    options = ImageOptions(device=str(device), weights=weights, decode=decode)
    with sampled_threads() as samples:
        watched_run(source, out / "sampled", options)
    bench.note(f"{name} {decode} once more, looked at every 5 ms: where each kind of thread is\n")
    bench.table("threads", shares_of(samples))


def feeding_alone(
    bench: Bench, device: torch.device, weights: Path, sources: dict[str, Path]
) -> None:
    """The same runs with neither decoding nor tower: what all the rest would allow."""
    pixels = Pixels(np.zeros((SIZE, SIZE, 3), np.uint8), 640, 480)
    load, decode = towers.load_tower, preprocessing.preprocess
    preprocessing.preprocess = lambda *_: pixels
    towers.load_tower = lambda *given, **named: IdleTower(load(*given, **named))
    rows = []
    try:
        for name, source in sources.items():
            options = ImageOptions(device=str(device), weights=weights)
            run = watched_run(source, bench.folder / "idle" / name, options)
            row = {"what": f"{name}, neither decoded nor embedded", "images/s": run["images/s"]}
            row["CPU ms an image"] = 1e3 * run["CPU s"] / run["rows"]
            rows.append(row)
    finally:
        preprocessing.preprocess, towers.load_tower = decode, load
    bench.table("feeding", rows)


class IdleTower:
    """A tower that gives every image the same embedding."""

    def __init__(self, tower: towers.Tower) -> None:
        self._tower = tower

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tower, name)

    def __call__(self, images: torch.Tensor, **_: Any) -> torch.Tensor:
        """Embed nothing."""
        embedding = torch.full((), towers.PROJECTION**-0.5, device=self._tower.device)
        return embedding.expand(len(images), towers.PROJECTION)


def bottleneck(run: dict[str, Any], threads: int) -> str:
    """What holds a run up."""
    if run["tower s"] >= 0.9 * run["seconds"]:
        return "the tower"
    if run["decode s"] < 0.85 * run["seconds"] * threads:
        return "feeding: neither tower nor decoders are busy"
    if run["decode CPU s"] < 0.7 * run["decode s"]:
        return "decoding: its threads wait for a core or for one another"
    return "decoding"


def watched_run(source: Path, out: Path, options: ImageOptions) -> dict[str, Any]:
    """``score`` a source; what it took, and what took it.

    Returns:
        "rows", "failed"; "load s": within loading of the weights and computing of their checksum,
        "checksum s" of it; all others are without it: "seconds" on the clock, and "CPU s" of the
        process; "images/s"; "first s": until the first batch; "tower s": within the tower, by the
        device's own clock on CUDA; "decode s" and "decode CPU s": all decoders together;
        "batches" and "mean batch".
    """
    with Watch() as watch:
        cpu, started = time.process_time(), time.perf_counter()
        scores = af.score(source, out, images=options, allow_foreign=True)
        seconds = time.perf_counter() - started
        cpu = time.process_time() - cpu
    if not watch.batches:
        raise SystemExit("the benchmark watches functions that the encoder no longer calls")
    load = watch.seconds["load_tower"] + watch.seconds["encoder_weights"]
    seconds -= load
    cpu -= watch.cpu["load_tower"] + watch.cpu["encoder_weights"]
    rows = sum(watch.batches)
    run = json.loads((scores.path / "_run.json").read_text(encoding="utf-8"))
    return {
        "rows": run["rows"],
        "failed": run["failed"],
        "seconds": seconds,
        "images/s": rows / seconds,
        "first s": watch.first - started - load,
        "load s": load,
        "checksum s": watch.seconds["encoder_weights"],
        "CPU s": cpu,
        "tower s": watch.tower_seconds(),
        "decode s": watch.seconds["preprocess"],
        "decode CPU s": watch.cpu["preprocess"],
        "batches": len(watch.batches),
        "mean batch": rows / len(watch.batches),
    }


class Watch:
    """Within it, what the encoder calls is timed: weights, tower and preprocessing."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.cpu: Counter[str] = Counter()
        self.batches: list[int] = []
        self.first = 0.0
        self._spans: list[tuple[Any, Any]] = []
        self._lock = threading.Lock()
        self._before: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Watch:
        load = towers.load_tower
        self._replace(towers, "load_tower", lambda *a, **b: WatchedTower(load(*a, **b), self))
        for module, name in (
            (towers, "load_tower"),
            (weight_files, "encoder_weights"),
            (preprocessing, "preprocess"),
        ):
            self._replace(module, name, self._timed(name, getattr(module, name)))
        return self

    def __exit__(self, *_: object) -> None:
        for module, name, value in reversed(self._before):
            setattr(module, name, value)

    def batch(self, count: int, span: tuple[Any, Any]) -> None:
        """Note a batch that went through the tower: from when to when, or CUDA events."""
        with self._lock:
            self.first = self.first or time.perf_counter()
            self.batches.append(count)
            self._spans.append(span)

    def tower_seconds(self) -> float:
        """All batches together."""
        return sum(
            end - begin if isinstance(end, float) else begin.elapsed_time(end) / 1e3
            for begin, end in self._spans
        )

    def _replace(self, module: Any, name: str, value: Any) -> None:
        self._before.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    def _timed(self, name: str, way: Callable[..., Any]) -> Callable[..., Any]:
        # Decoding is several threads' work at once; while the weights are loaded nothing else runs.
        cpu_time = time.thread_time if name == "preprocess" else time.process_time

        def timed(*given: Any, **named: Any) -> Any:
            started, cpu = time.perf_counter(), cpu_time()
            try:
                return way(*given, **named)
            finally:
                with self._lock:
                    self.seconds[name] += time.perf_counter() - started
                    self.cpu[name] += cpu_time() - cpu

        return timed


class WatchedTower:
    """A tower that notes when it is at work."""

    def __init__(self, tower: towers.Tower, watch: Watch) -> None:
        self._tower = tower
        self._watch = watch
        settle(tower.device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tower, name)

    def __call__(self, images: torch.Tensor, **given: Any) -> torch.Tensor:
        """Embed."""
        mark = self._event if self._tower.device.type == "cuda" else time.perf_counter
        begin = mark()
        vectors = self._tower(images, **given)
        self._watch.batch(len(images), (begin, mark()))
        return vectors

    def _event(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._tower.device))
        return event


@contextmanager
def sampled_threads(every: float = 0.005) -> Iterator[Counter[tuple[str, str]]]:
    """Count where the threads are, by kind of thread: the package's function, and what it calls."""
    found: Counter[tuple[str, str]] = Counter()
    over = threading.Event()

    def look() -> None:
        while not over.wait(every):
            names = {thread.ident: thread.name for thread in threading.enumerate()}
            for ident, frame in sys._current_frames().items():
                name = names.get(ident, "")
                if name.startswith("aesthetic-filter"):
                    kind = name.removeprefix("aesthetic-filter-").partition("_")[0]
                    found[kind, _place(frame)] += 1

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join()


def _place(frame: Any) -> str:
    inner = outer = frame
    while outer.f_back and "aesthetic_filter" not in outer.f_code.co_filename:
        outer = outer.f_back
    names = [
        f"{Path(at.f_code.co_filename).name}:{at.f_code.co_name}:{at.f_lineno}"
        for at in (outer, inner)
    ]
    return names[0] if inner is outer else " > ".join(names)


def shares_of(samples: Counter[tuple[str, str]]) -> list[dict[str, Any]]:
    """The places where each kind of thread is most often."""
    rows = []
    for kind in sorted({kind for kind, _ in samples}):
        places = Counter({place: n for (k, place), n in samples.items() if k == kind})
        for place, count in places.most_common(6):
            share = f"{count / places.total():.0%}"
            rows.append({"what": f"{kind} {place}", "of its samples": share})
    return rows


# What they use.


def photographs(width: int, height: int) -> list[bytes]:
    """JPEGs of quality 90 that cost about what photographs do: noise with their spectrum."""

    def make(number: int) -> bytes:
        random = np.random.default_rng(number)
        down, across = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
        falloff = np.maximum(np.hypot(down, across), 1 / max(width, height)) ** -1.4
        layers = []
        for spread in (50, 12, 12):
            noise = np.fft.rfft2(random.standard_normal((height, width))) * falloff
            noise[0, 0] = 0
            layer = np.fft.irfft2(noise, (height, width))
            layers.append(spread * layer / layer.std())
        light, red, green = layers
        pixels = np.stack([light + red, light + green, light - red - green], axis=-1) + 128
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        return file.getvalue()

    with ThreadPoolExecutor(kernels.default_threads()) as pool:
        return list(pool.map(make, range(DISTINCT)))


def numbered(jpeg: bytes, number: int) -> bytes:
    """The same image in other bytes: an image that is known already would not be embedded."""
    text = f"image {number}".encode()
    after = 4 + int.from_bytes(jpeg[4:6], "big")  # the JFIF header stays the first
    comment = b"\xff\xfe" + (len(text) + 2).to_bytes(2, "big") + text
    return jpeg[:after] + comment + jpeg[after:]


def write_folder(folder: Path, jpegs: list[bytes], images: int) -> Path:
    """So many files; returns ``folder``."""
    folder.mkdir()
    for number in range(images):
        data = numbered(jpegs[number % len(jpegs)], number)
        (folder / f"{number:08d}.jpg").write_bytes(data)
    return folder


def write_tars(folder: Path, jpegs: list[bytes], images: int, archives: int = TARS) -> Path:
    """So many files in some WebDataset archives; returns ``folder``."""
    folder.mkdir()
    each = -(-images // archives)
    for start in range(0, images, each):
        with tarfile.open(folder / f"{start // each:05d}.tar", "w") as archive:
            for number in range(start, min(start + each, images)):
                data = numbered(jpegs[number % len(jpegs)], number)
                member = tarfile.TarInfo(f"{number:08d}.jpg")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return folder


def seconds_of(device: torch.device, way: Callable[[], Any]) -> float:
    """Seconds until the device has done it."""
    settle(device)
    started = time.perf_counter()
    way()
    settle(device)
    return time.perf_counter() - started


def settle(device: torch.device) -> None:
    """Wait until a device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_facts(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    if device.type != "cuda":
        return {"device": str(device)}
    found = torch.cuda.get_device_properties(device)
    return {
        "device": found.name,
        "device memory GB": round(found.total_memory / 1e9),
        "CUDA": torch.version.cuda,
    }


def fill_in_what_is_missing(bench: Bench) -> None:
    """Make it run on a machine that has little beyond torch; says what is different there."""
    try:
        version("aesthetic-filter")
    except PackageNotFoundError:  # runs from its source: a scores folder names the version
        facts = bench.folder / "facts" / "aesthetic_filter-0.dist-info"
        facts.mkdir(parents=True)
        (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: aesthetic-filter\nVersion: 0")
        sys.path.append(str(facts.parent))
    if find_spec("llvmlite") is None:
        kernels.COMPILED_FROM_ROWS = sys.maxsize
        bench.note("llvmlite is not installed: scores are computed by NumPy, slower")
    if find_spec("numba") is None:
        preprocessing.preprocess = _with_pillow
        bench.note("numba is not installed: images are resized by Pillow, at half the speed")


def _with_pillow(data: bytes, options: Preprocessing = Preprocessing()) -> Pixels:
    image = Image.open(io.BytesIO(data))
    width, height = image.size
    if options.decode == "fast":
        image.draft(None, (SIZE, SIZE))
    short = min(width, height)
    new = int(SIZE * width / short), int(SIZE * height / short)
    image = image.convert("RGB").resize(new, Image.Resampling.BICUBIC)
    left, top = round((new[0] - SIZE) / 2.0), round((new[1] - SIZE) / 2.0)
    values = np.array(image.crop((left, top, left + SIZE, top + SIZE)))
    return Pixels(values, width, height)


def finish(bench: Bench, machine: dict[str, Any], started: float, file: Path | None) -> None:
    """Print the targets, and write everything to ``file``."""
    print("Targets" + (" (do not apply to --quick)" if bench.quick else ""))
    met = {True: "met", False: "MISSED", None: "-"}
    for target in bench.targets:
        print(f"  {met[target.met]:<7} {target.what}: {target.measured} (wanted: {target.wanted})")
    print(f"\n{time.perf_counter() - started:.0f} s")
    if file:
        found = {
            "machine": machine,
            "load at the end": os.getloadavg()[0],
            "quick": bench.quick,
            "targets": [asdict(target) for target in bench.targets],
            "figures": bench.figures,
            "notes": bench.notes,
        }
        file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
