"""File names: which are images', and how a name from a source becomes a path that is safe to write.

Names within an archive, and keys in a table, are whatever somebody put there. Before one becomes a
path it passes ``safe_path``, and ``UniqueNames`` if two may meet.
"""

from __future__ import annotations

import re
import unicodedata
from hashlib import blake2b, sha256

# What Pillow decodes, by Image.registered_extensions(), without its stubs (GRIB, HDF5, MPEG).
_DECODED = """
    apng avif avifs blp bmp bw cur dcx dds dib eps fit fits flc fli ftc ftu gbr gif icb icns ico iim
    im j2c j2k jfif jp2 jpc jpe jpeg jpf jpg jpx mpo msp pbm pcd pcx pfm pgm png pnm ppm psd pxr qoi
    ras rgb rgba sgi tga tif tiff vda vst webp xbm xpm
"""
# Images too, which need a plugin or cannot be decoded: they fail with a reason.
_NOT_DECODED = """
    3fr arw bpg cr2 cr3 crw dcr dng erf exr hdr heic heics heif heifs hif iiq jls jxl jxr k25 kdc
    mef mos mrw nef nrw orf pef psb raf raw rw2 rwl sr2 srf srw svg svgz wdp x3f xcf
"""

_OTHER = """
    7z aac aae aiff arrow avi bak bat bz2 c cfg cls conf cpp crdownload css csv ckpt db dll doc
    docx exe feather flac flv gz h h5 hdf5 htm html idx ini ipynb jar java js json jsonl lmdb lnk
    lock log lrv m4a m4v md mdb mid midi mkv mov mp3 mp4 mpeg mpg mts ndjson npy npz ogg onnx opus
    orc parq parquet part pb pdf pickle pkl pl pp3 ppt pptx pq properties pt pth py pyc rar rst rtf
    safetensors sh sha1 sha256 sql sqlite sqlite3 srt tar tbz2 tex text tfrecord tgz thm tmp toml
    torrent ts tsv txt txz url vtt wav webm wmv xls xlsx xml xmp xz yaml yml zip zst zstd
"""

IMAGE_EXTENSIONS: frozenset[str] = frozenset(f"{_DECODED} {_NOT_DECODED}".split())
"""The last part of an image's file name, in lower case."""

OTHER_EXTENSIONS: frozenset[str] = frozenset(_OTHER.split())
"""The same of files that are certainly no images."""

LONGEST_PART = 255
"""Bytes that a file's or folder's name may have, on all usual file systems."""

LONGEST_PATH = 1000
"""Bytes that a path may have below the folder it is written into."""

_HASH_DIGITS = 12


def is_image(extension: str) -> bool:
    """Whether files with this extension (``JPG``, ``.jpg``, ``left.png``) are images."""
    return extension.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def safe_path(name: str, room: int = 0) -> str:
    """A relative path that stays within its folder, from a name that is not to be trusted.

    Drive letters, roots, ``.``, ``..`` and empty parts go; backslashes count as ``/``; control
    characters, line separators and lone surrogates become ``_``; dots and spaces at a part's end go
    (Windows drops them). A part or path that is too long is shortened, with a hash of the whole in
    place of what is missing. An ordinary name comes back as it is; one of which nothing is left is
    ``_``. Different names may come back the same.

    Args:
        name: with ``/``.
        room: bytes to leave free in the last part, for what is put behind it.
    """
    text = "".join("_" if _is_unprintable(c) else c for c in name.replace("\\", "/"))
    parts = [re.sub(r"^([A-Za-z]):", r"\1_", part.rstrip(". ")) for part in text.split("/")]
    parts = [part for part in parts if part] or ["_"]
    parts = [*(_shorten(part, LONGEST_PART) for part in parts[:-1]), parts[-1]]
    parts[-1] = _shorten(parts[-1], LONGEST_PART - room)
    folder = "/".join(parts[:-1])
    if len(folder.encode()) + len(parts[-1].encode()) + room >= LONGEST_PATH:
        parts = [_digest(folder), parts[-1]]
    return "/".join(parts)


