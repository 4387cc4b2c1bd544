"""``heads list``, ``show``, ``convert`` and ``verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aesthetic_filter.cli.app import ModelDir, command, heads_app
from aesthetic_filter.errors import UsageError


@command(heads_app, "list")
def heads_list() -> None:
    """List the bundled heads, the default first."""
    from aesthetic_filter.heads import bundled_heads, load_head

    for name in bundled_heads():
        head = load_head(name)
        print(f"{name:<32}{head.provenance['licence']:<12}{head.provenance['scale']}")


@command(heads_app, "show")
def heads_show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A bundled head, a file, or hf://…")],
    model_dir: ModelDir = None,
) -> None:
    """Show what a head is and where its numbers come from."""
    from aesthetic_filter.heads import load_head

    head = load_head(name, model_dir=model_dir)
    kind = "affine (folded)" if head.affine else f"{len(head.layers)} layers with ReLU"
    numbers = sum(w.size + b.size for w, b in head.layers)
    facts = {
        "name": head.name,
        "kind": f"{kind}, {head.width} -> 1, {numbers:,} numbers",
        "space": head.space,
        "sha256": head.sha256,
        **head.provenance,
    }
    for key, value in facts.items():
        print(f"{key.replace('_', ' '):<18}{value or 'not known'}")


@command(heads_app, "convert")
def heads_convert(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help=".safetensors or .pth")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The head file.")],
    activation: Annotated[
        str | None, typer.Option(help="none or relu, where the layer numbers do not tell.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The head's name.")] = None,
    space: Annotated[str | None, typer.Option(help="The embedding space it is for.")] = None,
    scale: Annotated[str | None, typer.Option(help="What its scores mean.")] = None,
    source: Annotated[str | None, typer.Option(help="Where it was published.")] = None,
    licence: Annotated[str | None, typer.Option(help="Under which terms.")] = None,
) -> None:
    """Make a head file from a checkpoint, folded if nothing stands between its layers."""
    from aesthetic_filter.heads import convert, save_head
    from aesthetic_filter.heads.head import CLIP_VIT_L_14

    head = convert(
        checkpoint,
        activation=activation,
        name=name,
        space=space or CLIP_VIT_L_14,
        scale=scale,
        source=source,
        licence=licence,
    )
    try:
        save_head(head, out)
    except OSError as error:
        raise UsageError(f"{out}: cannot be written: {error.strerror}") from None
    folded = f"folded, error {head.provenance['folding_error']}" if head.affine else "layers kept"
    print(f"{out}: {head.name}, {folded}")


@command(heads_app, "verify")
def heads_verify(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            metavar="[CHECKPOINT]", help="The published file that a head was made from."
        ),
    ] = None,
    head: Annotated[
        str | None, typer.Option(help="The head to check; default: the one made from CHECKPOINT.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Random unit vectors to compare on.")] = 20_000,
) -> None:
    """Check the bundled heads' checksums, or a head against the checkpoint it was made from."""
    from aesthetic_filter.heads import bundled_heads, load_head
    from aesthetic_filter.heads.convert import folding_error, read_checkpoint

    if checkpoint is None:
        for name in [head] if head else bundled_heads():
            found = load_head(name)  # refuses a file whose weights are not those that were saved
            print(f"{found.name:<32}ok  sha256 {found.sha256}")
        print("to recompute a folding error:  aesthetic-filter heads verify CHECKPOINT")
        return
    published = read_checkpoint(checkpoint)
    candidates = (
        [load_head(head)]
        if head
        else [
            h
            for h in map(load_head, bundled_heads())
            if h.provenance["checkpoint_sha256"] == published.sha256
        ]
    )
    if not candidates:
        raise UsageError(f"{checkpoint}: no bundled head was made from it; name one with --head")
    chosen = candidates[0]
    error = folding_error(chosen, published, rows=rows)
    scale = max(abs(published.input_scale), 1.0)
    good = error <= 2e-5 * scale
    print(
        f"{chosen.name}: largest difference from {checkpoint.name}, layer by layer in float32, "
        f"over {rows:,} unit vectors: {error:.1e}  {'ok' if good else 'TOO LARGE'}"
    )
    if not good:
        raise typer.Exit(1)
