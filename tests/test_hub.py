"""Heads from the hub: downloaded once, checked, then without a network.

The hub is a small server on loopback, and each use is a process of its own.
"""

from __future__ import annotations

import hashlib
import itertools
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save

from aesthetic_filter.heads import bundled_heads
from hub import Hub, hub_environment, serving

Run = Callable[..., "subprocess.CompletedProcess[str]"]

COMMIT = "1e77fa05c1f3a3a2e5b8b9a0c9d8e7f6a5b4c3d2"
REPO = "ttj/sac-logos-ava1-l14-linearMSE"
FILE = "model.safetensors"

# The architecture of the published heads: dropout stands between the layers, no activation.
TRUE_WIDTHS = (768, 1024, 128, 64, 16, 1)
NUMBERS = (0, 2, 4, 6, 7)
SMALL_WIDTHS = (768, 32, 16, 8, 4, 1)  # where the scores do not matter: quicker to fold

Layers = list[tuple[NDArray[np.float32], NDArray[np.float32]]]


def some_layers(widths: tuple[int, ...]) -> Layers:
    random = np.random.default_rng(30)
    return [
        (
            (random.standard_normal((n_out, n_in)) / np.sqrt(n_in)).astype(np.float32),
            (0.1 * random.standard_normal(n_out)).astype(np.float32),
        )
        for n_in, n_out in itertools.pairwise(widths)
    ]


def checkpoint(layers: Layers) -> bytes:
    """A raw layered checkpoint, as it is published."""
    tensors = {}
    for number, (weight, bias) in zip(NUMBERS, layers, strict=True):
        tensors[f"layers.{number}.weight"], tensors[f"layers.{number}.bias"] = weight, bias
    return save(tensors)


@pytest.fixture
def hub() -> Iterator[Hub]:
    # A head file, as this project makes them; where it matters, a test puts a raw checkpoint there.
    content = bundled_heads()["laion-v1"].read_bytes()
    with serving(Hub({f"{REPO}/{FILE}": content}, COMMIT)) as running:
        yield running


