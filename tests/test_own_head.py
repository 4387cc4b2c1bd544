"""A head of one's own: its embeddings are found again, its labels weighted, its origin told."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file
from scipy.stats import spearmanr

import aesthetic_filter as af
from aesthetic_filter.errors import OutputError, ShardError, SourceError, SpaceError, UsageError
from aesthetic_filter.heads import Head, load_head, save_head
from aesthetic_filter.labels import read_labels
from aesthetic_filter.own_head import train_head
from aesthetic_filter.scores import open_scores
from aesthetic_filter.stored import stored_embeddings
from aesthetic_filter.train import train
from conftest import Run
from images import EXACT, REFERENCE, jpeg, parts, rows, write_files

Make = Callable[..., NDArray[Any]]
Places = list[tuple[int, int]]


def same_bits(found: NDArray[Any], wanted: NDArray[Any]) -> bool:
    """Whether arrays are of one type, one shape and the same bytes."""
    same = (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    return same and found.tobytes() == np.ascontiguousarray(wanted).tobytes()


def picked(sizes: Sequence[int], count: int, seed: int = 0) -> Places:
    """Places from all parts, in no order, some twice."""
    chance = np.random.default_rng(seed)
    found = [(part, int(chance.integers(size))) for part, size in enumerate(sizes)]
    for _ in range(count - len(sizes)):
        part = int(chance.integers(len(sizes)))
        found.append((part, int(chance.integers(sizes[part]))))
    found += found[:2]
    return [found[k] for k in chance.permutation(len(found))]


def write_parquet(
    path: Path, vectors: NDArray[Any], kind: str, missing: Iterable[int] = (), group: int = 7
) -> None:
    """Embeddings as a fixed-size or variable list column; some rows null."""
    gone = set(missing)
    values = [None if row in gone else vector for row, vector in enumerate(vectors)]
    element = pa.from_numpy_dtype(vectors.dtype)
    width = vectors.shape[1]
    column = pa.array(values, pa.list_(element, width) if kind == "fixed" else pa.list_(element))
    ids = [f"{path.stem}/{row}" for row in range(len(vectors))]
    table = pa.table({"image_id": ids, "embedding": column, "width": [5] * len(vectors)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group)


# Embeddings, found again.


def test_npy_shards(tmp_path: Path, make_embeddings: Make) -> None:
    """More rows than one batch, and places in no order."""
    sizes = (11, 5000, 1)
    shards = [make_embeddings(size, seed=k, scale=9.0) for k, size in enumerate(sizes)]
    (tmp_path / "in").mkdir()
    for k, shard in enumerate(shards):
        np.save(tmp_path / f"in/{k}.npy", shard)
    scores = af.score(tmp_path / "in", tmp_path / "scores")
    places = [*picked(sizes, 60), (1, 4999), (1, 4096), (1, 4095), (1, 0)]
    found = stored_embeddings(scores, places)
    assert same_bits(found, np.stack([shards[part][row] for part, row in places]))
    ids = [rows(tmp_path / "scores")[k]["image_id"] for k in (0, 11, 5011)]
    assert ids == ["0.npy#0", "1.npy#0", "2.npy"]
    assert same_bits(stored_embeddings(scores, [(1, 4097)]), shards[1][4097:4098])
    assert stored_embeddings(scores, []).shape == (0, 0)


def test_shards_of_two_precisions(tmp_path: Path, make_embeddings: Make) -> None:
    half, single = make_embeddings(9), make_embeddings(9, seed=1, dtype=np.float32)
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in/0.npy", half)
    np.save(tmp_path / "in/1.npy", single)
    scores = af.score(tmp_path / "in", tmp_path / "scores")
    found = stored_embeddings(scores, [(1, 3), (0, 8), (1, 0)])
    assert same_bits(found, np.stack([single[3], half[8].astype(np.float32), single[0]]))
    assert same_bits(stored_embeddings(scores, [(0, 8)]), half[8:])


@pytest.mark.parametrize("kind", ["fixed", "list"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_parquet_shards(tmp_path: Path, make_embeddings: Make, dtype: Any, kind: str) -> None:
    """Several row groups, and rows whose embedding is null."""
    shards = [make_embeddings(size, seed=size, dtype=dtype) for size in (40, 23)]
    missing = {0: {3, 7, 8}, 1: {22}}
    for part, shard in enumerate(shards):
        write_parquet(tmp_path / f"in/{part}.parquet", shard, kind, missing[part])
    scores = af.score(tmp_path / "in", tmp_path / "scores")
    places = [(0, 3), (1, 22), *picked((40, 23), 30, seed=1), (0, 39), (0, 7)]
    found = stored_embeddings(scores, places)
    wanted = np.stack([shards[part][row] for part, row in places])
    wanted[[row in missing[part] for part, row in places]] = np.nan
    assert found.dtype == dtype
    assert np.array_equal(found, wanted, equal_nan=True)
    usable = ~np.isnan(wanted[:, 0])
    assert same_bits(found[usable], wanted[usable])
    assert 4 <= np.count_nonzero(~usable) < len(places)


def test_a_shard_without_any_embedding(tmp_path: Path, make_embeddings: Make) -> None:
    """A list column of nulls does not tell how long its lists would be."""
    some = make_embeddings(12)
    write_parquet(tmp_path / "in/0.parquet", some, "list")
    write_parquet(tmp_path / "in/1.parquet", some, "list", missing=range(12))
    scores = af.score(tmp_path / "in", tmp_path / "scores")
    found = stored_embeddings(scores, [(1, 2), (0, 4), (1, 11)], 768)
    assert np.isnan(found[[0, 2]]).all()
    assert same_bits(found[1], some[4])


def test_a_list_column_with_mostly_other_lengths(tmp_path: Path, make_embeddings: Make) -> None:
    """What was scored is what is trained on: embeddings of the head's width."""
    some = make_embeddings(3)
    write_parquet(tmp_path / "in/0.parquet", make_embeddings(9, seed=1), "list")
    values = [some[0], *[[0.5] * 4] * 5, some[1], some[2]]
    column = pa.array(values, pa.list_(pa.float16()))
    pq.write_table(pa.table({"embedding": column}), tmp_path / "in/1.parquet")
    scores = af.score(tmp_path / "in", tmp_path / "scores")
    assert scores.scored == 9 + 3
    assert same_bits(stored_embeddings(scores, [(1, 7), (1, 0), (1, 6)], 768), some[[2, 0, 1]])


