"""Wrong input shows: the threshold on both of its sides, with real data."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

import aesthetic_filter as af
from aesthetic_filter.errors import ForeignEmbeddingsError, SpaceError, WidthError
from aesthetic_filter.heads.head import CLIP_VIT_L_14, FOREIGN_BELOW

Make = Callable[..., NDArray[Any]]
Run = Callable[..., "subprocess.CompletedProcess[str]"]

TEXT = "not-clip-l14-image"
IMAGES = ("laion-rating-prototypes", "style-averages")


def true_cosines(folder: Path, reference_from: Path) -> NDArray[np.float64]:
    """Cosines of a folder's vectors to the normalised mean of the prototypes, in float64."""
    prototypes = [np.load(p).reshape(-1) for p in sorted(reference_from.glob("*.npy"))]
    reference = np.mean(np.array(prototypes, np.float64), axis=0)
    reference /= np.linalg.norm(reference)
    loaded = [np.atleast_2d(np.load(p)).astype(np.float64) for p in sorted(folder.glob("*.npy"))]
    rows = np.concatenate([a.reshape(-1, 768) for a in loaded])
    return rows @ reference / np.linalg.norm(rows, axis=1)


def at_cosine(cosine: float, rows: int, make: Make, seed: int = 0) -> NDArray[np.float32]:
    """Vectors with exactly this cosine to the reference direction."""
    from aesthetic_filter.heads.head import reference_direction

    reference = reference_direction().astype(np.float64)
    reference /= np.linalg.norm(reference)
    across = make(rows, seed, np.float64) - 0.6 * reference
    across /= np.linalg.norm(across, axis=1, keepdims=True)
    vectors = cosine * reference + np.sqrt(1 - cosine**2) * across
    return vectors.astype(np.float32)


def facts(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "_run.json").read_text())
    return found


def test_the_threshold_lies_between_the_real_ones(shared: Path) -> None:
    folder = shared / "embeddings"
    reference = folder / "laion-rating-prototypes"
    images = np.concatenate([true_cosines(folder / name, reference) for name in IMAGES])
    text = true_cosines(folder / TEXT, reference)
    # 0.43: the lowest of 1,415 real image embeddings, by the notes on the data.
    assert text.max() < 0.27
    assert text.max() + 0.05 < FOREIGN_BELOW < 0.43 - 0.05
    assert images.min() > 0.65


@pytest.mark.parametrize("name", IMAGES)
def test_real_image_embeddings_pass(name: str, shared: Path, tmp_path: Path) -> None:
    folder = shared / "embeddings" / name
    af.score(folder, out=tmp_path / "out")
    table = pq.read_table(tmp_path / "out")
    assert table["error"].null_count == table.num_rows
    assert facts(tmp_path / "out")["foreign"] == 0
    cosines = true_cosines(folder, shared / "embeddings" / "laion-rating-prototypes")
    by_id = dict(
        zip(table["image_id"].to_pylist(), table["reference_cosine"].to_pylist(), strict=True)
    )
    found = [by_id[path.name] for path in sorted(folder.glob("*.npy"))]
    np.testing.assert_allclose(found, cosines, atol=1e-6)


def test_embeddings_of_text_are_refused(shared: Path, tmp_path: Path, cli: Run) -> None:
    ran = cli("score", shared / "embeddings" / TEXT, "--out", "out")
    assert ran.returncode == 4
    assert ran.stdout == ""
    assert "2 of 2 rows looked at" in ran.stderr
    assert "below 0.35" in ran.stderr
    assert "text" in ran.stderr
    assert "--allow-foreign" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not list(tmp_path.glob("out/*.parquet"))


