"""Images to what CLIP sees, against Pillow's own resize and crop, and OpenAI's published pixels."""

from __future__ import annotations

import csv
import io
import json
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

pytest.importorskip("PIL", reason="Pillow is not installed")

from PIL import Image, ImageFile, ImageOps

from aesthetic_filter.clip.preprocess import (
    FORMATS,
    MAX_PIXELS,
    MEMORY,
    Pixels,
    Preprocessing,
    _Memory,
    preprocess,
)
from aesthetic_filter.errors import ImageError, UsageError

U8 = NDArray[np.uint8]
TRUNCATED = "image is truncated (--allow-truncated scores what is there)"
EXACT = Preprocessing()
UNKNOWN = "not an image that can be decoded"


def plain(image: Image.Image) -> U8:
    """OpenAI's recipe, as torchvision carries it out with Pillow.

    Along the rows first: so did every Pillow before 13, in one call too; Pillow 13 in one call
    takes the columns of tall images first.
    """
    image = image.convert("RGB")
    width, height = image.size
    if width <= height:
        new_width, new_height = 224, int(224 * height / width)
    else:
        new_width, new_height = int(224 * width / height), 224
    image = image.resize((new_width, height), Image.Resampling.BICUBIC)
    image = image.resize((new_width, new_height), Image.Resampling.BICUBIC)
    top = int(round((new_height - 224) / 2.0))  # noqa: RUF046 - as torchvision writes it
    left = int(round((new_width - 224) / 2.0))  # noqa: RUF046
    return np.asarray(image.crop((left, top, left + 224, top + 224)))


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(seed).integers(0, 256, (height, width, bands), np.uint8)
    return Image.frombytes(mode, (width, height), values.tobytes())