def test_columns_with_names_of_their_own(tmp_path: Path, make_embeddings: Make) -> None:
    """The columns that were scored by name are read by name again."""
    right, wrong = make_embeddings(8), make_embeddings(8, seed=1)
    kind = pa.list_(pa.float16(), 768)
    table = pa.table(
        {
            "embedding": pa.array(list(wrong), kind),
            "mine": pa.array(list(right), kind),
            "name": [f"image {row}" for row in range(8)],
        }
    )
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in/0.parquet")
    scores = af.score(
        tmp_path / "in", tmp_path / "scores", embedding_column="mine", id_column="name", columns=[]
    )
    assert same_bits(stored_embeddings(scores, [(0, 5), (0, 2)]), right[[5, 2]])


@pytest.mark.parametrize("given", ["in", "in/img_emb"])
def test_clip_retrieval(tmp_path: Path, make_embeddings: Make, given: str) -> None:
    shards = [make_embeddings(size, seed=size) for size in (13, 9)]
    for folder in ("img_emb", "metadata"):
        (tmp_path / "in" / folder).mkdir(parents=True)
    for part, shard in enumerate(shards):
        np.save(tmp_path / f"in/img_emb/img_emb_{part}.npy", shard)
        table = pa.table({"image_path": [f"{part}-{row}.jpg" for row in range(len(shard))]})
        pq.write_table(table, tmp_path / f"in/metadata/metadata_{part}.parquet", row_group_size=4)
    scores = af.score(tmp_path / given, tmp_path / "scores")
    assert scores.provenance["format"] == "clip-retrieval"
    places = picked((13, 9), 15)
    wanted = np.stack([shards[part][row] for part, row in places])
    assert same_bits(stored_embeddings(scores, places), wanted)


