"""The stages by themselves: on people's own objects, on tables, and in their own Ray programs."""

from __future__ import annotations

import io
import logging
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import aesthetic_filter as af
from aesthetic_filter.errors import HeadError, PipelineError
from aesthetic_filter.heads.head import reference_direction
from aesthetic_filter.table import vectors_column
from images import WITHIN, Oracle, affine, encoded, jpeg, picture, run_python, turned

Make = Callable[..., np.ndarray]

SCORES = af.ImageAestheticFilterStage(score_threshold=None)


def batch_of(vectors: Any, **options: Any) -> af.ImageBatch:
    return af.ImageBatch(
        [
            af.ImageObject(image_id=f"i{row}", embedding=vector, metadata={"row": row})
            for row, vector in enumerate(vectors)
        ],
        **options,
    )


def scores_of(batch: af.ImageBatch) -> list[float | None]:
    return [image.aesthetic_score for image in batch]


# The filter stage on objects.


def test_every_image_gets_its_score_and_the_good_ones_are_kept(make_embeddings: Make) -> None:
    vectors = make_embeddings(200, dtype=np.float32)
    expected = affine(vectors)
    threshold = float(np.median(expected))
    batch = batch_of(vectors, dataset_name="mine", metadata={"a": 1})
    kept = af.ImageAestheticFilterStage(score_threshold=threshold).process(batch)
    assert np.abs(np.array(scores_of(batch)) - expected).max() < 1e-5  # dropped ones' too
    assert [i.image_id for i in kept] == [
        f"i{row}" for row, score in enumerate(scores_of(batch)) if score >= np.float32(threshold)
    ]
    assert 90 <= len(kept) <= 110
    assert all(image.metadata == {"row": int(image.image_id[1:])} for image in kept)
    assert (kept.dataset_name, kept.metadata) == ("mine", {"a": 1})
    assert kept[0] is batch[int(kept[0].image_id[1:])]
    assert len(batch) == 200


def test_exactly_equal_is_kept(make_embeddings: Make) -> None:
    batch = batch_of(make_embeddings(50))
    SCORES.process(batch)
    at = sorted(scores_of(batch))[25]
    kept = af.ImageAestheticFilterStage(score_threshold=at).process(batch)
    assert min(scores_of(kept)) == at
    above = float(np.nextafter(np.float32(at), np.float32(10)))
    assert len(af.ImageAestheticFilterStage(score_threshold=above).process(batch)) < len(kept)


def test_the_default_threshold_is_the_references(make_embeddings: Make) -> None:
    stage = af.ImageAestheticFilterStage()
    assert stage.score_threshold == 0.5
    batch = batch_of(make_embeddings(20))
    assert len(stage.process(batch)) == 20


def test_an_empty_batch_goes_in_and_out() -> None:
    kept = SCORES.process(af.ImageBatch([], dataset_name="none"))
    assert (len(kept), kept.dataset_name) == (0, "none")
    assert len(af.ImageEmbeddingStage().process(af.ImageBatch([]))) == 0
    table = pa.table({"image_id": pa.array([], pa.string()), "embedding": vectors_column(EMPTY)})
    assert SCORES(table).num_rows == 0


EMPTY = np.empty((0, 768), np.float32)


@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(1, 40),
    size=st.integers(1, 17),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    seed=st.integers(0, 1000),
)
def test_a_score_is_the_rows_alone_bit_for_bit(rows: int, size: int, dtype: Any, seed: int) -> None:
    noise = np.random.default_rng(seed).standard_normal((rows, 768)) / 28
    vectors = (noise + reference_direction()).astype(dtype)
    together = batch_of(vectors)
    SCORES.process(together)
    pieces = af.ImageAestheticFilterStage(score_threshold=None, model_inference_batch_size=size)
    in_pieces = batch_of(vectors)
    pieces.process(in_pieces)
    alone = []
    for vector in vectors:
        single = batch_of([vector])
        SCORES.process(single)
        alone += scores_of(single)
    twice = SCORES.process(SCORES.process(batch_of(vectors)))
    table = SCORES(together.to_table()).column("aesthetic_score").to_pylist()
    head = af.load_head()(vectors).tolist()
    assert scores_of(together) == scores_of(in_pieces) == alone == scores_of(twice) == table == head


def test_one_and_a_thousand_give_the_same_bits(make_embeddings: Make) -> None:
    vectors = make_embeddings(1000, dtype=np.float32)
    batch = batch_of(vectors)
    SCORES.process(batch)
    for row in (0, 1, 500, 999):
        single = batch_of(vectors[row : row + 1])
        SCORES.process(single)
        assert single[0].aesthetic_score == batch[row].aesthetic_score