def photograph(width: int, height: int) -> Image.Image:
    """Gradients, edges and a little noise."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 37 + k) * np.cos(y / 23 - k) * 90 + 128 for k in range(3)]
    values = np.stack(waves, axis=-1) + np.random.default_rng(0).normal(0, 8, (height, width, 3))
    values[height // 3 : height // 2, width // 4 : width // 2] = (250, 10, 60)
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


# Bit for bit.


def test_the_pixels_are_those_that_openai_s_preprocessing_gives(shared: Path) -> None:
    expected = np.load(shared / "preprocess" / "expected_pixel_values.npz")
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    std = np.array([0.26862954, 0.26130258, 0.27577711])
    assert len(expected["names"]) == 7
    for name, normalised in zip(expected["names"], expected["pixel_values"], strict=True):
        wanted = normalised.transpose(1, 2, 0).astype(np.float64)
        found = preprocess(shared / "preprocess" / "images" / f"{name}.jpg")
        levels = np.rint((wanted * std + mean) * 255)
        assert np.array_equal(found.values, levels)
        assert np.abs((found.values / 255 - mean) / std - wanted).max() < 1e-6
        assert f"{found.width}_{found.height}" == name


def test_the_pixels_are_contiguous_writable_bytes() -> None:
    found = preprocess(encoded(noise(300, 400)))
    assert found.values.dtype == np.uint8
    assert found.values.shape == (224, 224, 3)
    assert found.values.flags.c_contiguous
    assert found.values.flags.writeable
    assert (found.width, found.height) == (300, 400)


side = st.one_of(
    st.integers(1, 40),
    st.integers(215, 235),
    st.integers(440, 460),
    st.integers(1, 1200),
)


@given(width=side, height=side, mode=st.sampled_from(["RGB", "RGB", "L"]), seed=st.integers(0, 9))
@settings(max_examples=250, deadline=None)
@example(224, 224, "RGB", 0)
@example(448, 224, "RGB", 0)
@example(225, 224, "RGB", 0)
@example(223, 227, "RGB", 0)
@example(1, 1, "RGB", 0)
@example(1, 300, "RGB", 0)
@example(500, 1, "RGB", 0)
@example(2, 1999, "L", 0)
@example(6000, 300, "RGB", 0)
@example(301, 5000, "RGB", 0)
def test_any_size_is_resized_as_pillow_does(width: int, height: int, mode: str, seed: int) -> None:
    image = noise(width, height, mode, seed)
    found = preprocess(image)
    assert np.array_equal(found.values, plain(image))
    assert (found.width, found.height) == (width, height)


def test_large_images_are_resized_as_pillow_does() -> None:
    for width, height in [(4000, 3000), (2999, 4001), (5000, 700)]:
        image = noise(width, height)
        assert np.array_equal(preprocess(image).values, plain(image))


def test_very_long_images_need_no_more_memory_than_what_is_kept_of_them() -> None:
    # Resized as a whole, this one would be 224 x 44,800,000.
    values = np.repeat(np.arange(200_000, dtype=np.int64) // 3 % 256, 1).astype(np.uint8)
    found = preprocess(encoded(Image.fromarray(values.reshape(-1, 1))))
    assert (found.width, found.height) == (1, 200_000)
    # Upscaled 224 times, the middle 224 rows lie between rows 99,999 and 100,000 of the original.
    low, high = sorted((int(values[99_999]), int(values[100_000])))
    assert low - 1 <= found.values.min() <= found.values.max() <= high + 1


# Modes.


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "LA"])
def test_modes_are_converted_before_they_are_resized(mode: str) -> None:
    image = noise(301, 257, mode)
    assert np.array_equal(preprocess(image).values, plain(image.convert("RGB")))


def test_palettes_with_and_without_transparency_are_converted() -> None:
    image = noise(301, 257).quantize(50)
    palette = np.array(image.getpalette(), np.uint8).reshape(-1, 3)
    wanted = plain(Image.fromarray(palette[np.asarray(image)]))
    assert np.array_equal(preprocess(encoded(image)).values, wanted)
    # Transparency is dropped, not laid over a background.
    for transparency in (3, bytes(range(0, 250, 5))):
        data = encoded(image, transparency=transparency)
        assert "transparency" in opened(data).info
        assert np.array_equal(preprocess(data).values, wanted)


def test_alpha_is_dropped_even_where_it_is_premultiplied() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (257, 301, 4), np.uint8)
    wanted = plain(Image.fromarray(np.ascontiguousarray(colours[:, :, :3])))
    assert np.array_equal(preprocess(encoded(Image.fromarray(colours))).values, wanted)
    # Premultiplied by 128: 50 becomes 25, and is divided again.
    found = preprocess(Image.frombytes("La", (300, 300), bytes([25, 128]) * 90_000))
    assert (found.values == 25 * 255 // 128).all()


def test_one_bit_is_black_or_white_without_dithering() -> None:
    bits = np.random.default_rng(0).integers(0, 2, (240, 250)).astype(bool)
    grey = bits.astype(np.uint8)[:, :, None].repeat(3, axis=2) * 255
    found = preprocess(encoded(Image.fromarray(bits)))
    assert np.array_equal(found.values, plain(Image.fromarray(grey)))


def test_sixteen_bits_of_grey_are_clipped_as_pillow_does() -> None:
    deep = np.random.default_rng(0).integers(0, 400, (240, 250)).astype(np.uint16)
    clipped = deep.clip(0, 255).astype(np.uint8)[:, :, None].repeat(3, axis=2)
    for kind in ("PNG", "TIFF"):
        data = encoded(Image.fromarray(deep), kind)
        assert opened(data).mode == "I;16"
        assert np.array_equal(preprocess(data).values, plain(Image.fromarray(clipped)))


def test_integers_and_floats_are_clipped() -> None:
    values = np.linspace(-300, 700, 240 * 250).reshape(240, 250)
    clipped = values.clip(0, 255).astype(np.uint8)[:, :, None].repeat(3, axis=2)
    for dtype in (np.int32, np.float32):
        image = Image.fromarray(values.astype(dtype))
        assert image.mode in ("I", "F")
        assert np.array_equal(preprocess(image).values, plain(Image.fromarray(clipped)))


def test_colours_of_sixteen_bits_are_decoded() -> None:
    # A PNG by hand: Pillow does not write 16 bits a channel. It takes the upper byte.
    deep = np.random.default_rng(0).integers(0, 65536, (230, 240, 3)).astype(">u2")
    lines = b"".join(b"\0" + line.tobytes() for line in deep)
    data = png((240, 230), lines, depth=16)
    upper = (deep >> 8).astype(np.uint8)
    assert np.array_equal(preprocess(data).values, plain(Image.fromarray(upper)))


def png(size: tuple[int, int], lines: bytes, depth: int = 8, colour: int = 2) -> bytes:
    return png_of(size, zlib.compress(lines), depth, colour)


def png_of(size: tuple[int, int], packed: bytes, depth: int = 8, colour: int = 2) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def black(side: int) -> bytes:
    """A square RGBA PNG, some thousand times smaller than its pixels."""
    packer, line = zlib.compressobj(1), bytes(1 + 4 * side)
    packed = b"".join([packer.compress(line) for _ in range(side)]) + packer.flush()
    return png_of((side, side), packed, colour=6)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("BMP", {}),
        ("GIF", {}),
        ("ICO", {"sizes": [(250, 240)]}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("JPEG2000", {}),
        ("PPM", {}),
        ("TGA", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {}),
        ("AVIF", {}),
    ],
)
def test_formats_are_decoded(kind: str, options: dict[str, Any]) -> None:
    data = encoded(photograph(250, 240), kind, **options)
    found = preprocess(data)
    assert np.array_equal(found.values, plain(opened(data)))
    assert (found.width, found.height) == (250, 240)


# Orientation.

DISPLAYED: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}
"""What EXIF's definition of each orientation makes of an array (rows, columns, channels)."""


