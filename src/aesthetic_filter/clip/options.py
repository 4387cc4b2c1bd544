"""How images are decoded and embedded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ImageOptions:
    """How images are decoded and embedded; nothing here matters where embeddings are read.

    Attributes:
        device: "auto" (all CUDA devices, else MPS, else the processor), "cpu", "cuda" (all of
            them), "cuda:1", "mps".
        precision: of the encoder's products: "auto" (the fastest that agrees with float32 to a
            cosine of 0.9999), "float32" (the reference), "bfloat16", "float16".
        weights: the encoder's, as a safetensors file or ``hf://ORG/REPO/FILE@REVISION``; default:
            OpenAI's CLIP ViT-L/14, fetched on first use.
        batch_size: images embedded at once; default: what suits the device.
        decode: "exact", bit for bit as the heads' training had it, or "fast": large JPEGs are
            downscaled by their decoder.
        exif: apply the EXIF orientation.
        max_pixels: images with more are refused; default: as ``preprocess`` says.
        allow_truncated: score what is there of a truncated image.
        threads: that decode; default: the processors.
    """

    device: str = "auto"
    precision: str = "auto"
    weights: str | Path | None = None
    batch_size: int | None = None
    decode: str = "exact"
    exif: bool = True
    max_pixels: int | None = None
    allow_truncated: bool = False
    threads: int | None = None
