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
    from aesthetic_filter.pipeline import Progress

BROKEN_SHARDS = 3
INTERRUPTED = 130

EPILOG = (
    "Exit codes: 0 done; 1 the run failed, finished parts are whole; 2 a wrong argument or path; "
    "3 finished, but broken shards were left behind (--keep-going); 4 the input is not what the "
    "head was trained on; 130 interrupted."
)

app = typer.Typer(
    name="aesthetic-filter",
    help="Find the beautiful images in a collection: score, filter and rank CLIP embeddings.",
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
            metavar="EMBEDDINGS",
            help="A folder, file, glob or URI of .npy or Parquet CLIP ViT-L/14 embeddings.",
        ),
    ],
    out: Annotated[str, typer.Option("--out", "-o", metavar="FOLDER", help="The scores folder.")],
    head: Annotated[
        str | None,
        typer.Option(help="A bundled head, a file, or hf://ORG/REPO/FILE@REVISION."),
    ] = None,
    model_dir: Annotated[
        Path | None, typer.Option(help="Where heads from the hub are kept.")
    ] = None,
    format_: Annotated[
        str | None, typer.Option("--format", help="The source's format, if it cannot be told.")
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
        int | None, typer.Option(min=1, help="Shards worked on at once; default: the processors.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.")] = False,
) -> None:
    """Score stored embeddings; interrupted, the same command again goes on."""
    from aesthetic_filter.pipeline import score as run

    started = time.monotonic()
    last: list[Progress] = []
    try:
        with show_progress(quiet) as show:

            def on_progress(progress: Progress) -> None:
                last[:] = [progress]
                show(progress)

            run(
                source,
                out,
                head=head,
                model_dir=model_dir,
                format=format_,
                embedding_column=embedding_column,
                id_column=id_column,
                columns=None if columns is None else columns.split(","),
                allow_foreign=allow_foreign,
                keep_going=keep_going,
                overwrite=overwrite,
                workers=workers,
                on_progress=on_progress,
            )
    except KeyboardInterrupt:
        done = (
            f"{last[0].finished:,} of {last[0].shards:,} shards are finished and whole; "
            if last
            else ""
        )
        fail(f"interrupted; {done}the same command goes on from there", INTERRUPTED)
    if not quiet:
        print(_score_result(out, last[0] if last else None, time.monotonic() - started))
    broken = last[0].broken if last else {}
    if broken:
        for shard, why in broken.items():
            print(f"aesthetic-filter: broken shard {shard}: {why}", file=sys.stderr)
        fail(f"{len(broken):,} shard(s) could not be read; their rows are missing", BROKEN_SHARDS)
    gc.freeze()  # the process ends here: do not first search its memory for garbage, 0.2 s


def _score_result(out: str, progress: Progress | None, seconds: float) -> str:
    from aesthetic_filter.run_folder import local_folder, read_run_file

    facts = read_run_file(local_folder(out)) or {}
    whole = facts["shards"] - len(facts["broken_shards"])
    lines = [
        f"{out}: {facts['rows']:,} rows in {whole:,} shards",
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
        lines.append(f"{seconds:.1f} s, {progress.rows / seconds:,.0f} rows/s{again}")
    lines.append(f"next: aesthetic-filter summary {out}")
    return "\n".join(lines)


def _filter(
    scores: ScoresPath,
    out: Annotated[
        str, typer.Option("--out", "-o", metavar="FOLDER", help="Where the kept rows go.")
    ],
    per: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="--top and --sample hold within each value."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of --sample.")] = 0,
    as_: Annotated[
        str, typer.Option("--as", help="parquet, csv, jsonl, or ids (text, one a line).")
    ] = "parquet",
    with_dropped: Annotated[
        bool,
        typer.Option(
            "--with-dropped", help="Also write the dropped rows, with why, and the failed."
        ),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No summary.")] = False,
    **rules: str | None,
) -> None:
    """Keep rows by rules; rules combine, and nothing is scored again."""
    from aesthetic_filter.scores import open_scores

    modifiers = Modifiers(per=per, seed=seed)
    chosen = [
        option.build(text, modifiers)
        for option in options()
        if (text := rules[option.parameter]) is not None
    ]
    if per is not None and not any(getattr(rule, "per", None) for rule in chosen):
        raise UsageError("--per goes with --top or --sample")
    opened = open_scores(scores)
    selection = opened.select(*chosen)
    written = selection.write(out, as_=as_, with_dropped=with_dropped)
    if not quiet:
        print(f"{scores}\n{selection.summary()}\nwritten to {written}")
    if selection.counts.kept in (0, selection.counts.rows) and selection.counts.rows:
        what = "nothing" if selection.counts.kept == 0 else "everything"
        print(
            f"aesthetic-filter: these rules keep {what}; "
            f"`aesthetic-filter summary {scores}` shows what each threshold would keep",
            file=sys.stderr,
        )
    _warn_if_incomplete(scores)


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
    model_dir: Annotated[
        Path | None, typer.Option(help="Where heads from the hub are kept.")
    ] = None,
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


@contextmanager
def show_progress(quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """A progress bar on a terminal, a plain line now and then elsewhere, or nothing."""
    if quiet:
        yield lambda _: None
    elif sys.stderr.isatty():
        with _bar() as show:
            yield show
    else:
        yield _Lines()


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
            f"{progress.rows / elapsed:,.0f} rows/s{left}",
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
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, shards="", rows="")

        def show(progress: Progress) -> None:
            nonlocal shown
            now = time.monotonic()
            if now - shown < 0.1:
                return
            shown = now
            rate = progress.rows / max(now - started, 1e-3)
            bar.update(
                task,
                total=progress.total_bytes,
                completed=progress.bytes,
                shards=f"{progress.finished:,}/{progress.shards:,} shards",
                rows=f"{progress.rows:,} rows, {rate:,.0f}/s",
            )

        yield show
