"""Image files in folders: every file is a row, its bytes come back, and kept ones are written."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aesthetic_filter.errors import OutputError, ShardError
from aesthetic_filter.formats import (
    IMAGE_BYTES,
    IMAGE_ROWS,
    ImageOutput,
    Sample,
    Shard,
    Wanted,
    find_writer,
    folder,
    image_writers,
)
from aesthetic_filter.storage import Source, list_source

NAMES = (
    "1.jpg",
    "2.JPG",
    "10.jpeg",
    "a.b.c.webp",
    "deep/er/x.PNG",
    "deep/no extension",
    "deep/photo.jpg.bak2",
    "odd.xyz",
    "zero.gif",
)
"""The files that are rows, in natural order."""

OTHERS = ("1.txt", "1.json", "table.CSV", "deep/clip.mp4", ".hidden.jpg", "_x/y.toml", ".git/z.jpg")
"""Those that are none."""


def content_of(name: str) -> bytes:
    return b"" if name.startswith("zero") else random.Random(name).randbytes(100 + len(name))


def make(root: Path, names: Sequence[str] = (*NAMES, *OTHERS)) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content_of(name))
    return root


def tables(source: Source) -> list[pa.Table]:
    return [t for shard in folder.shards(source) for t in folder.read(source, shard, Wanted())]


def rows(source: Source) -> list[dict[str, Any]]:
    return [row for table in tables(source) for row in table.to_pylist()]


def samples(source: Source) -> list[Sample]:
    return [
        sample
        for shard in folder.shards(source)
        for sample in folder.fetch(source, shard, range(len(shard.files)))
    ]


@pytest.fixture(params=["local", "memory"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Source]:
    make(tmp_path / "in")
    if request.param == "local":
        yield list_source(tmp_path / "in")
        return
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "in"), "/photos", recursive=True)
    try:
        yield list_source("memory://photos")
    finally:
        memory.rm("/photos", recursive=True)


# Reading.


def test_every_file_is_a_row_but_those_that_are_something_else(source: Source) -> None:
    assert folder.matches(source)
    found = rows(source)
    assert [row["image_id"] for row in found] == list(NAMES)
    assert [row["image"] for row in found] == [content_of(name) for name in NAMES]
    assert [row["error"] for row in found] == [None] * len(NAMES)
    root = source.uri if source.is_local else "memory:///photos"
    assert [row["image_path"] for row in found] == [f"{root}/{name}" for name in NAMES]
    (table,) = tables(source)
    assert table.schema == pa.schema(
        {
            "image_id": pa.string(),
            "image_path": pa.string(),
            "image": pa.binary(),
            "error": pa.string(),
        }
    )


def test_samples_are_the_files(source: Source) -> None:
    found = samples(source)
    assert [sample.read() for sample in found] == [content_of(name) for name in NAMES]
    assert [(s.folder, s.key, s.extension) for s in found] == [
        ("", "1", "jpg"),
        ("", "2", "JPG"),
        ("", "10", "jpeg"),
        ("", "a.b.c", "webp"),
        ("", "deep/er/x", "PNG"),
        ("", "deep/no extension", ""),
        ("", "deep/photo.jpg", "bak2"),
        ("", "odd", "xyz"),
        ("", "zero", "gif"),
    ]
    assert not any(sample.sidecars for sample in found)
    paths = [Path(source.uri) / name if source.is_local else None for name in NAMES]
    assert [sample.path for sample in found] == paths
    (shard,) = folder.shards(source)
    assert [s.key for s in folder.fetch(source, shard, [1, 4])] == ["2", "deep/er/x"]
    assert list(folder.fetch(source, shard, [])) == []
    with pytest.raises(ShardError, match="images-00000: has 9 files, no row 9"):
        list(folder.fetch(source, shard, [0, 9]))


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("1.jpg", ["1.jpg"]),
        ("*.jp*g", ["1.jpg", "10.jpeg"]),
        ("deep", ["er/x.PNG", "no extension", "photo.jpg.bak2"]),
        ("**/*.PNG", ["deep/er/x.PNG"]),
        ("{1.jpg,2.JPG}", ["1.jpg", "2.JPG"]),
    ],
)
def test_single_files_and_globs(location: str, expected: list[str], tmp_path: Path) -> None:
    source = list_source(make(tmp_path) / location)
    assert folder.matches(source)
    assert [row["image_id"] for row in rows(source)] == expected


@pytest.mark.parametrize("name", ["a.npy", "a.txt", "jpg", "a.jpg.txt", "deep.jpg/notes"])
def test_folders_without_images_are_not_for_this_format(name: str, tmp_path: Path) -> None:
    assert not folder.matches(list_source(make(tmp_path, [name])))


def test_shards_are_runs_of_the_listing(tmp_path: Path) -> None:
    count = 2 * 4096 + 3
    for number in range(count):
        os.close(os.open(tmp_path / f"{number}.jpg", os.O_CREAT | os.O_WRONLY))
    source = list_source(tmp_path)
    shards = folder.shards(source)
    assert folder.NUMBERED
    assert [shard.name for shard in shards] == ["images-00000", "images-00001", "images-00002"]
    assert [len(shard.files) for shard in shards] == [4096, 4096, 3]
    assert [f.name for s in shards for f in s.files] == [f"{n}.jpg" for n in range(count)]
    versions = [shard.version for shard in shards]
    assert all(len(version) < 200 for version in versions)
    # The version is the content's: it changes with one file's, in its shard alone.
    (tmp_path / "4096.jpg").write_bytes(b"new")
    again = [shard.version for shard in folder.shards(list_source(tmp_path))]
    assert [a == b for a, b in zip(versions, again, strict=True)] == [True, False, True]
    assert Shard("one", shards[0].files[:1]).version.startswith("0.jpg:0:")


def test_batches_are_small(tmp_path: Path) -> None:
    sizes = [10] * 150 + [3 << 20] * 5 + [20 << 20] + [10] * 3
    for number, size in enumerate(sizes):
        (tmp_path / f"{number:03d}.jpg").write_bytes(bytes(size))
    found = tables(list_source(tmp_path))
    assert [len(image) for t in found for image in t["image"].to_pylist()] == sizes
    for table in found:
        assert table.num_rows <= IMAGE_ROWS
        assert sum(map(len, table["image"].to_pylist()[:-1])) < IMAGE_BYTES


# What cannot be read.


def test_files_that_cannot_be_read_fail_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{number}.jpg" for number in range(6)]
    source = list_source(make(tmp_path, names))
    (tmp_path / "1.jpg").unlink()
    (tmp_path / "2.jpg").unlink()
    (tmp_path / "2.jpg").mkdir()
    (tmp_path / "4.jpg").write_bytes(bytes(2 << 20))
    monkeypatch.setattr(folder, "LARGEST_IMAGE", 1 << 20)
    real = os.open

    def refuse(path: Any, *args: Any, **more: Any) -> int:
        if str(path).endswith("3.jpg"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **more)

    monkeypatch.setattr(os, "open", refuse)
    found = rows(source)
    assert [row["image_id"] for row in found] == names
    assert [row["error"] for row in found] == [
        None,
        "file is gone",
        "file cannot be read: not a regular file",
        "file cannot be read: Permission denied",
        "file is larger than 1 MB",
        None,
    ]
    good = {0: content_of("0.jpg"), 5: content_of("5.jpg")}
    assert [row["image"] for row in found] == [good.get(number) for number in range(6)]
    for number, sample in enumerate(samples(source)):
        if number in good:
            assert sample.read() == good[number]
        else:
            with pytest.raises(ShardError, match=f"^{number}.jpg: file "):
                sample.read()


def test_remote_files_that_cannot_be_read_fail_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    names = [f"{number:02d}.jpg" for number in range(40)]
    for name in names:
        memory.pipe(f"/faulty/{name}", content_of(name))
    memory.pipe("/faulty/20.jpg", bytes(2 << 20))
    monkeypatch.setattr(folder, "LARGEST_IMAGE", 1 << 20)
    real = memory.cat_file

    def fail(path: str, *args: Any, **more: Any) -> bytes:
        if path.endswith("30.jpg"):
            raise TimeoutError
        return bytes(real(path, *args, **more))

    monkeypatch.setattr(type(memory), "cat_file", staticmethod(fail))
    try:
        source = list_source("memory://faulty")
        memory.rm("/faulty/10.jpg")
        found = rows(source)
        assert [row["image_id"] for row in found] == names
        errors = {
            10: "file is gone",
            20: "file is larger than 1 MB",
            30: "file cannot be read: TimeoutError",
        }
        assert [row["error"] for row in found] == [errors.get(n) for n in range(40)]
        good = [None if n in errors else content_of(name) for n, name in enumerate(names)]
        assert [row["image"] for row in found] == good
        with pytest.raises(ShardError, match=r"^10\.jpg: file is gone"):
            samples(source)[10].read()
    finally:
        memory.rm("/faulty", recursive=True)


def test_names_that_are_not_utf8_are_rows_too(tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/in/caf\xe9.jpg"))
    make(tmp_path / "in", ["a.jpg"])
    odd.write_bytes(b"odd")
    source = list_source(tmp_path / "in")
    found = rows(source)
    assert [row["image_id"] for row in found] == ["a.jpg", r"caf\xe9.jpg"]
    assert found[1]["image"] == b"odd"
    assert found[1]["image_path"] == rf"{tmp_path}/in/caf\xe9.jpg"
    sample = samples(source)[1]
    assert sample.path == odd
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", [(SCORED | {"image_id": "x"}, sample)])
    (written,) = index(tmp_path / "out")
    assert (tmp_path / "out" / written["file"]).read_bytes() == b"odd"


# Writing.

SCHEMA = pa.schema(
    {
        "image_id": pa.string(),
        "image_path": pa.string(),
        "aesthetic_score": pa.float32(),
        "width": pa.int32(),
        "file": pa.string(),
        "tags": pa.list_(pa.string()),
    }
)
SCORED = {
    "image_path": "p",
    "aesthetic_score": 5.5,
    "width": 7,
    "file": "its own",
    "tags": ["x", "y"],
}


def write(out: Path, kept: list[tuple[dict[str, Any], Sample]], link: str | None = None) -> None:
    image_writers()["folder"].write_images(out, iter(kept), SCHEMA, ImageOutput(link=link))


def index(out: Path) -> list[dict[str, Any]]:
    return pq.read_table(out / "_index.parquet").to_pylist()


def files(out: Path) -> dict[str, bytes]:
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name != "_index.parquet"
    }


def given(key: str, extension: str = "jpg", **more: Any) -> Sample:
    content = more.pop("content", f"{key}.{extension}".encode("utf-8", "surrogatepass"))
    return Sample(more.pop("folder", ""), key, extension, lambda: content, **more)


def test_what_is_written_is_what_was_read(source: Source, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    kept = [(SCORED | {"image_id": n}, s) for n, s in zip(NAMES, samples(source), strict=True)]
    write(tmp_path / "out", kept)
    assert files(tmp_path / "out") == {name: content_of(name) for name in NAMES}
    written = index(tmp_path / "out")
    assert list(written[0]) == [
        *("image_id", "file", "aesthetic_score", "image_path", "width", "source_file", "tags")
    ]
    assert [row["image_id"] for row in written] == list(NAMES)
    assert [row["file"] for row in written] == list(NAMES)
    assert {row["source_file"] for row in written} == {"its own"}
    assert written[3]["tags"] == ["x", "y"]
    assert written[3]["aesthetic_score"] == 5.5
    again = rows(list_source(tmp_path / "out"))
    assert {row["image_id"]: row["image"] for row in again} == {n: content_of(n) for n in NAMES}


def test_nothing_kept_is_an_empty_index(tmp_path: Path) -> None:
    write(tmp_path, [])
    assert index(tmp_path) == []
    assert pq.read_schema(tmp_path / "_index.parquet").names[:2] == ["image_id", "file"]


def test_copies_keep_their_time(tmp_path: Path) -> None:
    make(tmp_path / "in", ["a.jpg"])
    os.utime(tmp_path / "in" / "a.jpg", ns=(1_000_000_123, 2_000_000_456))
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", [({"image_id": "a"}, samples(list_source(tmp_path / "in"))[0])])
    assert (tmp_path / "out" / "a.jpg").stat().st_mtime_ns == 2_000_000_456
    assert not (tmp_path / "out" / "a.jpg").samefile(tmp_path / "in" / "a.jpg")


HOSTILE = [
    "../up",
    "../../../../etc/passwd",
    "/absolute",
    "a/../../b",
    "C:\\x\\y",
    "..\\..\\z",
    "nul\0byte",
    "line\nbreak",
    ".",
    "..",
    "",
    "/",
    "x" * 300,
    "d" * 300 + "/" + "e" * 300,
    "/".join(["long"] * 900),
    "é" * 200,
    "\udcff",
    "_index",
    "same",
    "same",
    "same/below",
]


def test_hostile_names_stay_inside(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    out.mkdir(parents=True)
    kept = [
        given(key, ext, content=f"{number} {ext}".encode(), sidecars={"json": b"%d" % number})
        for number, key in enumerate(HOSTILE)
        for ext in ("jpg", "parquet", "", "x/../../y", "e" * 300)
    ]
    write(out, [({"image_id": str(n)}, sample) for n, sample in enumerate(kept)])
    outside = [p for p in tmp_path.rglob("*") if p.is_file() and out not in p.parents]
    assert outside == []
    written = index(out)
    assert len({row["file"] for row in written}) == len(kept)
    for row, sample in zip(written, kept, strict=True):
        assert (out / row["file"]).read_bytes() == sample.read()
    assert len(files(out)) == 2 * len(kept)
    assert sorted(c for n, c in files(out).items() if c.isdigit()) == sorted(
        sample.sidecars["json"] for sample in kept
    )


def test_sidecars_share_the_images_stem(tmp_path: Path) -> None:
    sidecars = {"json": b"{}", "txt": b"caption"}
    kept = [
        given("a/0001", folder="00000", sidecars=sidecars),
        given("a/0001", folder="00000", content=b"again", sidecars=sidecars),
        given("a/0001", "png", folder="00000", sidecars=sidecars),
        given("a/0001", "gif", folder="00001"),
        given("b", "left.png", sidecars={"cls": b"7"}),
        given("c", "jpg", sidecars={"jpg ": b"odd"}),
    ]
    write(tmp_path, [({"image_id": str(n)}, s) for n, s in enumerate(kept)])
    names = [row["file"] for row in index(tmp_path)]
    assert names[0] == "00000/a/0001.jpg"
    assert names[3:] == ["00001/a/0001.gif", "b.left.png", "c.jpg"]
    found = files(tmp_path)
    assert len(found) == 6 + 3 * 2 + 1 + 1
    for name in names[:3]:
        stem = name.rpartition(".")[0]
        assert (found[f"{stem}.json"], found[f"{stem}.txt"]) == (b"{}", b"caption")
    assert found[names[1]] == b"again"
    assert found["b.cls"] == b"7"


@pytest.mark.parametrize("link", ["hard", "symlink"])
def test_links(link: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "in", ["deep/a.jpg", "b.png"])
    (tmp_path / "in" / "c.jpg").symlink_to(tmp_path / "in" / "deep" / "a.jpg")
    monkeypatch.chdir(tmp_path)
    source = list_source("in")
    (tmp_path / "out").mkdir()
    write(Path("out"), [({"image_id": s.key}, s) for s in samples(source)], link)
    monkeypatch.chdir("/")
    assert {row["file"] for row in index(tmp_path / "out")} == {"b.png", "c.jpg", "deep/a.jpg"}
    for name, original in (
        ("deep/a.jpg", "deep/a.jpg"),
        ("b.png", "b.png"),
        ("c.jpg", "deep/a.jpg"),
    ):
        written = tmp_path / "out" / name
        assert written.is_symlink() == (link == "symlink")
        assert written.samefile(tmp_path / "in" / original)
        assert written.read_bytes() == content_of(original)
        if link == "symlink":
            assert written.readlink().is_absolute()


@pytest.mark.parametrize("link", ["hard", "symlink"])
def test_what_cannot_be_linked(link: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="only files of their own can be linked, and 00000 is in"):
        write(tmp_path, [({}, given("a", folder="00000"))], link)
    with pytest.raises(ShardError, match="file is gone"):
        write(tmp_path, [({}, given("b", path=tmp_path / "gone.jpg"))], link)


@pytest.mark.parametrize(("code", "says"), [(18, "--link symlink"), (1, "--link symlink")])
def test_hard_links_that_are_refused(
    code: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "in", ["a.jpg"])
    (tmp_path / "out").mkdir()

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    kept = [({"image_id": "a"}, s) for s in samples(list_source(tmp_path / "in"))]
    with pytest.raises(OutputError, match=says) as caught:
        write(tmp_path / "out", kept, "hard")
    assert os.strerror(code) in str(caught.value)


def test_a_full_disk_is_not_hidden(tmp_path: Path) -> None:
    def full() -> bytes:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, [({"image_id": "a"}, Sample("", "a", "jpg", full))])


def test_the_index_alone_is_a_format_too(tmp_path: Path) -> None:
    writer = find_writer("index")
    assert writer.ENDING == ".parquet"
    batch = pa.RecordBatch.from_pylist([{"image_id": "a"}], pa.schema({"image_id": pa.string()}))
    writer.write(tmp_path / "kept.parquet", batch.schema, iter([batch]))
    assert pq.read_table(tmp_path / "kept.parquet").to_pylist() == [{"image_id": "a"}]
