"""``ImageObject`` and ``ImageBatch``, and the table of the same rows."""

from __future__ import annotations

import datetime
import io
import json
import math
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from aesthetic_filter.errors import ImageError, UsageError, WrongEmbeddingsError
from aesthetic_filter.images import ImageBatch, ImageObject, as_array, embedding_vectors
from aesthetic_filter.table import column_vectors

FIELDS = (
    *("image_path", "image_id", "metadata", "image_data"),
    *("embedding", "aesthetic_score", "error", "dropped_by"),
)
UTC = datetime.UTC
NAN = float("nan")


def identical(a: Any, b: Any) -> bool:
    """The same types, values, dtypes, bits and order of keys, all the way down."""
    if isinstance(a, np.ndarray | np.generic):
        both = type(a), a.dtype, a.shape, a.tobytes()
        return isinstance(b, np.ndarray | np.generic) and both == (
            *(type(b), b.dtype, b.shape),
            b.tobytes(),
        )
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return identical(list(a.items()), list(b.items()))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(identical(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and math.isnan(a):
        return math.isnan(b)
    return a == b if isinstance(a, int) else repr(a) == repr(b)


def values_of(image: ImageObject) -> list[Any]:
    return [getattr(image, name) for name in FIELDS]


def round_trip(*metadata: dict[str, Any]) -> list[dict[str, Any]]:
    batch = ImageBatch([ImageObject(metadata=each) for each in metadata])
    return [image.metadata for image in ImageBatch.from_table(batch.to_table())]


def embedded(*embeddings: Any) -> ImageBatch:
    return ImageBatch([ImageObject(embedding=each) for each in embeddings])


def back(batch: ImageBatch) -> list[Any]:
    return [image.embedding for image in ImageBatch.from_table(batch.to_table())]


# Objects.


def test_an_object_has_nemo_curators_fields_and_its_own_metadata() -> None:
    image, other = ImageObject("a.jpg", "a", {"k": 1}), ImageObject()
    assert values_of(image) == ["a.jpg", "a", {"k": 1}, None, None, None, None, None]
    assert values_of(other) == ["", "", {}, None, None, None, None, None]
    assert other.metadata is not ImageObject().metadata


def test_objects_with_arrays_compare() -> None:
    image = ImageObject("p", "a", {"n": NAN}, np.zeros((2, 2, 3), np.uint8), np.ones(4))
    assert image == replace(image, image_data=image.image_data.copy(), metadata={"n": NAN})
    assert image != replace(image, embedding=np.ones(4, np.float32))
    assert image != replace(image, image_data=np.zeros((2, 2, 4), np.uint8))
    assert image != replace(image, metadata={"n": 0.0})
    assert ImageObject(embedding=torch.ones(3)) == ImageObject(embedding=torch.ones(3))
    assert image != "a"


def test_reprs_are_short_whatever_is_inside() -> None:
    image = ImageObject(
        *("a.jpg", "a", {"raw": np.zeros(10**6), "text": "x" * 10**6}),
        *(np.zeros((480, 640, 3), np.uint8), np.zeros(768, np.float16), 5.25),
    )
    assert repr(image).startswith("ImageObject(image_path='a.jpg', image_id='a', metadata={'raw': ")
    assert repr(image).endswith(
        "image_data=<(480, 640, 3) uint8>, embedding=<(768,) float16>, aesthetic_score=5.25)"
    )
    assert len(repr(image)) < 300
    assert repr(ImageObject(image_data=b"12345")) == "ImageObject(image_data=<5 bytes>)"
    batch = ImageBatch([image] * 1000 + [ImageObject(error="bad")], dataset_name="laion")
    assert repr(batch) == (
        "ImageBatch(dataset_name='laion', 1,001 images, 1,000 embedded, 1,000 scored, 1 failed: "
        "'a', 'a', 'a', …)"
    )
    assert repr(ImageBatch()) == "ImageBatch(0 images)"


# Batches.


def test_a_batch_is_a_sequence() -> None:
    images = [ImageObject(image_id=str(i)) for i in range(5)]
    batch = ImageBatch(images, "laion", {"k": 1}, "0_1")
    assert batch.data is images
    assert (len(batch), batch.num_items) == (5, 5)
    assert list(batch) == images
    assert batch[1] is images[1]
    assert batch[-1] is images[4]
    assert images[2] in batch
    assert batch.index(images[3]) == 3
    part = batch[1:4:2]
    assert isinstance(part, ImageBatch)
    assert [image.image_id for image in part] == ["1", "3"]
    assert (part.dataset_name, part.metadata, part.task_id) == ("laion", {"k": 1}, "0_1")
    assert part[0] is images[1]
    with pytest.raises(IndexError):
        batch[5]


def test_batches_compare() -> None:
    def batch() -> ImageBatch:
        return ImageBatch([ImageObject(embedding=np.ones(3))], "d", {"a": np.ones(2)}, "t")

    assert batch() == batch()
    assert batch() != replace(batch(), dataset_name="e")
    assert batch() != replace(batch(), metadata={"a": np.zeros(2)})
    assert batch() != replace(batch(), data=[])
    assert batch() != [ImageObject(embedding=np.ones(3))]


def test_nemo_curators_way_to_make_a_batch_works() -> None:
    timings, metadata = ["timing"], {"shard": 3}
    batch = ImageBatch(
        task_id="0_3",
        dataset_name="laion",
        data=[ImageObject()],
        _metadata=metadata,
        _stage_perf=timings,
    )
    assert batch.metadata is batch._metadata is metadata
    changed = replace(batch, data=[])
    assert changed._stage_perf is timings
    batch._metadata = {}
    assert batch.metadata == {}
    assert pickle.loads(pickle.dumps(changed)) == changed


def test_what_belongs_to_the_batch_comes_back() -> None:
    batch = ImageBatch([], "ünï", {"when": datetime.date(2024, 2, 29), "$x": (1, NAN)}, "0_\udc80")
    table = batch.to_table()
    found = ImageBatch.from_table(table)
    assert found.data == []
    assert (found.dataset_name, found.task_id) == ("ünï", "0_\udc80")
    assert identical(found.metadata, batch.metadata)
    assert set(table.schema.metadata) == {b"aesthetic_filter_images"}
    with pytest.raises(TypeError, match=r"the batch \(metadata.*holds a object"):
        ImageBatch(metadata={"a": object()}).to_table()


# The table.


def test_the_tables_columns_are_the_vocabulary() -> None:
    batch = ImageBatch(
        [
            ImageObject("a.jpg", "a", {"tag": "x"}, b"jpeg", np.ones(4, np.float16), 5.5),
            ImageObject("b.jpg", "b", {"tag": "y"}, np.ones((2, 3), np.uint8), None, None, "bad"),
            ImageObject("c.jpg", "c", {"tag": None}, dropped_by="rule"),
        ]
    )
    table = batch.to_table()
    assert {field.name: str(field.type) for field in table.schema} == {
        "image_id": "string",
        "image_path": "string",
        "image": "binary",
        "image_data": "struct<data: large_binary, shape: list<item: int64>, dtype: string>",
        "embedding": "fixed_size_list<item: halffloat>[4]",
        "aesthetic_score": "float",
        "error": "string",
        "dropped_by": "string",
        "tag": "string",
    }
    assert table.drop_columns(["image_data", "embedding"]).to_pylist() == [
        {
            **{"image_id": "a", "image_path": "a.jpg", "image": b"jpeg", "aesthetic_score": 5.5},
            **{"error": None, "dropped_by": None, "tag": "x"},
        },
        {
            **{"image_id": "b", "image_path": "b.jpg", "image": None, "aesthetic_score": None},
            **{"error": "bad", "dropped_by": None, "tag": "y"},
        },
        {
            **{"image_id": "c", "image_path": "c.jpg", "image": None, "aesthetic_score": None},
            **{"error": None, "dropped_by": "rule", "tag": None},
        },
    ]
    assert table["image_data"].to_pylist() == [
        *(None, {"data": b"\x01" * 6, "shape": [2, 3], "dtype": "uint8"}, None)
    ]
    assert ImageBatch([ImageObject()]).to_table().to_pydict() == {
        "image_id": [""],
        "image_path": [""],
    }


PIXELS = [
    np.arange(6, dtype=np.uint8).reshape(2, 3),
    np.arange(24, dtype=np.uint8).reshape(4, 6)[::2, ::-1],
    np.arange(6, dtype=np.uint8).reshape(2, 1, 3),
    np.linspace(0, 1, 12, dtype=np.float32).reshape(2, 2, 3),
    np.asfortranarray(np.arange(6, dtype=">u2").reshape(2, 3)),
    np.array([True, False]),
    np.array(7, np.int64),
    np.zeros((0, 5, 3), np.uint8),
    np.array(["a", "bc"]),
    np.array(["2024-02-29"], "datetime64[D]"),
]


@pytest.mark.parametrize("pixels", PIXELS, ids=lambda p: f"{p.dtype}-{p.shape}")
def test_pixels_come_back_and_can_be_written_to(pixels: np.ndarray) -> None:
    found = ImageBatch.from_table(ImageBatch([ImageObject(image_data=pixels)]).to_table())
    assert identical(found[0].image_data, pixels)
    assert found[0].image_data.flags.writeable


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (ImageObject(image_data=[1, 2]), r"image 0 \(''\): image_data is a list"),
        (ImageObject(image_data=np.array([None])), "image_data is an array of object"),
        (ImageObject(image_data=np.zeros(2, [("a", "i4")])), "image_data is an array of"),
        (ImageObject(image_id=7), "image_id is a int; give a str"),
        (ImageObject(image_id="x", error=ValueError("no")), r"\('x'\): error is a ValueError"),
        (ImageObject(image_path="\ud800"), "image_path is a str that is not valid Unicode"),
        (ImageObject(aesthetic_score="5"), "aesthetic_score is a str; give a float"),
        (ImageObject(aesthetic_score=True), "aesthetic_score is a bool; give a float"),
        (ImageObject(embedding=[1, 2]), "embedding holds int64 values; .*is a list"),
        (ImageObject(embedding="abc"), "embedding holds <U3 values"),
        (ImageObject(embedding={"a": 1}), "embedding is not an array of numbers"),
    ],
)
def test_what_a_table_cannot_hold_is_a_type_error(image: ImageObject, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        ImageBatch([image]).to_table()


def test_scores_are_rounded_to_float32_and_nan_is_not_none() -> None:
    exact = float(np.float32(5.1))
    batch = ImageBatch([ImageObject(aesthetic_score=s) for s in (exact, 5.1, NAN, None, 5)])
    table = batch.to_table()
    assert table["aesthetic_score"].type == pa.float32()
    assert table["aesthetic_score"].null_count == 1
    scores = [image.aesthetic_score for image in ImageBatch.from_table(table)]
    assert identical(scores, [exact, exact, NAN, None, 5.0])


def test_paths_come_back_as_texts_and_bytearrays_as_bytes() -> None:
    batch = ImageBatch([ImageObject(Path("a/b.jpg"), image_data=bytearray(b"jpeg"))])
    image = ImageBatch.from_table(batch.to_table())[0]
    assert identical((image.image_path, image.image_data), ("a/b.jpg", b"jpeg"))


def test_pixels_that_do_not_fit_their_shape_are_an_image_error() -> None:
    pixels = {"data": b"123456", "shape": [2, 3], "dtype": "uint8"}
    array = as_array(pixels)
    assert array.tolist() == [[49, 50, 51], [52, 53, 54]]
    assert not array.flags.writeable
    for wrong in ({"shape": [2, 2]}, {"dtype": "what"}, {"data": None}, {"dtype": "object"}):
        with pytest.raises(ImageError, match="not an array of its shape and dtype"):
            as_array({**pixels, **wrong})


# Metadata.

PLAIN: list[tuple[str, list[Any], str]] = [
    ("texts", ["a", None, ""], "string"),
    ("whole numbers", [1, -(2**63), 2**63 - 1, None], "int64"),
    ("floats", [1.0, -0.0, NAN, None, math.inf], "double"),
    ("bytes", [b"\x00\xff", None], "binary"),
    ("booleans", [True, None], "bool"),
    ("lists", [[1, 2], [], None], "list<item: int64>"),
    ("dicts", [{"a": 1, "b": [None]}, {"a": 2, "b": []}], "struct<a: int64, b: list<item: null>>"),
    ("dates", [datetime.date(2024, 2, 29)], "date32[day]"),
    ("moments", [datetime.datetime(2024, 2, 29, 1, 2, 3, 4)], "timestamp[us]"),
    ("NumPy scalars", [np.float32(0.1), None, np.float32(NAN)], "float"),
    ("half floats", [np.float16(0.1)], "halffloat"),
    ("NumPy float64", [np.float64(0.1)], "double"),
    ("NumPy booleans", [np.bool_(True)], "bool"),
    ("nothing", [None, None], "null"),
]

ODD: list[tuple[str, list[Any]]] = [
    ("int and float", [1, 1.0]),
    ("bool and int", [True, 1]),
    ("text and number", ["1", 1]),
    ("text and bytes", ["a", b"a"]),
    ("big ints", [2**63, -(2**70), 10**5000]),
    ("tuple and list", [(1, 2), [1, 2]]),
    ("tuples within", [[(1,)], [[1]]]),
    ("dicts of different keys", [{"a": 1}, {"b": 2}, {}]),
    ("dicts of different order", [{"a": 1, "b": 2}, {"b": 2, "a": 1}]),
    ("keys that are no texts", [{1: "a", (2, 3): "b", None: "c"}]),
    ("keys that look like tags", [{"$tuple": [1]}, {"$": 1}]),
    ("NaN within", [{"a": [NAN, -math.inf, -0.0]}, 1]),
    ("NumPy scalars of two types", [np.float32(1), np.float64(1)]),
    ("NumPy scalar and int", [np.int64(1), 1]),
    ("NumPy scalars within", [{"a": np.float16(0.1)}, [np.uint8(3)]]),
    ("NumPy texts", [np.str_("ä"), np.str_(""), np.bytes_(b"a")]),
    ("NumPy times", [np.datetime64(1, "ns"), np.timedelta64("NaT")]),
    ("arrays", [np.arange(3), np.zeros((2, 0), np.float16), np.array(1.5), np.array(["a"])]),
    ("aware moments", [datetime.datetime(2024, 1, 1, tzinfo=UTC)]),
    (
        "moments in zones",
        [
            datetime.datetime(2024, 10, 27, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Paris")),
            datetime.datetime(1, 1, 1, tzinfo=datetime.timezone(datetime.timedelta(hours=5))),
            datetime.time(1, 2, tzinfo=datetime.timezone(datetime.timedelta(seconds=-7), "odd")),
            datetime.time(1, 2, fold=1),
        ],
    ),
    ("date and moment", [datetime.date(2024, 1, 1), datetime.datetime(2024, 1, 1)]),
    ("long spans", [datetime.timedelta.max, datetime.timedelta.min]),
    ("decimals of two scales", [Decimal("1.50"), Decimal("1.5"), Decimal("NaN")]),
    ("texts that are not Unicode", ["\udc80.jpg", {"\ud800": "\udfff"}]),
    ("JSON text and more", ["[1, 2]", [1, 2], "null", None]),
]


@pytest.mark.parametrize(("values", "kind"), [c[1:] for c in PLAIN], ids=[c[0] for c in PLAIN])
def test_metadata_that_arrow_holds_exactly_lies_in_plain_columns(
    values: list[Any], kind: str
) -> None:
    batch = ImageBatch([ImageObject(metadata={"key": value}) for value in values])
    table = batch.to_table()
    assert table.column_names == ["image_id", "image_path", "key"]
    assert str(table.schema.field("key").type) == kind
    found = [image.metadata for image in ImageBatch.from_table(table)]
    assert identical(found, [{"key": value} for value in values])


@pytest.mark.parametrize("values", [c[1] for c in ODD], ids=[c[0] for c in ODD])
def test_metadata_that_arrow_would_change_lies_in_json(values: list[Any]) -> None:
    batch = ImageBatch([ImageObject(metadata={"key": value}) for value in values])
    table = batch.to_table()
    assert table.schema.field("key").type == pa.large_string()
    for text in table["key"].to_pylist():
        json.loads(text or "null", parse_constant=pytest.fail)
    found = [image.metadata for image in ImageBatch.from_table(table)]
    assert identical(found, [{"key": value} for value in values])


def test_json_is_as_documented() -> None:
    values = {
        "plain": [[1, "a"], {"a": None, "b": 1.5}],
        "tagged": [(1, NAN), {"$a": b"\x00"}],
    }
    rows = [{key: each[row] for key, each in values.items()} for row in range(2)]
    table = ImageBatch([ImageObject(metadata=row) for row in rows]).to_table()
    assert [json.loads(text) for text in table["plain"].to_pylist()] == values["plain"]
    assert [json.loads(text) for text in table["tagged"].to_pylist()] == [
        {"$tuple": [1, {"$float": "nan"}]},
        {"$dict": [["$a", {"$bytes": "AA=="}]]},
    ]
    note = json.loads(table.schema.field("tagged").metadata[b"aesthetic_filter_images"])
    assert note == {"encoding": "json"}


class Text(str):
    """A str that is none."""


def within_itself() -> list[Any]:
    found: list[Any] = []
    found.append([found, found])
    return found


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (object(), "object"),
        ({1}, "set"),
        ([{"a": 1j}], "complex"),
        (Text("a"), "Text"),
        (bytearray(b"a"), "bytearray"),
        (np.array([None]), "ndarray"),
        (np.ma.array([1, 2], mask=[False, True]), "MaskedArray"),
        (torch.zeros(2), "Tensor"),
        (within_itself(), "list within itself"),
        ("\ud83d\ude00", "str"),
    ],
)
def test_metadata_that_no_column_can_give_back_is_refused(value: Any, kind: str) -> None:
    batch = ImageBatch([ImageObject(metadata={"good": 1, "bad": value})])
    with pytest.raises(TypeError, match=f"metadata key 'bad' holds a {kind}"):
        batch.to_table()


