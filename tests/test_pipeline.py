"""Pipelines on this machine: what fits, what becomes of every row, what is written."""

from __future__ import annotations

import ast
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import compute

import aesthetic_filter as af
from aesthetic_filter.arrangement import arrange
from aesthetic_filter.errors import PipelineError, StageError, UsageError
from aesthetic_filter.table import vectors_column
from images import EXACT, WITHIN, affine, by_id, jpeg, members, sha256, write_files, write_tar

Make = Callable[..., np.ndarray]


@pytest.fixture
def vectors(make_embeddings: Make) -> np.ndarray:
    return make_embeddings(900)


@pytest.fixture
def source(tmp_path: Path, vectors: np.ndarray) -> Path:
    """Three .npy shards; rows 10 and 400 hold no embedding."""
    vectors[10] = 0
    vectors[400] = np.nan
    folder = tmp_path / "embeddings"
    folder.mkdir()
    for number, part in enumerate(np.split(vectors, 3)):
        np.save(folder / f"{number}.npy", part)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    files = {f"{number:03d}.jpg": jpeg(number) for number in range(40)}
    files["broken.jpg"] = b"no image"
    return write_files(tmp_path / "photos", files)


def scoring(threshold: float | None = None, **options: Any) -> af.ImageAestheticFilterStage:
    return af.ImageAestheticFilterStage(score_threshold=threshold, **options)


# What fits together.


class Plain:
    """A stage that asks for nothing."""

    def __call__(self, table: pa.Table) -> pa.Table:
        return table


class WantsCaption(Plain):
    needs = ("caption",)


class GivesCaption(Plain):
    gives = ("caption",)

    def __call__(self, table: pa.Table) -> pa.Table:
        return table.append_column("caption", pa.array(["a"] * table.num_rows))


class GivesEmbedding(Plain):
    """Somebody's own encoder: always the same vector."""

    needs = ("image",)
    gives = ("embedding",)

    def __call__(self, table: pa.Table) -> pa.Table:
        from aesthetic_filter.heads.head import reference_direction

        vectors = [reference_direction().tolist()] * table.num_rows
        kind = pa.list_(pa.float32(), 768)
        return table.append_column("embedding", pa.array(vectors, kind))


READER = af.ImageReaderStage("photos/*.jpg")
EMBEDDING = af.ImageEmbeddingStage()
FILTER = af.ImageAestheticFilterStage()


@pytest.mark.parametrize(
    ("stages", "problem"),
    [
        ([FILTER], "ImageAestheticFilterStage: stands first, where the source has to be"),
        ([READER, READER], "ImageReaderStage: a pipeline has one source"),
        (
            [READER, FILTER],
            r"ImageAestheticFilterStage: needs 'embedding', which no stage before it gives: put an "
            r"ImageEmbeddingStage before it \(so far: image_id, image\)",
        ),
        (
            [af.ImageReaderStage("vectors/*.npy"), EMBEDDING],
            "ImageEmbeddingStage: needs 'image', which no stage before it gives",
        ),
        ([READER, EMBEDDING, af.ImageWriterStage("out")], "ImageWriterStage: needs 'aesthetic_sc"),
        (
            [READER, EMBEDDING, FILTER, af.ImageWriterStage("out"), FILTER],
            "ImageAestheticFilterStage: nothing can follow ImageWriterStage",
        ),
        ([READER, EMBEDDING, FILTER, FILTER], "ImageAestheticFilterStage: there is one already"),
        ([READER, EMBEDDING, EMBEDDING], "ImageEmbeddingStage: there is one already"),
        ([READER, WantsCaption()], "WantsCaption: needs 'caption', which no stage before it gives"),
        ([READER, 3], "int: cannot be called with a table"),
        ([READER, Plain], "Plain: is a class; give an object"),
    ],
)
def test_stages_that_do_not_fit_are_named(stages: list[Any], problem: str) -> None:
    with pytest.raises(PipelineError, match=problem):
        af.Pipeline(stages)


def test_stages_that_fit() -> None:
    af.Pipeline([READER, GivesCaption(), WantsCaption(), EMBEDDING, Plain(), FILTER, Plain()])
    af.Pipeline([READER, GivesEmbedding(), FILTER])
    af.Pipeline([af.ImageReaderStage("anything"), FILTER])  # only looking will tell
    af.Pipeline().add_stage(READER).add_stage(EMBEDDING).add_stage(FILTER)


@pytest.mark.parametrize("stages", [[], [READER], [READER, EMBEDDING]])
def test_a_pipeline_that_scores_nothing_is_refused(stages: list[Any]) -> None:
    with pytest.raises(PipelineError, match="a pipeline needs"):
        af.Pipeline(stages).run()


