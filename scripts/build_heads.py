"""Fold the bundled heads, and the reference direction, from their published files.

    python scripts/build_heads.py [FOLDER]

FOLDER holds ``heads/*.pth`` and ``embeddings/laion-rating-prototypes/rating{0..9}.npy``, as their
authors published them (NOTICE says where). The same files give the same bytes.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from aesthetic_filter.heads.convert import catalogue, convert
from aesthetic_filter.heads.head import CLIP_VIT_L_14, save_head, sorted_header

INTO = Path(__file__).parents[1] / "src" / "aesthetic_filter" / "heads"


def build_reference_direction(prototypes: list[Path]) -> bytes:
    """The normalised mean of the published rating prototypes, as a safetensors file."""
    vectors = [np.load(path, allow_pickle=False).reshape(-1) for path in prototypes]
    mean = np.mean(np.array(vectors, np.float64), axis=0)
    direction = (mean / np.linalg.norm(mean)).astype(np.float32)
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in prototypes)).hexdigest()
    facts = {
        "space": CLIP_VIT_L_14,
        "what": "normalised mean of the ten rating prototypes, rating0.npy to rating9.npy",
        "source": "https://github.com/LAION-AI/aesthetic-predictor",
        "licence": "MIT",
        "sha256": f"{digest} (of the ten files, one after another)",
    }
    return sorted_header(save({"direction": direction}, facts))


def main() -> None:
    """Write every bundled file anew."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2] / "shared"
    prototypes = sorted((folder / "embeddings" / "laion-rating-prototypes").glob("rating*.npy"))
    (INTO / "reference-direction.safetensors").write_bytes(build_reference_direction(prototypes))
    known = {entry["sha256"] for entry in catalogue()["checkpoint"]}
    for path in sorted((folder / "heads").glob("*.pth")):
        if hashlib.sha256(path.read_bytes()).hexdigest() not in known:
            print(f"{path.name}: not in the catalogue, left out")
            continue
        head = convert(path)
        if head.affine:
            save_head(head, INTO / f"{head.name}.safetensors")
            print(f"{head.name}: folding error {head.provenance['folding_error']}")


if __name__ == "__main__":
    main()
