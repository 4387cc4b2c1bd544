"""An aesthetic head: immutable data that turns embeddings into scores.

A head file is safetensors. Its tensors are ``layers.{i}.weight`` (out, in) and
``layers.{i}.bias`` (out,), float32; a head without activations is folded to one layer. Its header
carries the facts that travel with the weights (see :data:`FACTS`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from aesthetic_filter import kernels
from aesthetic_filter.errors import ChecksumError, HeadError, WidthError
from aesthetic_filter.kernels import F32, Measurement
from aesthetic_filter.whole import write_whole

if TYPE_CHECKING:
    import torch

FORMAT = "aesthetic-filter-head/1"

CLIP_VIT_L_14 = "clip-vit-l-14-openai/image/224-bicubic/l2"
"""The space of OpenAI's CLIP ViT-L/14 image embeddings.

It names the model and weights, the modality, the preprocessing and the normalisation.
"""

SPACES = {CLIP_VIT_L_14: "OpenAI's CLIP ViT-L/14 image embeddings"}
"""What the spaces known here are called in messages."""

FACTS = ("scale", "source", "licence", "checkpoint", "checkpoint_sha256", "folding_error")
"""What a head's provenance holds, each a string; "" where it is not known.

``scale``: what the numbers mean; ``folding_error``: the largest difference from the layered
float32 network that ``convert`` measured.
"""

FOREIGN_BELOW = 0.35
"""A row whose cosine to the reference direction is below this is not a ViT-L/14 image embedding.

Measured: 1,415 real image embeddings lie from 0.43 to 0.80, averages of them up to 0.98; the
embeddings of two text prompts at 0.20 and 0.26; another encoder's, and random vectors, within
±0.12. The threshold is half way between the nearest on either side.
"""

WIDTHS = {
    512: "CLIP ViT-B/32 or ViT-B/16",
    640: "CLIP RN50x4",
    768: "CLIP ViT-L/14, SigLIP base, or the DINO ViT-B models",
    1024: "CLIP ViT-H/14 or RN50",
    1152: "SigLIP so400m",
    1280: "CLIP ViT-bigG/14",
}
"""Well-known image encoders by the width of their embeddings."""


@dataclass(frozen=True, eq=False)
class Head:
    """An aesthetic head.

    Attributes:
        name: what people call it.
        space: the embedding space it was trained on, such as :data:`CLIP_VIT_L_14`.
        layers: for each layer (weight (out, in), bias (out,)), float32, read-only; the last has
            one output. A head with one layer is affine in the L2-normalised embedding.
        provenance: where the numbers come from; the keys are :data:`FACTS`.

    Calling a head scores embeddings; L2 normalisation happens inside.
    """

    name: str
    space: str
    layers: tuple[tuple[F32, F32], ...]
    provenance: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        frozen = []
        for weight, bias in self.layers:
            pair = tuple(np.array(a, np.float32, copy=True, order="C") for a in (weight, bias))
            for array in pair:
                array.setflags(write=False)
            frozen.append(pair)
        object.__setattr__(self, "layers", tuple(frozen))
        facts = {key: self.provenance.get(key, "") for key in FACTS}
        object.__setattr__(self, "provenance", MappingProxyType(facts))
        _check_layers(self.name, self.layers)

    def __reduce__(self) -> tuple[Any, ...]:
        return Head, (self.name, self.space, self.layers, dict(self.provenance))

    def __repr__(self) -> str:
        kind = "affine" if self.affine else f"{len(self.layers)} layers with ReLU"
        return f"Head({self.name!r}, {self.width} -> 1, {kind})"

    @property
    def width(self) -> int:
        """How many values an embedding must have."""
        return int(self.layers[0][0].shape[1])

    @property
    def takes(self) -> str:
        """What the head is for, in words: "OpenAI's CLIP ViT-L/14 image embeddings"."""
        return SPACES.get(self.space, f"embeddings of {self.space}")

    @property
    def affine(self) -> bool:
        """Whether the head is one dot product and a bias."""
        return len(self.layers) == 1

    @cached_property
    def sha256(self) -> str:
        """The identity of the numbers: sha256 over the layers' float32 bytes, in hex."""
        digest = hashlib.sha256()
        for weight, bias in self.layers:
            digest.update(repr(weight.shape).encode() + weight.tobytes() + bias.tobytes())
        return digest.hexdigest()

    @property
    def reference(self) -> F32 | None:
        """The direction in which the space's embeddings point; None where it is not known."""
        return reference_direction() if self.space == CLIP_VIT_L_14 else None

    def __call__(self, embeddings: NDArray[Any] | torch.Tensor) -> Any:
        """Predict how much people like the images with these embeddings.

        Args:
            embeddings: (N, width) or (width,) float16, float32 or float64; a NumPy array, an
                array-like of floats, or a torch tensor, which is scored on the device it lies on
                (bfloat16 too). Rows need not be normalised.

        Returns:
            (N,) float32, or a scalar for one row: an array, or a tensor on the same device. NaN
            where the embedding holds NaN or infinity, or is all zeros.

        Raises:
            WidthError: the embeddings have another width.
            TypeError: the values are not floating-point.

        Embeddings of the right width that look like another encoder's are scored, with a
        :class:`UserWarning` where they are the majority.
        """
        if type(embeddings).__module__.partition(".")[0] == "torch":
            from aesthetic_filter.heads import torch_scores

            return torch_scores.score(self, cast("torch.Tensor", embeddings))
        array = np.asarray(embeddings)
        measurement = self.measure(np.atleast_2d(array))
        self.warn_if_foreign(measurement.cosines)
        return measurement.scores[0] if array.ndim == 1 else measurement.scores

    def measure(self, vectors: NDArray[Any], *, threads: int | None = None) -> Measurement:
        """Scores, norms and reference cosines of (N, width) vectors, in one pass.

        Args:
            vectors: (N, width) float16, float32 or float64.
            threads: how many may share the rows; default: all processors.

        Raises:
            WidthError: the vectors have another width.
            TypeError: the values are not floating-point.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.width:
            raise wrong_width(int(vectors.shape[-1]) if vectors.ndim else 0, self)
        weight, bias = self.layers[0]
        reference = np.zeros_like(weight[0]) if self.reference is None else self.reference
        first = float(bias[0])
        measured = kernels.measure(vectors, weight[0], first, reference, threads=threads)
        if self.affine:
            return measured
        scores = kernels.layered_scores(vectors, self._columns, threads=threads)
        return Measurement(scores, measured.norms, measured.cosines)

    @cached_property
    def _columns(self) -> tuple[tuple[F32, F32], ...]:
        return tuple((np.array(w.T, order="C"), b.copy()) for w, b in self.layers)

    def foreign(self, cosines: F32) -> NDArray[np.bool_]:
        """Which rows, by their reference cosine (N,), are not of this head's space: bool (N,)."""
        if self.reference is None:
            return np.zeros(cosines.shape, np.bool_)
        return cosines < FOREIGN_BELOW

    def warn_if_foreign(self, cosines: F32) -> None:
        """Warn where most rows are not of this head's space."""
        count = int(np.count_nonzero(self.foreign(cosines)))
        if count * 2 > np.count_nonzero(~np.isnan(cosines)):
            import warnings

            warnings.warn(
                f"{count} of {len(cosines)} embeddings do not look like {self.takes}: their cosine "
                f"to where those point is below {FOREIGN_BELOW}; if they come from another "
                "encoder, or from text, their scores mean nothing",
                stacklevel=3,
            )


