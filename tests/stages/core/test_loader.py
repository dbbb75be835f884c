from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.core.dataset import PackMeta, Split
from stages.core.errors import InputError
from stages.core.loader import (
    Shard,
    Source,
    evaluation_batches,
    input_size,
    input_sizes,
    normalise,
    num_batches,
    open_source,
    training_batches,
)
from stages.core.params import load_params
from stages.core.recipe import TrainParams
from stages.train import Params
from tests.helpers import DEFAULT_PARAMS

CPU = torch.device("cpu")
COUNT, SIZE = 50, 24


@pytest.fixture
def split() -> Split:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, size=(COUNT, SIZE, SIZE, 3), dtype=np.uint8)
    return Split(images, np.arange(COUNT, dtype=np.int64))  # the label is the index: batches tell who is in them


@pytest.fixture
def meta() -> PackMeta:
    return PackMeta(
        classes=[str(i) for i in range(COUNT)],
        class_ids=[str(i) for i in range(COUNT)],
        image_size=SIZE,
        crop_mode="center",
        interpolation="bilinear",
        num_images={"train": COUNT, "val": COUNT},
        num_per_class={},
        skipped={},
        mean=[0.4, 0.5, 0.6],
        std=[0.2, 0.25, 0.3],
        sha256="",
        labels_sha256={},
        source_sha256="",
    )


def params(**changes: object) -> TrainParams:
    base = load_params(Params, DEFAULT_PARAMS).train
    return base.model_copy(update={"image_size": 16, "batch_size": 8} | changes)


def source_of(split: Split) -> Source:
    return open_source(split, CPU, resident=False, threads=0)


def epoch(split: Split, meta: PackMeta, number: int = 0, **changes: object) -> tuple[list[int], torch.Tensor]:
    batches = list(training_batches(source_of(split), meta, params(**changes), torch.float32, number))
    return torch.cat([labels for _, labels in batches]).tolist(), torch.cat([images for images, _ in batches])


def test_an_epoch_shows_each_image_once_in_a_new_order(split: Split, meta: PackMeta) -> None:
    first, second = epoch(split, meta, 0)[0], epoch(split, meta, 1)[0]
    assert len(set(first)) == len(first) == 48  # whole batches of 8
    assert first != sorted(first)
    assert first != second


def test_images_do_not_depend_on_the_batch_size(split: Split, meta: PackMeta) -> None:
    labels, images = epoch(split, meta)
    other_labels, other_images = epoch(split, meta, batch_size=12)
    assert labels == other_labels
    torch.testing.assert_close(images, other_images, atol=1e-5, rtol=0)


def test_seed_and_epoch_change_the_images(split: Split, meta: PackMeta) -> None:
    labels, images = epoch(split, meta)
    for other_labels, other_images in (epoch(split, meta, 1), epoch(split, meta, seed=5)):
        assert labels != other_labels
        mine, theirs = images[labels.index(7)], other_images[other_labels.index(7)]
        assert not torch.allclose(mine, theirs)


def test_without_augmentation_an_image_comes_through_whole(split: Split, meta: PackMeta) -> None:
    labels, images = epoch(split, meta, image_size=SIZE, crop_scale=[1.0, 1.0], crop_ratio=[1.0, 1.0], flip=0.0)
    expected = normalise(torch.from_numpy(split.images[labels]).permute(0, 3, 1, 2).float(), meta.mean, meta.std)
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)
    _, flipped = epoch(split, meta, image_size=SIZE, crop_scale=[1.0, 1.0], crop_ratio=[1.0, 1.0], flip=1.0)
    torch.testing.assert_close(flipped, expected.flip(3), atol=1e-5, rtol=0)


def test_flips_happen_as_often_as_asked(split: Split, meta: PackMeta) -> None:
    whole: Any = {"image_size": SIZE, "crop_scale": [1.0, 1.0], "crop_ratio": [1.0, 1.0]}
    plain = dict(zip(*epoch(split, meta, flip=0.0, **whole), strict=True))
    num_flipped = sum(
        not torch.allclose(image, plain[label])
        for number in range(10)
        for label, image in zip(*epoch(split, meta, number, flip=0.25, **whole), strict=True)
        if label in plain
    )
    assert 80 < num_flipped < 160  # of about 460, a quarter is 115


def test_normalisation() -> None:
    images = torch.full((1, 3, 2, 2), 255.0)
    out = normalise(images, [0.5, 0.25, 0.0], [0.5, 0.25, 2.0])
    assert out[0, :, 0, 0].tolist() == pytest.approx([1.0, 3.0, 0.5])
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_evaluation_sees_every_image_whole_and_in_order(split: Split, meta: PackMeta) -> None:
    batches = list(evaluation_batches(source_of(split), meta.mean, meta.std, SIZE, 16, torch.float32))
    assert [len(batch) for batch in batches] == [16, 16, 16, 2]
    expected = normalise(torch.from_numpy(split.images).permute(0, 3, 1, 2).float(), meta.mean, meta.std)
    torch.testing.assert_close(torch.cat(batches), expected, atol=1e-5, rtol=0)


