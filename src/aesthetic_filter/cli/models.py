"""``models pull`` and ``verify``."""

from __future__ import annotations

from typing import Annotated

import typer

from aesthetic_filter.cli.app import ModelDir, command, models_app


@command(models_app, "pull")
def models_pull(
    model_dir: ModelDir = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
) -> None:
    """Fetch the CLIP encoder, 1.7 GB, which images need; says how to copy it elsewhere."""
    from aesthetic_filter.clip.weights import cached_encoder, pull_encoder

    was_here = cached_encoder(model_dir) is not None
    found = pull_encoder(model_dir=model_dir, quiet=quiet)
    folder = found.path.parents[2]  # in the layout of the hub's cache
    print(f"{found.name}: {'was here already' if was_here else 'fetched'}")
    print(f"  path      {found.path}")
    print(f"  size      {found.path.stat().st_size:,} bytes")
    print(f"  sha256    {found.sha256}")
    print(f"  revision  {found.revision}")
    print("to have it on a machine without a network, copy it with its links, and name the folder:")
    print(f"  rsync -a {folder} MACHINE:MODELS/      (on this one: cp -a)")
    print("  aesthetic-filter score PHOTOS --out scores --model-dir MODELS")


@command(models_app, "verify")
def models_verify(model_dir: ModelDir = None) -> None:
    """Read the whole CLIP encoder again and compare its checksum."""
    from aesthetic_filter.clip.weights import verify_encoder

    found = verify_encoder(model_dir=model_dir)
    print(f"{found.name:<32}ok  sha256 {found.sha256}")
