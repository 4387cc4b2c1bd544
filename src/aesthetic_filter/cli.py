"""The command line. The only module that prints or exits.

Results go to standard output, everything else to standard error. Everything heavy is imported
inside the commands, so that help and completion answer at once.
"""

from __future__ import annotations

import functools
import gc
import inspect
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from aesthetic_filter.errors import AestheticFilterError, UsageError
from aesthetic_filter.selection.rule import Modifiers, options

if TYPE_CHECKING:
    from aesthetic_filter.calibrate import Target
    from aesthetic_filter.progress import Progress

BROKEN_SHARDS = 3
INTERRUPTED = 130

EPILOG = (
    "Exit codes: 0 done; 1 the run failed, finished parts are whole; 2 a wrong argument or path; "
    "3 finished, but some shards could not be read, or not to their end; 4 the input is not what "
    "the head was trained on; 130 interrupted."
)

app = typer.Typer(
    name="aesthetic-filter",
    help="Find the beautiful images in a collection: score, filter and rank images or embeddings.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
heads_app = typer.Typer(
    help="The aesthetic heads: list, show, convert, verify.", no_args_is_help=True
)
app.add_typer(heads_app, name="heads")
models_app = typer.Typer(
    help="The CLIP encoder's weights, for images: pull, verify.", no_args_is_help=True
)
app.add_typer(models_app, name="models")


def main() -> None:
    """Run the command line."""
    try:
        app()
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def command(
    of: typer.Typer, name: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command; its errors become a short message and an exit code."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            try:
                function(*args, **kwargs)
            except AestheticFilterError as error:
                fail(str(error), error.exit_code)
            except KeyboardInterrupt:
                fail("interrupted", INTERRUPTED)

        return of.command(name)(run)

    return register


def fail(message: str, code: int) -> NoReturn:
    """Print one error and exit."""
    print(f"aesthetic-filter: {message}", file=sys.stderr)
    raise typer.Exit(code)


ScoresPath = Annotated[Path, typer.Argument(metavar="SCORES", help="A folder made by `score`.")]
HeadName = Annotated[
    str | None, typer.Option(help="A bundled head, a file, or hf://ORG/REPO/FILE@REVISION.")
]
ModelDir = Annotated[
    Path | None,
    typer.Option(
        help="Where weights from the hub are kept; default: $AESTHETIC_FILTER_MODEL_DIR, or the "
        "hub's own cache."
    ),
]
Device = Annotated[
    str, typer.Option(help="For images: auto, cpu, cuda (all of them), cuda:1, or mps.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(version("aesthetic-filter"))
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


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
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.")] = False,
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
    broken = _run_score(
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
        _warn_if_incomplete(Path(source).expanduser())
    if broken:
        _fail_for(broken)
    gc.freeze()  # the process ends here: do not first search its memory for garbage, 0.2 s


def _run_score(
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


def _fail_for(broken: dict[str, str]) -> NoReturn:
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
        lines.append(f"{seconds:.1f} s, {_rate(progress.rows, seconds)} rows/s{again}")
    return "\n".join(lines)


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
    from aesthetic_filter.scores import is_scores, open_scores
    from aesthetic_filter.selection.engine import check_selection
    from aesthetic_filter.selection.images import check_source_for

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
        broken = _run_score(
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
        _fail_for(broken)
    _warn_if_incomplete(Path(scores))


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
    _warn_if_incomplete(scores)


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


def _warn_if_incomplete(scores: Path) -> None:
    from aesthetic_filter.run_folder import read_run_file

    status = (read_run_file(scores) or {}).get("status", "complete")
    if status != "complete":
        print(
            f"aesthetic-filter: {scores} is not complete; "
            "the same `aesthetic-filter score` goes on with it",
            file=sys.stderr,
        )


Source = Annotated[str | None, typer.Option(help="Where the images are now, if they were moved.")]
LabelsPath = Annotated[
    Path, typer.Argument(metavar="LABELS", help="A CSV file: image_id, and label or rating.")
]
ScoresOption = Annotated[
    Path, typer.Option("--scores", metavar="FOLDER", help="Of the whole data set, made by `score`.")
]
KeepFrom = Annotated[
    float | None,
    typer.Option(metavar="RATING", help="Ratings: from which one on an image is to be kept."),
]
IdColumn = Annotated[
    str | None, typer.Option(help="The label file's id column, if it has no usual name.")
]
LabelColumn = Annotated[str | None, typer.Option(help="Its column of labels or ratings, likewise.")]
Precision = Annotated[
    float | None,
    typer.Option(metavar="P", help="Of the images kept, so many are ones people would keep: 0.9."),
]
Recall = Annotated[
    float | None,
    typer.Option(metavar="R", help="Of the images people would keep, so many are kept: 0.9."),
]
KeptShare = Annotated[
    float | None, typer.Option(metavar="SHARE", help="So much of all is kept: 0.1.")
]


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
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.")] = False,
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
    with _show_thumbnails(quiet) as show:
        path, problem = make(open_scores(scores), out, options, on_progress=show)
    if problem:
        print(f"aesthetic-filter: {problem}", file=sys.stderr)
    if not quiet:
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB; open it in a browser")
    _warn_if_incomplete(scores)


@command(app)
def review(
    scores: ScoresPath,
    labels: Annotated[
        Path, typer.Option(metavar="FILE", help="Where labels are saved, and gone on with.")
    ] = Path("labels.csv"),
    sample: Annotated[int, typer.Option(min=1, help="How many images to judge.")] = 300,
    target_precision: Precision = None,
    target_recall: Recall = None,
    target_kept: KeptShare = None,
    reviewer: Annotated[
        str | None, typer.Option(help="Your name; default: your login. The page can change it.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8710,
    seed: Annotated[int, typer.Option(help="Of the images that are drawn.")] = 0,
    source: Source = None,
    no_open: Annotated[
        bool, typer.Option("--no-open", help="Print the address, open no browser.")
    ] = False,
) -> None:
    """Open a page to say of a sample of images: keep or drop. Ctrl-C ends it; labels stay."""
    from aesthetic_filter.pictures import Pictures
    from aesthetic_filter.review.app import serve
    from aesthetic_filter.review.session import DEFAULT_TARGET, Session
    from aesthetic_filter.scores import open_scores
    from aesthetic_filter.table import printable

    target = _target(target_precision, target_recall, target_kept) or DEFAULT_TARGET
    opened = open_scores(scores)
    _warn_if_incomplete(scores)
    pictures = Pictures(opened, source)
    session = Session(opened, labels, size=sample, seed=seed, target=target)
    try:
        serve(
            session,
            pictures,
            port=port,
            reviewer=reviewer or _login(),
            title=f"Review of {printable(scores)}",
            on_ready=functools.partial(_say_where, labels, not no_open),
        )
    except KeyboardInterrupt:  # how a review ends
        pass
    finally:
        session.close()
    judged = len(session.labels())
    print(f"{labels}: {judged:,} image{'' if judged == 1 else 's'} judged")
    if judged:
        asked = f"--target-{target.measure} {target.value:g}"
        print(f"next: aesthetic-filter calibrate {labels} --scores {scores} {asked}")


def _say_where(labels: Path, open_it: bool, address: str) -> None:
    print(address, flush=True)
    print(
        f"aesthetic-filter: labels go to {labels}; Ctrl-C ends the review, "
        "the same command goes on with it",
        file=sys.stderr,
        flush=True,
    )
    if open_it:
        import webbrowser

        webbrowser.open(address)


def _login() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):  # no such user, as in a container
        return "reviewer"


def _target(precision: float | None, recall: float | None, kept: float | None) -> Target | None:
    from aesthetic_filter.calibrate import Target

    given = [
        Target(measure, value)
        for measure, value in (("precision", precision), ("recall", recall), ("kept", kept))
        if value is not None
    ]
    if len(given) > 1:
        raise UsageError("give one target: --target-precision, --target-recall or --target-kept")
    return given[0] if given else None


@command(app)
def calibrate(
    labels: LabelsPath,
    scores: ScoresOption,
    target_precision: Precision = None,
    target_recall: Recall = None,
    target_kept: KeptShare = None,
    keep_from: KeepFrom = None,
    id_column: IdColumn = None,
    label_column: LabelColumn = None,
    as_json: AsJson = False,
) -> None:
    """Find the threshold for a target from labels, with confidence intervals."""
    from aesthetic_filter.calibrate import calibrate as run
    from aesthetic_filter.labels import read_labels
    from aesthetic_filter.scores import open_scores

    target = _target(target_precision, target_recall, target_kept)
    read = read_labels(labels, keep_from=keep_from, id_column=id_column, label_column=label_column)
    found = run(read, open_scores(scores), target)
    if as_json:
        print(json.dumps(found.as_dict(), indent=2, ensure_ascii=False))
        return
    print(found)
    if read.agreement is not None:
        print(f"reviewers agree {read.agreement}")
    chosen = found.recommendation
    if chosen is not None and chosen.threshold is not None:
        print(f"next: aesthetic-filter filter {scores} --out kept --min-score {chosen.threshold:g}")
    _warn_if_incomplete(scores)


@command(app)
def train(
    labels: LabelsPath,
    scores: ScoresOption,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The head file.")],
    head: Annotated[
        str | None,
        typer.Option(help="The head to start from and compare with; default: the reference head."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The new head's; default: the file's.")] = None,
    folds: Annotated[int, typer.Option(min=3, help="Of the cross-validation.")] = 5,
    seed: Annotated[int, typer.Option(help="Of the folds.")] = 0,
    keep_from: KeepFrom = None,
    id_column: IdColumn = None,
    label_column: LabelColumn = None,
    licence: Annotated[str, typer.Option(help="Of the labels, for the head's provenance.")] = "",
    model_dir: ModelDir = None,
) -> None:
    """Train a head of your own from labels or ratings, and measure it on held-out images."""
    from aesthetic_filter.heads import load_head, save_head
    from aesthetic_filter.labels import read_labels
    from aesthetic_filter.own_head import train_head
    from aesthetic_filter.scores import open_scores

    if out.suffix != ".safetensors":
        raise UsageError(f"{out}: a head file ends in .safetensors")
    if out.is_dir() or not os.access(out.parent, os.W_OK):  # rather before training than after
        raise UsageError(f"{out}: cannot be written: no file can be made there")
    read = read_labels(labels, keep_from=keep_from, id_column=id_column, label_column=label_column)
    trained = train_head(
        read,
        open_scores(scores),
        name=name or out.stem,
        reference=load_head(head, model_dir=model_dir),
        folds=folds,
        seed=seed,
        labels_path=labels,
        licence=licence,
    )
    try:
        save_head(trained.head, out)
    except OSError as error:
        raise UsageError(f"{out}: cannot be written: {error.strerror}") from None
    print(trained)
    print(f"written to {out}")
    print(f"next: aesthetic-filter score SOURCE --head {out} --out NEW_SCORES")
    _warn_if_incomplete(scores)


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
    import shlex

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
        with _show_thumbnails(as_json) as show:
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
        _warn_if_incomplete(scores)


@contextmanager
def _show_thumbnails(quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar while thumbnails are made, on a terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("images", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


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


@contextmanager
def show_progress(quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """A progress bar on a terminal, a plain line now and then elsewhere, or nothing."""
    if quiet:
        yield _with_notes(lambda _: None)
    elif sys.stderr.isatty():
        with _bar() as show:
            yield show
    else:
        yield _with_notes(_Lines())


def _with_notes(
    show: Callable[[Progress], None], say: Callable[[str], None] | None = None
) -> Callable[[Progress], None]:
    """Also print what else a person should know, each line once."""
    said = 0

    def report(progress: Progress) -> None:
        nonlocal said
        for note in progress.notes[said:]:
            (say or (lambda line: print(line, file=sys.stderr)))(f"aesthetic-filter: {note}")
        said = len(progress.notes)
        show(progress)

    return report


def _rate(rows: int, seconds: float) -> str:
    rate = rows / max(seconds, 1e-3)
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


class _Lines:
    """A line every ten seconds."""

    EVERY = 10.0

    def __init__(self) -> None:
        self._started = self._printed = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._printed < self.EVERY:
            return
        self._printed = now
        elapsed = now - self._started
        share = progress.bytes / max(progress.total_bytes, 1)
        left = f", about {elapsed / share - elapsed:,.0f} s left" if share > 0.01 else ""
        print(
            f"{progress.finished:,} of {progress.shards:,} shards, {progress.rows:,} rows, "
            f"{_rate(progress.rows, elapsed)} rows/s{left}",
            file=sys.stderr,
            flush=True,
        )


@contextmanager
def _bar() -> Iterator[Callable[[Progress], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[shards]}  {task.fields[rows]}"),
        TimeRemainingColumn(),
    )
    started, shown = time.monotonic(), 0.0
    bar = Bar(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task("", total=None, shards="", rows="")

    def show(progress: Progress) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown < 0.1:
            return
        shown = now
        bar.start()  # not before there is something to show: a download has a bar of its own
        bar.update(
            task,
            total=progress.total_bytes,
            completed=progress.bytes,
            shards=f"{progress.finished:,}/{progress.shards:,} shards",
            rows=f"{progress.rows:,} rows, {_rate(progress.rows, now - started)}/s",
        )

    try:
        yield _with_notes(show, lambda line: bar.console.print(line, markup=False))
    finally:
        bar.stop()
