"""Unlabelled images as production has them: any size and shape, in folders, archives, files or a packed array."""

from __future__ import annotations

import hashlib
import io
import math
import os
import shutil
import sys
import tarfile
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stages.core.archive import refused_when_damaged
from stages.core.errors import InputError
from stages.core.image import CropMode, Interpolation, decode

_SUFFIXES = (  # of the formats that extract accepts by their content
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
# Of formats that are not read here: told of as what cannot be read, not passed over.
_FOREIGN_SUFFIXES = (
    *(".heic", ".heif", ".avif", ".jxl", ".jp2", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"),
    *(".tga", ".psd", ".exr", ".hdr", ".dcm", ".svg", ".ico"),
)
_LARGEST_FILE = 200_000_000  # bytes
_LARGEST_RATIO = 200  # unpacked bytes per byte of archive; more is taken for a bomb
_CHUNK = 1 << 20


class ImageFile(NamedTuple):
    """An image that was found: its name, and how to get its encoded content."""

    name: str
    read: Callable[[], bytes]


class Window(NamedTuple):
    """Images that could be read, uint8 (N, size, size, 3), and those that could not."""

    images: NDArray[np.uint8]
    names: list[str]
    skipped: list[tuple[str, str]]  # name and reason


def find_images(places: Sequence[str]) -> list[ImageFile]:
    """Every image below folders, in archives (tar, tar.gz, zip) and packed arrays (.npy), in the order of names.

    What several places have in common is found once. Raises InputError when a place does not exist or holds no image.
    """
    found: list[ImageFile] = []
    for place in places:
        path = Path(place)
        if not os.path.exists(place):  # noqa: PTH110  # unlike Path.exists, it says no to a name that is too long
            raise InputError(f"{place}: no such file or folder")
        some = _inside(path)
        if not some:
            raise InputError(f"{place}: no images in it ({', '.join(suffix[1:] for suffix in _SUFFIXES)})")
        found += some
    if len(places) == 1:
        return found
    first: dict[str, ImageFile] = {}
    for file in found:
        first.setdefault(os.path.realpath(file.name), file)
    return list(first.values())


def distinct(images: NDArray[np.uint8]) -> tuple[NDArray[np.int64], int]:
    """Rows of the first of equal images (N, H, W, 3), and how often the most frequent one is there."""
    counts: dict[bytes, int] = {}
    rows = []
    for row, image in enumerate(images):
        digest = hashlib.blake2b(image.tobytes()).digest()
        if digest not in counts:
            rows.append(row)
        counts[digest] = counts.get(digest, 0) + 1
    return np.array(rows, dtype=np.int64), max(counts.values(), default=0)


def read_images(files: Sequence[ImageFile], size: int, crop_mode: CropMode, interpolation: Interpolation) -> Window:
    """Decode images to squares of `size` as preprocess does; what cannot be read is listed and left out.

    Raises InputError where memory cannot hold them.
    """
    shape = (len(files), size, size, 3)
    try:
        pixels = np.empty(shape, dtype=np.uint8)  # pages that are never written to take no memory
    except MemoryError:
        gigabytes = math.prod(shape) / 1e9
        raise InputError(
            f"{len(files):,} images of {size} px are {gigabytes:,.0f} GB, more than memory holds; give fewer at once"
        ) from None
    names: list[str] = []
    skipped: list[tuple[str, str]] = []
    for file in files:
        name = os.fsencode(file.name).decode("utf-8", "replace")  # a file may have any bytes as its name
        try:
            pixels[len(names)] = decode(file.read(), name, size, crop_mode, interpolation)
        except (InputError, OSError) as error:
            skipped.append((name, str(error).removeprefix(f"{name}: ")))
        else:
            names.append(name)
    return Window(pixels[: len(names)], names, skipped)


def keep_rows(window: Window, rows: NDArray[np.int64]) -> Window:
    """Some images of a window, by ascending rows. They are moved to its front, as there may be no room for a copy."""
    for place, row in enumerate(rows):
        window.images[place] = window.images[row]
    return window._replace(images=window.images[: len(rows)], names=[window.names[row] for row in rows])


def is_image_name(name: str) -> bool:
    """Whether a path inside a folder or archive is that of an image, be it one that cannot be read.

    Hidden files and litter of systems are none, nor is what has no suffix.
    """
    parts = PurePosixPath(name).parts
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return not hidden and PurePosixPath(name).suffix.lower() in (*_SUFFIXES, *_FOREIGN_SUFFIXES)


def lines_of_stdin() -> Iterator[str]:
    """Paths on stdin, one a line, of any bytes; InputError for those that `find -print0` would write."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    for line in sys.stdin:
        if "\0" in line:
            raise InputError("stdin: paths are one a line, without a NUL between them: leave -print0 out")
        if line.strip():
            yield line.rstrip("\r\n")


def printable(text: str) -> str:
    """Text that a stranger chose, for a terminal: control characters, which could steer it, as escapes."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def _inside(path: Path) -> list[ImageFile]:
    if path.is_dir():
        return _below(path)
    if not path.is_file():  # opening a pipe would wait for somebody to write
        raise InputError(f"{path}: no regular file and no folder")
    if path.suffix == ".npy":
        return _packed(path)
    if path.suffix.lower() in _SUFFIXES:
        return [ImageFile(str(path), path.read_bytes)]
    with path.open("rb") as stream:
        return _zipped(path) if stream.read(2) == b"PK" else _tarred(path)


def walk(folder: Path, onerror: Callable[[OSError], None] | None = None) -> Iterator[tuple[str, list[str]]]:
    """Every folder from `folder` down, through links, once, with the names of its files; of `os.walk`."""
    seen = set()
    for parent, folders, names in os.walk(folder, onerror=onerror, followlinks=True):
        folders.sort()
        try:
            info = Path(parent).stat()
        except OSError:  # gone meanwhile
            continue
        if (info.st_dev, info.st_ino) in seen:
            folders.clear()
            continue
        seen.add((info.st_dev, info.st_ino))
        yield parent, names


def _below(folder: Path) -> list[ImageFile]:
    """The images of a folder; a folder in it that cannot be listed stands among them, as what cannot be read."""
    closed: list[OSError] = []
    files = [
        path
        for parent, names in walk(folder, closed.append)
        for path in (Path(parent, name) for name in names)
        if is_image_name(path.relative_to(folder).as_posix()) and path.is_file()
    ]
    unreadable = [ImageFile(str(error.filename), partial(_raise, error)) for error in closed]
    return [ImageFile(str(file), file.read_bytes) for file in sorted(files)] + unreadable


def _raise(error: OSError) -> bytes:
    raise error


def _packed(path: Path) -> list[ImageFile]:
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"{path}: not a packed array: {error}") from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape[1:3]:
        raise InputError(f"{path}: {images.dtype} {images.shape}; expected uint8 (N, H, W, 3)")

    def encoded(row: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(np.array(images[row])).save(buffer, "BMP")
        return buffer.getvalue()

    return [ImageFile(f"{path}[{row}]", partial(encoded, row)) for row in range(len(images))]


def _zipped(path: Path) -> list[ImageFile]:
    with refused_when_damaged(f"{path}: broken or truncated zip"):
        archive = zipfile.ZipFile(path)
    members = [info for info in archive.infolist() if is_image_name(info.filename) and not info.is_dir()]
    members.sort(key=lambda info: info.filename)
    return [ImageFile(f"{path}:{info.filename}", partial(_unzip, archive, info)) for info in members]


def _unzip(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    if info.file_size > _LARGEST_FILE or info.flag_bits & 1:
        raise InputError("encrypted, or too large for an image")
    with refused_when_damaged("damaged"), archive.open(info) as file:
        return file.read(info.file_size)  # and no more, whatever is there


class _Ranges:
    """Byte ranges of a file, for several threads. It is closed, and gone if it has no name, when the last reader is."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._lock = threading.Lock()

    def read(self, offset: int, size: int) -> bytes:
        with self._lock:
            self._file.seek(offset)
            content = self._file.read(size)
        if len(content) != size:
            raise InputError("truncated since it was found")
        return content

    def add(self, content: IO[bytes]) -> int:
        """Append what `content` has; returns where that begins."""
        offset = self._file.seek(0, os.SEEK_END)
        shutil.copyfileobj(content, self._file, _CHUNK)
        return offset

    def __del__(self) -> None:
        self._file.close()


def _tarred(path: Path) -> list[ImageFile]:
    """The images of a tar, read when they are asked for; those of a compressed one out of a temporary file."""
    members: dict[str, Callable[[], bytes]] = {}
    allowed, total = _LARGEST_RATIO * max(path.stat().st_size, 1 << 16), 0
    with refused_when_damaged(f"{path}: no image, folder, or archive that can be read"), tarfile.open(path) as tar:
        assert tar.fileobj is not None
        is_plain = isinstance(tar.fileobj, io.BufferedReader)  # a decompressor otherwise
        plain = _Ranges(path.open("rb")) if is_plain else None
        unpacked: _Ranges | None = None
        for info in tar:
            total += info.size
            if total > allowed:
                raise InputError(f"{path}: unpacks to more than {_LARGEST_RATIO} times its size; taken for a bomb")
            if info.isreg() and is_image_name(info.name) and info.size <= _LARGEST_FILE:
                size = max(info.size, 0)  # whatever a header says
                if plain and not info.issparse():
                    members[info.name] = partial(plain.read, info.offset_data, size)
                else:
                    file = tar.extractfile(info)
                    assert file is not None
                    unpacked = unpacked or _Ranges(tempfile.TemporaryFile())  # noqa: SIM115  # it closes it
                    members[info.name] = partial(unpacked.read, unpacked.add(file), size)
            tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every member otherwise
        # tarfile reads one that was cut between two members, or has a damaged header, up to there without a word.
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(512) != bytes(512):
            raise InputError(f"{path}: truncated or damaged: the archive ends without its end marker; fetch it again")
    return [ImageFile(f"{path}:{name}", members[name]) for name in sorted(members)]
