"""Archives and folders as an attacker or a bad day makes them."""

# ruff: noqa: E501  # tables

from __future__ import annotations

import contextlib
import io
import os
import struct
import tarfile
import unicodedata
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from tests.helpers import encoded, image_files, picture, write_files
from tests.stages.core.test_archive import special, tar, zipped

FILES = image_files(num_train=2, num_val=1)
IMAGE = FILES["train/cat/0.jpg"]


class Hostile(NamedTuple):
    """An archive, and what the message of its refusal says; None: it is taken, and `promise` says how."""

    name: str
    promise: str
    make: Callable[[Path], Path]
    message: str | None
    limits: Mapping[str, int] = MappingProxyType({})  # other data.max_* than the committed ones


def _tar(files: dict[str, bytes], mode: str = "w", extra: tuple[tarfile.TarInfo, ...] = ()) -> Callable[[Path], Path]:
    suffix = ".tgz" if "gz" in mode else ".tar"
    return lambda folder: tar(folder / f"set{suffix}", FILES | files, mode, list(extra))


def _zip(files: dict[str, bytes]) -> Callable[[Path], Path]:
    return lambda folder: zipped(folder / "set.zip", FILES | files)


def _folder(spoil: Callable[[Path], object]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        spoil(write_files(folder / "set", FILES))
        return folder / "set"

    return make


def _changed(make: Callable[[Path], Path], change: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    def changed(folder: Path) -> Path:
        path = make(folder)
        path.write_bytes(change(path.read_bytes()))
        return path

    return changed


def _as_file(name: str, content: bytes) -> Callable[[Path], Path]:
    return lambda folder: write_files(folder, {name: content}) / name


def _pax(headers: dict[str, str]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        info = tarfile.TarInfo("train/cat/crafted.jpg")
        info.size, info.pax_headers = len(IMAGE), headers
        path = tar(folder / "set.tar", FILES)
        with tarfile.open(path, "a", format=tarfile.PAX_FORMAT) as archive:
            archive.addfile(info, io.BytesIO(IMAGE))
        return path

    return make


def _tar_with_header(kind: bytes, size: int) -> Callable[[Path], Path]:
    """A tar that begins with a header of this type which claims a size."""

    def make(folder: Path) -> Path:
        info = tarfile.TarInfo("train/cat/crafted.jpg")
        info.type, info.size = kind, size
        path = tar(folder / "set.tar", FILES)
        path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + path.read_bytes())
        return path

    return make


def _tar_of_raw_name(name: bytes) -> Callable[[Path], Path]:
    return _tar({name.decode("utf-8", "surrogateescape"): IMAGE})


def _cut_between_members(content: bytes) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        return content[: archive.getmembers()[-1].offset]


def _second_header_damaged(content: bytes) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        offset = archive.getmembers()[1].offset
    return content[:offset] + b"\xff" * 100 + content[offset + 100 :]


def _without_a_name(content: bytes) -> bytes:
    """The first member's header with an empty name, and the checksum to it."""
    header = bytearray(content[:512])
    header[:100], header[148:156] = bytes(100), b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + content[512:]


def _zip_fields(**fields: int) -> Callable[[bytes], bytes]:
    """Overwrite two bytes of the first member, in both of its headers: (offset in the local, in the central one)."""
    offsets = {"method": (8, 10), "flags": (6, 8), "version": (4, 6)}

    def change(content: bytes) -> bytes:
        changed = bytearray(content)
        for name, value in fields.items():
            for signature, offset in zip((b"PK\x03\x04", b"PK\x01\x02"), offsets[name], strict=True):
                struct.pack_into("<H", changed, content.index(signature) + offset, value)
        return bytes(changed)

    return change


def _zip_that_lies(folder: Path) -> Path:
    """A member that says it has 1,000 bytes and inflates to two gigabytes."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    data = b"".join(compressor.compress(bytes(1 << 24)) for _ in range(128)) + compressor.flush()
    path = zipped(folder / "set.zip", FILES)
    with zipfile.ZipFile(path, "a") as archive:
        info = zipfile.ZipInfo("train/cat/lies.jpg")
        info.compress_type = zipfile.ZIP_STORED
        archive.writestr(info, data)
    content = bytearray(path.read_bytes())
    for signature, method, size in ((b"PK\x03\x04", 8, 22), (b"PK\x01\x02", 10, 24)):
        start = content.rindex(signature)
        struct.pack_into("<H", content, start + method, zipfile.ZIP_DEFLATED)
        struct.pack_into("<I", content, start + size, 1000)
    path.write_bytes(content)
    return path


def _zip_overlapping(folder: Path) -> Path:
    """1,000 members that share one compressed body: each grows 150-fold, all of them 150,000-fold."""
    body = os.urandom(10_000) + bytes(1_500_000)
    path = zipped(folder / "set.zip", FILES | {"train/cat/shared.jpg": body})
    content = path.read_bytes()
    start = content.rindex(b"PK\x01\x02")
    end = content.rindex(b"PK\x05\x06")
    entry = content[start:end]
    copies = b"".join(entry.replace(b"shared.jpg", b"s%05d.jpg" % i) for i in range(1000))
    tail = bytearray(content[end:])
    count = len(FILES) + 1001
    struct.pack_into("<HHI", tail, 8, count, count, end - content.index(b"PK\x01\x02") + len(copies))
    path.write_bytes(content[:end] + copies + bytes(tail))
    return path


def _zip_twice(folder: Path) -> Path:
    path = zipped(folder / "set.zip", FILES)
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("train/cat/0.jpg", IMAGE)
    return path


def _zip_link(folder: Path) -> Path:
    path = zipped(folder / "set.zip", FILES)
    with zipfile.ZipFile(path, "a") as archive:
        info = zipfile.ZipInfo("train/cat/link.jpg")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    return path


def _nested(folder: Path) -> Path:
    inner = tar(folder / "inner.tgz", FILES, "w:gz").read_bytes()
    return tar(folder / "set.tar", {"images.tgz": inner})


def _pipe(folder: Path) -> Path:
    os.mkfifo(folder / "set.tar")
    return folder / "set.tar"


def _loop(folder: Path) -> None:
    (folder / "train/cat/again").symlink_to(folder, target_is_directory=True)


_OUTSIDE = "points outside the archive"
_CLASHES = {"train/cat/A.jpg": encoded(picture(1)), "train/cat/a.jpg": encoded(picture(2))}
_ACCENTS = {f"train/cat/{unicodedata.normalize(form, 'é')}.jpg": encoded(picture(3)) for form in ("NFC", "NFD")}

ARCHIVES = [
    Hostile("traversal", "A member named '../x' is refused.", _tar({"../evil.jpg": IMAGE}), _OUTSIDE),
    Hostile("traversal inside", "'train/../../x' is refused.", _zip({"train/../../evil.jpg": IMAGE}), _OUTSIDE),
    Hostile("absolute path", "A member named '/etc/x' is refused.", _tar({"/etc/evil.jpg": IMAGE}), _OUTSIDE),
    Hostile("drive letter", "'C:/x' is refused.", _zip({"C:/evil.jpg": IMAGE}), _OUTSIDE),
    Hostile("backslashes", "`..\\x`, a way up on Windows, is refused.", _zip({"..\\evil.jpg": IMAGE}), _OUTSIDE),
    Hostile(
        "symbolic link", "A link to a file outside is refused.",
        _tar({}, extra=(special("train/cat/link.jpg", tarfile.SYMTYPE, "/etc/passwd"),)), "a link",
    ),
    Hostile(
        "link to a folder", "A link to a folder, through which a later member would be written, is refused.",
        _tar({}, extra=(special("train/bird", tarfile.SYMTYPE, "/tmp"), special("train/bird/x.jpg", tarfile.REGTYPE))),
        "a link",
    ),
    Hostile(
        "hard link", "A hard link, even to a member of the archive, is refused.",
        _tar({}, extra=(special("train/cat/link.jpg", tarfile.LNKTYPE, "train/cat/0.jpg"),)), "a link",
    ),
    Hostile("link in a zip", "A link that a zip holds is refused.", _zip_link, "a link"),
    Hostile("link that loops", "A folder that holds a link to itself is refused; nothing hangs.", _folder(_loop), "a link"),
    Hostile(
        "device", "Character and block devices are refused.",
        _tar({}, extra=(special("train/cat/null.jpg", tarfile.CHRTYPE),)), "special file",
    ),
    Hostile(
        "pipe inside", "A named pipe in an archive is refused.",
        _tar({}, extra=(special("train/cat/pipe.jpg", tarfile.FIFOTYPE),)), "special file",
    ),
    Hostile(
        "pipe in a folder", "A named pipe in a folder is refused; nobody waits for its writer.",
        _folder(lambda folder: os.mkfifo(folder / "train/cat/pipe.jpg")), "no regular file",
    ),
    Hostile("pipe as source", "A named pipe as `data.source` is refused; nobody waits for its writer.", _pipe, "no file or"),
    Hostile("device as source", "'/dev/zero' as `data.source` is refused.", lambda _: Path("/dev/zero"), "no file or"),
    Hostile("duplicate in a zip", "A name that is there twice is refused.", _zip_twice, "is there 2 times"),
    Hostile(
        "duplicate by another spelling", "'./train/cat/0.jpg' beside 'train/cat/0.jpg' is refused as the same name.",
        _tar({"./train/cat/0.jpg": IMAGE}), "is there 2 times",
    ),
    Hostile("case clash", "`A.jpg` and `a.jpg` are two images, on every file system.", _tar(_CLASHES), None),
    Hostile("accent clash", "`é.jpg` composed and decomposed are two images, on every file system.", _tar(_ACCENTS), None),
    Hostile("NUL in a name", "A name with a NUL is refused.", _changed(
        _zip({"train/cat/a.jpg_b.jpg": IMAGE}), lambda content: content.replace(b"a.jpg_b", b"a.jpg\0b")
    ), "control character"),
    Hostile(
        "terminal escape in a name", "A name with control characters is refused, and printed with escapes.",
        _tar({"train/cat/\x1b[2J.jpg": IMAGE}), "control character",
    ),
    Hostile("name not UTF-8 in a tar", "Refused.", _tar_of_raw_name(b"train/cat/\xff.jpg"), "not UTF-8"),
    Hostile("name not UTF-8 in a zip", "Refused, though it claims to be UTF-8.", _changed(
        _zip({"train/cat/é.jpg": IMAGE}), lambda content: content.replace("é".encode(), b"\xff\xfe")
    ), "broken or truncated zip"),
    Hostile("no name", "A member whose name is empty is refused.", _changed(_tar({}), _without_a_name), "is a file, where"),
    Hostile("very long name", "A file name of 60,000 characters is refused or taken; it is never a name on our disk.",
            _zip({f"train/cat/{'x' * 60_000}.jpg": IMAGE}), None),
    Hostile("very deep folder", "An image 1,000 folders down is refused.", _tar({"train/cat/" + "a/" * 1000 + "x.jpg": IMAGE}),
            "is not at train/<class>/<image>"),
    Hostile("bomb by count", "More files than `data.max_files` are refused.", _tar(
        {f"train/cat/x{i}.jpg": IMAGE for i in range(20)}), "data.max_files", {"max_files": 10}),
    Hostile("bomb by size", "More bytes than `data.max_bytes` are refused, before they are written.", _tar(
        {"train/cat/x.jpg": os.urandom(1 << 20)}, "w:gz"), "data.max_bytes", {"max_bytes": 1 << 19}),
    Hostile("bomb by ratio, tgz", "100 MB of zeros in 100 KB are refused; what is written stays below `data.max_ratio`.",
            _tar({"train/cat/x.jpg": bytes(100 << 20)}, "w:gz"), "data.max_ratio"),
    Hostile("bomb by ratio, zip", "A member that grows a thousandfold is refused.",
            _zip({"train/cat/x.jpg": bytes(100 << 20)}), "data.max_ratio"),
    Hostile("bomb by overlap", "1,000 zip members that share their bytes are refused, by what they add up to.",
            _zip_overlapping, "data.max_ratio"),
    Hostile("zip that lies about a size", "A member that inflates to 2 GB instead of 1,000 bytes is refused, in 1.5 GB of "
            "address space.", _zip_that_lies, "lies.jpg' is damaged"),
    Hostile("claim of a terabyte", "A header of 1 TB of names is refused without the memory being asked for twice.",
            _tar_with_header(tarfile.GNUTYPE_LONGNAME, 1 << 40), "memory|truncated"),
    Hostile("sparse member", "A sparse file, which could claim any size, is refused.",
            _tar_with_header(tarfile.GNUTYPE_SPARSE, 0), "special file|truncated"),
    Hostile("sparse map of junk", "A sparse map that is none is refused.", _pax(
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "x", "GNU.sparse.realsize": "9"}), "truncated"),
    Hostile("cut between two members", "A tar that was cut there, which tarfile reads without a word, is refused.",
            _changed(_tar({}), _cut_between_members), "truncated"),
    Hostile("cut inside a member", "Refused.", _changed(_tar({}), lambda content: content[:5000]), "truncated"),
    Hostile("cut tgz", "Refused.", _changed(_tar({}, "w:gz"), lambda content: content[:-20]), "truncated"),
    Hostile("damaged header", "A header with a wrong checksum, at which tarfile stops without a word, is refused.",
            _changed(_tar({}), _second_header_damaged), "truncated"),
    Hostile("wrong checksum, tgz", "A tgz whose CRC differs is refused.",
            _changed(_tar({}, "w:gz"), lambda content: content[:-8] + bytes(4) + content[-4:]), "damaged"),
    Hostile("wrong checksum, zip", "A member whose CRC differs is refused by name.", _changed(
        _zip({}), lambda content: content.replace(struct.pack("<I", zlib.crc32(IMAGE)), b"\1\2\3\4")), "is damaged"),
    Hostile("encrypted zip", "Refused by name, with what to do.", _changed(_zip({}), _zip_fields(flags=1)), "is encrypted"),
    Hostile("unknown compression", "A zip with a method that nobody knows is refused by name.",
            _changed(_zip({}), _zip_fields(method=99)), "is damaged"),
    Hostile("zip of the future", "A zip that asks for version 25 of the format is refused.",
            _changed(_zip({}), _zip_fields(version=250)), "zip"),
    Hostile("archive in an archive", "Refused: it is not unpacked a second time.", _nested, "no folder has both"),
    Hostile("archive named .jpg", "An archive among the images is refused as no image.", _tar(
        {"train/cat/x.jpg": b"PK\x03\x04" + bytes(100)}), "is not an image"),
    Hostile("page named .tgz", "An HTML page that was downloaded instead is refused.",
            _as_file("set.tgz", b"<html>404 Not Found</html>" * 50), "not a tar, tgz or zip"),
    Hostile("empty archive", "A file of zero bytes is refused.", _as_file("set.zip", b""), "not a tar, tgz or zip|no folder"),
]  # fmt: skip


def build(hostile: Hostile, folder: Path) -> Path:
    with contextlib.suppress(FileExistsError):
        folder.mkdir()
    return hostile.make(folder)
