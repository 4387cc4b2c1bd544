"""From a published checkpoint to a head: read its layers, tell their activation, fold them.

A network without activations between its layers is one affine map, ``w·x + b``. Folded in
float64 it gives the layered network's scores to about 1e-6, from 769 numbers instead of 930,000.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aesthetic_filter.errors import HeadError, MissingExtraError
from aesthetic_filter.heads.head import CLIP_VIT_L_14, Head, read_safetensors
from aesthetic_filter.kernels import F32

AFFINE_INDICES = {(0, 2, 4, 6, 7)}
"""Layer numbers of published networks with only dropout between their layers.

From ``simple_inference.py`` of christophschuhmann/improved-aesthetic-predictor.
"""

RELU_INDICES = {(0, 3, 6, 9, 11)}
"""Layer numbers of the same network with a ReLU after each layer, from ``train_predictor.py``."""

_LAYER = re.compile(r"(?:.*\.)?(\d+)\.(weight|bias)")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds, before it is folded.

    Attributes:
        path: the file.
        sha256: of the file, in hex.
        layers: (weight (out, in), bias (out,)), float32.
        activation: "none", "relu", or None where the layer numbers do not tell.
        input_scale: what the L2-normalised embedding is multiplied by before the first layer.
        published: the catalogue's entry for this very file, empty where it has none.
    """

    path: Path
    sha256: str
    layers: tuple[tuple[F32, F32], ...]
    activation: str | None
    input_scale: float
    published: Mapping[str, str]


def convert(
    path: Path | str,
    *,
    activation: str | None = None,
    name: str | None = None,
    space: str = CLIP_VIT_L_14,
    scale: str | None = None,
    source: str | None = None,
    licence: str | None = None,
) -> Head:
    """Make a head from a checkpoint; fold it if nothing stands between its layers.

    Args:
        path: a ``.safetensors``, ``.pth`` or ``.pt`` file holding a state dict.
        activation: "none" or "relu"; needed only where the layer numbers do not tell.
        name: the head's name; default: the published one, or the file's stem.
        space: the embedding space it was trained on.
        scale: what its scores mean.
        source: where it was published.
        licence: under which terms.

    Raises:
        HeadError: not a checkpoint of a known layout, or its activation cannot be told.
        MissingExtraError: a ``.pth`` file, and torch is not installed.
    """
    checkpoint = read_checkpoint(Path(path))
    chosen = activation or checkpoint.activation
    if chosen not in ("none", "relu"):
        raise HeadError(
            f"{path}: cannot tell from its layer numbers whether ReLUs stand between its layers: "
            "say --activation none or --activation relu"
            if chosen is None
            else f"activation must be none or relu, not {chosen!r}"
        )
    if activation and checkpoint.activation not in (None, activation):
        raise HeadError(
            f"{path}: its layer numbers say activation {checkpoint.activation}, not {activation}"
        )
    facts = {
        "scale": scale or checkpoint.published.get("scale", ""),
        "source": source or checkpoint.published.get("source", ""),
        "licence": licence or checkpoint.published.get("licence", ""),
        "checkpoint": checkpoint.path.name,
        "checkpoint_sha256": checkpoint.sha256,
    }
    name = name or checkpoint.published.get("name") or checkpoint.path.stem
    if chosen == "none":
        layers: tuple[tuple[F32, F32], ...] = (fold(checkpoint.layers, checkpoint.input_scale),)
    else:
        first, bias = checkpoint.layers[0]
        layers = ((first * np.float32(checkpoint.input_scale), bias), *checkpoint.layers[1:])
    head = Head(name, space, layers, facts)
    facts["folding_error"] = f"{folding_error(head, checkpoint):.1e}" if head.affine else ""
    return Head(name, space, layers, facts)


def fold(layers: tuple[tuple[F32, F32], ...], input_scale: float = 1.0) -> tuple[F32, F32]:
    """Fold layers without activations into one, in float64.

    Returns:
        weight (out, in) and bias (out,), rounded once to float32.
    """
    weight = np.eye(layers[0][0].shape[1]) * input_scale
    bias = np.zeros(layers[0][0].shape[1])
    for layer_weight, layer_bias in layers:
        wide = layer_weight.astype(np.float64)
        weight, bias = wide @ weight, wide @ bias + layer_bias
    return weight.astype(np.float32), bias.astype(np.float32)