@pytest.fixture
def ask(cli: Run, hub: Hub, tmp_path: Path) -> Run:
    """Run the command line against the loopback hub, with an empty cache of its own."""

    def run(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
        return cli(*arguments, env=hub_environment(hub, tmp_path / "home", **env))

    return run


def address(revision: str = COMMIT, *, repo: str = REPO, file: str = FILE) -> str:
    return f"hf://{repo}/{file}@{revision}"


def refused(ran: subprocess.CompletedProcess[str], code: int) -> str:
    """The message of a failed run: short, without a traceback."""
    assert ran.returncode == code, ran.stderr
    assert ran.stdout == ""
    assert "Traceback" not in ran.stderr
    assert len(ran.stderr.strip().splitlines()) <= 2
    return ran.stderr


@pytest.mark.parametrize("revision", [COMMIT[:7], "main"])
def test_the_first_use_downloads_and_the_second_asks_nothing(
    revision: str, ask: Run, hub: Hub
) -> None:
    hub.content = checkpoint(some_layers(SMALL_WIDTHS))
    first = ask("heads", "show", address(revision))
    assert first.returncode == 0, first.stderr
    assert hub.downloads == [f"GET /{REPO}/resolve/{revision}/{FILE}"]
    assert hashlib.sha256(hub.content).hexdigest() in first.stdout
    assert "affine (folded), 768 -> 1, 769 numbers" in first.stdout
    hub.requests.clear()
    second = ask("heads", "show", address(revision))
    assert second.returncode == 0, second.stderr
    assert second.stdout == first.stdout
    assert hub.requests == []


def test_a_cached_head_needs_no_hub(ask: Run, hub: Hub) -> None:
    first = ask("heads", "show", address())
    assert first.returncode == 0, first.stderr
    hub.requests.clear()
    offline = ask("heads", "show", address(), HF_HUB_OFFLINE="1")
    assert (offline.returncode, offline.stdout) == (0, first.stdout)
    assert hub.requests == []
    down = ask("heads", "show", address(), HF_ENDPOINT="http://127.0.0.1:9")
    assert (down.returncode, down.stdout) == (0, first.stdout)


def test_scores_of_a_head_from_the_hub(
    ask: Run, hub: Hub, tmp_path: Path, make_embeddings: Any
) -> None:
    layers = some_layers(TRUE_WIDTHS)
    hub.content = checkpoint(layers)
    vectors = make_embeddings(200)
    np.save(tmp_path / "vectors.npy", vectors)
    ran = ask("score", "vectors.npy", "--out", "scores", "--head", address(), "--quiet")
    assert ran.returncode == 0, ran.stderr
    x = vectors.astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    for weight, bias in layers:
        x = x @ weight.astype(np.float64).T + bias
    table = pq.read_table(tmp_path / "scores")
    np.testing.assert_allclose(table["aesthetic_score"].to_numpy(), x[:, 0], rtol=0, atol=2e-5)


def test_model_dir_is_where_the_file_is_kept(ask: Run, hub: Hub, tmp_path: Path) -> None:
    kept = tmp_path / "models"
    first = ask("heads", "show", address(), "--model-dir", kept)
    assert first.returncode == 0, first.stderr
    digest = hashlib.sha256(hub.content).hexdigest()
    blob = kept / f"models--{REPO.replace('/', '--')}" / "blobs" / digest
    assert blob.read_bytes() == hub.content
    hub.requests.clear()
    second = ask("heads", "show", address(), "--model-dir", "models", HF_HUB_OFFLINE="1")
    assert (second.returncode, second.stdout) == (0, first.stdout)
    assert hub.requests == []
    message = refused(ask("heads", "show", address(), HF_HUB_OFFLINE="1"), 1)
    assert "not in the hub's cache" in message


def test_content_that_is_not_what_the_hub_announced_is_refused(ask: Run, hub: Hub) -> None:
    hub.announced = hashlib.sha256(b"what was published").hexdigest()
    for _ in range(2):  # nothing of the first time is kept that would do for the second
        message = refused(ask("heads", "show", address()), 2)
        assert "its checksum is" in message
        assert f"the hub said {hub.announced[:12]}" in message
        assert address() in message
        assert "not used" in message


def test_a_cached_file_that_was_changed_is_refused(ask: Run, tmp_path: Path) -> None:
    kept = tmp_path / "models"
    assert ask("heads", "show", address(), "--model-dir", kept).returncode == 0
    blob = next(kept.glob("models--*/blobs/*"))
    spoiled = bytearray(blob.read_bytes())
    spoiled[-1] ^= 1
    blob.write_bytes(spoiled)
    message = refused(ask("heads", "show", address(), "--model-dir", kept), 2)
    assert str(blob) in message
    blob.unlink()  # as the message says
    assert ask("heads", "show", address(), "--model-dir", kept).returncode == 0


def test_a_small_file_is_checked_by_git_s_own_hash(ask: Run, hub: Hub) -> None:
    blob = b"blob %d\0" % len(hub.content) + hub.content
    hub.announced = hashlib.sha1(blob, usedforsecurity=False).hexdigest()
    assert ask("heads", "show", address()).returncode == 0


@pytest.mark.parametrize(
    ("what", "problem"),
    [
        ({"repo": "org/nothing"}, "the hub has no repository org/nothing"),
        ({"file": "other.safetensors"}, "has no file other.safetensors"),
        ({"revision": "v9"}, f"{REPO} has no revision v9"),
    ],
)
def test_what_the_hub_does_not_have(what: dict[str, str], problem: str, ask: Run) -> None:
    message = refused(ask("heads", "show", address(**what)), 1)
    assert problem in message
    assert address(**what) in message


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://no-such-host.invalid"])
def test_a_hub_out_of_reach_is_said_at_once(endpoint: str, ask: Run) -> None:
    started = time.monotonic()
    message = refused(ask("heads", "show", address(), HF_ENDPOINT=endpoint), 1)
    assert time.monotonic() - started < 20
    assert "the hub cannot be reached" in message
    assert "--model-dir" in message
    assert address() in message


@pytest.mark.parametrize("status", [403, 501])
def test_a_hub_that_refuses_to_answer(status: int, ask: Run, hub: Hub) -> None:
    hub.status = status
    message = refused(ask("heads", "show", address()), 1)
    assert address() in message


def test_a_download_that_breaks_off_leaves_nothing_to_be_used(ask: Run, hub: Hub) -> None:
    hub.breaks_off = True
    ran = ask("heads", "show", address())
    assert ran.returncode == 1
    assert "Traceback" not in ran.stderr
    assert address() in ran.stderr
    hub.breaks_off = False
    assert ask("heads", "show", address()).returncode == 0


def test_a_name_that_no_repository_can_have(ask: Run, hub: Hub) -> None:
    message = refused(ask("heads", "show", address(repo="org/a--b")), 2)
    assert "org/a--b" in message
    assert hub.requests == []


def test_an_address_without_a_revision_is_refused(ask: Run, hub: Hub) -> None:
    message = refused(ask("heads", "show", f"hf://{REPO}/{FILE}"), 2)
    assert "hf://ORG/REPO/FILE@REVISION" in message
    assert hub.requests == []