@pytest.mark.parametrize("orientation", DISPLAYED)
@pytest.mark.parametrize("size", [(300, 400), (900, 250), (231, 1203)])
def test_orientation_is_applied(orientation: int, size: tuple[int, int]) -> None:
    image = noise(*size)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, exif=exif)
    displayed = np.ascontiguousarray(DISPLAYED[orientation](np.asarray(image)))
    found = preprocess(data)
    assert np.array_equal(found.values, plain(Image.fromarray(displayed)))
    assert (found.height, found.width) == displayed.shape[:2]
    # And as Pillow itself does it.
    turned = ImageOps.exif_transpose(opened(data))
    assert np.array_equal(found.values, plain(turned))

    ignored = preprocess(data, Preprocessing(exif=False))
    assert np.array_equal(ignored.values, plain(image))
    assert (ignored.width, ignored.height) == size

    grey = preprocess(encoded(image.convert("L"), exif=exif))
    assert np.array_equal(grey.values, plain(turned.convert("L")))


@pytest.mark.parametrize("shape", ["Landscape", "Portrait"])
def test_the_orientation_examples_look_alike(shared: Path, shape: str) -> None:
    folder = shared / "images" / "exif-orientation-examples"
    found = {n: preprocess(folder / f"{shape}_{n}.jpg") for n in range(1, 9)}
    upright = found[1].values.astype(int)
    for n, pixels in found.items():
        assert (pixels.width > pixels.height) == (shape == "Landscape"), n
        assert np.abs(pixels.values - upright).mean() < 6, n  # each has its number painted on it
        with Image.open(folder / f"{shape}_{n}.jpg") as image:
            assert np.array_equal(pixels.values, plain(ImageOps.exif_transpose(image)))


def test_a_senseless_orientation_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 9
    image = noise(300, 240)
    assert np.array_equal(preprocess(encoded(image, exif=exif)).values, plain(image))
    broken = encoded(image, exif=b"Exif\0\0MM\0\x2a\0\0\0\xff\1")
    assert np.array_equal(preprocess(broken).values, plain(image))