@pytest.mark.parametrize("key", [1, None, "\ud800"])
def test_a_key_that_can_name_no_column_is_refused(key: Any) -> None:
    with pytest.raises(TypeError, match="metadata key"):
        ImageBatch([ImageObject(metadata={key: 1})]).to_table()


def test_absent_keys_are_not_none_and_order_is_kept() -> None:
    rows: list[dict[str, Any]] = [{"a": 1, "b": None}, {"b": 2}, {}, {"b": None, "a": 3, "": 0}]
    assert identical(round_trip(*rows), rows)
    assert (
        "metadata_keys"
        in ImageBatch([ImageObject(metadata=r) for r in rows]).to_table().schema.names
    )
    same = ImageBatch([ImageObject(metadata={"a": None, "b": 1})] * 2).to_table()
    assert "metadata_keys" not in same.column_names


def test_keys_that_clash_with_the_vocabulary_come_back() -> None:
    row = {
        **{"image_id": 1, "embedding": "mine", "source_image_id": 2, "metadata_keys": 3},
        **{"error": None, "width": "wide", "height": 10, "image_sha256": 1, "dropped_by": 4},
        **{"embedding_form": 5, "image": 6, "image_data": 7, "aesthetic_score": 8},
    }
    table = ImageBatch([ImageObject(image_id="a", metadata=row)]).to_table()
    found = ImageBatch.from_table(table)[0]
    assert found.image_id == "a"
    assert identical(found.metadata, row)
    assert table["source_image_id"].to_pylist() == [2]
    assert table["source_source_image_id"].to_pylist() == [1]
    assert table["source_width"].to_pylist() == ["wide"]
    assert table.schema.field("height").type == pa.int32()


