"""Pictures made on the spot, sources of them, and what should be made of them, worked out apart."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, ImageOps
from safetensors.numpy import load_file

import aesthetic_filter as af

HEADS = Path(__file__).resolve().parents[1] / "src/aesthetic_filter/heads"
REFERENCE = "sac+logos+ava1-l14-linearMSE"

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's, from OpenAI's ``clip.py``."""

WITHIN = 2e-3
"""What rounding an embedding to float16 may do to a score."""

EXACT = af.ImageOptions(device="cpu", precision="float32")
"""How images are embedded where values are compared."""


# Pictures.


def picture(seed: int, width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Clouds of colour, the same for the same seed."""
    chance = np.random.default_rng(seed)
    coarse = chance.integers(0, 256, (7, 7, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    if mode == "RGBA":
        ramp = np.linspace(0, 255, width).astype(np.uint8)
        image.putalpha(Image.fromarray(np.tile(ramp, (height, 1))))
    return image if image.mode == mode else image.convert(mode)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The image as a file of this kind."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpeg(seed: int, side: int = 32) -> bytes:
    """A small JPEG, different for each seed."""
    return encoded(picture(seed, side, side), "JPEG")


def turned(seed: int, width: int, height: int, orientation: int) -> bytes:
    """A JPEG stored at this size, with this EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture(seed, width, height), "JPEG", exif=exif)


@cache
def pictures() -> dict[str, bytes]:
    """One of each mode and size that matters, by relative path."""
    return {
        "a/wide.jpg": encoded(picture(1, 400, 260), "JPEG"),
        "a/tall.PNG": encoded(picture(2, 230, 410), "PNG"),
        "a/small.webp": encoded(picture(3, 90, 60), "WEBP", quality=90),
        "b/grey.png": encoded(picture(4, 224, 224, "L"), "PNG"),
        "b/clear.png": encoded(picture(5, 240, 250, "RGBA"), "PNG"),
        "b/table.gif": encoded(picture(6, 300, 225, "P"), "GIF"),
        "b/deep/ink.jpeg": encoded(picture(7, 320, 240, "CMYK"), "JPEG"),
        "b/deep/black.bmp": encoded(picture(8, 64, 64, "1"), "BMP"),
        "turned.jpg": turned(9, 300, 200, 6),
    }


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# What should be made of them.


def pixels(data: bytes, *, exif: bool = True) -> NDArray[np.float32]:
    """CLIP's preprocessing as Pillow does it: (3, 224, 224) float32."""
    image: Image.Image = Image.open(io.BytesIO(data))
    image = ImageOps.exif_transpose(image) if exif else image
    image = image.convert("RGB")
    short = min(image.size)
    size = (int(224 * image.width / short), int(224 * image.height / short))
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - 224) / 2), round((size[1] - 224) / 2)
    image = image.crop((left, top, left + 224, top + 224))
    values = np.asarray(image, np.float32) / np.float32(255)
    values = (values - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    return np.ascontiguousarray(values.transpose(2, 0, 1))


class Oracle:
    """transformers' CLIP with the small weights of ``clip_weights``, in float32."""

    def __init__(self, model_dir: Path) -> None:
        import torch
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        (weights,) = model_dir.rglob("model.safetensors")
        config = CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=1,
            image_size=224,
            patch_size=14,
            projection_dim=768,
            hidden_act="quick_gelu",
        )
        self._model = CLIPVisionModelWithProjection(config).eval()
        tensors = {name: torch.from_numpy(value) for name, value in load_file(weights).items()}
        missing = self._model.load_state_dict(tensors, strict=False).missing_keys
        assert missing == []

    def embed(self, images: Sequence[bytes], *, exif: bool = True) -> NDArray[np.float64]:
        """(N, 768), of unit norm."""
        import torch

        batch = torch.from_numpy(np.stack([pixels(image, exif=exif) for image in images]))
        with torch.inference_mode():
            found = self._model(batch).image_embeds.double().numpy()
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    def score(
        self, images: Sequence[bytes], head: str = REFERENCE, *, exif: bool = True
    ) -> NDArray[np.float64]:
        """(N,), of one of the bundled heads."""
        return affine(self.embed(images, exif=exif), head)


def affine(vectors: NDArray[Any], head: str = REFERENCE) -> NDArray[np.float64]:
    """A bundled head in float64, from the numbers in its file."""
    tensors = load_file(HEADS / f"{head}.safetensors")
    weight = tensors["layers.0.weight"][0].astype(np.float64)
    x = vectors.astype(np.float64)
    return x @ weight / np.linalg.norm(x, axis=1) + float(tensors["layers.0.bias"][0])


# Sources.


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def tar_bytes(members: Iterable[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """Write an archive, compressed as its name says."""
    data = tar_bytes(members)
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = pa.compress(data, "zstd", asbytes=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def members(path: Path) -> dict[str, bytes]:
    """What is in an archive."""
    with tarfile.open(path) as archive:
        return {info.name: archive.extractfile(info).read() for info in archive}  # type: ignore[union-attr]


def write_table(path: Path, columns: Mapping[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(dict(columns)), path)
    return path


# Scores.


def parts(out: Path) -> list[Path]:
    return sorted(out.rglob("*.parquet"))


def rows(out: Path) -> list[dict[str, Any]]:
    """All rows of all parts, read with nothing of ours."""
    return [row for part in parts(out) for row in pq.ParquetFile(part).read().to_pylist()]


def by_id(out: Path) -> dict[str, dict[str, Any]]:
    found = rows(out)
    assert len({row["image_id"] for row in found}) == len(found)
    return {row["image_id"]: row for row in found}


def run_python(
    code: str, *arguments: object, cwd: Path, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "COLUMNS": "200"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


BLOCKED = """
import sys
for name in {names!r}:
    sys.modules[name] = None
from aesthetic_filter.cli import main
sys.argv = ["aesthetic-filter", *sys.argv[1:]]
main()
"""


def run_without(
    names: Sequence[str], *arguments: object, cwd: Path
) -> subprocess.CompletedProcess[str]:
    """The command line where these modules cannot be imported."""
    return run_python(BLOCKED.format(names=list(names)), *arguments, cwd=cwd)


MEASURED = """
import resource, subprocess, sys
done = subprocess.run([sys.executable, "-m", "aesthetic_filter", *sys.argv[1:]])
print("peak", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(done.returncode)
"""


def run_measured(*arguments: object, cwd: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    """The command line, and the most memory, in MB, that it held at once.

    By way of a small process: what a process began as counts for it too.
    """
    done = run_python(MEASURED, *arguments, cwd=cwd)
    peak = int(done.stdout.rpartition("peak ")[2]) / (1024 if sys.platform == "darwin" else 1)
    return done, peak / 1024
