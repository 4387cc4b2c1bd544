"""Make the pictures in the README: a report and a review of drawn landscapes, in headless Chromium.

    make screenshots

The encoder is a small one with random weights, so that nothing has to be downloaded; its embeddings
are made to point where CLIP's do. What is shown is what the commands make, and the scores mean
nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

COUNT = 600


def main() -> None:
    """Score drawn landscapes, report and review them, and photograph both pages."""
    from playwright.sync_api import sync_playwright

    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    with nice_folder() as folder:
        encoder(folder)
        run(
            folder,
            sys.executable,
            str(ROOT / "scripts/make_landscapes.py"),
            "landscapes",
            f"{COUNT}",
        )
        command(folder, "score", "landscapes", "--out", "scores", "--precision", "float32")
        command(folder, "report", "scores", "--out", "report.html")
        with sync_playwright() as playwright:
            as_root = ["--no-sandbox"] if os.geteuid() == 0 else []
            browser = playwright.chromium.launch(executable_path=browser_path, args=as_root)
            page = browser.new_page(viewport={"width": 1180, "height": 1380})
            page.goto((folder / "report.html").as_uri())
            page.locator("#gallery img").first.wait_for()
            page.screenshot(path=ROOT / "docs/report.png")
            review = subprocess.Popen(
                words(
                    "review",
                    "scores",
                    "--no-open",
                    "--port",
                    "0",
                    "--sample",
                    "160",
                    "--reviewer",
                    "you",
                    "--target-precision",
                    "0.8",
                ),
                cwd=folder,
                stdout=subprocess.PIPE,
                text=True,
            )
            try:
                assert review.stdout is not None
                page = browser.new_page(viewport={"width": 1180, "height": 720})
                page.goto(review.stdout.readline().strip())
                label(page)
                page.screenshot(path=ROOT / "docs/review.png")
            finally:
                review.kill()
                review.wait()
            browser.close()
    for name in ("report.png", "review.png"):
        print(f"docs/{name}: {(ROOT / 'docs' / name).stat().st_size:,} bytes")


SEEN = "(i => i && i.complete && i.naturalWidth > 0)(document.querySelector('#frame img'))"


@contextmanager
def nice_folder() -> Iterator[Path]:
    """A temporary folder with a name that can be shown."""
    folder = Path(tempfile.gettempdir()) / "demo"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def label(page: object) -> None:
    """Keep what scores well, and now and then something else, as a person would."""
    from playwright.sync_api import Page

    assert isinstance(page, Page)
    chance = np.random.default_rng(0)
    page.locator("#frame img").wait_for()
    page.keyboard.press("i")
    for _ in range(110):
        page.locator("#caption", has_text="score").wait_for()
        while not page.evaluate(SEEN):
            page.wait_for_timeout(10)
        key = page.locator("#frame").get_attribute("data-key")
        score = float(page.locator("#caption").inner_text().rpartition(" ")[2])
        keep = chance.random() < 1 / (1 + np.exp(-12 * (score - 5.3)))
        page.keyboard.press("k" if keep else "d")
        page.locator(f"#frame:not([data-key='{key}'])").wait_for()
    page.keyboard.press("i")
    page.wait_for_timeout(800)


def encoder(folder: Path) -> None:
    """Random weights, under which embeddings point where CLIP's do, and follow the picture."""
    from aesthetic_filter.heads.head import reference_direction
    from clip_weights import hub_cache, write_clip

    path = write_clip(folder / "small.safetensors", text=False)
    tensors = load_file(path)
    norm, projection = (
        next(name for name in tensors if name.endswith(end))
        for end in ("post_layernorm.bias", "visual_projection.weight")
    )
    tensors[norm][:] = 0
    tensors[norm][0] = 12.0
    weights = tensors[projection]
    weights[:, 0] = 0.14 * np.sqrt(weights.shape[1]) * reference_direction()
    save_file(tensors, path, {"format": "pt"})
    hub_cache(folder / "models", path)
    os.environ["AESTHETIC_FILTER_MODEL_DIR"] = str(folder / "models")


def words(*arguments: str) -> list[str]:
    """The command line, with this interpreter."""
    return [sys.executable, "-m", "aesthetic_filter", *arguments]


def command(folder: Path, *arguments: str) -> None:
    """Run a command in a folder, showing it."""
    run(folder, *words(*arguments))


def run(folder: Path, *command: str) -> None:
    """Run a program in a folder."""
    subprocess.run(command, cwd=folder, check=True)


if __name__ == "__main__":
    main()
