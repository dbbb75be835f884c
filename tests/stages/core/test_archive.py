from __future__ import annotations

import gzip
import io
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.core.archive import Limits, open_image_set
from stages.core.errors import InputError
from tests.helpers import image_files, nobody, write_files

LIMITS = Limits(files=1000, total_bytes=10_000_000, ratio=100)


def tar(path: Path, files: dict[str, bytes], mode: str = "w", extra: list[tarfile.TarInfo] | None = None) -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for info in extra or []:
            archive.addfile(info)
    return path


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def read(path: Path, scratch: Path, limits: Limits = LIMITS) -> dict[str, bytes]:
    """Everything in canonical order, read through the real reader."""
    with open_image_set(path, limits, scratch) as splits:
        return {
            f"{split}/{file.class_name}/{file.file_name}": file.member.read()
            for split, files in splits.items()
            for file in files
        }


def refused(path: Path, scratch: Path, message: str, limits: Limits = LIMITS) -> None:
    before = sorted(scratch.iterdir())
    with pytest.raises(InputError, match=message) as caught:
        read(path, scratch, limits)
    assert str(path) in str(caught.value)
    assert sorted(scratch.iterdir()) == before, "something was left behind"


SOURCES: dict[str, Callable[[Path, dict[str, bytes]], Path]] = {
    "folder": lambda folder, files: write_files(folder / "set", files),
    "tar": lambda folder, files: tar(folder / "set.tar", files),
    "tgz": lambda folder, files: tar(folder / "set.tgz", files, "w:gz"),
    "tar.bz2": lambda folder, files: tar(folder / "set.tar.bz2", files, "w:bz2"),
    "tar.xz": lambda folder, files: tar(folder / "set.tar.xz", files, "w:xz"),
    "zip": lambda folder, files: zipped(folder / "set.zip", files),
}


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("prefix", ["", "my-set/", "a/b/"])
def test_every_kind_of_source_gives_the_same_images(kind: str, prefix: str, tmp_path: Path, scratch: Path) -> None:
    files = image_files()
    litter = {".DS_Store": b"x", "train/cat/.DS_Store": b"x", "train/cat/._0.jpg": b"x", "labels.csv": b"a,b"}
    shuffled = dict(sorted(files.items(), key=lambda item: hash(item[1])))
    source = SOURCES[kind](tmp_path, {prefix + name: content for name, content in (shuffled | litter).items()})
    found = read(source, scratch)
    assert found == files
    assert list(found) == sorted(files), "not in canonical order"
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("kind", SOURCES)
def test_wrong_layouts_are_refused(kind: str, tmp_path: Path, scratch: Path) -> None:
    files = image_files()
    image = files["train/cat/0.jpg"]
    cases = {
        "same classes: bird only in train/": files | {"train/bird/0.jpg": image},
        "same classes: bird only in val/": files | {"val/bird/0.jpg": image},
        "no folder has both train/<class>/ and val/<class>/; at its top are: train": {
            name: content for name, content in files.items() if name.startswith("train")
        },
        "at its top are: cats": {"cats/0.jpg": image},
        "'train/0.jpg' is not at train/<class>/<image>": files | {"train/0.jpg": image},
        "'train/cat/more/0.jpg' is not at": files | {"train/cat/more/0.jpg": image},
        "1 class found; at least two": image_files(classes=("cat",)),
        "several folders have both": {f"{top}/{name}": content for top in "ab" for name, content in files.items()},
    }
    for number, (message, wrong) in enumerate(cases.items()):
        (tmp_path / str(number)).mkdir()
        refused(SOURCES[kind](tmp_path / str(number), wrong), scratch, message)


def test_an_empty_class_is_refused(tmp_path: Path, scratch: Path) -> None:
    folder = write_files(tmp_path / "set", image_files())
    (folder / "val" / "bird").mkdir()
    refused(folder, scratch, "class 'bird' is empty in val/")
    path = tar(tmp_path / "set.tar", image_files(), extra=[special("train/bird", tarfile.DIRTYPE)])
    refused(path, scratch, "class 'bird' is empty in train/")
    zipped(tmp_path / "set.zip", image_files() | {"train/bird/": b""})
    refused(tmp_path / "set.zip", scratch, "class 'bird' is empty in train/")


@pytest.mark.parametrize(
    "name", ["../evil.jpg", "/etc/evil.jpg", "train/../../evil.jpg", "C:/evil.jpg", "train\\cat\\evil.jpg"]
)
@pytest.mark.parametrize("kind", ["tar", "tgz", "zip"])
def test_a_name_that_points_outside_is_refused(name: str, kind: str, tmp_path: Path, scratch: Path) -> None:
    refused(SOURCES[kind](tmp_path, image_files() | {name: b"x"}), scratch, "points outside the archive")


@pytest.mark.parametrize("name", ["train/cat/a\nb.jpg", "train/cat/a\x1b[31m.jpg", "train/cat/\x7f.jpg"])
@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_control_characters_in_names_are_refused(name: str, kind: str, tmp_path: Path, scratch: Path) -> None:
    refused(SOURCES[kind](tmp_path, image_files() | {name: b"x"}), scratch, "control character")


def test_names_that_are_not_utf8_are_refused(tmp_path: Path, scratch: Path) -> None:
    folder = write_files(tmp_path / "set", image_files())
    Path(os.fsdecode(os.fsencode(folder / "train/cat") + b"/\xff.jpg")).write_bytes(b"x")
    refused(folder, scratch, "not UTF-8")


