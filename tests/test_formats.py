"""Every format that is read: the values, ids and columns that were written come back, or an error
says what is wrong and where.
"""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import aesthetic_filter as af
from aesthetic_filter.errors import (
    ShardError,
    SourceError,
    WidthError,
    WrongEmbeddingsError,
)
from aesthetic_filter.formats import BATCH_ROWS, Wanted, find_format, formats, npy
from aesthetic_filter.storage import list_source
from aesthetic_filter.table import carried_names, column_vectors

Make = Callable[..., NDArray[Any]]

several = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def read(location: Any, name: str | None = None, **wanted: Any) -> list[pa.Table]:
    """All batches of all shards."""
    source = list_source(location)
    _, reader = find_format(source, name)
    return [
        table
        for shard in reader.shards(source)
        for table in reader.read(source, shard, Wanted(**wanted))
    ]


def ids(tables: list[pa.Table]) -> list[str]:
    return [image_id for table in tables for image_id in table["image_id"].to_pylist()]


def vectors(tables: list[pa.Table]) -> NDArray[Any]:
    """The rows of all batches, each of which must be whole."""
    found = [column_vectors(table["embedding"]) for table in tables]
    assert not any(errors for _, errors in found)
    return np.concatenate([rows for rows, _ in found])


def score_by_hand(rows: NDArray[Any]) -> NDArray[np.float64]:
    """Scores of the reference head in float64."""
    weight, bias = (a.astype(np.float64) for a in af.load_head().layers[0])
    wide = rows.astype(np.float64)
    return wide @ weight[0] / np.linalg.norm(wide, axis=1) + bias[0]


def scored(out: Path) -> dict[str, float | None]:
    table = pq.read_table(out)
    return dict(
        zip(table["image_id"].to_pylist(), table["aesthetic_score"].to_pylist(), strict=True)
    )


# .npy


def save_npy(path: Path, array: NDArray[Any], version: tuple[int, int] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.lib.format.write_array(file, array, version=version)
    return path


@several
@given(
    rows=st.integers(0, 40),
    width=st.integers(1, 40),
    dtype=st.sampled_from(["<f2", "<f4", "<f8", ">f2", ">f4", ">f8"]),
    order=st.sampled_from(["C", "F"]),
    version=st.sampled_from([(1, 0), (2, 0)]),
    seed=st.integers(0, 99),
)
def test_npy_rows_come_back(
    tmp_path: Path, rows: int, width: int, dtype: str, order: Any, version: Any, seed: int
) -> None:
    array = np.random.default_rng(seed).standard_normal((rows, width)).astype(dtype, order=order)
    tables = read(save_npy(tmp_path / "some.npy", array, version))
    found = vectors(tables)
    assert found.dtype == array.dtype.newbyteorder("=")
    assert found.shape == array.shape
    assert np.array_equal(found, array)
    many = [f"some.npy#{row}" for row in range(rows)]
    assert ids(tables) == (["some.npy"] if rows == 1 else many)


@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_files_of_several_batches(order: Any, tmp_path: Path) -> None:
    rows = 2 * BATCH_ROWS + 100
    array = np.arange(rows * 8, dtype=np.float32).reshape(rows, 8)
    save_npy(tmp_path / "many.npy", np.asarray(array, order=order))
    tables = read(tmp_path / "many.npy")
    # All batches are held here together: none was overwritten by the next.
    assert [table.num_rows for table in tables] == [BATCH_ROWS, BATCH_ROWS, 100]
    assert np.array_equal(vectors(tables), array)
    assert ids(tables) == [f"many.npy#{row}" for row in range(rows)]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(768,), (1, 768)])
def test_a_file_with_one_vector_is_named_after_itself(
    shape: tuple[int, ...], dtype: Any, tmp_path: Path, make_embeddings: Make
) -> None:
    array = make_embeddings(1, dtype=dtype)
    save_npy(tmp_path / "deep" / "one.npy", array.reshape(shape))
    tables = read(tmp_path)
    assert ids(tables) == ["deep/one.npy"]
    assert np.array_equal(vectors(tables), array)


def test_a_file_of_no_rows_has_none(tmp_path: Path, make_embeddings: Make) -> None:
    save_npy(tmp_path / "in" / "a.npy", np.empty((0, 768), np.float16))
    save_npy(tmp_path / "in" / "b.npy", make_embeddings(3))
    assert ids(read(tmp_path / "in")) == ["b.npy#0", "b.npy#1", "b.npy#2"]
    af.score(tmp_path / "in", out=tmp_path / "out")
    assert sorted(scored(tmp_path / "out")) == ["b.npy#0", "b.npy#1", "b.npy#2"]


