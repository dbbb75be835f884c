"""Read a labelled image set out of a folder, tar, tgz or zip that nobody vouches for.

Nothing is ever unpacked under a name that the archive chose: members are read one by one and handed on as bytes.
Links, devices, traversal, encryption, duplicate names and bombs are refused; `tarfile`'s own filter is not relied
on, because it could be escaped before Python 3.11.13 (CVE-2025-4517).
"""

from __future__ import annotations

import bz2
import errno
import gzip
import lzma
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from stages.core.errors import DamagedError, InputError
from stages.core.source import SPLITS

# Litter of operating systems, left out silently wherever it lies.
LITTER = (".DS_Store", "Thumbs.db", "desktop.ini")
LITTER_PREFIXES = ("._", "__MACOSX")
_CHUNK = 1 << 20
# What the readers of archives raise when bytes were damaged, or chosen to mislead them.
_DAMAGED = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    ValueError,
    OverflowError,
    NotImplementedError,
)
_DECOMPRESSORS: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}


@dataclass(frozen=True)
class Limits:
    """Caps on what a source may hold."""

    files: int
    total_bytes: int
    ratio: int  # unpacked bytes per byte of archive


class Member(NamedTuple):
    """A file of the source: its name there and how to get its bytes."""

    name: str
    size: int
    read: Callable[[], bytes]


class LabelledFile(NamedTuple):
    """An image file in its split and class."""

    class_name: str
    file_name: str
    member: Member


@contextmanager
def open_image_set(
    path: Path, limits: Limits, scratch: Path, classes: Sequence[str] | None = None
) -> Iterator[dict[str, list[LabelledFile]]]:
    """Open a source laid out `train/<class>/*`, `val/<class>/*`, at its top or below one folder.

    Yields the files of each split in canonical order (class, then name). `scratch` is an existing folder for the
    unpacked tar of a compressed one. With `classes`, the set adds to another one that has these: it may lack some of
    them, in either split, and have no others. Raises InputError naming the source and the member that is wrong.
    """
    with ExitStack() as stack:
        members, directories = stack.enter_context(_open_members(path, limits, scratch))
        yield _arrange(path, members, directories, classes)


@contextmanager
def open_labelled(
    path: Path, limits: Limits, scratch: Path, classes: Sequence[str]
) -> Iterator[dict[str, list[LabelledFile]]]:
    """Open labelled images laid out `<class>/<image>`, or as `open_image_set` has it.

    Yields them in canonical order under the key "all", or by split. They may lack some of `classes` and have no others.
    """
    with ExitStack() as stack:
        members, directories = stack.enter_context(_open_members(path, limits, scratch))
        names = {*(PurePosixPath(member.name) for member in members), *directories}
        if _roots_of_splits(names):
            yield _arrange(path, members, directories, classes)
        else:
            yield {"all": _arrange_classes(path, members, classes)}


@contextmanager
def refused_when_damaged(what: str) -> Iterator[None]:
    """Turn what a damaged archive raises into a DamagedError that begins with `what`; the disk's errors pass."""
    try:
        yield
    except InputError:
        raise
    except _DAMAGED as error:
        raise DamagedError(f"{what}: {error or type(error).__name__}; fetch it again") from None
    except MemoryError:
        raise DamagedError(f"{what}: a header asks for more memory than there is; fetch it again") from None
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):  # the disk's fault, not the archive's
            raise
        raise DamagedError(f"{what}: {error}; fetch it again") from None


# --- the kinds of source ------------------------------------------------------------------------------------------


