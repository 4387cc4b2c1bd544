"""The files for Slurm and Kubernetes: their structure, their options, and a run with stand-ins."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from images import rows
from ray_help import Watch, free_port, surroundings

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def manifests(repo: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((repo / "deploy/kuberay.yaml").read_text()))


@pytest.fixture
def job(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    return manifests[-1]


def groups(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


# The fields of ray.io/v1 that KubeRay's custom resource definition has.
JOB = {
    *("entrypoint", "runtimeEnvYAML", "submissionMode", "backoffLimit", "ttlSecondsAfterFinished"),
    *("shutdownAfterJobFinishes", "activeDeadlineSeconds", "rayClusterSpec", "suspend"),
}
CLUSTER = {
    *("rayVersion", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec"),
    "workerGroupSpecs",
}
HEAD = {"rayStartParams", "template", "serviceType"}
WORKERS = {
    *("groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "rayStartParams"),
    "template",
}


def test_the_ray_job_has_the_fields_that_there_are(job: dict[str, Any]) -> None:
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert set(spec) <= JOB
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode", "InteractiveMode")
    assert set(spec["rayClusterSpec"]) <= CLUSTER
    head, *workers = groups(job)
    assert set(head) <= HEAD
    assert all(isinstance(value, str) for value in head["rayStartParams"].values())
    for group in workers:
        assert set(group) <= WORKERS
        assert re.fullmatch("[a-z0-9-]+", group["groupName"])
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


# The fields of a pod, of its containers and of a claim that are used here, of those that
# Kubernetes has; whichever is missing in the file is optional.
POD = {"containers", "volumes", "tolerations", "nodeSelector", "serviceAccountName"}
CONTAINER = {"name", "image", "resources", "volumeMounts", "env", "envFrom", "command", "args"}
TOLERATION = {"key", "operator", "effect", "value", "tolerationSeconds"}


def test_pods_and_volumes_are_what_kubernetes_takes(manifests: list[dict[str, Any]]) -> None:
    quantity = re.compile(r"\d+(\.\d+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?")
    for claim in manifests[:-1]:
        assert (claim["apiVersion"], claim["kind"]) == ("v1", "PersistentVolumeClaim")
        assert set(claim["spec"]["accessModes"]) <= {"ReadWriteOnce", "ReadWriteMany"}
        assert quantity.fullmatch(claim["spec"]["resources"]["requests"]["storage"])
    for group in groups(manifests[-1]):
        pod = group["template"]["spec"]
        assert set(pod) <= POD
        for container in pod["containers"]:
            assert {"name", "image"} <= set(container) <= CONTAINER
            for amounts in container["resources"].values():
                assert all(quantity.fullmatch(amount) for amount in amounts.values())
            assert all(set(m) == {"name", "mountPath"} for m in container["volumeMounts"])
        assert all(set(t) <= TOLERATION for t in pod.get("tolerations", []))


def test_every_mount_has_a_volume_and_every_volume_a_claim(
    manifests: list[dict[str, Any]],
) -> None:
    claims = {claim["metadata"]["name"] for claim in manifests[:-1]}
    for group in groups(manifests[-1]):
        pod = group["template"]["spec"]
        volumes = {v["name"]: v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"]}
        assert set(volumes.values()) <= claims
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)


def test_gpus_are_limited_as_requested_and_the_image_is_one(job: dict[str, Any]) -> None:
    containers = [c for group in groups(job) for c in group["template"]["spec"]["containers"]]
    assert len({container["image"] for container in containers}) == 1
    assert all(c["resources"]["requests"] == c["resources"]["limits"] for c in containers)
    assert [c["resources"]["limits"].get("nvidia.com/gpu") for c in containers] == [None, None, "1"]


def test_what_is_run_is_a_command_that_there_is(repo: Path, job: dict[str, Any], cli: Run) -> None:
    known = set(re.findall(r"--[a-z-]+", cli("score", "--help").stdout))
    script = (repo / "deploy/slurm.sbatch").read_text()
    start = script.index("aesthetic-filter score")
    for text in (job["spec"]["entrypoint"], script[start:]):
        used = set(re.findall(r"--[a-z-]+", text))
        assert {"--out", "--backend", "--ray-address"} <= used <= known
    mounted = groups(job)[0]["template"]["spec"]["containers"][0]["volumeMounts"]
    assert re.search(r"--out (/\w+)/", job["spec"]["entrypoint"])[1] in [  # type: ignore[index]
        mount["mountPath"] for mount in mounted
    ]


def test_the_same_version_of_ray_everywhere(repo: Path, job: dict[str, Any]) -> None:
    pinned = re.search(r"^ray==(.*)$", (repo / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    version = pinned[1]
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == version
    dockerfile = (repo / "deploy/Dockerfile").read_text()
    assert f"rayproject/ray:{version}-" in dockerfile
    assert f'"ray[data]=={version}"' in dockerfile


def test_the_sizes_in_the_documentation_are_those_printed(repo: Path) -> None:
    command = [sys.executable, str(repo / "scripts/sizing.py")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.rstrip() in (repo / "docs/scale.md").read_text()


def test_sizes_follow_from_the_rates(repo: Path) -> None:
    rates = ["--gpu-rate", "100", "--gpus", "10", "--decode-rate", "50", "--cores", "100"]
    rates += ["--cpu-rate", "50", "--embedding-rate", "1e5", "--price", "2"]
    command = [sys.executable, str(repo / "scripts/sizing.py"), *rates]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [line.split() for line in printed.splitlines()]
    # 10 x 100 images/s: 1000 s for a million, of 10 GPUs 2.8 hours; without, 100 cores at 25 each.
    assert "16.7 min 2.8 (at 6) 6.7 min 11" in " ".join(lines[1])
    assert "bound by embedding; without GPUs 2,500" in printed


# Slurm.


def node_address() -> str:
    """This machine's, as others see it; Ray puts it in the place of 127.0.0.1."""
    from ray.util import get_node_ip_address

    found: str = get_node_ip_address()
    return found