@pytest.fixture(scope="module")
def of_images(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fourteen images in two shards' worth of scores, one of them broken."""
    folder = tmp_path_factory.mktemp("images")
    files = {f"{k:02d}.jpg": jpeg(k) for k in range(14)}
    write_files(folder / "photos", {**files, "05.jpg": b"no image"})
    af.score(folder / "photos", folder / "scores", images=EXACT, model_dir=model_dir)
    return folder


@pytest.mark.parametrize("group", [3, 1000])
def test_embeddings_beside_the_scores(of_images: Path, tmp_path: Path, group: int) -> None:
    """Those of images lie in the scores; the images themselves are not needed."""
    shutil.copytree(of_images / "scores", tmp_path / "scores")
    (part,) = parts(tmp_path / "scores")
    with pq.ParquetFile(part) as file:
        table = file.read().replace_schema_metadata(file.metadata.metadata)
    pq.write_table(table, part, row_group_size=group)
    scores = open_scores(tmp_path / "scores")
    stored = table.column("embedding").to_pylist()
    places = [(0, row) for row in (13, 0, 5, 7, 7, 2)]
    found = stored_embeddings(scores, places)
    wanted = np.array([stored[row] or [np.nan] * 768 for _, row in places], np.float16)
    assert np.isnan(wanted).all(axis=1).tolist() == [False, False, True, False, False, False]
    assert found.dtype == np.float16
    assert np.array_equal(found, wanted, equal_nan=True)
    with pytest.raises(ShardError, match="has no row 14 any more"):
        stored_embeddings(scores, [(0, 14)])


def test_scores_of_a_scores_folder(of_images: Path, tmp_path: Path) -> None:
    shutil.copytree(of_images / "scores", tmp_path / "first")
    again = af.score(tmp_path / "first", tmp_path / "second", head="laion-v1")
    assert "embedding" not in pq.read_schema(again.files[0]).names
    (part,) = parts(tmp_path / "first")
    stored = pq.read_table(part, columns=["embedding"]).column(0).to_pylist()
    places = [(0, row) for row in (9, 5, 1)]
    found = stored_embeddings(again, places)
    wanted = np.array([stored[row] or [np.nan] * 768 for _, row in places], np.float16)
    assert np.array_equal(found, wanted, equal_nan=True)
    shutil.rmtree(tmp_path / "first")
    with pytest.raises(SourceError, match="first: there is nothing there"):
        stored_embeddings(again, places)


def test_a_shard_that_changed_or_vanished(tmp_path: Path, make_embeddings: Make) -> None:
    shards = [make_embeddings(6, seed=k) for k in range(3)]
    (tmp_path / "in").mkdir()
    for k, shard in enumerate(shards):
        np.save(tmp_path / f"in/part-{k}.npy", shard)
    scores = af.score(tmp_path / "in", tmp_path / "scores")
    np.save(tmp_path / "in/part-1.npy", make_embeddings(7, seed=9))
    (tmp_path / "in/part-2.npy").unlink()
    with pytest.raises(ShardError, match=r"^part-1\.npy: has changed since it was scored") as seen:
        stored_embeddings(scores, [(0, 1), (1, 1)])
    assert seen.value.shard == "part-1.npy"
    with pytest.raises(ShardError, match=r"^part-2\.npy: .* is gone now") as seen:
        stored_embeddings(scores, [(2, 0), (0, 1)])
    assert seen.value.shard == "part-2.npy"
    # What is still as it was can be had.
    assert same_bits(stored_embeddings(scores, [(0, 4)]), shards[0][4:5])
    shutil.rmtree(tmp_path / "in")
    with pytest.raises(SourceError, match="in: there is nothing there"):
        stored_embeddings(scores, [(0, 4)])


def test_what_was_chosen_does_not_tell_where_its_embeddings_are(
    tmp_path: Path, make_embeddings: Make
) -> None:
    np.save(tmp_path / "in.npy", make_embeddings(30))
    scores = af.score(tmp_path / "in.npy", tmp_path / "scores")
    scores.select(top=5).write(tmp_path / "kept")
    for kept in (tmp_path / "kept", tmp_path / "kept/kept.parquet"):
        with pytest.raises(OutputError, match="give the scores that it was chosen from") as seen:
            stored_embeddings(open_scores(kept), [(0, 0)])
        assert "kept.parquet: is no part of a scores folder" in str(seen.value)


# Training.


class World:
    """900 embeddings in two shards, their scores, and what people say of them."""

    def __init__(self, folder: Path, make_embeddings: Make) -> None:
        self.folder = folder
        self.vectors = make_embeddings(900, seed=11)
        self.vectors[17] = 0
        (folder / "in").mkdir()
        np.save(folder / "in/a.npy", self.vectors[:500])
        np.save(folder / "in/b.npy", self.vectors[500:])
        self.ids = [f"a.npy#{k}" for k in range(500)] + [f"b.npy#{k}" for k in range(400)]
        self.scores = af.score(folder / "in", folder / "scores")
        unit = self.vectors.astype(np.float64)
        unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-9)
        liking = unit @ np.random.default_rng(5).standard_normal(768)
        self.liking = (liking - liking.mean()) / liking.std()
        chance = np.random.default_rng(6)
        self.ratings = np.round(5 + self.liking + 0.3 * chance.standard_normal(900), 2)
        self.keep = self.ratings > 5
        # To be labelled: of both shards, in no order, none of them the one that failed.
        order = chance.permutation(900)
        self.chosen = order[order != 17][:240]

    def word(self, row: int) -> str:
        return "keep" if self.keep[row] else "drop"

    def write(self, path: Path, header: str, records: Iterable[Sequence[object]]) -> Path:
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header.split(","), *records])
        return path

    def labels(self, path: Path, rows: NDArray[Any] | None = None) -> Path:
        rows = self.chosen if rows is None else rows
        words = [(self.ids[k], self.word(k)) for k in rows]
        return self.write(path, "image_id,label", words)

    def rated(self, path: Path, rows: NDArray[Any] | None = None) -> Path:
        rows = self.chosen if rows is None else rows
        return self.write(path, "image_id,rating", [(self.ids[k], self.ratings[k]) for k in rows])