def test_what_cannot_be_scored_says_why_and_costs_only_itself(make_embeddings: Make) -> None:
    good = make_embeddings(4, dtype=np.float32)
    bad = np.where(np.arange(768) == 5, np.nan, good[0]).astype(np.float32)
    several = [good[3] * 1000, good[3].astype(np.float16), good[3].astype(np.float64)]
    listed = list(map(float, good[2]))
    batch = batch_of([good[0], None, bad, good[1][:512], np.zeros(768), listed, "text", *several])
    kept = af.ImageAestheticFilterStage().process(batch)
    assert [image.error for image in batch] == [
        None,
        "embedding is null",
        "embedding holds NaN or infinity",
        "embedding has 512 values, not 768",
        "embedding is all zeros",
        None,
        "embedding holds <U4 values; embeddings are floating-point",
        None,
        None,
        None,
    ]
    assert [i.image_id for i in kept] == ["i0", "i5", "i7", "i8", "i9"]
    expected = affine(good)
    for place, row in ((0, 0), (5, 2), (7, 3), (9, 3)):
        assert abs(batch[place].aesthetic_score - expected[row]) < 1e-5
    everything = af.ImageAestheticFilterStage(keep_dropped=True).process(batch)
    assert [i.image_id for i in everything] == [i.image_id for i in batch]


def test_dropped_and_failed_can_be_had(make_embeddings: Make) -> None:
    batch = batch_of([*make_embeddings(60), None])
    SCORES.process(batch)
    middle = sorted(score for score in scores_of(batch) if score is not None)[30]
    stage = af.ImageAestheticFilterStage(score_threshold=middle, keep_dropped=True)
    everything = stage.process(batch)
    assert len(everything) == 61
    fates = [(i.dropped_by is None, i.error is None) for i in everything]
    assert fates.count((True, True)) == 30
    assert fates.count((False, True)) == 30
    assert fates[60] == (True, False)
    assert {i.dropped_by for i in everything} == {None, f"aesthetic_score < {middle:g}"}
    table = stage(batch.to_table())
    assert table.column("dropped_by").null_count == 31
    assert table.column("error").null_count == 60


def test_other_heads(make_embeddings: Make) -> None:
    vectors = make_embeddings(30)
    batch = batch_of(vectors)
    af.ImageAestheticFilterStage(score_threshold=None, head="laion-v1").process(batch)
    assert scores_of(batch) == af.load_head("laion-v1")(vectors).tolist()
    with pytest.raises(HeadError, match="no head of that name"):
        af.ImageAestheticFilterStage(head="nothing").process(batch)


def test_nothing_is_loaded_before_first_use(tmp_path: Path) -> None:
    ran = run_python(
        "import sys\n"
        "import aesthetic_filter as af\n"
        "stages = [af.ImageReaderStage('x/*.tar'), af.ImageEmbeddingStage(model_dir='nowhere'),\n"
        "          af.ImageAestheticFilterStage(head='nothing there')]\n"
        "import pickle; pickle.loads(pickle.dumps(stages))\n"
        "af.Pipeline(stages).describe()\n"
        "print(sorted({'torch', 'PIL', 'numba', 'llvmlite', 'duckdb', 'ray', 'safetensors',\n"
        "              'huggingface_hub'} & set(sys.modules)))\n",
        cwd=tmp_path,
    )
    assert ran.stdout.strip() == "[]"


