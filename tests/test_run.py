"""``score`` end to end: values, parts, provenance; resuming, refusing, breaking, interrupting."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

import aesthetic_filter as af
from aesthetic_filter.errors import (
    ForeignEmbeddingsError,
    OutputError,
    ShardError,
    SourceError,
    WidthError,
)

REFERENCE = "sac+logos+ava1-l14-linearMSE"
HEADS = {
    REFERENCE: REFERENCE,
    "ava+logos-l14-linearMSE": "ava+logos-l14-linearMSE",
    "laion-v1": "sa_0_4_vit_l_14_linear",
    "sac-public": "sac_public_2022_06_29_vit_l_14_linear",
}
"""Bundled head to its column in expected_scores.csv."""

WITHIN = 2e-5
SPACE = "clip-vit-l-14-openai/image/224-bicubic/l2"

Make = Callable[..., np.ndarray]
Run = Callable[..., "subprocess.CompletedProcess[str]"]


# What a run should give, worked out apart from the code under test.


@pytest.fixture(scope="session")
def oracle(repo: Path) -> Callable[[np.ndarray], np.ndarray]:
    """The reference head in float64 NumPy, from the numbers in its file."""
    tensors = load_file(repo / f"src/aesthetic_filter/heads/{REFERENCE}.safetensors")
    weight = tensors["layers.0.weight"][0].astype(np.float64)
    bias = float(tensors["layers.0.bias"][0])

    def score(vectors: np.ndarray) -> np.ndarray:
        x = vectors.astype(np.float64)
        return x @ weight / np.linalg.norm(x, axis=1) + bias

    return score


@pytest.fixture(scope="session")
def expected(shared: Path) -> dict[str, dict[str, float]]:
    """File to head to score, from the layered networks in float64."""
    with (shared / "embeddings" / "expected_scores.csv").open(newline="") as file:
        return {
            row["file"]: {head: float(row[column]) for head, column in HEADS.items()}
            | {"relu": float(row["ava+logos-l14-reluMSE"])}
            for row in csv.DictReader(file)
            if row["row"] == "0"
        }


def save(folder: Path, **shards: np.ndarray) -> Path:
    """Write ``.npy`` files; ``a__b`` is ``a/b.npy``."""
    for name, vectors in shards.items():
        path = folder / f"{name.replace('__', '/')}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, vectors)
    return folder


def parts(out: Path) -> list[Path]:
    return sorted(out.rglob("*.parquet"))


def rows(out: Path) -> list[dict[str, Any]]:
    """All rows of all parts, read with nothing of ours."""
    return [row for part in parts(out) for row in pq.ParquetFile(part).read().to_pylist()]


def scores_by_id(out: Path) -> dict[str, float]:
    found = rows(out)
    assert len({row["image_id"] for row in found}) == len(found)
    return {row["image_id"]: row["aesthetic_score"] for row in found}


def state(out: Path) -> dict[str, tuple[int, int]]:
    """What changes when a part is written again."""
    return {str(p): (p.stat().st_ino, p.stat().st_mtime_ns) for p in parts(out)}


def run_file(out: Path) -> dict[str, Any]:
    return json.loads((out / "_run.json").read_text(encoding="utf-8"))


def provenance(part: Path) -> dict[str, Any]:
    return json.loads(pq.read_schema(part).metadata[b"aesthetic_filter"])


def leftovers(out: Path) -> list[Path]:
    return list(out.rglob("*.unfinished"))


@pytest.fixture
def source(tmp_path: Path, make_embeddings: Make) -> Path:
    """Three shards of 5, 6 and 7 rows, one in a subfolder."""
    return save(
        tmp_path / "in",
        a=make_embeddings(5, seed=1),
        b=make_embeddings(6, seed=2, dtype=np.float32),
        sub__c=make_embeddings(7, seed=3, scale=17.0),
    )


# Values.


def test_command_line_gives_the_expected_scores_of_the_rating_prototypes(
    shared: Path, cli: Run, tmp_path: Path, expected: dict[str, dict[str, float]]
) -> None:
    folder = shared / "embeddings" / "laion-rating-prototypes"
    done = cli("score", folder, "--out", "scores")
    assert done.returncode == 0, done.stderr
    assert "10 rows in 10 shards" in done.stdout
    out = tmp_path / "scores"
    assert [p.name for p in parts(out)] == [f"rating{r}.npy.parquet" for r in range(10)]
    found = [row["aesthetic_score"] for row in rows(out)]
    wanted = [expected[f"laion-rating-prototypes/rating{r}.npy"][REFERENCE] for r in range(10)]
    assert found == pytest.approx(wanted, abs=WITHIN, rel=0)
    assert found == sorted(found)
    assert [row["image_id"] for row in rows(out)] == [f"rating{r}.npy" for r in range(10)]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("folder", ["laion-rating-prototypes", "style-averages"])
def test_every_bundled_head_gives_the_expected_scores(
    shared: Path,
    tmp_path: Path,
    expected: dict[str, dict[str, float]],
    head: str,
    folder: str,
) -> None:
    af.score(shared / "embeddings" / folder, tmp_path / "scores", head=head)
    found = scores_by_id(tmp_path / "scores")
    wanted = {
        file.partition("/")[2]: by_head[head]
        for file, by_head in expected.items()
        if file.startswith(f"{folder}/")
    }
    assert found == pytest.approx(wanted, abs=WITHIN, rel=0)


def test_a_head_with_activations_works_from_its_checkpoint(
    shared: Path, tmp_path: Path, expected: dict[str, dict[str, float]]
) -> None:
    head = shared / "heads" / "ava+logos-l14-reluMSE.pth"
    af.score(shared / "embeddings" / "laion-rating-prototypes", tmp_path / "s", head=head)
    wanted = {
        f"rating{r}.npy": expected[f"laion-rating-prototypes/rating{r}.npy"]["relu"]
        for r in range(10)
    }
    assert scores_by_id(tmp_path / "s") == pytest.approx(wanted, abs=WITHIN, rel=0)


def test_text_embeddings_are_refused_unless_allowed(shared: Path, cli: Run, tmp_path: Path) -> None:
    folder = shared / "embeddings" / "not-clip-l14-image"
    refused = cli("score", folder, "--out", "scores")
    assert refused.returncode == 4
    assert "--allow-foreign" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert refused.stdout == ""
    assert not (tmp_path / "scores").exists()

    allowed = cli("score", folder, "--out", "scores", "--allow-foreign")
    assert allowed.returncode == 0, allowed.stderr
    name = "text_prompts_vit_l_14.npy"
    wanted = {f"{name}#0": 4.6460364, f"{name}#1": 4.4288756}  # rows 0 and 1 of the csv
    assert scores_by_id(tmp_path / "scores") == pytest.approx(wanted, abs=WITHIN, rel=0)
    assert run_file(tmp_path / "scores")["foreign"] == 2


def test_a_minority_of_foreign_rows_is_scored_and_counted(
    tmp_path: Path, make_embeddings: Make, oracle: Callable[[np.ndarray], np.ndarray]
) -> None:
    vectors = make_embeddings(40, dtype=np.float32)
    vectors[:9] = np.random.default_rng(5).standard_normal((9, 768)).astype(np.float32)
    opened = af.score(save(tmp_path / "in", a=vectors), tmp_path / "s")
    found = [row["aesthetic_score"] for row in rows(tmp_path / "s")]
    assert found == pytest.approx(oracle(vectors), abs=WITHIN, rel=0)
    assert run_file(tmp_path / "s")["foreign"] == 9
    assert opened.summary().foreign == 9


def test_rows_keep_their_order_ids_and_norms(
    tmp_path: Path, source: Path, oracle: Callable[[np.ndarray], np.ndarray]
) -> None:
    af.score(source, tmp_path / "s")
    for shard, name in (("a.npy", "a.npy"), ("b.npy", "b.npy"), ("sub/c.npy", "sub/c.npy")):
        vectors = np.load(source / shard)
        table = pq.ParquetFile(tmp_path / "s" / f"{shard}.parquet").read()
        assert table["image_id"].to_pylist() == [f"{name}#{n}" for n in range(len(vectors))]
        norms = np.linalg.norm(vectors.astype(np.float64), axis=1)
        assert table["aesthetic_score"].to_numpy() == pytest.approx(oracle(vectors), abs=WITHIN)
        assert table["embedding_norm"].to_numpy() == pytest.approx(norms, rel=1e-6)
        assert table["reference_cosine"].to_numpy() == pytest.approx(0.6, abs=2e-3)
        assert table["error"].null_count == len(vectors)
        assert table.schema.field("aesthetic_score").type == pa.float32()
        assert "embedding" not in table.column_names


def test_a_failed_row_has_a_reason_and_no_numbers_and_its_neighbours_are_unharmed(
    tmp_path: Path, make_embeddings: Make, oracle: Callable[[np.ndarray], np.ndarray]
) -> None:
    vectors = make_embeddings(20, dtype=np.float32)
    bad = {3: np.nan, 7: np.inf, 8: -np.inf, 19: 0.0}
    for row, value in bad.items():
        if value == 0:
            vectors[row] = 0
        else:
            vectors[row, row] = value
    af.score(save(tmp_path / "in", a=vectors), tmp_path / "s")
    found = rows(tmp_path / "s")
    assert len(found) == 20
    for row, entry in enumerate(found):
        if row in bad:
            reason = "all zeros" if bad[row] == 0 else "NaN or infinity"
            assert reason in entry["error"]
            assert entry["aesthetic_score"] is None
            assert entry["embedding_norm"] is None
            assert entry["reference_cosine"] is None
        else:
            assert entry["error"] is None
            one = oracle(vectors[row : row + 1])[0]
            assert entry["aesthetic_score"] == pytest.approx(one, abs=WITHIN)
    facts = run_file(tmp_path / "s")
    assert (facts["rows"], facts["scored"], facts["failed"]) == (20, 16, 4)


def test_the_number_of_workers_changes_nothing(tmp_path: Path, source: Path) -> None:
    af.score(source, tmp_path / "one", workers=1)
    af.score(source, tmp_path / "many", workers=5)
    assert len(parts(tmp_path / "one")) == 3
    for part in parts(tmp_path / "one"):
        other = tmp_path / "many" / part.relative_to(tmp_path / "one")
        assert part.read_bytes() == other.read_bytes()


def test_a_source_of_its_own_result_columns_keeps_them_as_source_columns(
    tmp_path: Path, make_embeddings: Make, oracle: Callable[[np.ndarray], np.ndarray]
) -> None:
    vectors = make_embeddings(4, dtype=np.float32)
    column = pa.FixedSizeListArray.from_arrays(vectors.reshape(-1), 768)
    own = {
        "image_id": ["w", "x", "y", "z"],
        "embedding": column,
        "aesthetic_score": [9.5, 9.25, None, 9.0],
        "error": ["theirs", None, "theirs too", ""],
        "embedding_norm": [1, 2, 3, 4],
        "width": [640, None, 512, 1],
    }
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table(own), tmp_path / "in" / "x.parquet")
    af.score(tmp_path / "in", tmp_path / "s")
    table = pq.ParquetFile(tmp_path / "s" / "x.parquet.parquet").read().to_pydict()
    assert table["aesthetic_score"] == pytest.approx(oracle(vectors), abs=WITHIN)
    assert table["error"] == [None] * 4
    assert table["image_id"] == own["image_id"]
    assert table["source_aesthetic_score"] == own["aesthetic_score"]
    assert table["source_error"] == own["error"]
    assert table["source_embedding_norm"] == own["embedding_norm"]
    assert table["width"] == own["width"]


def test_shards_without_rows_are_finished_too(tmp_path: Path, make_embeddings: Make) -> None:
    folder = save(tmp_path / "in", a=make_embeddings(3), none=np.empty((0, 768), np.float16))
    af.score(folder, tmp_path / "s")
    facts = run_file(tmp_path / "s")
    assert (facts["status"], facts["shards"], facts["rows"]) == ("complete", 2, 3)
    assert [pq.ParquetFile(p).metadata.num_rows for p in parts(tmp_path / "s")] == [3, 0]


# Provenance and counts.


def test_every_part_and_the_run_file_say_where_the_scores_come_from(
    repo: Path, tmp_path: Path, source: Path
) -> None:
    af.score(source, tmp_path / "s", columns=[])
    header = (repo / f"src/aesthetic_filter/heads/{REFERENCE}.safetensors").read_bytes()
    facts = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]
    wanted = {
        "package": f"aesthetic-filter {version('aesthetic-filter')}",
        "space": SPACE,
        "source": str(source),
        "format": "npy",
        "columns": {"embedding": None, "image_id": None, "others": []},
    }
    for found in [run_file(tmp_path / "s"), *map(provenance, parts(tmp_path / "s"))]:
        assert {key: found[key] for key in wanted} == wanted
        assert found["head"]["name"] == REFERENCE
        assert found["head"]["sha256"] == facts["weights_sha256"]
        assert found["head"]["checkpoint_sha256"] == facts["checkpoint_sha256"]
        assert found["head"]["licence"] == "Apache-2.0"
    shards = {
        p.relative_to(tmp_path / "s").as_posix(): provenance(p) for p in parts(tmp_path / "s")
    }
    assert {name: made["shard"] for name, made in shards.items()} == {
        "a.npy.parquet": "a.npy",
        "b.npy.parquet": "b.npy",
        "sub/c.npy.parquet": "sub/c.npy",
    }


def test_counts_add_up(tmp_path: Path, make_embeddings: Make) -> None:
    good, bad = make_embeddings(30), make_embeddings(11, seed=9)
    bad[::2] = 0
    out = tmp_path / "s"
    opened = af.score(save(tmp_path / "in", good=good, bad=bad), out)
    facts = run_file(out)
    assert facts["status"] == "complete"
    assert (facts["rows"], facts["scored"], facts["failed"]) == (41, 35, 6)
    assert (facts["shards"], facts["broken_shards"]) == (2, [])
    assert len(opened) == 41
    summary = opened.summary()
    assert (summary.rows, summary.scored, sum(summary.failures.values())) == (41, 35, 6)


def test_progress_is_told_and_ends_at_the_whole(tmp_path: Path, source: Path) -> None:
    told: list[tuple[int, int, int, float]] = []

    def listen(progress: af.Progress) -> None:
        told.append((progress.finished, progress.rows, progress.shards, progress.bytes))

    af.score(source, tmp_path / "s", workers=1, on_progress=listen)
    assert told == sorted(told)
    assert told[-1][:3] == (3, 18, 3)
    told.clear()
    save(source, d=np.load(source / "a.npy"))
    af.score(source, tmp_path / "s", on_progress=listen)
    assert told[-1][:3] == (4, 5, 4)


# Resuming.


def test_finished_parts_are_not_written_again(tmp_path: Path, source: Path, cli: Run) -> None:
    assert cli("score", source, "--out", "s").returncode == 0
    before, read_before = state(tmp_path / "s"), rows(tmp_path / "s")
    again = cli("score", source, "--out", "s")
    assert again.returncode == 0, again.stderr
    assert "everything was scored already" in again.stdout
    assert state(tmp_path / "s") == before
    assert rows(tmp_path / "s") == read_before


def test_only_a_changed_shard_and_a_new_one_are_scored_again(
    tmp_path: Path,
    source: Path,
    make_embeddings: Make,
    oracle: Callable[[np.ndarray], np.ndarray],
) -> None:
    out = tmp_path / "s"
    af.score(source, out)
    before = state(out)
    changed = make_embeddings(6, seed=77, dtype=np.float32)  # of the same size in bytes
    time.sleep(0.01)
    np.save(source / "b.npy", changed)
    save(source, d=make_embeddings(2, seed=78))
    af.score(source, out)
    after = state(out)
    rewritten = {name for name in before if before[name] != after[name]}
    assert rewritten == {str(out / "b.npy.parquet")}
    assert set(after) - set(before) == {str(out / "d.npy.parquet")}
    found = pq.ParquetFile(out / "b.npy.parquet").read()["aesthetic_score"].to_numpy()
    assert found == pytest.approx(oracle(changed), abs=WITHIN)
    facts = run_file(out)
    assert (facts["rows"], facts["shards"]) == (5 + 6 + 7 + 2, 4)


def test_a_damaged_part_is_made_again(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "s"
    af.score(source, out)
    whole = rows(out)
    part = out / "b.npy.parquet"
    part.write_bytes(part.read_bytes()[:-100])
    af.score(source, out)
    assert rows(out) == whole


def test_a_shard_that_the_source_lost_is_not_passed_over_in_silence(
    tmp_path: Path, source: Path
) -> None:
    af.score(source, tmp_path / "s")
    before = state(tmp_path / "s")
    (source / "a.npy").unlink()
    with pytest.raises(OutputError, match=r"1 shard.*a\.npy.*--overwrite"):
        af.score(source, tmp_path / "s")
    assert state(tmp_path / "s") == before
    af.score(source, tmp_path / "s", overwrite=True)
    assert len(rows(tmp_path / "s")) == 13


@pytest.mark.parametrize("left", ["_run.json.unfinished", ".lock"])
def test_a_run_killed_in_its_first_moments_can_be_begun_again(
    tmp_path: Path, source: Path, left: str
) -> None:
    out = tmp_path / "s"
    out.mkdir()
    (out / ".lock").touch()
    (out / left).write_text('{"sta', encoding="utf-8")
    af.score(source, out)
    assert len(rows(out)) == 18
    assert leftovers(out) == []


def test_what_an_interrupted_write_left_is_cleared_away(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "s"
    af.score(source, out)
    (out / "sub" / "c.npy.parquet").rename(out / "sub" / "c.npy.parquet.unfinished")
    af.score(source, out)
    assert leftovers(out) == []
    assert len(rows(out)) == 18


# Refusing to mix or to overwrite.


def test_scores_of_another_head_do_not_mix(tmp_path: Path, source: Path, cli: Run) -> None:
    assert cli("score", source, "--out", "s").returncode == 0
    before = state(tmp_path / "s")
    refused = cli("score", source, "--out", "s", "--head", "laion-v1")
    assert refused.returncode == 2
    for word in (REFERENCE, "laion-v1", "--overwrite", "--out"):
        assert word in refused.stderr
    assert len(refused.stderr.splitlines()) <= 2
    assert state(tmp_path / "s") == before
    assert run_file(tmp_path / "s")["head"]["name"] == REFERENCE

    replaced = cli("score", source, "--out", "s", "--head", "laion-v1", "--overwrite")
    assert replaced.returncode == 0, replaced.stderr
    assert run_file(tmp_path / "s")["head"]["name"] == "laion-v1"
    assert {provenance(p)["head"]["name"] for p in parts(tmp_path / "s")} == {"laion-v1"}


def test_scores_of_another_source_do_not_mix(
    tmp_path: Path, source: Path, make_embeddings: Make
) -> None:
    other = save(tmp_path / "other", z=make_embeddings(2))
    out = tmp_path / "s"
    af.score(source, out)
    before = state(out)
    with pytest.raises(OutputError) as refused:
        af.score(other, out)
    assert str(source) in str(refused.value)
    assert str(other) in str(refused.value)
    assert "--overwrite" in str(refused.value)
    assert state(out) == before
    af.score(other, out, overwrite=True)
    assert [row["image_id"] for row in rows(out)] == ["z.npy#0", "z.npy#1"]


def test_other_columns_do_not_mix(tmp_path: Path, make_embeddings: Make) -> None:
    column = pa.FixedSizeListArray.from_arrays(make_embeddings(2).reshape(-1), 768)
    (tmp_path / "in").mkdir()
    table = pa.table({"id": ["p", "q"], "embedding": column, "u": [1, 2], "v": [3, 4]})
    pq.write_table(table, tmp_path / "in" / "x.parquet")
    af.score(tmp_path / "in", tmp_path / "s", columns=["u"])
    with pytest.raises(OutputError, match=r"columns.*--overwrite"):
        af.score(tmp_path / "in", tmp_path / "s")
    af.score(tmp_path / "in", tmp_path / "s", overwrite=True)
    assert {"u", "v"} <= set(rows(tmp_path / "s")[0])


@pytest.mark.parametrize("stranger", ["holiday.jpg", "sub/notes.txt", "table.parquet"])
def test_a_folder_of_other_files_is_not_written_into(
    tmp_path: Path, source: Path, stranger: str
) -> None:
    path = tmp_path / "s" / stranger
    path.parent.mkdir(parents=True)
    path.write_text("mine", encoding="utf-8")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=stranger.partition("/")[0]):
            af.score(source, tmp_path / "s", overwrite=overwrite)
    assert path.read_text(encoding="utf-8") == "mine"
    assert not (tmp_path / "s" / "_run.json").exists()


def test_the_scores_may_lie_inside_the_source(source: Path, cli: Run) -> None:
    for _ in range(2):  # the second time its own parts are there
        done = cli("score", "in", "--out", "in/scores")
        assert done.returncode == 0, done.stderr
        assert len(rows(source / "scores")) == 18


def test_the_scores_may_not_lie_inside_other_scores(tmp_path: Path, source: Path) -> None:
    af.score(source, tmp_path / "s")
    with pytest.raises(OutputError, match="folder of scores"):
        af.score(source, tmp_path / "s" / "more")
    assert len(af.open_scores(tmp_path / "s")) == 18


def test_the_source_itself_is_no_place_for_scores(source: Path) -> None:
    with pytest.raises(SourceError, match="no files but those in"):
        af.score(source, source)
    assert sorted(p.name for p in source.iterdir()) == ["a.npy", "b.npy", "sub"]


def test_a_file_is_no_folder(tmp_path: Path, source: Path, cli: Run) -> None:
    (tmp_path / "s").write_text("mine", encoding="utf-8")
    refused = cli("score", source, "--out", "s")
    assert refused.returncode == 2
    assert f"{Path('s')}: cannot be written" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert (tmp_path / "s").read_text(encoding="utf-8") == "mine"


def test_a_uri_is_no_folder(tmp_path: Path, source: Path, cli: Run) -> None:
    refused = cli("score", source, "--out", "s3://bucket/scores")
    assert refused.returncode == 2
    assert "local folder" in refused.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


@pytest.mark.parametrize("out", ["in/a.npy/scores", "/proc/scores"])
def test_an_unwritable_folder_is_one_clear_line(source: Path, cli: Run, out: str) -> None:
    if out.startswith("/proc") and not Path("/proc/self").exists():
        pytest.skip("no /proc here")
    refused = cli("score", source, "--out", out)
    assert refused.returncode == 2
    assert f"{out}: cannot be written" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


# Broken shards.


def truncate(path: Path, share: float = 0.5) -> None:
    os.truncate(path, int(path.stat().st_size * share))


def test_a_truncated_shard_ends_the_run_and_the_finished_parts_stay(
    tmp_path: Path, source: Path, cli: Run
) -> None:
    kept = (source / "sub" / "c.npy").read_bytes()
    truncate(source / "sub" / "c.npy")
    broken = cli("score", source, "--out", "s", "--workers", 1)
    assert broken.returncode == 1
    assert "sub/c.npy" in broken.stderr
    assert "cut short" in broken.stderr
    assert "7 rows, 3 are there" in broken.stderr
    assert "Traceback" not in broken.stderr
    before = state(tmp_path / "s")
    assert [Path(p).name for p in before] == ["a.npy.parquet", "b.npy.parquet"]
    assert run_file(tmp_path / "s")["status"] == "incomplete"

    (source / "sub" / "c.npy").write_bytes(kept)
    mended = cli("score", source, "--out", "s")
    assert mended.returncode == 0, mended.stderr
    assert before.items() <= state(tmp_path / "s").items()
    assert run_file(tmp_path / "s")["status"] == "complete"
    assert len(scores_by_id(tmp_path / "s")) == 18


def test_keep_going_records_a_broken_shard_and_ends_with_3(
    tmp_path: Path, source: Path, cli: Run
) -> None:
    kept = (source / "a.npy").read_bytes()
    truncate(source / "a.npy")
    went_on = cli("score", source, "--out", "s", "--keep-going")
    assert went_on.returncode == 3
    assert "a.npy" in went_on.stderr
    assert "cut short" in went_on.stderr
    facts = run_file(tmp_path / "s")
    assert (facts["status"], facts["rows"]) == ("incomplete", 13)
    assert [b["shard"] for b in facts["broken_shards"]] == ["a.npy"]
    assert "cut short" in facts["broken_shards"][0]["error"]
    summary = af.open_scores(tmp_path / "s").summary()
    assert list(summary.broken) == ["a.npy"]
    assert "a.npy" in str(summary)

    (source / "a.npy").write_bytes(kept)
    before = state(tmp_path / "s")
    assert cli("score", source, "--out", "s", "--keep-going").returncode == 0
    assert before.items() <= state(tmp_path / "s").items()
    assert run_file(tmp_path / "s")["broken_shards"] == []
    assert len(scores_by_id(tmp_path / "s")) == 18


def test_a_shard_that_broke_since_leaves_no_older_scores(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "s"
    af.score(source, out)
    truncate(source / "b.npy")
    assert len(af.score(source, out, keep_going=True)) == 12
    assert run_file(out)["rows"] == 12
    assert not (out / "b.npy.parquet").exists()


def test_a_source_of_broken_shards_only_is_no_success(tmp_path: Path, cli: Run) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.npy", "b.npy"):
        (tmp_path / "in" / name).write_bytes(b"no array")
    done = cli("score", "in", "--out", "s", "--keep-going")
    assert done.returncode == 1
    assert "none of its 2 shards can be read; a.npy: not a .npy file" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_shard_cut_short_while_it_is_read_is_broken(
    tmp_path: Path, make_embeddings: Make
) -> None:
    folder = save(tmp_path / "in", a=make_embeddings(20_000))
    whole = (folder / "a.npy").read_bytes()

    def cut(progress: af.Progress) -> None:
        if progress.rows < 20_000:
            truncate(folder / "a.npy", 0.4)

    with pytest.raises(ShardError, match="in the middle of its rows"):
        af.score(folder, tmp_path / "s", on_progress=cut)
    assert parts(tmp_path / "s") == []
    assert leftovers(tmp_path / "s") == []
    (folder / "a.npy").write_bytes(whole)
    assert len(af.score(folder, tmp_path / "s")) == 20_000


def test_a_shard_that_vanishes_is_recorded_when_going_on(tmp_path: Path, source: Path) -> None:
    def remove(_: af.Progress) -> None:
        (source / "sub" / "c.npy").unlink(missing_ok=True)

    told: list[af.Progress] = []
    af.score(
        source,
        tmp_path / "s",
        workers=1,
        keep_going=True,
        on_progress=lambda progress: (remove(progress), told.append(progress)),
    )
    assert list(told[-1].broken) == ["sub/c.npy"]
    assert "gone" in told[-1].broken["sub/c.npy"]
    assert len(rows(tmp_path / "s")) == 11


def test_a_shard_of_another_width_among_good_ones(tmp_path: Path, source: Path, cli: Run) -> None:
    np.save(source / "b.npy", np.ones((4, 512), np.float32))
    refused = cli("score", source, "--out", "s", "--workers", 1)
    assert refused.returncode == 4
    for word in ("b.npy", "512", "ViT-B/32", "768"):
        assert word in refused.stderr
    assert "b.npy.parquet" not in [p.name for p in parts(tmp_path / "s")]
    went_on = cli("score", source, "--out", "s", "--keep-going")
    assert went_on.returncode == 3
    assert [b["shard"] for b in run_file(tmp_path / "s")["broken_shards"]] == ["b.npy"]
    assert len(rows(tmp_path / "s")) == 12


def test_a_source_of_another_width_is_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    folder = save(tmp_path / "in", a=np.ones((4, 1024), np.float16))
    with pytest.raises(WidthError, match=r"1,?024 .*ViT-H/14.*768"):
        af.score(folder, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_foreign_shards_that_the_first_look_missed_are_found_in_the_end(
    tmp_path: Path, make_embeddings: Make
) -> None:
    vectors = np.random.default_rng(0).standard_normal((3000, 768)).astype(np.float16)
    for place in (0, 1500, 3000):  # where the look ahead samples
        vectors[max(place - 100, 0) : place + 100] = make_embeddings(
            len(vectors[max(place - 100, 0) : place + 100]), seed=place
        )
    folder = save(tmp_path / "in", a=vectors)
    with pytest.raises(ForeignEmbeddingsError, match="--allow-foreign"):
        af.score(folder, tmp_path / "s")
    assert run_file(tmp_path / "s")["status"] == "incomplete"
    before = state(tmp_path / "s")
    assert len(af.score(folder, tmp_path / "s", allow_foreign=True)) == 3000
    assert state(tmp_path / "s") == before


# A full disk.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A real file system of a given size; called again, of another."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = False

    def resize(size: str) -> Path:
        nonlocal mounted
        options = f"remount,size={size}" if mounted else f"size={size}"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"needs a small disk, and mounting one failed: {done.stderr.strip()}")
        mounted = True
        return place

    if sys.platform != "linux" or os.geteuid() or not shutil.which("mount"):
        pytest.skip("needs a small disk, and only root on Linux can mount one")
    try:
        yield resize
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_ends_the_run_and_room_lets_it_go_on(
    tmp_path: Path, make_embeddings: Make, cli: Run, small_disk: Callable[[str], Path]
) -> None:
    vectors = make_embeddings(20_000)
    folder = save(tmp_path / "in", a=vectors)
    for name in "bcdefgh":
        os.link(folder / "a.npy", folder / f"{name}.npy")
    assert cli("score", folder, "--out", "whole").returncode == 0
    size = sum(p.stat().st_size for p in parts(tmp_path / "whole"))

    disk = small_disk(f"{size // 2048}k")  # half of what is needed
    full = cli("score", folder, "--out", disk / "s")
    assert full.returncode == 1
    assert "No space left" in full.stderr
    assert "Traceback" not in full.stderr
    assert len(full.stderr.splitlines()) == 1
    assert leftovers(disk) == []
    before = state(disk / "s")
    assert 1 <= len(before) <= 6
    for part in parts(disk / "s"):
        twin = tmp_path / "whole" / part.relative_to(disk / "s")
        assert part.read_bytes() == twin.read_bytes()

    small_disk(f"{size * 4 // 1024}k")
    done = cli("score", folder, "--out", disk / "s")
    assert done.returncode == 0, done.stderr
    assert before.items() <= state(disk / "s").items()
    assert rows(disk / "s") == rows(tmp_path / "whole")


def test_a_disk_full_from_the_start_is_one_clear_line(
    source: Path, cli: Run, small_disk: Callable[[str], Path]
) -> None:
    disk = small_disk("64k")
    filler = disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    full = cli("score", source, "--out", disk / "s")
    assert full.returncode in (1, 2)
    assert "No space left" in full.stderr
    assert "Traceback" not in full.stderr
    assert len(full.stderr.splitlines()) == 1
    filler.unlink()
    done = cli("score", source, "--out", disk / "s")
    assert done.returncode == 0, done.stderr
    assert leftovers(disk) == []
    assert len(rows(disk / "s")) == 18


# Real processes, caught half way.


@pytest.fixture(scope="module")
def long_source(tmp_path_factory: pytest.TempPathFactory, make_embeddings: Make) -> Path:
    """A hundred shards that take a while; hard links to one file."""
    folder = save(tmp_path_factory.mktemp("long"), s000=make_embeddings(12_000))
    for number in range(1, 100):
        os.link(folder / "s000.npy", folder / f"s{number:03}.npy")
    return folder


@contextlib.contextmanager
def half_way(source: Path, out: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    """A real run that has finished some of its shards, and is killed in the end if it is there."""
    command = [sys.executable, "-m", "aesthetic_filter", "score", str(source), "--out", str(out)]
    with subprocess.Popen(
        [*command, "--workers", "1", *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            until = time.monotonic() + 60
            while len(parts(out)) < 3:
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < until
                time.sleep(0.002)
            yield process
        finally:
            process.kill()


def test_ctrl_c_half_way(tmp_path: Path, long_source: Path, cli: Run) -> None:
    out = tmp_path / "s"
    with half_way(long_source, out) as process:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "the same command goes on" in errors
    assert "Traceback" not in errors
    before = state(out)
    assert 3 <= len(before) < 100
    assert f"{len(before)} of 100 shards" in errors
    assert leftovers(out) == []
    assert run_file(out)["status"] == "incomplete"

    done = cli("score", long_source, "--out", out)
    assert done.returncode == 0, done.stderr
    assert f"{len(before)} shards from before" in done.stdout
    assert before.items() <= state(out).items()
    assert run_file(out)["rows"] == 1_200_000
    assert sum(pq.ParquetFile(p).metadata.num_rows for p in parts(out)) == 1_200_000


def test_a_second_run_into_the_same_folder_is_refused(
    tmp_path: Path, long_source: Path, cli: Run
) -> None:
    out = tmp_path / "s"
    with half_way(long_source, out) as first:
        first.send_signal(signal.SIGSTOP)
        os.waitpid(first.pid, os.WUNTRACED)  # until it stands still: the signal takes a moment
        before = state(out)
        second = cli("score", long_source, "--out", out)
        overwriting = cli("score", long_source, "--out", out, "--overwrite")
        assert state(out) == before
        first.send_signal(signal.SIGCONT)
        printed, errors = first.communicate(timeout=60)
    for refused in (second, overwriting):
        assert refused.returncode == 2
        assert f"another run (process {first.pid})" in refused.stderr
        assert len(refused.stderr.splitlines()) == 1
    assert first.returncode == 0, errors
    assert "1,200,000 rows in 100 shards" in printed
    assert leftovers(out) == []


def test_a_shard_that_vanishes_half_way_ends_the_run(
    tmp_path: Path, long_source: Path, cli: Run
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for shard in sorted(long_source.iterdir())[:50]:
        os.link(shard, folder / shard.name)
    out = tmp_path / "s"
    with half_way(folder, out) as process:
        (folder / "s049.npy").unlink()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "s049.npy" in errors
    assert "gone" in errors
    assert len(errors.splitlines()) == 1
    before = state(out)
    assert len(before) == 49
    assert leftovers(out) == []

    os.link(folder / "s000.npy", folder / "s049.npy")
    assert cli("score", folder, "--out", out).returncode == 0
    assert before.items() <= state(out).items()
    assert run_file(out)["rows"] == 600_000


def test_an_error_in_the_callers_own_code_passes_through(tmp_path: Path, source: Path) -> None:
    def fail(_: af.Progress) -> None:
        raise RuntimeError("theirs")

    with pytest.raises(RuntimeError, match="theirs"):
        af.score(source, tmp_path / "s", on_progress=fail)
    assert leftovers(tmp_path / "s") == []
    assert len(af.score(source, tmp_path / "s")) == 18