@pytest.fixture(scope="module")
def world(make_embeddings: Make, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"), make_embeddings)


@pytest.fixture(scope="module")
def reference() -> Head:
    return load_head()


def said(text: str) -> str:
    return " ".join(text.split())


def test_labels_become_a_head_that_scores(world: World, tmp_path: Path, cli: Run) -> None:
    """The whole way on the command line: labels, head, new scores."""
    words = [
        (world.ids[k], world.word(k), ("Ann", "Björn, 2nd")[n % 2])
        for n, k in enumerate(world.chosen)
    ]
    words += [("not/there.jpg", "keep", "Ann"), (world.ids[17], "drop", "Ann")]
    words += [("nor/this.jpg", "skip", "Ann")]
    labels = world.write(tmp_path / "labels.csv", "image_id,label,reviewer", words)
    scores = world.folder / "scores"
    done = cli("train", "labels.csv", "--scores", scores, "--out", "my.safetensors")
    assert (done.returncode, done.stderr) == (0, "")
    assert "my: 240 keep/drop labels of 240 different images, 5 folds" in done.stdout
    assert "labels of images without a score here, left out: 2" in done.stdout
    assert "written to my.safetensors\n" in done.stdout
    assert "--head my.safetensors" in done.stdout

    head = load_head(tmp_path / "my.safetensors")
    assert (head.name, head.affine, head.width) == ("my", True, 768)
    source = head.provenance["source"]
    digest = hashlib.sha256(labels.read_bytes()).hexdigest()[:12]
    assert source.startswith(
        f"trained on 240 keep/drop labels (labels.csv, sha256 {digest}) by Ann, Björn, 2nd, "
        f"embeddings of {world.folder / 'in'}; logistic, 5 folds: held-out AUC 0."
    )
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("AUC  "))
    mine, theirs = line.removeprefix("AUC").split(") ")
    assert f"held-out AUC {mine.strip()})" in source
    assert f"the head it started from {theirs.strip()}" in source

    shown = cli("heads", "show", "my.safetensors")
    assert shown.returncode == 0
    assert source in shown.stdout
    assert head.sha256 in shown.stdout

    again = cli("score", world.folder / "in", "--head", "my.safetensors", "--out", "new")
    assert again.returncode == 0, again.stderr
    tensors = load_file(tmp_path / "my.safetensors")
    good = np.arange(900) != 17
    x = world.vectors[good].astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    wanted = x @ tensors["layers.0.weight"][0].astype(np.float64) + float(
        tensors["layers.0.bias"][0]
    )
    found = {row["image_id"]: row["aesthetic_score"] for row in rows(tmp_path / "new")}
    got = np.array([found[image] for image, ok in zip(world.ids, good, strict=True) if ok])
    assert np.abs(got - wanted).max() < 1e-4
    # It has learnt something about images that nobody labelled.
    rest = np.setdiff1d(np.flatnonzero(good), world.chosen)
    new = np.array([found[world.ids[k]] for k in rest])
    assert spearmanr(new, world.liking[rest]).statistic > 0.3
    summary = cli("summary", "new", "--json")
    assert json.loads(summary.stdout)["provenance"]["head"]["sha256"] == head.sha256


