"""Where files are: braces in locations, names that are not UTF-8, whole files, work done ahead."""

from __future__ import annotations

import os
import threading
import time
import urllib.request
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from typing import Any

import fsspec
import pytest

from aesthetic_filter.errors import ImageError, SourceError
from aesthetic_filter.prefetch import ahead
from aesthetic_filter.storage import list_source


def names(location: Any) -> list[str]:
    return [file.name for file in list_source(location).files]


def touch(folder: Path, *paths: str) -> Path:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(path.encode())
    return folder


# Braces.

TREE = (
    *(f"shards/{number:05d}.tar" for number in range(12)),
    "shards/notes.txt",
    "train/a.jpg",
    "train/b.PNG",
    "train/deep/c.jpg",
    "train/.hidden.jpg",
    "val/a.jpg",
    "val/d.png",
    "9.x",
    "10.x",
)

LOCATIONS = [
    ("shards/{00000..00003}.tar", [f"{n:05d}.tar" for n in range(4)]),
    ("shards/{00003..00001}.tar", [f"{n:05d}.tar" for n in (1, 2, 3)]),
    ("shards/{0000,0001}{0..1}.tar", ["00000.tar", "00001.tar", "00010.tar", "00011.tar"]),
    ("shards/0000{7..9}.tar", ["00007.tar", "00008.tar", "00009.tar"]),
    ("{9..10}.x", ["9.x", "10.x"]),
    ("{train,val}/a.jpg", ["train/a.jpg", "val/a.jpg"]),
    ("{train,val}/*.jpg", ["train/a.jpg", "val/a.jpg"]),
    ("train/{*.jpg,*.PNG}", ["a.jpg", "b.PNG"]),
    ("{train,val}/*.{jpg,PNG,gif}", ["train/a.jpg", "train/b.PNG", "val/a.jpg"]),
    ("{train,gone}/*.jpg", ["train/a.jpg"]),
    ("{train,val}", ["train/a.jpg", "train/b.PNG", "train/deep/c.jpg", "val/a.jpg", "val/d.png"]),
    ("{train,val}/", ["train/a.jpg", "train/b.PNG", "train/deep/c.jpg", "val/a.jpg", "val/d.png"]),
    ("{train/a,val/d}.{jpg,png}", None),
    ("{train/a.jpg,val/d.png}", ["train/a.jpg", "val/d.png"]),
    ("train/**/*.{jpg,PNG}", ["a.jpg", "b.PNG", "deep/c.jpg"]),
    ("t*/{a,deep/c}.jpg", ["train/a.jpg", "train/deep/c.jpg"]),
    ("train/{a.jpg,a.jpg,*.jpg}", ["a.jpg"]),
    ("train/{a,.hidden}.jpg", [".hidden.jpg", "a.jpg"]),
    ("train/[ab].{jpg,PNG}", ["a.jpg", "b.PNG"]),
]


@pytest.fixture(params=["local", "memory"])
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    touch(tmp_path / "tree", *TREE)
    if request.param == "local":
        yield str(tmp_path / "tree")
        return
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "tree"), "/braces", recursive=True)
    try:
        yield "memory://braces"
    finally:
        memory.rm("/braces", recursive=True)


@pytest.mark.parametrize(("location", "expected"), LOCATIONS)
def test_braces_stand_for_what_a_shell_makes_of_them(
    location: str, expected: list[str] | None, tree: str
) -> None:
    if expected is None:
        with pytest.raises(SourceError, match="2 of the 4 names"):
            list_source(f"{tree}/{location}")
        return
    found = names(f"{tree}/{location}")
    assert sorted(found) == sorted(expected)
    assert len(set(found)) == len(found)


