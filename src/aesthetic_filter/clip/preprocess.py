"""Encoded images to the 224 x 224 pixels that CLIP ViT-L/14 looks at.

The recipe is OpenAI's (https://github.com/openai/CLIP, ``clip.py``, ``_transform``): the first
frame, in RGB, its shortest side resized to 224 with Pillow's bicubic filter, its centre cropped.
The result is that of Pillow's own ``convert``, ``resize`` and ``crop``, bit for bit; EXIF
orientation is applied before, as by ``PIL.ImageOps.exif_transpose``. (Pillow 13 resizes images more
than twice as tall as wide in another order than all before it; here the order stays.)

Pillow decodes and converts. The resizing is done here, with Pillow's arithmetic: in strips, and
only those pixels that the crop leaves. That takes less than half the time, needs no second copy of
a large image, and of an image of 1 x 100,000 pixels makes nothing but what is kept of it.

``decode="fast"`` lets the JPEG decoder scale large photographs down by 2, 4 or 8 first, as far as
the shortest side keeps 224 pixels. It moves pixels: by 0.3 to 2.5 levels (of 255) on average, by 36
at the most, over photographs of 0.3 to 12 megapixels (``python benchmarks/bench_preprocess.py``
measures it). Keeping 448 pixels would move them by 0.9 at the most on average, but saves nothing
at 640 x 480, and a quarter less at 12 megapixels.

Everything here may be called from many threads at once: no setting of Pillow's is changed. Images
being decoded share :data:`MEMORY`; one that finds too little left waits.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import struct
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aesthetic_filter.errors import ImageError, MissingExtraError, UsageError

try:
    from PIL import ExifTags, Image, ImageFile, ImageOps
    from PIL.JpegImagePlugin import JpegImageFile
except ImportError:
    raise MissingExtraError("decoding images needs Pillow", "clip") from None

SIZE = 224
"""Pixels on each side of what the encoder sees."""

MAX_PIXELS = 178_956_970
"""The default limit, Pillow's own: beyond it Pillow refuses to open an image.

Phones of 12 to 108 megapixels, cameras of 100 and 150 and panoramas pass; what a phone takes with
200 does not. Decoded, so many pixels take 0.7 GB.
"""

MEMORY = 1_500_000_000
"""Bytes that the images being decoded may take together, whatever the number of threads.

With what else a process needs that stays below 2 GB.
"""

FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "MPO", "PPM", "ICO"),
    *("PSD", "DIB", "CUR", "QOI", "DDS", "SGI", "PCX", "DCX", "SUN", "BLP", "FLI", "FTEX", "GBR"),
    *("MCIDAS", "MSP", "PIXAR", "XBM", "XPM", "XVTHUMB", "IM", "IMT", "PCD", "SPIDER", "TGA"),
)
"""What is decoded: everything that Pillow decodes by itself; those without a signature come last.

