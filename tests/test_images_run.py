"""Runs over images: killed, interrupted, changed, short of memory; nothing is embedded twice."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

import aesthetic_filter as af
from aesthetic_filter import cli as commands
from aesthetic_filter.clip import preprocess
from aesthetic_filter.clip.encoder import Embedded
from aesthetic_filter.errors import AestheticFilterError, OutputError
from aesthetic_filter.formats import folder as folder_format
from aesthetic_filter.journal import Journal
from images import (
    EXACT,
    WITHIN,
    affine,
    by_id,
    jpeg,
    parts,
    rows,
    run_measured,
    run_without,
    sha256,
    write_files,
    write_tar,
)

Record = tuple[str, int, int, np.ndarray]
RECORD_BYTES = 4 + 4 + 4 + 32 + 768 * 2


@pytest.fixture(autouse=True)
def weights(monkeypatch: pytest.MonkeyPatch, model_dir: Path) -> None:
    monkeypatch.setenv("AESTHETIC_FILTER_MODEL_DIR", str(model_dir))


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Every image that is decoded, in this process."""
    seen: list[bytes] = []
    real = preprocess.preprocess

    def counted(image: Any, *more: Any) -> Any:
        seen.append(image)
        return real(image, *more)

    monkeypatch.setattr(preprocess, "preprocess", counted)
    return seen