def test_files_of_braces_are_read_as_any_others(tree: str) -> None:
    source = list_source(f"{tree}/shards/{{00001..00002}}.tar")
    for file in source.files:
        with source.open(file) as opened:
            assert opened.read() == f"shards/{file.name}".encode()


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("shards/{00010..00015}.tar", "4 of the 6 names .* 00012.tar, 00013.tar, 00014.tar, …"),
        ("shards/{0..2}.tar", "3 of the 3 names .* 0.tar, 1.tar, 2.tar$"),
        ("{train,gone}/a.jpg", "1 of the 2 names .* gone/a.jpg$"),
        ("{train,gone}", "1 of the 2 names .* gone$"),
        ("gone/{a,b}.jpg", "2 of the 2 names"),
        ("train/{a.jpg,z.jpg,*.PNG}", "1 of the 3 names .* z.jpg$"),
        ("shards/{00000..9999999}.tar", "more than 1,000,000"),
        ("{0..99999999999999999999999}.x", "more than 1,000,000"),
        ("{0..9999}/{0..9999}.x", "more than 1,000,000"),
    ],
)
def test_what_braces_name_and_is_not_there_is_said(location: str, message: str, tree: str) -> None:
    with pytest.raises(SourceError, match=message):
        list_source(f"{tree}/{location}")


def test_a_name_that_really_has_braces_wins(tmp_path: Path) -> None:
    touch(tmp_path, "x{a,b}/1.jpg", "x{a,b}/2.jpg", "xa/3.jpg", "xb/3.jpg", "{0..1}.tar", "0.tar")
    assert names(tmp_path / "x{a,b}") == ["1.jpg", "2.jpg"]
    assert names(tmp_path / "x{a,b}" / "{1,2}.jpg") == ["1.jpg", "2.jpg"]
    assert names(tmp_path / "x{a,b}" / "*.jpg") == ["1.jpg", "2.jpg"]
    assert names(tmp_path / "{0..1}.tar") == ["{0..1}.tar"]
    with pytest.raises(SourceError, match="there is nothing there"):
        list_source(tmp_path / "{}" / "{one}")


@pytest.mark.parametrize("padded", [False, True])
def test_a_thousand_names_take_one_listing(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    width = 5 if padded else 0
    for number in range(1200):
        memory.pipe(f"/many/shards/{number:0{width}d}.tar", b"x")
    asked: list[str] = []
    for call in ("ls", "info", "find", "glob", "exists", "isdir", "isfile"):
        real = getattr(memory, call)

        def counted(*args: Any, real: Any = real, call: str = call, **more: Any) -> Any:
            asked.append(call)
            return real(*args, **more)

        monkeypatch.setattr(memory, call, counted)
    try:
        span = "{00000..00999}" if padded else "{0..999}"
        found = names(f"memory://many/shards/{span}.tar")
        assert found == [f"{number:0{width}d}.tar" for number in range(1000)]
        assert len(asked) < 20
    finally:
        monkeypatch.undo()
        memory.rm("/many", recursive=True)


# Names that are not UTF-8.


def test_names_that_are_not_utf8_are_made_so(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path)
    contents = {
        b"a\xff.jpg": b"1",
        rb"a\xff.jpg": b"2",
        "ä.jpg".encode(): b"3",
        b"\xe4/x.jpg": b"4",
    }
    for name, content in contents.items():
        path = Path(os.fsdecode(folder + b"/" + name))
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    source = list_source(tmp_path)
    found = {file.name: source.read_whole(file, 100) for file in source.files}
    assert found == {
        r"a\xff.jpg": b"2",
        r"a\xff~2.jpg": b"1",
        "ä.jpg": b"3",
        r"\xe4/x.jpg": b"4",
    }
    for file in source.files:
        source.address(file).encode()
        with source.open(file) as opened:
            assert opened.read() == found[file.name]


def test_a_hundred_thousand_files_are_listed_quickly(tmp_path: Path) -> None:
    count = 20_000  # a fifth of them, so that the test itself is quick
    for number in range(count):
        os.close(os.open(tmp_path / f"{number}.jpg", os.O_CREAT))
    started = time.perf_counter()
    found = names(tmp_path)
    assert time.perf_counter() - started < 3
    assert found == [f"{number}.jpg" for number in range(count)]


# Whole files.


def test_whole_files_are_read_or_a_reason_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "good", "gone", "folder", "denied")
    os.mkfifo(tmp_path / "pipe")
    source = list_source(tmp_path)
    files = {file.name: file for file in source.files}
    (tmp_path / "gone").unlink()
    (tmp_path / "folder").unlink()
    (tmp_path / "folder").mkdir()
    real = os.open

    def refuse(path: Any, *args: Any, **more: Any) -> int:
        if str(path).endswith("denied"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **more)

    monkeypatch.setattr(os, "open", refuse)
    assert source.read_whole(files["good"], 100) == b"good"
    assert source.read_whole(files["good"], 4) == b"good"
    for name, largest, reason in (
        ("gone", 100, "file is gone"),
        ("folder", 100, "file cannot be read: not a regular file"),
        ("pipe", 100, "file cannot be read: not a regular file"),
        ("denied", 100, "file cannot be read: Permission denied"),
        ("good", 3, "file is larger than 0 MB"),
    ):
        with pytest.raises(ImageError) as caught:
            source.read_whole(files[name], largest)
        assert str(caught.value) == reason