@contextmanager
def _open_members(path: Path, limits: Limits, scratch: Path) -> Iterator[tuple[list[Member], set[PurePosixPath]]]:
    if path.is_dir():
        yield _folder_members(path, limits)
        return
    with path.open("rb") as file:
        magic = file.read(8)
    if magic.startswith(b"PK"):
        with ExitStack() as stack:
            with refused_when_damaged(f"{path}: broken or truncated zip"):
                archive = stack.enter_context(zipfile.ZipFile(path))
                found = _zip_members(path, archive, limits)
            yield found
        return
    decompress = next((opener for start, opener in _DECOMPRESSORS.items() if magic.startswith(start)), None)
    plain = _decompress(path, decompress, limits, scratch) if decompress else path
    try:
        with ExitStack() as stack:
            with refused_when_damaged(f"{path}: not a tar, tgz or zip archive, or truncated"):
                tar = stack.enter_context(tarfile.open(plain, "r:"))
                found = _tar_members(path, plain, tar, limits)
            yield found
    finally:
        if plain != path:
            plain.unlink(missing_ok=True)


def _folder_members(path: Path, limits: Limits) -> tuple[list[Member], set[PurePosixPath]]:
    members: list[Member] = []
    directories: set[PurePosixPath] = set()
    total = 0
    for folder, folder_names, file_names in os.walk(path, onerror=_refuse):
        for name in folder_names + file_names:
            full = Path(folder, name)
            relative = full.relative_to(path).as_posix()
            mode = full.lstat().st_mode
            if stat.S_ISDIR(mode):
                directories.add(_checked_name(path, relative))
            elif stat.S_ISREG(mode):
                _checked_name(path, relative)
                total = _count(path, len(members), total, full.stat().st_size, limits)
                members.append(Member(relative, full.stat().st_size, full.read_bytes))
            else:
                kind = "a link" if stat.S_ISLNK(mode) else "no regular file"
                raise InputError(f"{path}: {relative!r} is {kind}; only files and folders are taken")
    return members, directories


def _refuse(error: OSError) -> None:
    raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from None


def _zip_members(path: Path, archive: zipfile.ZipFile, limits: Limits) -> tuple[list[Member], set[PurePosixPath]]:
    members: list[Member] = []
    directories: set[PurePosixPath] = set()
    total = 0
    for info in archive.infolist():
        name = _checked_name(path, info.orig_filename)
        mode = info.external_attr >> 16
        if info.is_dir():
            directories.add(name)
            continue
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            raise InputError(f"{path}: {info.filename!r} is a link or a special file; only files are taken")
        if info.flag_bits & 1:
            raise InputError(f"{path}: {info.filename!r} is encrypted; unpack it yourself and name the folder")
        total = _count(path, len(members), total, info.file_size, limits)
        if info.file_size > limits.ratio * max(info.compress_size, 1024):
            raise InputError(
                f"{path}: {info.filename!r} grows {info.file_size / max(info.compress_size, 1):.0f}-fold when "
                f"unpacked; data.max_ratio allows {limits.ratio}"
            )
        members.append(Member(str(name), info.file_size, _zip_reader(path, archive, info)))
    # Members may share their compressed bytes: each is modest then, and all together are a bomb.
    if total > limits.ratio * max(path.stat().st_size, 1 << 16):
        raise InputError(
            f"{path}: {path.stat().st_size:,} bytes say that they unpack to {total:,}; "
            f"data.max_ratio allows {limits.ratio}-fold"
        )
    return members, directories