class UniqueNames:
    """No name twice: asked for again, it comes with ``-2`` before its extension, then ``-3``.

    The same calls give the same names. It remembers 8 bytes of each name's hash: where two names
    share one, the second gets a number that it would not need, no more.

    Args:
        files: whether the names are paths of files, so that none may lie below another.
    """

    def __init__(self, *, files: bool = True) -> None:
        self._files = files
        self._taken: set[int] = set()
        self._folders: set[int] = set()
        self._next: dict[int, int] = {}

    def __contains__(self, name: str) -> bool:
        """Whether the name was given already, or stands for a folder that one lies in."""
        mark = _mark(name)
        return mark in self._taken or mark in self._folders

    def take(self, name: str, room: int = 0) -> str:
        """The name itself if it is still free, otherwise with a number.

        A number that makes the last part longer than it may be, less ``room``, takes the place of
        some of it.
        """
        if self._files and "/" in name:
            folder, _, base = name.rpartition("/")
            name = f"{self._folder(folder)}/{base}"
        given = self._number(name, room)
        self._taken.add(_mark(given))
        return given

    def _folder(self, path: str) -> str:
        """The path of a folder, renamed where a part of it is a file's name already."""
        above, slash, base = path.rpartition("/")
        if slash:
            path = f"{self._folder(above)}/{base}"
        # A folder keeps the number it once got: its first free one is either new or a folder.
        number = 1
        while _mark(numbered := _with_number(path, number)) in self._taken:
            number += 1
        self._folders.add(_mark(numbered))
        return numbered

    def _number(self, name: str, room: int) -> str:
        if name not in self:
            return name
        first = _mark(name)
        number = self._next.get(first, 2)
        while (numbered := _with_number(name, number, room)) in self:
            number += 1
        self._next[first] = number + 1
        return numbered


def _is_unprintable(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")


def _shorten(part: str, longest: int) -> str:
    """A part of at most this many bytes, with its extension."""
    if len(part.encode()) <= longest:
        return part
    stem, dot, extension = part.rpartition(".")
    ending = f"-{_digest(part)}"
    if stem and len(extension.encode()) <= 16:
        ending += dot + extension
    else:
        stem = part
    return stem.encode()[: max(longest - len(ending.encode()), 0)].decode(errors="ignore") + ending


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:_HASH_DIGITS]


def _with_number(name: str, number: int, room: int = 0) -> str:
    """``a/b.jpg`` and 2 give ``a/b-2.jpg``; 1 changes nothing."""
    if number == 1:
        return name
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.rpartition(".")
    numbered = f"{stem}-{number}.{extension}" if stem else f"{base}-{number}"
    return folder + slash + _shorten(numbered, LONGEST_PART - room)


def _mark(name: str) -> int:
    return int.from_bytes(blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest())


def guess_extension(content: bytes) -> str:
    """The extension for an encoded image, by its first bytes; "img" if they don't tell."""
    for extension, signature in _SIGNATURES:
        if re.match(signature, content, re.DOTALL):
            return extension
    return "img"


_SIGNATURES = (
    ("jpg", rb"\xff\xd8\xff"),
    ("png", rb"\x89PNG\r\n\x1a\n"),
    ("gif", rb"GIF8[79]a"),
    ("webp", rb"RIFF....WEBP"),
    ("avif", rb"....ftypavi[fs]"),
    ("heic", rb"....ftyp(heic|heix|hevc|heim|heis|mif1|msf1)"),
    ("tif", rb"II[\x2a\x2b]\x00|MM\x00[\x2a\x2b]"),
    ("jxl", rb"\xff\x0a|\x00\x00\x00\x0cJXL "),
    ("jp2", rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51"),
    ("bmp", rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\x00\x00\x00"),
    ("psd", rb"8BPS"),
    ("qoi", rb"qoif"),
    ("ppm", rb"P[1-6]\s"),
    ("ico", rb"\x00\x00\x01\x00"),
)
