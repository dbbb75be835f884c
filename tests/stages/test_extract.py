"""The extract stage on real sources: what it hands on, and that a refusal leaves what was there."""

from __future__ import annotations

import hashlib
import json
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
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
    "many files that are no images": (
        lambda files: files | {f"train/cat/{name:02}.jpg": b"" for name in range(50, 65)},
        r"train/cat/50\.jpg: is empty; .*; remove it and 14 more of the kind "
        r"\(train/cat/51\.jpg, .*, train/cat/60\.jpg, \.\.\.\)",
    ),
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


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The address of a real server of the files in tmp_path."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("content", [b"<html>Log in</html>", None])
def test_a_download_that_is_no_archive_is_not_kept(
    content: bytes | None, served: str, workspace: Path, tmp_path: Path
) -> None:
    """A page that asks for a password, or half of a file; and the address is long, as a signed one is."""
    set_params(workspace / "params.yaml", {"runtime.cache_dir": str(tmp_path / "cache")})
    path = make_tgz(tmp_path, image_files())
    whole = path.read_bytes()
    source = f"{served}/images.tgz?signature={'x' * 400}"
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(InputError, match="fetch it again: the next run does, this copy is removed"):
        run_stage(workspace, data__source=source)
    path.write_bytes(whole)
    run_stage(workspace, data__source=source)
    assert json.loads(raw(workspace)["source.json"])["num_images"] == {"train": 8, "val": 4}


def test_a_download_is_kept_where_another_archive_is_damaged(served: str, workspace: Path, tmp_path: Path) -> None:
    set_params(workspace / "params.yaml", {"runtime.cache_dir": str(tmp_path / "cache")})
    (tmp_path / "more").mkdir()
    make_tgz(tmp_path / "more", {f"{split}/cat/more.jpg": encoded(picture()) for split in ("train", "val")})
    source = make_zip(tmp_path, image_files())
    whole = bytearray(source.read_bytes())
    whole[200] ^= 255  # in an image: the archive opens well
    source.write_bytes(whole)
    with pytest.raises(InputError, match=r"images\.zip: .* is damaged.*; fetch it again$"):
        run_stage(workspace, data__source=str(source), data__extra=f"{served}/more/images.tgz")
    assert list((tmp_path / "cache/downloads").glob("*-images.tgz"))