def test_a_renamed_key_yields_to_a_column_added_since() -> None:
    table = ImageBatch([ImageObject(metadata={"width": "wide"})]).to_table()
    table = table.append_column("width", pa.array([512], pa.int32()))
    assert ImageBatch.from_table(table)[0].metadata == {"source_width": "wide", "width": 512}


def test_columns_added_since_become_metadata_of_rows_that_have_them() -> None:
    batch = ImageBatch([ImageObject(metadata={"a": 1}), ImageObject(metadata={"b": 2})])
    table = batch.to_table().append_column("new", pa.array([None, 3]))
    found = [image.metadata for image in ImageBatch.from_table(table)]
    assert found == [{"a": 1}, {"b": 2, "new": 3}]


@pytest.mark.parametrize("lost", ["the fields' metadata", "the schema's metadata"])
def test_one_of_the_two_notes_is_enough(lost: str) -> None:
    rows: list[dict[str, Any]] = [{"odd": (1,), "error": "e", "scalar": np.float32(1), "$": {1: 2}}]
    table = ImageBatch([ImageObject(metadata=row) for row in rows]).to_table()
    if lost == "the fields' metadata":
        plain = {name: table.column(name) for name in table.column_names}
        table = pa.table(plain, metadata=table.schema.metadata)
        assert table.schema.field("odd").metadata is None
    else:
        table = table.replace_schema_metadata(None)
    assert identical([image.metadata for image in ImageBatch.from_table(table)], rows)


