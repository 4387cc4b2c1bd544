"""``compare``."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from aesthetic_filter.cli.app import AsJson, Source, app, command, warn_if_incomplete
from aesthetic_filter.cli.progress import show_thumbnails


@command(app)
def compare(
    a: Annotated[Path, typer.Argument(metavar="SCORES_A", help="A folder made by `score`.")],
    b: Annotated[Path, typer.Argument(metavar="SCORES_B", help="Another, of the same data set.")],
    threshold: Annotated[
        float | None, typer.Option(help="On the first; default: what keeps its best tenth.")
    ] = None,
    threshold_b: Annotated[
        float | None,
        typer.Option(
            help="On the second; default: the same for the same head, else what keeps as many."
        ),
    ] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Images in each list.")] = 10,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Also make a page of it.")
    ] = None,
    no_images: Annotated[bool, typer.Option("--no-images", help="No images in it.")] = False,
    source: Source = None,
    as_json: AsJson = False,
) -> None:
    """Compare two sets of scores: rank correlation, who changes sides, the largest differences."""
    from aesthetic_filter.compare import compare as run
    from aesthetic_filter.compare import comparison_page
    from aesthetic_filter.scores import open_scores

    first, second = open_scores(a), open_scores(b)
    found = run(first, second, threshold=threshold, threshold_b=threshold_b, n=n)
    if out is not None:
        words = ["aesthetic-filter", "compare", str(a), str(b), "--out", str(out), "-n", str(n)]
        words += ["--threshold", repr(found.thresholds[0])]
        words += ["--threshold-b", repr(found.thresholds[1])]
        words += ["--no-images"] if no_images else []
        words += ["--source", source] if source else []
        with show_thumbnails(as_json) as show:
            problem = comparison_page(
                found,
                first,
                out,
                images=not no_images,
                source=source,
                command=shlex.join(words),
                on_progress=show,
            )
        if problem:
            print(f"aesthetic-filter: {problem}", file=sys.stderr)
    print(json.dumps(found.as_dict(), indent=2, ensure_ascii=False) if as_json else str(found))
    if out is not None:
        print(f"written to {out}", file=sys.stderr if as_json else sys.stdout)
    for scores in (a, b):
        warn_if_incomplete(scores)
