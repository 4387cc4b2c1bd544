"""Random CLIP weights as safetensors files, made on the spot, under the true names."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

FULL: dict[str, Any] = {"layers": 24, "width": 1024, "mlp": 4096}
"""The size of ViT-L/14's vision tower: 1.2 GB."""

F32 = NDArray[np.float32]


def write_clip(
    path: Path,
    *,
    layers: int = 2,
    width: int = 64,
    mlp: int | None = None,
    projection: int = 768,
    image_size: int = 224,
    patch: int = 14,
    layout: str = "hf",
    seed: int = 0,
    text: bool = True,
) -> Path:
    """Write random CLIP weights, float32, in the layout "hf" or "open_clip"; returns ``path``.

    The same seed is the same model in both layouts. ``mlp`` is four times the width by default;
    ``text`` adds a few tensors of the text tower.
    """
    tensors = clip_tensors(
        layers=layers,
        width=width,
        mlp=mlp,
        projection=projection,
        image_size=image_size,
        patch=patch,
        layout=layout,
        seed=seed,
        text=text,
    )
    save_file(tensors, path, {"format": "pt"})
    return path


def clip_tensors(
    *,
    layers: int = 2,
    width: int = 64,
    mlp: int | None = None,
    projection: int = 768,
    image_size: int = 224,
    patch: int = 14,
    layout: str = "hf",
    seed: int = 0,
    text: bool = True,
) -> dict[str, NDArray[Any]]:
    """The tensors that :func:`write_clip` writes, by name."""
    hidden = 4 * width if mlp is None else mlp
    positions = (image_size // patch) ** 2 + 1
    # Name: shape, what the numbers are scaled by, what they lie around.
    wanted: dict[str, tuple[tuple[int, ...], float, float]] = {
        "embeddings.class_embedding": ((width,), 1.0, 0),
        "embeddings.patch_embedding.weight": (
            (width, 3, patch, patch),
            3 / np.sqrt(3 * patch * patch),
            0,
        ),
        "embeddings.position_embedding.weight": ((positions, width), 0.3, 0),
        **_norm("pre_layrnorm", width),
    }
    for number in range(layers):
        block = f"encoder.layers.{number}"
        wanted |= _norm(f"{block}.layer_norm1", width) | _norm(f"{block}.layer_norm2", width)
        for part in ("q", "k", "v", "out"):
            wanted |= _linear(f"{block}.self_attn.{part}_proj", width, width)
        wanted |= _linear(f"{block}.mlp.fc1", hidden, width)
        wanted |= _linear(f"{block}.mlp.fc2", width, hidden)
    wanted |= _norm("post_layernorm", width)
    wanted["projection"] = ((projection, width), 1 / np.sqrt(width), 0)

    def fill(item: tuple[int, tuple[tuple[int, ...], float, float]]) -> F32:
        number, (shape, scale, centre) = item
        values = np.random.default_rng([seed, number]).standard_normal(shape, dtype=np.float32)
        values *= np.float32(scale)
        if centre:
            values += np.float32(centre)
        return values

    with ThreadPoolExecutor(2) as pool:
        vision = dict(zip(wanted, pool.map(fill, enumerate(wanted.values())), strict=True))
    return _hf(vision, text) if layout == "hf" else _open_clip(vision, layers, text)


def _norm(name: str, width: int) -> dict[str, tuple[tuple[int, ...], float, float]]:
    return {f"{name}.weight": ((width,), 0.1, 1), f"{name}.bias": ((width,), 0.1, 0)}


def _linear(name: str, n_out: int, n_in: int) -> dict[str, tuple[tuple[int, ...], float, float]]:
    return {
        f"{name}.weight": ((n_out, n_in), 1 / np.sqrt(n_in), 0),
        f"{name}.bias": ((n_out,), 0.1, 0),
    }


def _some(*shape: int) -> F32:
    return np.random.default_rng(99).standard_normal(shape, dtype=np.float32)


def _hf(vision: dict[str, F32], text: bool) -> dict[str, NDArray[Any]]:
    projection = vision.pop("projection")
    found: dict[str, NDArray[Any]] = {f"vision_model.{name}": v for name, v in vision.items()}
    positions = len(vision["embeddings.position_embedding.weight"])
    found["vision_model.embeddings.position_ids"] = np.arange(positions, dtype=np.int64)[None]
    found["visual_projection.weight"] = projection
    if text:
        found |= {
            "text_model.embeddings.token_embedding.weight": _some(8, 16),
            "text_model.embeddings.position_embedding.weight": _some(4, 16),
            "text_model.embeddings.position_ids": np.arange(4, dtype=np.int64)[None],
            "text_model.encoder.layers.0.self_attn.q_proj.weight": _some(16, 16),
            "text_model.encoder.layers.0.mlp.fc1.bias": _some(64),
            "text_model.final_layer_norm.weight": _some(16),
            "text_projection.weight": _some(len(projection), 16),
            "logit_scale": np.array(4.6052, np.float32),
        }
    return found


def _open_clip(vision: dict[str, F32], layers: int, text: bool) -> dict[str, NDArray[Any]]:
    found: dict[str, NDArray[Any]] = {
        "visual.class_embedding": vision["embeddings.class_embedding"],
        "visual.positional_embedding": vision["embeddings.position_embedding.weight"],
        "visual.proj": np.ascontiguousarray(vision["projection"].T),
        "visual.conv1.weight": vision["embeddings.patch_embedding.weight"],
    }
    renamed = {"visual.ln_pre": "pre_layrnorm", "visual.ln_post": "post_layernorm"}
    for number in range(layers):
        block, theirs = f"encoder.layers.{number}", f"visual.transformer.resblocks.{number}"
        for kind in ("weight", "bias"):
            found[f"{theirs}.attn.in_proj_{kind}"] = np.concatenate(
                [vision[f"{block}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            )
        renamed |= {
            f"{theirs}.ln_1": f"{block}.layer_norm1",
            f"{theirs}.ln_2": f"{block}.layer_norm2",
            f"{theirs}.attn.out_proj": f"{block}.self_attn.out_proj",
            f"{theirs}.mlp.c_fc": f"{block}.mlp.fc1",
            f"{theirs}.mlp.c_proj": f"{block}.mlp.fc2",
        }
    for theirs, ours in renamed.items():
        for kind in ("weight", "bias"):
            found[f"{theirs}.{kind}"] = vision[f"{ours}.{kind}"]
    if text:
        found |= {
            "positional_embedding": _some(4, 16),
            "text_projection": _some(16, len(vision["projection"])),
            "token_embedding.weight": _some(8, 16),
            "transformer.resblocks.0.attn.in_proj_weight": _some(48, 16),
            "transformer.resblocks.0.mlp.c_fc.bias": _some(64),
            "ln_final.weight": _some(16),
            "logit_scale": np.array(4.6052, np.float32),
        }
    return found


def hub_cache(folder: Path, weights: Path) -> Path:
    """Lay a weights file into ``folder`` as the hub's cache has the published encoder's.

    Returns ``folder``, which is then a ``--model-dir`` that needs no network. The file is moved.
    """
    digest = hashlib.sha256()
    with weights.open("rb") as file:
        while data := file.read(1 << 24):
            digest.update(data)
    repo = folder / "models--openai--clip-vit-large-patch14"
    blob = repo / "blobs" / digest.hexdigest()
    snapshot = repo / "snapshots" / "32bd64288804d66eefd0ccbe215aa642df71cc41"
    blob.parent.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    weights.rename(blob)
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{blob.name}")
    return folder
