"""A run on Ray: the same folder as on one machine, whatever happens to its processes."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import aesthetic_filter as af
from aesthetic_filter.errors import (
    AestheticFilterError,
    ClusterError,
    ShardError,
    StageError,
    WidthError,
)
from aesthetic_filter.formats import Shard
from images import (
    EXACT,
    WITHIN,
    jpeg,
    pictures,
    rows,
    run_without,
    sha256,
    write_files,
    write_table,
    write_tar,
)
from ray_help import (
    MARK,
    Hold,
    HoldWithSetup,
    Watch,
    check_alike,
    check_same,
    command,
    killed_when_held,
    marked,
    parts_of,
    states,
    surroundings,
    until,
)

ray = pytest.importorskip("ray")
backend = pytest.importorskip("aesthetic_filter.backends.ray")

pytestmark = [
    pytest.mark.timeout(120),
    # Ray's own, of its workers' pipes and of what it will change.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]

Make = Callable[..., np.ndarray]
Run = Callable[..., Any]

STORE_BYTES = 80 << 20
"""About the smallest object store that Ray allows."""

OPTIONS = ("--precision", "float32", "--device", "cpu")


@pytest.fixture(scope="module")
def watch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watch]:
    """A Ray with two processors, for this process and for command lines that are given its address.

    Its workers log what they do.
    """
    watch = Watch(tmp_path_factory.mktemp("ray") / "watch")
    with surroundings(watch):
        ray.init(
            address="local",
            num_cpus=2,
            num_gpus=0,
            object_store_memory=STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
        try:
            yield watch
        finally:
            ray.shutdown()


@pytest.fixture(autouse=True)
def fresh(watch: Watch) -> None:
    watch.clear()


@pytest.fixture
def address(watch: Watch) -> str:  # noqa: ARG001
    found: str = ray.get_runtime_context().gcs_address
    return found


@pytest.fixture
def vectors(tmp_path: Path, make_embeddings: Make) -> Path:
    """Three .npy shards of 900 rows, some of which fail."""
    folder = tmp_path / "vectors"
    folder.mkdir()
    for number in range(3):
        values = make_embeddings(900, seed=number)
        values[number::100] = 0
        values[50 + number] = np.nan
        np.save(folder / f"{number}.npy", values)
    return folder


def both(source: Path, tmp_path: Path, **options: Any) -> tuple[Path, Path]:
    """Scored on Ray, and here."""
    out, twin = tmp_path / "ray", tmp_path / "local"
    af.score(source, out, backend="ray", **options)
    af.score(source, twin, **options)
    return out, twin


def only_scores(**options: Any) -> af.ImageAestheticFilterStage:
    return af.ImageAestheticFilterStage(score_threshold=None, **options)


# The same as on one machine: embeddings.


@pytest.fixture
def small_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each shard arrives in several pieces."""
    monkeypatch.setattr(backend, "JOINED_ROWS", 200)


@pytest.mark.usefixtures("small_tables")
def test_npy(vectors: Path, tmp_path: Path) -> None:
    out, twin = both(vectors, tmp_path)
    check_same(out, twin)
    ids = [row["image_id"] for row in rows(out)]
    assert ids == [f"{shard}.npy#{row}" for shard in range(3) for row in range(900)]
    assert json.loads((out / "_run.json").read_text())["status"] == "complete"


@pytest.mark.usefixtures("small_tables")
def test_parquet_whose_shards_differ(tmp_path: Path, make_embeddings: Make) -> None:
    folder = tmp_path / "in"
    for number in range(3):
        values = make_embeddings(500, seed=number, dtype=np.float32)
        column = pa.array(list(values), pa.list_(pa.float32()))
        ids = [f"{number}-{row}" for row in range(500)]
        columns = {"id": ids, "embedding": column, "group": [row % 7 for row in range(500)]}
        if number == 1:
            columns["caption"] = [None if row % 3 else f"no {row}" for row in range(500)]
            columns["group"] = [str(row) for row in range(500)]
        if number == 2:
            columns["aesthetic_score"] = np.arange(500) / 7
            columns["tags"] = [[str(row)] * (row % 3) for row in range(500)]
        write_table(folder / f"{number}.parquet", columns)
    empty = pq.read_table(folder / "0.parquet").slice(0, 0)
    pq.write_table(empty, folder / "3.parquet")
    out, twin = both(folder, tmp_path)
    check_same(out, twin)
    found = list(parts_of(out).values())
    assert [table.num_rows for table in found] == [500, 500, 500, 0]
    assert found[1].column("caption").to_pylist()[3] == "no 3"
    assert found[2].column("source_aesthetic_score").to_pylist()[7] == 1.0