@pytest.mark.parametrize(
    ("kind", "target", "message"),
    [
        (tarfile.SYMTYPE, "/etc/passwd", "a link"),
        (tarfile.LNKTYPE, "train/cat/0.jpg", "a link"),
        (tarfile.CHRTYPE, "", "special file"),
        (tarfile.BLKTYPE, "", "special file"),
        (tarfile.FIFOTYPE, "", "special file"),
    ],
)
def test_links_and_devices_in_a_tar_are_refused(
    kind: bytes, target: str, message: str, tmp_path: Path, scratch: Path
) -> None:
    path = tar(tmp_path / "set.tar", image_files(), extra=[special("train/cat/link.jpg", kind, target)])
    refused(path, scratch, f"'train/cat/link.jpg' is .*{message}")


def test_links_in_a_folder_are_refused(tmp_path: Path, scratch: Path) -> None:
    folder = write_files(tmp_path / "set", image_files())
    (folder / "train/cat/link.jpg").symlink_to("/etc/passwd")
    refused(folder, scratch, "'train/cat/link.jpg' is a link")
    (folder / "train/cat/link.jpg").unlink()
    (folder / "train/bird").symlink_to(folder / "train/cat")
    refused(folder, scratch, "'train/bird' is a link")


def test_a_link_in_a_zip_is_refused(tmp_path: Path, scratch: Path) -> None:
    path = zipped(tmp_path / "set.zip", image_files())
    with zipfile.ZipFile(path, "a") as archive:
        info = zipfile.ZipInfo("train/cat/link.jpg")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    refused(path, scratch, "link or a special file")


def test_an_encrypted_zip_is_refused(tmp_path: Path, scratch: Path) -> None:
    path = zipped(tmp_path / "set.zip", image_files())
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = content.find(signature)
        while start >= 0:
            content[start + offset] |= 1
            start = content.find(signature, start + 1)
    path.write_bytes(content)
    refused(path, scratch, "is encrypted")


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_name_that_is_there_twice_is_refused(kind: str, tmp_path: Path, scratch: Path) -> None:
    path = SOURCES[kind](tmp_path, image_files())
    if kind == "tar":
        with tarfile.open(path, "a") as archive:
            info = tarfile.TarInfo("train/cat/0.jpg")
            archive.addfile(info)
    else:
        with zipfile.ZipFile(path, "a") as zip_archive, pytest.warns(UserWarning, match="Duplicate name"):
            zip_archive.writestr("train/cat/0.jpg", b"x")
    refused(path, scratch, "train/cat/0.jpg is there 2 times")


def test_truncated_archives_are_refused(tmp_path: Path, scratch: Path) -> None:
    files = image_files()
    for kind in ("tar", "tgz", "tar.bz2", "tar.xz", "zip"):
        path = SOURCES[kind](tmp_path, files)
        whole = path.read_bytes()
        for share in (0.99, 0.6, 0.3):
            path.write_bytes(whole[: int(len(whole) * share)] if kind != "tar" else whole[: int(7000 * share)])
            refused(path, scratch, "truncated|damaged|broken")
        path.write_bytes(whole)


def test_a_tar_that_was_cut_between_two_members_is_refused(tmp_path: Path, scratch: Path) -> None:
    """tarfile itself reads it without a word."""
    path = tar(tmp_path / "set.tar", image_files())
    with tarfile.open(path) as archive:
        offset = archive.getmembers()[-1].offset
    path.write_bytes(path.read_bytes()[:offset])
    with tarfile.open(path) as archive:
        assert archive.getnames()
    refused(path, scratch, "truncated: the archive ends without its end marker")


def test_damaged_bytes_are_refused(tmp_path: Path, scratch: Path) -> None:
    for kind in ("tgz", "zip"):
        path = SOURCES[kind](tmp_path, image_files())
        content = bytearray(path.read_bytes())
        for position in range(200, len(content) // 2, 97):
            content[position] ^= 0xFF
        path.write_bytes(content)
        refused(path, scratch, "truncated or damaged|is damaged|broken")


def test_bombs_are_refused(tmp_path: Path, scratch: Path) -> None:
    files = image_files()
    for kind in SOURCES:
        (tmp_path / kind).mkdir()
        path = SOURCES[kind](tmp_path / kind, files)
        refused(path, scratch, "max_files", Limits(files=5, total_bytes=10_000_000, ratio=100))
        refused(path, scratch, "max_bytes", Limits(files=100, total_bytes=1000, ratio=100))
    bomb = {"train/cat/bomb.jpg": bytes(20_000_000)}
    large = Limits(files=100, total_bytes=100_000_000, ratio=100)
    refused(zipped(tmp_path / "bomb.zip", files | bomb), scratch, "max_ratio", large)
    refused(tar(tmp_path / "bomb.tgz", files | bomb, "w:gz"), scratch, "max_ratio", large)


def test_a_gzip_bomb_is_cut_off_early(tmp_path: Path, scratch: Path) -> None:
    """What is written before the refusal stays near the limit."""
    path = tmp_path / "bomb.tgz"
    with gzip.open(path, "wb") as file:
        for _ in range(200):
            file.write(bytes(1_000_000))
    refused(path, scratch, "unpacks to more than", Limits(files=10, total_bytes=1_000_000, ratio=1000))


@pytest.mark.parametrize("content", [b"", b"<html>404</html>" * 100, bytes(range(40)), b"PK\x03\x04junk"])
def test_what_is_no_archive_is_refused(content: bytes, tmp_path: Path, scratch: Path) -> None:
    path = tmp_path / "set.tgz"
    path.write_bytes(content)
    refused(path, scratch, "not a tar, tgz or zip|broken|truncated|no folder has")


def test_a_folder_that_cannot_be_listed_is_refused(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(tmp_path / "images", image_files())
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o755)
    (tmp_path / "images/train/dog").chmod(0)
    with nobody():
        refused(Path("images"), Path("scratch"), "images/train/dog: cannot be read: Permission denied")
    (tmp_path / "images/train/dog").chmod(0o755)