def run(*arguments: object) -> Result:
    """The command line, in this process."""
    done = CliRunner().invoke(commands.app, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def journals(out: Path) -> list[Path]:
    return sorted(out.rglob("*.embedded"))


def check(out: Path, wanted: dict[str, bytes]) -> None:
    """The rows are these images, in order, each with a score that its own embedding gives."""
    found = rows(out)
    assert [row["image_id"] for row in found] == list(wanted)
    assert [row["image_sha256"] for row in found] == [sha256(c) for c in wanted.values()]
    scores = affine(np.array([row["embedding"] for row in found], np.float16))
    assert np.abs(scores - [row["aesthetic_score"] for row in found]).max() < 2e-5


# Killed and interrupted.

CHILD = """
import os, sys, time
from aesthetic_filter.clip import preprocess
log = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
pause = float(sys.argv.pop(1))
real = preprocess.preprocess
def counted(*given):
    os.write(log, b".")
    time.sleep(pause)
    return real(*given)
preprocess.preprocess = counted
from aesthetic_filter.cli import main
main()
"""
"""The command line; it logs a dot for each image that it decodes."""

SHARDS, SAMPLES, BATCH = 2, 200, 4
OPTIONS = ("--precision", "float32", "--device", "cpu", "--batch-size", str(BATCH))


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """Two archives of 200 images each, and their rows."""
    folder = tmp_path_factory.mktemp("many") / "in"
    wanted = {}
    for shard in range(SHARDS):
        images = {f"{n:03}.jpg": jpeg(1000 * shard + n) for n in range(SAMPLES)}
        write_tar(folder / f"{shard}.tar", images.items())
        wanted |= {f"{shard}.tar/{name[:-4]}": content for name, content in images.items()}
    return folder, wanted


@contextlib.contextmanager
def half_way(
    source: Path, out: Path, log: Path, moment: int, pause: float = 0
) -> Iterator[subprocess.Popen[str]]:
    """A run that has decoded so many images, by its log."""
    command = [sys.executable, "-c", CHILD, str(log), str(pause)]
    with subprocess.Popen(
        [*command, "score", str(source), "--out", str(out), *OPTIONS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            until = time.monotonic() + 60
            while not log.exists() or log.stat().st_size < moment:
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < until
                time.sleep(0.002)
            yield process
        finally:
            process.kill()


def known(out: Path) -> set[str]:
    """The images whose embeddings lie in a scores folder, by sha256, read by hand."""
    found = {row["image_sha256"] for row in rows(out) if row["embedding"]}
    for path in journals(out):
        data = path.read_bytes()
        for start in range(0, len(data) - RECORD_BYTES + 1, RECORD_BYTES):
            record = data[start : start + RECORD_BYTES]
            assert struct.unpack("<I", record[:4])[0] == zlib.crc32(record[4:], 1)
            found.add(record[12:44].hex())
    return found


def test_killed_at_random_moments_nothing_is_embedded_twice(
    tmp_path: Path, many: tuple[Path, dict[str, bytes]], embedded: list[bytes]
) -> None:
    source, wanted = many
    out, log = tmp_path / "s", tmp_path / "log"
    chance = random.Random(5)
    moments = [chance.randint(5, 150), chance.randint(200, 360)]
    before: set[str] = set()
    for moment in moments:
        with half_way(source, out, log, moment) as process:
            process.kill()
            process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert before <= known(out)
        before = known(out)
        assert json.loads((out / "_run.json").read_text())["status"] == "running"
    assert len(before) > 100

    done = run("score", source, "--out", out, *OPTIONS)
    assert done.exit_code == 0, done.stderr
    assert {sha256(image) for image in embedded} == {sha256(c) for c in wanted.values()} - before
    assert len(embedded) == len(wanted) - len(before)
    # What a killed run lost is what was on its way: for each shard two batches and a few more.
    under_way = SHARDS * (3 * BATCH + 16)
    assert log.stat().st_size + len(embedded) <= len(wanted) + len(moments) * under_way
    check(out, wanted)
    assert journals(out) == []
    assert list(out.rglob("*.unfinished")) == []
    assert json.loads((out / "_run.json").read_text())["status"] == "complete"

    whole = tmp_path / "whole"
    af.score(source, whole, images=EXACT)
    for row, twin in zip(rows(out), rows(whole), strict=True):
        assert row["aesthetic_score"] == pytest.approx(twin["aesthetic_score"], abs=WITHIN)
        assert row["width"] == twin["width"] == row["height"] == 32


def test_ctrl_c_half_way(
    tmp_path: Path, many: tuple[Path, dict[str, bytes]], embedded: list[bytes]
) -> None:
    source, wanted = many
    out, log = tmp_path / "s", tmp_path / "log"
    # Decoding is what it waits for, so that many images are in line when it is interrupted.
    with half_way(source, out, log, 60, pause=0.03) as process:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "interrupted; 0 of 2 shards are finished and whole" in errors
    assert "the same command goes on" in errors
    assert len(errors.strip().splitlines()) == 1
    assert json.loads((out / "_run.json").read_text())["status"] == "incomplete"
    before = known(out)
    assert len(before) >= 8
    assert run("score", source, "--out", out, *OPTIONS, "-q").exit_code == 0
    assert len(embedded) == len(wanted) - len(before)
    check(out, wanted)
    assert journals(out) == []


# The source changes.


def test_only_what_is_new_in_a_folder_is_embedded(tmp_path: Path, embedded: list[bytes]) -> None:
    files = {f"{n:02}.jpg": jpeg(n) for n in range(40)} | {"bad.jpg": b"broken"}
    files = dict(sorted(files.items()))
    source, out = write_files(tmp_path / "in", files), tmp_path / "s"

    def again(new: list[bytes]) -> None:
        embedded.clear()
        done = run("score", source, "-o", out, *OPTIONS)
        assert done.exit_code == 0, done.stderr
        # What could not be decoded is tried again.
        assert sorted(e for e in embedded if e != b"broken") == sorted(new)
        good = {name: content for name, content in files.items() if content != b"broken"}
        found = by_id(out)
        assert list(found) == list(files)
        for name, content in good.items():
            assert found[name]["image_sha256"] == sha256(content)
            assert found[name]["error"] is None
        vectors = np.array([found[name]["embedding"] for name in good], np.float16)
        scores = [found[name]["aesthetic_score"] for name in good]
        assert np.abs(affine(vectors) - scores).max() < 2e-5
        assert journals(out) == []

    again([jpeg(n) for n in range(40)])
    again([])
    files = dict(sorted({**files, "07b.jpg": jpeg(100)}.items()))  # added
    write_files(source, files)
    again([jpeg(100)])
    del files["03.jpg"]  # removed
    (source / "03.jpg").unlink()
    again([])
    files["11.jpg"] = jpeg(101)  # changed
    write_files(source, {"11.jpg": jpeg(101)})
    again([jpeg(101)])
    (source / "20.jpg").rename(source / "99.jpg")  # renamed
    del files["20.jpg"]
    files["99.jpg"] = jpeg(20)
    files = dict(sorted(files.items()))
    again([])


def test_an_archive_that_grew_embeds_what_is_new(tmp_path: Path, embedded: list[bytes]) -> None:
    wanted = {f"0.tar/{n:02}": jpeg(n) for n in range(30)}
    inside = [(f"{name[6:]}.jpg", content) for name, content in wanted.items()]
    write_tar(tmp_path / "in/0.tar", inside[:20])
    af.score(tmp_path / "in", tmp_path / "s", images=EXACT)
    write_tar(tmp_path / "in/0.tar", inside)
    embedded.clear()
    af.score(tmp_path / "in", tmp_path / "s", images=EXACT)
    assert sorted(embedded) == sorted(content for _, content in inside[20:])
    check(tmp_path / "s", wanted)


def test_a_folder_that_shrinks_by_a_group(
    tmp_path: Path, embedded: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_format, "GROUP", 16)
    files = {f"{n:02}.jpg": jpeg(n) for n in range(40)}
    source, out = write_files(tmp_path / "in", files), tmp_path / "s"
    af.score(source, out, images=EXACT)
    assert [p.name for p in parts(out)] == [f"images-0000{n}.parquet" for n in range(3)]
    check(out, files)
    for name in list(files)[30:]:
        (source / name).unlink()
        del files[name]
    embedded.clear()
    af.score(source, out, images=EXACT)
    assert embedded == []
    assert [p.name for p in parts(out)] == [f"images-0000{n}.parquet" for n in range(2)]
    check(out, files)
    assert json.loads((out / "_run.json").read_text())["rows"] == 30


def test_a_folder_that_shrinks_after_it_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_format, "GROUP", 16)
    files = {f"{n:02}.jpg": jpeg(n) for n in range(40)}
    source, out = write_files(tmp_path / "in", files), tmp_path / "s"
    options = af.ImageOptions(device="cpu", precision="float32", batch_size=2)

    def stop(progress: af.Progress) -> None:
        if progress.rows >= 36:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        af.score(source, out, images=options, workers=1, on_progress=stop)
    assert [p.name for p in journals(out)] == ["images-00002.embedded"]
    for name in list(files)[30:]:
        (source / name).unlink()
        del files[name]
    af.score(source, out, images=options)
    check(out, files)
    assert journals(out) == []


# Memory and devices.


def test_out_of_memory_halves_the_batch_and_says_so_once(
    tmp_path: Path, embedded: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from aesthetic_filter.clip.tower import Tower

    files = {f"{n:02}.jpg": jpeg(n) for n in range(40)}
    source = write_files(tmp_path / "in", files)
    sizes: list[int] = []
    real = Tower.__call__

    def small(self: Tower, images: Any, **more: Any) -> Any:
        until = time.monotonic() + 20
        while not sizes and len(embedded) < 20 and time.monotonic() < until:
            time.sleep(0.002)  # the next batch is to be a full one
        sizes.append(len(images))
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, images, **more)

    monkeypatch.setattr(Tower, "__call__", small)
    options = ("--precision", "float32", "--device", "cpu", "--batch-size", "8")
    done = run("score", source, "-o", tmp_path / "s", *options)
    assert done.exit_code == 0, done.stderr
    failed = [size for size in sizes if size > 2]
    assert failed
    said = "aesthetic-filter: cpu: out of memory with {} images at once; going on with {}"
    assert done.stderr.splitlines() == [said.format(size, size // 2) for size in failed]
    assert all(b <= a // 2 for a, b in itertools.pairwise(failed))
    assert len(embedded) == 40
    check(tmp_path / "s", files)


def test_out_of_memory_with_one_image_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from aesthetic_filter.clip.tower import Tower

    files = {f"{n:02}.jpg": jpeg(n) for n in range(10)}
    source = write_files(tmp_path / "in", files)

    def none(*_: Any, **__: Any) -> Any:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 GB")

    with monkeypatch.context() as patch:
        patch.setattr(Tower, "__call__", none)
        done = run("score", source, "-o", tmp_path / "s", *OPTIONS)
    assert done.exit_code == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "out of memory with a single image" in last
    assert "--device" in last
    assert "Traceback" not in done.stderr
    assert run("score", source, "-o", tmp_path / "s", *OPTIONS).exit_code == 0
    check(tmp_path / "s", files)


def test_two_devices_share_the_work(
    tmp_path: Path, many: tuple[Path, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from aesthetic_filter.clip import tower

    cpu = torch.device("cpu")
    monkeypatch.setattr(tower, "resolve_device", lambda _: [cpu, cpu])
    both, seen = threading.Barrier(2, timeout=20), set()
    real = tower.Tower.__call__

    def watched(self: tower.Tower, images: Any, **more: Any) -> Any:
        if threading.get_ident() not in seen:
            seen.add(threading.get_ident())
            both.wait()  # breaks, and fails the run, unless the other device comes too
        return real(self, images, **more)

    monkeypatch.setattr(tower.Tower, "__call__", watched)
    source, wanted = many
    options = af.ImageOptions(precision="float32", batch_size=4)
    af.score(source, tmp_path / "s", images=options)
    assert len(seen) == 2
    check(tmp_path / "s", wanted)


def test_memory_does_not_grow_with_the_source(tmp_path: Path) -> None:
    peaks = []
    for count in (200, 1000):
        # The same few pictures, each with other bytes behind its end.
        padding = bytes(100_000)
        images = ((f"{n}.jpg", jpeg(n % 20) + padding + n.to_bytes(4, "big")) for n in range(count))
        write_tar(tmp_path / f"{count}/0.tar", images)
        done, peak = run_measured("score", count, "--out", f"s{count}", *OPTIONS, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        peaks.append(peak)
        (part,) = parts(tmp_path / f"s{count}")
        assert pq.ParquetFile(part).metadata.num_rows == count
    assert peaks[1] - peaks[0] < 60, peaks


# One folder, one run.


def test_a_broken_archive_among_good_ones(tmp_path: Path, embedded: list[bytes]) -> None:
    good = {f"{n}.jpg": jpeg(n) for n in range(6)}
    write_tar(tmp_path / "in/a.tar", good.items())
    (tmp_path / "in/b.tar").write_bytes(b"not a tar archive" * 100)
    write_tar(tmp_path / "in/c.tar", good.items())
    out = tmp_path / "s"
    ended = run("score", tmp_path / "in", "-o", out, *OPTIONS, "--workers", 1)
    assert ended.exit_code == 1
    assert "b.tar: not a tar archive" in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
    assert [p.name for p in parts(out)] == ["a.tar.parquet"]
    for _ in range(2):
        went_on = run("score", tmp_path / "in", "-o", out, *OPTIONS, "--keep-going")
        assert went_on.exit_code == 3
        assert "broken shard b.tar: not a tar archive" in went_on.stderr
        assert len(embedded) == 12
        facts = json.loads((out / "_run.json").read_text())
        assert facts["status"] == "incomplete"
        assert [b["shard"] for b in facts["broken_shards"]] == ["b.tar"]
    check(out, {f"{tar}.tar/{name[:-4]}": c for tar in "ac" for name, c in good.items()})
    write_tar(tmp_path / "in/b.tar", good.items())
    assert run("score", tmp_path / "in", "-o", out, *OPTIONS).exit_code == 0
    check(out, {f"{tar}.tar/{name[:-4]}": c for tar in "abc" for name, c in good.items()})


def test_a_run_goes_on_only_as_it_began(tmp_path: Path, embedded: list[bytes]) -> None:
    files = {f"{n}.jpg": jpeg(n) for n in range(6)}
    source, out = write_files(tmp_path / "in", files), tmp_path / "s"
    first = ("score", source, "-o", out, "--device", "cpu")
    assert run(*first, "--precision", "float32").exit_code == 0
    (out / "images-00000.embedded").write_bytes(b"left by a run that was killed")
    before = parts(out)[0].read_bytes()
    embedded.clear()
    for options, words in (
        (("--decode", "fast"), ("preprocessing decode exact instead of fast",)),
        (("--ignore-exif",), ("preprocessing exif true instead of false",)),
        (("--allow-truncated",), ("preprocessing allow_truncated false instead of true",)),
        (("--max-pixels", "99999"), ("preprocessing max_pixels", "instead of 99999")),
        (("--precision", "bfloat16"), ("encoder precision float32 instead of bfloat16",)),
        (("--head", "laion-v1"), ("head", "instead of laion-v1")),
    ):
        done = run(
            *first, *(() if "--precision" in options else ("--precision", "float32")), *options
        )
        assert done.exit_code == 2
        assert len(done.stderr.strip().splitlines()) == 1
        for word in (*words, "--overwrite"):
            assert word in done.stderr
    assert parts(out)[0].read_bytes() == before
    assert embedded == []
    # Batch size, threads and workers change nothing in the scores; "auto" goes on as it began.
    again = run(*first, "--batch-size", 3, "--threads", 1, "--workers", 1)
    assert again.exit_code == 0
    assert "everything was scored already" in again.stdout
    assert embedded == []

    done = run(*first, "--precision", "float32", "--decode", "fast", "--overwrite")
    assert done.exit_code == 0
    assert len(embedded) == 6
    assert journals(out) == []
    check(out, files)
    stamp = json.loads((out / "_run.json").read_text())
    assert stamp["preprocessing"]["decode"] == "fast"


@pytest.mark.parametrize("missing", ["torch", "PIL"])
def test_a_missing_extra_is_one_line(missing: str, tmp_path: Path) -> None:
    write_files(tmp_path / "in", {"a.jpg": jpeg(1)})
    done = run_without([missing], "score", "in", "--out", "s", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert 'pip install "aesthetic-filter[clip]"' in done.stderr
    assert not (tmp_path / "s").exists()


def test_embeddings_are_scored_without_the_extra(
    tmp_path: Path, make_embeddings: Callable[..., np.ndarray]
) -> None:
    (tmp_path / "e").mkdir()
    np.save(tmp_path / "e/a.npy", make_embeddings(50))
    done = run_without(["torch", "PIL"], "score", "e", "--out", "s", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    scores = [row["aesthetic_score"] for row in rows(tmp_path / "s")]
    assert np.abs(affine(make_embeddings(50)) - scores).max() < 2e-5
    done = run_without(["torch", "PIL"], "filter", "s", "--out", "k", "--top", 5, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


# The journal.


def record(sha: str, width: int, height: int, vector: np.ndarray) -> bytes:
    body = struct.pack("<ii", width, height) + bytes.fromhex(sha) + vector.astype("<f2").tobytes()
    return struct.pack("<I", zlib.crc32(body, 1)) + body


def some(count: int, seed: int = 0) -> list[Record]:
    chance = np.random.default_rng(seed)
    vectors = chance.standard_normal((count, 768)).astype(np.float16)
    return [(sha256(bytes([seed, n])), 10 + n, 20 + n, vectors[n]) for n in range(count)]


def agrees(found: Embedded | None, wanted: Record) -> bool:
    sha, width, height, vector = wanted
    return (
        found is not None
        and (found.sha256, found.width, found.height) == (sha, width, height)
        and found.vector.dtype == np.float16
        and np.array_equal(found.vector, vector)
    )


def as_embedded(given: Record) -> Embedded:
    sha, width, height, vector = given
    return Embedded(vector, width, height, sha)


def test_a_journal_is_records_one_behind_another(tmp_path: Path) -> None:
    path, wanted = tmp_path / "a.embedded", some(5)
    journal = Journal(path)
    assert journal.find(wanted[0][0]) is None
    journal.add([])
    assert not path.exists()
    journal.add(map(as_embedded, wanted[:2]))
    journal.add(map(as_embedded, wanted[2:]))
    journal.close()
    assert path.read_bytes() == b"".join(record(*one) for one in wanted)

    again = Journal(path)
    assert len(again) == 5
    assert all(agrees(again.find(one[0]), one) for one in wanted)
    assert again.find(sha256(b"other")) is None
    again.add([as_embedded(wanted[3])])  # known already
    again.close()
    assert path.stat().st_size == 5 * RECORD_BYTES
    again.remove()
    assert not path.exists()
    again.remove()


@pytest.mark.parametrize("length", [1, 43, RECORD_BYTES // 2, RECORD_BYTES - 1])
def test_a_torn_last_record_is_left_out(length: int, tmp_path: Path) -> None:
    path, wanted = tmp_path / "a.embedded", some(4)
    whole = b"".join(record(*one) for one in wanted[:3])
    path.write_bytes(whole + record(*wanted[3])[:length])
    journal = Journal(path)
    assert [agrees(journal.find(one[0]), one) for one in wanted] == [True] * 3 + [False]
    assert journal.find(wanted[3][0]) is None
    journal.add([as_embedded(wanted[3])])
    journal.close()
    assert path.read_bytes() == whole + record(*wanted[3])


def test_a_garbled_record_never_gives_a_wrong_embedding(tmp_path: Path) -> None:
    path, wanted = tmp_path / "a.embedded", some(4)
    whole = b"".join(record(*one) for one in wanted)
    chance = random.Random(3)
    for _ in range(100):
        data = bytearray(whole)
        place = chance.randrange(len(data))
        if chance.random() < 0.5:
            data[place] ^= 1 << chance.randrange(8)
        else:  # a block that never reached the disk
            end = min(place + chance.choice((4, 512, 4096)), len(data))
            data[place:end] = bytes(end - place)
        if data == whole:
            continue
        path.write_bytes(data)
        journal = Journal(path)
        for number, one in enumerate(wanted):
            found = journal.find(one[0])
            assert found is None or agrees(found, one)
            assert (found is None) or number * RECORD_BYTES < place
            assert (found is not None) or (number + 1) * RECORD_BYTES > place
        journal.add(map(as_embedded, wanted))
        journal.close()
        healed = Journal(path)
        assert all(agrees(healed.find(one[0]), one) for one in wanted)


@pytest.mark.parametrize(
    "content",
    [b"", bytes(5 * RECORD_BYTES), b"PAR1" * 2000, os.urandom(4 * RECORD_BYTES), b"\xff" * 9000],
    ids=["empty", "zeros", "parquet", "noise", "ones"],
)
def test_a_foreign_file_is_no_journal(content: bytes, tmp_path: Path) -> None:
    path, wanted = tmp_path / "a.embedded", some(2)
    path.write_bytes(content)
    journal = Journal(path)
    assert len(journal) == 0
    assert journal.find("0" * 64) is None
    assert journal.find("f" * 64) is None
    journal.add(map(as_embedded, wanted))
    journal.close()
    assert path.read_bytes() == b"".join(record(*one) for one in wanted)


def part_of(path: Path, records: list[Record | None]) -> Path:
    """A part, as far as a journal looks at it; None is a row that failed."""
    embedding = pa.array(
        [None if one is None else one[3] for one in records], pa.list_(pa.float16(), 768)
    )
    table = {
        "image_sha256": pa.array([one and one[0] for one in records], pa.string()),
        "width": pa.array([one and one[1] for one in records], pa.int32()),
        "height": pa.array([one and one[2] for one in records], pa.int32()),
        "embedding": embedding,
        "image_id": pa.array([str(n) for n in range(len(records))]),
    }
    pq.write_table(pa.table(table), path, row_group_size=2)
    return path


def test_a_part_is_known_too(tmp_path: Path) -> None:
    wanted, new = some(6), some(2, seed=9)
    part = part_of(tmp_path / "a.parquet", [*wanted[:3], None, *wanted[3:], None])
    journal = Journal(tmp_path / "a.embedded", part)
    assert len(journal) == 6
    assert all(agrees(journal.find(one[0]), one) for one in wanted)
    journal.add(map(as_embedded, [*wanted, *new]))
    journal.close()
    assert (tmp_path / "a.embedded").read_bytes() == b"".join(record(*one) for one in new)
    both = Journal(tmp_path / "a.embedded", part)
    assert all(agrees(both.find(one[0]), one) for one in [*wanted, *new])


def test_what_is_no_part_is_not_known(tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_bytes(b"no parquet")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "other.parquet")
    part_of(tmp_path / "failed.parquet", [None, None])
    for name in ("gone", "text", "other", "failed"):
        journal = Journal(tmp_path / "a.embedded", tmp_path / f"{name}.parquet")
        assert len(journal) == 0
        assert journal.find("0" * 64) is None


def test_a_garbled_journal_in_a_run(tmp_path: Path, embedded: list[bytes]) -> None:
    files = {f"{n}.jpg": jpeg(n) for n in range(8)}
    source, out = write_files(tmp_path / "in", files), tmp_path / "s"
    af.score(source, out, images=EXACT)
    first = by_id(out)
    known_rows = [
        (r["image_sha256"], r["width"], r["height"], np.array(r["embedding"], np.float16))
        for r in first.values()
    ]
    records = [record(*one) for one in known_rows]
    bad = bytearray(records[4])
    bad[100] ^= 1
    parts(out)[0].unlink()
    (out / "images-00000.embedded").write_bytes(b"".join([*records[:4], bytes(bad), *records[5:]]))
    embedded.clear()
    af.score(source, out, images=EXACT)
    assert len(embedded) == 4
    for name, row in by_id(out).items():
        assert row["aesthetic_score"] == pytest.approx(first[name]["aesthetic_score"], abs=WITHIN)
    check(out, files)
    assert journals(out) == []


def test_the_same_image_many_times(tmp_path: Path) -> None:
    files = {f"{n:02}.jpg": jpeg(n % 3) for n in range(30)}
    source = write_files(tmp_path / "in", files)
    af.score(source, tmp_path / "s", images=EXACT)
    check(tmp_path / "s", files)


def test_a_full_disk_ends_the_run_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f"{n:02}.jpg": jpeg(n) for n in range(20)}
    source, out = write_files(tmp_path / "in", files), tmp_path / "s"
    real = Journal.add
    calls = []

    def full(self: Journal, images: Any) -> None:
        calls.append(1)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        real(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", full)
        done = run("score", source, "-o", out, *OPTIONS)
    assert done.exit_code == 1
    assert re.search(r"cannot be written: No space left on device", done.stderr)
    assert len(done.stderr.strip().splitlines()) == 1
    assert len(known(out)) == 8
    assert run("score", source, "-o", out, *OPTIONS).exit_code == 0
    check(out, files)


def test_a_second_run_into_the_same_folder_is_refused(
    tmp_path: Path, many: tuple[Path, dict[str, bytes]]
) -> None:
    source, _ = many
    out, log = tmp_path / "s", tmp_path / "log"
    with half_way(source, out, log, 10, pause=0.05) as first:
        with pytest.raises(OutputError, match=f"another run \\(process {first.pid}\\)"):
            af.score(source, out, images=EXACT)
        assert first.poll() is None
    assert len(known(out)) < 400


def test_wrong_options_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    write_files(tmp_path / "in", {"a.jpg": jpeg(1)})
    for options, word in (
        (("--device", "cuda:7"), "cuda:7"),
        (("--precision", "int8"), "int8"),
        (("--decode", "slow"), "slow"),
        (("--weights", "nowhere.safetensors"), "nowhere.safetensors"),
    ):
        done = run("score", tmp_path / "in", "-o", tmp_path / "s", *options)
        assert done.exit_code == 2
        assert word in done.stderr
        assert len(done.stderr.strip().splitlines()) <= 2
        assert not (tmp_path / "s").exists()


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    from clip_weights import write_clip

    write_files(tmp_path / "in", {"a.jpg": jpeg(1)})
    write_clip(tmp_path / "b32.safetensors", patch=32)
    with pytest.raises(AestheticFilterError, match="patches are 32 pixels"):
        af.score(
            tmp_path / "in",
            tmp_path / "s",
            images=af.ImageOptions(weights=tmp_path / "b32.safetensors", precision="float32"),
        )


@pytest.mark.parametrize(
    ("out", "problem"),
    [("taken", "taken: holds other files (mine.txt"), ("s3://b/k", "written to a local folder")],
)
def test_nothing_is_scored_for_a_folder_that_cannot_be_written(
    out: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, embedded: list[bytes]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path / "photos", {"a.jpg": jpeg(1)})
    write_files(tmp_path / "taken", {"mine.txt": b"mine"})
    done = run("filter", "photos", "--out", out, "--top", 1, "--as", "folder", "--scores", "s")
    assert done.exit_code == 2
    assert problem in done.stderr
    assert not embedded
    assert not (tmp_path / "s").exists()