def test_a_named_set_is_downloaded_though_a_folder_has_its_name(
    served: str, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_tgz(tmp_path / "more", image_files())
    md5, sha256 = (hashlib.new(name, path.read_bytes()).hexdigest() for name in ("md5", "sha256"))
    monkeypatch.setitem(extract.NAMED_SOURCES, "pets", (f"{served}/more/images.tgz", md5))
    (workspace / "pets").mkdir()
    run_stage(workspace, data__source="pets", data__sha256=sha256, data__extra="pets", data__extra_sha256=sha256)
    assert json.loads(raw(workspace)["source.json"])["classes"] == ["cat", "dog"]


def test_an_archive_of_the_user_is_kept_whatever_it_is(workspace: Path, tmp_path: Path) -> None:
    path = tmp_path / "images.tgz"
    path.write_bytes(b"no archive")
    with pytest.raises(InputError, match="fetch it again$"):
        run_stage(workspace, data__source=str(path))
    assert path.exists()


def test_the_sample_has_the_checksum_of_its_content(workspace: Path) -> None:
    with pytest.raises(InputError, match=r"sample: content sha256 is [0-9a-f]{64}, expected 0{64} \(data\.sha256\)"):
        run_stage(workspace, data__sha256="0" * 64)
    run_stage(workspace, data__sha256=None)
    run_stage(workspace, data__sha256=json.loads(raw(workspace)["source.json"])["sha256"])
    with pytest.raises(InputError, match=r"data\.md5: the sample has none; use data\.sha256"):
        run_stage(workspace, data__md5="0" * 32)


@pytest.mark.parametrize("name", ["~nobody-of-that-name/images", "x" * 300])
def test_a_place_that_cannot_be_is_not_there(name: str, workspace: Path) -> None:
    with pytest.raises(InputError, match="is no file or folder here"):
        run_stage(workspace, data__source=name)


def test_an_unknown_source_names_the_choices(workspace: Path) -> None:
    with pytest.raises(InputError, match=r"did you mean 'imagenette2-160'\? \(valid: sample, imagenette2-160"):
        run_stage(workspace, data__source="imagenete2-160")
    assert not (workspace / "data").exists() or not list((workspace / "data").iterdir())


def members(workspace: Path, split: str) -> list[str]:
    with tarfile.open(workspace / f"data/raw/{split}.tar") as tar:
        return tar.getnames()


def further_files() -> dict[str, bytes]:
    """Labelled images of one of the two classes, of which val has another one."""
    return {f"{name}/{i}.jpg": encoded(picture(7000 + i)) for i in range(3) for name in ("train/cat", "val/dog")}


def test_extra_images_are_added_under_names_of_their_own(workspace: Path, tmp_path: Path) -> None:
    run_stage(workspace, data__source=str(write_files(tmp_path / "images", image_files())))
    alone, names = raw(workspace), {split: members(workspace, split) for split in ("train", "val")}
    assert "extra" not in json.loads(alone["source.json"])
    run_stage(workspace, data__extra=str(write_files(tmp_path / "extra", further_files())))
    both = raw(workspace)
    info, before = json.loads(both["source.json"]), json.loads(alone["source.json"])
    assert members(workspace, "train") == names["train"] + [f"cat/extra-{i}.jpg" for i in range(3)]
    assert members(workspace, "val") == names["val"] + [f"dog/extra-{i}.jpg" for i in range(3)]
    assert info["num_images"] == {"train": 11, "val": 7}
    assert info["extra"]["num_images"] == {"train": 3, "val": 3}
    assert info["classes"] == before["classes"]
    assert info["sha256"] != before["sha256"]
    assert sorted(both) == sorted(alone)
    # an archive of them gives the same bytes, also beside a compressed source; without them all is as before
    (tmp_path / "packed").mkdir()
    run_stage(workspace, data__extra=str(make_tgz(tmp_path / "packed", further_files())))
    assert raw(workspace) == both
    run_stage(workspace, data__source=str(make_tgz(tmp_path, image_files())))
    assert raw(workspace) == both
    run_stage(workspace, data__extra=None)
    assert raw(workspace) == alone


def test_the_checksum_of_extra_images_is_checked(workspace: Path, tmp_path: Path) -> None:
    source, extra = write_files(tmp_path / "images", image_files()), write_files(tmp_path / "extra", further_files())
    run_stage(workspace, data__source=str(source))
    own = json.loads(raw(workspace)["source.json"])["sha256"]
    # data.sha256 stays that of the source alone
    run_stage(workspace, data__extra=str(extra), data__sha256=own)
    content_hash = json.loads(raw(workspace)["source.json"])["extra"]["sha256"]
    run_stage(workspace, data__extra_sha256=content_hash.upper())
    with pytest.raises(
        InputError, match=rf"extra: content sha256 is {content_hash}, expected 0+ \(data\.extra_sha256\)"
    ):
        run_stage(workspace, data__extra_sha256="0" * 64)
    (tmp_path / "packed").mkdir()
    archive = make_zip(tmp_path / "packed", further_files())
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    run_stage(workspace, data__extra=str(archive), data__extra_sha256=sha256)
    with pytest.raises(InputError, match=rf"images\.zip: sha256 is {sha256}, expected f+ \(data\.extra_sha256\)"):
        run_stage(workspace, data__extra_sha256="f" * 64)
    with pytest.raises(InputError, match=r"data\.extra_sha256: there is no data\.extra"):
        run_stage(workspace, data__extra=None)


BAD_EXTRAS: dict[str, tuple[dict[str, bytes], str]] = {
    "unknown classes": (
        {"train/cow/0.jpg": b"", "val/cow/0.jpg": b""},
        r"unknown class cow \(the source's: cat, dog\)",
    ),
    "a text named .jpg": (
        {"train/cat/0.jpg": b"<html>", "val/cat/0.jpg": b""},
        r"train/cat/extra-0\.jpg: is not an im",
    ),
    "no val": ({"train/cat/0.jpg": b""}, "no folder has both"),
    "no image": ({"train/.DS_Store": b"", "val/cat/.DS_Store": b""}, "no image found"),
}


@pytest.mark.parametrize("case", BAD_EXTRAS)
def test_a_refused_extra_set_leaves_what_was_there(case: str, workspace: Path, tmp_path: Path) -> None:
    run_stage(workspace, data__source=str(write_files(tmp_path / "images", image_files())))
    before = raw(workspace)
    files, message = BAD_EXTRAS[case]
    if case == "no image":
        (tmp_path / "extra/train/cat").mkdir(parents=True)
    with pytest.raises(InputError, match=message):
        run_stage(workspace, data__extra=str(write_files(tmp_path / "extra", files)))
    assert raw(workspace) == before
    assert [path.name for path in (workspace / "data").iterdir()] == ["raw"]


def test_copies_across_train_and_val_and_classes_are_told_of(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = image_files()
    run_stage(workspace, data__source=str(write_files(tmp_path / "without", files)))
    assert capsys.readouterr().err == ""
    files["train/cat/again.jpg"] = files["train/cat/0.jpg"]  # does no harm
    files["train/dog/of-a-cat.jpg"] = files["train/cat/1.jpg"]
    files |= {f"val/cat/copy-{i}.jpg": files[f"train/cat/{i}.jpg"] for i in (0, 1)}
    run_stage(workspace, data__source=str(write_files(tmp_path / "with", files)))
    assert capsys.readouterr().err.splitlines() == [
        f"extract: {tmp_path / 'with'}: 2 images are in train and in val (val/cat/copy-0.jpg is train/cat/0.jpg, "
        "val/cat/copy-1.jpg is train/cat/1.jpg): accuracy is in part measured on what was trained on; keep each on one "
        "side",
        f"extract: {tmp_path / 'with'}: 1 image is in two classes (train/dog/of-a-cat.jpg is train/cat/1.jpg): only "
        "one label can be right",
    ]


def test_copies_that_extra_images_bring_are_told_of(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_files(tmp_path / "source", image_files())
    files = {"train/cat/a.jpg": image_files()["val/dog/0.jpg"], "val/cat/b.jpg": encoded(picture(999))}
    extra = write_files(tmp_path / "extra", files)
    run_stage(workspace, data__source=str(source), data__extra=str(extra))
    assert [line.split(": ")[2] for line in capsys.readouterr().err.splitlines()] == [
        "1 image is in train and in val (train/cat/extra-a.jpg is val/dog/0.jpg)",
        "1 image is in two classes (train/cat/extra-a.jpg is val/dog/0.jpg)",
    ]


def test_a_source_with_names_of_extra_images_is_refused(workspace: Path, tmp_path: Path) -> None:
    run_stage(workspace, data__source=str(write_files(tmp_path / "images", image_files())))
    with pytest.raises(InputError, match=r"data\.extra: 'sample' is no file or folder here"):
        run_stage(workspace, data__extra="sample")
    (tmp_path / "more.tar.dvc").touch()
    with pytest.raises(
        InputError, match=r"data\.extra: .*/more\.tar' is not here; DVC keeps it: `make pull` or `dvc ch"
    ):
        run_stage(workspace, data__extra=str(tmp_path / "more.tar"))
    write_files(tmp_path / "images", {"train/cat/extra-0.jpg": encoded(picture())})
    with pytest.raises(InputError, match=r"train/cat/extra-0\.jpg: no image of data\.source"):
        run_stage(workspace, data__extra=None)


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason="needs the Imagenette archive, which lies beside the checkout only in CI")
def test_the_real_archive(workspace: Path) -> None:
    run_stage(workspace, data__source=str(REAL), data__md5="dc379f182ca7c3284b10c9254f60c03f")
    info = json.loads(raw(workspace)["source.json"])
    assert info["num_images"] == {"train": 9469, "val": 3925}
    assert len(info["classes"]) == 10