# Embeddings.


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_embeddings_of_one_kind_lie_in_a_fixed_size_list(dtype: type) -> None:
    vectors = np.linspace(-1, 1, 8).astype(dtype).reshape(2, 4)
    batch = embedded(vectors[0], None, vectors[1])
    table = batch.to_table()
    assert table["embedding"].type == pa.list_(pa.from_numpy_dtype(dtype), 4)
    assert table.column_names == ["image_id", "image_path", "embedding"]
    found = back(batch)
    assert identical(found, [vectors[0], None, vectors[1]])
    assert found[0].flags.writeable
    read, errors = column_vectors(table["embedding"])
    assert errors == {1: "embedding is null"}
    assert identical(read, np.stack([vectors[0], np.zeros(4, dtype), vectors[1]]))


MIXED: list[tuple[str, list[Any]]] = [
    ("dtypes", [np.ones(3, np.float16), np.array([0.1, 1, 2]), None, np.ones(3, np.float32)]),
    ("widths", [np.ones(3, np.float16), np.ones(2, np.float16), None]),
    ("empty", [np.ones(0, np.float32)]),
    ("byte orders", [np.array([1, 2], ">f4"), np.array([1, 2], np.float32)]),
    ("shapes", [np.ones((1, 3)), np.ones((3, 1)), np.array(1.5)]),
    ("lists", [[0.1, 0.2], (0.1, 0.2), np.array([0.1, 0.2]), [[0.1, 0.2]]]),
    ("holes", [[0.1, None], (None,), np.array([NAN, 0.5]), [NAN]]),
]