Left out are formats for which Pillow starts another program or asks for a plugin (EPS, WMF, BUFR,
GRIB, HDF5), that hold no image (MPEG), and containers whose contents Pillow opens without asking
here, whatever they are (IPTC) and however large (ICNS, FITS).
"""

DECODES = ("exact", "fast")

_BYTES_PER_PIXEL = {
    **{"JPEG": 4, "MPO": 4, "PNG": 5, "GIF": 8, "BMP": 8, "TIFF": 12},
    **{"AVIF": 20, "WEBP": 20, "JPEG2000": 28},
}
"""The most that decoding takes, measured; 16 for the others, some of them decoded in Python."""

_BYTES_PER_PIXEL_IN_SCANS = 12
"""Likewise for a JPEG whose scans must all be read first, as those of a progressive one."""

_TURNED = {
    1: (Image.Transpose.TRANSPOSE, False, False),
    2: (Image.Transpose.ROTATE_90, True, False),
    3: (Image.Transpose.TRANSVERSE, True, True),
    4: (Image.Transpose.ROTATE_270, False, True),
    5: (None, False, False),
    6: (Image.Transpose.FLIP_TOP_BOTTOM, False, True),
    7: (Image.Transpose.ROTATE_180, True, True),
    8: (Image.Transpose.FLIP_LEFT_RIGHT, True, False),
}
"""By EXIF orientation: what turns the image so that its rows are the columns as displayed (the
orientation's own transposition, and then one more), and whether a column and a row as stored count
from the other end. From 5 on, rows as stored are columns as displayed."""


@dataclass(frozen=True)
class Preprocessing:
    """How images are decoded.

    Attributes:
        decode: "exact", or "fast", which scales large JPEG photographs down while decoding.
        exif: whether the orientation in the EXIF data is applied.
        max_pixels: an image with more is refused before it is decoded.
        allow_truncated: whether a file that ends too early is taken with what is there.

    Raises:
        UsageError: there is no such decode, or max_pixels is not positive.
    """

    decode: str = "exact"
    exif: bool = True
    max_pixels: int = MAX_PIXELS
    allow_truncated: bool = False

    def __post_init__(self) -> None:
        if self.decode not in DECODES:
            known = ", ".join(DECODES)
            raise UsageError(f"there is no decode {self.decode!r}; there are: {known}")
        if self.max_pixels < 1:
            raise UsageError(f"max_pixels is {self.max_pixels}; it must be at least 1")


@dataclass(frozen=True)
class Pixels:
    """What the encoder sees of an image.

    Attributes:
        values: (224, 224, 3) uint8, RGB, C-contiguous.
        width: of the whole image as displayed, in pixels.
        height: likewise.
    """

    values: NDArray[np.uint8]
    width: int
    height: int


@dataclass(frozen=True)
class Thumbnail:
    """A small JPEG.

    Attributes:
        data: the file.
        width: in pixels.
        height: in pixels.
    """

    data: bytes
    width: int
    height: int


Encoded = bytes | bytearray | memoryview


def preprocess(
    image: Encoded | str | os.PathLike[str] | Image.Image | NDArray[np.uint8],
    options: Preprocessing = Preprocessing(),
) -> Pixels:
    """Decode an image, resize it and crop its centre.

    Args:
        image: an encoded image; the path of one; a PIL image, which is not changed (but loaded);
            or a uint8 array: (height, width) or (height, width, 1) grey, (height, width, 3) RGB,
            (height, width, 4) RGBA.
        options: how to decode it.

    Raises:
        ImageError: it cannot be decoded, or is refused. The same kind of fault has the same text.
        TypeError: image is something else altogether.
    """
    if not isinstance(image, Encoded | str | os.PathLike | Image.Image | np.ndarray):
        wanted = "encoded bytes, a path, a PIL image or a uint8 array"
        raise TypeError(f"an image is {wanted}, not {type(image)}")
    _hush()
    _weigh()  # outside: what goes wrong here is no fault of the image
    with ExitStack() as memory:
        found = _outcome(image, options, memory)
    if isinstance(found, str):
        raise ImageError(found)
    return found


def _outcome(
    image: Encoded | str | os.PathLike[str] | Image.Image | NDArray[np.uint8],
    options: Preprocessing,
    memory: ExitStack,
) -> Pixels | str:
    """The pixels, or why there are none.

    Memory that is taken is entered in ``memory``, and given back by whoever calls. By then nothing
    refers to the decoded image any more, as the traceback of an error would.
    """
    _inside.pillow = True
    try:
        if isinstance(image, str | os.PathLike):
            image = _read(image)
        if isinstance(image, Encoded):
            return _from_bytes(image, options, memory)
        if isinstance(image, np.ndarray):
            image = _image_of_array(image)
        return _from_image(image, options, memory)
    except ImageError as error:
        return str(error)
    except Exception as error:  # struct.error, IndexError, zlib.error, ...: decoders raise anything
        return _reason(error, options)
    finally:
        _inside.pillow = False


def _read(path: str | os.PathLike[str]) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise ImageError(f"no such file: {os.fspath(path)}") from None
    except OSError as error:
        raise ImageError(f"file cannot be read: {error.strerror or type(error).__name__}") from None


def _image_of_array(array: NDArray[Any]) -> Image.Image:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise ImageError(
            "an array that is an image has dtype uint8 and shape (height, width), or "
            f"(height, width, 1, 3 or 4), not {array.dtype} and {array.shape}"
        )
    if not array.size:
        raise ImageError("image is empty (0 pixels)")
    array = array[:, :, 0] if array.ndim == 3 and channels == 1 else array
    return Image.fromarray(np.ascontiguousarray(array))


def _from_bytes(data: Encoded, options: Preprocessing, memory: ExitStack) -> Pixels:
    image = _admitted(data, options, memory)
    original = image.size
    extent: tuple[float, float] = original
    if options.decode == "fast" and isinstance(image, JpegImageFile):
        drafted = image.draft(None, (SIZE, SIZE))
        # Where the image ends, which is within its last pixels unless its size divides.
        extent = drafted[1][2:] if drafted else extent
    image = _load(image, data, options)
    try:
        return _pixels(image, original, extent, options)
    finally:
        image.close()


def _admitted(data: Encoded, options: Preprocessing, memory: ExitStack) -> ImageFile.ImageFile:
    """An image that is opened, is not too large, and has the memory that decoding it takes."""
    if not len(data):
        raise ImageError("image is empty (0 bytes)")
    # Opening an icon decodes the image inside, whose size is known only then.
    icon = bytes(data[:4]) == b"\0\0\1\0"
    if icon:
        memory.enter_context(_memory.take(MEMORY))
    image = _open(data)
    _check_size(image, options)
    if not icon:
        memory.enter_context(_memory.take(_bytes_to_decode(image, data, options)))
    return image


def _from_image(image: Image.Image, options: Preprocessing, memory: ExitStack) -> Pixels:
    _check_size(image, options)
    memory.enter_context(_memory.take(4 * image.width * image.height))
    image.load()
    return _pixels(image, image.size, image.size, options)


def _check_size(image: Image.Image, options: Preprocessing) -> None:
    if not image.width or not image.height:
        raise ImageError("image is empty (0 pixels)")
    if image.width * image.height > options.max_pixels:
        raise ImageError(_too_large(options.max_pixels))


def _too_large(pixels: int) -> str:
    return f"image has more than {pixels:,} pixels (--max-pixels)"


def thumbnail(data: Encoded, side: int, *, quality: int = 80) -> Thumbnail:
    """A small JPEG of an encoded image, for people to look at: upright, and on white.

    Args:
        data: the encoded image.
        side: the longest side that the thumbnail may have, in pixels; a smaller image stays as it
            is.
        quality: of the JPEG, 1 to 95.

    Raises:
        ImageError: it cannot be decoded, or is refused.
    """
    _hush()
    with ExitStack() as memory:
        found = _small(data, side, quality, memory)
    if isinstance(found, str):
        raise ImageError(found)
    return found


def _small(data: Encoded, side: int, quality: int, memory: ExitStack) -> Thumbnail | str:
    """As :func:`_outcome`: nothing refers to the decoded image when memory is given back."""
    options = Preprocessing(allow_truncated=True)
    _inside.pillow = True
    try:
        file = _admitted(data, options, memory)
        if isinstance(file, JpegImageFile):
            file.draft("RGB", (side, side))
        image: Image.Image = _load(file, data, options)
        orientation = _orientation(image)
        clear = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
        if image.mode == "La":  # Pillow has no way from it to RGB
            image = image.convert("LA")
        exif = image.getexif() if orientation != 1 else None
        if image.mode not in ("RGB", "RGBA", "L", "LA"):
            image = image.convert("RGBA" if clear else "RGB")
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        if exif is not None:
            image.getexif().update(exif)
            ImageOps.exif_transpose(image, in_place=True)
        if clear:
            seen = image.convert("RGBA")
            image = Image.new("RGB", seen.size, "white")
            image.paste(seen, mask=seen.getchannel("A"))
        into = BytesIO()
        image.convert("RGB").save(into, "JPEG", quality=quality, optimize=True)
        return Thumbnail(into.getvalue(), image.width, image.height)
    except ImageError as error:
        return str(error)
    except Exception as error:  # decoders raise anything
        return _reason(error, options)
    finally:
        _inside.pillow = False


# Decoding.


def _open(data: Encoded) -> ImageFile.ImageFile:
    """What ``Image.open`` does, without its own limit, which is one for the whole process."""
    prefix = bytes(data[:16])
    for name in FORMATS:
        if name not in Image.OPEN:  # this Pillow was built without it
            continue
        factory, accept = Image.OPEN[name]
        accepted = accept(prefix) if accept else True
        # A string says why an image of this format cannot be decoded.
        if accepted and not isinstance(accepted, str):
            with suppress(SyntaxError, IndexError, TypeError, struct.error):
                return factory(BytesIO(data), "")
    raise ImageError("not an image that can be decoded")


def _load(image: ImageFile.ImageFile, data: Encoded, options: Preprocessing) -> ImageFile.ImageFile:
    """Decode; of a file that ends too early what is there, if the options allow it.

    Pillow's own setting for that, ``LOAD_TRUNCATED_IMAGES``, is one for the whole process.
    """
    try:
        image.load()
    except Exception as error:
        if not (options.allow_truncated and _is_truncated(error)):
            raise
        if isinstance(image, JpegImageFile):
            # With an end marker, libjpeg makes grey of what is missing.
            size = image.size
            image.close()
            whole = _open(bytes(data) + b"\xff\xd9")
            if whole.size != size:
                whole.draft(None, (SIZE, SIZE))
            whole.load()
            return whole
        # What was decoded so far stays in the image. The rest is as for a file that is complete.
        image.tile = []
        with suppress(Exception):
            image.load_end()
        image.load()
    return image


def _is_truncated(error: Exception) -> bool:
    return "truncated" in str(error).lower()


def _bytes_to_decode(image: ImageFile.ImageFile, data: Encoded, options: Preprocessing) -> int:
    """How much memory an image takes while it is decoded, at the most.

    Raises:
        ImageError: it is more than even one image at a time may have.
    """
    each = _BYTES_PER_PIXEL.get(image.format or "", 16)
    if isinstance(image, JpegImageFile):
        # The header has been read up to the first scan. In the scans 0xFF stands only in markers.
        first_scan = image.fp.tell() if image.fp else 0
        if bytes(data).find(b"\xff\xda", first_scan) >= 0:
            each = _BYTES_PER_PIXEL_IN_SCANS
    needed = image.width * image.height * each
    most = max(MEMORY, 8 * options.max_pixels)
    if needed > most:
        raise ImageError(
            f"image needs more than {most / 1e9:.1f} GB to decode "
            "(a larger --max-pixels allows more)"
        )
    return needed


class _Memory:
    """Memory that threads share."""

    def __init__(self, total: int) -> None:
        self._total, self._taken = total, 0
        self._given_back = threading.Condition()
        self._turn = threading.Lock()

    @contextmanager
    def take(self, amount: int) -> Iterator[None]:
        """Wait until there is enough; what is more than all there is must be alone."""
        amount = min(amount, self._total)
        # Whoever waits for a lot holds back those who came later and want little.
        with self._turn, self._given_back:
            self._given_back.wait_for(lambda: self._taken + amount <= self._total)
            self._taken += amount
        try:
            yield
        finally:
            if amount > _TRIM_ABOVE:
                _trim()(0)
            with self._given_back:
                self._taken -= amount
                self._given_back.notify()


_memory = _Memory(MEMORY)

_TRIM_ABOVE = 100_000_000


@cache
def _trim() -> Callable[[int], int]:
    """What gives freed memory back to the system, where the C library has it (glibc).

    By itself it keeps a tenth of a gigabyte for each thread that has decoded a large JPEG 2000.
    """
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return lambda _: 0
    return trim


# Resizing, with the arithmetic of Pillow's Resample.c.


def _pixels(
    image: Image.Image,
    original: tuple[int, int],
    extent: tuple[float, float],
    options: Preprocessing,
) -> Pixels:
    """Resize and crop a decoded image.

    Args:
        image: as stored, scaled down or not.
        original: its width and height before it was scaled down.
        extent: its width and height now, which need not be whole pixels.
        options: whether its orientation counts.
    """
    orientation = _orientation(image) if options.exif else 1
    stored = image.size
    if orientation >= 5:
        original, extent, stored = original[::-1], extent[::-1], stored[::-1]
    width, height = original
    short, long = min(width, height), max(width, height)
    scaled = int(SIZE * long / short)
    new_width, new_height = (SIZE, scaled) if width <= height else (scaled, SIZE)
    columns = _weights(stored[0], extent[0], new_width)
    rows = _weights(stored[1], extent[1], new_height)

    # First along the rows, a strip of rows at a time; a strip is turned, so that what is added up
    # are whole rows. Then along the columns. Pillow rounds in between too. That order was every
    # Pillow's up to 12; 13 takes the columns of tall images first. The encoder was trained with
    # this one, and pixels do not depend on which Pillow is installed.
    grey = image.mode == "L"
    channels = 1 if grey else 4
    weigh = _weigh()
    between = np.empty((SIZE, rows.used * channels), np.uint8)
    step = max(1, _STRIP_PIXELS // columns.used)
    for start in range(0, rows.used, step):
        stop = min(start + step, rows.used)
        strip = _strip(
            image,
            orientation,
            (columns.start, columns.start + columns.used),
            (rows.start + start, rows.start + stop),
        )
        # A fourth byte for each pixel, as Pillow has it, is faster than none.
        packed = strip.tobytes("raw", "L" if grey else "RGBX")
        lines = np.frombuffer(packed, np.uint8).reshape(columns.used, -1)
        weigh(lines, columns.first, columns.values, between, start * channels)
    turned = between.T if grey else between.view(np.uint32).T
    lines = np.ascontiguousarray(turned).view(np.uint8)
    out = np.empty((SIZE, SIZE * channels), np.uint8)
    weigh(lines, rows.first, rows.values, out, 0)
    values = np.empty((SIZE, SIZE, 3), np.uint8)
    for channel in range(3):
        values[:, :, channel] = out[:, 0 if grey else channel :: channels]
    return Pixels(values, width, height)


_STRIP_PIXELS = 1 << 18
"""Pixels in a strip: 1 MB, which stays in the cache."""


def _orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken EXIF data says nothing about the pixels
        return 1
    return found if found in _TURNED else 1


def _strip(
    image: Image.Image, orientation: int, columns: tuple[int, int], rows: tuple[int, int]
) -> Image.Image:
    """Columns and rows of the image as displayed, in RGB or grey, turned: a row is a column."""
    turn, from_right, from_bottom = _TURNED[orientation]
    across, down = (columns, rows) if orientation < 5 else (rows, columns)
    if from_right:
        across = image.width - across[1], image.width - across[0]
    if from_bottom:
        down = image.height - down[1], image.height - down[0]
    strip = image.crop((across[0], down[0], across[1], down[1]))
    if strip.mode not in ("RGB", "L"):
        # Pillow has no way from La to RGB.
        strip = strip.convert("LA") if strip.mode == "La" else strip
        strip = strip.convert("RGB")
    return strip if turn is None else strip.transpose(turn)


@dataclass(frozen=True)
class _Weights:
    """Which 224 weighted sums of an image's rows (or columns) make the cropped ones.

    Attributes:
        start: the first row that any of them needs.
        used: how many rows they need.
        first: (224,) int64, the first row for each of them, counted from start.
        values: (224, taps) int32, in units of 1 / 2**22; zeros after the last.
    """

    start: int
    used: int
    first: NDArray[np.int64]
    values: NDArray[np.int32]


@lru_cache(maxsize=64)  # many images have the same size
def _weights(size: int, extent: float, scaled: int) -> _Weights:
    """Pillow's bicubic weights for the middle 224 of ``scaled`` pixels.

    They are made of the first ``extent`` of ``size`` pixels.

    Every operation is ``precompute_coeffs``'s, in its order, so that every weight is the same.
    """
    crop = round((scaled - SIZE) / 2.0)  # torchvision's rule: half to even
    scale = float(np.float32(extent)) / scaled
    filter_scale = max(scale, 1.0)
    support = 2.0 * filter_scale
    center = (np.arange(crop, crop + SIZE) + 0.5) * scale
    first = np.maximum((center - support + 0.5).astype(np.int64), 0)
    stop = np.minimum((center + support + 0.5).astype(np.int64), size)
    at = first[:, None] + np.arange((stop - first).max())
    inside = at < stop[:, None]
    weight = np.where(inside, _bicubic((at - center[:, None] + 0.5) * (1.0 / filter_scale)), 0.0)
    # A running sum adds one after the other, as Pillow does; a sum does not.
    total = np.cumsum(weight, axis=1)[:, -1:]
    weight = weight / np.where(total == 0.0, 1.0, total)
    values = np.trunc(weight * (1 << 22) + np.copysign(0.5, weight)).astype(np.int32)
    start = int(first[0])
    return _Weights(start, int(stop.max()) - start, first - start, values)


def _bicubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    a = -0.5
    x = np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _weigh_rows(rows, first, values, out, start):  # type: ignore[no-untyped-def]
    """Weighted sums of rows, rounded to bytes, into ``out`` from column ``start`` on."""
    width = rows.shape[1]
    total = np.empty(width, np.int32)
    for i in range(values.shape[0]):
        for j in range(width):
            total[j] = 1 << 21
        for k in range(values.shape[1]):
            weight = values[i, k]
            if weight != 0:
                row = first[i] + k
                for j in range(width):
                    total[j] += weight * np.int32(rows[row, j])
        for j in range(width):
            out[i, start + j] = min(max(total[j] >> 22, 0), 255)


@cache
def _weigh() -> Callable[..., None]:
    from aesthetic_filter import kernels_numba

    weigh: Callable[..., None] = kernels_numba.compiled_loop(
        _weigh_rows,
        "void(Array(uint8, 2, 'C', readonly=True), i8[::1], i4[:,::1], u1[:,::1], i8)",
    )
    return weigh


# What Pillow says.


def _reason(error: Exception, options: Preprocessing) -> str:
    """Why an image cannot be decoded, without what differs from file to file."""
    if isinstance(error, Image.DecompressionBombError):
        # Of an image within an image, whose size Pillow alone sees.
        own = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        return _too_large(min(own, options.max_pixels) or options.max_pixels)
    if isinstance(error, MemoryError):
        return "image cannot be decoded: not enough memory"
    if _is_truncated(error):
        if options.allow_truncated:
            return "image is truncated before its pixels"
        return "image is truncated (--allow-truncated scores what is there)"
    said = (str(error).splitlines() or [""])[0]
    # Names of files and objects, remarks with numbers in them, numbers.
    said = re.sub(r"'[^']*'|\"[^\"]*\"|<[^>]*>|\([^)]*\d[^)]*\)|[-+]?\b\d[\w.]*", "", said)
    said = " ".join(said.split()).strip(" :,;.")[:100].rstrip()
    return f"image cannot be decoded: {said or type(error).__name__}"


_inside = threading.local()


class _FromPillow:
    """Stands where a filter has the pattern for a module: matches Pillow's, in threads inside."""

    def match(self, module: str) -> bool:
        return module.startswith("PIL.") and getattr(_inside, "pillow", False)


_IGNORE = ("ignore", None, Warning, _FromPillow(), 0)


def _hush() -> None:
    """See to it that Pillow's warnings about images that are odd but can be decoded stay unsaid.

    ``warnings.catch_warnings`` changes what all threads see. This filter stays, and holds only for
    warnings from Pillow's modules in a thread that is inside :func:`preprocess`. Someone else's
    ``catch_warnings`` or ``resetwarnings`` may remove it: so it is looked for each time.
    """
    filters: list[Any] = warnings.filters  # type: ignore[assignment]
    if _IGNORE not in filters:
        filters.insert(0, _IGNORE)


# Without a handler, Python would print what Pillow has to say of odd files.
logging.getLogger("PIL").addHandler(logging.NullHandler())
Image.init()  # load Pillow's formats now, not in several threads at once
