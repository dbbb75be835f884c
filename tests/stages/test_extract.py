"""The extract stage on real sources: what it hands on, and that a refusal leaves what was there."""

from __future__ import annotations

import hashlib
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from torchvision.datasets import Imagenette

from stages import extract
from stages.core.errors import InputError
from stages.core.params import load_params
from tests.helpers import ROOT, encoded, image_files, picture, set_params, write_files

REAL = ROOT.parent / "shared" / "data" / "imagenette2-160.tgz"


def run_stage(workspace: Path, **overrides: object) -> None:
    set_params(workspace / "params.yaml", {key.replace("__", "."): value for key, value in overrides.items()})
    extract.main(load_params(extract.Params))


def raw(workspace: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (workspace / "data/raw").iterdir()}


def make_tgz(folder: Path, files: dict[str, bytes]) -> Path:
    write_files(folder / "images", files)
    path = folder / "images.tgz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder / "images", arcname="my-images")
    return path


def make_zip(folder: Path, files: dict[str, bytes]) -> Path:
    path = folder / "images.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in reversed(files.items()):
            archive.writestr(name, content)
    return path


def test_the_named_sets_have_torchvisions_addresses_and_checksums() -> None:
    known = {"full": "imagenette2", "320px": "imagenette2-320", "160px": "imagenette2-160"}
    for size, name in known.items():
        assert extract.NAMED_SOURCES[name] == Imagenette._ARCHIVES[size]


def test_the_sample_is_the_same_for_any_number_of_workers(workspace: Path) -> None:
    run_stage(workspace, sample__train_images=100)
    first = raw(workspace)
    assert sorted(first) == ["source.json", "train.tar", "val.tar"]
    run_stage(workspace, runtime__workers=2)
    assert raw(workspace) == first
    run_stage(workspace, sample__seed=1)
    assert raw(workspace)["train.tar"] != first["train.tar"]


def test_a_folder_a_tgz_and_a_zip_of_the_same_images_give_the_same_bytes(workspace: Path, tmp_path: Path) -> None:
    files = image_files()
    run_stage(workspace, data__source=str(make_tgz(tmp_path, files)))
    first = raw(workspace)
    assert json.loads(first["source.json"])["classes"] == ["cat", "dog"]
    assert json.loads(first["source.json"])["num_images"] == {"train": 8, "val": 4}
    with tarfile.open(workspace / "data/raw/train.tar") as tar:
        assert tar.getnames() == [name.removeprefix("train/") for name in sorted(files) if name.startswith("train")]
        assert {(info.mtime, info.uid, info.uname) for info in tar} == {(0, 0, "")}
    for source in (tmp_path / "images", make_zip(tmp_path, files)):
        run_stage(workspace, data__source=str(source))
        assert raw(workspace) == first


def test_checksums_are_checked(workspace: Path, tmp_path: Path) -> None:
    path = make_tgz(tmp_path, image_files())
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    run_stage(workspace, data__source=str(path), data__sha256=sha256.upper())
    content_hash = json.loads(raw(workspace)["source.json"])["sha256"]
    with pytest.raises(InputError, match=rf"images\.tgz: sha256 is {sha256}, expected 0+ \(data\.sha256\)"):
        run_stage(workspace, data__sha256="0" * 64)
    run_stage(workspace, data__source=str(tmp_path / "images"), data__sha256=content_hash)
    with pytest.raises(InputError, match=r"images: content sha256 is .* expected f+ \(data\.sha256\)"):
        run_stage(workspace, data__sha256="f" * 64)
    with pytest.raises(InputError, match=r"data\.md5: a folder has none"):
        run_stage(workspace, data__sha256=None, data__md5="0" * 32)


def text_named_jpg(files: dict[str, bytes]) -> dict[str, bytes]:
    return files | {"train/cat/page.jpg": b"<html>not an image</html>"}


BAD_SETS: dict[str, tuple[Callable[[dict[str, bytes]], dict[str, bytes]], str]] = {
    "a text named .jpg": (text_named_jpg, r"train/cat/page\.jpg: is not an image \(it starts with '<html>"),
    "an empty file": (lambda files: files | {"val/dog/0.jpg": b""}, r"val/dog/0\.jpg: is empty"),
    "other classes": (lambda files: files | {"train/cow/0.jpg": encoded(picture())}, "cow only in train/"),
    "no val": (lambda files: {k: v for k, v in files.items() if k.startswith("train")}, "no folder has both"),
}


@pytest.mark.parametrize("case", BAD_SETS)
def test_a_refused_source_leaves_what_was_there(case: str, workspace: Path, tmp_path: Path) -> None:
    run_stage(workspace)
    before = raw(workspace)
    spoil, message = BAD_SETS[case]
    with pytest.raises(InputError, match=message):
        run_stage(workspace, data__source=str(make_tgz(tmp_path, spoil(image_files()))))
    assert raw(workspace) == before
    assert [path.name for path in (workspace / "data").iterdir()] == ["raw"]


def test_an_unknown_source_names_the_choices(workspace: Path) -> None:
    with pytest.raises(InputError, match=r"did you mean 'imagenette2-160'\? \(valid: sample, imagenette2-160"):
        run_stage(workspace, data__source="imagenete2-160")
    assert not (workspace / "data").exists() or not list((workspace / "data").iterdir())


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason="needs the Imagenette archive, which lies beside the checkout only in CI")
def test_the_real_archive(workspace: Path) -> None:
    run_stage(workspace, data__source=str(REAL), data__md5="dc379f182ca7c3284b10c9254f60c03f")
    info = json.loads(raw(workspace)["source.json"])
    assert info["num_images"] == {"train": 9469, "val": 3925}
    assert len(info["classes"]) == 10
