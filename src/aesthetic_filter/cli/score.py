"""``score``."""

from __future__ import annotations

import gc
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from aesthetic_filter.cli.app import (
    INTERRUPTED,
    Device,
    HeadName,
    ModelDir,
    Quiet,
    app,
    command,
    fail,
    warn_if_incomplete,
)
from aesthetic_filter.cli.progress import rate, show_progress

if TYPE_CHECKING:
    from aesthetic_filter.progress import Progress

BROKEN_SHARDS = 3


@command(app)
def score(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A folder, file, glob or URI of images, WebDataset tars, Parquet with images, "
            "or .npy or Parquet CLIP ViT-L/14 embeddings; or a scores folder made from images.",
        ),
    ],
    out: Annotated[str, typer.Option("--out", "-o", metavar="FOLDER", help="The scores folder.")],
    head: HeadName = None,
    model_dir: ModelDir = None,
    format_: Annotated[
        str | None, typer.Option("--format", help="The source's format, if it cannot be told.")
    ] = None,
    image_column: Annotated[
        str | None, typer.Option(help="The column of images, or of their paths.")
    ] = None,
    embedding_column: Annotated[
        str | None, typer.Option(help="The embedding column, if it has no usual name.")
    ] = None,
    id_column: Annotated[
        str | None, typer.Option(help="The id column, if it has no usual name.")
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Other columns to carry through; default: all."),
    ] = None,
    allow_foreign: Annotated[
        bool,
        typer.Option("--allow-foreign", help="Score vectors that look like another encoder's."),
    ] = False,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Record a broken shard and go on.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the scores that lie in --out.")
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Shards worked on at once; default: the processors, for images 2."
        ),
    ] = None,
    device: Device = "auto",
    precision: Annotated[
        str,
        typer.Option(help="For images: auto, float32 (the reference), bfloat16, or float16."),
    ] = "auto",
    weights: Annotated[
        str | None,
        typer.Option(
            help="The encoder's, if not OpenAI's CLIP ViT-L/14: a .safetensors file, or hf://…"
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images embedded at once; default: by the device.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="That decode images; default: the processors.")
    ] = None,
    decode: Annotated[
        str,
        typer.Option(
            help="exact: bit for bit CLIP's preprocessing; fast: large JPEGs are downscaled by "
            "their decoder."
        ),
    ] = "exact",
    ignore_exif: Annotated[
        bool,
        typer.Option("--ignore-exif", help="Do not turn photographs upright, as older scripts."),
    ] = False,
    max_pixels: Annotated[
        int | None, typer.Option(min=1, help="Refuse larger images (decompression bombs).")
    ] = None,
    allow_truncated: Annotated[
        bool, typer.Option("--allow-truncated", help="Score what is there of truncated images.")
    ] = False,
    backend: Annotated[
        str, typer.Option(help="local: this machine; ray: a Ray cluster.")
    ] = "local",
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="The Ray cluster's; default: $RAY_ADDRESS, else a Ray on this machine.",
        ),
    ] = None,
    gpus_per_worker: Annotated[
        float | None,
        typer.Option(
            min=0, help="On Ray, of each worker that embeds; default: 0.25, if there are GPUs."
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Score images, or stored embeddings; interrupted, the same command again goes on."""
    from aesthetic_filter.clip.options import ImageOptions

    images = ImageOptions(
        device=device,
        precision=precision,
        weights=weights,
        batch_size=batch_size,
        decode=decode,
        exif=not ignore_exif,
        max_pixels=max_pixels,
        allow_truncated=allow_truncated,
        threads=threads,
    )
    broken = run_score(
        source,
        out,
        quiet=quiet,
        head=head,
        model_dir=model_dir,
        format=format_,
        image_column=image_column,
        embedding_column=embedding_column,
        id_column=id_column,
        columns=None if columns is None else columns.split(","),
        images=images,
        allow_foreign=allow_foreign,
        keep_going=keep_going,
        overwrite=overwrite,
        workers=workers,
        backend=backend,
        ray_address=ray_address,
        num_gpus_per_worker=gpus_per_worker,
    )
    if "://" not in source:
        warn_if_incomplete(Path(source).expanduser())
    if broken:
        fail_for(broken)
    gc.freeze()  # the process ends here: do not first search its memory for garbage, 0.2 s


def run_score(
    source: str, out: str, *, quiet: bool, hint: bool = True, **options: Any
) -> dict[str, str]:
    """Score with progress and a summary; returns the broken shards and what is wrong with them."""
    from aesthetic_filter.pipeline import score as run

    started = time.monotonic()
    last: list[Progress] = []
    try:
        with show_progress(quiet) as show:

            def on_progress(progress: Progress) -> None:
                last[:] = [progress]
                show(progress)

            run(source, out, on_progress=on_progress, **options)
    except KeyboardInterrupt:
        done = ""
        if last:
            done = f"{last[0].finished:,} of {last[0].shards:,} shards are finished and whole; "
            if last[0].embedded:
                done += f"{last[0].embedded:,} images are embedded, once and for all; "
        fail(f"interrupted; {done}the same command goes on from there", INTERRUPTED)
    if not quiet:
        print(_score_result(out, last[0] if last else None, time.monotonic() - started))
        if hint:
            print(f"next: aesthetic-filter summary {out}")
    return last[0].broken if last else {}


def fail_for(broken: dict[str, str]) -> NoReturn:
    """Name the broken shards, and exit."""
    for shard, why in broken.items():
        print(f"aesthetic-filter: broken shard {shard}: {why}", file=sys.stderr)
    fail(
        f"{len(broken):,} shard(s) could not be read, or not to the end; their rows are missing",
        BROKEN_SHARDS,
    )


def _score_result(out: str, progress: Progress | None, seconds: float) -> str:
    from aesthetic_filter.run_folder import local_folder, read_run_file

    facts = read_run_file(local_folder(out)) or {}
    whole = facts["shards"] - len(facts["broken_shards"])
    lines = [
        f"{out}: {facts['rows']:,} rows in {whole:,} shard{'' if whole == 1 else 's'}",
        f"  scored   {facts['scored']:>14,}",
        f"  failed   {facts['failed']:>14,}",
    ]
    if facts["foreign"]:
        lines.append(
            f"  foreign  {facts['foreign']:>14,}  scored, but unlike the head's embedding space"
        )
    if progress is None or progress.reused == progress.shards:
        lines.append("everything was scored already")
    else:
        again = f", {progress.reused:,} shards from before" if progress.reused else ""
        lines.append(f"{seconds:.1f} s, {rate(progress.rows, seconds)} rows/s{again}")
    return "\n".join(lines)
