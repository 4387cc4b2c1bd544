"""A run on several nodes of Ray: nodes go, GPUs that there are not."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import aesthetic_filter as af
from aesthetic_filter.errors import ClusterError
from images import EXACT, WITHIN, jpeg, rows, write_files, write_tar
from ray_help import (
    Watch,
    check_alike,
    check_same,
    command,
    surroundings,
)

ray = pytest.importorskip("ray")
backend = pytest.importorskip("aesthetic_filter.backends.ray")
from ray.cluster_utils import Cluster  # noqa: E402
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: E402

pytestmark = [
    pytest.mark.timeout(150),
    # Ray's own, of its workers' pipes and of what it will change.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]

SHARDS, SAMPLES = 6, 40


@pytest.fixture(scope="module")
def watch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watch]:
    watch = Watch(tmp_path_factory.mktemp("ray-cluster") / "watch")
    with surroundings(watch):
        yield watch


@pytest.fixture(scope="module")
def cluster(watch: Watch) -> Iterator[Any]:  # noqa: ARG001
    """A cluster of one node, without GPUs; the process is connected to it."""
    watchful = {  # a node that is gone is missed within a second or two
        "health_check_initial_delay_ms": 0,
        "health_check_period_ms": 300,
        "health_check_timeout_ms": 1000,
        "health_check_failure_threshold": 3,
    }
    head = {
        "num_cpus": 1,
        "include_dashboard": False,
        "gcs_server_port": 0,  # any that is free
        "_system_config": watchful,
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


class Busy:
    """An actor that has a processor, and does nothing with it."""

    def ready(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def fresh(watch: Watch) -> None:
    watch.clear()


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> tuple[Path, Path]:
    """Six archives, and their scores by the local backend."""
    folder = tmp_path_factory.mktemp("tars")
    for shard in range(SHARDS):
        images = ((f"{n:03}.jpg", jpeg(100 * shard + n)) for n in range(SAMPLES))
        write_tar(folder / f"in/{shard}.tar", images)
    af.score(folder / "in", folder / "local", images=EXACT, model_dir=model_dir)
    return folder / "in", folder / "local"


# The cluster has one node, then GPUs come to it; the tests stand in that order.


@pytest.mark.usefixtures("cluster")
def test_no_gpus_where_some_are_wished_for(
    tars: tuple[Path, Path], tmp_path: Path, model_dir: Path
) -> None:
    began = time.monotonic()
    with pytest.raises(ClusterError, match=r"hold 0\.25 GPUs, and no node .* has more than 0;"):
        af.score(
            tars[0], tmp_path / "s", model_dir=model_dir, backend="ray", num_gpus_per_worker=0.25
        )
    assert time.monotonic() - began < 10
    assert not (tmp_path / "s").exists()


def test_one_of_three_nodes_goes(
    cluster: Any,
    tars: tuple[Path, Path],
    tmp_path: Path,
    model_dir: Path,
    watch: Watch,
) -> None:
    source, twin = tars

    def decoders() -> set[str]:
        """The raylets whose workers decoded something."""
        return {line.split()[1] for line in watch.lines("decoded")}

    # The first node is busy, or it might do all of it.
    head = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    busy = ray.remote(num_cpus=1, scheduling_strategy=head)(Busy).remote()
    ray.get(busy.ready.remote())
    more = [cluster.add_node(num_cpus=1) for _ in range(2)]
    try:
        raylets = {str(node.all_processes["raylet"][0].process.pid): node for node in more}
        gone: list[str] = []

        def on_progress(now: af.Progress) -> None:
            there = [pid for pid in raylets if pid in decoders()]
            if not gone and now.rows and there:  # whichever of the two has work by now
                gone.append(there[0])
                cluster.remove_node(raylets[there[0]], allow_graceful=False)

        with watch.paused(0.02):
            af.score(
                source,
                tmp_path / "s",
                images=EXACT,
                model_dir=model_dir,
                backend="ray",
                on_progress=on_progress,
            )
        assert gone, "neither of them had a part in it"
        assert len(decoders() - {"1"}) > 1  # others had one too; 1 adopts whose raylet is gone
        check_alike(tmp_path / "s", twin, WITHIN)
        assert len(rows(tmp_path / "s")) == SHARDS * SAMPLES
    finally:
        ray.kill(busy)
        for node in more:
            if node in cluster.worker_nodes:
                cluster.remove_node(node)


def test_embeddings_on_two_nodes_by_address(
    cluster: Any,
    tmp_path: Path,
    make_embeddings: Callable[..., np.ndarray],
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(6):
        np.save(folder / f"{number}.npy", make_embeddings(700, seed=number))
    af.score(folder, tmp_path / "local")
    node = cluster.add_node(num_cpus=1)
    try:
        run = ("score", folder, "--backend", "ray", "--quiet")
        with (
            command(*run, "-o", "a", "--ray-address", cluster.address, cwd=tmp_path) as one,
            command(*run, "-o", "b", cwd=tmp_path, env={"RAY_ADDRESS": cluster.address}) as two,
        ):
            for process in (one, two):
                _, errors = process.communicate(timeout=100)
                assert (process.returncode, errors) == (0, "")
    finally:
        cluster.remove_node(node)
    for name in ("a", "b"):
        check_same(tmp_path / name, tmp_path / "local")
    # Each was a driver of this cluster, not of a Ray of its own.
    from ray._private import state

    assert sum(1 for job in state.jobs() if job["IsDead"]) >= 2


# GPUs that there are not.


def encoders() -> Callable[[], set[str]]:
    """The actors that have been made from now on, by id."""
    from ray._private import state

    def made() -> set[str]:
        return {
            name
            for name, actor in state.actors().items()
            if "_EncodeWorker" in actor["ActorClassName"]
        }

    before = made()
    return lambda: made() - before


def test_workers_share_gpus(
    cluster: Any,
    tmp_path: Path,
    model_dir: Path,
    watch: Watch,
) -> None:
    from ray._private import state

    source = write_files(tmp_path / "in", {f"{n:03}.jpg": jpeg(n) for n in range(60)})
    gpus, share, workers = 2, 0.5, 4
    node = cluster.add_node(num_cpus=1, num_gpus=gpus)
    over = threading.Event()
    try:
        made = encoders()
        held: set[float] = set()

        def look() -> None:
            while not over.wait(0.05):
                held.add(gpus - ray.available_resources().get("GPU", 0))

        looking = threading.Thread(target=look)
        looking.start()
        options = af.ImageOptions(precision="float32")  # the device is "auto"
        af.score(
            source,
            tmp_path / "s",
            images=options,
            model_dir=model_dir,
            backend="ray",
            num_gpus_per_worker=share,
        )
        over.set()
        looking.join()
        assert len(made()) == workers
        assert max(held) == gpus  # four that hold a half of two
        assert 1 <= len(watch.towers) == len(set(watch.towers)) <= workers
        assert backend.RayBackend()._gpus_for(None) == 0.25
        with pytest.raises(ClusterError, match=r"hold 3 GPUs, and no node .* more than 2;"):
            af.score(
                source,
                tmp_path / "t",
                model_dir=model_dir,
                backend="ray",
                num_gpus_per_worker=3,
            )
        assert state.actors()
    finally:
        over.set()
        cluster.remove_node(node)
    af.score(source, tmp_path / "local", images=EXACT, model_dir=model_dir)
    check_alike(tmp_path / "s", tmp_path / "local", WITHIN)
    facts = json.loads((tmp_path / "s/_run.json").read_text())
    assert facts["rows"] == 60
