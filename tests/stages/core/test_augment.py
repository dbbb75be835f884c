"""Augmentation against torchvision as the reference, and the independence that exact resuming rests on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2 import functional as reference

from stages.core.augment import NUM_CROP_DRAWS, crop_and_resize, random_crops
from stages.core.keyed import uniforms


def images(count: int = 4, size: int = 40) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8))


@pytest.mark.parametrize("out_size", [16, 32, 40, 64])
def test_crop_and_resize_is_torchvisions(out_size: int) -> None:
    batch = images()
    boxes = torch.tensor([[0, 0, 40, 40], [3, 5, 20, 30], [10, 0, 30, 7], [39, 39, 1, 1]])
    flips = torch.tensor([False, True, False, True])
    ours = crop_and_resize(batch, boxes, flips, out_size, torch.float32)
    for i, (top, left, height, width) in enumerate(boxes.tolist()):
        plane = batch[i].permute(2, 0, 1).float()
        expected = reference.resized_crop(plane, top, left, height, width, [out_size, out_size], antialias=True)
        if flips[i]:
            expected = expected.flip(2)
        torch.testing.assert_close(ours[i], expected, atol=2e-3, rtol=0)


def test_a_whole_image_of_the_right_size_passes_unchanged() -> None:
    batch = images(2)
    boxes = torch.tensor([[0, 0, 40, 40]] * 2)
    for dtype in (torch.float32, torch.bfloat16):
        out = crop_and_resize(batch, boxes, torch.zeros(2, dtype=torch.bool), 40, dtype)
        assert torch.equal(out.to(torch.uint8).permute(0, 2, 3, 1), batch)


def test_bfloat16_is_within_its_rounding() -> None:
    batch = images()
    boxes = torch.tensor([[3, 5, 20, 30]] * 4)
    flips = torch.zeros(4, dtype=torch.bool)
    exact = crop_and_resize(batch, boxes, flips, 32, torch.float32)
    rounded = crop_and_resize(batch, boxes, flips, 32, torch.bfloat16).float()
    assert (exact - rounded).abs().max() < 2.5  # of 255: three roundings of 2**-9


def test_random_crops_have_torchvisions_distribution() -> None:
    """Mean and spread of area and aspect ratio, and the edges that are reached."""
    size, scale, ratio = 160, [0.35, 1.0], [0.75, 1.333]
    boxes = random_crops(uniforms(0, 0, np.arange(20_000), NUM_CROP_DRAWS), size, scale, ratio)
    torch.manual_seed(0)
    image = torch.empty(3, size, size)
    transform = RandomResizedCrop(size, scale=(0.35, 1.0), ratio=(0.75, 1.333))
    drawn = [transform.make_params([image]) for _ in range(20_000)]
    expected = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in drawn])
    for column in range(4):
        ours, theirs = boxes[:, column], expected[:, column]
        assert abs(ours.mean() - theirs.mean()) < 0.8
        assert abs(ours.std() - theirs.std()) < 0.8
    area = boxes[:, 2] * boxes[:, 3]
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 0] + boxes[:, 2] <= size).all()
    assert (boxes[:, 1] + boxes[:, 3] <= size).all()
    assert area.min() > 0.33 * size * size


@pytest.mark.parametrize(("ratio", "box"), [([2.0, 3.0], [10, 0, 20, 40]), ([0.2, 0.5], [0, 10, 40, 20])])
def test_a_crop_that_never_fits_falls_back_to_the_centre(ratio: list[float], box: list[int]) -> None:
    boxes = random_crops(uniforms(0, 0, np.arange(5), NUM_CROP_DRAWS), 40, [1.0, 1.0], ratio)
    assert (boxes == box).all()


@pytest.mark.parametrize(("ratio", "box"), [([0.001, 0.005], [0, 19, 40, 1]), ([200.0, 1000.0], [19, 0, 1, 40])])
def test_a_crop_has_a_pixel(ratio: list[float], box: list[int]) -> None:
    boxes = random_crops(uniforms(0, 0, np.arange(5), NUM_CROP_DRAWS), 40, [1.0, 1.0], ratio)
    assert (boxes == box).all()