def cut_short(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


@pytest.mark.parametrize(
    ("by", "reason"),
    [
        (1, "its header promises 10 rows, 9 are there"),
        (768 * 2 * 10, "its header promises 10 rows, 0 are there"),
        (768 * 2 * 10 + 20, "cut short in its header"),
        (768 * 2 * 10 + 125, "not a .npy file, or cut short in its header"),
    ],
)
def test_a_truncated_npy_file_is_said_to_be(
    by: int, reason: str, tmp_path: Path, make_embeddings: Make
) -> None:
    path = save_npy(tmp_path / "short.npy", make_embeddings(10))
    cut_short(path, by)
    with pytest.raises(ShardError) as caught:
        read(path)
    assert reason in str(caught.value)
    assert str(caught.value).startswith("short.npy: ")


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.array([{"a": 1}, None], dtype=object), "holds object values"),
        (np.zeros((2, 768), np.int32), "holds int32 values"),
        (np.zeros((2, 768), np.complex64), "holds complex64 values"),
        (np.zeros((2, 768), bool), "holds bool values"),
        (
            np.zeros((2, 3, 768), np.float32),
            r"has shape (2, 3, 768); embeddings are (rows, values)",
        ),
        (np.float32(3), "has shape ()"),
        (np.zeros(0, np.float32), "has shape (0,)"),
        (np.zeros(3, [("a", "f4")]), "values; embeddings are float16, float32 or float64"),
    ],
)
def test_an_npy_file_of_something_else_is_refused(array: Any, reason: str, tmp_path: Path) -> None:
    np.save(tmp_path / "odd.npy", array, allow_pickle=True)
    with pytest.raises(WrongEmbeddingsError) as caught:
        read(tmp_path)
    assert "odd.npy" in str(caught.value)
    assert reason in str(caught.value)


def test_pickles_in_npy_files_are_not_executed(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "executed",)

    np.save(tmp_path / "trap.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    np.load(tmp_path / "trap.npy", allow_pickle=True)
    (tmp_path / "executed").unlink()
    with pytest.raises(WrongEmbeddingsError):
        af.score(tmp_path / "trap.npy", out=tmp_path / "out")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"not an array", b"\x93NUMPY\x03\x00"])
def test_a_file_that_is_no_array_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "odd.npy").write_bytes(content)
    with pytest.raises(ShardError, match=r"^odd\.npy: .*\.npy"):
        read(tmp_path)


# Parquet: the embedding column.

VALUES = {"half": pa.float16(), "float": pa.float32(), "double": pa.float64()}


def list_column(
    kind: str, value: pa.DataType, rows: NDArray[Any], missing: tuple[int, ...] = ()
) -> pa.Array:
    """An embedding column of this layout, with nulls for the rows of ``missing``."""
    width = rows.shape[1]
    plain = rows.astype(value.to_pandas_dtype())
    as_list: list[Any] = [None if row in missing else plain[row] for row in range(len(rows))]
    if kind == "fixed_size_list":
        return pa.array(as_list, pa.list_(value, width))
    if kind == "list":
        return pa.array(as_list, pa.list_(value))
    if kind == "large_list":
        return pa.array(as_list, pa.large_list(value))
    storage = pa.array(as_list, pa.list_(value, width))
    return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(value, (width,)), storage)


KINDS = ("fixed_size_list", "list", "large_list", "tensor")


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("kind", KINDS)
def test_parquet_rows_come_back(kind: str, value: str, tmp_path: Path) -> None:
    array = np.random.default_rng(1).standard_normal((50, 12))
    column = list_column(kind, VALUES[value], array)
    table = pa.table({"id": [f"x{row}" for row in range(50)], "embedding": column})
    pq.write_table(table, tmp_path / "some.parquet", row_group_size=7)
    tables = read(tmp_path)
    found = vectors(tables)
    assert found.dtype == VALUES[value].to_pandas_dtype()
    assert np.array_equal(found, array.astype(found.dtype))
    assert ids(tables) == table["id"].to_pylist()


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("kind", KINDS)
def test_null_rows_and_values_fail_alone(
    kind: str, value: str, tmp_path: Path, make_embeddings: Make
) -> None:
    array = make_embeddings(40, dtype=np.float64)
    column = list_column(kind, VALUES[value], array, missing=(0, 13, 39))
    holed = (column.storage if kind == "tensor" else column).to_pylist()
    holed[7][5] = holed[8][0] = holed[8][767] = None
    again: Any = pa.array(holed, column.storage.type if kind == "tensor" else column.type)
    if kind == "tensor":
        again = pa.ExtensionArray.from_storage(column.type, again)
    pq.write_table(pa.table({"embedding": again}), tmp_path / "some.parquet", row_group_size=9)
    af.score(tmp_path / "some.parquet", out=tmp_path / "out")
    table = pq.read_table(tmp_path / "out")
    broken = dict.fromkeys((0, 13, 39), "embedding is null")
    broken |= dict.fromkeys((7, 8), "embedding has missing values")
    assert table["error"].to_pylist() == [broken.get(row) for row in range(40)]
    good = [row for row in range(40) if row not in broken]
    for name in ("aesthetic_score", "embedding_norm", "reference_cosine"):
        assert [table[name][row].as_py() for row in broken] == [None] * 5
    expected = score_by_hand(array.astype(VALUES[value].to_pandas_dtype()))
    found = [table["aesthetic_score"][row].as_py() for row in good]
    np.testing.assert_allclose(found, expected[good], rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["list", "large_list"])
