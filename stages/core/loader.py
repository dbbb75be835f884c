"""Batches of a packed set: shuffled and augmented for training, in order and whole for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.core.augment import NUM_CROP_DRAWS, crop_and_resize, random_crops, uniforms
from stages.core.dataset import PackMeta, Split
from stages.core.errors import InputError
from stages.core.recipe import TrainParams


def num_batches(num_images: int, batch_size: int) -> int:
    """Training steps an epoch: whole batches only. InputError when there is not even one."""
    if num_images < batch_size:
        raise InputError(f"params.yaml: train.batch_size: {batch_size} is more than the {num_images} training images")
    return num_images // batch_size


def training_batches(
    split: Split, meta: PackMeta, params: TrainParams, epoch: int, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch's batches on `device`: normalised images (B, 3, size, size) of `dtype`, labels int64 (B,).

    The order is a permutation keyed by (seed, epoch); each image's augmentation is keyed by (seed, epoch, index).
    """
    count = len(split.labels)
    order = np.random.default_rng([params.seed, epoch]).permutation(count)
    for step in range(num_batches(count, params.batch_size)):
        indices = order[step * params.batch_size : (step + 1) * params.batch_size]
        draws = uniforms(params.seed, epoch, indices, NUM_CROP_DRAWS + 1)
        boxes = random_crops(draws[:, :-1], meta.image_size, params.crop_scale, params.crop_ratio)
        images = _to_input(split, indices, boxes, draws[:, -1] < params.flip, params.image_size, device, dtype)
        yield normalise(images, meta.mean, meta.std), torch.from_numpy(split.labels[indices]).to(device)


def evaluation_batches(
    split: Split,
    mean: Sequence[float],
    std: Sequence[float],
    image_size: int,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[Tensor]:
    """All images in order, whole and resized to `image_size`: normalised (B, 3, size, size) of `dtype`."""
    count, side = split.images.shape[:2]
    for start in range(0, count, batch_size):
        indices = np.arange(start, min(start + batch_size, count))
        boxes = np.tile(np.array([0, 0, side, side]), (len(indices), 1))
        flips = np.zeros(len(indices), dtype=bool)
        yield normalise(_to_input(split, indices, boxes, flips, image_size, device, dtype), mean, std)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images / 255 - mean) / std per channel of (N, C, H, W), values 0 to 255; channels_last, the dtype kept."""
    scale = 1 / (255 * torch.tensor(std, device=images.device, dtype=torch.float32)).view(1, -1, 1, 1)
    shift = 255 * torch.tensor(mean, device=images.device, dtype=torch.float32).view(1, -1, 1, 1)
    return ((images - shift) * scale).to(images.dtype, memory_format=torch.channels_last)


def _to_input(
    split: Split,
    indices: NDArray[np.int64],
    boxes: NDArray[np.int64],
    flips: NDArray[np.bool_],
    size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    images = torch.from_numpy(split.images[indices]).to(device)
    box_tensor, flip_tensor = torch.from_numpy(boxes).to(device), torch.from_numpy(flips).to(device)
    return crop_and_resize(images, box_tensor, flip_tensor, size, dtype)
