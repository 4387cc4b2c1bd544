"""``review``, ``calibrate`` and ``train``: what people say of images, and what follows from it."""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aesthetic_filter.cli.app import (
    AsJson,
    ModelDir,
    ScoresPath,
    Source,
    app,
    command,
    warn_if_incomplete,
)
from aesthetic_filter.errors import UsageError

if TYPE_CHECKING:
    from aesthetic_filter.calibrate import Target

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
    warn_if_incomplete(scores)
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
    warn_if_incomplete(scores)


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
    warn_if_incomplete(scores)


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