def _zip_reader(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Callable[[], bytes]:
    def read() -> bytes:
        # Asked for its size: without one, zipfile inflates all that is there, whatever the header says.
        with refused_when_damaged(f"{path}: {info.filename!r} is damaged"), archive.open(info) as file:
            content = file.read(info.file_size)
            if len(content) != info.file_size or file.read(1):
                raise DamagedError(
                    f"{path}: {info.filename!r} is damaged: not {info.file_size:,} bytes; fetch it again"
                )
        return content

    return read


def _tar_members(
    path: Path, plain: Path, tar: tarfile.TarFile, limits: Limits
) -> tuple[list[Member], set[PurePosixPath]]:
    members: list[Member] = []
    directories: set[PurePosixPath] = set()
    total = 0
    for info in tar:
        name = _checked_name(path, info.name)
        if info.isdir():
            directories.add(name)
        elif info.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
            total = _count(path, len(members), total, info.size, limits)
            members.append(Member(str(name), info.size, _range_reader(path, info, plain)))
        else:
            kind = "a link" if info.issym() or info.islnk() else "a device, pipe or other special file"
            raise InputError(f"{path}: {info.name!r} is {kind}; only files and folders are taken")
        tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every member otherwise
    # tarfile reads an archive that was cut between two members without a word: ask for the end marker.
    with plain.open("rb") as file:
        file.seek(tar.offset)
        if file.read(512) != bytes(512):
            raise DamagedError(f"{path}: truncated: the archive ends without its end marker; fetch it again")
    return members, directories


def _range_reader(path: Path, info: tarfile.TarInfo, plain: Path) -> Callable[[], bytes]:
    offset, size = info.offset_data, info.size

    def read() -> bytes:
        with plain.open("rb") as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) != size:
            raise DamagedError(f"{path}: truncated inside {info.name!r}; fetch it again")
        return content

    return read


def _decompress(path: Path, opener: Callable[..., Any], limits: Limits, scratch: Path) -> Path:
    plain = scratch / "source.tar"
    allowed = min(2 * limits.total_bytes, limits.ratio * max(path.stat().st_size, 1 << 16))
    written = 0
    try:
        with opener(path, "rb") as compressed, plain.open("wb") as out:
            while chunk := compressed.read(_CHUNK):
                written += len(chunk)
                if written > allowed:
                    raise InputError(
                        f"{path}: unpacks to more than {allowed:,} bytes from {path.stat().st_size:,}; "
                        f"data.max_ratio allows {limits.ratio}-fold, data.max_bytes {limits.total_bytes:,}"
                    )
                out.write(chunk)
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        plain.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:  # the disk's fault, not the archive's
            raise
        raise DamagedError(f"{path}: truncated or damaged: {error}; fetch it again") from None
    except InputError:
        plain.unlink(missing_ok=True)
        raise
    return plain


# --- what every kind shares ---------------------------------------------------------------------------------------