def test_a_scores_folder(tmp_path: Path, model_dir: Path) -> None:
    source = write_files(tmp_path / "in", {f"{n:02}.jpg": jpeg(n) for n in range(30)})
    write_files(source, {"bad.jpg": b"no image"})
    af.score(source, tmp_path / "s", images=EXACT, model_dir=model_dir)
    out, twin = both(tmp_path / "s", tmp_path, head="laion-v1", allow_foreign=True)
    check_same(out, twin)
    assert len(rows(out)) == 31


# The same as on one machine: images.


@pytest.fixture(scope="module")
def folder_run(
    watch: Watch, tmp_path_factory: pytest.TempPathFactory, model_dir: Path
) -> dict[str, Any]:
    """One run over a folder, and all that was seen of it."""
    watch.clear()
    folder = tmp_path_factory.mktemp("folder")
    files = {**pictures(), **{f"c/{n:03}.jpg": jpeg(n) for n in range(120)}}
    files |= {"b/cut.jpg": jpeg(7)[:200], "b/text.png": b"no image", "c/empty.jpg": b""}
    source = write_files(folder / "in", files)
    out, twin = folder / "ray", folder / "local"
    put: list[int] = []
    seen: list[tuple[int, int, int, int]] = []
    real = ray.put

    def weighed(value: Any, **more: Any) -> Any:
        put.append(len(ray.cloudpickle.dumps(value)))
        return real(value, **more)

    def on_progress(now: af.Progress) -> None:
        seen.append((now.rows, now.bytes, now.total_bytes, now.finished))

    before = pickle.dumps(vars(ray.data.DataContext.get_current()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "put", weighed)
        scores = af.score(
            source,
            out,
            images=EXACT,
            model_dir=model_dir,
            backend="ray",
            on_progress=on_progress,
        )
    context_stays = pickle.dumps(vars(ray.data.DataContext.get_current())) == before
    facts = {"decoded": watch.decoded, "towers": watch.towers, "put": put, "seen": seen}
    af.score(source, twin, images=EXACT, model_dir=model_dir)
    facts |= {"files": files, "source": source, "out": out, "twin": twin}
    return {**facts, "context_stays": context_stays, "scores": scores}


def test_a_folder(folder_run: dict[str, Any]) -> None:
    check_alike(folder_run["out"], folder_run["twin"], WITHIN)
    files = folder_run["files"]
    found = {row["image_id"]: row for row in rows(folder_run["out"])}
    assert sorted(found) == sorted(files)
    bad = {name for name, row in found.items() if row["error"]}
    assert bad == {"b/cut.jpg", "b/text.png", "c/empty.jpg"}
    for name in files.keys() - bad:
        assert found[name]["image_sha256"] == sha256(files[name])
    assert not list(folder_run["out"].glob("*.embedded"))


def test_each_image_is_decoded_once(folder_run: dict[str, Any]) -> None:
    tried = [sha256(content) for content in folder_run["files"].values()]
    assert sorted(folder_run["decoded"]) == sorted(tried)


def test_the_weights_load_once_in_each_actor(folder_run: dict[str, Any]) -> None:
    assert len(folder_run["towers"]) == 1
    assert folder_run["towers"][0] != os.getpid()


def test_the_weights_never_travel(folder_run: dict[str, Any], model_dir: Path) -> None:
    (weights,) = model_dir.rglob("model.safetensors")
    assert weights.stat().st_size > 500_000
    assert folder_run["put"]  # it is known what went into the object store
    assert max(folder_run["put"]) < 50_000
    stage = af.ImageEmbeddingStage(model_dir, options=EXACT)
    try:
        stage.setup()
        assert len(pickle.dumps(stage)) < 2_000
    finally:
        stage.close()


def test_progress_ends_with_everything_finished(folder_run: dict[str, Any]) -> None:
    seen = folder_run["seen"]
    total = sum(len(content) for content in folder_run["files"].values())
    assert seen[-1] == (len(folder_run["files"]), total, total, 1)
    assert len(seen) > 3
    assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in itertools.pairwise(seen))


