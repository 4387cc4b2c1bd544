"""Names from a source become paths that stay where they are put; no two of them are the same."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from aesthetic_filter.filenames import (
    IMAGE_EXTENSIONS,
    LONGEST_PART,
    OTHER_EXTENSIONS,
    UniqueNames,
    is_image,
    safe_path,
)

many = settings(max_examples=100, deadline=None)

any_text = st.text(st.characters(exclude_categories=()), max_size=40)
nasty_parts = st.sampled_from(
    [
        *("..", ".", "", "C:", "c:x", "a", "a.jpg", "\\", "..\\..", " ", ". .", "...", "~", "\0"),
        *("x" * 300, "é" * 200 + ".jpg", "x" * 250 + "." + "y" * 40, "nul", "\n", "-rf"),
        *("\u2028", "\ud800"),
    ]
)
names = st.one_of(
    any_text,
    st.lists(st.one_of(nasty_parts, any_text), max_size=8).map("/".join),
    st.lists(nasty_parts, max_size=60).map("/".join),
)
ordinary_part = st.from_regex(
    r"[\w(\[][\w ()\[\]!&+,='~@#%^{}$-]{0,30}[\w)](\.[a-z0-9]{1,5})?", fullmatch=True
)


@many
@given(name=names, room=st.sampled_from([0, 5, 30]))
def test_a_safe_path_stays_inside(name: str, room: int) -> None:
    path = safe_path(name, room)
    parts = path.split("/")
    assert not PurePosixPath(path).is_absolute()
    assert not PureWindowsPath(path).is_absolute()
    assert not PureWindowsPath(path).drive
    assert os.path.normpath(path) == path
    for part in parts:
        assert part not in ("", ".", "..")
        assert "\\" not in part
        assert 0 < len(part.encode()) <= LONGEST_PART
        assert part[-1] not in ". "
        assert not any(ord(c) < 32 or ord(c) == 127 for c in part)
    assert len(parts[-1].encode()) + room <= LONGEST_PART
    assert len(path.encode()) <= 1024
    assert safe_path(path, room) == path


@many
@given(parts=st.lists(ordinary_part, min_size=1, max_size=5))
def test_an_ordinary_name_comes_back_as_it_is(parts: list[str]) -> None:
    name = "/".join(parts)
    assert safe_path(name) == name


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("a/b.jpg", "a/b.jpg"),
        ("ярлык 100%.jpg", "ярлык 100%.jpg"),
        (".hidden/.x", ".hidden/.x"),
        ("/etc/passwd", "etc/passwd"),
        ("../../x.jpg", "x.jpg"),
        ("a/../b/./c", "a/b/c"),
        ("..", "_"),
        ("", "_"),
        ("///", "_"),
        (". . /x", "x"),
        ("C:\\Windows\\x.jpg", "C_/Windows/x.jpg"),
        ("\\\\server\\share\\x", "server/share/x"),
        ("C:x", "C_x"),
        ("12:30.jpg", "12:30.jpg"),
        ("a\0b\n.jpg", "a_b_.jpg"),
        ("a\udcff.jpg", "a_.jpg"),
        ("name. ", "name"),
    ],
)
def test_what_becomes_of_a_name(name: str, path: str) -> None:
    assert safe_path(name) == path


def test_long_parts_keep_their_extension_and_stay_different() -> None:
    one, other = (safe_path("d/" + "x" * 300 + end + ".jpeg") for end in ("1", "2"))
    assert one != other
    for path in (one, other):
        assert path.startswith("d/" + "x" * 200)
        assert path.endswith(".jpeg")
        assert len(path.encode()) == 2 + 255
    assert len(safe_path("é" * 300).encode()) in (254, 255)
    exact = "x" * 251 + ".jpg"
    assert safe_path(exact) == exact


def test_a_path_too_deep_is_made_short() -> None:
    deep = "/".join(["folder"] * 1000)
    one, other = safe_path(f"{deep}/a.jpg"), safe_path(f"{deep}/x/a.jpg")
    assert one != other
    assert one.endswith("/a.jpg")
    assert one.count("/") == 1


def test_safe_paths_can_be_written(tmp_path: Path) -> None:
    root = tmp_path / "out"
    root.mkdir()
    for name in ("../../../escaped", "/abs", "a\\..\\..\\b", "x" * 5000, "é" * 999 + ".jpg", "a\0"):
        path = root / safe_path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
        assert path.resolve().is_relative_to(root.resolve())
    assert list(tmp_path.iterdir()) == [root]


def test_the_second_of_a_name_gets_a_number() -> None:
    names = UniqueNames()
    asked = ["a/b.jpg", "a/b.jpg", "a/b.jpg", "b", "b", ".x", ".x", "v1.0/c", "v1.0/c", "a/b-2.jpg"]
    assert [names.take(name) for name in asked] == [
        *("a/b.jpg", "a/b-2.jpg", "a/b-3.jpg", "b", "b-2", ".x", ".x-2"),
        *("v1.0/c", "v1.0/c-2", "a/b-2-2.jpg"),
    ]
    assert "a/b.jpg" in names
    assert "a" in names
    assert "c" not in names


def test_no_file_lies_below_another() -> None:
    names = UniqueNames()
    assert names.take("a") == "a"
    assert names.take("a/b.jpg") == "a-2/b.jpg"
    assert names.take("a/c.jpg") == "a-2/c.jpg"
    assert names.take("d/e/f") == "d/e/f"
    assert names.take("d/e") == "d/e-2"
    assert names.take("d") == "d-2"
    keys = UniqueNames(files=False)
    assert [keys.take(key) for key in ("a", "a/b", "a")] == ["a", "a/b", "a-2"]


@many
@given(
    asked=st.lists(
        st.lists(st.sampled_from(["a", "b", "a-2", "a.b", "x" * 255]), min_size=1, max_size=3).map(
            "/".join
        ),
        max_size=30,
    ),
    room=st.sampled_from([0, 40]),
)
def test_given_names_can_all_be_files_of_one_folder(asked: list[str], room: int) -> None:
    names, again = UniqueNames(), UniqueNames()
    asked = [safe_path(name, room) for name in asked]
    given_names = [names.take(name, room) for name in asked]
    assert given_names == [again.take(name, room) for name in asked]
    assert len(set(given_names)) == len(given_names)
    folders = {str(p) for name in given_names for p in PurePosixPath(name).parents}
    assert not folders & set(given_names)
    assert all(safe_path(name, room) == name for name in given_names)


def test_the_same_name_many_times_is_no_slower() -> None:
    names = UniqueNames()
    given_names = [names.take("a.jpg") for _ in range(50_000)]
    assert given_names[-1] == "a-50000.jpg"


def test_every_extension_that_pillow_decodes_is_an_images() -> None:
    Image.init()
    stubs = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}  # known to Pillow, not decoded by it
    decoded = {
        extension.lstrip(".")
        for extension, kind in Image.registered_extensions().items()
        if kind in Image.OPEN and kind not in stubs
    } - {"ps"}
    assert decoded <= IMAGE_EXTENSIONS
    assert {"heic", "heif", "avif", "jxl", "cr2", "nef", "dng", "arw"} <= IMAGE_EXTENSIONS


def test_no_extension_is_both() -> None:
    assert not IMAGE_EXTENSIONS & OTHER_EXTENSIONS
    for extension in IMAGE_EXTENSIONS | OTHER_EXTENSIONS:
        assert extension == extension.lower()
        assert "." not in extension


def test_the_last_part_of_an_extension_counts() -> None:
    for extension in ("jpg", ".jpg", "JPEG", "left.png", "a.b.WebP", "HEIC"):
        assert is_image(extension)
    for extension in ("", "txt", "jpg.txt", "jpgx", "json", "png.", "."):
        assert not is_image(extension)