def test_rows_of_another_length_fail_alone(
    kind: str, tmp_path: Path, make_embeddings: Make
) -> None:
    array = make_embeddings(30, dtype=np.float32)
    rows: list[Any] = list(array)
    rows[3], rows[4], rows[29] = rows[3][:512], rows[4][:0], np.concatenate([array[0], array[1]])
    make = pa.list_ if kind == "list" else pa.large_list
    pq.write_table(pa.table({"e": pa.array(rows, make(pa.float32()))}), tmp_path / "some.parquet")
    af.score(tmp_path / "some.parquet", out=tmp_path / "out")
    table = pq.read_table(tmp_path / "out")
    lengths = {3: 512, 4: 0, 29: 1536}
    errors = [f"embedding has {n} values, not 768" for n in lengths.values()]
    assert [table["error"][row].as_py() for row in lengths] == errors
    assert table["error"].null_count == 27
    good = [row for row in range(30) if row not in lengths]
    found = [table["aesthetic_score"][row].as_py() for row in good]
    np.testing.assert_allclose(found, score_by_hand(array)[good], rtol=0, atol=2e-5)


@several
@given(data=st.data(), kind=st.sampled_from(KINDS), value=st.sampled_from(list(VALUES)))
def test_sliced_and_chunked_columns(data: st.DataObject, kind: str, value: str) -> None:
    count, width = data.draw(st.integers(1, 25)), data.draw(st.integers(1, 6))
    array = np.random.default_rng(count).standard_normal((count, width))
    array = array.astype(VALUES[value].to_pandas_dtype())
    missing = tuple(data.draw(st.sets(st.integers(0, count - 1), max_size=3)))
    column = list_column(kind, VALUES[value], array, missing)
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    cut = data.draw(st.integers(start, stop))
    chunked = pa.chunked_array([column[start:cut], column[cut:cut], column[cut:stop]], column.type)
    for some in (column[start:stop], chunked):
        found, errors = column_vectors(some, width)
        assert found.shape == (stop - start, width)
        assert sorted(errors) == sorted(m - start for m in missing if start <= m < stop)
        expected = array[start:stop].copy()
        expected[sorted(errors)] = 0
        assert np.array_equal(found, expected)


def test_a_plain_column_is_not_copied() -> None:
    array = np.arange(120, dtype=np.float16).reshape(10, 12)
    for kind in KINDS:
        column = list_column(kind, pa.float16(), array)
        first, again = column_vectors(column, 12)[0], column_vectors(column, 12)[0]
        assert np.shares_memory(first, again), kind


def test_a_parquet_file_of_no_rows_has_none(tmp_path: Path, make_embeddings: Make) -> None:
    table = pa.table(
        {"id": ["a", "b"], "embedding": list_column("list", pa.float32(), make_embeddings(2))}
    )
    (tmp_path / "in").mkdir()
    pq.write_table(table.slice(0, 0), tmp_path / "in" / "a.parquet")
    pq.write_table(table, tmp_path / "in" / "b.parquet")
    assert ids(read(tmp_path / "in")) == ["a", "b"]
    af.score(tmp_path / "in", out=tmp_path / "out")
    assert sorted(scored(tmp_path / "out")) == ["a", "b"]


@pytest.mark.parametrize("cut", [0, 3, 100, -1, -100])
def test_a_truncated_parquet_file_is_said_to_be(
    cut: int, tmp_path: Path, make_embeddings: Make
) -> None:
    path = tmp_path / "short.parquet"
    pq.write_table(
        pa.table({"embedding": list_column("list", pa.float32(), make_embeddings(20))}), path
    )
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ShardError, match=r"^short\.parquet: not a whole Parquet file"):
        read(path)


def test_a_parquet_file_damaged_in_its_middle_is_said_to_be(
    tmp_path: Path, make_embeddings: Make
) -> None:
    path = tmp_path / "bad.parquet"
    column = list_column("list", pa.float32(), make_embeddings(2000))
    pq.write_table(pa.table({"embedding": column}), path)
    content = bytearray(path.read_bytes())
    content[4:2000] = b"\xff" * 1996
    path.write_bytes(content)
    with pytest.raises(ShardError, match=r"^bad\.parquet: not a whole Parquet file"):
        read(path)


# Parquet: which columns.


def write_columns(path: Path, rows: NDArray[Any], **columns: Any) -> pa.Table:
    """Columns given as "vector" hold the rows."""
    made = {
        name: list_column("fixed_size_list", pa.float32(), rows) if isinstance(c, str) else c
        for name, c in columns.items()
    }
    table = pa.table(made)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return table


@pytest.mark.parametrize(
    "name", ["embedding", "image_embedding", "img_emb", "clip_embedding", "vector", "whatever"]
)
def test_the_embedding_column_is_found(name: str, tmp_path: Path) -> None:
    rows = np.random.default_rng(2).standard_normal((4, 6)).astype(np.float32)
    tags = pa.array([[1], [2, 3], [], None], pa.list_(pa.int64()))
    write_columns(tmp_path / "a.parquet", rows, tags=tags, **{name: "vector"})
    assert np.array_equal(vectors(read(tmp_path)), rows)


