"""WebDataset archives: what lies in them comes back, whatever wrote them and wherever they are cut;
what is written is what WebDataset and Ray Data read.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from aesthetic_filter import archive
from aesthetic_filter.errors import CutShortError, ShardError
from aesthetic_filter.formats import (
    IMAGE_BYTES,
    IMAGE_ROWS,
    ImageFormat,
    ImageOutput,
    Sample,
    Shard,
    Wanted,
    find_format,
    image_writers,
    webdataset,
)
from aesthetic_filter.storage import File, Source, list_source

several = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

Members = Sequence[tuple[str, bytes]]


def noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def pack(members: Members, kind: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar of these members, as Python's tarfile writes it."""
    file = io.BytesIO()
    with tarfile.open(
        fileobj=file, mode="w", format=kind, encoding="utf-8", errors="surrogateescape"
    ) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def zstd(content: bytes) -> bytes:
    return cast(bytes, pa.Codec("zstd").compress(content, asbytes=True))


def save(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def open_shards(location: Any) -> list[tuple[Source, Any]]:
    source = list_source(location)
    name, reader = find_format(source)
    assert name == "webdataset"
    assert reader.GIVES == "image"
    return [(source, shard) for shard in reader.shards(source)]


def read(location: Any, **wanted: Any) -> list[dict[str, Any]]:
    """The rows of all batches of all shards."""
    return [
        row
        for source, shard in open_shards(location)
        for table in webdataset.read(source, shard, Wanted(**wanted))
        for row in table.to_pylist()
    ]


def read_until_cut(source: Source, shard: Any) -> tuple[list[dict[str, Any]], ShardError | None]:
    rows: list[dict[str, Any]] = []
    try:
        for table in webdataset.read(source, shard, Wanted()):
            rows += table.to_pylist()
    except ShardError as error:
        return rows, error
    return rows, None


def fetch(location: Any, *rows: Sequence[int]) -> list[Sample]:
    """The samples of these rows of each shard."""
    return [
        sample
        for (source, shard), numbers in zip(open_shards(location), rows, strict=True)
        for sample in webdataset.fetch(source, shard, numbers)
    ]


def as_webdataset_reads(*paths: Path) -> list[tuple[str, dict[str, bytes]]]:
    """Keys, and extension to content, as WebDataset itself gives them."""
    urls = [str(path) for path in paths]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its files open
        found = list(wds.WebDataset(urls, shardshuffle=False, empty_check=False))
    return [
        (sample["__key__"], {k: v for k, v in sample.items() if not k.startswith("__")})
        for sample in found
    ]


TWO = [
    ("000000000.jpg", noise(700, 1)),
    ("000000000.json", b'{"caption": "a cat"}'),
    ("000000000.txt", b"a cat"),
    ("000000001.png", noise(513, 2)),
    ("000000001.txt", "ein Vögelchen\n".encode()),
    ("000000001.cls", b" 7\n"),
]


# Reading


def test_rows_come_back(tmp_path: Path) -> None:
    save(tmp_path / "a" / "00000.tar", pack(TWO))
    path = f"{tmp_path}/a/00000.tar"
    assert read(tmp_path) == [
        {
            "image_id": "a/00000.tar/000000000",
            "image_path": f"{path}#000000000.jpg",
            "image": TWO[0][1],
            "error": None,
            "txt": "a cat",
            "json": '{"caption": "a cat"}',
            "cls": None,
        },
        {
            "image_id": "a/00000.tar/000000001",
            "image_path": f"{path}#000000001.png",
            "image": TWO[3][1],
            "error": None,
            "txt": "ein Vögelchen\n",
            "json": None,
            "cls": "7",
        },
    ]


def test_tables_have_the_types_that_are_promised(tmp_path: Path) -> None:
    save(tmp_path / "a.tar", pack(TWO))
    save(tmp_path / "b.tar", pack([]))
    full, empty = (
        table
        for source, shard in open_shards(tmp_path)
        for table in webdataset.read(source, shard, Wanted())
    )
    text, binary = pa.string(), pa.binary()
    plain = [("image_id", text), ("image_path", text), ("image", binary), ("error", text)]
    assert full.schema == pa.schema([*plain, ("txt", text), ("json", text), ("cls", text)])
    assert empty.schema == pa.schema(plain)
    assert empty.num_rows == 0


def test_columns_can_be_chosen(tmp_path: Path) -> None:
    save(
        tmp_path / "a.tar", pack([*TWO, ("2.caption", b"x"), ("2.text", b"\xff!"), ("2.jpg", b"j")])
    )
    plain = ["image_id", "image_path", "image", "error"]
    assert list(read(tmp_path)[0]) == [*plain, "txt", "text", "caption", "json", "cls"]
    assert list(read(tmp_path, others=())[0]) == plain
    chosen = read(tmp_path, others=("text", "cls", "no such"))
    assert list(chosen[0]) == [*plain, "text", "cls"]
    assert [row["text"] for row in chosen] == [None, None, "\N{REPLACEMENT CHARACTER}!"]
    assert [row["cls"] for row in chosen] == [None, "7", None]


def test_archives_are_found_by_their_names(tmp_path: Path) -> None:
    plain = pack(TWO)
    packed = {
        "1.tar": plain,
        "2.TAR": plain,
        "3.tar.gz": gzip.compress(plain),
        "4.tgz": gzip.compress(plain),
        "5.Tar.Zst": zstd(plain),
        "6.tar.zstd": zstd(plain),
        # Named otherwise than they are.
        "7.tar": gzip.compress(plain),
        "8.tar.gz": plain,
        "9.tgz": zstd(plain),
    }
    for name, content in packed.items():
        save(tmp_path / name, content)
    save(tmp_path / "1.parquet", b"the index that img2dataset writes")
    save(tmp_path / "1_stats.json", b"{}")
    assert [shard.name for _, shard in open_shards(tmp_path)] == list(packed)
    rows = read(tmp_path)
    expected = [f"{name}/00000000{row}" for name in packed for row in (0, 1)]
    assert [row["image_id"] for row in rows] == expected
    assert [row["image"] for row in rows] == [TWO[0][1], TWO[3][1]] * len(packed)
    samples = fetch(tmp_path, *[[1]] * len(packed))
    assert [s.folder for s in samples] == [str(number) for number in range(1, 10)]
    assert all(sample.read() == TWO[3][1] for sample in samples)


LONG = "d" * 60 + "/" + "e" * 60 + "/" + "f" * 70


@pytest.mark.parametrize(
    "kind",
    [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT],
    ids=["ustar", "gnu", "pax"],
)
def test_archives_of_python(kind: int, tmp_path: Path) -> None:
    members = [
        ("short.jpg", b"1"),
        (f"{LONG}.jpg", b"2"),
        ("ünïcödé/雪.jpg", b"3"),
        ("empty.jpg", b""),
        ("block.jpg", noise(512)),
        ("big.jpg", noise(300_000)),
    ]
    save(tmp_path / "x.tar", pack(members, kind))
    rows = read(tmp_path)
    assert [row["image_id"] for row in rows] == [f"x.tar/{name[:-4]}" for name, _ in members]
    assert [row["image"] for row in rows] == [content for _, content in members]
    assert [s.read() for s in fetch(tmp_path, [1, 2, 5])] == [members[i][1] for i in (1, 2, 5)]


@pytest.mark.skipif(shutil.which("tar") is None, reason="there is no tar here")
@pytest.mark.parametrize("kind", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_archives_of_gnu_tar(kind: str, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    long = "s" * 60 if kind == "v7" else LONG
    save(tree / "a" / "1.jpg", b"one")
    save(tree / "a" / "1.txt", b"text")
    save(tree / "b" / f"{long}.png", noise(2000))
    (tree / "c.jpg").symlink_to("a/1.jpg")
    (tree / "d.jpg").hardlink_to(tree / "a" / "1.jpg")
    out = tmp_path / "in" / "x.tar"
    out.parent.mkdir()
    command = ["tar", f"--format={kind}", "--sort=name", "-cf", str(out), "-C", str(tree), "."]
    subprocess.run(command, check=True, timeout=20)
    rows = read(out.parent)
    assert {row["image_id"]: (row["image"], row["error"]) for row in rows} == {
        "x.tar/./a/1": (b"one", None),
        f"x.tar/./b/{long}": (noise(2000), None),
        "x.tar/./c": (None, "is a link within the archive, not an image"),
        "x.tar/./d": (None, "is a link within the archive, not an image"),
    }
    assert rows[0]["txt"] == "text"


@pytest.mark.skipif(shutil.which("tar") is None, reason="there is no tar here")
@pytest.mark.parametrize(
    "kind",
    [["gnu"], ["posix", "--sparse-version=0.0"], ["posix", "--sparse-version=0.1"], ["posix"]],
)
def test_sparse_files(kind: list[str], tmp_path: Path) -> None:
    content = bytearray(3 << 20)
    content[100_000:100_003], content[-2:] = b"abc", b"yz"
    with save(tmp_path / "tree" / "hole.jpg", b"").open("r+b") as file:
        for place in (100_000, len(content) - 2):
            file.seek(place)
            file.write(bytes(content[place : place + 3]))
    save(tmp_path / "tree" / "next.jpg", b"next")
    with save(tmp_path / "tree" / "vast.jpg", b"").open("r+b") as file:
        file.truncate(600 << 20)
    out = tmp_path / "x.tar"
    form, *more = kind
    names = ["hole.jpg", "vast.jpg", "next.jpg"]
    command = [
        "tar",
        "-S",
        f"--format={form}",
        *more,
        "-cf",
        str(out),
        "-C",
        str(tmp_path / "tree"),
    ]
    subprocess.run([*command, *names], check=True, timeout=20)
    assert out.stat().st_size < 2 << 20
    rows = read(out)
    assert [row["image_id"] for row in rows] == ["x.tar/hole", "x.tar/vast", "x.tar/next"]
    assert [row["image"] for row in rows] == [bytes(content), None, b"next"]
    assert rows[1]["error"] == "file is larger than 512 MB"


def test_archives_of_webdatasets_own_writer(tmp_path: Path) -> None:
    samples = [
        {"__key__": f"{i:06d}", "jpg": noise(50 + i, i), "json": {"n": i}, "txt": f"text {i}"}
        for i in range(200)
    ]
    for name in ("x.tar", "x.tar.gz"):
        with wds.TarWriter(str(tmp_path / name)) as writer:
            for sample in samples:
                writer.write(sample | {"jpg": sample["jpg"]})
    source, shards = open_shards(tmp_path)[0][0], [shard for _, shard in open_shards(tmp_path)]
    for shard in shards:
        tables = list(webdataset.read(source, shard, Wanted()))
        assert [table.num_rows for table in tables] == [IMAGE_ROWS] * 3 + [8]
        rows = [row for table in tables for row in table.to_pylist()]
        assert [row["image"] for row in rows] == [sample["jpg"] for sample in samples]
        assert [json.loads(row["json"]) for row in rows] == [s["json"] for s in samples]
        assert [row["txt"] for row in rows] == [s["txt"] for s in samples]
        assert [row["image_id"] for row in rows] == [f"{shard.name}/{i:06d}" for i in range(200)]


def test_batches_of_large_images_are_small(tmp_path: Path) -> None:
    image = noise(3 << 20)
    save(tmp_path / "x.tar", pack([(f"{i}.jpg", image) for i in range(7)]))
    ((source, shard),) = open_shards(tmp_path)
    tables = list(webdataset.read(source, shard, Wanted()))
    assert [table.num_rows for table in tables] == [3, 3, 1]
    assert all(table.nbytes < IMAGE_BYTES + 2 * len(image) for table in tables)


def test_samples_of_several_images_and_of_none(tmp_path: Path) -> None:
    members = [
        *(("1.left.jpg", b"l"), ("1.txt", b"both"), ("1.RIGHT.PNG", b"r")),
        *(("2.txt", b"no image"), ("2.json", b"{}"), ("2.npy", b"\x93")),
        *(("3.jpg", b"3"), ("3.txt", b"three")),
        *((f"4.{e}", b"") for e in ("g", "f", "e", "d", "c", "b")),
    ]
    save(tmp_path / "x.tar", pack(members))
    rows = read(tmp_path)
    assert [(row["image_id"], row["image"], row["error"], row["txt"]) for row in rows] == [
        ("x.tar/1.left.jpg", b"l", None, "both"),
        ("x.tar/1.RIGHT.PNG", b"r", None, "both"),
        ("x.tar/2", None, "sample holds no image (json, npy, txt)", "no image"),
        ("x.tar/3", b"3", None, "three"),
        ("x.tar/4", None, "sample holds no image (b, c, d, e, f)", None),
    ]
    assert [row["image_path"] for row in rows[:3]] == [
        f"{tmp_path}/x.tar#{name}" for name in ("1.left.jpg", "1.RIGHT.PNG", "2.txt")
    ]
    both = {"txt": b"both"}
    assert [
        (s.folder, s.key, s.extension, s.read(), s.sidecars) for s in fetch(tmp_path, [0, 1, 3])
    ] == [
        ("x", "1", "left.jpg", b"l", both),
        ("x", "1", "RIGHT.PNG", b"r", both),
        ("x", "3", "jpg", b"3", {"txt": b"three"}),
    ]
    assert [s.extension for s in fetch(tmp_path, [1])] == ["RIGHT.PNG"]


def test_a_sample_of_very_many_images_is_read_piece_by_piece(tmp_path: Path) -> None:
    """As where the key's dot is the one before a running number."""
    frames = [(f"frame.{i:05d}.jpg", b"%d" % i) for i in range(3 * IMAGE_ROWS + 5)]
    save(tmp_path / "x.tar", pack([*frames[:70], ("frame.txt", b"text"), *frames[70:]]))
    rows = read(tmp_path)
    assert [row["image_id"] for row in rows] == [f"x.tar/{name}" for name, _ in frames]
    assert [row["image"] for row in rows] == [content for _, content in frames]
    assert rows[0].get("txt") is None
    assert rows[-1]["txt"] == "text"
    samples = fetch(tmp_path, [0, 69, 70, len(frames) - 1])
    assert [s.read() for s in samples] == [b"0", b"69", b"70", b"%d" % (len(frames) - 1)]
    assert all(sample.sidecars == {"txt": b"text"} for sample in samples)


def test_ids_are_unique(tmp_path: Path) -> None:
    names = ["1.jpg", "2.jpg", "1.jpg", "1#2.jpg", "2.jpg", "1.jpg", "3.jpg", "3.jpg", "3.JPG"]
    save(tmp_path / "x.tar", pack([(name, b"%d" % i) for i, name in enumerate(names)]))
    rows = read(tmp_path)
    keys = ["1", "2", "1#2", "1#2#2", "2#2", "1#3", "3.jpg", "3.jpg#2", "3.JPG"]
    assert [row["image_id"] for row in rows] == [f"x.tar/{key}" for key in keys]
    assert [row["image"] for row in rows] == [b"%d" % i for i in range(len(names))]
    assert [s.read() for s in fetch(tmp_path, range(9))] == [b"%d" % i for i in range(9)]


def test_what_is_no_sample_is_left_out(tmp_path: Path) -> None:
    names = ["README", "__meta__", "__meta__/x.jpg", "._a.jpg", "d/._a.jpg", ".b.jpg", "d/noext"]
    save(tmp_path / "x.tar", pack([("1.jpg", b"1"), *((n, b"?") for n in names), ("1.txt", b"t")]))
    rows = read(tmp_path)
    assert [row["image_id"] for row in rows] == ["x.tar/1"]
    assert rows[0]["txt"] == "t"
    assert fetch(tmp_path, [0])[0].sidecars == {"txt": b"t"}


def test_names_that_are_no_text(tmp_path: Path) -> None:
    members = [(b"caf\xe9.jpg".decode("utf-8", "surrogateescape"), b"1"), ("b.jpg", b"2")]
    for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        save(tmp_path / "x.tar", pack(members, kind))
        rows = read(tmp_path)
        assert [row["image_id"] for row in rows] == [r"x.tar/caf\xe9", "x.tar/b"]
        assert rows[0]["image_path"] == rf"{tmp_path}/x.tar#caf\xe9.jpg"
        sample = fetch(tmp_path, [0])[0]
        assert sample.key == members[0][0][:-4]
        assert sample.read() == b"1"


def test_a_file_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "LARGEST_IMAGE", 1 << 20)
    large, exact = bytes((1 << 20) + 1), bytes(1 << 20)
    members = [
        ("1.jpg", large),
        ("1.txt", b"t"),
        ("2.jpg", exact),
        ("3.txt", large),
        ("3.jpg", b"3"),
    ]
    save(tmp_path / "x.tar", pack(members))
    rows = read(tmp_path)
    assert [row["error"] for row in rows] == ["file is larger than 1 MB", None, None]
    assert [row["image"] for row in rows] == [None, exact, b"3"]
    assert [row["txt"] for row in rows] == ["t", None, None]
    assert [s.read() for s in fetch(tmp_path, [1])] == [exact]
    with pytest.raises(ShardError, match=r"3\.txt is too large to be copied"):
        fetch(tmp_path, [2])


def test_fetch_gives_every_row_that_read_gives(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    members = []
    for number in range(60):
        kinds = ["jpg", "left.png", "right.webp"][: rng.integers(0, 4)]
        kinds += ["txt", "json", "npy", "mp3"][: rng.integers(0, 5)]
        rng.shuffle(kinds)
        members += [(f"{number % 50}.{kind}", rng.bytes(rng.integers(0, 2000))) for kind in kinds]
    save(tmp_path / "x.tar.gz", gzip.compress(pack(members)))
    rows = read(tmp_path)
    there = [number for number, row in enumerate(rows) if row["image"] is not None]
    assert 60 < len(there) < len(rows)
    wholes = {name: content for name, content in members if int(name.split(".")[0]) >= 10}
    for some in (there, there[::3], there[-1:], there[:1]):
        samples = fetch(tmp_path, some)
        assert [sample.read() for sample in samples] == [rows[number]["image"] for number in some]
        for sample in samples:
            if int(sample.key) < 10:  # these keys come twice
                continue
            mine = {
                n.partition(".")[2]: c for n, c in wholes.items() if n.split(".")[0] == sample.key
            }
            images = {k: c for k, c in mine.items() if k in ("jpg", "left.png", "right.webp")}
            assert images[sample.extension] == sample.read()
            assert sample.sidecars == {k: c for k, c in mine.items() if k not in images}
    assert fetch(tmp_path, []) == []


def test_fetch_says_that_a_row_is_gone(tmp_path: Path) -> None:
    save(tmp_path / "x.tar", pack([*TWO, ("3.txt", b"no image")]))
    for row in (2, 3, 99):
        with pytest.raises(ShardError, match=rf"x\.tar: row {row} is not there any more"):
            fetch(tmp_path, [0, row])
    save(tmp_path / "x.tar", pack(TWO)[:3000])
    assert [sample.read() for sample in fetch(tmp_path, [0])] == [TWO[0][1]]
    with pytest.raises(ShardError, match=r"row 1 is not there any more: cut short after 1 samples"):
        fetch(tmp_path, [0, 1])


# WebDataset's own rule

part = st.text(st.sampled_from("ab.-_é #\n"), min_size=1, max_size=4)
extension = st.sampled_from(
    ["jpg", "JPG", "left.png", "txt", "json", "npy", "", "x__", ".jpg", "a b"]
)
member_names = st.builds(
    lambda folder, base, ending: f"{folder}{base}.{ending}",
    st.one_of(st.just(""), st.sampled_from(["__m__/", "./", "/", "../"]), part.map("{}/".format)),
    st.one_of(part, st.sampled_from(["__a__", "__b"])),
    extension,
)


@several
@given(names=st.lists(member_names, max_size=12, unique_by=str.lower))
def test_samples_are_those_of_webdataset(names: list[str], tmp_path: Path) -> None:
    names = [name for name in names if not name.rpartition("/")[2].startswith(".")]
    members = [(name, b"%d" % number) for number, name in enumerate(names)]
    path = save(tmp_path / "x.tar", pack(members, tarfile.PAX_FORMAT))
    expected = as_webdataset_reads(path)
    rows = read(tmp_path)
    pictures = [{k: v for k, v in s.items() if k.endswith(("jpg", "png"))} for _, s in expected]
    assert [row["image"] for row in rows] == [
        content for images in pictures for content in (images.values() or [None])
    ]
    there = [number for number, row in enumerate(rows) if row["image"] is not None]
    found: list[tuple[str, dict[str, bytes]]] = []
    previous: Sample | None = None
    for sample in fetch(tmp_path, there):
        if previous is None or sample.sidecars is not previous.sidecars:
            found.append((sample.key, {k.lower(): v for k, v in sample.sidecars.items()}))
        found[-1][1][sample.extension.lower()] = sample.read()
        previous = sample
    whole = [s for s, images in zip(expected, pictures, strict=True) if images]
    assert found == whole


# Cut short, and damaged

LAYOUT = [
    ("a.jpg", noise(700, 1)),
    ("a.txt", b"text of a"),
    ("b.left.png", noise(512, 2)),
    ("b.right.png", noise(1, 3)),
    ("c.json", b"{}"),
    ("c.JPG", noise(520, 4)),
]
"""Each of these takes a header of 512 bytes, and its content padded to 512."""

LAID_OUT = pack(LAYOUT)


LOCAL = Source("", (), "", fsspec.filesystem("file"))


@dataclass(frozen=True)
class Expected:
    rows: list[tuple[str, bytes | None, str | None]]
    samples: int
    damaged: bool


def expect(available: int) -> Expected:
    """What can be read of the first bytes of LAID_OUT."""
    whole: list[int] = []
    begun = None
    place = 0
    for number, (_, content) in enumerate(LAYOUT):
        start = place + 512
        if available >= start:
            if available >= start + len(content):
                whole.append(number)
            else:
                begun = number
        place = start + -(-len(content) // 512) * 512
    images = {"a": ["a.jpg"], "b": ["b.left.png", "b.right.png"], "c": ["c.JPG"]}
    reached = [LAYOUT[number][0] for number in (*whole, *([] if begun is None else [begun]))]
    rows: list[tuple[str, bytes | None, str | None]] = []
    for key, names in images.items():
        here = [name for name in names if name in reached]
        for name in here:
            image_id = f"x/{name}" if len(here) > 1 else f"x/{key}"
            if begun is not None and name == LAYOUT[begun][0]:
                rows.append((image_id, None, "the archive ends in the middle of this file"))
            else:
                rows.append((image_id, dict(LAYOUT)[name], None))
        if not here and any(name.startswith(key) for name in reached):
            (only,) = [name for name in reached if name.startswith(key)]
            rows.append((f"x/{key}", None, f"sample holds no image ({only[2:]})"))
    cut = None if begun is None else LAYOUT[begun][0][0]
    samples = len({name[0] for name in reached} - {cut})
    return Expected(rows, samples, damaged=available < place + 512)


def check_cut(path: Path, content: bytes, available: int, *, damaged: bool | None = None) -> None:
    """Read an archive of which this many bytes of the tar are available."""
    path.write_bytes(content)
    shard = Shard(path.name, (File(path.name, str(path), len(content), ""),))
    rows, error = read_until_cut(LOCAL, shard)
    expected = expect(available)
    assert [
        (row["image_id"].replace(path.name, "x"), row["image"], row["error"]) for row in rows
    ] == expected.rows
    if available < 512:
        assert type(error) is ShardError
        assert error.reason
    elif expected.damaged or damaged:
        assert isinstance(error, CutShortError), available
        assert error.shard == path.name
        assert error.reason.startswith(f"cut short after {expected.samples} samples")
    else:
        assert error is None, available


def test_a_tar_cut_anywhere(tmp_path: Path) -> None:
    assert expect(len(LAID_OUT)) == Expected(expect(10_000).rows, 3, False)
    end = sum(512 + -(-len(content) // 512) * 512 for _, content in LAYOUT)
    borders = [start + more for start in range(0, end + 1025, 512) for more in (-2, -1, 0, 1, 2)]
    contents_end = [start + size for start in range(512, end, 512) for size in (1, 2, 9, 188)]
    places = {*borders, *contents_end, *range(0, end, 7), len(LAID_OUT) - 1, len(LAID_OUT)}
    for place in sorted(place for place in places if place >= 0):
        check_cut(tmp_path / "x.tar", LAID_OUT[:place], place)


def test_a_gzipped_tar_cut_anywhere(tmp_path: Path) -> None:
    packed = gzip.compress(LAID_OUT)
    last = len(packed) - 20
    for place in [*range(20), *range(20, last, 3), *range(last, len(packed))]:
        available = len(zlib.decompressobj(31).decompress(packed[:place]))
        check_cut(tmp_path / "x.tar.gz", packed[:place], available, damaged=True)
    check_cut(tmp_path / "x.tar.gz", packed, len(LAID_OUT))


def test_a_tar_in_zstandard_cut_anywhere(tmp_path: Path) -> None:
    frames = [zstd(LAID_OUT[start : start + 1024]) for start in range(0, len(LAID_OUT), 1024)]
    packed = b"".join(frames)
    ends = np.cumsum([len(frame) for frame in frames])
    near = {int(end) + more for end in ends for more in (-1, 0, 1)}
    near = {place for place in near if place < len(packed)}
    for place in sorted(near.union(range(0, len(packed), 5))):
        available = 1024 * int(np.searchsorted(ends, place, side="right"))
        on_a_border = place in (0, *ends)
        check_cut(tmp_path / "x.tar.zst", packed[:place], available, damaged=not on_a_border)
    check_cut(tmp_path / "x.tar.zst", packed, len(LAID_OUT))


def test_a_gzipped_tar_with_a_wrong_checksum(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(LAID_OUT))
    packed[-8] ^= 1
    check_cut(tmp_path / "x.tar.gz", bytes(packed), len(LAID_OUT), damaged=True)
    packed = bytearray(gzip.compress(LAID_OUT)) + b"trailing garbage"
    check_cut(tmp_path / "x.tar.gz", bytes(packed), len(LAID_OUT), damaged=True)


def test_zeros_behind_a_gzipped_tar_are_padding(tmp_path: Path) -> None:
    check_cut(tmp_path / "x.tar.gz", gzip.compress(LAID_OUT) + bytes(600), len(LAID_OUT))


@pytest.mark.parametrize("place", [0, 1024, 1536, 2560, 3584, 4608, 5632])
def test_a_damaged_header_is_no_end(place: int, tmp_path: Path) -> None:
    """All places are headers: the first member has two blocks of content, the next one each."""
    starts, start = [0], 0
    for _, content in LAYOUT:
        start += 512 + -(-len(content) // 512) * 512
        starts.append(start)
    number = min(range(len(starts)), key=lambda n: abs(starts[n] - place))
    damaged = bytearray(LAID_OUT)
    damaged[starts[number] + 150] ^= 0x15
    if number == len(LAYOUT):
        damaged[starts[number]] = 1
    path = save(tmp_path / "x", bytes(damaged)).rename(tmp_path / "x.tar")
    source = list_source(path)
    rows, error = read_until_cut(source, webdataset.shards(source)[0])
    expected = expect(starts[number])
    assert [(row["image_id"].replace("x.tar", "x"), row["image"]) for row in rows] == [
        row[:2] for row in expected.rows
    ]
    assert error is not None
    if number:
        assert isinstance(error, CutShortError)
        assert error.reason == f"cut short after {expected.samples} samples (a header is damaged)"
    else:
        assert error.reason == "not a tar archive"


@pytest.mark.parametrize(
    ("behind", "why"),
    [
        (LAID_OUT, "more follows behind its mark of the end"),
        (bytes(50_000) + b"x", "more follows behind its mark of the end"),
        (bytes(2 << 20), "the last 2,0"),
    ],
)
def test_what_lies_behind_the_end_is_not_overlooked(
    behind: bytes, why: str, tmp_path: Path
) -> None:
    path = save(tmp_path / "x.tar", LAID_OUT + behind)
    source = list_source(path)
    rows, error = read_until_cut(source, webdataset.shards(source)[0])
    assert [row["image"] for row in rows] == [row[1] for row in expect(len(LAID_OUT)).rows]
    assert isinstance(error, CutShortError)
    assert error.reason.startswith(f"cut short after 3 samples ({why}")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (gzip.compress(b"", mtime=0), "is empty"),
        (zstd(b""), "is empty"),
        (b"<html>404</html>", "not a tar archive, or cut short before its first file"),
        (b"<html>404</html>" * 100, "not a tar archive"),
        (gzip.compress(b"text" * 1000, mtime=0), "not a tar archive"),
        (b"\x1f\x8b" + b"rubbish" * 200, "its compressed data are damaged"),
        (b"\x28\xb5\x2f\xfd" + b"rubbish" * 200, "its compressed data are damaged"),
        (b"PK\x03\x04" + bytes(2000), "not a tar archive"),
        (pack([(f"{'long' * 100}.jpg", b"x")], tarfile.PAX_FORMAT)[:1200], "cut short before"),
        (pack([(f"{'long' * 100}.jpg", b"x")], tarfile.GNU_FORMAT)[:600], "cut short before"),
    ],
)
def test_what_is_no_tar_is_said_to_be(content: bytes, reason: str, tmp_path: Path) -> None:
    path = save(tmp_path / "x.tar", content)
    with pytest.raises(ShardError) as caught:
        read(path)
    assert not isinstance(caught.value, CutShortError)
    assert reason in caught.value.reason
    with pytest.raises(ShardError):
        fetch(path, [0])


def headers(*kinds: bytes, size: int = 600) -> bytes:
    """Blocks with valid checksums that promise what does not come."""
    blocks = []
    for kind in kinds:
        info = tarfile.TarInfo("x.jpg")
        info.type, info.size = kind, size
        blocks.append(info.tobuf(tarfile.GNU_FORMAT))
    return b"".join(blocks)


@pytest.mark.parametrize(
    "behind",
    [
        headers(tarfile.GNUTYPE_LONGNAME, size=8 << 30),
        headers(tarfile.XHDTYPE, size=100 << 20) + bytes(5000),
        headers(*[tarfile.GNUTYPE_LONGNAME] * 3000, size=0),
        headers(tarfile.GNUTYPE_SPARSE, size=-5),
        headers(tarfile.REGTYPE, size=-512),
        headers(tarfile.GNUTYPE_SPARSE)[:482] + b"\1" + headers(tarfile.GNUTYPE_SPARSE)[483:],
        headers(tarfile.XHDTYPE, size=20) + b"0 size=1\n".ljust(512, b"\0"),
        headers(tarfile.XHDTYPE, size=20) + b"11 size=-9\n".ljust(512, b"\0") + headers(b"0"),
        headers(tarfile.XHDTYPE, size=40)
        + b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n".ljust(512, b"\0")
        + headers(b"0"),
        headers(tarfile.GNUTYPE_LONGNAME) + bytes(1024),
    ],
)
def test_headers_made_to_hurt(behind: bytes, tmp_path: Path) -> None:
    whole = LAID_OUT[: 512 + 1024 + 512 + 512]
    source = list_source(save(tmp_path / "x.tar", whole + behind))
    rows, error = read_until_cut(source, webdataset.shards(source)[0])
    assert rows[0]["image"] == LAYOUT[0][1]
    assert rows[0]["txt"] == "text of a"
    assert all(row["image"] is None for row in rows[1:])
    assert isinstance(error, CutShortError)


@several
@given(places=st.lists(st.tuples(st.integers(0, 7000), st.integers(0, 255)), max_size=20))
def test_whatever_bytes_there_are_nothing_else_is_raised(
    places: list[tuple[int, int]], tmp_path: Path
) -> None:
    content = bytearray(pack([*LAYOUT, (f"{LONG}.jpg", b"x")], tarfile.PAX_FORMAT))
    for place, value in places:
        content[place] = value
    source = list_source(save(tmp_path / "x.tar", bytes(content)))
    shard = webdataset.shards(source)[0]
    rows, error = read_until_cut(source, shard)
    assert len({row["image_id"] for row in rows}) == len(rows)
    there = [number for number, row in enumerate(rows) if row["image"] is not None]
    if type(error) is not ShardError:
        samples = list(webdataset.fetch(source, shard, there))
        assert [s.read() for s in samples] == [rows[number]["image"] for number in there]


# Sources that are streams


class Stream(io.RawIOBase):
    """Reads forward, in odd pieces, and breaks where it is told to."""

    def __init__(self, content: bytes, breaks: int | None = None) -> None:
        self.file, self.breaks = io.BytesIO(content), breaks

    def read(self, size: int = -1) -> bytes:
        if self.breaks is not None and self.file.tell() >= self.breaks:
            raise ConnectionResetError(104, "Connection reset by peer")
        return self.file.read(max(1, size // 3))

    def seek(self, *_: Any) -> int:
        raise io.UnsupportedOperation("seek")


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstd], ids=["tar", "gz", "zst"])
def test_a_source_need_not_seek(
    compress: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = compress(pack([(f"{i}.jpg", noise(40_000, i)) for i in range(9)]))
    path = save(tmp_path / "x.tar", content)
    monkeypatch.setattr(Source, "open", lambda *_: Stream(content))
    assert [row["image"] for row in read(path)] == [noise(40_000, i) for i in range(9)]
    assert [s.read() for s in fetch(path, [2, 7])] == [noise(40_000, 2), noise(40_000, 7)]
    monkeypatch.setattr(Source, "open", lambda *_: Stream(content, breaks=200_000))
    source = list_source(path)
    _, error = read_until_cut(source, webdataset.shards(source)[0])
    assert type(error) is ShardError  # not the archive's fault: it may be whole
    assert str(error) == "x.tar: cannot be read: Connection reset by peer"
    with pytest.raises(ShardError, match="Connection reset by peer"):
        fetch(path, [8])


def test_a_store_that_is_not_this_machine() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/a/00000.tar", pack(TWO))
    try:
        rows = read("memory://bucket")
        assert [row["image_id"] for row in rows] == [
            "a/00000.tar/000000000",
            "a/00000.tar/000000001",
        ]
        assert rows[0]["image_path"] == "memory:///bucket/a/00000.tar#000000000.jpg"
    finally:
        memory.rm("/bucket", recursive=True)


# Writing

SCHEMA = pa.schema(
    [
        ("aesthetic_score", pa.float32()),
        ("txt", pa.string()),
        ("shard", pa.string()),
        ("image_id", pa.string()),
    ],
    metadata={b"aesthetic_filter": b"{}"},
)


def give(content: bytes) -> Callable[[], bytes]:
    return lambda: content


def made(
    key: str, extension: str = "jpg", content: bytes = b"image", score: float = 5.0, **more: Any
) -> tuple[dict[str, Any], Sample]:
    """A kept row."""
    folder, sidecars = more.get("folder", "00000"), more.get("sidecars", {})
    image_id = f"{folder}/{key}".encode(errors="replace").decode()
    row = {"image_id": image_id, "aesthetic_score": score, "txt": None, "shard": "own"}
    return row, Sample(folder, key, extension, give(content), sidecars)


def write(folder: Path, rows: Sequence[Any], **options: Any) -> list[Path]:
    """The tars that are written."""
    folder.mkdir()
    writer = image_writers()["webdataset"]
    writer.write_images(folder, iter(rows), SCHEMA, ImageOutput(**options))
    return sorted(folder.glob("*.tar"))


def contents(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        return [(m.name, cast(Any, tar.extractfile(m)).read()) for m in tar.getmembers()]


def some_samples(count: int = 25) -> list[tuple[dict[str, Any], Sample]]:
    rows = []
    for number in range(count):
        sidecars = {"json": b'{"n": %d}' % number, "txt": f"№ {number}".encode(), "npy": noise(9)}
        for kind in ("jpg", "left.PNG")[: 1 + number % 2]:
            content = noise(100 * number, number) + kind.encode()
            rows.append(made(f"{number:05d}", kind, content, number / 2, sidecars=sidecars))
    return rows


def expected_samples(rows: Sequence[Any]) -> list[tuple[str, dict[str, bytes]]]:
    found: dict[str, dict[str, bytes]] = {}
    for _, sample in rows:
        mine = found.setdefault(sample.key, dict(sample.sidecars))
        mine[sample.extension.lower()] = sample.read()
    return list(found.items())


def test_what_is_written_is_what_webdataset_reads(tmp_path: Path) -> None:
    rows = some_samples()
    tars = write(tmp_path / "out", rows, shard_size=10)
    assert [path.name for path in tars] == ["00000.tar", "00001.tar", "00002.tar"]
    assert [len(as_webdataset_reads(path)) for path in tars] == [10, 10, 5]
    assert as_webdataset_reads(*tars) == expected_samples(rows)


def test_what_is_written_is_what_is_read_here(tmp_path: Path) -> None:
    rows = some_samples()
    write(tmp_path / "out", rows, shard_size=10)
    found = read(tmp_path / "out")
    assert [row["image"] for row in found] == [sample.read() for _, sample in rows]
    assert [row["txt"] for row in found] == [s.sidecars["txt"].decode() for _, s in rows]
    again = fetch(tmp_path / "out", range(15), range(15), range(7))
    assert [(s.key, s.extension, s.read(), s.sidecars) for s in again] == [
        (s.key, s.extension, s.read(), s.sidecars) for _, s in rows
    ]


def test_an_index_lies_beside_each_shard(tmp_path: Path) -> None:
    rows = some_samples()
    tars = write(tmp_path / "out", rows, shard_size=10)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == sorted(
        [*(p.name for p in tars), "00000.parquet", "00001.parquet", "00002.parquet"]
    )
    found = []
    for path in tars:
        index = pq.read_table(path.with_suffix(".parquet"))
        assert index.schema.names == [
            "image_id",
            "shard",
            "member",
            "aesthetic_score",
            "txt",
            "source_shard",
        ]
        assert index.schema.metadata[b"aesthetic_filter"] == b"{}"
        members = dict(contents(path))
        for row in index.to_pylist():
            assert row["shard"] == path.name
            assert row["source_shard"] == "own"
            found.append((row["image_id"], members[row["member"]], row["aesthetic_score"]))
    assert found == [(r["image_id"], s.read(), r["aesthetic_score"]) for r, s in rows]


def test_ray_data_reads_what_is_written(tmp_path: Path) -> None:
    """In a process of its own, whose warnings are Ray's."""
    rows = []
    for number in range(12):
        file = io.BytesIO()
        Image.new("RGB", (4, 3), (number * 20, 1, 2)).save(file, "PNG")
        json_text = {"json": b'{"n": %d}' % number, "txt": b"text"}
        rows.append(made(f"d/{number:03d}", "png", file.getvalue(), number, sidecars=json_text))
    write(tmp_path / "out", rows, shard_size=5, score_in="json")
    script = """
import json, logging, sys, ray
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error",
         object_store_memory=80_000_000)
ray.data.DataContext.get_current().enable_progress_bars = False
logging.getLogger("ray.data").setLevel("ERROR")
found = ray.data.read_webdataset(sys.argv[1], file_extensions=["tar"]).take_all()
print(json.dumps([[r["__key__"], r["png"].shape, int(r["png"][0, 0, 0]), r["json"], r["txt"]]
                  for r in sorted(found, key=lambda r: r["__key__"])]))
ray.shutdown()
"""
    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "out")]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_V2_ENABLED": "0"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [
        [f"d/{n:03d}", [3, 4, 3], n * 20, {"n": n, "aesthetic_score": float(n)}, "text"]
        for n in range(12)
    ]


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    rows = [*some_samples(), made("ünïcödé/" + "x" * 200, content=b"long")]
    one, other = (write(tmp_path / name, rows, shard_size=10) for name in "ab")
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in other]
    with tarfile.open(one[0]) as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
            assert (member.uname, member.gname) == ("", "")
            assert not member.pax_headers
    with tarfile.open(one[-1]) as tar:
        last = tar.getmembers()[-1]
    assert last.name == "ünïcödé/" + "x" * 200 + ".jpg"
    assert set(last.pax_headers) == {"path"}


@pytest.mark.skipif(shutil.which("tar") is None, reason="there is no tar here")
def test_gnu_tar_reads_what_is_written(tmp_path: Path) -> None:
    rows = [*some_samples(), made("ünïcödé/" + "x" * 200, content=b"long")]
    (path,) = write(tmp_path / "out", rows)
    out = tmp_path / "extracted"
    out.mkdir()
    subprocess.run(["tar", "-xf", str(path), "-C", str(out)], check=True, timeout=20)
    files = {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert files == dict(contents(path))
    assert files["ünïcödé/" + "x" * 200 + ".jpg"] == b"long"


def test_nothing_is_written_of_nothing(tmp_path: Path) -> None:
    assert write(tmp_path / "out", []) == []
    assert list((tmp_path / "out").iterdir()) == []


def test_shards_are_filled_across_those_of_the_source(tmp_path: Path) -> None:
    rows = [made(f"{n}", folder=f"{n % 5:05d}") for n in range(7)]
    tars = write(tmp_path / "out", rows, shard_size=3)
    assert [[name for name, _ in contents(path)] for path in tars] == [
        ["0.jpg", "1.jpg", "2.jpg"],
        ["3.jpg", "4.jpg", "5.jpg"],
        ["6.jpg"],
    ]


def test_images_of_one_sample_stay_together(tmp_path: Path) -> None:
    both, other = {"txt": b"both"}, {"txt": b"other"}
    rows = [
        made("1", "left.jpg", b"l", sidecars=both),
        made("1", "right.jpg", b"r", sidecars=both),
        made("1", "right.jpg", b"again", sidecars=both),  # a second file of that name
        made("1", "png", b"other", sidecars=other),  # another sample of that key
        made("2", "jpg", b"2", folder="00001"),
    ]
    first, second = write(tmp_path / "out", rows, shard_size=3)
    assert contents(first) == [
        ("1.left.jpg", b"l"),
        ("1.right.jpg", b"r"),
        ("1.txt", b"both"),
        ("00000_1.right.jpg", b"again"),
        ("00000_1.txt", b"both"),
        ("00000_1-2.png", b"other"),
        ("00000_1-2.txt", b"other"),
    ]
    assert contents(second) == [("2.jpg", b"2")]
    assert pq.read_table(first.with_suffix(".parquet"))["member"].to_pylist() == [
        *("1.left.jpg", "1.right.jpg", "00000_1.right.jpg", "00000_1-2.png")
    ]


def test_a_key_that_is_taken_gets_its_archives_name(tmp_path: Path) -> None:
    rows = [
        made("000012", content=b"1", folder="00000"),
        made("000012", content=b"2", folder="00001"),
        made("000012", content=b"3", folder="a/00001"),
        made("x/000012", content=b"4", folder="00000"),
        made("x/000012", content=b"5", folder="v1.0"),
        made("000012", content=b"6", folder=""),
        made("00001_000012", content=b"7", folder=""),
    ]
    (path,) = write(tmp_path / "out", rows)
    assert contents(path) == [
        ("000012.jpg", b"1"),
        ("00001_000012.jpg", b"2"),
        ("a_00001_000012.jpg", b"3"),
        ("x/000012.jpg", b"4"),
        ("x/v1_0_000012.jpg", b"5"),
        ("000012-2.jpg", b"6"),
        ("00001_000012-2.jpg", b"7"),
    ]


HOSTILE = [
    *("/abs/x", "../../up", "a/../../b", "..", ".", "", "C:\\x\\y", "\\\\host\\x", "a\0b", "a\nb"),
    *("__meta__/x", "__x__", "____/y", "dots.in.name", "v1.0/dots.in", ".hidden", "d/.hidden"),
    *("x" * 300, "é" * 300, "/".join(["deep"] * 900), "\udcff", "\ud800", "trail. ", "a//b", "~/x"),
    *("-rf", "$HOME", "a b", "con", "x" * 251, "y" * 240, "same", "same", "same"),
]


def test_hostile_keys_stay_inside_and_stay_samples(tmp_path: Path) -> None:
    sidecars = {"txt": b"t", "a/../../up.json": b"{}", "..": b"dots", "": b"none", "TXT": b"T"}
    rows = [
        made(key, "jpg", b"%d" % number, sidecars=sidecars, folder=f"../{number % 2}")
        for number, key in enumerate(HOSTILE)
    ]
    (path,) = write(tmp_path / "out", rows, score_in="json")
    samples = as_webdataset_reads(path)
    assert [sample["jpg"] for _, sample in samples] == [s.read() for _, s in rows]
    assert len({key for key, _ in samples}) == len(HOSTILE)
    for _, sample in samples:
        contents_beside = sorted(c for k, c in sample.items() if not k.endswith(("jpg", "json")))
        assert contents_beside == [b"T", b"dots", b"none", b"t"]
    assert [row["image"] for row in read(path)] == [s.read() for _, s in rows]
    out = tmp_path / "nested" / "extracted"
    with tarfile.open(path) as tar:
        names = tar.getnames()
        tar.extractall(out, filter="data")
    files = [p for p in (tmp_path / "nested").rglob("*") if p.is_file()]
    assert len(files) == len(names) == len(set(names))
    assert all(file.resolve().is_relative_to(out.resolve()) for file in files)


@several
@given(
    names=st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=()), max_size=12),
            st.sampled_from(["jpg", "JPG", "a.png", "", "exe", "a/b", "../x.jpg"]),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_any_key_is_written_and_read_back(names: list[tuple[str, str]], tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    rows = [
        made(key, kind, b"\xff\xd8\xff%d" % n, sidecars={"txt": b"%d" % n})
        for n, (key, kind) in enumerate(names)
    ]
    tars = write(tmp_path / "out", rows, shard_size=3)
    found = [row["image"] for row in read(tmp_path / "out")]
    assert found == [sample.read() for _, sample in rows]
    assert [s["txt"] for _, s in as_webdataset_reads(*tars)] == [
        b"%d" % n for n in range(len(rows))
    ]


@pytest.mark.parametrize(
    ("kind", "extension"),
    [
        *(("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("GIF", "gif"), ("TIFF", "tif")),
        *(("BMP", "bmp"), ("JPEG2000", "jp2"), ("ICO", "ico"), ("PPM", "ppm"), ("AVIF", "avif")),
    ],
)
def test_an_extension_is_found_where_there_is_none(
    kind: str, extension: str, tmp_path: Path
) -> None:
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, kind)
    (path,) = write(
        tmp_path / "out", [made("1", "", file.getvalue()), made("2", "dat", file.getvalue())]
    )
    assert [name for name, _ in contents(path)] == [f"1.{extension}", f"2.{extension}"]


def test_bytes_of_no_known_kind_are_written_too(tmp_path: Path) -> None:
    (path,) = write(tmp_path / "out", [made("1", "", b"whatever"), made("2", "xyz", b"")])
    assert contents(path) == [("1.img", b"whatever"), ("2.img", b"")]


def test_the_score_goes_into_the_json(tmp_path: Path) -> None:
    rows = [
        made("1", score=5.5, sidecars={"json": '{"z": 1, "caption": "ü", "a": [1.5]}'.encode()}),
        made("2", score=6.5, sidecars={"txt": b"t"}),
        made("3", score=7.5, sidecars={"json": b"[1, 2]"}),
        made("4", score=1.5, sidecars={"JSON": b'{"aesthetic_score": 9, "k": null}'}),
        made("5", score=2.5, sidecars={"json": b"{broken"}),
        made("6", score=3.5, sidecars={"json": b"[" * 100_000}),
        made("7", "a.jpg", score=4.0, sidecars={}),
        made("7", "b.jpg", score=8.0, sidecars={}),
        made("7", "c.jpg", score=6.0, sidecars={}),
        made("8", score=cast(Any, None), sidecars={"json": b"{ }"}),
    ]
    (path,) = write(tmp_path / "out", rows, score_in="json")
    found = {n: c for n, c in contents(path) if not n.endswith("jpg")}
    one = json.loads(found["1.json"])
    assert list(one.items()) == [
        *(("z", 1), ("caption", "ü"), ("a", [1.5])),
        ("aesthetic_score", 5.5),
    ]
    assert {n: json.loads(found[n]) for n in ("2.json", "4.JSON", "7.json")} == {
        "2.json": {"aesthetic_score": 6.5},
        "4.JSON": {"aesthetic_score": 1.5, "k": None},
        "7.json": {"aesthetic_score": 8.0},
    }
    assert found["2.txt"] == b"t"
    left = [("3", b"[1, 2]", 7.5), ("5", b"{broken", 2.5), ("6", b"[" * 100_000, 3.5)]
    for key, kept, score in left:
        assert found[f"{key}.json"] == kept
        assert json.loads(found[f"{key}.aesthetic_score.json"]) == {"aesthetic_score": score}
    assert found["8.json"] == b"{ }"
    (path,) = write(tmp_path / "plain", rows)
    assert dict(contents(path))["1.json"] == rows[0][1].sidecars["json"]
    assert "2.json" not in dict(contents(path))


def test_an_image_that_is_gone_stops_the_writing(tmp_path: Path) -> None:
    def gone() -> bytes:
        raise ShardError("00000.tar", "it was there when the run began and is gone now")

    row, sample = made("2")
    rows = [made("1"), (row, Sample(sample.folder, sample.key, "jpg", gone))]
    with pytest.raises(ShardError, match="is gone now"):
        write(tmp_path / "out", rows)


def test_writing_holds_one_sample_at_a_time(tmp_path: Path) -> None:
    alive: set[int] = set()

    class Tracked(bytes):
        def __del__(self) -> None:
            alive.discard(id(self))

    most = 0

    def rows() -> Iterator[Any]:
        nonlocal most
        for number in range(50):

            def content() -> bytes:
                found = Tracked(1000)
                alive.add(id(found))
                return found

            row, sample = made(f"{number}")
            yield row, Sample(sample.folder, sample.key, "jpg", content)
            most = max(most, len(alive))

    (tmp_path / "out").mkdir()
    webdataset.write_images(tmp_path / "out", rows(), SCHEMA, ImageOutput())
    assert most <= 2


def test_the_format_is_one_that_reads_and_writes() -> None:
    reader: ImageFormat = cast(ImageFormat, webdataset)
    assert reader.PRECEDENCE == 2
    assert webdataset.IMAGE_OPTIONS == ("shard_size", "score_in")
    assert image_writers()["webdataset"] is cast(Any, webdataset)