@pytest.mark.parametrize("embeddings", [c[1] for c in MIXED], ids=[c[0] for c in MIXED])
def test_embeddings_of_several_kinds_come_back_as_they_were(embeddings: list[Any]) -> None:
    batch = embedded(*embeddings)
    assert identical(back(batch), embeddings)
    column_vectors(batch.to_table()["embedding"])


def test_embeddings_of_several_dtypes_can_be_read_as_the_widest() -> None:
    values = [np.array([0.1, 2], np.float16), None, np.array([0.1, 2], np.float64)]
    table = embedded(*values).to_table()
    assert table["embedding"].type == pa.list_(pa.float64())
    vectors, errors = column_vectors(table["embedding"], 2)
    assert errors == {1: "embedding is null"}
    assert vectors.tolist() == [[float(np.float16(0.1)), 2], [0, 0], [0.1, 2]]


def test_long_doubles_that_are_doubles_come_back() -> None:
    (found,) = back(embedded(np.array([1.5, -0.1], np.longdouble)))
    assert found.dtype == np.longdouble
    assert found.tolist() == [1.5, -0.1]


def test_tensors_come_back_as_arrays() -> None:
    values = torch.tensor([0.1, 2.0])
    half, grad = values.half(), values.clone().requires_grad_()
    found = back(embedded(values, half, grad, values.bfloat16()))
    expected = np.array([0.1, 2], np.float32)
    assert identical(found[:3], [expected, expected.astype(np.float16), expected])
    assert identical(found[3], np.array([0.10009765625, 2], np.float32))