def test_what_only_looking_tells_is_told_before_anything_is_read(
    source: Path, photos: Path, tmp_path: Path
) -> None:
    reader = af.ImageReaderStage(source)
    with pytest.raises(PipelineError, match=r"has embeddings \(npy\).*leave it out"):
        af.Pipeline([reader, EMBEDDING, FILTER]).run(scores=tmp_path / "s")
    reader = af.ImageReaderStage(photos)
    with pytest.raises(PipelineError, match=r"has images \(folder\).*put an ImageEmbeddingStage"):
        af.Pipeline([reader, FILTER]).run(scores=tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_describe_shows_the_stages_with_their_resources() -> None:
    pipeline = af.Pipeline(
        [
            af.ImageReaderStage("s3://bucket/shards/*.tar"),
            af.ImageEmbeddingStage(model_inference_batch_size=256, num_gpus_per_worker=0.25),
            Plain(),
            af.ImageAestheticFilterStage(score_threshold=5.5),
            af.ImageWriterStage("curated/"),
        ],
        name="curation",
    )
    lines = [" ".join(line.split()) for line in pipeline.describe().splitlines()]
    assert lines == [
        "curation: 5 stages",
        "1 ImageReaderStage image_id, image s3://bucket/shards/*.tar",
        "2 ImageEmbeddingStage image -> embedding GPUs: 0.25 each batches of 256",
        "3 Plain processors",
        "4 ImageAestheticFilterStage embedding -> aesthetic_score processors score_threshold 5.5",
        "5 ImageWriterStage aesthetic_score curated/ (webdataset)",
    ]


def test_options_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UsageError, match="num_gpus_per_worker is a fraction"):
        af.ImageEmbeddingStage(num_gpus_per_worker=1.5)
    with pytest.raises(UsageError, match="num_gpus_per_worker is a fraction"):
        af.ImageAestheticFilterStage(num_gpus_per_worker=-1)
    with pytest.raises(UsageError, match="model_inference_batch_size is 1 or more"):
        af.ImageAestheticFilterStage(model_inference_batch_size=0)
    with pytest.raises(UsageError, match="score_threshold is a number"):
        af.ImageAestheticFilterStage(score_threshold=float("nan"))
    with pytest.raises(PipelineError, match="nothing is written as 'zip'"):
        af.ImageWriterStage("out", format="zip")
    with pytest.raises(PipelineError, match="link means nothing"):
        af.ImageWriterStage("out", link="hard")
    with pytest.raises(UsageError, match="there is no backend 'spark'; there are: local, ray"):
        af.Pipeline([READER, EMBEDDING, FILTER]).run(backend="spark")


# Running.


def test_from_embeddings_without_a_writer(source: Path, vectors: np.ndarray) -> None:
    with np.errstate(invalid="ignore"):
        expected = affine(vectors)
    threshold = float(np.float32(np.nanmedian(expected)))
    result = af.Pipeline([af.ImageReaderStage(source), scoring(threshold)]).run()
    good = np.isfinite(expected) & (np.linalg.norm(vectors.astype(float), axis=1) > 0)
    close = np.abs(expected - threshold) < WITHIN
    ids = [f"{row // 300}.npy#{row % 300}" for row in range(900)]
    kept = result.table().column("image_id").to_pylist()
    surely = [name for row, name in enumerate(ids) if good[row] and expected[row] > threshold]
    maybe = [name for row, name in enumerate(ids) if close[row]]
    assert [name for name in kept if name not in maybe] == [n for n in surely if n not in maybe]
    counts = result.counts
    assert (counts.rows, counts.failed) == (900, 2)
    assert counts.kept + sum(counts.dropped.values()) + counts.failed == counts.rows
    assert result.written is None
    assert len(result.scores) == 900  # what is dropped keeps its score


def test_scores_in_a_temporary_folder_go_with_the_last_that_uses_them(source: Path) -> None:
    result = af.Pipeline([af.ImageReaderStage(source), scoring()]).run()
    folder = result.scores.path
    selection = result.selection
    assert not result.scores_are_kept
    assert str(folder) not in result.summary()
    del result
    assert folder.is_dir()
    assert selection.counts.kept == 898
    del selection
    assert not folder.exists()


def test_a_threshold_is_exact(source: Path, tmp_path: Path) -> None:
    reader = af.ImageReaderStage(source)
    scores = tmp_path / "s"
    everything = af.Pipeline([reader, scoring()]).run(scores=scores).table()
    at = everything.column("aesthetic_score")[123].as_py()
    kept = af.Pipeline([reader, scoring(at)]).run(scores=scores).table()
    values = everything.column("aesthetic_score").to_numpy()
    assert kept.num_rows == np.count_nonzero(values >= np.float32(at))
    assert at in kept.column("aesthetic_score").to_pylist()


def test_another_threshold_scores_nothing_again(source: Path, tmp_path: Path) -> None:
    reader = af.ImageReaderStage(source)
    first = af.Pipeline([reader, scoring(4.0)]).run(scores=tmp_path / "s")
    times = [path.stat().st_mtime_ns for path in first.scores.files]
    second = af.Pipeline([reader, scoring(4.5)]).run(scores=tmp_path / "s")
    assert second.progress.rows == 0
    assert [path.stat().st_mtime_ns for path in second.scores.files] == times
    assert first.counts.kept > second.counts.kept > 0
    # And it is the folder that `score` makes.
    again: list[af.Progress] = []
    af.score(source, tmp_path / "s", on_progress=again.append)
    assert again[-1].reused == 3


