"""``filter``, ``rank`` and ``summary``: what to do with scores that are there."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from aesthetic_filter.cli.app import (
    AsJson,
    Device,
    HeadName,
    ModelDir,
    ScoresPath,
    app,
    command,
    warn_if_incomplete,
)
from aesthetic_filter.cli.score import fail_for, run_score
from aesthetic_filter.errors import UsageError
from aesthetic_filter.selection.rule import Modifiers, options


def _filter(
    scores: Annotated[
        str,
        typer.Argument(
            metavar="SCORES", help="A folder made by `score`; or a source, which is scored first."
        ),
    ],
    out: Annotated[
        str, typer.Option("--out", "-o", metavar="FOLDER", help="Where what is kept goes.")
    ],
    per: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="--top and --sample hold within each value."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of --sample.")] = 0,
    as_: Annotated[
        str,
        typer.Option(
            "--as",
            help="The rows: index (Parquet), csv, jsonl, ids. The images: webdataset, folder, "
            "parquet.",
        ),
    ] = "index",
    shard_size: Annotated[
        int, typer.Option(min=1, help="Images in a tar or Parquet file.")
    ] = 10_000,
    link: Annotated[
        str | None,
        typer.Option(help="hard or symlink: link images into the folder, do not copy them."),
    ] = None,
    score_in: Annotated[
        str | None, typer.Option(help="json: put the score into each sample's json too.")
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="Where the images are now, if they were moved.")
    ] = None,
    with_dropped: Annotated[
        bool,
        typer.Option(
            "--with-dropped", help="Also write the dropped rows, with why, and the failed."
        ),
    ] = False,
    scores_folder: Annotated[
        str | None,
        typer.Option(
            "--scores",
            metavar="FOLDER",
            help="Where the scores of a source that is scored first are kept; default: scores "
            "beside --out.",
        ),
    ] = None,
    head: HeadName = None,
    model_dir: ModelDir = None,
    device: Device = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No summary.")] = False,
    **rules: str | None,
) -> None:
    """Keep rows or images by rules; rules combine, and nothing is scored again."""
    from aesthetic_filter.formats import ImageOutput
    from aesthetic_filter.run_folder import local_folder
    from aesthetic_filter.scores import is_scores, open_scores
    from aesthetic_filter.selection.engine import check_selection
    from aesthetic_filter.selection.images import check_source_for
    from aesthetic_filter.selection.output import check_folder

    modifiers = Modifiers(per=per, seed=seed)
    chosen = [
        option.build(text, modifiers)
        for option in options()
        if (text := rules[option.parameter]) is not None
    ]
    if per is not None and not any(getattr(rule, "per", None) for rule in chosen):
        raise UsageError("--per goes with --top or --sample")
    broken: dict[str, str] = {}
    output = ImageOutput(shard_size, link, score_in)
    check_selection(chosen, as_, output)  # before hours of embedding
    if not is_scores(scores):
        from aesthetic_filter.clip.options import ImageOptions

        check_source_for(scores, as_)  # likewise
        folder = scores_folder or str(Path(out).expanduser().parent / "scores")
        check_folder(local_folder(out), apart_from=local_folder(folder))
        broken = run_score(
            scores,
            folder,
            quiet=quiet,
            hint=False,
            head=head,
            model_dir=model_dir,
            images=ImageOptions(device=device),
            keep_going=True,
        )
        scores = folder
    elif scores_folder or head or device != "auto":
        raise UsageError(
            f"{scores} is scored already: --scores, --head and --device go with a source that is "
            "not; to score again with another head, use `aesthetic-filter score`"
        )
    opened = open_scores(scores)
    selection = opened.select(*chosen)
    written = selection.write(
        out, as_=as_, with_dropped=with_dropped, source=source, **vars(output)
    )
    if not quiet:
        print(f"{scores}\n{selection.summary()}\nwritten to {written}")
    if selection.counts.kept in (0, selection.counts.rows) and selection.counts.rows:
        what = "nothing" if selection.counts.kept == 0 else "everything"
        print(
            f"aesthetic-filter: these rules keep {what}; "
            f"`aesthetic-filter summary {scores}` shows what each threshold would keep",
            file=sys.stderr,
        )
    if broken:
        fail_for(broken)
    warn_if_incomplete(Path(scores))


def _with_rule_options(function: Callable[..., None]) -> Callable[..., None]:
    """Give the command one option for each selection rule there is."""
    signature = inspect.signature(function, eval_str=True)
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    for option in options():
        annotation = Annotated[
            str | None, typer.Option(option.flag, metavar=option.metavar, help=option.help)
        ]
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters.append(
            inspect.Parameter(option.parameter, kind, default=None, annotation=annotation)
        )

    def run(**given: Any) -> None:
        function(**given)

    run.__doc__ = function.__doc__
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


command(app, "filter")(_with_rule_options(_filter))


@command(app)
def rank(
    scores: ScoresPath,
    n: Annotated[int, typer.Option("-n", min=1, help="How many.")] = 20,
    worst: Annotated[bool, typer.Option("--worst", help="Worst first.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the best rows, best first."""
    from aesthetic_filter.scores import open_scores

    rows = open_scores(scores).rank(n, worst=worst).to_pylist()
    if as_json:
        from aesthetic_filter.formats import jsonl

        print(jsonl.as_json(rows, indent=2))
    else:
        print(_ranking(rows))
    warn_if_incomplete(scores)


def _ranking(rows: list[dict[str, Any]]) -> str:
    from aesthetic_filter.table import printable

    shown = [c for c in ("image_path", "url", "caption") if rows and rows[0].get(c)][:1]
    lines = [f"{'rank':>5}  {'score':>7}  image_id"]
    for place, row in enumerate(rows, 1):
        named = printable(row["image_id"])
        extra = "".join(f"  {printable(row[c])[:80]}" for c in shown if row[c] != row["image_id"])
        lines.append(f"{place:>5}  {row['aesthetic_score']:>7.4f}  {named}{extra}")
    return "\n".join(lines)


@command(app)
def summary(scores: ScoresPath, as_json: AsJson = False) -> None:
    """Counts, percentiles, what each threshold would keep, failures by reason, provenance."""
    from aesthetic_filter.scores import open_scores

    found = open_scores(scores).summary()
    print(json.dumps(vars(found), indent=2, ensure_ascii=False) if as_json else str(found))
