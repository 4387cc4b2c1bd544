"""``kill -9`` at any moment: nothing doubled, nothing missing, no finished shard read again."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

KILLS = 24
FOLDERS = 4
SHARDS = 100
ROWS = 12_000

State = dict[str, tuple[int, int]]


def command(source: Path, out: Path) -> list[str]:
    run = [sys.executable, "-m", "aesthetic_filter", "score", str(source), "--out", str(out)]
    return [*run, "--workers", "2", "--quiet"]


def finished(out: Path) -> State:
    """The parts, and what changes when one is written again."""
    return {
        p.relative_to(out).as_posix(): (p.stat().st_ino, p.stat().st_mtime_ns)
        for p in out.rglob("*.parquet")
    }


@pytest.fixture(scope="module")
def source(
    tmp_path_factory: pytest.TempPathFactory, make_embeddings: Callable[..., np.ndarray]
) -> Path:
    """A hundred shards of 12,000 rows in three folders: three files, linked again."""
    folder = tmp_path_factory.mktemp("kill")
    for number in range(SHARDS):
        path = folder / f"{number % 3}" / f"{number:03}.npy"
        path.parent.mkdir(exist_ok=True)
        if number < 3:
            vectors = make_embeddings(ROWS, seed=number)
            vectors[:: 1000 + number] = 0  # some rows fail
            np.save(path, vectors)
        else:
            os.link(folder / f"{number % 3}" / f"{number % 3:03}.npy", path)
    return folder


def killed_after(source: Path, out: Path, seconds: float) -> bool:
    """Run for so long; whether it was still at it when it was killed."""
    with subprocess.Popen(
        command(source, out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        try:
            _, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return process.returncode == -signal.SIGKILL
        assert process.returncode == 0, errors
        return False


def run(source: Path, out: Path) -> float:
    """Run to the end; how long it took, in seconds."""
    started = time.monotonic()
    subprocess.run(command(source, out), check=True)
    return time.monotonic() - started


@pytest.mark.timeout(240)
def test_killed_at_random_moments(tmp_path: Path, source: Path) -> None:
    whole = tmp_path / "whole"
    duration = run(source, whole)
    start_up = run(source, whole)  # nothing is left to do
    expected = {p.relative_to(whole): p.read_bytes() for p in whole.rglob("*.parquet")}
    rows = pa.concat_tables([pq.ParquetFile(whole / name).read() for name in sorted(expected)])
    wanted = {f"{n % 3}/{n:03}.npy#{row}" for n in range(SHARDS) for row in range(ROWS)}
    assert rows.num_rows == len(wanted) == SHARDS * ROWS
    assert set(rows["image_id"].to_pylist()) == wanted
    failed = pc.sum(pc.is_valid(rows["error"])).as_py()
    assert failed == rows["aesthetic_score"].null_count > 0

    chance = random.Random(20)
    kills = in_mid_run = 0
    until = time.monotonic() + 50
    while kills < KILLS and time.monotonic() < until:
        out = tmp_path / str(kills)
        before: State = {}
        for _ in range(KILLS // FOLDERS):
            # Any moment from the first to the last of what is left to do, starting up included.
            left = 1 - len(before) / SHARDS
            moment = chance.uniform(0, start_up + (duration - start_up) * left)
            killed = killed_after(source, out, moment)
            after = finished(out)
            assert before.items() <= after.items(), "a finished part was written again"
            kills += killed
            in_mid_run += killed and before != after
            if not killed:
                break
            before = after

        run(source, out)
        assert before.items() <= finished(out).items(), "a finished part was written again"
        assert list(out.rglob("*.unfinished")) == []
        assert {p.relative_to(out): p.read_bytes() for p in out.rglob("*.parquet")} == expected
        facts = json.loads((out / "_run.json").read_text(encoding="utf-8"))
        assert facts["status"] == "complete"
        assert (facts["rows"], facts["failed"]) == (SHARDS * ROWS, failed)
        shutil.rmtree(out)
    assert kills >= 20
    assert in_mid_run >= 5