def test_from_images_to_a_writer(photos: Path, tmp_path: Path, model_dir: Path) -> None:
    reader = af.ImageReaderStage(photos)
    embedding = af.ImageEmbeddingStage(model_dir, model_inference_batch_size=3, options=EXACT)
    scored = af.Pipeline([reader, embedding, scoring()]).run(scores=tmp_path / "all").table()
    ranked = sorted((row["aesthetic_score"], row["image_id"]) for row in scored.to_pylist())
    threshold, good = ranked[20][0], {name for _, name in ranked[20:]}
    writer = af.ImageWriterStage(tmp_path / "curated", shard_size=15)
    result = af.Pipeline([reader, embedding, scoring(threshold), writer]).run()
    assert result.counts.rows == 41
    assert result.counts.failed == 1
    assert result.counts.kept == len(good) == 20
    assert result.written == tmp_path / "curated"
    assert result.scores.path == tmp_path / "curated-scores"
    written = {}
    for tar in sorted((tmp_path / "curated").glob("*.tar")):
        written |= members(tar)
    images = {name: data for name, data in written.items() if name.endswith(".jpg")}
    assert {sha256(data) for data in images.values()} == {
        sha256((photos / name).read_bytes()) for name in good
    }
    assert len(list((tmp_path / "curated").glob("*.tar"))) == 2
    summary = result.summary()
    assert "written to" in summary
    assert "not an image that can be decoded: 1" in summary
    assert str(tmp_path / "curated-scores") in summary


def test_writers_of_rows(source: Path, tmp_path: Path) -> None:
    reader = af.ImageReaderStage(source)
    writer = af.ImageWriterStage(tmp_path / "kept", format="index", with_dropped=True)
    result = af.Pipeline([reader, scoring(4.5), writer]).run()
    counted = {
        name: pq.read_table(tmp_path / "kept" / f"{name}.parquet").num_rows
        for name in ("kept", "dropped", "failed")
    }
    assert counted == {
        "kept": result.counts.kept,
        "dropped": sum(result.counts.dropped.values()),
        "failed": 2,
    }
    assert sum(counted.values()) == 900
    only_scored = af.Pipeline([reader, scoring(None), af.ImageWriterStage(tmp_path / "b", "ids")])
    assert only_scored.run().counts.kept == 898
    assert len((tmp_path / "b" / "kept.txt").read_text().splitlines()) == 898


def test_images_are_not_written_from_embeddings(source: Path, tmp_path: Path) -> None:
    writer = af.ImageWriterStage(tmp_path / "kept")
    with pytest.raises(UsageError, match="there are no images to write"):
        af.Pipeline([af.ImageReaderStage(source), scoring(4.5), writer]).run()
    assert not (tmp_path / "kept-scores").exists()  # said before anything is scored


@pytest.mark.parametrize(
    ("scores", "kept"), [("o", "o/kept"), ("o/scores", "o"), ("o", "o"), ("s", "file/kept")]
)
def test_folders_in_each_other_s_way_are_refused_before_anything_is_scored(
    source: Path, tmp_path: Path, scores: str, kept: str
) -> None:
    (tmp_path / "file").touch()
    writer = af.ImageWriterStage(tmp_path / kept, "csv")
    with pytest.raises(UsageError, match=r"need folders apart|file: is a file"):
        af.Pipeline([af.ImageReaderStage(source), scoring(4.5), writer]).run(
            scores=tmp_path / scores
        )
    assert not list(tmp_path.rglob("*.npy.parquet"))


def test_a_folder_that_is_somebody_s_is_refused_before_anything_is_scored(
    source: Path, tmp_path: Path
) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "mine.txt").write_text("mine")
    writer = af.ImageWriterStage(tmp_path / "kept", "csv")
    with pytest.raises(UsageError, match=r"kept: holds other files \(mine.txt"):
        af.Pipeline([af.ImageReaderStage(source), scoring(4.5), writer]).run()
    assert not (tmp_path / "kept-scores").exists()


