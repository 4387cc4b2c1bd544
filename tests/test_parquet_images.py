"""Parquet files with images: the bytes, ids and columns that were written come back."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aesthetic_filter.errors import CutShortError, ShardError, SourceError
from aesthetic_filter.filenames import guess_extension
from aesthetic_filter.formats import (
    IMAGE_BYTES,
    IMAGE_ROWS,
    ImageOutput,
    Sample,
    Shard,
    Wanted,
    find_format,
    image_writers,
    parquet_images,
)
from aesthetic_filter.storage import Source, list_source

HF = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def image(number: int, size: int = 200) -> bytes:
    return b"\xff\xd8\xff" + random.Random(number).randbytes(size)


IMAGES = [image(number) for number in range(10)]


def save(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


def read(location: Any, **wanted: Any) -> list[pa.Table]:
    source = list_source(location)
    return [
        table
        for shard in parquet_images.shards(source)
        for table in parquet_images.read(source, shard, Wanted(**wanted))
    ]


def rows(location: Any, **wanted: Any) -> list[dict[str, Any]]:
    return [row for table in read(location, **wanted) for row in table.to_pylist()]


def column(location: Any, name: str, **wanted: Any) -> list[Any]:
    return [row[name] for row in rows(location, **wanted)]


def one_shard(location: Any) -> tuple[Source, Shard]:
    source = list_source(location)
    (shard,) = parquet_images.shards(source)
    return source, shard


def fetch(location: Any, numbers: Sequence[int], **wanted: Any) -> list[Sample]:
    source, shard = one_shard(location)
    return list(parquet_images.fetch(source, shard, numbers, Wanted(**wanted)))


# Which column holds the images.

STRUCTS = pa.array([{"bytes": i, "path": f"{n}.jpg"} for n, i in enumerate(IMAGES)], HF)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("image", STRUCTS),
        ("anything", STRUCTS),
        ("only", pa.array([{"bytes": i} for i in IMAGES], pa.struct({"bytes": pa.binary()}))),
        ("jpg", pa.array(IMAGES, pa.binary())),
        ("image_bytes", pa.array(IMAGES, pa.large_binary())),
        ("img", pa.array(IMAGES, pa.binary()).cast(pa.binary_view())),
        ("anything", pa.array(IMAGES, pa.binary())),
    ],
)
def test_images_are_found_and_come_back(name: str, values: Any, tmp_path: Path) -> None:
    path = save(tmp_path / "a.parquet", {"caption": list("abcdefghij"), name: values})
    assert find_format(list_source(tmp_path))[0] == "parquet-images"
    found = rows(tmp_path)
    assert [row["image"] for row in found] == IMAGES
    assert [row["image_path"] for row in found] == [f"{path}#{n}" for n in range(10)]
    assert [row["caption"] for row in found] == list("abcdefghij")
    assert list(found[0]) == ["image_id", "image_path", "image", "error", "caption"]
    assert [sample.read() for sample in fetch(tmp_path, range(10))] == IMAGES


PATHS = [f"images/{number}.jpg" for number in range(10)]


@pytest.mark.parametrize("name", ["image_path", "file_path", "filename", "image"])
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), "dictionary"])
def test_paths_are_followed(name: str, kind: Any, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for path, content in zip(PATHS, IMAGES, strict=True):
        (tmp_path / path).write_bytes(content)
    values: Any = pa.array(PATHS)
    values = values.dictionary_encode() if kind == "dictionary" else values.cast(kind)
    save(tmp_path / "t.parquet", {name: values, "n": range(10)})
    assert find_format(list_source(tmp_path / "t.parquet"))[0] == "parquet-images"
    found = rows(tmp_path / "t.parquet")
    assert [row["image"] for row in found] == IMAGES
    assert [row["image_path"] for row in found] == [f"{tmp_path}/{path}" for path in PATHS]
    assert [row["n"] for row in found] == list(range(10))
    samples = fetch(tmp_path / "t.parquet", range(10))
    assert [sample.read() for sample in samples] == IMAGES
    assert [sample.path for sample in samples] == [tmp_path / path for path in PATHS]
    assert [f"{s.folder}/{s.key}.{s.extension}" for s in samples] == [f"t/{path}" for path in PATHS]


B, T = [b"x", b"y"], ["x", "y"]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"hash": B, "image": B}, "image"),
        ({"data": B, "jpg": B}, "jpg"),
        ({"hash": B, "path": T}, "path"),
        ({"path": T, "image_path": T, "caption": T}, "image_path"),
        ({"image": T, "bytes": B}, "bytes"),
        ({"image": STRUCTS[:2], "mask": STRUCTS[:2]}, "image"),
        ({"jpg": B, "photo": STRUCTS[:2]}, "photo"),
        ({"jpg": B, "photo": [{"bytes": "text"}] * 2}, "jpg"),
    ],
)
def test_usual_names_decide(columns: dict[str, Any], expected: str, tmp_path: Path) -> None:
    file = list_source(save(tmp_path / "a.parquet", columns)).files[0]
    assert parquet_images.image_column(pa.table(columns).schema, file, None).name == expected


@pytest.mark.parametrize(
    ("columns", "given", "message"),
    [
        ({"a": B, "b": B}, None, r"several columns could be images \(a, b\).*--image-column"),
        ({"a": STRUCTS[:2], "b": STRUCTS[:2]}, None, r"\(a, b\).*--image-column"),
        ({"a": [1, 2], "caption": T}, None, r"no column holds images.*a, caption.*--image-column"),
        ({"image": B}, "img", "no column 'img' for --image-column; there are: image"),
        ({"image": B, "n": [1, 2]}, "n", "holds int64, neither images nor paths"),
    ],
)
def test_a_column_that_cannot_be_told_is_asked_for(
    columns: dict[str, Any], given: str | None, message: str, tmp_path: Path
) -> None:
    save(tmp_path / "a.parquet", columns)
    with pytest.raises(SourceError, match=message) as caught:
        rows(tmp_path, image=given)
    assert str(caught.value).startswith("a.parquet: ")


def test_the_column_that_is_given_is_read(tmp_path: Path) -> None:
    save(tmp_path / "a.parquet", {"jpg": IMAGES[:2], "thumb": IMAGES[2:4]})
    assert column(tmp_path, "image", image="thumb") == IMAGES[2:4]
    assert column(tmp_path, "jpg", image="thumb") == IMAGES[:2]
    assert [s.read() for s in fetch(tmp_path, [0, 1], image="thumb")] == IMAGES[2:4]


VECTOR = pa.array([[0.5, 1.0]] * 2, pa.list_(pa.float32()))


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"jpg": B, "embedding": VECTOR}, False),
        ({"image_path": T, "vectors": VECTOR}, False),
        ({"hash": B, "vectors": VECTOR}, False),
        ({"jpg": B, "box": VECTOR}, True),
        ({"image": STRUCTS[:2], "box": VECTOR}, True),
        ({"caption": T}, False),
        ({"url": T}, False),
        ({"hash": B}, True),
    ],
)
def test_tables_of_images_are_told_from_others(
    columns: dict[str, Any], expected: bool, tmp_path: Path
) -> None:
    save(tmp_path / "b.parquet", columns)
    assert parquet_images.matches(list_source(tmp_path)) is expected
    # Files that cannot be read do not decide; and beside vectors a table is their metadata.
    (tmp_path / "a.parquet").write_bytes(b"nothing")
    assert parquet_images.matches(list_source(tmp_path)) is expected
    (tmp_path / "c.npy").touch()
    assert not parquet_images.matches(list_source(tmp_path))


# Ids and columns.


@pytest.mark.parametrize("name", ["image_id", "id", "key", "url", "file_name"])
def test_ids_are_the_tables_own(name: str, tmp_path: Path) -> None:
    save(tmp_path / "a.parquet", {"image": STRUCTS, name: [f"i{n}" for n in range(10)]})
    assert column(tmp_path, "image_id") == [f"i{n}" for n in range(10)]


def test_ids_that_are_made(tmp_path: Path) -> None:
    paths = ["a.jpg", "b.jpg", "a.jpg", None, "a.jpg#2", "a.jpg", ""]
    structs = pa.array([{"bytes": b"x", "path": path} for path in paths], HF)
    save(tmp_path / "deep" / "s.parquet", {"image": structs})
    assert column(tmp_path, "image_id") == [
        "deep/s.parquet/a.jpg",
        "deep/s.parquet/b.jpg",
        "deep/s.parquet/a.jpg#2",
        "deep/s.parquet#3",
        "deep/s.parquet/a.jpg#2#2",
        "deep/s.parquet/a.jpg#3",
        "deep/s.parquet#6",
    ]
    save(tmp_path / "bytes" / "s.parquet", {"jpg": [b"x", b"y"]})
    assert column(tmp_path / "bytes", "image_id") == ["s.parquet#0", "s.parquet#1"]
    save(tmp_path / "paths" / "s.parquet", {"filepath": ["x.jpg", "x.jpg"]})
    found = column(tmp_path / "paths", "image_id")
    assert found == ["s.parquet/x.jpg", "s.parquet/x.jpg#2"]
    # A path column of an id's usual name is the id.
    save(tmp_path / "known" / "s.parquet", {"image_path": ["x.jpg", None]})
    assert column(tmp_path / "known", "image_id") == ["x.jpg", "s.parquet#1"]
    save(tmp_path / "given" / "s.parquet", {"jpg": [b"x"], "sku": [7], "id": ["no"]})
    assert column(tmp_path / "given", "image_id", image_id="sku") == ["7"]


def test_other_columns_are_carried(tmp_path: Path) -> None:
    columns = {
        "id": ["a", "b"],
        "image": STRUCTS[:2],
        "width": pa.array([1, None], pa.int16()),
        "aesthetic_score": [5.5, None],
        "error": ["e", None],
        "embedding": [1, 2],
        "source_width": ["taken", "too"],
        "tags": [["x"], []],
    }
    save(tmp_path / "a.parquet", columns)
    (table,) = read(tmp_path)
    assert table.column_names == [
        *("image_id", "image_path", "image", "error", "id", "source_source_width"),
        *("source_aesthetic_score", "source_error", "source_embedding", "source_width", "tags"),
    ]
    carried = table.to_pydict()
    assert carried["source_aesthetic_score"] == [5.5, None]
    assert carried["source_error"] == ["e", None]
    assert carried["source_embedding"] == [1, 2]
    assert carried["source_width"] == ["taken", "too"]
    assert carried["source_source_width"] == [1, None]
    assert table.schema.field("source_source_width").type == pa.int16()
    assert carried["tags"] == [["x"], []]
    (some,) = read(tmp_path, others=("tags", "width"))
    assert some.column_names[4:] == ["tags", "source_width"]
    (none,) = read(tmp_path, others=())
    assert none.column_names == ["image_id", "image_path", "image", "error"]
    assert none["image_id"].to_pylist() == ["a", "b"]
    with pytest.raises(SourceError, match="no column 'nothing' for --columns"):
        read(tmp_path, others=("nothing",))


def test_files_of_no_rows(tmp_path: Path) -> None:
    save(tmp_path / "a.parquet", {"image": STRUCTS[:0], "n": pa.array([], pa.int8())})
    (table,) = read(tmp_path)
    assert table.num_rows == 0
    assert table.column_names == ["image_id", "image_path", "image", "error", "n"]
    assert table.schema.field("n").type == pa.int8()
    assert fetch(tmp_path, []) == []


# Rows, batches, row groups.


def test_null_images_fail_alone(tmp_path: Path) -> None:
    (tmp_path / "there.jpg").write_bytes(b"there")
    values = [
        {"bytes": b"zero", "path": "z.jpg"},
        None,
        {"bytes": None, "path": None},
        {"bytes": None, "path": "there.jpg"},
        {"bytes": None, "path": "gone.jpg"},
        {"bytes": b"", "path": None},
    ]
    path = save(tmp_path / "a.parquet", {"image": pa.array(values, HF)})
    found = rows(path)
    images = [b"zero", None, None, b"there", None, b""]
    assert [row["image"] for row in found] == images
    errors = [None, "image is null", "image is null", None, "file is gone", None]
    assert [row["error"] for row in found] == errors
    assert [row["image_path"] for row in found] == [
        *(f"{path}#{n}" for n in range(3)),
        f"{tmp_path}/there.jpg",
        f"{tmp_path}/gone.jpg",
        f"{path}#5",
    ]
    samples = fetch(path, range(6))
    for sample, content, error in zip(samples, images, errors, strict=True):
        if content is None:
            with pytest.raises(ShardError, match=rf"^a\.parquet: row \d: {error}"):
                sample.read()
        else:
            assert sample.read() == content
    assert [s.path for s in samples[3:5]] == [tmp_path / "there.jpg", tmp_path / "gone.jpg"]
    save(tmp_path / "b" / "b.parquet", {"jpg": pa.array([b"x", None], pa.binary())})
    assert column(tmp_path / "b", "error") == [None, "image is null"]
    save(tmp_path / "c" / "c.parquet", {"path": pa.array(["../there.jpg", None])})
    assert column(tmp_path / "c", "error") == [None, "image is null"]


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 1000, 200_000, 3_000_000]), max_size=30),
    group=st.integers(1, 40),
    data=st.data(),
    struct=st.booleans(),
)
def test_every_row_comes_back_whatever_the_row_groups(
    sizes: list[int], group: int, data: st.DataObject, struct: bool, tmp_path: Path
) -> None:
    images = [bytes([number]) * size for number, size in enumerate(sizes)]
    values: Any = pa.array(images, pa.binary())
    if struct:
        values = pa.array([{"bytes": i, "path": None} for i in images], HF)
    start = data.draw(st.integers(0, len(sizes)))
    table = pa.table({"image": values, "n": range(len(sizes))}).slice(start)  # sliced arrays too
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=group)
    images = images[start:]
    tables = read(tmp_path)
    assert [i for t in tables for i in t["image"].to_pylist()] == images
    assert [n for t in tables for n in t["n"].to_pylist()] == list(range(start, len(sizes)))
    for found in tables:
        assert found.num_rows <= IMAGE_ROWS
        assert sum(map(len, found["image"].to_pylist()[:-1])) < IMAGE_BYTES
    chosen = sorted(data.draw(st.sets(st.integers(0, len(images) - 1)))) if images else []
    assert [s.read() for s in fetch(tmp_path, chosen)] == [images[n] for n in chosen]


def test_many_rows_come_in_small_batches(tmp_path: Path) -> None:
    images = [b"%d" % number for number in range(1000)]
    save(tmp_path / "a.parquet", {"jpg": images, "n": range(1000)})
    tables = read(tmp_path)
    assert max(table.num_rows for table in tables) == IMAGE_ROWS
    assert [i for t in tables for i in t["image"].to_pylist()] == images
    assert [i for t in tables for i in t["image_id"].to_pylist()] == [
        f"a.parquet#{n}" for n in range(1000)
    ]


def test_only_the_row_groups_with_wanted_rows_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(
        tmp_path / "a.parquet",
        {"jpg": [bytes([n]) * 10 for n in range(100)], "n": range(100)},
        row_group_size=10,
    )
    asked: list[tuple[Any, Any]] = []
    real = pq.ParquetFile.iter_batches

    def counted(self: Any, *args: Any, **more: Any) -> Any:
        asked.append((more["row_groups"], more["columns"]))
        return real(self, *args, **more)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    found = fetch(path, [3, 4, 55, 99])
    assert [s.read() for s in found] == [bytes([n]) * 10 for n in (3, 4, 55, 99)]
    assert asked == [([0], ["jpg"]), ([5], ["jpg"]), ([9], ["jpg"])]
    with pytest.raises(ShardError, match=r"a\.parquet: has 100 rows, no row 100"):
        fetch(path, [5, 100])


PEAK = """
import resource, sys
from aesthetic_filter.formats import Wanted, parquet_images
from aesthetic_filter.storage import list_source
source = list_source(sys.argv[1])
(shard,) = parquet_images.shards(source)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
count, before = 0, None
for table in parquet_images.read(source, shard, Wanted()):
    count += table.num_rows
    before = before or peak()