def test_embeddings_of_text_are_scored_where_one_insists(shared: Path, tmp_path: Path) -> None:
    af.score(shared / "embeddings" / TEXT, out=tmp_path / "out", allow_foreign=True)
    table = pq.read_table(tmp_path / "out")
    rows = (shared / "embeddings" / "expected_scores.csv").read_text().splitlines()
    published = [float(row.split(",")[3]) for row in rows if row.startswith(TEXT)]
    np.testing.assert_allclose(table["aesthetic_score"], published, rtol=0, atol=2e-5)
    assert (facts(tmp_path / "out")["rows"], facts(tmp_path / "out")["foreign"]) == (2, 2)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_random_vectors_are_refused(dtype: Any, tmp_path: Path) -> None:
    rows = np.random.default_rng(40).standard_normal((1000, 768))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    np.save(tmp_path / "random.npy", rows.astype(dtype))
    with pytest.raises(ForeignEmbeddingsError, match="rows looked at are not") as caught:
        af.score(tmp_path / "random.npy", out=tmp_path / "out")
    assert caught.value.exit_code == 4
    assert str(tmp_path / "random.npy") in str(caught.value)


@pytest.mark.parametrize("scale", [1.0, 17.0])
def test_the_threshold_has_two_sides(scale: float, tmp_path: Path, make_embeddings: Make) -> None:
    below = at_cosine(FOREIGN_BELOW - 0.001, 50, make_embeddings) * np.float32(scale)
    above = at_cosine(FOREIGN_BELOW + 0.001, 50, make_embeddings) * np.float32(scale)
    np.save(tmp_path / "below.npy", below)
    np.save(tmp_path / "above.npy", above)
    af.score(tmp_path / "above.npy", out=tmp_path / "out")
    assert facts(tmp_path / "out")["foreign"] == 0
    with pytest.raises(ForeignEmbeddingsError, match="50 of 50 rows"):
        af.score(tmp_path / "below.npy", out=tmp_path / "other")


@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_a_minority_of_foreign_rows_is_scored_and_counted(
    kind: str, tmp_path: Path, make_embeddings: Make
) -> None:
    rows = make_embeddings(60, dtype=np.float32)
    foreign = [0, 7, 8, 30, 31, 59]
    rows[foreign] = at_cosine(0.1, len(foreign), make_embeddings, seed=9)
    if kind == "npy":
        np.save(tmp_path / "in.npy", rows)
    else:
        column = pa.array(list(rows), pa.list_(pa.float32(), 768))
        pq.write_table(pa.table({"embedding": column}), tmp_path / "in.parquet")
    af.score(tmp_path / f"in.{kind}", out=tmp_path / "out")
    table = pq.read_table(tmp_path / "out")
    assert table["error"].null_count == 60
    assert np.flatnonzero(table["reference_cosine"].to_numpy() < 0.35).tolist() == foreign
    found = facts(tmp_path / "out")
    assert (found["rows"], found["scored"], found["foreign"]) == (60, 60, 6)
    weight, bias = (a.astype(np.float64) for a in af.load_head().layers[0])
    expected = rows.astype(np.float64) @ weight[0] + bias[0]
    np.testing.assert_allclose(table["aesthetic_score"], expected, rtol=0, atol=2e-5)
    assert "6" in str(af.open_scores(tmp_path / "out").summary())


def test_a_foreign_majority_that_no_sample_shows_is_refused_in_the_end(
    tmp_path: Path, make_embeddings: Make
) -> None:
    # The look ahead sees a Parquet file's first rows; the run counts them all.
    rows = at_cosine(0.1, 500, make_embeddings)
    rows[:100] = make_embeddings(100, dtype=np.float32)
    column = pa.array(list(rows), pa.list_(pa.float32(), 768))
    pq.write_table(pa.table({"embedding": column}), tmp_path / "in.parquet")
    with pytest.raises(ForeignEmbeddingsError, match="400 of 500 rows"):
        af.score(tmp_path / "in.parquet", out=tmp_path / "out")
    assert facts(tmp_path / "out")["status"] != "complete"


def test_rows_without_a_direction_are_not_foreign(tmp_path: Path, make_embeddings: Make) -> None:
    rows = make_embeddings(30)
    rows[5:] = 0
    np.save(tmp_path / "in.npy", rows)
    af.score(tmp_path / "in.npy", out=tmp_path / "out")
    found = facts(tmp_path / "out")
    assert (found["scored"], found["failed"], found["foreign"]) == (5, 25, 0)
    np.save(tmp_path / "nothing.npy", np.zeros((4, 768), np.float16))
    af.score(tmp_path / "nothing.npy", out=tmp_path / "nothing")
    found = facts(tmp_path / "nothing")
    assert (found["scored"], found["failed"], found["foreign"]) == (0, 4, 0)


