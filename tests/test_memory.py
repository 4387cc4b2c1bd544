"""A run needs as much memory for a large source as for a small one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

ROWS = 25_000
MEASURE = """
import resource, subprocess, sys
subprocess.run([sys.executable, "-m", "aesthetic_filter", *sys.argv[1:]], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def peak(*arguments: object) -> int:
    """The most memory, in MB, that the command line held at once, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    kilobytes = int(done.stdout.split()[-1]) / (1024 if sys.platform == "darwin" else 1)
    return round(kilobytes / 1024)


@pytest.fixture(scope="module")
def shard(
    tmp_path_factory: pytest.TempPathFactory, make_embeddings: Callable[..., np.ndarray]
) -> Path:
    path = tmp_path_factory.mktemp("memory") / "shard.npy"
    np.save(path, make_embeddings(ROWS))
    return path


def source(folder: Path, shard: Path, shards: int) -> Path:
    """So many hard links to one shard."""
    folder.mkdir()
    for number in range(shards):
        os.link(shard, folder / f"{number:03}.npy")
    return folder


def test_scoring(tmp_path: Path, shard: Path) -> None:
    small = peak("score", source(tmp_path / "3", shard, 3), "--out", tmp_path / "s3", "-q")
    large = peak("score", source(tmp_path / "12", shard, 12), "--out", tmp_path / "s12", "-q")
    assert max(small, large) < 500
    assert abs(large - small) <= 0.15 * small + 20, (small, large)


def test_one_large_shard_needs_no_more_than_many_small_ones(
    tmp_path: Path, make_embeddings: Callable[..., np.ndarray]
) -> None:
    few, many = 30_000, 120_000
    vectors = make_embeddings(few)
    for name, rows in (("few", few), ("many", many)):
        (tmp_path / name).mkdir()
        file = np.lib.format.open_memmap(
            tmp_path / name / "one.npy", mode="w+", dtype=np.float16, shape=(rows, 768)
        )
        for start in range(0, rows, few):
            file[start : start + few] = vectors
        del file
    small = peak("score", tmp_path / "few", "--out", tmp_path / "s1", "-q")
    large = peak("score", tmp_path / "many", "--out", tmp_path / "s2", "-q")
    assert max(small, large) < 500
    assert abs(large - small) <= 0.15 * small + 20, (small, large)