# What it takes.


def test_only_the_first_frame_counts() -> None:
    first, second = photograph(250, 240), noise(250, 240)
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        lossless = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(first, kind, save_all=True, append_images=[second], **lossless)
        assert opened(data).n_frames == 2  # type: ignore[attr-defined]
        alone = opened(encoded(first, kind, **lossless))
        assert np.array_equal(preprocess(data).values, plain(alone)), kind


def test_bytes_of_any_kind_and_paths_give_the_same(tmp_path: Path) -> None:
    data = encoded(noise(300, 240), "JPEG")
    path = tmp_path / "image with no ending"
    path.write_bytes(data)
    wanted = plain(opened(data))
    for given_ in (data, bytearray(data), memoryview(data), path, str(path)):
        assert np.array_equal(preprocess(given_).values, wanted)


def test_arrays_are_images() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (240, 300, 4), np.uint8)
    rgb = np.ascontiguousarray(colours[:, :, :3])
    grey = np.ascontiguousarray(colours[:, :, :1])
    for array in (rgb, colours, colours[:, :, :3], rgb[:, ::-1][:, ::-1]):
        assert np.array_equal(preprocess(array).values, plain(Image.fromarray(rgb)))
    wanted = plain(Image.fromarray(grey.repeat(3, axis=2)))
    for array in (grey, grey[:, :, 0]):
        assert np.array_equal(preprocess(array).values, wanted)
    assert preprocess(rgb).width == 300


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((5, 5, 3), np.float32), "uint8 .* not float32"),
        (np.zeros((5, 5, 2), np.uint8), r"not uint8 and \(5, 5, 2\)"),
        (np.zeros((3, 5, 5), np.uint8), r"not uint8 and \(3, 5, 5\)"),
        (np.zeros((2, 5, 5, 3), np.uint8), r"height, width"),
        (np.zeros((0, 5, 3), np.uint8), "image is empty"),
    ],
)
def test_other_arrays_are_refused(array: NDArray[Any], says: str) -> None:
    with pytest.raises(ImageError, match=says):
        preprocess(array)


def test_what_is_no_image_at_all_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="an image is encoded bytes, a path"):
        preprocess(12)  # type: ignore[arg-type]


def test_an_image_that_someone_holds_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    path.write_bytes(encoded(photograph(800, 600), "JPEG", exif=exif))
    with Image.open(path) as held:
        turned = plain(ImageOps.exif_transpose(Image.open(io.BytesIO(path.read_bytes()))))
        info = dict(held.info)
        found = preprocess(held, Preprocessing(decode="fast"))
        assert np.array_equal(found.values, turned)  # no draft: it is not ours to scale down
        assert (found.width, found.height) == (600, 800)
        assert held.size == (800, 600)
        assert held.mode == "RGB"
        assert dict(held.info) == info
        assert held.getexif()[0x0112] == 6
        assert np.array_equal(np.asarray(held), np.asarray(opened(path.read_bytes())))
        assert np.array_equal(preprocess(held).values, turned)


def test_options_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UsageError, match="no decode 'quick'; there are: exact, fast"):
        Preprocessing(decode="quick")
    with pytest.raises(UsageError, match="max_pixels is 0"):
        Preprocessing(max_pixels=0)


# Fast.


def test_fast_scales_only_large_photographs_and_moves_pixels_little() -> None:
    fast = Preprocessing(decode="fast")
    image = photograph(2000, 1500)
    large = encoded(image, "JPEG", quality=90)
    found = preprocess(large, fast)
    moved = np.abs(found.values.astype(int) - plain(opened(large)))
    assert 0 < moved.mean() < 3
    assert (found.width, found.height) == (2000, 1500)
    # Nothing to scale: the shortest side would have fewer than 224 pixels; or not a JPEG.
    small = encoded(image.resize((640, 447)), "JPEG")
    for data in (small, encoded(image)):
        assert np.array_equal(preprocess(data, fast).values, preprocess(data).values)
    exif = Image.Exif()
    exif[0x0112] = 8
    turned = preprocess(encoded(image, "JPEG", quality=90, exif=exif), fast)
    assert (turned.width, turned.height) == (1500, 2000)