@pytest.mark.parametrize(
    ("path", "address"),
    [
        ("a.jpg", "{here}/tables/a.jpg"),
        ("../images/a.jpg", "{here}/images/a.jpg"),
        ("./deep/a.jpg", "{here}/tables/deep/a.jpg"),
        ("/data/a.jpg", "/data/a.jpg"),
        ("s3://bucket/a.jpg", "s3://bucket/a.jpg"),
        ("file:///data/a.jpg", "file:///data/a.jpg"),
    ],
)
def test_paths_in_a_table_are_resolved(path: str, address: str, tmp_path: Path) -> None:
    touch(tmp_path, "tables/t.parquet")
    source = list_source(tmp_path)
    assert source.resolve(path, source.files[0]) == address.format(here=tmp_path)
    memory = fsspec.filesystem("memory")
    memory.pipe("/resolved/tables/t.parquet", b"")
    try:
        source = list_source("memory://resolved")
        assert source.resolve(path, source.files[0]) == address.format(here="memory:///resolved")
    finally:
        memory.rm("/resolved", recursive=True)


def test_paths_in_a_table_are_read(tmp_path: Path) -> None:
    touch(tmp_path, "tables/t.parquet", "images/a.jpg")
    memory = fsspec.filesystem("memory")
    memory.pipe("/paths/b.jpg", b"bee")
    try:
        source = list_source(tmp_path / "tables")
        beside = source.files[0]
        for path in (
            "../images/a.jpg",
            str(tmp_path / "images" / "a.jpg"),
            f"file://{tmp_path}/images/a.jpg",
        ):
            assert source.read_path(path, 100, beside) == b"images/a.jpg"
        assert source.read_path("memory://paths/b.jpg", 100, beside) == b"bee"
        for path, largest, reason in (
            ("memory://paths/c.jpg", 100, "file is gone"),
            ("memory://paths/b.jpg", 2, "file is larger than 0 MB"),
            ("gone.jpg", 100, "file is gone"),
            ("t.parquet/a.jpg", 100, "file is gone"),
            ("a\0b.jpg", 100, "file cannot be read: embedded null byte"),
            ("nosuch://x/y.jpg", 100, "file cannot be read: nosuch:// is not known"),
        ):
            with pytest.raises(ImageError) as caught:
                source.read_path(path, largest, beside)
            assert str(caught.value) == reason
    finally:
        memory.rm("/paths", recursive=True)


# Work done ahead.


@pytest.mark.parametrize(("workers", "depth"), list(product((1, 4), (1, 3, 100))))
def test_work_done_ahead_comes_in_order(workers: int, depth: int) -> None:
    def work(number: int) -> int:
        time.sleep(0.002 * (number % 3))
        return number * number

    assert list(ahead(range(30), work, workers, depth)) == [n * n for n in range(30)]
    assert list(ahead([], work, workers, depth)) == []


def test_several_are_worked_on_at_once() -> None:
    together = threading.Barrier(4, timeout=10)
    assert list(ahead(range(8), lambda _: together.wait() >= 0, 4, 4)) == [True] * 8