def wrong_width(width: int, head: Head) -> WidthError:
    """The one message for vectors of another width."""
    who = f" (the width of {WIDTHS[width]})" if width in WIDTHS else ""
    return WidthError(
        f"these embeddings have {width:,} values each{who}; "
        f"the head {head.name!r} takes {head.takes}, which have {head.width:,}"
    )


def save_head(head: Head, path: Path) -> None:
    """Write a head file; it appears whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    from safetensors.numpy import save

    tensors = {}
    for number, (weight, bias) in enumerate(head.layers):
        tensors[f"layers.{number}.weight"] = np.array(weight)
        tensors[f"layers.{number}.bias"] = np.array(bias)
    facts = {
        "format": FORMAT,
        "name": head.name,
        "space": head.space,
        "activation": "none" if head.affine else "relu",
        "weights_sha256": head.sha256,
        **head.provenance,
    }
    write_whole(path, sorted_header(save(tensors, facts)))


def read_head(path: Path) -> Head | None:
    """Read a head file, or return None where ``path`` is a safetensors file of another kind.

    Raises:
        HeadError: the file is not safetensors, or not a usable head.
        ChecksumError: its numbers are not those that were saved.
    """
    facts, tensors = read_safetensors(path)
    if facts.get("format") != FORMAT:
        return None
    count = len(tensors) // 2
    try:
        layers = tuple(
            (tensors[f"layers.{i}.weight"], tensors[f"layers.{i}.bias"]) for i in range(count)
        )
        head = Head(facts["name"], facts["space"], layers, facts)
    except KeyError as error:
        raise HeadError(f"{path}: not a usable head: it lacks {error}") from None
    if head.sha256 != facts.get("weights_sha256"):
        raise ChecksumError(
            f"{path}: the weights are not those that were saved (sha256 {head.sha256[:12]}…, "
            f"expected {facts.get('weights_sha256', '')[:12]}…): fetch or convert the file again"
        )
    return head


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
    """The header and the tensors of a safetensors file.

    Raises:
        HeadError: the file is not safetensors, or cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return file.metadata() or {}, tensors
    except (SafetensorError, OSError, TypeError) as error:
        raise HeadError(f"{path}: not a safetensors file ({error})") from None


@cache
def reference_direction() -> F32:
    """The direction in which ViT-L/14 image embeddings point: (768,) float32 of unit norm.

    The normalised mean of ten averages of real image embeddings, one for each rating from 0 to 9,
    published in LAION-AI/aesthetic-predictor (MIT).
    """
    file = resources.files("aesthetic_filter") / "heads" / "reference-direction.safetensors"
    from safetensors.numpy import load

    direction: F32 = load(file.read_bytes())["direction"]
    direction.setflags(write=False)
    return direction


def _check_layers(name: str, layers: tuple[tuple[F32, F32], ...]) -> None:
    if not layers:
        raise HeadError(f"{name}: a head needs at least one layer")
    width = None
    for weight, bias in layers:
        fits = weight.ndim == 2 and bias.shape == weight.shape[:1]
        if not fits or width not in (None, weight.shape[1]):
            raise HeadError(
                f"{name}: its layers do not fit together ({weight.shape}, {bias.shape})"
            )
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            raise HeadError(f"{name}: its weights hold NaN or infinity")
        width = weight.shape[0]
    if width != 1:
        raise HeadError(f"{name}: a head has one output, this network has {width}")


def sorted_header(data: bytes) -> bytes:
    """The same safetensors file with its metadata in alphabetical order: the same bytes each time.

    (The library writes the metadata in the order of a hash map, another in each process.)
    """
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]