def _checked_name(path: Path, name: str) -> PurePosixPath:
    """The member's name as a relative path, or InputError when it could mean a place outside the set."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InputError(f"{path}: member {name!r} has a name that is not UTF-8") from None
    if any(ord(character) < 32 or ord(character) == 127 for character in name):
        raise InputError(f"{path}: member {name!r} has a control character in its name")
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or name[1:2] == ":":
        raise InputError(f"{path}: member {name!r} points outside the archive")
    return pure


def _count(path: Path, files: int, total: int, size: int, limits: Limits) -> int:
    if files >= limits.files:
        raise InputError(f"{path}: more than {limits.files:,} files (data.max_files)")
    if total + size > limits.total_bytes:
        raise InputError(f"{path}: more than {limits.total_bytes:,} bytes of files (data.max_bytes)")
    return total + size


def _arrange(
    path: Path, members: list[Member], directories: set[PurePosixPath], known: Sequence[str] | None
) -> dict[str, list[LabelledFile]]:
    names = [PurePosixPath(member.name) for member in members]
    root = _root_of_splits(path, {*names, *directories})
    files: dict[str, list[LabelledFile]] = {split: [] for split in SPLITS}
    for name, member in zip(names, members, strict=True):
        if _is_litter(name) or name.parts[: len(root)] != root:
            continue
        inside = name.parts[len(root) :]
        if not inside:
            raise InputError(f"{path}: {member.name!r} is a file, where the set's folder should be")
        if inside[0] not in SPLITS:
            continue  # a README or a CSV beside the splits
        if len(inside) != 3:
            raise InputError(f"{path}: {member.name!r} is not at {'/'.join((*root, inside[0]))}/<class>/<image>")
        files[inside[0]].append(LabelledFile(inside[1], inside[2], member))

    if known is not None:
        _check_known(path, {file.class_name for split in SPLITS for file in files[split]}, known)
    else:
        _check_classes(path, files, directories, root)
    for split in SPLITS:
        _sort(path, files[split], f"{split}/")
    return files


def _arrange_classes(path: Path, members: list[Member], known: Sequence[str]) -> list[LabelledFile]:
    """The files of `<class>/<image>`, at the top or below one folder."""
    placed = [(PurePosixPath(member.name).parts, member) for member in members]
    placed = [(parts, member) for parts, member in placed if len(parts) > 1 and not _is_litter(PurePosixPath(*parts))]
    tops = {parts[0] for parts, _ in placed}
    depth = 1 if len(tops) == 1 and all(len(parts) == 3 for parts, _ in placed) else 0
    for parts, member in placed:
        if len(parts) != depth + 2:
            raise InputError(f"{path}: {member.name!r} is not at <class>/<image>")
    files = [LabelledFile(parts[depth], parts[depth + 1], member) for parts, member in placed]
    _check_known(path, {file.class_name for file in files}, known)
    _sort(path, files, "")
    return files


def _sort(path: Path, files: list[LabelledFile], where: str) -> None:
    files.sort(key=lambda file: (file.class_name, file.file_name))
    repeated = Counter((file.class_name, file.file_name) for file in files).most_common(1)
    if repeated and repeated[0][1] > 1:
        raise InputError(f"{path}: {where}{'/'.join(repeated[0][0])} is there {repeated[0][1]} times")


def _check_known(path: Path, found: set[str], known: Sequence[str]) -> None:
    if not found:
        raise InputError(f"{path}: no image found in the folders of its classes")
    if unknown := sorted(found - set(known)):
        raise InputError(f"{path}: unknown class {', '.join(unknown[:5])} (the source's: {', '.join(known)})")


def _check_classes(
    path: Path, files: dict[str, list[LabelledFile]], directories: set[PurePosixPath], root: tuple[str, ...]
) -> None:
    classes = {split: {file.class_name for file in files[split]} for split in SPLITS}
    for directory in directories:
        inside = directory.parts[len(root) :]
        is_class = directory.parts[: len(root)] == root and len(inside) == 2 and inside[0] in SPLITS
        if is_class and inside[1] not in classes[inside[0]] and not _is_litter(directory):
            raise InputError(f"{path}: class {inside[1]!r} is empty in {inside[0]}/")
    train, val = (classes[split] for split in SPLITS)
    if train != val:
        only = [f"{', '.join(sorted(some)[:5])} only in {split}/" for some, split in
                ((train - val, "train"), (val - train, "val")) if some]  # fmt: skip
        raise InputError(f"{path}: train and val must have the same classes: {'; '.join(only)}")
    if len(train) < 2:
        raise InputError(f"{path}: {len(train)} class{'es' if not train else ''} found; at least two are needed")


def _root_of_splits(path: Path, names: set[PurePosixPath]) -> tuple[str, ...]:
    """The folder that holds train/ and val/: the top, or one that is alone in having both."""
    roots = _roots_of_splits(names)
    if len(roots) == 1:
        return roots[0]
    top = sorted({name.parts[0] for name in names if name.parts and not _is_litter(name)})
    what = "several folders have" if roots else "no folder has"
    shown = ", ".join(top[:8]) or "nothing"
    raise InputError(f"{path}: {what} both train/<class>/ and val/<class>/; at its top are: {shown}")


def _roots_of_splits(names: set[PurePosixPath]) -> list[tuple[str, ...]]:
    """The folders that hold both train/ and val/."""
    found: dict[tuple[str, ...], set[str]] = {}
    for name in names:
        if not _is_litter(name):
            for depth, part in enumerate(name.parts[:-1] if len(name.parts) > 1 else ()):
                if part in SPLITS:
                    found.setdefault(name.parts[:depth], set()).add(part)
                    break
    return [root for root, splits in found.items() if splits == set(SPLITS)]


def _is_litter(name: PurePosixPath) -> bool:
    return any(part in LITTER or part.startswith(LITTER_PREFIXES) for part in name.parts)