def test_a_usual_name_wins_over_other_lists_of_numbers(tmp_path: Path) -> None:
    rows = np.random.default_rng(2).standard_normal((4, 6)).astype(np.float32)
    boxes = list_column("list", pa.float32(), rows[:, :4])
    write_columns(tmp_path / "a.parquet", rows, boxes=boxes, img_emb="vector")
    assert np.array_equal(vectors(read(tmp_path)), rows)
    assert np.array_equal(vectors(read(tmp_path, embedding="boxes")), rows[:, :4])


def test_an_ambiguous_embedding_column_asks(tmp_path: Path) -> None:
    rows = np.ones((4, 6), np.float32)
    write_columns(tmp_path / "a.parquet", rows, left="vector", right="vector")
    with pytest.raises(SourceError, match=r"several.*left, right.*--embedding-column"):
        read(tmp_path)


def test_no_embedding_column_says_what_there_is(tmp_path: Path) -> None:
    write_columns(tmp_path / "a.parquet", np.ones((2, 3)), id=["a", "b"], size=[1, 2])
    with pytest.raises(SourceError, match=r"a\.parquet: no column holds.*id, size") as caught:
        read(tmp_path)
    assert "--embedding-column" in str(caught.value)


@pytest.mark.parametrize(
    ("wanted", "option"),
    [
        ({"embedding": "nope"}, "--embedding-column"),
        ({"image_id": "nope"}, "--id-column"),
        ({"others": ("nope",)}, "--columns"),
    ],
)
def test_a_column_that_is_not_there(wanted: Any, option: str, tmp_path: Path) -> None:
    write_columns(tmp_path / "a.parquet", np.ones((2, 3)), id=["a", "b"], embedding="vector")
    message = rf"a\.parquet: there is no column 'nope' for {option}; there are: id, embedding"
    with pytest.raises(SourceError, match=message):
        read(tmp_path, **wanted)


def test_an_embedding_column_of_another_type(tmp_path: Path) -> None:
    write_columns(tmp_path / "a.parquet", np.ones((2, 3)), id=["a", "b"], embedding="vector")
    with pytest.raises(WrongEmbeddingsError, match="lists of floating-point numbers, not string"):
        vectors(read(tmp_path, embedding="id"))


@pytest.mark.parametrize("name", ["image_id", "id", "key", "uid", "url", "file_name"])
def test_the_id_column_is_found(name: str, tmp_path: Path) -> None:
    columns = {"embedding": "vector", "caption": ["p", "q"], name: ["a", "b"]}
    write_columns(tmp_path / "a.parquet", np.ones((2, 3)), **columns)
    (table,) = read(tmp_path)
    assert table["image_id"].to_pylist() == ["a", "b"]
    assert table["caption"].to_pylist() == ["p", "q"]


def test_ids_of_other_types_and_missing_ones(tmp_path: Path) -> None:
    write_columns(
        tmp_path / "numbers.parquet",
        np.ones((3, 3)),
        id=pa.array([7, None, 12345678901], pa.int64()),
        embedding="vector",
    )
    (table,) = read(tmp_path)
    assert table["image_id"].to_pylist() == ["7", "numbers.parquet#1", "12345678901"]
    assert table["id"].to_pylist() == [7, None, 12345678901], "carried with its own type"
    write_columns(tmp_path / "none.parquet", np.ones((2, 3)), embedding="vector")
    assert ids(read(tmp_path / "none.parquet")) == ["none.parquet#0", "none.parquet#1"]
    write_columns(
        tmp_path / "dictionary.parquet",
        np.ones((2, 3)),
        key=pa.array(["a", "b"]).dictionary_encode(),
        embedding="vector",
    )
    assert ids(read(tmp_path / "dictionary.parquet")) == ["a", "b"]