def test_a_form_does_not_change_embeddings_that_were_replaced() -> None:
    table = embedded(np.ones((1, 3)), np.ones(2, np.float16)).to_table()
    new = np.array([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]], np.float32)
    place = table.column_names.index("embedding")
    table = table.set_column(place, "embedding", pa.FixedSizeListArray.from_arrays(new.ravel(), 4))
    found = [image.embedding for image in ImageBatch.from_table(table)]
    assert identical(found, [new[0], new[1]])


# Tables from elsewhere.


def test_a_table_of_the_packages_own_becomes_objects_and_the_same_table_again() -> None:
    vector = np.linspace(0, 1, 4, dtype=np.float16)
    table = pa.table(
        {
            "image_id": ["a", "b"],
            "image_path": ["t.tar#a.jpg", None],
            "image": pa.array([b"jpeg", None], pa.binary()),
            "embedding": pa.array([vector, None], pa.list_(pa.float16(), 4)),
            "aesthetic_score": pa.array([5.1, None], pa.float32()),
            "error": [None, "not an image that can be decoded"],
            "caption": ["a cat", None],
            "source_error": ["its own", None],
            "width": pa.array([640, None], pa.int32()),
            "height": pa.array([480, None], pa.int32()),
            "image_sha256": ["00ff", None],
            "embedding_norm": pa.array([0.1, None], pa.float32()),
            "reference_cosine": pa.array([0.5, None], pa.float32()),
        },
        metadata={b"aesthetic_filter": b"{}"},
    )
    batch = ImageBatch.from_table(table)
    facts = {
        **{"caption": "a cat", "source_error": "its own", "width": 640, "height": 480},
        **{"image_sha256": "00ff", "embedding_norm": float(np.float32(0.1))},
        "reference_cosine": 0.5,
    }
    score = float(np.float32(5.1))
    expected = [
        ["t.tar#a.jpg", "a", facts, b"jpeg", vector, score, None, None],
        [None, "b", dict.fromkeys(facts), None, None, None, table["error"][1].as_py(), None],
    ]
    assert identical([values_of(image) for image in batch], expected)
    assert batch.to_table().equals(table)


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.large_list(pa.float32())])
def test_lists_tensors_and_chunks_of_embeddings_are_read(kind: pa.DataType) -> None:
    first = pa.array([[9.0, 9.0], [1.0, None], None], kind)[1:]
    table = pa.table({"embedding": pa.chunked_array([first, pa.array([[0.5]], kind)])})
    found = [image.embedding for image in ImageBatch.from_table(table)]
    assert identical(found, [[1.0, None], None, np.array([0.5], np.float32)])
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(np.ones((2, 3), np.float32))
    found = [image.embedding for image in ImageBatch.from_table(pa.table({"embedding": tensors}))]
    assert identical(found, [np.ones(3, np.float32)] * 2)


def test_a_table_need_have_none_of_the_columns() -> None:
    batch = ImageBatch.from_table(pa.table({"a": [1]}))
    assert identical([values_of(i) for i in batch], [["", "", {"a": 1}, *[None] * 5]])
    assert (batch.dataset_name, batch.metadata, batch.task_id) == ("", {}, "")
    assert ImageBatch.from_table(pa.table({"embedding": pa.nulls(1)}))[0].embedding is None
    assert ImageBatch.from_table(pa.table({"image_id": [7]}))[0].image_id == "7"


