"""What every command shares: the application, how errors end, and options with one meaning."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from aesthetic_filter.errors import AestheticFilterError

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
Source = Annotated[str | None, typer.Option(help="Where the images are now, if they were moved.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.")]


def warn_if_incomplete(scores: Path) -> None:
    """Say of scores whose run did not end that there is more to come."""
    from aesthetic_filter.run_folder import read_run_file

    status = (read_run_file(scores) or {}).get("status", "complete")
    if status != "complete":
        print(
            f"aesthetic-filter: {scores} is not complete; "
            "the same `aesthetic-filter score` goes on with it",
            file=sys.stderr,
        )


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