def test_an_id_column_that_is_no_text(tmp_path: Path) -> None:
    structs = pa.array([{"a": 1}, {"a": 2}])
    bad = pa.array([b"good", b"\xff"])
    rows = np.ones((2, 3))
    write_columns(tmp_path / "a.parquet", rows, key=structs, url=["u", "v"], embedding="vector")
    assert ids(read(tmp_path / "a.parquet")) == ["u", "v"], "a struct is passed over"
    with pytest.raises(
        SourceError, match=r"^a\.parquet: the id column 'key' cannot be read as text"
    ):
        read(tmp_path / "a.parquet", image_id="key")
    write_columns(tmp_path / "b.parquet", rows, id=bad, embedding="vector")
    with pytest.raises(SourceError, match=r"^b\.parquet: the id column 'id' .*--id-column"):
        read(tmp_path / "b.parquet")
    write_columns(tmp_path / "c.parquet", rows, id=pa.array([b"x", b"y"]), embedding="vector")
    assert ids(read(tmp_path / "c.parquet")) == ["x", "y"], "text without a type that says so"


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    vector = list_column("list", pa.float32(), np.ones((2, 3)))
    arrays = [pa.array(["a", "b"]), pa.array([1, 2]), pa.array([3, 4]), vector]
    table = pa.Table.from_arrays(arrays, names=["id", "size", "size", "embedding"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(
        SourceError, match=r"a\.parquet: has several columns named 'size'.*--columns"
    ):
        read(tmp_path)
    assert ids(read(tmp_path, others=())) == ["a", "b"]


OTHERS = {
    "caption": pa.array(["a", None, "ünïcode", ""]),
    "width": pa.array([1, 2, None, 4], pa.int32()),
    "taken": pa.array([0, 1, 2, None], pa.timestamp("us", "UTC")),
    "tags": pa.array([["x"], [], None, ["y", "z"]], pa.list_(pa.string())),
    "meta": pa.array([{"a": 1, "b": "c"}] * 4, pa.struct({"a": pa.int64(), "b": pa.string()})),
    "kind": pa.array(["p", "q", "p", "q"]).dictionary_encode(),
    "raw": pa.array([b"\x00", b"", None, b"\xff"]),
    "price": pa.array([None, None, None, None], pa.decimal128(9, 2)),
}


def test_other_columns_are_carried_with_their_types(tmp_path: Path, make_embeddings: Make) -> None:
    table = write_columns(
        tmp_path / "in.parquet", make_embeddings(4), key=list("abcd"), v="vector", **OTHERS
    )
    af.score(tmp_path / "in.parquet", out=tmp_path / "out")
    found = pq.read_table(tmp_path / "out")
    for name in ("key", *OTHERS):
        assert found.schema.field(name).type == table.schema.field(name).type, name
        assert found[name].to_pylist() == table[name].to_pylist(), name
    assert "v" not in found.column_names
    af.score(tmp_path / "in.parquet", out=tmp_path / "some", columns=["width", "caption"])
    names = pq.read_table(tmp_path / "some").column_names
    assert [name for name in names if name in ("key", *OTHERS)] == ["width", "caption"]
    af.score(tmp_path / "in.parquet", out=tmp_path / "none", columns=[])
    names = pq.read_table(tmp_path / "none").column_names
    assert not {"key", *OTHERS} & set(names)


def test_columns_whose_names_are_taken_are_renamed(tmp_path: Path, make_embeddings: Make) -> None:
    rows = make_embeddings(2)
    write_columns(
        tmp_path / "in.parquet",
        rows,
        key=["k0", "k1"],
        image_id=["i0", "i1"],
        aesthetic_score=[1.5, None],
        error=["e", None],
        embedding=[7, 8],
        clip="vector",
    )
    af.score(
        tmp_path / "in.parquet", out=tmp_path / "out", id_column="key", embedding_column="clip"
    )
    found = pq.read_table(tmp_path / "out")
    assert found["image_id"].to_pylist() == ["k0", "k1"]
    assert found["source_image_id"].to_pylist() == ["i0", "i1"]
    assert found["source_aesthetic_score"].to_pylist() == [1.5, None]
    assert found["source_error"].to_pylist() == ["e", None]
    assert found["source_embedding"].to_pylist() == [7, 8]
    np.testing.assert_allclose(found["aesthetic_score"], score_by_hand(rows), atol=2e-5)


# clip-retrieval


def clip_retrieval(
    folder: Path, shards: dict[str, NDArray[Any]], *, padded: str = "{}", **columns: Any
) -> Path:
    """clip-retrieval's layout; ``columns`` are made from the row's number in the source."""
    (folder / "img_emb").mkdir(parents=True, exist_ok=True)
    (folder / "metadata").mkdir(exist_ok=True)
    (folder / "text_emb").mkdir(exist_ok=True)
    start = 0
    columns = columns or {"image_path": "img{}.jpg".format, "caption": "caption {}".format}
    for number, rows in shards.items():
        np.save(folder / "img_emb" / f"img_emb_{number}.npy", rows)
        np.save(folder / "text_emb" / f"text_emb_{number}.npy", np.ones((3, 5), np.float32))
        span = range(start, start + len(rows))
        table = pa.table({name: [make(row) for row in span] for name, make in columns.items()})
        name = f"metadata_{padded.format(number)}.parquet"
        pq.write_table(table, folder / "metadata" / name, row_group_size=1000)
        start += len(rows)
    return folder


@pytest.mark.parametrize("padding", ["{}", "0{}", "0000{}"])
@pytest.mark.parametrize("point_at", [".", "img_emb", "img_emb/*.npy"])
def test_clip_retrieval_output_is_read(
    padding: str, point_at: str, tmp_path: Path, make_embeddings: Make
) -> None:
    rows = make_embeddings(12)
    clip_retrieval(tmp_path, {"0": rows[:5], "1": rows[5:6], "10": rows[6:]}, padded=padding)
    location = tmp_path / point_at
    assert find_format(list_source(location))[0] == "clip-retrieval"
    tables = read(location)
    assert np.array_equal(vectors(tables), rows)
    assert ids(tables) == [f"img{row}.jpg" for row in range(12)]
    assert [c for t in tables for c in t["caption"].to_pylist()] == [
        f"caption {row}" for row in range(12)
    ]


def test_clip_retrieval_with_more_rows_than_a_batch(tmp_path: Path) -> None:
    count = 2 * BATCH_ROWS + 77
    rows = np.random.default_rng(3).standard_normal((count, 4)).astype(np.float32)
    clip_retrieval(tmp_path, {"0": rows})
    tables = read(tmp_path)
    assert np.array_equal(vectors(tables), rows)
    assert ids(tables) == [f"img{row}.jpg" for row in range(count)]
    # Nothing of the metadata wanted, and no ids in it: the rows are still all there.
    clip_retrieval(tmp_path / "bare", {"0": rows}, caption=str)
    bare = read(tmp_path / "bare", others=())
    assert np.array_equal(vectors(bare), rows)
    assert ids(bare) == [f"img_emb/img_emb_0.npy#{row}" for row in range(count)]
    assert bare[0].column_names == ["image_id", "embedding"]


def test_several_clip_retrieval_outputs_in_one_folder(
    tmp_path: Path, make_embeddings: Make
) -> None:
    for name, seed in (("one", 1), ("two", 2)):
        rows = make_embeddings(3, seed)
        clip_retrieval(tmp_path / name, {"0": rows}, image_path=(name + "/{}").format)
    found = dict(zip(ids(read(tmp_path)), vectors(read(tmp_path)), strict=True))
    assert list(found) == [f"{name}/{row}" for name in ("one", "two") for row in range(3)]
    assert np.array_equal(found["two/1"], make_embeddings(3, 2)[1])


def test_row_counts_that_disagree_name_both_files(tmp_path: Path, make_embeddings: Make) -> None:
    clip_retrieval(tmp_path, {"0": make_embeddings(4), "1": make_embeddings(5)})
    np.save(tmp_path / "img_emb" / "img_emb_1.npy", make_embeddings(7))
    with pytest.raises(ShardError) as caught:
        read(tmp_path)
    message = str(caught.value)
    assert "img_emb/img_emb_1.npy: has 7 rows" in message
    assert "metadata/metadata_1.parquet" in message
    assert "has 5" in message


def test_a_missing_metadata_file_is_said_to_be(tmp_path: Path, make_embeddings: Make) -> None:
    clip_retrieval(tmp_path, {"0": make_embeddings(2), "1": make_embeddings(2)})
    (tmp_path / "metadata" / "metadata_1.parquet").unlink()
    with pytest.raises(SourceError, match=r"img_emb_1\.npy: its metadata file.*--format npy"):
        read(tmp_path)
    # As the message says; text_emb lies there too, so the images' folder is named.
    assert len(vectors(read(tmp_path / "img_emb", "npy"))) == 4


def test_the_same_number_twice_is_refused(tmp_path: Path, make_embeddings: Make) -> None:
    clip_retrieval(tmp_path, {"1": make_embeddings(2)})
    np.save(tmp_path / "img_emb" / "img_emb_01.npy", make_embeddings(2))
    with pytest.raises(SourceError, match=r"img_emb_01\.npy and .*img_emb_1\.npy"):
        read(tmp_path)


# Which format, which files.


def test_folders_of_several_formats_ask_which(tmp_path: Path, make_embeddings: Make) -> None:
    rows = make_embeddings(2)
    save_npy(tmp_path / "a.npy", rows)
    write_columns(tmp_path / "b.parquet", rows, embedding="vector")
    with pytest.raises(SourceError, match=r"several formats: npy and parquet; .*--format"):
        read(tmp_path)
    assert ids(read(tmp_path, "npy")) == ["a.npy#0", "a.npy#1"]
    assert ids(read(tmp_path, "parquet")) == ["b.parquet#0", "b.parquet#1"]
    assert ids(read(tmp_path / "*.npy")) == ["a.npy#0", "a.npy#1"]


def test_reading_a_format_that_is_not_there_lists_those_that_are(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((2, 4)))
    with pytest.raises(SourceError) as caught:
        find_format(list_source(tmp_path), "webp")
    for name in formats():
        assert name in str(caught.value)
    embeddings = {"clip-retrieval", "npy", "parquet", "scores"}
    assert set(formats()) == {*embeddings, "folder", "parquet-images", "webdataset"}
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").touch()
    (tmp_path / "notes" / "README").touch()
    with pytest.raises(
        SourceError, match=r"in 2 file\(s\) \(\.txt, no ending\); formats: clip-"
    ) as e:
        find_format(list_source(tmp_path / "notes"))
    for name in formats():
        assert name in str(e.value)
    with pytest.raises(SourceError, match=r"nor embeddings found in .* as parquet"):
        find_format(list_source(tmp_path), "parquet")


def test_hidden_files_are_left_out_unless_named(tmp_path: Path) -> None:
    for name in ("a.npy", ".b.npy", "_c.npy", ".git/d.npy", "_temporary/e.npy", "sub/f.npy"):
        save_npy(tmp_path / name, np.ones((1, 4)))
    assert ids(read(tmp_path)) == ["a.npy", "sub/f.npy"]
    assert ids(read(tmp_path / "*.npy")) == ["a.npy"]
    assert ids(read(tmp_path / "_temporary")) == ["e.npy"]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for number, name in enumerate(
        ("a.npy", "b.npy", "x/a.npy", "x/y/a.npy", "x/y/b.npy", "z/c.npy", "z/notes.txt")
    ):
        path = tmp_path / "tree" / name
        if name.endswith(".npy"):
            save_npy(path, np.full((1, 4), number, np.float32))
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text("notes")
    return tmp_path / "tree"


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("", ["a.npy", "b.npy", "x/a.npy", "x/y/a.npy", "x/y/b.npy", "z/c.npy"]),
        ("x", ["a.npy", "y/a.npy", "y/b.npy"]),
        ("x/", ["a.npy", "y/a.npy", "y/b.npy"]),
        ("b.npy", ["b.npy"]),
        ("*.npy", ["a.npy", "b.npy"]),
        ("[b-z].npy", ["b.npy"]),
        ("x/y/?.npy", ["a.npy", "b.npy"]),
        ("*/a.npy", ["x/a.npy"]),
        ("**/a.npy", ["a.npy", "x/a.npy", "x/y/a.npy"]),
        ("*/y", ["x/y/a.npy", "x/y/b.npy"]),
    ],
)
@pytest.mark.parametrize("how", ["path", "text", "uri", "relative"])
def test_folders_files_globs_and_uris(
    location: str, expected: list[str], how: str, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree)
    where: Any = {
        "path": tree / location,
        "text": f"{tree}/{location}",
        "uri": f"file://{tree}/{location}",
        "relative": location or ".",
    }[how]
    assert ids(read(where)) == expected