def folding_error(
    head: Head, checkpoint: Checkpoint, *, rows: int = 20_000, seed: int = 0
) -> float:
    """The largest difference between a head and its layered float32 network.

    Measured over ``rows`` random unit vectors, half of them around the space's reference
    direction as real embeddings are.
    """
    random = np.random.default_rng(seed)
    worst = 0.0
    for start in range(0, rows, 2000):
        x = random.standard_normal((min(2000, rows - start), head.width))
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        if head.reference is not None:
            x[::2] += head.reference
            x /= np.linalg.norm(x, axis=1, keepdims=True)
        unit = x.astype(np.float32)
        expected = layered_network(checkpoint, unit, relu=not head.affine)
        worst = max(worst, float(np.abs(head(unit) - expected).max()))
    return worst


def layered_network(checkpoint: Checkpoint, unit: F32, *, relu: bool) -> F32:
    """The checkpoint as it was trained, layer by layer in float32: (N, D) -> (N,)."""
    x = unit * np.float32(checkpoint.input_scale)
    for number, (weight, bias) in enumerate(checkpoint.layers):
        x = x @ weight.T + bias
        if relu and number < len(checkpoint.layers) - 1:
            x = np.maximum(x, np.float32(0))
    scores: F32 = x[:, 0]
    return scores


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a state dict and recognise its layout.

    Known layouts: ``layers.{i}.weight``/``.bias`` (any prefix), ``weight``/``bias`` (LAION V1), and
    ``linear.weight``/``linear.bias`` (Simulacra, which expects the embedding times √width).

    Raises:
        HeadError: not a state dict of a known layout.
        MissingExtraError: a PyTorch file, and torch is not installed.
    """
    try:
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise HeadError(f"{path}: {error.strerror or error}") from None
    tensors = read_safetensors(path)[1] if path.suffix == ".safetensors" else _read_pth(path)
    published = {p["sha256"]: p for p in catalogue()["checkpoint"]}.get(sha256, {})
    numbers: tuple[int, ...] = ()
    input_scale = 1.0
    if set(tensors) == {"weight", "bias"}:
        pairs = [(tensors["weight"], tensors["bias"])]
    elif set(tensors) == {"linear.weight", "linear.bias"}:
        pairs = [(tensors["linear.weight"], tensors["linear.bias"])]
        input_scale = float(np.sqrt(tensors["linear.weight"].shape[-1]))
    else:
        numbers, pairs = _numbered_layers(path, tensors)
    layers = tuple((_matrix(weight), bias.astype(np.float32).reshape(-1)) for weight, bias in pairs)
    activation = _activation(numbers) if len(layers) > 1 else "none"
    return Checkpoint(path, sha256, layers, activation, input_scale, published)


@cache
def catalogue() -> dict[str, Any]:
    """The published checkpoints known here, and the name of the default head."""
    file = resources.files("aesthetic_filter") / "heads" / "catalogue.toml"
    return tomllib.loads(file.read_text(encoding="utf-8"))


def _activation(numbers: tuple[int, ...]) -> str | None:
    if numbers in AFFINE_INDICES or numbers == tuple(range(numbers[0], numbers[0] + len(numbers))):
        return "none"  # known, or no room for anything between them
    return "relu" if numbers in RELU_INDICES else None


def _numbered_layers(
    path: Path, tensors: Mapping[str, NDArray[Any]]
) -> tuple[tuple[int, ...], list[tuple[NDArray[Any], NDArray[Any]]]]:
    found: dict[int, dict[str, NDArray[Any]]] = {}
    for key, tensor in tensors.items():
        match = _LAYER.fullmatch(key)
        if not match:
            raise HeadError(
                f"{path}: not an aesthetic head: its key {key!r} is in none of the known layouts "
                "(layers.N.weight and .bias; weight and bias; linear.weight and linear.bias)"
            )
        found.setdefault(int(match[1]), {})[match[2]] = tensor
    if not found or any(len(pair) != 2 for pair in found.values()):
        raise HeadError(f"{path}: not an aesthetic head: a layer lacks its weight or its bias")
    numbers = tuple(sorted(found))
    return numbers, [(found[n]["weight"], found[n]["bias"]) for n in numbers]


def _matrix(weight: NDArray[Any]) -> F32:
    return np.atleast_2d(weight.astype(np.float32))


def _read_pth(path: Path) -> dict[str, NDArray[Any]]:
    try:
        import torch
    except ImportError:
        raise MissingExtraError(
            f"{path}: reading a PyTorch checkpoint needs torch", "clip"
        ) from None
    try:
        # weights_only: nothing in the file is executed, whatever it says.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is not a checkpoint
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise HeadError(f"{path}: not a PyTorch state dict that loads safely ({reason})") from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise HeadError(f"{path}: not a state dict of tensors")
    return {str(key): tensor.float().numpy() for key, tensor in state.items()}