@pytest.mark.parametrize(
    ("table", "error", "message"),
    [
        (pa.table([[1], [2]], names=["a", "a"]), UsageError, "several columns named a"),
        (pa.table({"image": ["a.jpg"]}), UsageError, "'image' should hold .*, not string"),
        (pa.table({"image_data": [b"x"]}), UsageError, "'image_data' should hold struct"),
        (pa.table({"aesthetic_score": [[1]]}), UsageError, "'aesthetic_score' should hold"),
        (pa.table({"embedding": [[1]]}), WrongEmbeddingsError, "not list<"),
    ],
)
def test_columns_of_the_wrong_type_are_refused(table: pa.Table, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        ImageBatch.from_table(table)


def test_nanoseconds_come_back() -> None:
    pytest.importorskip("pandas")
    table = pa.table(
        {
            "image_id": ["a", "b"],
            "image_path": ["", ""],
            "naive": pa.array([1, None], pa.timestamp("ns")),
            "aware": pa.array([1, None], pa.timestamp("ns", "Europe/Paris")),
            "span": pa.array([None, 1], pa.duration("ns")),
        }
    )
    assert ImageBatch.from_table(table).to_table().equals(table)


def test_nanoseconds_without_pandas_are_refused_with_the_remedy() -> None:
    code = """
        import sys
        class NoPandas:
            def find_spec(self, name, path=None, target=None):
                if name == "pandas":
                    raise ImportError(name)
        sys.meta_path.insert(0, NoPandas())
        import pyarrow as pa
        from aesthetic_filter.images import ImageBatch
        whole, part = (pa.table({"t": pa.array([n], pa.timestamp("ns"))}) for n in (1000, 1))
        print(ImageBatch.from_table(whole)[0].metadata)
        ImageBatch.from_table(part)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.stdout == "{'t': datetime.datetime(1970, 1, 1, 0, 0, 0, 1)}\n"
    assert "UsageError: column 't' cannot be read as Python values: " in done.stderr
    assert "Install pandas" in done.stderr


# Any batch.

leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary(max_size=5)
    | st.dates()
    | st.datetimes(timezones=st.none() | st.just(UTC) | st.timezones())
    | st.timedeltas()
    | st.decimals(allow_nan=False)
    | st.floats(width=32).map(np.float32)
    | st.integers(0, 255).map(np.uint8)
    | hnp.arrays(st.sampled_from([np.uint8, np.float16, np.float64]), hnp.array_shapes(max_side=3))
)
keys = st.text(max_size=3) | st.sampled_from(["image_id", "source_image_id", "width", "$tuple"])
anything = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys | st.integers(), inner, max_size=3)
    ),
    max_leaves=6,
)


def arrays(dtypes: list[str], shapes: Any) -> Any:
    return st.sampled_from(dtypes).flatmap(lambda dtype: hnp.arrays(dtype, shapes))


images = st.builds(
    ImageObject,
    image_path=st.text(max_size=5),
    image_id=st.text(max_size=5),
    metadata=st.dictionaries(keys, anything, max_size=4),
    image_data=st.none()
    | st.binary(max_size=5)
    | arrays(["u1", ">u2", "f4"], hnp.array_shapes(min_dims=2, max_dims=3, min_side=0)),
    embedding=st.none()
    | st.lists(st.floats(), max_size=3)
    | arrays(["f2", "f4", "f8", ">f4"], st.integers(0, 4).map(lambda n: (n,)) | st.just((1, 3))),
    aesthetic_score=st.none() | st.floats(width=32),
    error=st.none() | st.text(max_size=5),
    dropped_by=st.none() | st.text(max_size=5),
)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(images, max_size=5),
    st.text(),
    st.dictionaries(keys, anything, max_size=3),
    st.data(),
)
def test_any_batch_comes_back_from_its_table(
    objects: list[ImageObject], name: str, metadata: dict[str, Any], data: st.DataObject
) -> None:
    batch = ImageBatch(objects, name, metadata, name)
    table = batch.to_table()
    table.validate(full=True)
    found = ImageBatch.from_table(table)
    assert (found.dataset_name, found.task_id) == (name, name)
    assert identical(found.metadata, metadata)
    before = [values_of(image) for image in objects]
    assert identical([values_of(image) for image in found], before)
    assert found == batch

    rows = st.lists(st.sampled_from(range(len(objects))), max_size=6) if objects else st.just([])
    order = data.draw(rows)
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(objects))] * 2)))
    kept = data.draw(st.lists(st.booleans(), min_size=len(objects), max_size=len(objects)))
    operations: list[tuple[Callable[[], pa.Table], list[Any]]] = [
        (lambda: table.take(pa.array(order, pa.int64())), [before[row] for row in order]),
        (lambda: table.slice(start, stop - start), before[start:stop]),
        (
            lambda: table.filter(pa.array(kept, pa.bool_())),
            [b for b, k in zip(before, kept, strict=True) if k],
        ),
        (lambda: pa.concat_tables([table.slice(start), table]), before[start:] + before),
    ]
    for operation, expected in operations:
        again = ImageBatch.from_table(operation())
        assert identical([values_of(image) for image in again], expected)


def test_a_batch_survives_parquet() -> None:
    rows: list[dict[str, Any]] = [{"odd": (1, NAN), "error": 1, "n": np.float32(1)}, {"b": [1]}]
    objects = [
        ImageObject("p", "a", rows[0], np.ones((2, 2, 3), np.uint8), np.ones(3, np.float16), 5.5),
        ImageObject("q", "b", rows[1], b"jpeg", [0.1, None], NAN, "bad", "rule"),
    ]
    file = io.BytesIO()
    pq.write_table(ImageBatch(objects, "d", {"k": (1,)}, "t").to_table(), file)
    found = ImageBatch.from_table(pq.read_table(file))
    assert identical([values_of(i) for i in found], [values_of(i) for i in objects])
    assert identical([found.dataset_name, found.metadata, found.task_id], ["d", {"k": (1,)}, "t"])


# Vectors.


def test_vectors_have_the_narrowest_type_that_holds_every_value() -> None:
    half, single, double = (np.array([0.1, 2], f"f{size}") for size in (2, 4, 8))
    for given_, dtype in [
        ((half, half), np.float16),
        ((half, single), np.float32),
        ((half, double), np.float64),
        ((half, None), np.float16),
        ((half, [0.1, 2.0]), np.float64),
        ((single.astype(">f4"),), np.float32),
        ((None,), np.float32),
        ((), np.float32),
    ]:
        vectors, _ = embedding_vectors(embedded(*given_), 2)
        assert vectors.dtype == dtype
        assert vectors.dtype.isnative
        assert vectors.shape == (len(given_), 2)
        for found, one in zip(vectors, given_, strict=True):
            assert found.tolist() == ([0, 0] if one is None else [float(x) for x in one])


def test_many_vectors() -> None:
    vectors, errors = embedding_vectors(embedded(*[np.ones(2, np.float16)] * 1000), 2)
    assert (vectors == 1).all()
    assert errors == {}


@pytest.mark.parametrize(
    ("embedding", "reason"),
    [
        (None, "embedding is null"),
        (np.ones(4), "embedding has 4 values, not 3"),
        (np.ones((1, 4)), "embedding has 4 values, not 3"),
        ([], "embedding has 0 values, not 3"),
        (np.ones((3, 1)), "embedding has shape (3, 1), not (3,)"),
        (np.ones((1, 1, 3)), "embedding has shape (1, 1, 3), not (3,)"),
        (1.5, "embedding has shape (), not (3,)"),
        (np.arange(3), "embedding holds int64 values; embeddings are floating-point"),
        ([1, 2, 3], "embedding holds int64 values; embeddings are floating-point"),
        (np.ones(3, bool), "embedding holds bool values; embeddings are floating-point"),
        (np.ones(3, complex), "embedding holds complex128 values; embeddings are floating-point"),
        (torch.ones(3, dtype=torch.int8), "embedding holds int8 values; embeddings are "),
        ([1.0, None, 2.0], "embedding has missing values"),
        (np.ma.array(np.ones(3), mask=[0, 1, 0]), "embedding has missing values"),
        (["a", "b", "c"], "embedding holds <U1 values; embeddings are floating-point"),
        ([[1.0], [1.0, 2.0]], "embedding is not an array of numbers"),
        (object(), "embedding is not an array of numbers"),
        (torch.ones(3, device="meta"), "embedding is not an array of numbers"),
        (torch.ones(3).to_sparse(), "embedding is not an array of numbers"),
    ],
)
def test_a_row_without_a_usable_vector_says_why(embedding: Any, reason: str) -> None:
    good = np.array([1, 2, 3], np.float16)
    vectors, errors = embedding_vectors(embedded(good, embedding, good), 3)
    assert list(errors) == [1]
    assert errors[1].startswith(reason)
    assert identical(vectors, np.stack([good, good * 0, good]))


def test_a_value_that_float64_cannot_hold_is_a_reason() -> None:
    wide = np.array([1], np.longdouble) + np.finfo(np.longdouble).eps
    if np.float64(wide[0]) == wide[0]:
        pytest.skip("a long double is a double here")
    _, errors = embedding_vectors(embedded(wide), 1)
    assert errors == {0: f"embedding holds {wide.dtype} values that float64 cannot hold"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_are_vectors(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[0.1, -2.0, 3.0]], dtype=dtype, requires_grad=True)
    vectors, errors = embedding_vectors(embedded(tensor), 3)
    assert errors == {}
    assert vectors.tolist() == tensor.detach().double().tolist()
    narrow = {torch.float16: np.float16, torch.float64: np.float64}
    assert vectors.dtype == narrow.get(dtype, np.float32)