def test_names_that_look_like_globs_are_taken_as_they_are(tmp_path: Path) -> None:
    save_npy(tmp_path / "photos [2024]" / "what?.npy", np.ones((1, 4)))
    assert ids(read(tmp_path / "photos [2024]")) == ["what?.npy"]
    assert ids(read(tmp_path / "photos [2024]" / "what?.npy")) == ["what?.npy"]


def test_links_are_followed(tmp_path: Path) -> None:
    save_npy(tmp_path / "real" / "a.npy", np.ones((1, 4)))
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "b.npy").symlink_to(tmp_path / "real" / "a.npy")
    (tmp_path / "folder").symlink_to(tmp_path / "real")
    for location in ("links", "links/*.npy", "links/b.npy"):
        assert ids(read(tmp_path / location)) == ["b.npy"], location
    assert ids(read(tmp_path / "folder")) == ["a.npy"]
    assert ids(read(tmp_path / "fold*")) == ["folder/a.npy"]


@pytest.mark.parametrize("location", ["gone", "gone.npy", "gone/*.npy", "*.gone"])
def test_a_source_that_is_not_there(location: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="there is nothing there") as caught:
        list_source(tmp_path / location)
    assert str(tmp_path / location) in str(caught.value)


def test_an_empty_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="holds no files"):
        list_source(tmp_path)


