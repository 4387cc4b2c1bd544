"""What the tests share: real data, a command line in its own process, honest embeddings."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

PROJECT = Path(__file__).resolve().parents[1]

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def repo() -> Path:
    """The project's root."""
    return PROJECT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the project."""
    folder = PROJECT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("the real data is not on this machine: ../shared is absent")
    return folder


@pytest.fixture
def cli(tmp_path: Path) -> Run:
    """Run ``python -m aesthetic_filter ...`` in ``tmp_path``.

    ``cli("score", "in", "--out", "scores", env={"KEY": "value"})`` gives the CompletedProcess with
    text streams. A variable given as None is removed from the environment.
    """

    def run(
        *arguments: object,
        env: dict[str, str | None] | None = None,
        cwd: Path | None = None,
        timeout: float = 120,
        input: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        wanted: dict[str, str | None] = {**os.environ, "COLUMNS": "200", **(env or {})}
        return subprocess.run(
            [sys.executable, "-m", "aesthetic_filter", *map(str, arguments)],
            cwd=cwd or tmp_path,
            env={key: value for key, value in wanted.items() if value is not None},
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def make_embeddings() -> Callable[..., NDArray[Any]]:
    """``make_embeddings(rows, seed=0, dtype=np.float16, scale=1.0)`` gives (rows, 768) vectors.

    They point the way real ViT-L/14 image embeddings do: 0.6 of the reference direction and 0.8 of
    noise across it, so each row's cosine to the reference is 0.6, in the middle of the 0.43 to
    0.80 measured on real images. ``scale`` is the rows' norm.
    """

    def make(rows: int, seed: int = 0, dtype: Any = np.float16, scale: float = 1.0) -> NDArray[Any]:
        from aesthetic_filter.heads.head import reference_direction

        reference = reference_direction().astype(np.float64)
        reference /= np.linalg.norm(reference)
        noise = np.random.default_rng(seed).standard_normal((rows, len(reference)))
        noise -= (noise @ reference)[:, None] * reference
        noise /= np.linalg.norm(noise, axis=1, keepdims=True)
        vectors = 0.6 * reference + 0.8 * noise
        return (scale * vectors).astype(dtype)

    return make


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``--model-dir`` with a small encoder of the true architecture, random weights."""
    from clip_weights import hub_cache, write_clip

    folder = tmp_path_factory.mktemp("models")
    return hub_cache(folder, write_clip(folder / "small.safetensors"))


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium (Playwright's Browser); see ``browser.py`` for what to do with it."""
    from browser import launched

    with launched() as found:
        yield found
