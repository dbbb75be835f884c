"""What holds for any name, size, value and damage: hypothesis looks for the exception."""

from __future__ import annotations

import io
import tarfile
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from stages.core.archive import Limits, open_image_set
from stages.core.errors import InputError
from stages.core.image import CropMode, Interpolation, check_is_image, decode
from stages.core.params import check_params
from stages.core.production import find_images, read_images
from tests.faults.hostile_archives import FILES, IMAGE
from tests.faults.hostile_images import IMAGES
from tests.faults.reliability import case
from tests.faults.settings import document
from tests.faults.test_parameters import reader_of
from tests.helpers import encoded, picture
from tests.stages.core.test_archive import SOURCES

pytestmark = [pytest.mark.slow, pytest.mark.faults]

LIMITS = Limits(files=1000, total_bytes=10_000_000, ratio=100)
# The same examples at every run: a suite that fails by chance helps nobody.
REPEATABLE = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck), max_examples=300
)

DOCUMENT = document(tiny=False)
KEYS = sorted((section, key) for section, keys in DOCUMENT.items() for key in keys)
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.lists(st.floats(), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
)  # fmt: skip


def read(path: Path, scratch: Path) -> list[str]:
    with open_image_set(path, LIMITS, scratch) as splits:
        found = [f"{split}/{f.class_name}/{f.file_name}" for split, files in splits.items() for f in files]
        for files in splits.values():
            for file in files:
                file.member.read()
    return found


@case("any name", "A member of a tar or zip with any name at all is refused, or is an image of that very name.")
@REPEATABLE
@given(name=st.text(min_size=1, max_size=40), kind=st.sampled_from(["tar", "zip"]))
def test_any_name(name: str, kind: str) -> None:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's remark on names that are there twice
        (Path(folder) / "scratch").mkdir()
        path = Path(folder) / f"set.{kind}"
        try:
            if kind == "zip":
                with zipfile.ZipFile(path, "w") as archive:
                    for each, content in [*FILES.items(), (name, IMAGE)]:
                        archive.writestr(each, content)
            else:
                with tarfile.open(path, "w") as tar:
                    for each, content in [*FILES.items(), (name, IMAGE)]:
                        info = tarfile.TarInfo(each)
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
        except (UnicodeEncodeError, ValueError):
            return  # no archive can have that name
        try:
            found = read(path, Path(folder) / "scratch")
        except InputError as error:
            assert str(path) in str(error)  # noqa: PT017
        else:
            assert set(FILES) <= set(found)
            assert all(".." not in each.split("/") and not each.startswith("/") for each in found)
        assert not list((Path(folder) / "scratch").iterdir())


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=case(f"damaged {kind}", "Any bytes changed: read, or refused."), id=kind)
        for kind in ("tar", "tgz", "tar.bz2", "tar.xz", "zip")
    ],
)  # fmt: skip
def test_any_damage_to_an_archive(kind: str, tmp_path: Path) -> None:
    small = {name: content[:300] for name, content in FILES.items()}
    path = SOURCES[kind](tmp_path, small)
    whole = path.read_bytes()
    (tmp_path / "scratch").mkdir()

    @REPEATABLE
    @given(
        changes=st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), min_size=1, max_size=6),
        end=st.one_of(st.none(), st.integers(0, len(whole))),
        mends_checksums=st.booleans(),
    )
    def check(changes: list[tuple[int, int]], end: int | None, mends_checksums: bool) -> None:
        damaged = bytearray(whole)
        for position, value in changes:
            damaged[position] = value
        if kind == "tar" and mends_checksums:  # so that the damage gets past the first check
            for start in range(0, len(damaged) - 511, 512):
                if whole[start + 257 : start + 262] == b"ustar":
                    damaged[start + 148 : start + 156] = b" " * 8
                    damaged[start + 148 : start + 156] = b"%06o\0 " % sum(damaged[start : start + 512])
        path.write_bytes(damaged[:end])
        for reader in (lambda: read(path, tmp_path / "scratch"), lambda: find_images([str(path)])):
            try:
                reader()
            except InputError as error:
                assert str(path) in str(error)  # noqa: PT017
        assert not list((tmp_path / "scratch").iterdir())

    check()


@case("any image size", "Any width, height, mode of cropping and interpolation gives a square of the size asked for.")
@REPEATABLE
@given(
    width=st.integers(1, 400), height=st.integers(1, 400), size=st.integers(8, 64),
    crop_mode=st.sampled_from(get_args(CropMode)), interpolation=st.sampled_from(get_args(Interpolation)),
    format=st.sampled_from(["JPEG", "PNG", "WEBP"]),
)  # fmt: skip
def test_any_size(
    width: int, height: int, size: int, crop_mode: CropMode, interpolation: Interpolation, format: str
) -> None:
    content = encoded(Image.new("RGB", (width, height), (200, 30, 90)), format)
    pixels = decode(content, "x", size, crop_mode, interpolation)
    assert pixels.shape == (size, size, 3)
    if crop_mode != "border":
        assert np.abs(pixels.astype(int) - (200, 30, 90)).max() <= 12


@case("any damage to an image", "Any bytes changed, of any format: pixels, or a refusal.")
@REPEATABLE
@given(data=st.data())
def test_any_damage_to_an_image(data: st.DataObject) -> None:
    whole = data.draw(st.sampled_from(_WHOLE))
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, min(len(whole), 400) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(damaged[: data.draw(st.one_of(st.none(), st.integers(0, len(whole))))])
    try:
        check_is_image(content, "the image")
        pixels = decode(content, "the image", 16)
    except InputError as error:
        assert str(error).startswith("the image: ")  # noqa: PT017
    else:
        assert pixels.shape == (16, 16, 3)


_WHOLE = [encoded(picture(size=(24, 24)), format) for format in ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP")] + [
    each.content() for each in IMAGES if isinstance(each.ends, tuple) and each.name != "bytes after the end"
]


@case("any value of any key", "Refused, naming the key, or taken; no other end, and nothing is converted in silence.")
@settings(REPEATABLE, max_examples=2000)
@given(where=st.sampled_from(KEYS), value=VALUES)
def test_any_value(where: tuple[str, str], value: Any) -> None:
    section, key = where
    spoilt = document(tiny=False)
    spoilt[section][key] = value
    try:
        params = check_params(reader_of(section), spoilt, "params.yaml")
    except InputError as error:
        assert str(error).startswith("params.yaml:")  # noqa: PT017
        assert section in str(error)  # noqa: PT017
        assert key in str(error)  # noqa: PT017
    else:
        assert getattr(getattr(params, section), key) == value


@case("damage in production", "The monitor's reader lists what it cannot read, and reads the rest.")
@settings(REPEATABLE, max_examples=40)
@given(cut=st.integers(0, 3000), number=st.integers(0, 7))
def test_one_bad_image_among_good_ones(cut: int, number: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for each in range(8):
            content = encoded(picture(each, size=(64, 64)), "PNG")
            (Path(folder) / f"{each}.png").write_bytes(content[:cut] if each == number else content)
        window = read_images(find_images([folder]), 16, "center", "bilinear")
        assert len(window.images) + len(window.skipped) == 8
        assert len(window.skipped) <= 1