def test_an_unknown_scheme_says_so() -> None:
    with pytest.raises(SourceError, match=r"nosuch://bucket/x: .*nosuch"):
        list_source("nosuch://bucket/x")


def test_a_shard_that_vanishes_is_named(tmp_path: Path) -> None:
    path = save_npy(tmp_path / "a.npy", np.ones((2, 4)))
    source = list_source(tmp_path)
    _, reader = find_format(source)
    (shard,) = reader.shards(source)
    path.unlink()
    with pytest.raises(ShardError, match=r"^a\.npy: .*gone now"):
        list(reader.read(source, shard, Wanted()))


def test_a_file_system_in_memory(tmp_path: Path, make_embeddings: Make) -> None:
    memory = fsspec.filesystem("memory")
    rows = make_embeddings(5)
    np.save(tmp_path / "rows.npy", rows)
    write_columns(tmp_path / "rows.parquet", rows, key=list("abcde"), embedding="vector")
    clip_retrieval(tmp_path / "clip", {"0": rows})
    try:
        memory.put(str(tmp_path / "rows.npy"), "/bucket/in/deep/rows.npy")
        memory.put(str(tmp_path / "rows.parquet"), "/bucket/table.parquet")
        memory.put(str(tmp_path / "clip"), "/bucket/clip", recursive=True)
        for location in ("memory://bucket/in", "memory://bucket/in/*/rows.npy"):
            tables = read(location)
            assert ids(tables) == [f"deep/rows.npy#{row}" for row in range(5)]
            assert np.array_equal(vectors(tables), rows)
        assert ids(read("memory://bucket/table.parquet")) == list("abcde")
        for location in ("memory://bucket/clip", "memory://bucket/clip/img_emb"):
            assert ids(read(location)) == [f"img{row}.jpg" for row in range(5)]
        af.score("memory://bucket/in", out=tmp_path / "out")
        found = list(scored(tmp_path / "out").values())
        np.testing.assert_allclose(np.array(found, float), score_by_hand(rows), atol=2e-5)
    finally:
        memory.rm("/bucket", recursive=True)


