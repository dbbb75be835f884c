from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages import extract, preprocess
from stages.core.dataset import Split, check_images, load_meta, load_split, read_rows
from stages.core.errors import InputError
from stages.core.image import decode
from stages.core.params import load_params
from tests.helpers import encoded, image_files, picture, set_params, truncated, write_files


def run_stages(workspace: Path, files: dict[str, bytes] | None = None, **overrides: object) -> None:
    set_params(workspace / "params.yaml", {key.replace("__", "."): value for key, value in overrides.items()})
    if files is not None:
        write_files(workspace / "source", files)
        set_params(workspace / "params.yaml", {"data.source": str(workspace / "source")})
    extract.main(load_params(extract.Params))
    preprocess.main(load_params(preprocess.Params))


def processed(workspace: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (workspace / "data/processed").iterdir()}


def test_the_pack_holds_every_image_at_its_place(workspace: Path) -> None:
    run_stages(workspace, sample__train_images=70)
    meta = load_meta()
    names = json.loads((workspace / "data/processed/files.json").read_text())
    for name in ("train", "val"):
        split = load_split(name, meta)
        assert not split.images.flags.writeable
        with tarfile.open(workspace / f"data/raw/{name}.tar") as tar:
            for i, member in enumerate(tar):
                file = tar.extractfile(member)
                assert file is not None
                assert names[name][i] == member.name
                assert meta.class_ids[split.labels[i]] == member.name.split("/")[0]
                assert np.array_equal(split.images[i], decode(file.read(), member.name, 32))
    pixels = load_split("train", meta).images.reshape(-1, 3) / 255
    assert meta.mean == pytest.approx(pixels.mean(axis=0), abs=1e-5)
    assert meta.std == pytest.approx(pixels.std(axis=0), abs=1e-5)
    assert meta.num_per_class == {"train": [7] * 10, "val": [6] * 10}
    assert meta.source_sha256 == json.loads((workspace / "data/raw/source.json").read_text())["sha256"]


def test_the_pack_is_the_same_for_any_number_of_workers(workspace: Path) -> None:
    run_stages(workspace, sample__train_images=100)
    first = processed(workspace)
    run_stages(workspace, runtime__workers=2)
    assert processed(workspace) == first
    assert sorted(first) == [
        "files.json", "meta.json", "train_crc32.npy", "train_images.npy", "train_labels.npy",
        "val_crc32.npy", "val_images.npy", "val_labels.npy",
    ]  # fmt: skip


def test_wordnet_ids_get_readable_names(workspace: Path) -> None:
    run_stages(workspace, image_files(classes=("n01440764", "n03888257", "other")))
    assert load_meta().classes == ["tench", "parachute", "other"]
    assert load_meta().class_ids == ["n01440764", "n03888257", "other"]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_stops_the_run_by_name(workers: int, workspace: Path) -> None:
    run_stages(workspace)
    before = processed(workspace)
    files = image_files(num_train=40)
    files["train/dog/3.jpg"] = truncated(files["train/dog/3.jpg"])
    with pytest.raises(InputError, match=r"train/dog/3\.jpg: cannot be decoded.*preprocess\.on_bad_image"):
        run_stages(workspace, files, runtime__workers=workers)
    assert processed(workspace) == before
    assert sorted(path.name for path in (workspace / "data").iterdir()) == ["processed", "raw"]


def test_unreadable_images_are_skipped_and_listed_where_asked(workspace: Path) -> None:
    files = image_files()
    for name in ("train/dog/0.jpg", "train/dog/2.jpg", "val/cat/1.jpg"):
        files[name] = truncated(files[name])
    run_stages(workspace, files, preprocess__on_bad_image="skip")
    meta = load_meta()
    assert meta.skipped == {"train": ["train/dog/0.jpg", "train/dog/2.jpg"], "val": ["val/cat/1.jpg"]}
    assert meta.num_images == {"train": 6, "val": 3}
    train = load_split("train", meta)
    assert train.labels.tolist() == [0, 0, 0, 0, 1, 1]
    for row, name in zip((4, 5), ("train/dog/1.jpg", "train/dog/3.jpg"), strict=True):
        assert np.array_equal(train.images[row], decode(files[name], name, 32))
    check_images(train)