def test_foreign_shards_among_good_ones_are_told_by_the_whole_source(
    tmp_path: Path, make_embeddings: Make
) -> None:
    (tmp_path / "in").mkdir()
    for number in range(6):
        np.save(tmp_path / "in" / f"{number}.npy", make_embeddings(20, number))
    np.save(tmp_path / "in" / "6.npy", at_cosine(0.05, 20, make_embeddings))
    af.score(tmp_path / "in", out=tmp_path / "out")
    found = facts(tmp_path / "out")
    assert (found["scored"], found["foreign"]) == (140, 20)
    for number in range(5):
        np.save(tmp_path / "in" / f"{number}.npy", at_cosine(0.05, 20, make_embeddings, number))
    with pytest.raises(ForeignEmbeddingsError):
        af.score(tmp_path / "in", out=tmp_path / "again")


@pytest.mark.parametrize(
    ("width", "encoders"), [(512, "ViT-B/32"), (1024, "ViT-H/14"), (1152, "SigLIP so400m")]
)
def test_another_width_names_the_encoders_that_have_it(
    width: int, encoders: str, tmp_path: Path, cli: Run
) -> None:
    np.save(tmp_path / "in.npy", np.ones((3, width), np.float16))
    ran = cli("score", "in.npy", "--out", "out")
    assert ran.returncode == 4
    assert f"{width} values" in ran.stderr.replace(",", "")
    assert encoders in ran.stderr
    assert "Traceback" not in ran.stderr
    with pytest.raises(WidthError):
        af.score(tmp_path / "in.npy", out=tmp_path / "out", allow_foreign=True)


def stamped(path: Path, rows: NDArray[Any], stamp: dict[str, Any] | None) -> Path:
    column = pa.array(list(rows), pa.list_(pa.from_numpy_dtype(rows.dtype), 768))
    metadata = None if stamp is None else {b"aesthetic_filter": json.dumps(stamp).encode()}
    pq.write_table(pa.table({"embedding": column}, metadata=metadata), path)
    return path


def test_embeddings_stamped_with_another_space_are_refused(
    tmp_path: Path, make_embeddings: Make
) -> None:
    rows = make_embeddings(5)
    other = stamped(tmp_path / "other.parquet", rows, {"space": "siglip-so400m/image"})
    with pytest.raises(SpaceError) as caught:
        af.score(other, out=tmp_path / "out", allow_foreign=True)
    message = str(caught.value)
    assert "other.parquet" in message
    assert "siglip-so400m/image" in message
    assert CLIP_VIT_L_14 in message
    assert caught.value.exit_code == 4
    for number, stamp in enumerate((None, {}, {"space": CLIP_VIT_L_14}, {"space": None})):
        fine = stamped(tmp_path / f"fine{number}.parquet", rows, stamp)
        af.score(fine, out=tmp_path / f"out{number}")
        assert facts(tmp_path / f"out{number}")["scored"] == 5


def test_a_head_of_another_space_takes_what_is_stamped_with_it(
    tmp_path: Path, make_embeddings: Make
) -> None:
    rows = np.random.default_rng(41).standard_normal((5, 768)).astype(np.float32)
    layers = af.load_head().layers
    head = af.Head("mine", "my encoder", layers)
    af.score(
        stamped(tmp_path / "a.parquet", rows, {"space": "my encoder"}),
        out=tmp_path / "out",
        head=head,
    )
    assert facts(tmp_path / "out")["foreign"] == 0, "its direction is not known"
    with pytest.raises(SpaceError, match="stamped clip-vit-l-14"):
        af.score(
            stamped(tmp_path / "b.parquet", make_embeddings(5), {"space": CLIP_VIT_L_14}),
            out=tmp_path / "other",
            head=head,
        )