@pytest.mark.parametrize(("threshold", "what"), [(0.5, "everything"), (9.5, "nothing")])
def test_a_threshold_that_decides_nothing_says_so(
    source: Path, threshold: float, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    stage = af.ImageAestheticFilterStage(score_threshold=threshold)
    result = af.Pipeline([af.ImageReaderStage(source), stage]).run()
    said = f"score_threshold {threshold:g} keeps {what}"
    assert result.warning == said
    assert said in result.summary()
    assert "percentile        1%" in result.summary()
    assert "a threshold of        would keep" in result.summary()
    assert [r.levelname for r in caplog.records if said in r.getMessage()] == ["WARNING"]


def test_a_threshold_that_decides_something_says_nothing(
    source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = af.Pipeline([af.ImageReaderStage(source), scoring(4.5)]).run()
    assert result.warning == ""
    assert "would keep" not in result.summary()
    assert not caplog.records
    only = af.Pipeline([af.ImageReaderStage(source), scoring(None)]).run()
    assert only.warning == ""


def test_verbose_logs_each_drop_and_the_totals(
    source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aesthetic_filter")
    result = af.Pipeline([af.ImageReaderStage(source), scoring(4.5, verbose=True)]).run()
    lines = [record.getMessage() for record in caplog.records]
    dropped = sum(result.counts.dropped.values())
    assert len([line for line in lines if ": dropped: " in line]) == dropped
    assert "0.npy#10: failed: embedding is all zeros" in lines
    assert f"kept {result.counts.kept}, dropped {dropped}, failed 2" in lines


def test_a_broken_shard(source: Path, tmp_path: Path) -> None:
    (source / "1.npy").write_bytes((source / "1.npy").read_bytes()[:1000])
    pipeline = af.Pipeline([af.ImageReaderStage(source), scoring(4.5)])
    with pytest.raises(af.AestheticFilterError, match=r"1\.npy: cut short"):
        pipeline.run(scores=tmp_path / "s")
    result = pipeline.run(scores=tmp_path / "s", keep_going=True)
    assert list(result.broken) == ["1.npy"]
    assert result.counts.rows == 600
    assert "broken shard 1.npy: cut short" in result.summary()


# Stages of one's own.


class LeaveOut:
    """Leaves out the rows whose id ends so."""

    def __init__(self, ending: str) -> None:
        self.ending = ending

    def __repr__(self) -> str:
        return f"LeaveOut({self.ending!r})"

    def __call__(self, table: pa.Table) -> pa.Table:
        ends = compute.ends_with(table.column("image_id"), self.ending)
        return table.filter(compute.invert(ends))


class Notes:
    """Notes what it is handed."""

    gives = ("seen",)

    def __init__(self) -> None:
        self.tables: list[pa.Table] = []
        self.threads: set[int] = set()
        self.set_up = 0
        self._inside = threading.Lock()

    def setup(self) -> None:
        self.set_up += 1

    def __call__(self, table: pa.Table) -> pa.Table:
        assert self._inside.acquire(blocking=False), "called from two threads at once"
        try:
            time.sleep(0.001)
            self.tables.append(table)
            return table.append_column("seen", pa.array([True] * table.num_rows))
        finally:
            self._inside.release()


def test_own_stages_see_what_is_left_and_every_row_is_accounted_for(
    source: Path, tmp_path: Path
) -> None:
    notes = Notes()
    stages = [af.ImageReaderStage(source), LeaveOut("7"), scoring(4.4), notes, LeaveOut("3")]
    result = af.Pipeline(stages).run(scores=tmp_path / "s")
    seen = pa.concat_tables(notes.tables, promote_options="default")
    ids = seen.column("image_id").to_pylist()
    assert min(seen.column("aesthetic_score").to_pylist()) >= np.float32(4.4)
    assert not any(name.endswith("7") for name in ids)
    assert notes.set_up == 1
    assert notes.tables[0].column_names[-1] != "seen"
    kept = result.table()
    assert kept.column("image_id").to_pylist() == [
        name for name in sorted(ids, key=_place) if not name.endswith("3")
    ]
    assert set(kept.column("seen").to_pylist()) == {True}
    counts = result.counts
    assert counts.rows == 900
    assert counts.dropped["LeaveOut"] == 90 + len([name for name in ids if name.endswith("3")])
    assert counts.dropped["aesthetic_score < 4.4"] > 100
    assert counts.kept + sum(counts.dropped.values()) + counts.failed == 900
    assert counts.failed == 2
    # In the scores every row is in its place.
    table = result.scores.table(["image_id", "dropped_by", "aesthetic_score"])
    assert table.column("image_id").to_pylist() == sorted(
        table.column("image_id").to_pylist(), key=_place
    )
    assert "LeaveOut" in str(result.summary())


def _place(name: str) -> tuple[int, int]:
    file, _, row = name.partition("#")
    return int(file.removesuffix(".npy")), int(row)


def test_own_stages_belong_to_what_the_run_is(source: Path, tmp_path: Path) -> None:
    reader = af.ImageReaderStage(source)
    af.Pipeline([reader, LeaveOut("7"), scoring()]).run(scores=tmp_path / "s")
    af.Pipeline([reader, LeaveOut("7"), scoring()]).run(scores=tmp_path / "s")
    with pytest.raises(UsageError, match=r"stages.*LeaveOut.*'7'"):
        af.Pipeline([reader, LeaveOut("8"), scoring()]).run(scores=tmp_path / "s")
    with pytest.raises(UsageError, match="stages"):
        af.score(source, tmp_path / "s")


def test_an_own_stage_that_leaves_images_out_saves_their_embedding(
    photos: Path, tmp_path: Path, model_dir: Path
) -> None:
    notes = Notes()
    stages = [
        af.ImageReaderStage(photos),
        LeaveOut("0.jpg"),
        af.ImageEmbeddingStage(model_dir, options=EXACT),
        scoring(),
        notes,
        af.ImageWriterStage(tmp_path / "kept", format="folder"),
    ]
    result = af.Pipeline(stages).run()
    assert result.counts.dropped == {"LeaveOut": 4}
    assert result.progress.embedded == 36
    seen = pa.concat_tables(notes.tables, promote_options="default")
    assert seen.column("image").null_count == 0  # later stages may look at the images
    files = {path.name for path in (tmp_path / "kept").glob("*.jpg")}
    assert files == {f"{n:03d}.jpg" for n in range(40) if n % 10}
    rows = by_id(tmp_path / "kept-scores")
    assert rows["010.jpg"]["dropped_by"] == "LeaveOut"
    assert rows["010.jpg"]["embedding"] is None
    assert rows["010.jpg"]["error"] is None
    assert "image" not in rows["011.jpg"]


def test_images_can_be_let_go_once_embedded(photos: Path, model_dir: Path) -> None:
    notes = Notes()
    embedding = af.ImageEmbeddingStage(model_dir, remove_image_data=True, options=EXACT)
    af.Pipeline([af.ImageReaderStage(photos), embedding, notes, scoring()]).run()
    assert "image" not in notes.tables[0].column_names
    assert "embedding" in notes.tables[0].column_names


def test_an_encoder_of_ones_own(photos: Path) -> None:
    stages = [af.ImageReaderStage(photos), GivesEmbedding(), scoring()]
    result = af.Pipeline(stages).run()
    from aesthetic_filter.heads.head import reference_direction

    expected = affine(reference_direction()[None])[0]
    values = result.table().column("aesthetic_score").to_numpy()
    assert len(values) == 41
    assert np.abs(values - expected).max() < WITHIN


class Misbehaves:
    def __init__(self, how: str) -> None:
        self.how = how

    def __repr__(self) -> str:
        return f"Misbehaves({self.how})"

    def __call__(self, table: pa.Table) -> Any:
        if self.how == "raises":
            raise ValueError("no such thing")
        if self.how == "nothing":
            return None
        if self.how == "loses a column":
            return table.drop_columns(["image_id"])
        if self.how == "only ids":
            return table.select(["image_id"])
        return pa.concat_tables([table, table])


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ("raises", "Misbehaves: ValueError: no such thing"),
        ("nothing", "Misbehaves: gave a NoneType"),
        ("loses a column", "Misbehaves: lost the column 'image_id'"),
        ("only ids", "Misbehaves: lost the column 'embedding'"),
        ("doubles", "Misbehaves: made up rows"),
    ],
)
def test_an_own_stage_that_misbehaves_is_named(source: Path, how: str, problem: str) -> None:
    with pytest.raises(StageError, match=problem):
        af.Pipeline([af.ImageReaderStage(source), Misbehaves(how), scoring()]).run()


def test_a_pipeline_can_be_pickled_and_is_light(photos: Path) -> None:
    pipeline = af.Pipeline(
        [
            af.ImageReaderStage(photos),
            LeaveOut("7"),
            af.ImageEmbeddingStage(model_inference_batch_size=5, num_gpus_per_worker=0.25),
            scoring(4.5, num_gpus_per_worker=0.5),
            af.ImageWriterStage("out"),
        ]
    )
    content = pickle.dumps(pipeline)
    assert len(content) < 5000
    assert pickle.loads(content).describe() == pipeline.describe()


# Stopped and gone on with.


@pytest.mark.usefixtures("source")
def test_killed_and_run_again(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, time\n"
        "import aesthetic_filter as af\n"
        "class Slow:\n"
        "    def __repr__(self): return 'Slow()'\n"
        "    def __call__(self, table):\n"
        "        if table.column('image_id')[0].as_py().startswith('2') and 'slow' in sys.argv:\n"
        "            open('reached', 'w').close(); time.sleep(60)\n"
        "        return table\n"
        "result = af.Pipeline([af.ImageReaderStage('embeddings'), Slow(),\n"
        "    af.ImageAestheticFilterStage(score_threshold=4.5),\n"
        "    af.ImageWriterStage('kept', format='csv')]).run(workers=1)\n"
        "print(result.progress.reused, result.counts.rows, result.counts.kept)\n",
        encoding="utf-8",
    )
    command = [sys.executable, str(program)]
    process = subprocess.Popen([*command, "slow"], cwd=tmp_path)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "reached").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "kept").exists()
    again = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=True
    )
    reused, rows, kept = map(int, again.stdout.split())
    assert (reused, rows) == (2, 900)
    assert len((tmp_path / "kept" / "kept.csv").read_text().splitlines()) == kept + 1