ALONE = ["unshare", "--pid", "--fork", "--mount-proc"]
"""Before a command: it and its children see no other process of the machine, nor its Rays."""

try:
    subprocess.run([*ALONE, "true"], check=True, capture_output=True, timeout=10)
except (OSError, subprocess.SubprocessError):  # nobody but root may
    ALONE = []

STOP = """
import os
import psutil
from ray_help import MARK, marked

for process in marked(os.environ[MARK]):
    if process.name() in ("raylet", "gcs_server"):
        process.terminate()
"""
"""``ray stop`` of one Ray: the real one stops every Ray of the machine, other tests' too."""


@pytest.fixture
def stand_ins(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A folder of commands as Slurm has them, for a job of one node: this machine."""
    (tmp_path / "stop.py").write_text(STOP)
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in {
        "scontrol": f"echo {node_address()}",
        "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
        "aesthetic-filter": f'exec {sys.executable} -m aesthetic_filter "$@"',
        "ray": f"[[ $1 == stop ]] && exec {sys.executable} {tmp_path}/stop.py\n"
        f'exec {Path(sys.executable).parent}/ray "$@"',
    }.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    with surroundings(Watch(tmp_path / "watch")):
        yield {
            **os.environ,
            "PATH": f"{folder}:{os.environ['PATH']}",
            "SLURM_JOB_NODELIST": "node[1-1]",
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_CPUS_PER_TASK": "2",
            "SLURM_GPUS_ON_NODE": "0",
            "PORT": str(free_port()),
        }


def test_the_slurm_script_is_sound(repo: Path) -> None:
    script = repo / "deploy/slurm.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    directives = re.findall(r"^#SBATCH --([a-z-]+)", script.read_text(), re.MULTILINE)
    known = {
        "job-name",
        "nodes",
        "ntasks-per-node",
        "cpus-per-task",
        "gpus-per-node",
        "mem",
        "time",
    }
    assert set(directives) <= {*known, "requeue", "open-mode", "signal"}
    ran = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=False)
    assert "say what to score" in ran.stderr


def test_the_slurm_script_runs(
    repo: Path, tmp_path: Path, stand_ins: dict[str, str], make_embeddings: Any
) -> None:
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "a.npy", make_embeddings(300))
    env = {**stand_ins, "SOURCE": str(tmp_path / "in"), "OUT": str(tmp_path / "out")}
    script = ["bash", str(repo / "deploy/slurm.sbatch")]
    ran = subprocess.run(
        [*ALONE, *script],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    if "Ray is already started on this node" in ran.stderr:
        pytest.skip("another Ray is running on this machine, and `ray symmetric-run` wants none")
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert len(rows(tmp_path / "out")) == 300