for sample in parquet_images.fetch(source, shard, range(0, count, 7)):
    sample.read()
print(count, peak() - before)
"""


def test_memory_stays_flat_in_a_large_row_group(tmp_path: Path) -> None:
    count, size = 1500, 200_000  # 300 MB in one row group
    schema = pa.schema({"jpg": pa.binary()})
    with pq.ParquetWriter(
        tmp_path / "a.parquet",
        schema,
        compression="none",
        use_dictionary=False,
        write_batch_size=8,
    ) as writer:
        table = pa.table({"jpg": [os.urandom(size) for _ in range(count)]}, schema)
        writer.write_table(table, row_group_size=count)
    assert pq.ParquetFile(tmp_path / "a.parquet").num_row_groups == 1
    ran = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path], capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
    rows_read, grown = map(int, ran.stdout.split())
    assert rows_read == count
    assert grown < 120, f"{grown} MB more than after the first batch"


# Paths.


def test_absolute_paths_and_uris(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    (tmp_path / "a.jpg").write_bytes(b"a")
    memory.pipe("/elsewhere/b.PNG", b"b")
    values = [
        str(tmp_path / "a.jpg"),
        f"file://{tmp_path}/a.jpg",
        "memory://elsewhere/b.PNG",
        "memory://elsewhere/gone.jpg",
        "../a.jpg",
    ]
    save(tmp_path / "in" / "t.parquet", {"filepath": values})
    here = f"{tmp_path}/a.jpg"
    try:
        found = rows(tmp_path / "in")
        assert [row["image"] for row in found] == [b"a", b"a", b"b", None, b"a"]
        assert [row["error"] for row in found] == [None, None, None, "file is gone", None]
        assert [row["image_path"] for row in found] == [here, *values[1:4], here]
        samples = fetch(tmp_path / "in", range(5))
        assert [(s.key, s.extension) for s in samples] == [
            *(("a", "jpg"), ("a", "jpg"), ("b", "PNG"), ("gone", "jpg"), ("../a", "jpg"))
        ]
        local = Path(here)
        assert [s.path for s in samples] == [local, local, None, None, local]
        assert [s.read() for s in (*samples[:3], samples[4])] == [b"a", b"a", b"b", b"a"]
        with pytest.raises(ShardError, match=r"t\.parquet: row 3: file is gone"):
            samples[3].read()
    finally:
        memory.rm("/elsewhere", recursive=True)


def test_a_table_in_a_remote_store_has_its_images_beside_it(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    names = [f"images/{n}.jpg" for n in range(100)]
    save(tmp_path / "t.parquet", {"image_path": names})
    memory.pipe("/remote/t.parquet", (tmp_path / "t.parquet").read_bytes())
    for number, name in enumerate(names):
        if number != 50:
            memory.pipe(f"/remote/{name}", image(number))
    try:
        found = rows("memory://remote/t.parquet")
        expected = [image(number) if number != 50 else None for number in range(100)]
        assert [row["image"] for row in found] == expected
        assert [row["image_path"] for row in found] == [f"memory:///remote/{n}" for n in names]
        assert found[50]["error"] == "file is gone"
        samples = fetch("memory://remote/t.parquet", [0, 7, 99])
        assert [s.read() for s in samples] == [expected[n] for n in (0, 7, 99)]
    finally:
        memory.rm("/remote", recursive=True)


def test_images_that_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_images, "LARGEST_IMAGE", 1 << 20)
    (tmp_path / "big.jpg").write_bytes(bytes(2 << 20))
    values = [
        {"bytes": bytes(2 << 20), "path": None},
        {"bytes": None, "path": "big.jpg"},
        {"bytes": b"good", "path": None},
    ]
    save(tmp_path / "a.parquet", {"image": pa.array(values, HF)})
    found = rows(tmp_path / "a.parquet")
    assert [row["error"] for row in found] == [
        *("image is larger than 1 MB", "file is larger than 1 MB", None)
    ]
    assert [row["image"] for row in found] == [None, None, b"good"]


# Files that are damaged.


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no Parquet at all", b"PAR1" * 10])
def test_what_is_not_parquet_is_said_to_be(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(ShardError, match=r"^a\.parquet: not a whole Parquet file") as caught:
        rows(tmp_path)
    assert not isinstance(caught.value, CutShortError)
    with pytest.raises(ShardError, match=r"^a\.parquet: not a whole Parquet file"):
        fetch(tmp_path, [0])


def test_the_rows_before_a_damaged_place_are_kept(tmp_path: Path) -> None:
    images = [image(number, 5000) for number in range(300)]
    path = tmp_path / "a.parquet"
    save(path, {"jpg": images}, row_group_size=100, compression="zstd", use_dictionary=False)
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + 3000] = b"\xff" * 3000
    path.write_bytes(content)
    source, shard = one_shard(path)
    found: list[bytes] = []
    reading = parquet_images.read(source, shard, Wanted())
    with pytest.raises(CutShortError, match=r"^a\.parquet: cannot be read beyond row 100 of 300"):
        found.extend(image for table in reading for image in table["image"].to_pylist())
    assert found == images[:100]
    assert [s.read() for s in fetch(path, [0, 99, 299])] == [images[n] for n in (0, 99, 299)]
    with pytest.raises(ShardError):
        fetch(path, [0, 150])


# Names and extensions of what is fetched.

KINDS = {
    "jpg": b"\xff\xd8\xff\xe0\x00\x10JFIF",
    "png": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
    "webp": b"RIFF\x24\x00\x00\x00WEBPVP8 ",
    "gif": b"GIF89a\x01\x00",
    "bmp": b"BM\x46\x00\x00\x00" + bytes(8) + b"\x28\x00\x00\x00",
    "tif": b"II*\x00\x08\x00\x00\x00",
    "avif": b"\x00\x00\x00\x20ftypavif\x00\x00",
    "jp2": b"\x00\x00\x00\x0cjP  \r\n\x87\n",
    "img": b"something else",
}


def test_names_of_what_is_fetched(tmp_path: Path) -> None:
    contents = [*KINDS.values(), b"MM\x00*\x00\x00", b""]
    save(tmp_path / "deep" / "s.parquet", {"jpg": contents})
    found = fetch(tmp_path, range(len(contents)))
    assert [s.extension for s in found] == [*KINDS, "tif", "img"]
    assert [s.key for s in found] == [f"{n:09d}" for n in range(len(contents))]
    assert {s.folder for s in found} == {"deep/s"}
    assert not any(s.sidecars or s.path for s in found)
    names = ["cat.JPEG", "no extension", "v1.odd one", "../../up.png", None, "a/b.c.webp"]
    png = KINDS["png"]
    structs = pa.array([{"bytes": png, "path": name} for name in names], HF)
    save(tmp_path / "named" / "s.pq", {"image": structs})
    found = fetch(tmp_path / "named", range(6))
    assert [(s.key, s.extension) for s in found] == [
        ("cat", "JPEG"),
        ("no extension", "png"),
        ("v1.odd one", "png"),
        ("../../up", "png"),
        ("000000004", "png"),
        ("a/b.c", "webp"),
    ]


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "gif", "bmp", "tiff", "jp2", "avif"])
def test_the_extension_is_told_from_real_images(extension: str) -> None:
    pil = pytest.importorskip("PIL.Image", reason="needs Pillow")
    named = {"jpg": "JPEG", "jp2": "JPEG2000"}.get(extension, extension.upper())
    file = io.BytesIO()
    try:
        pil.new("RGB", (8, 8), "red").save(file, named)
    except (KeyError, OSError):
        pytest.skip(f"Pillow cannot write {named} here")
    assert guess_extension(file.getvalue()) == {"tiff": "tif"}.get(extension, extension)


# Writing.

SCHEMA = pa.schema(
    {
        "image_id": pa.string(),
        "image_path": pa.string(),
        "aesthetic_score": pa.float32(),
        "caption": pa.string(),
        "sidecars": pa.int64(),
        "tags": pa.list_(pa.string()),
        "taken": pa.timestamp("us", "UTC"),
        "box": pa.list_(pa.float32(), 2),
        "meta": pa.struct({"a": pa.int8(), "b": pa.bool_()}),
        "kind": pa.dictionary(pa.int32(), pa.string()),
    },
    metadata={b"kept": b"as it is"},
)


def row(number: int) -> dict[str, Any]:
    return {
        "image_id": f"i{number}",
        "image_path": f"p{number}",
        "aesthetic_score": number / 2,
        "caption": None if number % 2 else "ünïcode",
        "sidecars": number,
        "tags": ["x"] * number,
        "taken": None,
        "box": [1.0, 2.0],
        "meta": {"a": 1, "b": None},
        "kind": "k",
    }


def sample(number: int, content: bytes, **more: Any) -> Sample:
    return Sample("f", f"key{number}", "jpg", lambda: content, **more)


def write(out: Path, kept: list[tuple[dict[str, Any], Sample]], **options: Any) -> list[Path]:
    out.mkdir(parents=True, exist_ok=True)
    schema = options.pop("schema", SCHEMA)
    writer = image_writers()["parquet"]
    assert writer.IMAGE_OPTIONS == ("shard_size",)
    writer.write_images(out, iter(kept), schema, ImageOutput(**options))
    return sorted(out.iterdir())


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    kept = [(row(n), sample(n, image(n))) for n in range(25)]
    paths = write(tmp_path / "out", kept, shard_size=10)
    assert [p.name for p in paths] == [f"kept-0000{n}.parquet" for n in range(3)]
    assert [pq.read_metadata(p).num_rows for p in paths] == [10, 10, 5]
    tables = [pq.read_table(p) for p in paths]
    assert tables[0].column_names == [
        *("image_id", "image", "aesthetic_score", "image_path", "caption", "source_sidecars"),
        *("tags", "taken", "box", "meta", "kind"),
    ]
    for table in tables:
        assert table.schema.field("image").type == HF
        assert table.schema.metadata[b"kept"] == b"as it is"
        for field in SCHEMA:
            name = "source_sidecars" if field.name == "sidecars" else field.name
            assert table.schema.field(name).type == field.type, name
    found = [r for table in tables for r in table.to_pylist()]
    for number, (one, wanted) in enumerate(zip(found, map(row, range(25)), strict=True)):
        assert one.pop("image") == {"bytes": image(number), "path": f"key{number}.jpg"}
        assert one.pop("source_sidecars") == wanted.pop("sidecars")
        assert one == wanted
    # And as a source again.
    again = rows(tmp_path / "out")
    assert [r["image"] for r in again] == [image(n) for n in range(25)]
    assert [r["image_id"] for r in again] == [f"i{n}" for n in range(25)]
    assert [r["source_aesthetic_score"] for r in again] == [n / 2 for n in range(25)]
    samples = fetch(tmp_path / "out" / "kept-00002.parquet", range(5))
    assert [s.key for s in samples] == [f"key{n}" for n in range(20, 25)]


def test_images_are_stored_as_they_are(tmp_path: Path) -> None:
    (path,) = write(tmp_path / "out", [(row(n), sample(n, bytes(100_000))) for n in range(20)])
    group = pq.read_metadata(path).row_group(0)
    chunks = {c.path_in_schema: c for c in map(group.column, range(group.num_columns))}
    assert chunks["image.bytes"].compression == "UNCOMPRESSED"
    assert chunks["caption"].compression == "ZSTD"
    assert bytes(100_000) in path.read_bytes()


def test_nothing_kept_is_one_empty_file(tmp_path: Path) -> None:
    (path,) = write(tmp_path / "out", [])
    assert pq.read_table(path).num_rows == 0
    full = write(tmp_path / "full", [(row(n), sample(n, b"x")) for n in range(4)], shard_size=2)
    assert [pq.read_metadata(p).num_rows for p in full] == [2, 2]


@pytest.mark.parametrize("first", [0, 1, 3, 4, 9, 10])
def test_sidecars_are_kept_wherever_the_first_one_is(first: int, tmp_path: Path) -> None:
    extra = {"json": b"{}", "mask.png": b"\x00\xff"}
    kept = [
        (row(n), sample(n, image(n), sidecars=extra if n >= first and n % 2 == first % 2 else {}))
        for n in range(10)
    ]
    paths = write(tmp_path / "out", kept, shard_size=4)
    assert [p.name for p in paths] == [f"kept-0000{n}.parquet" for n in range(3)]
    assert [pq.read_metadata(p).num_rows for p in paths] == [4, 4, 2]
    assert len({str(pq.read_schema(p)) for p in paths}) == 1
    table = pa.concat_tables([pq.read_table(p) for p in paths])
    assert [i["bytes"] for i in table["image"].to_pylist()] == [image(n) for n in range(10)]
    assert table["image_id"].to_pylist() == [f"i{n}" for n in range(10)]
    if first == 10:
        assert "sidecars" not in table.column_names
        return
    expected = [
        [{"extension": e, "bytes": b} for e, b in s.sidecars.items()] or None for _, s in kept
    ]
    assert table["sidecars"].to_pylist() == expected


def test_row_groups_are_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_images, "GROUP_BYTES", 1 << 20)
    (path,) = write(tmp_path / "out", [(row(n), sample(n, image(n, 300_000))) for n in range(20)])
    metadata = pq.read_metadata(path)
    assert metadata.num_row_groups == 5
    assert {metadata.row_group(n).num_rows for n in range(5)} == {4}


def test_hostile_names_are_only_text(tmp_path: Path) -> None:
    keys = ["../../x", "/etc/passwd", "n\0ul", "x" * 300, "\udcff", ""]
    kept = [
        (row(n), Sample("../f", key, "e/../x", lambda: b"x", sidecars={"\udcff": b"s"}))
        for n, key in enumerate(keys)
    ]
    paths = write(tmp_path / "deep" / "out", kept)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == paths
    assert pq.read_table(paths[0]).num_rows == len(keys)


def features(path: Path) -> Any:
    metadata = pq.read_schema(path).metadata or {}
    return (
        json.loads(metadata[b"huggingface"])["info"]["features"]
        if b"huggingface" in metadata
        else None
    )


def test_datasets_is_told_that_the_column_is_an_image(tmp_path: Path) -> None:
    # The form that datasets.Features.arrow_schema writes and from_arrow_schema reads: an entry of
    # each column, with its class as "_type", a list for a list, an object for a struct.
    (path,) = write(tmp_path / "out", [(row(1), sample(1, b"x", sidecars={"a": b"b"}))])
    text = {"dtype": "string", "_type": "Value"}
    assert features(path) == {
        "image_id": text,
        "image": {"_type": "Image"},
        "aesthetic_score": {"dtype": "float32", "_type": "Value"},
        "image_path": text,
        "caption": text,
        "source_sidecars": {"dtype": "int64", "_type": "Value"},
        "tags": [text],
        "taken": {"dtype": "timestamp[us, tz=UTC]", "_type": "Value"},
        "box": {
            "feature": {"dtype": "float32", "_type": "Value"},
            "length": 2,
            "_type": "Sequence",
        },
        "meta": {
            "a": {"dtype": "int8", "_type": "Value"},
            "b": {"dtype": "bool", "_type": "Value"},
        },
        "kind": text,
        "sidecars": [{"extension": text, "bytes": {"dtype": "binary", "_type": "Value"}}],
    }
    assert list(features(path)) == pq.read_schema(path).names


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (pa.uint8(), "uint8"),
        (pa.float16(), "float16"),
        (pa.date32(), "date32"),
        (pa.time64("us"), "time64[us]"),
        (pa.duration("ms"), "duration[ms]"),
        (pa.timestamp("ns"), "timestamp[ns]"),
        (pa.decimal128(9, 2), "decimal128(9, 2)"),
        (pa.large_string(), "large_string"),
        (pa.null(), "null"),
    ],
)
def test_datasets_types(kind: pa.DataType, dtype: str, tmp_path: Path) -> None:
    schema = pa.schema({"image_id": pa.string(), "x": kind})
    kept = [({"image_id": "a", "x": None}, sample(0, b"x"))]
    (path,) = write(tmp_path / "out", kept, schema=schema)
    assert features(path)["x"] == {"dtype": dtype, "_type": "Value"}


def test_a_type_that_datasets_does_not_know_leaves_its_metadata_out(tmp_path: Path) -> None:
    old = {b"huggingface": b'{"info": {"features": {"stale": {}}}}', b"other": b"1"}
    schema = pa.schema({"image_id": pa.string(), "m": pa.map_(pa.string(), pa.int8())}, old)
    kept = [({"image_id": "a", "m": [("k", 1)]}, sample(0, b"x"))]
    (path,) = write(tmp_path / "out", kept, schema=schema)
    assert features(path) is None
    assert pq.read_table(path)["m"].to_pylist() == [[("k", 1)]]
    assert pq.read_schema(path).metadata[b"other"] == b"1"