def test_captions_and_json_are_carried(tmp_path: Path, model_dir: Path) -> None:
    content = []
    for number in range(6):
        content += [(f"{number}.jpg", jpeg(number)), (f"{number}.txt", f"cat {number}".encode())]
    write_tar(tmp_path / "shards" / "0.tar", content)
    stages = [
        af.ImageReaderStage(tmp_path / "shards"),
        af.ImageEmbeddingStage(model_dir, options=EXACT),
    ]
    result = af.Pipeline([*stages, scoring()]).run()
    assert result.table().column("txt" if "txt" in result.table().column_names else "caption")[
        3
    ].as_py() in ("cat 3", b"cat 3")


def test_a_reader_gives_its_rows(source: Path, photos: Path) -> None:
    tables = list(af.ImageReaderStage(source))
    assert sum(table.num_rows for table in tables) == 900
    assert {name for table in tables for name in table.column_names} == {"image_id", "embedding"}
    images = pa.concat_tables(af.ImageReaderStage(photos))
    assert images.column("image")[0].as_py() == (photos / "000.jpg").read_bytes()


def adds_a_column(table: pa.Table) -> pa.Table:
    return table.append_column("mine", pa.nulls(len(table), pa.string()))


def claims_to_know(table: pa.Table) -> pa.Table:
    return table.append_column("aesthetic_score", pa.array([9.9] * len(table), pa.float32()))


def drops_all(table: pa.Table) -> pa.Table:
    return table.slice(0, 0)


class OwnEncoder:
    gives = ("embedding",)

    def __init__(self, vectors: np.ndarray) -> None:
        self.vectors = vectors

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = [self.vectors[int(name[:-4])] for name in table["image_id"].to_pylist()]
        return table.append_column("embedding", vectors_column(np.array(rows)))