def test_a_batch_larger_than_the_data_is_refused() -> None:
    assert num_batches(100, 30) == 3
    with pytest.raises(InputError, match=r"train\.batch_size: 64 is more than the 10 training images"):
        num_batches(10, 64)


@pytest.fixture
def mapped(split: Split, tmp_path: Path) -> Split:
    np.save(tmp_path / "images.npy", split.images)
    checksums = np.array([zlib.crc32(image.data) for image in split.images], dtype=np.uint32)
    return Split(np.load(tmp_path / "images.npy", mmap_mode="r"), split.labels, checksums)


@pytest.mark.parametrize("threads", [0, 1, 2])
@pytest.mark.parametrize("resident", [False, True])
def test_where_pixels_come_from_changes_no_bit(
    resident: bool, threads: int, split: Split, mapped: Split, meta: PackMeta
) -> None:
    expected = list(training_batches(source_of(split), meta, params(), torch.bfloat16, 1))
    source = open_source(mapped, CPU, resident, threads)
    assert (source.resident is not None) == resident
    found = list(training_batches(source, meta, params(), torch.bfloat16, 1))
    for (images, labels), (other_images, other_labels) in zip(expected, found, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


@pytest.mark.parametrize("resident", [False, True])
def test_altered_pixels_end_the_epoch(resident: bool, mapped: Split, meta: PackMeta) -> None:
    assert mapped.checksums is not None
    altered = mapped._replace(checksums=mapped.checksums ^ (np.arange(COUNT) == 17).astype(np.uint32))
    with pytest.raises(InputError, match=r"images\.npy: image 17 altered since preprocess wrote it"):
        list(training_batches(open_source(altered, CPU, resident, 1), meta, params(), torch.bfloat16, 1))


def test_an_epoch_goes_on_in_the_middle(split: Split, meta: PackMeta) -> None:
    whole = list(training_batches(source_of(split), meta, params(), torch.float32, 2))
    rest = list(training_batches(source_of(split), meta, params(), torch.float32, 2, first=4))
    assert len(rest) == 2
    assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[4:], rest, strict=True))


def test_shards_are_the_parts_of_a_batch(split: Split, meta: PackMeta) -> None:
    whole = list(training_batches(source_of(split), meta, params(), torch.float32, 0))
    shards = [
        list(training_batches(source_of(split), meta, params(), torch.float32, 0, shard=Shard(rank, 2)))
        for rank in range(2)
    ]
    for (images, labels), *parts in zip(whole, *shards, strict=True):
        assert torch.equal(labels, torch.cat([part[1] for part in parts]))
        torch.testing.assert_close(images, torch.cat([part[0] for part in parts]), atol=1e-5, rtol=0)


def test_shards_of_an_evaluation_are_all_images_once(split: Split, meta: PackMeta) -> None:
    def images(shard: Shard) -> torch.Tensor:
        args = (meta.mean, meta.std, SIZE, 16, torch.float32, shard)
        return torch.cat(list(evaluation_batches(source_of(split), *args)))

    parts = [images(Shard(rank, 3)) for rank in range(3)]
    assert [len(part) for part in parts] == [16, 17, 17]
    torch.testing.assert_close(torch.cat(parts), images(Shard()), atol=1e-5, rtol=0)


def test_progressive_sizes_grow_from_the_first_to_the_last_in_steps_of_16() -> None:
    recipe = params(image_size=128, progressive=64)
    sizes = [input_size(recipe, step, 100) for step in range(100)]
    assert sizes[0] == 64
    assert set(sizes) == {64, 80, 96, 112, 128}
    assert sizes == sorted(sizes)
    assert set(sizes[75:]) == {128}
    assert {input_size(params(image_size=100), step, 10) for step in range(10)} == {100}
    odd = params(image_size=72, progressive=40)
    assert input_size(odd, 99, 100) == 72
    assert [input_size(odd, step, 100) for step in (0, 10, 30, 70)] == [40, 48, 48, 64]
    assert {input_size(params(image_size=8, progressive=8), step, 10) for step in range(10)} == {8}
    for first, last in ((64, 128), (40, 72), (48, 50), (20, 31), (8, 8), (9, 160)):
        recipe = params(image_size=last, progressive=first)
        assert input_sizes(recipe) == sorted({input_size(recipe, step, 1000) for step in range(1000)})
    assert input_sizes(params(image_size=100)) == [100]


def test_progressive_batches_have_the_size_of_their_step(split: Split, meta: PackMeta) -> None:
    recipe = params(image_size=48, progressive=16, epochs=2)
    batches = [
        images.shape[-1]
        for number in range(2)
        for images, _ in training_batches(source_of(split), meta, recipe, torch.float32, number)
    ]
    assert batches == [input_size(recipe, step, 12) for step in range(12)]
    assert len(set(batches)) == 3


def test_a_pack_that_ends_early_is_told(mapped: Split, meta: PackMeta) -> None:
    path = Path(str(mapped.images.filename))  # type: ignore[attr-defined]
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 10)
    with pytest.raises(InputError, match=r"images\.npy: ends before image \d+; run `dvc repro preprocess`"):
        list(training_batches(source_of(mapped), meta, params(batch_size=50), torch.float32, 0))