def test_settings_are_honoured_and_pickled(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = af.ImageAestheticFilterStage(
        model_dir="/models",
        score_threshold=5.5,
        model_inference_batch_size=3,
        num_gpus_per_worker=0.25,
        verbose=True,
        keep_dropped=True,
    )
    stage.setup()
    copy = pickle.loads(pickle.dumps(stage))
    assert copy == stage
    assert "loaded_head" not in vars(copy)
    assert len(pickle.dumps(stage)) < 1000
    sizes = []
    measure = af.Head.measure

    def measured(self: af.Head, vectors: np.ndarray, **options: Any) -> Any:
        sizes.append(len(vectors))
        return measure(self, vectors, **options)

    monkeypatch.setattr(af.Head, "measure", measured)
    copy.process(batch_of(np.ones((8, 768), np.float32) + reference_direction() * 50))
    assert sizes == [3, 3, 2]
    embedding = af.ImageEmbeddingStage(model_inference_batch_size=7, num_gpus_per_worker=0.5)
    assert pickle.loads(pickle.dumps(embedding)) == embedding
    assert embedding.options.batch_size == 7


def test_verbose_logs_each_drop_and_the_totals(
    make_embeddings: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aesthetic_filter")
    batch = batch_of([*make_embeddings(30), None])
    SCORES.process(batch)
    assert not caplog.records
    best = max(score for score in scores_of(batch) if score is not None)
    af.ImageAestheticFilterStage(score_threshold=best, verbose=True).process(batch)
    lines = [record.getMessage() for record in caplog.records]
    assert sum(": dropped: aesthetic_score" in line for line in lines) == 29
    assert "i30: failed: embedding is null" in lines
    assert lines[-1] == "kept 1, dropped 29, failed 1"


# The filter stage on tables.


def test_a_table_keeps_its_columns_order_and_metadata(make_embeddings: Make) -> None:
    vectors = make_embeddings(80)
    table = pa.table(
        {
            "caption": [f"c{row}" for row in range(80)],
            "embedding": vectors_column(vectors),
            "image_id": [f"i{row}" for row in range(80)],
        },
        metadata={b"mine": b"yes"},
    )
    expected = affine(vectors)
    threshold = float(np.median(expected))
    kept = af.ImageAestheticFilterStage(score_threshold=threshold)(table)
    assert kept.schema.metadata == {b"mine": b"yes"}
    assert kept.column_names[:3] == ["caption", "embedding", "image_id"]
    assert "dropped_by" not in kept.column_names
    rows = [int(name[1:]) for name in kept.column("image_id").to_pylist()]
    assert rows == sorted(rows)
    assert all(expected[row] > threshold - WITHIN for row in rows)
    assert 35 <= len(rows) <= 45
    assert kept.column("caption").to_pylist() == [f"c{row}" for row in rows]


@pytest.mark.parametrize("kind", ["fixed32", "fixed16", "list64", "chunks"])
def test_any_embedding_column_will_do(make_embeddings: Make, kind: str) -> None:
    vectors = make_embeddings(20)
    column: Any = vectors_column(vectors.astype(np.float32))
    if kind == "fixed16":
        column = vectors_column(vectors)
    elif kind == "list64":
        column = pa.array([list(map(float, vector)) for vector in vectors], pa.list_(pa.float64()))
    elif kind == "chunks":
        column = pa.chunked_array([vectors_column(vectors[:7]), vectors_column(vectors[7:])])
    scored = SCORES(pa.table({"embedding": column}))
    assert scored.column("aesthetic_score").to_pylist() == af.load_head()(vectors).tolist()


def test_a_table_of_another_width_fails_row_by_row() -> None:
    table = pa.table({"embedding": vectors_column(np.ones((3, 512), np.float32))})
    everything = af.ImageAestheticFilterStage(keep_dropped=True)(table)
    assert everything.column("error").to_pylist() == ["embedding has 512 values, not 768"] * 3
    assert everything.column("aesthetic_score").null_count == 3
    assert af.ImageAestheticFilterStage()(table).num_rows == 0


def test_a_table_without_embeddings_is_refused() -> None:
    with pytest.raises(PipelineError, match="there is no column 'embedding'; there are: image"):
        SCORES(pa.table({"image": [b""]}))


def test_foreign_embeddings_are_warned_of() -> None:
    vectors = np.random.default_rng(0).standard_normal((10, 768)).astype(np.float32)
    with pytest.warns(UserWarning, match="10 of 10 embeddings do not look like OpenAI's CLIP"):
        SCORES(pa.table({"embedding": vectors_column(vectors)}))


# The embedding stage.


@pytest.fixture
def stage(model_dir: Path) -> Any:
    options = af.ImageOptions(device="cpu", precision="float32")
    stage = af.ImageEmbeddingStage(model_dir, model_inference_batch_size=5, options=options)
    yield stage
    stage.close()


@pytest.fixture
def plain(model_dir: Path) -> Oracle:
    """transformers, with plain Pillow before it."""
    return Oracle(model_dir)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def cosine(a: Any, b: Any) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_images_of_every_kind_in_one_batch(
    stage: af.ImageEmbeddingStage, plain: Oracle, tmp_path: Path
) -> None:
    contents = [
        encoded(picture(1, 64, 48), "PNG"),
        encoded(picture(2, 300, 33), "PNG"),
        encoded(picture(3, 40, 200, "L"), "PNG"),
        encoded(picture(4, 77, 77, "RGBA"), "PNG"),
    ]
    (tmp_path / "a.png").write_bytes(contents[0])
    arrays = [
        pixels(contents[1]),
        np.asarray(Image.open(io.BytesIO(contents[2]))),  # (H, W)
        np.asarray(Image.open(io.BytesIO(contents[2])))[..., None],  # (H, W, 1)
        np.asarray(Image.open(io.BytesIO(contents[3]))),  # (H, W, 4)
        pixels(contents[1])[::2, ::-1],  # not contiguous
    ]
    data: list[Any] = [contents[0], *arrays, None]
    batch = af.ImageBatch(
        [af.ImageObject(image_id=str(n), image_data=d) for n, d in enumerate(data)]
    )
    batch[6].image_path = str(tmp_path / "a.png")
    turned_round = encoded(Image.fromarray(np.ascontiguousarray(arrays[4])), "PNG")
    expected = plain.embed(
        [contents[0], contents[1], contents[2], contents[2], contents[3], turned_round, contents[0]]
    )
    assert stage.process(batch) is batch
    for image, vector in zip(batch, expected, strict=True):
        assert image.error is None
        assert image.embedding.shape == (768,)
        assert image.embedding.dtype == np.float16
        assert cosine(image.embedding, vector) > 0.9999


def test_a_broken_image_costs_only_itself(
    stage: af.ImageEmbeddingStage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aesthetic_filter")
    data: list[Any] = [jpeg(1), b"no image", None, jpeg(2), np.zeros((4, 4, 7), np.uint8)]
    data += [np.zeros((4, 4, 3), np.float32), jpeg(3)[:300]]
    batch = af.ImageBatch(
        [af.ImageObject(image_id=str(n), image_data=d) for n, d in enumerate(data)]
    )
    batch.data.append(af.ImageObject(image_path=str(tmp_path / "gone.jpg"), image_id="gone"))
    stage.verbose = True
    stage.process(batch)
    embedded = [image.image_id for image in batch if image.embedding is not None]
    assert embedded == ["0", "3"]
    assert all((image.error is None) == (image.embedding is not None) for image in batch)
    assert batch[1].error == "not an image that can be decoded"
    assert batch[2].error == "there is no image data, and no path to read it from"
    lines = [record.getMessage() for record in caplog.records]
    assert "1: not embedded: not an image that can be decoded" in lines
    assert lines[-1] == "embedded 2 of 8 images"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept = SCORES.process(batch)
    assert [image.image_id for image in kept] == ["0", "3"]
    assert batch[1].error == "not an image that can be decoded"  # the first reason stays


def test_image_data_can_be_let_go(model_dir: Path) -> None:
    stage = af.ImageEmbeddingStage(model_dir, remove_image_data=True)
    batch = stage.process(af.ImageBatch([af.ImageObject(image_data=jpeg(1)) for _ in range(3)]))
    assert all(image.image_data is None and image.embedding is not None for image in batch)
    table = pa.table({"image_id": ["a"], "image": [jpeg(1)]})
    assert "image" not in stage(table).column_names
    stage.remove_image_data = False
    assert stage(table).column("image")[0].as_py() == jpeg(1)
    stage.close()


def test_tables_of_bytes_pixels_and_paths_agree(
    stage: af.ImageEmbeddingStage, tmp_path: Path
) -> None:
    contents = [encoded(picture(n, 50 + n, 60), "PNG") for n in range(7)]
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.png").write_bytes(content)
    names = [f"{number}.png" for number in range(7)]
    by_bytes = stage(pa.table({"image_id": names, "image": contents}))
    objects = [af.ImageObject(image_id=names[n], image_data=pixels(contents[n])) for n in range(7)]
    by_pixels = stage(af.ImageBatch(objects).to_table())
    paths = [str(tmp_path / name) for name in names]
    by_path = stage(pa.table({"image_id": names, "image_path": paths}))
    assert by_bytes.column("error").null_count == 7
    for other in (by_pixels, by_path):
        assert other.column("embedding").equals(by_bytes.column("embedding"))
        assert other.column("width").to_pylist() == [50 + n for n in range(7)]
    assert by_path.column("image_sha256").equals(by_bytes.column("image_sha256"))
    assert by_pixels.column("image_sha256").null_count == 7
    again = af.ImageBatch.from_table(by_bytes)
    assert [image.embedding.tobytes() for image in again] == [
        image.embedding.tobytes() for image in stage.process(af.ImageBatch(objects))
    ]


def test_photographs_are_turned_upright(stage: af.ImageEmbeddingStage) -> None:
    lying = turned(1, 60, 40, 6)
    table = stage(pa.table({"image": [lying]}))
    assert (table.column("width")[0].as_py(), table.column("height")[0].as_py()) == (40, 60)


def test_copies_share_the_weights_and_close_lets_them_go(
    stage: af.ImageEmbeddingStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    from aesthetic_filter.clip import tower

    loads: list[Path] = []
    load = tower.load_tower

    def counted(path: Path, **options: Any) -> Any:
        loads.append(path)
        return load(path, **options)

    monkeypatch.setattr(tower, "load_tower", counted)
    stage.setup_on_node()
    assert not loads
    stage.setup()
    for _ in range(3):
        copy = pickle.loads(pickle.dumps(stage))
        copy(pa.table({"image": [jpeg(1)]}))
    assert len(loads) == 1
    stage.close()
    stage(pa.table({"image": [jpeg(1)]}))
    assert len(loads) == 2