def test_stages_that_drop_nothing_and_a_row_that_fails(vectors: np.ndarray, tmp_path: Path) -> None:
    rows = vectors[:20].copy()
    rows[3] = 0
    np.save(tmp_path / "e.npy", rows)
    stages = [af.ImageReaderStage(tmp_path / "e.npy"), adds_a_column, scoring(None)]
    result = af.Pipeline(stages).run(scores=tmp_path / "s")
    assert "embedding is all zeros: 1" in result.summary()
    assert dict(af.open_scores(tmp_path / "s").summary().failures) == {"embedding is all zeros": 1}


def test_no_stage_can_say_what_the_head_says(vectors: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "e.npy", vectors[:20])
    reader = af.ImageReaderStage(tmp_path / "e.npy")
    found = af.Pipeline([reader, claims_to_know, scoring(None)]).run().table()
    scores = np.array(found["aesthetic_score"].to_pylist())
    assert np.abs(scores - affine(vectors[:20])).max() < 1e-3


def test_a_summary_where_stages_left_nothing_to_score(photos: Path, model_dir: Path) -> None:
    embedding = af.ImageEmbeddingStage(model_dir, options=EXACT)
    result = af.Pipeline([af.ImageReaderStage(photos), drops_all, embedding, scoring(4.0)]).run()
    assert result.counts.kept == 0
    assert "kept" in result.summary()


def test_an_encoder_of_one_s_own_that_no_row_reaches(vectors: np.ndarray, tmp_path: Path) -> None:
    write_files(tmp_path / "folder", {f"{n}.jpg": jpeg(n) for n in range(3)})
    stages = [drops_all, OwnEncoder(vectors), scoring()]
    result = af.Pipeline([af.ImageReaderStage(tmp_path / "folder"), *stages]).run()
    assert (result.counts.rows, result.counts.kept) == (3, 0)
    assert dict(result.counts.dropped)["drops_all"] == 3


def test_an_own_encoder_s_images_can_be_written(vectors: np.ndarray, tmp_path: Path) -> None:
    files = {f"{n}.jpg": jpeg(n) for n in range(20)}
    reader = af.ImageReaderStage(write_files(tmp_path / "folder", files))
    expected = affine(vectors[:20])
    threshold = float(np.sort(expected)[9:11].mean())
    writer = af.ImageWriterStage(tmp_path / "kept", "folder")
    result = af.Pipeline([reader, OwnEncoder(vectors), scoring(threshold), writer]).run()
    kept = {f"{n}.jpg" for n in range(20) if expected[n] >= threshold}
    assert len(kept) == 10
    assert {path.name for path in (tmp_path / "kept").glob("*.jpg")} == kept
    for name in kept:
        assert (tmp_path / "kept" / name).read_bytes() == files[name]
    rows = result.scores.table(["image_id", "image_sha256"]).to_pylist()
    found = {row["image_id"]: row["image_sha256"] for row in rows}
    assert found == {name: sha256(content) for name, content in files.items()}
    # Their embeddings are kept, as the published encoder's are: another head can be tried.
    again = af.score(result.scores.path, tmp_path / "again", allow_foreign=True)
    ours, theirs = (s.table(["aesthetic_score"]).to_pydict() for s in (again, result.scores))
    assert ours == theirs


class Digests(OwnEncoder):
    """An encoder that gives the digest too."""

    def __call__(self, table: pa.Table) -> pa.Table:
        digests = [sha256(image) for image in table["image"].to_pylist()]
        return super().__call__(table.append_column("image_sha256", pa.array(digests)))


def test_an_own_encoder_may_give_the_digest_itself(vectors: np.ndarray, tmp_path: Path) -> None:
    files = {f"{n}.jpg": jpeg(n) for n in range(5)}
    reader = af.ImageReaderStage(write_files(tmp_path / "folder", files))
    writer = af.ImageWriterStage(tmp_path / "kept", "folder")
    result = af.Pipeline([reader, Digests(vectors), scoring(), writer]).run()
    assert result.counts.kept == 5
    assert [name for name in result.scores.columns if "sha256" in name] == ["image_sha256"]


def test_a_column_that_is_there_twice_is_named(source: Path) -> None:
    def doubles(table: pa.Table) -> pa.Table:
        return table.append_column("image_id", table["image_id"])

    with pytest.raises(StageError, match="gave the column 'image_id' twice"):
        af.Pipeline([af.ImageReaderStage(source), doubles, scoring()]).run()


# Names that a source has for columns of its own.


def test_a_source_s_own_columns_are_not_taken_for_ours(vectors: np.ndarray, tmp_path: Path) -> None:
    own: dict[str, list[Any]] = {
        "dropped_by": ["nsfw", None, 3 * "x"],
        "image": ["http://a/1", "http://a/2", "http://a/3"],
        "image_data": ["a", "b", None],
    }
    table = pa.table({"image_id": ["a", "b", "c"], "embedding": vectors_column(vectors[:3])})
    for name, values in own.items():
        table = table.append_column(name, pa.array(values))
    pq.write_table(table, tmp_path / "own.parquet")
    stages = [af.ImageReaderStage(tmp_path / "own.parquet"), Plain(), scoring(), Plain()]
    result = af.Pipeline(stages).run()
    assert (result.counts.kept, dict(result.counts.dropped)) == (3, {})
    found = result.scores.table().to_pydict()
    for name, values in own.items():
        assert found[f"source_{name}"] == values
    assert not set(own) & set(found)