def test_what_the_caller_had_set_up_stays(folder_run: dict[str, Any]) -> None:
    assert folder_run["context_stays"]
    assert ray.is_initialized()
    assert ray.get(ray.put(3)) == 3


def test_captions_and_json_that_differ_and_a_tar_cut_in_the_middle(
    tmp_path: Path, model_dir: Path
) -> None:
    folder = tmp_path / "in"
    for shard in range(3):
        inside: list[tuple[str, bytes]] = []
        for n in range(40):
            facts: dict[str, Any] = {"number": n} if shard else {"number": str(n)}
            inside += [
                (f"{n:03}.jpg", b"broken" if n == 5 else jpeg(100 * shard + n)),
                (f"{n:03}.json", json.dumps(facts).encode()),
            ]
            inside += [(f"{n:03}.txt", f"caption {n}".encode())] if shard < 2 else []
        write_tar(folder / f"{shard}.tar", inside)
    whole = (folder / "1.tar").read_bytes()
    (folder / "1.tar").write_bytes(whole[: len(whole) // 2])
    seen: list[dict[str, str]] = []
    options = {"images": EXACT, "model_dir": model_dir}
    for place, name in (("ray", "ray"), ("local", "local")):
        af.score(
            folder,
            tmp_path / name,
            backend=place,
            on_progress=lambda now: seen.append(dict(now.broken)),
            **options,  # type: ignore[arg-type]
        )
        assert list(seen[-1]) == ["1.tar"]
    check_alike(tmp_path / "ray", tmp_path / "local", WITHIN)
    found = list(parts_of(tmp_path / "ray").values())
    counts = [table.num_rows for table in found]
    assert counts[0] == counts[2] == 40
    assert 10 < counts[1] < 30
    assert [column for column in found[0].column_names if column not in found[2].column_names] == [
        "txt"
    ]
    facts = [json.loads((tmp_path / n / "_run.json").read_text()) for n in ("ray", "local")]
    for name in ("status", "broken_shards", "rows", "failed", "scored"):
        assert facts[0][name] == facts[1][name]
    assert facts[0]["status"] == "incomplete"


def test_parquet_with_image_bytes(tmp_path: Path, model_dir: Path) -> None:
    for shard in range(2):
        content = [jpeg(50 * shard + n) for n in range(40)]
        structs: list[Any] = [{"bytes": c, "path": f"{n}.jpg"} for n, c in enumerate(content)]
        structs[3], structs[4] = None, {"bytes": b"broken", "path": "x.jpg"}
        columns = {"image": structs, "label": list(range(40))}
        if shard:
            columns["width"] = [9] * 40
        write_table(tmp_path / f"in/{shard}.parquet", columns)
    out, twin = both(tmp_path / "in", tmp_path, images=EXACT, model_dir=model_dir)
    check_alike(out, twin, WITHIN)
    found = rows(out)
    assert len(found) == 80
    assert [n for n, row in enumerate(found) if row["error"]] == [3, 4, 43, 44]


# Bounded memory.


def test_more_than_the_object_store_holds(tmp_path: Path, model_dir: Path, watch: Watch) -> None:
    padding = os.urandom(400_000)  # an image's bytes, and 150,000 more as pixels
    folder = tmp_path / "in"
    count = 120
    for shard in range(4):
        inside = ((f"{n:03}.jpg", jpeg(n % 20) + padding + bytes([shard, n])) for n in range(count))
        write_tar(folder / f"{shard}.tar", inside)
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size + 4 * count * 224 * 224 * 3 > 3 * STORE_BYTES
    out = tmp_path / "s"
    af.score(folder, out, images=EXACT, model_dir=model_dir, backend="ray")
    found = rows(out)
    assert [row["image_id"] for row in found] == [
        f"{shard}.tar/{n:03}" for shard in range(4) for n in range(count)
    ]
    assert all(row["error"] is None for row in found)
    assert len(watch.decoded) == 4 * count


# Killed, interrupted, and gone on with.


@pytest.fixture
def tars(tmp_path: Path) -> tuple[Path, dict[str, bytes]]:
    """Four archives of 40 images, and their rows."""
    wanted: dict[str, bytes] = {}
    for shard in range(4):
        images = {f"{n:03}.jpg": jpeg(1000 + 100 * shard + n) for n in range(40)}
        write_tar(tmp_path / f"tars/{shard}.tar", images.items())
        wanted |= {f"{shard}.tar/{name[:-4]}": content for name, content in images.items()}
    return tmp_path / "tars", wanted


def check_images(out: Path, wanted: dict[str, bytes]) -> None:
    """Every row once, in order, each embedded; nothing is left beside the parts."""
    found = rows(out)
    assert [row["image_id"] for row in found] == list(wanted)
    assert [row["image_sha256"] for row in found] == [sha256(c) for c in wanted.values()]
    assert all(row["error"] is None and row["embedding"] for row in found)
    assert {path.name for path in out.iterdir() if path.suffix != ".parquet"} <= {
        ".lock",
        "_run.json",
    }
    assert json.loads((out / "_run.json").read_text())["status"] == "complete"


def known(out: Path) -> set[str]:
    """The images whose embeddings lie in a scores folder, by sha256."""
    from test_images_run import known as by_hand

    return by_hand(out)


def test_the_driver_is_killed(
    tars: tuple[Path, dict[str, bytes]],
    tmp_path: Path,
    model_dir: Path,
    watch: Watch,
    address: str,
) -> None:
    source, wanted = tars
    out, here = tmp_path / "s", tmp_path / "here"
    run = ("score", source, "--out", out, "--backend", "ray", "--ray-address", address)
    with (
        watch.paused(0.03),
        command(*run, *OPTIONS, "--model-dir", model_dir, "--workers", 2, cwd=tmp_path) as driver,
    ):
        until(lambda: states(out) and len(known(out)) > 60, lambda: driver.poll() is None)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    assert driver.returncode == -signal.SIGKILL
    finished, before = states(out), known(out)
    assert 1 <= len(finished) < 4
    assert len(before) < len(wanted)
    shutil.copytree(out, here)
    until(lambda: not other_jobs())  # what that driver's workers still do is not counted
    watch.clear()

    af.score(source, out, images=EXACT, model_dir=model_dir, backend="ray")
    assert finished.items() <= states(out).items()
    assert sorted(watch.decoded) == sorted({sha256(c) for c in wanted.values()} - before)
    check_images(out, wanted)

    # A run begun on Ray goes on here.
    with counting() as decoded:
        af.score(source, here, images=EXACT, model_dir=model_dir)
    assert sorted(decoded) == sorted(watch.decoded)
    check_images(here, wanted)


def other_jobs() -> list[dict[str, Any]]:
    """The jobs of Ray that are alive, less this process's."""
    from ray._private import state

    ours = ray.get_runtime_context().get_job_id()
    return [job for job in state.jobs() if not job["IsDead"] and job["JobID"] != ours]


class counting:  # noqa: N801 - reads as a verb
    """Every image that is decoded in this process, by sha256."""

    def __enter__(self) -> list[str]:
        from aesthetic_filter.clip import preprocess

        seen: list[str] = []
        real = preprocess.preprocess

        def counted(image: Any, *more: Any) -> Any:
            seen.append(sha256(image))
            return real(image, *more)

        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(preprocess, "preprocess", counted)
        return seen

    def __exit__(self, *_: object) -> None:
        self._patch.undo()


def test_a_run_begun_here_goes_on_on_ray(
    tars: tuple[Path, dict[str, bytes]], tmp_path: Path, model_dir: Path, watch: Watch
) -> None:
    source, wanted = tars
    out = tmp_path / "s"
    options = af.ImageOptions(device="cpu", precision="float32", batch_size=4)

    def stop(progress: af.Progress) -> None:
        if progress.rows >= 60:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        af.score(source, out, images=options, model_dir=model_dir, workers=1, on_progress=stop)
    finished, before = states(out), known(out)
    assert len(finished) == 1
    assert 60 <= len(before) < len(wanted)
    af.score(source, out, images=options, model_dir=model_dir, backend="ray")
    assert finished.items() <= states(out).items()
    assert sorted(watch.decoded) == sorted({sha256(c) for c in wanted.values()} - before)
    check_images(out, wanted)
    state = states(out)
    watch.clear()
    af.score(source, out, images=options, model_dir=model_dir, backend="ray")  # nothing is left
    assert states(out) == state
    assert watch.decoded == watch.towers == []


def test_ctrl_c_on_a_ray_of_its_own(
    tars: tuple[Path, dict[str, bytes]], tmp_path: Path, model_dir: Path, watch: Watch
) -> None:
    source, wanted = tars
    out, mark = tmp_path / "s", "ctrl-c"
    run = ("score", source, "--out", out, "--backend", "ray", *OPTIONS, "--model-dir", model_dir)
    with watch.paused(0.03), command(*run, cwd=tmp_path, env={MARK: mark}) as driver:
        until(lambda: out.exists() and len(known(out)) > 30, lambda: driver.poll() is None)
        assert driver.poll() is None, driver.communicate()
        os.killpg(driver.pid, signal.SIGINT)  # as a terminal does it
        _, errors = driver.communicate(timeout=60)
    assert driver.returncode == 130, errors
    # Less how far it is, and a remark of Ray's that nothing silences.
    lines = [x for x in errors.splitlines() if " left" not in x and "core_worker.cc" not in x]
    assert len(lines) == 1, errors
    assert re.search(r"interrupted; \d of 4 shards are finished and whole; ", lines[0])
    assert "the same command goes on" in lines[0]
    until(lambda: not marked(mark), seconds=30)  # its Ray went with it
    assert json.loads((out / "_run.json").read_text())["status"] == "incomplete"
    before = known(out)
    with counting() as decoded:
        af.score(source, out, images=EXACT, model_dir=model_dir)
    assert sorted(decoded) == sorted({sha256(c) for c in wanted.values()} - before)
    check_images(out, wanted)


# Workers are killed.


@pytest.mark.usefixtures("small_tables")
@pytest.mark.parametrize("kind", [Hold, HoldWithSetup])
def test_a_worker_is_killed_in_the_middle_of_a_shard(
    kind: type[Hold], vectors: Path, tmp_path: Path, watch: Watch
) -> None:
    stages = [af.ImageReaderStage(vectors), kind(watch.folder), only_scores()]
    with killed_when_held(watch.folder, "stage") as killed:
        af.Pipeline(stages).run(backend="ray", scores=tmp_path / "ray")
    assert len(killed) == 1
    if kind is HoldWithSetup:  # there was an actor, and another in its place
        assert len(set(watch.lines("set-up"))) >= 2
    af.Pipeline(stages).run(scores=tmp_path / "local")
    check_same(tmp_path / "ray", tmp_path / "local")
    assert len(rows(tmp_path / "ray")) == 2700


@pytest.mark.parametrize("what", ["decode", "encode"])
def test_a_worker_that_holds_images_is_killed(
    what: str,
    tars: tuple[Path, dict[str, bytes]],
    tmp_path: Path,
    model_dir: Path,
    watch: Watch,
) -> None:
    source, wanted = tars
    out = tmp_path / "s"
    with killed_when_held(watch.folder, what) as killed:
        af.score(source, out, images=EXACT, model_dir=model_dir, backend="ray")
    assert len(killed) == 1
    if what == "encode":
        assert killed[0] == watch.towers[0]
        assert len(set(watch.towers)) == 2
    check_images(out, wanted)


# Failures.


def test_an_unreadable_shard_ends_the_run_or_is_recorded(
    vectors: Path, tmp_path: Path, address: str, cli: Run
) -> None:
    (vectors / "1.npy").write_bytes(b"no array")
    problems = []
    for place in ("ray", "local"):
        with pytest.raises(ShardError) as caught:
            af.score(vectors, tmp_path / f"{place}-1", backend=place)
        assert caught.value.shard == "1.npy"
        problems.append(str(caught.value))
    assert problems[0] == problems[1]
    run = ("--backend", "ray", "--ray-address", address)
    done = cli("score", vectors, "-o", "ray", "--keep-going", *run)
    here = cli("score", vectors, "-o", "local", "--keep-going")
    assert done.returncode == here.returncode == 3, done.stderr
    assert done.stderr == here.stderr
    assert f"broken shard {problems[0]}" in done.stderr
    # The summary is the same but for the time, and the folder's name.
    lines = [text.splitlines()[:-2] for text in (done.stdout, here.stdout)]
    assert len(lines[0]) == 3
    assert lines[0] == [line.replace("local", "ray") for line in lines[1]]
    assert re.fullmatch(r"[\d.]+ s, [\d,.]+ rows/s", done.stdout.splitlines()[-2])
    check_same(tmp_path / "ray", tmp_path / "local")


def test_embeddings_of_another_width(vectors: Path, tmp_path: Path) -> None:
    np.save(vectors / "1.npy", np.ones((50, 512), np.float16))
    problems = []
    for place in ("ray", "local"):
        with pytest.raises(WidthError) as caught:
            af.score(vectors, tmp_path / place, backend=place)
        assert caught.value.exit_code == 4
        problems.append(str(caught.value))
    assert problems[0] == problems[1]
    assert problems[0].startswith("1.npy: ")
    assert "512" in problems[0]


class Fails:
    """A stage with a fault."""

    name = "Fragile"

    def __call__(self, table: pa.Table) -> pa.Table:  # noqa: ARG002
        raise KeyError("colour")


class FailsWithSetup(Fails):
    def setup(self) -> None:
        """So it runs in an actor."""


class FailsInSetup(Fails):
    def setup(self) -> None:
        raise ValueError("no such model")


class LosesColumns:
    def __call__(self, table: pa.Table) -> pa.Table:
        return table.drop_columns(["image_id"])


@pytest.mark.parametrize(
    ("stage", "problem"),
    [
        (Fails(), "Fragile: KeyError: 'colour'"),
        (FailsWithSetup(), "Fragile: KeyError: 'colour'"),
        (LosesColumns(), "LosesColumns: lost the column 'image_id'"),
    ],
)
def test_a_stage_that_fails_is_named(
    stage: Any, problem: str, vectors: Path, tmp_path: Path
) -> None:
    pipeline = af.Pipeline([af.ImageReaderStage(vectors), stage, only_scores()])
    with pytest.raises(StageError) as caught:
        pipeline.run(backend="ray", scores=tmp_path / "s")
    assert str(caught.value).startswith(problem)
    assert "\n" not in str(caught.value)
    facts = json.loads((tmp_path / "s/_run.json").read_text())
    assert facts["status"] == "incomplete"
    assert facts["error"].startswith(problem)


def test_a_stage_that_cannot_be_set_up(vectors: Path, tmp_path: Path) -> None:
    pipeline = af.Pipeline([af.ImageReaderStage(vectors), FailsInSetup(), only_scores()])
    with pytest.raises(AestheticFilterError, match="no such model") as caught:
        pipeline.run(backend="ray", scores=tmp_path / "s")
    assert "\n" not in str(caught.value)


class OfSomebodyElseError(AestheticFilterError):
    """An error that the package does not know."""


class RaisesItsOwn:
    def __call__(self, table: pa.Table) -> pa.Table:
        raise OfSomebodyElseError(f"the licence server is down, {len(table)} rows wait")


def test_an_error_of_somebody_s_own_keeps_its_words(vectors: Path, tmp_path: Path) -> None:
    pipeline = af.Pipeline([af.ImageReaderStage(vectors), RaisesItsOwn(), only_scores()])
    with pytest.raises(AestheticFilterError, match="the licence server is down"):
        pipeline.run(backend="ray", scores=tmp_path / "s")


def test_a_shard_that_never_arrives_is_no_success() -> None:
    assembly = backend._Assembly(None, [Shard("0.tar", ()), Shard("1.tar", ())])  # type: ignore[arg-type]
    assembly._over.add(0)
    with pytest.raises(ClusterError, match=r"lost 1 shard\(s\), 1\.tar among them"):
        assembly.check_all_arrived()
    assembly._over.add(1)
    assembly.check_all_arrived()


def test_lost_blocks_are_never_put_up_with() -> None:
    mine = ray.data.DataContext.get_current()
    before, mine.max_errored_blocks = mine.max_errored_blocks, -1
    try:
        assert backend._context([]).max_errored_blocks == 0
        assert mine.max_errored_blocks == -1
    finally:
        mine.max_errored_blocks = before


class Marks:
    """A stage that drops odd rows and adds a column."""

    gives = ("parity",)

    def __call__(self, table: pa.Table) -> pa.Table:
        numbers = [int(name.rpartition("#")[2]) for name in table.column("image_id").to_pylist()]
        table = table.append_column("parity", pa.array([n % 2 for n in numbers]))
        return table.filter(pc.equal(table.column("parity"), 0))


@pytest.mark.usefixtures("small_tables")
def test_what_stages_drop_and_add(vectors: Path, tmp_path: Path) -> None:
    stages = [
        af.ImageReaderStage(vectors),
        Marks(),
        af.ImageAestheticFilterStage(score_threshold=4.4),
    ]
    done = [
        af.Pipeline(stages).run(backend=place, scores=tmp_path / place)
        for place in ("ray", "local")
    ]
    check_same(tmp_path / "ray", tmp_path / "local")
    assert done[0].counts == done[1].counts
    assert done[0].counts.dropped["Marks"] == 1350 - 0
    assert done[0].backend == "ray"


def test_nobody_at_the_address(cli: Run, vectors: Path) -> None:
    for wrong, word in (
        ("127.0.0.1:1", "127.0.0.1:1: no Ray cluster answers there"),
        ("ray://127.0.0.1:10001", "Ray Data does not run through Ray's client"),
        ("nonsense", "nonsense: no Ray cluster answers there"),
    ):
        began = time.monotonic()
        done = cli("score", vectors, "-o", "s", "--backend", "ray", "--ray-address", wrong)
        assert time.monotonic() - began < 20
        assert done.returncode == 1
        assert done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert word in line


def test_somebody_else_at_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(backend, "REACH_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        wrong = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ClusterError, match=f"^{wrong}: no Ray cluster answers"):
            backend._connect(wrong)
    answer = b"HTTP/1.1 400 Bad Request\r\n\r\n"  # Ray's dashboard, say
    with socket.create_server(("127.0.0.1", 0)) as server:
        wrong = f"127.0.0.1:{server.getsockname()[1]}"

        def serve() -> None:
            there, _ = server.accept()
            with there:
                there.recv(100)
                there.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(ClusterError, match="what listens there is not Ray"):
            backend._connect(wrong)
        thread.join()


def test_without_ray(tmp_path: Path, vectors: Path) -> None:
    done = run_without(["ray"], "score", vectors, "-o", "s", "--backend", "ray", cwd=tmp_path)
    assert done.returncode == 2
    assert 'pip install "aesthetic-filter[ray]"' in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_weights_that_are_not_to_be_had(tmp_path: Path, cli: Run, address: str) -> None:
    write_files(tmp_path / "in", {"a.jpg": jpeg(1)})
    run = ("score", "in", "--out", "s", "--model-dir", tmp_path / "models")
    here = cli(*run)
    there = cli(*run, "--backend", "ray", "--ray-address", address)
    assert "the hub cannot be reached" in here.stderr
    assert there.stderr == here.stderr
    assert there.returncode == here.returncode == 1


# A Ray of its own.


def test_a_ray_of_its_own_goes_when_the_run_ends(cli: Run, vectors: Path, tmp_path: Path) -> None:
    done = cli("score", vectors, "--out", "s", "--backend", "ray", env={MARK: "own"})
    assert done.returncode == 0
    # On a machine so busy that this takes ten seconds, progress is printed.
    said = [line for line in done.stderr.splitlines() if " of 3 shards, " not in line]
    assert said == []
    until(lambda: not marked("own"), seconds=30)
    af.score(vectors, tmp_path / "local")
    check_same(tmp_path / "s", tmp_path / "local")
