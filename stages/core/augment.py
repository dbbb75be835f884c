"""Batched augmentation: random resized crop and flip of whole uint8 batches, on the device of the batch.

A crop, its antialiased resize and its flip are one linear map per axis, so a batch is two batched matrix products
(the formulation of jax.image.scale_and_translate).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_NUM_TRIES = 10  # of a crop that fits, as in torchvision.transforms.RandomResizedCrop


def random_crops(
    draws: NDArray[np.float64], size: int, scale: Sequence[float], ratio: Sequence[float]
) -> NDArray[np.int64]:
    """Boxes (top, left, height, width), int64 (N, 4), inside square images of `size` pixels.

    The distribution of torchvision.transforms.RandomResizedCrop: area share uniform in `scale`, aspect ratio
    log-uniform in `ratio`, the first of ten tries that fits, else a centred crop. `draws`: uniforms (N, 22).
    """
    areas = size * size * (scale[0] + (scale[1] - scale[0]) * draws[:, 0:_NUM_TRIES])
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    ratios = np.exp(log_low + (log_high - log_low) * draws[:, _NUM_TRIES : 2 * _NUM_TRIES])
    widths = np.rint(np.sqrt(areas * ratios)).astype(np.int64)
    heights = np.rint(np.sqrt(areas / ratios)).astype(np.int64)
    fits = (widths > 0) & (widths <= size) & (heights > 0) & (heights <= size)
    rows, first = np.arange(len(draws)), fits.argmax(axis=1)
    fitted = fits.any(axis=1)  # elsewhere: the whole side, cut to the nearest aspect ratio that is allowed
    width = np.where(fitted, widths[rows, first], max(1, round(size * min(ratio[1], 1.0))))
    height = np.where(fitted, heights[rows, first], max(1, round(size / max(ratio[0], 1.0))))
    top = np.where(fitted, np.floor(draws[:, -2] * (size - height + 1)), (size - height) // 2).astype(np.int64)
    left = np.where(fitted, np.floor(draws[:, -1] * (size - width + 1)), (size - width) // 2).astype(np.int64)
    return np.stack([top, left, height, width], axis=1)


NUM_CROP_DRAWS = 2 * _NUM_TRIES + 2


def crop_and_resize(images: Tensor, boxes: Tensor, flips: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Crop each image to its box, resize it to (size, size) with antialiasing, mirror it where asked.

    images: uint8 (N, H, W, 3). boxes: (N, 4) of top, left, height, width in whole pixels. flips: bool (N,).
    Returns (N, 3, size, size) of `dtype`, values 0 to 255. In float32 it agrees with torchvision's bilinear
    `resized_crop(antialias=True)` to rounding.
    """
    num_images, height, width, channels = images.shape
    boxes = boxes.to(torch.float32)
    vertical = resize_matrix(boxes[:, 0], boxes[:, 2], size, height).to(dtype)
    horizontal = resize_matrix(boxes[:, 1], boxes[:, 3], size, width)
    horizontal = torch.where(flips[:, None, None], horizontal.flip(1), horizontal).to(dtype)
    planes = images.permute(0, 3, 1, 2).to(dtype, memory_format=torch.contiguous_format)
    rows = torch.bmm(planes.reshape(num_images, channels * height, width), horizontal.transpose(1, 2))
    return torch.matmul(vertical[:, None], rows.view(num_images, channels, height, size))


def resize_matrix(start: Tensor, length: Tensor, out_size: int, in_size: int) -> Tensor:
    """Weights (N, out_size, in_size), float32: each output pixel's triangle filter over the input, inside its box."""
    scale = length / out_size
    positions = torch.arange(in_size, device=start.device) + 0.5
    centres = start[:, None] + (torch.arange(out_size, device=start.device) + 0.5) * scale[:, None]
    distance = (positions - centres[:, :, None]).abs() / scale.clamp(min=1.0)[:, None, None]
    inside = (positions > start[:, None]) & (positions < (start + length)[:, None])
    weights = (1 - distance).clamp_(min=0) * inside[:, None, :]
    return weights / weights.sum(dim=2, keepdim=True)