def test_a_pipeline_s_scores_are_a_source_without_its_verdicts(
    photos: Path, tmp_path: Path, model_dir: Path
) -> None:
    embedding = af.ImageEmbeddingStage(model_dir, options=EXACT)
    first = [
        af.ImageReaderStage(photos),
        LeaveOut("7.jpg"),
        embedding,
        scoring(),
        LeaveOut("3.jpg"),
    ]
    was = af.Pipeline(first).run(scores=tmp_path / "a").counts
    assert was.dropped == {"LeaveOut": 8}
    scores = af.score(tmp_path / "a", tmp_path / "b", allow_foreign=True)
    failures = scores.summary().failures
    assert failures["never embedded: was dropped by LeaveOut"] == 4
    assert sum(failures.values()) == 5  # and the one that is no image
    assert scores.summary().scored == 36
    assert "dropped_by" not in scores.columns


# Columns whose types differ.


class Types:
    """Adds a column whose type depends on the shard."""

    def __init__(self, *kinds: Any) -> None:
        self.kinds = kinds
        self.calls = 0

    def __repr__(self) -> str:
        return "Types"

    def __call__(self, table: pa.Table) -> pa.Table:
        kind = self.kinds[self.calls % len(self.kinds)]
        self.calls += 1
        values = pa.array([None if kind == pa.null() else 1] * table.num_rows)
        if pa.types.is_dictionary(kind):
            return table.append_column("x", values.cast(kind.value_type).dictionary_encode())
        return table.append_column("x", values.cast(kind))


@pytest.fixture
def large(tmp_path: Path, make_embeddings: Make) -> Path:
    """One shard of several batches."""
    path = tmp_path / "large.npy"
    np.save(path, make_embeddings(10_000))
    return path


@pytest.mark.parametrize(
    ("kinds", "common"),
    [
        ((pa.null(), pa.int32(), pa.null()), pa.int32()),
        ((pa.int32(), pa.int64()), pa.int64()),
        ((pa.int32(), pa.float64(), pa.null()), pa.float64()),
        ((pa.string(), pa.dictionary(pa.int32(), pa.string())), pa.string()),
    ],
)
def test_columns_are_as_wide_as_any_batch_needs(
    large: Path, tmp_path: Path, kinds: tuple[Any, ...], common: Any
) -> None:
    stage = Types(*kinds)
    result = af.Pipeline([af.ImageReaderStage(large), stage, scoring()]).run(scores=tmp_path / "s")
    assert stage.calls >= len(kinds)
    column = result.scores.table(["x"]).column("x")
    assert (len(column), column.type) == (10_000, common)
    nulls = kinds.count(pa.null())
    assert (column.null_count > 0) == (nulls > 0)
    assert set(map(int, column.drop_null().to_pylist())) == {1}


def test_columns_of_no_common_type_are_named(large: Path) -> None:
    stages = [af.ImageReaderStage(large), Types(pa.int64(), pa.string()), scoring()]
    with pytest.raises(StageError, match="the column 'x' is int64 in some tables and string in"):
        af.Pipeline(stages).run()


# What a stage is.


def leaves_out(letter: str) -> Any:
    return lambda table: table.filter(
        pa.array([letter not in i for i in table["image_id"].to_pylist()])
    )


def ends_with(table: pa.Table, ending: str) -> pa.Table:
    return table.filter(compute.ends_with(table["image_id"], ending))


def counting() -> Any:
    seen = 0

    def stage(table: pa.Table) -> pa.Table:
        nonlocal seen
        seen += 1
        return table

    return stage


def test_two_functions_are_two_stages(source: Path, tmp_path: Path) -> None:
    reader = af.ImageReaderStage(source)

    def run(stage: Any) -> int:
        return af.Pipeline([reader, stage, scoring()]).run(scores=tmp_path / "s").counts.kept

    assert run(leaves_out("7")) == run(leaves_out("7"))
    for other in (leaves_out("8"), lambda table: table, partial(ends_with, ending="8")):
        with pytest.raises(UsageError, match="stages"):
            run(other)


class Model:
    """Something that says nothing of itself."""


@dataclass
class Nsfw:
    limit: int
    labels: frozenset[str] = frozenset()
    model: Model = field(default_factory=Model)

    def __call__(self, table: pa.Table) -> pa.Table:
        return table


def only(table: pa.Table, k: object) -> pa.Table:
    return table if k else table.slice(0, 0)


def captures(*values: Any) -> Any:
    return lambda table: (table, values)[0]


def captures_two(keep: Any, drop: Any) -> Any:
    return lambda table: (table, keep, drop)[0]


class A(Plain):
    """One callable."""


class B(Plain):
    """Another."""


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: Nsfw(10), lambda: Nsfw(40)),
        (lambda: Nsfw(10, frozenset("ab")), lambda: Nsfw(10, frozenset("ac"))),
        (lambda: captures(np.int64(10)), lambda: captures(np.int64(40))),
        (lambda: captures(Path("a")), lambda: captures(Path("b"))),
        (lambda: captures(len), lambda: captures(max)),
        (lambda: captures(["a"]), lambda: captures(["b"])),
        (lambda: captures({"a": 1}), lambda: captures({"a": 2})),
        (lambda: captures(np.arange(9999)), lambda: captures(np.arange(9999) // 5000 * 4999)),
        (lambda: captures_two(("c", "a"), ("b",)), lambda: captures_two(("a",), ("b", "c"))),
        (lambda: partial(only, k=[1]), lambda: partial(only, k=[2])),
        (lambda: partial(A(), k=1), lambda: partial(B(), k=1)),
        (lambda: Nsfw(10).__call__, lambda: Nsfw(40).__call__),
    ],
)
def test_settings_tell_stages_apart(one: Callable[[], Any], other: Callable[[], Any]) -> None:
    assert identity(one()) == identity(one())
    assert identity(one()) != identity(other())


