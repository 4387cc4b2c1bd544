"""``report``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from aesthetic_filter.cli.app import (
    Quiet,
    ScoresPath,
    Source,
    app,
    command,
    warn_if_incomplete,
)
from aesthetic_filter.cli.progress import show_thumbnails


@command(app)
def report(
    scores: ScoresPath,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The HTML file.")],
    threshold: Annotated[
        float | None, typer.Option(help="Where the slider starts; default: the best tenth.")
    ] = None,
    by: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN", help="Break down by it; again for more. Default: all fit."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the images that are drawn.")] = 0,
    no_images: Annotated[
        bool, typer.Option("--no-images", help="A table of rows instead.")
    ] = False,
    per_band: Annotated[int, typer.Option(min=1, help="Images from each band of scores.")] = 12,
    max_mb: Annotated[
        float, typer.Option(min=1.5, help="The page's size: thumbnails shrink until they fit.")
    ] = 5.0,
    source: Source = None,
    quiet: Quiet = False,
) -> None:
    """Make one self-contained page: charts, a threshold to move, images by score, provenance."""
    from aesthetic_filter.report import Options
    from aesthetic_filter.report import report as make
    from aesthetic_filter.scores import open_scores

    options = Options(
        threshold=threshold,
        by=tuple(by or ()),
        seed=seed,
        images=not no_images,
        source=source,
        max_bytes=int(max_mb * 1e6),
        per_band=per_band,
    )
    with show_thumbnails(quiet) as show:
        path, problem = make(open_scores(scores), out, options, on_progress=show)
    if problem:
        print(f"aesthetic-filter: {problem}", file=sys.stderr)
    if not quiet:
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB; open it in a browser")
    warn_if_incomplete(scores)