def test_no_more_is_begun_than_is_allowed() -> None:
    begun: list[int] = []
    results = ahead(range(100), lambda n: begun.append(n) or n, 8, 5)
    for number in range(20):
        assert next(results) == number
        time.sleep(0.005)
        assert len(begun) <= number + 6
    results.close()  # type: ignore[attr-defined]


def test_the_weight_under_way_is_bounded() -> None:
    weights = [10, 10, 10, 500, 10, 95, 5, 5, 90] * 4
    under_way: list[int] = []
    lock, heaviest = threading.Lock(), [0]

    def work(weight: int) -> int:
        with lock:
            under_way.append(weight)
            if len(under_way) > 1:
                heaviest[0] = max(heaviest[0], sum(under_way))
        time.sleep(0.002)
        with lock:
            under_way.remove(weight)
        return weight

    results = ahead(weights, work, 8, 100, weight=lambda w: w, budget=100)
    assert list(results) == weights
    assert 20 <= heaviest[0] <= 100


@pytest.mark.parametrize("where", ["work", "items"])
def test_an_exception_comes_after_the_results_before_it(where: str) -> None:
    def items() -> Iterator[int]:
        yield from range(10)
        if where == "items":
            raise KeyError("ten")
        yield from range(10, 20)

    def work(number: int) -> int:
        if number == 10:
            raise KeyError("ten")
        return number

    found: list[int] = []
    with pytest.raises(KeyError, match="ten"):
        found.extend(ahead(items(), work, 4, 8))
    assert found == list(range(10))


def test_leaving_early_leaves_no_thread_behind() -> None:
    begun: list[int] = []

    def work(number: int) -> int:
        begun.append(number)
        time.sleep(0.01)
        return number

    results = ahead(range(1000), work, 4, 16)
    assert list(islice(results, 3)) == [0, 1, 2]
    results.close()  # type: ignore[attr-defined]
    count = len(begun)
    assert count < 25
    assert not [t for t in threading.enumerate() if t.name.startswith("aesthetic-filter-ahead")]
    time.sleep(0.05)
    assert len(begun) == count


# A store on the network.


@pytest.mark.filterwarnings("ignore:.*datetime.utcnow.*:DeprecationWarning")
def test_braces_and_whole_files_on_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    server_module = pytest.importorskip("moto.server", reason="needs moto[server]")
    s3fs = pytest.importorskip("s3fs", reason="needs s3fs")
    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        kind = {"Content-Type": "application/octet-stream"}
        for path in (
            "bucket",
            *(f"bucket/in/{n:03d}.jpg" for n in range(20)),
            "bucket/other/a.jpg",
        ):
            content = path.encode() if "/" in path else b""
            request = urllib.request.Request(f"{url}/{path}", content, kind, method="PUT")
            with urllib.request.urlopen(request, timeout=10) as answer:
                assert answer.status == 200
        s3fs.S3FileSystem.clear_instance_cache()
        source = list_source("s3://bucket/in/{000..009}.jpg")
        assert [file.name for file in source.files] == [f"{n:03d}.jpg" for n in range(10)]
        for file in source.files:
            assert source.read_whole(file, 100) == f"bucket/in/{file.name}".encode()
        assert names("s3://bucket/{in/000,other/a}.jpg") == ["in/000.jpg", "other/a.jpg"]
        assert names("s3://bucket/{in,other}/*[0a].jpg") == [
            *("in/000.jpg", "in/010.jpg", "other/a.jpg")
        ]
        with pytest.raises(SourceError, match=r"1 of the 21 names .*: 020.jpg"):
            list_source("s3://bucket/in/{000..020}.jpg")
        assert source.read_path("../other/a.jpg", 100, source.files[0]) == b"bucket/other/a.jpg"
        with pytest.raises(ImageError, match=r"^file is gone$"):
            source.read_path("s3://bucket/in/nothing.jpg", 100, source.files[0])
    finally:
        server.stop()
        s3fs.S3FileSystem.clear_instance_cache()