def identity(stage: Any) -> list[str]:
    return arrange([READER, stage, EMBEDDING, FILTER]).identity()


def nested() -> Any:
    seen = 0

    def stage(table: pa.Table) -> pa.Table:
        def bump() -> None:
            nonlocal seen
            seen += 1

        bump()
        return table

    return stage


def lazy() -> Any:
    model = None

    def load() -> None:
        nonlocal model
        model = model or object()

    def stage(table: pa.Table) -> pa.Table:
        load()
        return table if model else table.slice(0, 0)

    return stage


def half_made() -> Any:
    if not Path("/").exists():
        log = print

    def stage(table: pa.Table) -> pa.Table:
        return table if table.num_rows else log(table)  # type: ignore[no-any-return]

    return stage


def mutual() -> Any:
    calls: list[Any] = []
    calls += [lambda table, n=n: [call(table) for call in calls[:n]] for n in range(30)]
    return calls[-1]


@pytest.mark.parametrize("make", [counting, nested, lazy, half_made, mutual])
def test_a_function_that_is_used_stays_what_it_is(make: Callable[[], Any]) -> None:
    stage = make()
    before = identity(stage)
    if make is not mutual:
        stage(pa.table({"a": [1]}))
    assert identity(stage) == before == identity(make())


STAGES = """
import sys
sys.path.insert(0, {tests!r})
import aesthetic_filter as af
from test_pipeline import *

def again(table, times=3, *, names=frozenset({{"x", "y", "z"}})):
    return again(table, times - 1) if times else [n for n in table if n in {{"a", "b", "c", "d"}}]

sets = frozenset({{frozenset("abc"), frozenset("cde")}})
stages = [Plain(), again, Plain().__call__, partial(again, times=2), lambda table: again(table)]
stages += [Nsfw(1, frozenset("abcdef")), captures(sets, Model()), nested(), mutual()]
print([name for stage in stages for name in identity(stage)])
"""


def test_a_stage_is_the_same_in_every_process() -> None:
    said = set()
    for seed in ("1", "2", "3"):
        program = STAGES.format(tests=str(Path(__file__).parent))
        command, env = [sys.executable, "-c", program], {**os.environ, "PYTHONHASHSEED": seed}
        ran = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        said.add(ran.stdout)
    assert len(said) == 1
    (names,) = map(ast.literal_eval, said)
    assert len(set(names)) == 9


def test_where_a_stage_stands_is_part_of_what_the_run_is() -> None:
    before, between = ([READER, Plain(), EMBEDDING, FILTER], [READER, EMBEDDING, Plain(), FILTER])
    assert arrange(before).identity() != arrange(between).identity()
    first, second = (arrange([READER, EMBEDDING, scoring(t), Plain()]) for t in (5, 5.0))
    assert first.identity() == second.identity()


# Where stages fail, and what is not the threshold's doing.


class CannotSetUp(Plain):
    def setup(self) -> None:
        raise ValueError("no such model")


def test_a_setup_that_fails_is_named(source: Path) -> None:
    with pytest.raises(
        StageError, match="CannotSetUp: its setup failed: ValueError: no such model"
    ):
        af.Pipeline([af.ImageReaderStage(source), CannotSetUp(), scoring()]).run()


def test_a_stage_of_ours_is_not_called_otherwise_than_it_is() -> None:
    class Mine(af.ImageEmbeddingStage):
        def __call__(self, table: pa.Table) -> pa.Table:
            return table

    with pytest.raises(PipelineError, match=r"Mine.*has a __call__ of its own"):
        af.Pipeline([READER, Mine(), FILTER])


def test_a_warning_is_of_what_the_threshold_did(source: Path) -> None:
    reader = af.ImageReaderStage(source)
    assert af.Pipeline([reader, scoring(0.5), drops_all]).run().warning == ""
    assert af.Pipeline([reader, drops_all, scoring(0.5)]).run().warning == ""
    none = af.Pipeline([reader, LeaveOut("7"), scoring(9.5)]).run()
    assert none.warning == "score_threshold 9.5 keeps nothing"
    some = af.Pipeline([reader, LeaveOut("7"), scoring(0.5)]).run()
    assert some.warning == "score_threshold 0.5 keeps everything"


def test_process_keeps_what_another_stage_said(vectors: np.ndarray) -> None:
    images = [af.ImageObject(image_id=str(n), embedding=v) for n, v in enumerate(vectors[:8])]
    batch = af.ImageBatch(images)
    images[0].dropped_by = "nsfw"
    assert len(scoring(None).process(batch)) == 7
    assert images[0].dropped_by == "nsfw"
    assert len(scoring(9.5).process(batch)) == 0
    assert len(scoring(0.5).process(batch)) == 7  # a threshold is judged again
    assert images[0].dropped_by == "nsfw"