# A store on the network.

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The URL of a moto server on loopback."""
    server_module = pytest.importorskip("moto.server", reason="needs moto[server]")
    pytest.importorskip("s3fs", reason="needs s3fs")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def put(url: str, path: str, content: bytes = b"") -> None:
    kind = {"Content-Type": "application/octet-stream"}
    request = urllib.request.Request(f"{url}/{path}", content, kind, method="PUT")
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.status == 200


SCORE = "import sys, aesthetic_filter as af; af.score(sys.argv[1], out=sys.argv[2])"


@pytest.mark.filterwarnings("ignore:.*datetime.utcnow.*:DeprecationWarning")
def test_s3_end_to_end(s3: str, tmp_path: Path, make_embeddings: Make) -> None:
    rows = make_embeddings(60)
    put(s3, "bucket")
    write_columns(
        tmp_path / "t.parquet", rows[:20], key=[f"k{i}" for i in range(20)], embedding="vector"
    )
    put(s3, "bucket/tables/t.parquet", (tmp_path / "t.parquet").read_bytes())
    for number in range(4):
        np.save(tmp_path / "part.npy", rows[number * 15 : number * 15 + 15])
        put(s3, f"bucket/arrays/deep/{number}.npy", (tmp_path / "part.npy").read_bytes())
    expected = score_by_hand(rows)
    names = [f"deep/{row // 15}.npy#{row % 15}" for row in range(60)]
    table = {f"k{i}": expected[i] for i in range(20)}
    arrays = dict(zip(names, expected, strict=True))
    environment = {**os.environ, **CREDENTIALS, "AWS_ENDPOINT_URL": s3}
    environment.pop("AWS_PROFILE", None)
    for location, wanted in (
        ("s3://bucket/tables", table),
        ("s3://bucket/tables/t.parquet", table),
        ("s3://bucket/arrays", arrays),
        (
            "s3://bucket/arrays/deep/[01].npy",
            {f"{n}.npy#{r}": expected[n * 15 + r] for n in (0, 1) for r in range(15)},
        ),
    ):
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        ran = subprocess.run(
            [sys.executable, "-c", SCORE, location, out],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert ran.returncode == 0, ran.stderr
        found = scored(out)
        assert found.keys() == wanted.keys()
        for image_id, score in wanted.items():
            assert found[image_id] == pytest.approx(score, abs=2e-5)


def test_an_s3_bucket_that_is_not_there(s3: str, cli: Any) -> None:
    ran = cli(
        *("score", "s3://no-such-bucket/x", "--out", "out"),
        env={**CREDENTIALS, "AWS_ENDPOINT_URL": s3, "AWS_PROFILE": None},
    )
    assert ran.returncode == 2, ran.stderr
    assert "s3://no-such-bucket/x: there is nothing there" in ran.stderr
    assert "Traceback" not in ran.stderr


MISSING = """
import sys
sys.modules[sys.argv[1]] = None
import aesthetic_filter as af
try:
    af.score(sys.argv[2], out="out")
except af.AestheticFilterError as error:
    print(type(error).__name__, error.exit_code, error)
"""


@pytest.mark.parametrize(
    ("library", "uri", "extra"),
    [
        ("s3fs", "s3://bucket/x", "s3"),
        ("gcsfs", "gs://bucket/x", "gcs"),
        ("adlfs", "abfs://bucket/x", "azure"),
    ],
)
def test_a_missing_store_library_is_answered_with_the_install_line(
    library: str, uri: str, extra: str, tmp_path: Path
) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", MISSING, library, uri],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert ran.stdout.startswith(f"MissingExtraError 2 {uri}: ")
    assert f'pip install "aesthetic-filter[{extra}]"' in ran.stdout


def test_a_source_of_another_width_is_refused(tmp_path: Path) -> None:
    for name, save in (
        ("a.npy", lambda path, rows: np.save(path, rows)),
        ("a.parquet", lambda path, rows: write_columns(path, rows, embedding="vector")),
    ):
        save(tmp_path / name, np.ones((5, 512), np.float32))
        with pytest.raises(WidthError, match="512 values"):
            af.score(tmp_path / name, out=tmp_path / "out")


@given(st.lists(st.sampled_from(["a", "b", "source_a", "source_source_a", "c"]), unique=True))
def test_carried_columns_never_share_a_name(names: list[str]) -> None:
    found = carried_names(names, ("a", "b"))
    assert list(found) == names
    assert len({*found.values(), "a", "b"}) == len(names) + 2
    assert all(new == name for name, new in found.items() if name not in ("a", "b"))


def test_a_header_that_python_stumbles_over_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As CPython 3.11 does where two threads parse at once."""
    np.save(tmp_path / "a.npy", np.ones((5, 8), np.float16))
    real, calls = np.lib.format.read_array_header_1_0, []

    def stumbles(file: Any) -> Any:
        calls.append(file.tell())
        found = real(file)
        if len(calls) % 2:
            raise SystemError("AST constructor recursion depth mismatch (before=63, after=62)")
        return found

    monkeypatch.setattr(np.lib.format, "read_array_header_1_0", stumbles)
    source = list_source(str(tmp_path))
    (table,) = npy.read(source, npy.shards(source)[0], Wanted())
    assert table.num_rows == 5
    assert len(calls) == 2