# Refusing.


def bomb(size: tuple[int, int]) -> bytes:
    return png(size, b"", colour=6)


def test_large_images_are_refused_before_they_are_decoded() -> None:
    refused = "image has more than 178,956,970 pixels (--max-pixels)"
    assert Image.MAX_IMAGE_PIXELS is not None
    assert 2 * Image.MAX_IMAGE_PIXELS == MAX_PIXELS  # where Pillow's own refusal begins
    assert reason(bomb((100_000, 100_000))) == refused
    assert reason(bomb((13_378, 13_378))) == refused
    # One that is just small enough is not refused for its size, nor warned about.
    assert reason(bomb((13_377, 13_377))) == TRUNCATED
    # Other limits, lower and higher than Pillow's own.
    few = Preprocessing(max_pixels=50_000)
    assert (
        reason(encoded(noise(300, 240)), few) == "image has more than 50,000 pixels (--max-pixels)"
    )
    assert reason(noise(300, 240), few) == "image has more than 50,000 pixels (--max-pixels)"
    assert preprocess(encoded(noise(250, 200)), few).width == 250
    many = Preprocessing(max_pixels=400_000_000)
    assert reason(bomb((14_000, 14_000)), many) == TRUNCATED


def test_images_that_need_too_much_memory_are_refused() -> None:
    # The header of a JPEG 2000 image of 100 megapixels: 32-bit planes, several times over.
    data = bytearray(encoded(noise(64, 64), "JPEG2000", no_jp2=True))
    assert data[2:4] == b"\xff\x51"
    for place, value in ((8, 10_000), (12, 10_000), (24, 10_000), (28, 10_000)):
        data[place : place + 4] = struct.pack(">I", value)
    assert reason(bytes(data)) == (
        "image needs more than 1.5 GB to decode (a larger --max-pixels allows more)"
    )


def reason(image: Any, options: Preprocessing = EXACT) -> str:
    with pytest.raises(ImageError) as caught:
        preprocess(image, options)
    return str(caught.value)