def test_ratings_become_a_head_on_their_scale(world: World, tmp_path: Path, cli: Run) -> None:
    world.rated(tmp_path / "rated.csv")
    options = ("--folds", 4, "--seed", 3, "--licence", "CC0", "--name", "given")
    done = cli(
        *("train", "rated.csv", "--scores", world.folder / "scores", "-o", "x.safetensors"),
        *options,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "given: 240 ratings of 240 different images, 4 folds" in done.stdout
    head = load_head(tmp_path / "x.safetensors")
    assert head.name == "given"
    assert head.provenance["licence"] == "CC0"
    assert head.provenance["scale"].startswith("the ratings' own, which lie from ")
    assert "trained on 240 ratings (rated.csv, sha256 " in head.provenance["source"]
    assert "; ridge, 4 folds: held-out SRCC 0." in head.provenance["source"]
    assert ") by " not in head.provenance["source"]
    found = head(world.vectors[world.chosen])
    assert found.mean() == pytest.approx(world.ratings[world.chosen].mean(), abs=0.05)


def test_it_is_trained_on_the_labels_and_nothing_else(
    world: World, tmp_path: Path, reference: Head
) -> None:
    """The same as training on the embeddings of the source by hand."""
    some = world.chosen[:150]
    for kind, path in (
        ("logistic", world.labels(tmp_path / "l.csv", some)),
        ("ridge", world.rated(tmp_path / "r.csv", some)),
    ):
        found = train_head(
            read_labels(path), world.scores, name="it", reference=reference, seed=2, folds=3
        )
        wanted = train(
            world.vectors[some],
            (world.keep if kind == "logistic" else world.ratings)[some].astype(float),
            [world.ids[k] for k in some],
            kind=kind,
            name="it",
            reference=reference,
            seed=2,
            folds=3,
        )
        assert found.kind == kind
        assert found.head.sha256 == wanted.head.sha256
        assert (found.ours, found.reference, found.better) == (
            wanted.ours,
            wanted.reference,
            wanted.better,
        )
        assert found.notes == wanted.notes
        assert "sha256" not in found.head.provenance["source"]


def test_several_reviewers_of_one_image(world: World, tmp_path: Path, reference: Head) -> None:
    """The target is the share that would keep it; ratings that happen to be 0 or 1 stay ratings."""
    words, targets = [], []
    for k in world.chosen[:120]:
        second = bool(k % 3)
        words += [(world.ids[k], world.word(k), "a")]
        words += [(world.ids[k], ("drop", "keep")[second], "b")]
        targets.append((float(world.keep[k]) + second) / 2)
    path = world.write(tmp_path / "l.csv", "image_id,label,reviewer", words)
    found = train_head(read_labels(path), world.scores, name="it", reference=reference)
    chosen = world.chosen[:120]
    wanted = train(
        world.vectors[chosen],
        targets,
        [world.ids[k] for k in chosen],
        kind="logistic",
        name="it",
        reference=reference,
    )
    assert found.kind == "logistic"
    assert found.head.sha256 == wanted.head.sha256


def test_labels_of_a_stratified_sample_are_weighted(
    world: World, tmp_path: Path, reference: Head
) -> None:
    """Each counts for N_h / n_h images, where n_h are those of its stratum with a score here."""
    stored = {row["image_id"]: row["aesthetic_score"] for row in rows(world.folder / "scores")}
    values = np.array([np.nan if (s := stored[image]) is None else s for image in world.ids])
    edges = np.nanquantile(values, [0.3, 0.6, 0.85])
    stratum = np.searchsorted(edges, values, side="right")
    chance = np.random.default_rng(1)
    taken = [
        chance.choice(np.flatnonzero((stratum == h) & ~np.isnan(values)), size, replace=False)
        for h, size in enumerate((20, 30, 70, 60))
    ]
    names = [f"{low:g} to {high:g}" for low, high in ((-9, 4.8), (4.8, 5), (5, 5.2), (5.2, 19))]
    sizes = [int(np.count_nonzero((stratum == h) & ~np.isnan(values))) for h in range(4)]
    order = chance.permutation(np.concatenate(taken))
    records: list[tuple[object, ...]] = [
        (
            world.ids[k],
            world.word(k),
            "me",
            "2024-05-06T07:08:09+00:00",
            values[k],
            names[stratum[k]],
            sizes[stratum[k]],
        )
        for k in order
    ]
    # One more label in the first stratum, of an image that has no score here: not one of n_h.
    records.insert(3, ("gone.jpg", "keep", "me", "", "", names[0], sizes[0]))
    header = "image_id,label,reviewer,labelled_at,aesthetic_score,stratum,stratum_rows"
    labels = read_labels(world.write(tmp_path / "l.csv", header, records))
    assert labels.strata is not None
    found = train_head(labels, world.scores, name="it", reference=reference)
    weights = np.array([sizes[h] / (20, 30, 70, 60)[h] for h in stratum[order]])
    assert weights.max() / weights.min() > 5

    def by_hand(weights: NDArray[Any] | None) -> str:
        return train(
            world.vectors[order],
            world.keep[order].astype(float),
            [world.ids[k] for k in order],
            kind="logistic",
            name="it",
            reference=reference,
            weights=weights,
        ).head.sha256

    assert found.rows == 180
    assert found.head.sha256 == by_hand(weights)
    assert found.head.sha256 != by_hand(None)
    assert "labels of images without a score here, left out: 1" in found.notes


def test_the_same_seed_gives_the_same_bytes(
    world: World, tmp_path: Path, cli: Run, reference: Head
) -> None:
    """Whether on the command line or not."""
    labels = world.labels(tmp_path / "l.csv", world.chosen[:80])
    done = cli(
        *("train", "l.csv", "--scores", world.folder / "scores", "--name", "it"),
        *("--out", "cli.safetensors", "--seed", 4),
    )
    assert done.returncode == 0, done.stderr
    for name, seed in (("one", 4), ("two", 4), ("three", 5)):
        found = train_head(
            read_labels(labels),
            world.scores,
            name="it",
            reference=reference,
            seed=seed,
            labels_path=labels,
        )
        save_head(found.head, tmp_path / f"{name}.safetensors")
    first = (tmp_path / "cli.safetensors").read_bytes()
    made = [(tmp_path / f"{name}.safetensors").read_bytes() for name in ("one", "two", "three")]
    assert first == made[0] == made[1] != made[2]
    assert not list(tmp_path.glob("*.tmp"))


def test_ratings_taken_for_labels(world: World, tmp_path: Path, reference: Head) -> None:
    some = world.chosen[:100]
    path = world.rated(tmp_path / "r.csv", some)
    found = train_head(
        read_labels(path, keep_from=4.6), world.scores, name="it", reference=reference
    )
    wanted = train(
        world.vectors[some],
        (world.ratings[some] >= 4.6).astype(float),
        [world.ids[k] for k in some],
        name="it",
        reference=reference,
    )
    assert (found.kind, found.measure) == ("logistic", "AUC")
    assert found.head.sha256 == wanted.head.sha256


def test_names_for_a_terminal(world: World, tmp_path: Path, reference: Head) -> None:
    """What a label file says of itself cannot draw on the terminal that `heads show` prints to."""
    words = [(world.ids[k], world.word(k), "\x1b[2Jme") for k in world.chosen[:50]]
    path = world.write(tmp_path / "l\x1b[1m.csv", "image_id,label,reviewer", words)
    found = train_head(
        read_labels(path), world.scores, name="it", reference=reference, labels_path=path
    )
    source = found.head.provenance["source"]
    assert source.isprintable()
    assert "(l\\x1b[1m.csv, sha256 " in source
    assert ") by \\x1b[2Jme, " in source


def test_a_head_to_start_from(world: World, tmp_path: Path, cli: Run) -> None:
    """Another reference is heeded; one of another space, or with layers, is refused."""
    world.labels(tmp_path / "l.csv", world.chosen[:60])
    scores = world.folder / "scores"
    done = cli("train", "l.csv", "--scores", scores, "--out", "x.safetensors", "--head", "laion-v1")
    assert done.returncode == 0, done.stderr
    assert "laion-v1" in load_head(tmp_path / "x.safetensors").provenance["scale"]

    weight, bias = load_head().layers[0]
    save_head(Head("odd", "another/space", ((weight, bias),)), tmp_path / "odd.safetensors")
    done = cli(
        *("train", "l.csv", "--scores", scores, "--out", "y.safetensors"),
        *("--head", "odd.safetensors"),
    )
    assert done.returncode == SpaceError.exit_code == 4
    assert "the head 'odd' is for another/space" in said(done.stderr)
    assert not (tmp_path / "y.safetensors").exists()

    layers = ((np.eye(768, dtype=np.float32), np.zeros(768, np.float32)), (weight, bias))
    with pytest.raises(UsageError, match="training starts from an affine head"):
        train_head(
            read_labels(tmp_path / "l.csv"),
            world.scores,
            name="it",
            reference=Head("deep", load_head().space, layers),
        )


# What cannot be done.


@pytest.fixture
def refused(world: World, tmp_path: Path, cli: Run) -> Callable[..., str]:
    """Run ``train``; it must exit with 2 and leave no head behind. Gives the message."""

    def run(labels: Path, *options: object, out: str = "my.safetensors") -> str:
        before = {path: path.is_dir() for path in tmp_path.rglob("*")}
        done = cli("train", labels, "--scores", world.folder / "scores", "--out", out, *options)
        assert done.returncode == 2, (done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        assert done.stdout == ""
        assert {path: path.is_dir() for path in tmp_path.rglob("*")} == before
        return said(done.stderr)

    return run


def test_labels_of_other_images(world: World, tmp_path: Path, refused: Callable[..., str]) -> None:
    labels = world.write(
        tmp_path / "l.csv",
        "image_id,label",
        [("x", "keep"), ("y", "drop"), (world.ids[17], "drop")],
    )
    assert "no label is of an image that has a score here" in refused(labels)


def test_too_few_labels(world: World, tmp_path: Path, refused: Callable[..., str]) -> None:
    message = refused(world.labels(tmp_path / "l.csv", world.chosen[:19]))
    assert "19 usable rows of 19 different images are too few" in message
    assert "needs at least 20" in message


@pytest.mark.parametrize("kept", [0, 1, 4])
def test_hardly_any_of_a_class(world: World, tmp_path: Path, reference: Head, kept: int) -> None:
    words = [(world.ids[k], "keep" if n < kept else "drop") for n, k in enumerate(world.chosen)]
    labels = read_labels(world.write(tmp_path / "l.csv", "image_id,label", words))
    with pytest.raises(UsageError, match=f"the labels keep {kept} images and drop {240 - kept}: "):
        train_head(labels, world.scores, name="it", reference=reference)


def test_one_class_only(world: World, tmp_path: Path, refused: Callable[..., str]) -> None:
    words = [(world.ids[k], "keep") for k in world.chosen]
    message = refused(world.write(tmp_path / "l.csv", "image_id,label", words))
    assert "the labels keep 240 images and drop 0: training needs at least 5 of either" in message


def test_ratings_all_alike(world: World, tmp_path: Path, reference: Head) -> None:
    words = [(world.ids[k], 3.5) for k in world.chosen]
    labels = read_labels(world.write(tmp_path / "l.csv", "image_id,rating", words))
    with pytest.raises(UsageError, match=r"all 240 ratings are 3\.5"):
        train_head(labels, world.scores, name="it", reference=reference)


def test_a_file_that_is_not_called_a_head(
    world: World, tmp_path: Path, refused: Callable[..., str]
) -> None:
    labels = world.labels(tmp_path / "l.csv")
    out = "my.safetensors.bak"
    assert f"{out}: a head file ends in .safetensors" in refused(labels, out=out)


def test_a_place_that_cannot_be_written(
    world: World, tmp_path: Path, refused: Callable[..., str]
) -> None:
    labels = world.labels(tmp_path / "l.csv", world.chosen[:60])
    (tmp_path / "file").write_text("mine")
    out = "file/my.safetensors"
    assert f"{out}: cannot be written: " in refused(labels, out=out)


def test_keep_from_goes_with_ratings(
    world: World, tmp_path: Path, refused: Callable[..., str]
) -> None:
    message = refused(world.labels(tmp_path / "l.csv"), "--keep-from", 3)
    assert "holds labels, not ratings; --keep-from goes with ratings" in message


def test_a_source_that_changed(
    world: World, tmp_path: Path, cli: Run, make_embeddings: Make
) -> None:
    np.save(tmp_path / "in.npy", make_embeddings(60))
    af.score(tmp_path / "in.npy", tmp_path / "scores")
    words = [(f"in.npy#{k}", ("keep", "drop")[k % 2]) for k in range(60)]
    world.write(tmp_path / "l.csv", "image_id,label", words)
    np.save(tmp_path / "in.npy", make_embeddings(61))
    done = cli("train", "l.csv", "--scores", "scores", "--out", "my.safetensors")
    assert (done.returncode, done.stdout) == (1, "")
    assert "in.npy: has changed since it was scored" in said(done.stderr)
    assert not (tmp_path / "my.safetensors").exists()


def test_scores_that_were_chosen_from_others(world: World, tmp_path: Path, reference: Head) -> None:
    world.scores.select(top=100).write(tmp_path / "kept")
    kept = open_scores(tmp_path / "kept")
    ids = [row["image_id"] for row in rows(tmp_path / "kept")]
    words = [(image, ("keep", "drop")[k % 2]) for k, image in enumerate(ids)]
    labels = read_labels(world.write(tmp_path / "l.csv", "image_id,label", words))
    with pytest.raises(OutputError, match="give the scores that it was chosen from"):
        train_head(labels, kept, name="it", reference=reference)


def test_the_reference_is_the_default(world: World, tmp_path: Path, reference: Head) -> None:
    """Labels that the reference head explains give it back, recalibrated, and say so."""
    assert reference.name == REFERENCE
    stored = {row["image_id"]: row["aesthetic_score"] for row in rows(world.folder / "scores")}
    middle = np.median([stored[world.ids[k]] for k in world.chosen])
    words = [
        (world.ids[k], "keep" if stored[world.ids[k]] > middle else "drop") for k in world.chosen
    ]
    labels = read_labels(world.write(tmp_path / "l.csv", "image_id,label", words))
    found = train_head(labels, world.scores, name="it", reference=reference)
    assert found.agreement > 0.95
    assert found.reference.auc is not None
    assert found.reference.auc.estimate == 1
    assert any("keep using" in note or "recalibrated" in note for note in found.notes)