def test_a_class_without_any_readable_image_is_refused(workspace: Path) -> None:
    files = image_files()
    for i in range(2):
        files[f"val/cat/{i}.jpg"] = truncated(files[f"val/cat/{i}.jpg"])
    with pytest.raises(InputError, match="val: no readable image of class 'cat' is left"):
        run_stages(workspace, files, preprocess__on_bad_image="skip")


def test_images_of_many_sizes_and_modes_fit_in(workspace: Path) -> None:
    files = image_files()
    files["train/cat/wide.png"] = encoded(picture(size=(200, 10)), "PNG")
    files["train/cat/dot.png"] = encoded(picture(size=(1, 1)), "PNG")
    files["train/dog/grey.png"] = encoded(picture(mode="L"), "PNG")
    files["train/dog/cmyk.jpg"] = encoded(picture(mode="CMYK"))
    run_stages(workspace, files)
    assert load_split("train", load_meta()).images.shape == (12, 32, 32, 3)


@pytest.mark.parametrize("bits", [12, 16])
def test_images_of_fewer_bits_than_their_files_are_told_of(
    bits: int, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = np.random.default_rng(0).integers(0, 2**bits, (20, 20)).astype(np.uint16)
    image = encoded(Image.fromarray(values), "PNG")
    run_stages(workspace, {f"{split}/{label}/1.png": image for split in ("train", "val") for label in ("cat", "dog")})
    assert load_meta().mean == pytest.approx([0.5 * 2**bits / 2**16] * 3, abs=0.03)
    assert ("the training images are nearly black (at most 0.03" in capsys.readouterr().err) == (bits == 12)


def test_missing_input_says_what_to_run(workspace: Path) -> None:
    with pytest.raises(InputError, match=r"data/raw/source\.json: not found; run `dvc repro extract`"):
        preprocess.main(load_params(preprocess.Params))


def test_altered_pixels_and_labels_are_refused(workspace: Path) -> None:
    run_stages(workspace)
    meta = load_meta()
    split = load_split("val", meta)
    check_images(split)
    path = workspace / "data/processed/val_images.npy"
    images = np.load(path)
    images[41, 3, 5, 1] ^= 1
    np.save(path, images)
    altered = load_split("val", meta)
    pixels = np.empty((2, 32, 32, 3), dtype=np.uint8)
    read_rows(altered, np.array([40, 42]), pixels)
    with pytest.raises(InputError, match=r"val_images\.npy: image 41 altered since preprocess.*tools\.verify"):
        read_rows(altered, np.array([40, 41]), pixels)
    with pytest.raises(InputError, match=r"val_images\.npy: image 41 altered since preprocess"):
        check_images(altered)
    in_memory = Split(images, split.labels, split.checksums)
    with pytest.raises(InputError, match="image 41 altered"):
        check_images(in_memory)
    labels = split.labels.copy()
    labels[7] = (labels[7] + 1) % 10
    np.save(workspace / "data/processed/val_labels.npy", labels)
    with pytest.raises(InputError, match=r"val_labels\.npy: altered since preprocess wrote it"):
        load_split("val", meta)


def test_arrays_that_do_not_fit_their_description_are_refused(workspace: Path) -> None:
    run_stages(workspace)
    meta = load_meta()
    folder = workspace / "data/processed"
    split = load_split("val", meta)
    split = split._replace(images=np.array(split.images))
    np.save(folder / "val_labels.npy", np.full(20, 10))
    with pytest.raises(InputError, match=r"val_labels\.npy: labels must be 60 numbers from 0 to 9"):
        load_split("val", meta)
    np.save(folder / "val_images.npy", np.zeros((3, 32, 32, 3), dtype=np.uint8))
    with pytest.raises(InputError, match="meta.json says 60 images of 32 px"):
        load_split("val", meta)
    np.save(folder / "val_images.npy", split.images)
    np.save(folder / "val_labels.npy", split.labels)
    np.save(folder / "val_crc32.npy", np.zeros(3, dtype=np.uint32))
    with pytest.raises(InputError, match=r"val_crc32\.npy: uint32 \(3,\), not a uint32 of each of 60 images"):
        load_split("val", meta)
    (folder / "val_images.npy").write_bytes(b"")
    with pytest.raises(InputError, match="run `dvc repro preprocess`"):
        load_split("val", meta)
    (folder / "meta.json").write_text("{}")
    with pytest.raises(InputError, match=r"meta\.json: not written by this version"):
        load_meta()