def test_the_same_fault_has_the_same_reason(tmp_path: Path) -> None:
    assert reason(b"") == "image is empty (0 bytes)"
    assert reason(b"what is this?") == UNKNOWN
    assert reason(b"<svg xmlns='http://www.w3.org/2000/svg'/>") == UNKNOWN
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n") == UNKNOWN
    assert reason(tmp_path / "none.jpg") == f"no such file: {tmp_path / 'none.jpg'}"
    assert reason(tmp_path) == "file cannot be read: Is a directory"
    whole = encoded(noise(300, 240), "JPEG")
    assert reason(whole[: len(whole) // 2]) == TRUNCATED
    assert reason(whole[: len(whole) // 3]) == TRUNCATED
    assert reason(png((300, 240), b"")) == TRUNCATED
    flat = encoded(Image.new("RGB", (300, 240)), "BMP")
    assert reason(flat[:28] + b"\x37" + flat[29:]) == (
        "image cannot be decoded: Unsupported BMP pixel depth"
    )


def test_no_format_may_start_another_program_or_open_another_format() -> None:
    assert not {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "IPTC", "ICNS", "FITS"} & {*FORMATS}
    assert {*FORMATS} <= {*Image.OPEN, "AVIF", "WEBP", "JPEG2000", "MPO"}


LOAD_TRUNCATED = """
import io, sys
import numpy as np
from PIL import Image, ImageFile
ImageFile.LOAD_TRUNCATED_IMAGES = True
sys.path.insert(0, sys.argv[1])
from test_preprocess import plain
for path in sys.argv[2:]:
    with Image.open(path) as image:
        np.save(path + ".npy", plain(image))
"""


def test_truncated_images_are_taken_with_what_is_there(tmp_path: Path) -> None:
    image = photograph(400, 300)
    kinds = {"base": "JPEG", "progressive": "JPEG", "png": "PNG", "gif": "GIF", "bmp": "BMP"}
    paths = []
    for name, kind in kinds.items():
        whole = encoded(image, kind, **({"progressive": True} if name == "progressive" else {}))
        for part in (0.3, 0.7):
            paths.append(tmp_path / f"{name}-{part}")
            paths[-1].write_bytes(whole[: int(part * len(whole))])
    # What Pillow makes of them, with its setting for the whole process.
    here = str(Path(__file__).parent)
    program = [sys.executable, "-c", LOAD_TRUNCATED, here, *map(str, paths)]
    subprocess.run(program, check=True, timeout=60)
    for path in paths:
        assert reason(path) == TRUNCATED, path.name
        found = preprocess(path, Preprocessing(allow_truncated=True))
        assert np.array_equal(found.values, np.load(f"{path}.npy")), path.name
        assert (found.width, found.height) == (400, 300)
    fast = preprocess(paths[1], Preprocessing(allow_truncated=True, decode="fast"))
    assert fast.width == 400
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_a_file_without_pixels_is_refused_though_truncated_ones_are_allowed() -> None:
    allowed = Preprocessing(allow_truncated=True)
    whole = encoded(noise(300, 240))
    assert reason(whole[:20], allowed) == "image is truncated before its pixels"
    assert reason(b"", allowed) == "image is empty (0 bytes)"


# Odd, broken and hostile files.

NOT_AS_PILLOW = {
    # Left out: what it holds is decoded by Pillow whatever its size.
    "oom-8ed3316a4109213ca96fb8a256a0bfefdece1461.icns": UNKNOWN,
    # Pillow fails too, but its image, loaded a second time, gives what was decoded before.
    "broken_data_stream.png": "image cannot be decoded: unrecognized data stream contents",
    "badadler.png": "image cannot be decoded: broken data stream",
}


def test_every_odd_file_gives_pixels_or_a_reason(shared: Path) -> None:
    folder = shared / "images"
    with (folder / "MANIFEST.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 200
    refused = 0
    for row in rows:
        data = (folder / row["file"]).read_bytes()
        name = Path(row["file"]).name
        outcome: str | None = None
        try:
            found = preprocess(data)
        except ImageError as error:
            outcome = str(error)
            refused += 1
            assert len(outcome) <= 130
            assert "\n" not in outcome
            assert "/" not in outcome
        else:
            assert found.values.shape == (224, 224, 3)
        if name in NOT_AS_PILLOW:
            assert outcome is not None
            assert outcome.startswith(NOT_AS_PILLOW[name]), name
        elif row["pillow_result"] == "ok":
            assert outcome is None, (name, outcome)
            turned = int(row["exif_orientation"] or 0) >= 5 and row["format"] != "TIFF"
            size = (int(row["width"]), int(row["height"]))
            assert (found.width, found.height) == (size[::-1] if turned else size), name
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image = ImageOps.exif_transpose(opened(data))
                assert np.array_equal(found.values, plain(image)), name
        elif row["pillow_result"].startswith(("OSError", "Unidentified", "Decompression", "Value")):
            assert outcome is not None, name
    assert refused > 30


HOSTILE = """
import json, pathlib, resource, sys, threading, warnings
from concurrent.futures import ThreadPoolExecutor
warnings.simplefilter("error")
from aesthetic_filter.clip.preprocess import Pixels, Preprocessing, preprocess
from aesthetic_filter.errors import ImageError

def one(job):
    path, options = job
    try:
        found = preprocess(path.read_bytes(), options)
    except ImageError as error:
        return str(error)
    except BaseException as error:
        return f"UNEXPECTED {path.name} {error!r}"
    return "ok" if isinstance(found, Pixels) else "UNEXPECTED"

files = [p for f in sys.argv[1:] for p in sorted(pathlib.Path(f).rglob("*")) if p.is_file()]
options = [Preprocessing(), Preprocessing(allow_truncated=True, decode="fast")]
with ThreadPoolExecutor(4) as pool:
    found = list(pool.map(one, [(p, o) for p in files for o in options]))
status = pathlib.Path("/proc/self/status")
if status.exists():  # ru_maxrss would count the process that started this one
    peak = int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"found": found, "peak": peak}))
"""


def test_a_hostile_folder_in_four_threads_stays_within_memory(shared: Path, tmp_path: Path) -> None:
    # Large ones that do decode, of formats that take much memory: more than there is for all.
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(black(11_000))
    flat = Image.new("RGB", (6000, 6000), (200, 100, 50))
    webp = encoded(flat, "WEBP", method=0)
    progressive = encoded(flat, "JPEG", progressive=True, subsampling=0)
    for number in range(2):
        (tmp_path / f"{number}.webp").write_bytes(webp)
        (tmp_path / f"{number}.jpg").write_bytes(progressive)
    folders = [str(shared / "images"), str(tmp_path)]
    program = [sys.executable, "-c", HOSTILE, *folders]
    ran = subprocess.run(program, capture_output=True, text=True, timeout=200, check=False)
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert len(told["found"]) > 400
    assert not [outcome for outcome in told["found"] if outcome.startswith("UNEXPECTED")]
    assert told["found"][-12:] == ["ok"] * 12
    assert told["peak"] < 2e9
    assert "Warning" not in ran.stderr


def test_memory_is_shared_and_large_wishes_are_not_passed_over() -> None:
    memory = _Memory(100)
    most, now = [0], [0]

    def use(amount: int) -> None:
        with memory.take(amount):
            now[0] += min(amount, 100)
            most[0] = max(most[0], now[0])
            sum(range(2000))
            now[0] -= min(amount, 100)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, [30, 60, 10, 1000, 100, 45] * 100))
    assert now[0] == 0
    assert most[0] <= 100
    with pytest.raises(KeyError), memory.take(100):
        raise KeyError
    with memory.take(100):
        pass
    assert MEMORY < 2e9


# Threads.


def test_many_threads_give_what_one_gives(shared: Path) -> None:
    folder = shared / "images"
    names = ["Pillow/Tests/images/hopper.gif", "Pillow/Tests/images/hopper.webp"]
    files = [folder / name for name in names]
    files += sorted((shared / "preprocess" / "images").iterdir())
    files += sorted((folder / "exif-orientation-examples").iterdir())[:6]
    files += [folder / "Pillow/Tests/images/truncated_jpeg.jpg"]

    def outcome(path: Path) -> Pixels | str:
        try:
            return preprocess(path.read_bytes())
        except ImageError as error:
            return str(error)

    serial = [outcome(path) for path in files]
    with ThreadPoolExecutor(8) as pool:
        for path, alone, found in zip(
            files * 4, serial * 4, pool.map(outcome, files * 4), strict=True
        ):
            if isinstance(alone, str):
                assert found == alone, path
            else:
                assert isinstance(found, Pixels)
                assert np.array_equal(found.values, alone.values), path


def test_warnings_of_pillow_s_stay_unsaid_only_inside() -> None:
    image = noise(30, 30).quantize(10)
    image.info["transparency"] = bytes(range(10))
    with warnings.catch_warnings():
        warnings.resetwarnings()
        warnings.simplefilter("error")
        preprocess(image)
        with pytest.raises(UserWarning, match="Transparency expressed in bytes"):
            image.convert("RGB")
        preprocess(image)
    assert image.info["transparency"] == bytes(range(10))
