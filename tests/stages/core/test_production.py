"""Production's images: every place they may lie in, every kind they may be of, and what is left out."""

from __future__ import annotations

import io
import lzma
import os
import tarfile
import tempfile
import tracemalloc
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from PIL import Image

from stages.core.errors import InputError
from stages.core.image import CropMode, decode
from stages.core.production import ImageFile, Window, find_images, is_image_name, keep_rows, read_images
from tests.helpers import encoded, nobody, picture, run, truncated, write_files
from tests.synthetic import clouds

FILES = {
    "b.jpg": encoded(picture(1, (40, 30))),
    "a.PNG": encoded(picture(2, (17, 64)), "PNG"),
    "deep/er/c.webp": encoded(picture(3, (32, 32)), "WEBP"),
    "deep/d.tiff": encoded(picture(4, (9, 90)), "TIFF"),
}
LITTER = {
    ".hidden.png": FILES["a.PNG"],
    ".cache/e.png": FILES["a.PNG"],
    "__MACOSX/._b.jpg": b"litter",
    "notes.txt": b"words",
    "Thumbs.db": b"words",
}
NAMES = ["a.PNG", "b.jpg", "deep/d.tiff", "deep/er/c.webp"]


def zipped(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tarred(files: dict[str, bytes], mode: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def read(*places: Path, size: int = 24, crop_mode: CropMode = "center") -> Window:
    return read_images(find_images([str(place) for place in places]), size, crop_mode, "bilinear")


def expected(size: int = 24, crop_mode: CropMode = "center") -> NDArray[np.uint8]:
    return np.stack([decode(FILES[name], name, size, crop_mode, "bilinear") for name in NAMES])


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_a_folder_gives_the_pixels_that_preprocess_gives(crop_mode: CropMode, tmp_path: Path) -> None:
    found = read(write_files(tmp_path, FILES | LITTER), crop_mode=crop_mode)
    assert found.names == [str(tmp_path / name) for name in NAMES]
    assert found.images.shape == (4, 24, 24, 3)
    assert found.images.dtype == np.uint8
    assert np.array_equal(found.images, expected(crop_mode=crop_mode))
    assert found.skipped == []


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz", "x.tgz", "archive"])
def test_an_archive_gives_the_same_in_the_same_order(name: str, tmp_path: Path) -> None:
    path, mode = tmp_path / name, "w:gz" if "gz" in name else "w"
    path.write_bytes(zipped(FILES | LITTER) if name == "x.zip" else tarred(FILES | LITTER, mode))
    found = read(path)
    assert found.names == [f"{path}:{member}" for member in NAMES]
    assert np.array_equal(found.images, expected())


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_a_tar_is_not_held_in_memory(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither when its images are found nor while they are read, one after the other, or by several threads."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    contents = {f"{number:02}.png": np.random.default_rng(number).bytes(500_000) for number in range(12)}
    path = tmp_path / "archive"
    # The decoder of xz holds its dictionary, which is of 256 KB with preset 0.
    path.write_bytes(lzma.compress(tarred(contents, "w"), preset=0) if mode == "w:xz" else tarred(contents, mode))
    tracemalloc.start()
    found = find_images([str(path)])
    for file in found:
        assert len(file.read()) == 500_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3_000_000
    with ThreadPoolExecutor(8) as threads:
        read = list(threads.map(lambda file: file.read(), 3 * found))
    assert read == 3 * list(contents.values())
    assert not list(scratch.iterdir()), "the temporary file has no name"
    num_open = psutil.Process().num_fds()
    del found, file
    assert psutil.Process().num_fds() == num_open - 1, "it goes with the images"


def test_a_sparse_member_of_a_tar_is_read_whole(tmp_path: Path) -> None:
    """GNU tar leaves out holes: the content is no range of the archive."""
    with (tmp_path / "a.png").open("wb") as file:
        file.write(FILES["a.PNG"])
        file.truncate(1_000_000)
    (tmp_path / "b.jpg").write_bytes(FILES["b.jpg"])
    run(tmp_path, "tar", "--sparse", "-cf", "x.tar", "a.png", "b.jpg")
    with tarfile.open(tmp_path / "x.tar") as tar:
        if not tar.getmember("a.png").issparse():
            pytest.skip("this file system or this tar knows no holes")
    found = find_images([str(tmp_path / "x.tar")])
    assert [file.read() for file in found] == [(tmp_path / name).read_bytes() for name in ("a.png", "b.jpg")]


def test_the_last_of_two_members_of_a_name_counts(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for content in (FILES["b.jpg"], FILES["deep/er/c.webp"]):
            info = tarfile.TarInfo("x.jpg")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert [file.read() for file in find_images([str(tmp_path / "x.tar")])] == [FILES["deep/er/c.webp"]]


def test_a_tar_that_is_cut_after_it_was_found_is_told_of(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(tarred(FILES, "w"))
    found = find_images([str(path)])
    os.truncate(path, 600)
    window = read_images(found, 24, "center", "bilinear")
    assert len(window.names) < 4
    assert {reason for _, reason in window.skipped} == {"truncated since it was found"}


def test_single_files_and_several_places(tmp_path: Path) -> None:
    write_files(tmp_path, FILES)
    (tmp_path / "deep.zip").write_bytes(zipped({"z.png": FILES["a.PNG"]}))
    found = read(tmp_path / "b.jpg", tmp_path / "deep", tmp_path / "deep.zip")
    assert [Path(name).name for name in found.names] == ["b.jpg", "d.tiff", "c.webp", "deep.zip:z.png"]
    assert np.array_equal(found.images[0], expected()[1])


def test_a_packed_array_keeps_its_pixels_and_is_resized_as_an_image_is(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 24, 24, 3), dtype=np.uint8)
    np.save(tmp_path / "x.npy", images)
    found = read(tmp_path / "x.npy")
    assert np.array_equal(found.images, images)
    assert found.names == [f"{tmp_path / 'x.npy'}[{row}]" for row in range(3)]
    oblong = np.random.default_rng(0).integers(0, 256, (2, 20, 50, 3), dtype=np.uint8)
    np.save(tmp_path / "y.npy", oblong)
    resized = [decode(encoded(Image.fromarray(image), "PNG"), "x", 24) for image in oblong]
    assert np.array_equal(read(tmp_path / "y.npy").images, resized)


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "RGBA", "LA", "I;16"])
@pytest.mark.parametrize("size", [(1, 1), (5, 300), (300, 5), (64, 64)])
def test_every_size_and_mode_ends_as_a_square_of_colours(mode: str, size: tuple[int, int], tmp_path: Path) -> None:
    image = picture(0, size)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L"), dtype=np.uint16) * 257)
    elif mode == "LA":
        image = image.convert("L").convert("LA")
    else:
        image = image.convert(mode)
    (tmp_path / "x.tif").write_bytes(encoded(image, "TIFF"))
    found = read(tmp_path / "x.tif", size=16)
    assert found.images.shape == (1, 16, 16, 3)
    assert found.images.dtype == np.uint8


@pytest.mark.parametrize("place", ["folder", "zip", "tar"])
def test_a_corrupt_file_is_skipped_with_its_reason(place: str, tmp_path: Path) -> None:
    bad = {"bad.jpg": truncated(FILES["b.jpg"]), "empty.png": b"", "html.gif": b"<html>not found</html>"}
    path = tmp_path / place
    if place == "folder":
        write_files(path, FILES | bad)
    else:
        path.write_bytes(zipped(FILES | bad) if place == "zip" else tarred(FILES | bad, "w"))
    found = read(path)
    assert np.array_equal(found.images, expected())
    assert len(found.names) == 4
    reasons = {Path(name.rpartition(":")[2]).name: reason for name, reason in found.skipped}
    assert set(reasons) == set(bad)
    assert "cannot be decoded" in reasons["bad.jpg"]
    assert reasons["empty.png"].startswith("is empty")
    assert "is not an image (it starts with '<html>not found" in reasons["html.gif"]


def test_a_damaged_member_of_a_zip_is_skipped(tmp_path: Path) -> None:
    content = bytearray(zipped(FILES, zipfile.ZIP_STORED))
    content[content.index(FILES["b.jpg"]) + 200] ^= 0xFF
    (tmp_path / "x.zip").write_bytes(content)
    found = read(tmp_path / "x.zip")
    assert len(found.images) == 3
    assert [name for name, _ in found.skipped] == [f"{tmp_path / 'x.zip'}:b.jpg"]
    assert "CRC" in found.skipped[0][1]


@pytest.mark.parametrize(
    "method",
    [
        zipfile.ZIP_BZIP2,
        zipfile.ZIP_LZMA,
    ],
)
def test_a_damaged_member_of_a_zip_of_another_method_is_skipped(method: int, tmp_path: Path) -> None:
    alone = zipped({"b.jpg": FILES["b.jpg"]}, method)
    content = bytearray(zipped({"a.png": FILES["a.PNG"], "b.jpg": FILES["b.jpg"]}, method))
    start = content.index(b"b.jpg") + 5
    for offset in range(start + 20, start + len(alone) // 2):
        content[offset] = 0xFF
    (tmp_path / "x.zip").write_bytes(content)
    found = read(tmp_path / "x.zip")
    assert len(found.images) == 1
    assert len(found.skipped) == 1


def test_a_file_that_vanished_is_skipped(tmp_path: Path) -> None:
    files = find_images([str(write_files(tmp_path, FILES))])
    (tmp_path / "b.jpg").unlink()
    found = read_images(files, 24, "center", "bilinear")
    assert len(found.images) == 3
    assert found.skipped[0][0] == str(tmp_path / "b.jpg")


def test_nothing_readable_is_an_empty_window(tmp_path: Path) -> None:
    found = read(write_files(tmp_path, {"a.png": b"no"}))
    assert found.images.shape == (0, 24, 24, 3)
    assert found.images.dtype == np.uint8
    assert len(found.skipped) == 1


def test_pixels_are_in_memory_once(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", clouds(400, 48, 48))
    files = find_images([str(tmp_path / "images.npy")])
    tracemalloc.start()
    window = read_images(files, 48, "center", "bilinear")
    kept = keep_rows(window, np.arange(0, 400, 2))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.2 * window.images.nbytes
    assert kept.names == window.names[::2]
    assert np.array_equal(kept.images, np.load(tmp_path / "images.npy")[::2])


def test_more_images_than_memory_holds_are_refused(tmp_path: Path) -> None:
    class Many(Sequence[ImageFile]):
        def __len__(self) -> int:
            return 10**9

        def __getitem__(self, index: object) -> Any:
            raise AssertionError

    message = "1,000,000,000 images of 512 px are 786,432 GB, more than memory holds; give fewer at once"
    with pytest.raises(InputError, match=message):
        read_images(Many(), 512, "center", "bilinear")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nothing", None, "no such file or folder"),
        ("empty", {}, r"no images in it \(jpg, jpeg, jpe, jfif, png"),
        ("litter", LITTER, "no images in it"),
        ("empty.zip", zipped({}), "no images in it"),
        ("words.zip", zipped({"a.txt": b"words"}), "no images in it"),
        ("cut.zip", zipped(FILES)[:-30], "broken or truncated zip"),
        ("cut.tar.gz", tarred(FILES, "w:gz")[:-600], "no image, folder, or archive that can be read"),
        ("words.txt", b"words", "no image, folder, or archive that can be read"),
        ("blank", b"", "no image, folder, or archive that can be read"),
    ],
)
def test_places_without_images_are_refused_by_name(
    name: str, content: dict[str, bytes] | bytes | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.mkdir()
        write_files(path, content)
    with pytest.raises(InputError, match=f"{name}: {message}"):
        find_images([str(path)])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 8, 8, 3), dtype=np.float32), r"float32 \(2, 8, 8, 3\); expected uint8 \(N, H, W, 3\)"),
        (np.zeros((2, 8, 8), dtype=np.uint8), r"uint8 \(2, 8, 8\); expected"),
        (np.zeros((2, 3, 8, 8), dtype=np.uint8), "expected uint8"),
        (np.zeros((2, 0, 5, 3), dtype=np.uint8), r"uint8 \(2, 0, 5, 3\); expected"),
        (np.array([{"a": 1}], dtype=object), "not a packed array"),
        (np.zeros((0, 8, 8, 3), dtype=np.uint8), "no images|not a packed array"),
    ],
)
def test_other_arrays_are_refused_by_name(array: NDArray[np.generic], message: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    with pytest.raises(InputError, match=rf"x\.npy: .*({message})"):
        find_images([str(tmp_path / "x.npy")])
    (tmp_path / "y.npy").write_bytes(b"words")
    with pytest.raises(InputError, match=r"y\.npy: not a packed array"):
        find_images([str(tmp_path / "y.npy")])


def test_names_of_images() -> None:
    for name in ("a.jpg", "A.JPEG", "x/y.z/b.Png", "./c.gif", "with space.tif", "d.jfif", "e.pgm", "f.HEIC"):
        assert is_image_name(name), name
    for name in ("a", "a.txt", ".a.jpg", "x/.y/a.jpg", "__MACOSX/a.jpg", "jpg", "a.jpg.part", ".jpg"):
        assert not is_image_name(name), name


def test_images_of_formats_that_are_not_read_are_told_of(tmp_path: Path) -> None:
    avif = encoded(picture(), "AVIF")
    found = read(write_files(tmp_path, FILES | {"phone/1.HEIC": avif, "phone/2.avif": avif}))
    assert len(found.images) == 4
    assert [name for name, _ in found.skipped] == [str(tmp_path / f"phone/{name}") for name in ("1.HEIC", "2.avif")]
    assert "is not an image (it starts with" in found.skipped[0][1]
    assert "readable formats: JPEG, PNG" in found.skipped[0][1]


def test_folders_are_read_through_links_and_once(tmp_path: Path) -> None:
    write_files(tmp_path / "elsewhere", FILES)
    write_files(tmp_path / "images", {"own.png": FILES["a.PNG"]})
    (tmp_path / "images/camera").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images/loop").symlink_to(tmp_path / "images")
    (tmp_path / "images/nowhere").symlink_to(tmp_path / "nowhere")
    found = read(tmp_path / "images")
    folder = tmp_path / "images"
    assert found.names == [*(str(folder / "camera" / name) for name in NAMES), str(folder / "own.png")]


def test_a_folder_that_is_hidden_itself_is_read(tmp_path: Path) -> None:
    assert len(read(write_files(tmp_path / ".frames", FILES)).images) == 4


def test_a_folder_that_cannot_be_listed_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path / "images", FILES)
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o755)
    (tmp_path / "images/deep").chmod(0)
    with nobody():
        found = read_images(find_images(["images"]), 24, "center", "bilinear")
    (tmp_path / "images/deep").chmod(0o755)
    assert found.names == ["images/a.PNG", "images/b.jpg"]
    assert [name for name, _ in found.skipped] == ["images/deep"]
    assert "Permission denied" in found.skipped[0][1]


def test_a_name_that_is_too_long_is_no_file() -> None:
    with pytest.raises(InputError, match="xxx: no such file"):
        find_images(["x" * 300])
