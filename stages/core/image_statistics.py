"""What an image looks like, in a handful of numbers that need no model: light, colour, sharpness, noise, texture.

Each is a mean, a share or a log energy, so that a window's mean says what moved and by how much.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from numpy.typing import NDArray
from torch import Tensor

STATISTICS = (
    "brightness",  # mean luma
    "contrast",  # standard deviation of the luma
    "shadows",  # luma that 5 % of the pixels are below
    "highlights",  # luma that 5 % of the pixels are above
    "haze",  # mean of the dark channel: the least of the three colours (He, Sun and Tang 2009)
    "saturation",  # mean of HSV saturation
    "red_cast",  # log of mean red to mean green
    "blue_cast",  # log of mean blue to mean green
    "noise",  # log noise level of Immerkaer 1996: blind to edges and ramps
    "colour_noise",  # the same of red minus green
    "speckles",  # share of pixels that stand out from all four neighbours
    "sharpness",  # log energy of the finest octave of a Laplacian pyramid (Burt and Adelson 1983)
    "detail",  # of the second octave
    "structure",  # of the third
    "flatness",  # share of neighbours of equal luma
    "direction",  # of gradients: log ratio of the strongest to the weakest of four orientations
    "blocks",  # log ratio of steps on the 8x8 grid of JPEG to steps beside it
)
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_FLOOR = 1e-3  # of energies before their logarithm; a quarter of a grey level
_BATCH = 64


def image_statistics(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """STATISTICS of uint8 RGB images (N, H, W, 3), sides of at least 8 pixels: float32 (N, len(STATISTICS))."""
    parts = [_of_batch(images[start : start + _BATCH]) for start in range(0, len(images), _BATCH)]
    return np.concatenate(parts) if parts else np.zeros((0, len(STATISTICS)), dtype=np.float32)


def _of_batch(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    colours = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 255
    red, green, blue = colours.unbind(1)
    luma = sum(weight * channel for weight, channel in zip(_LUMA, (red, green, blue), strict=True))
    assert isinstance(luma, Tensor)
    largest, least = colours.amax(1), colours.amin(1)
    pixels = luma.flatten(1)
    ordered = luma[:, ::2, ::3].flatten(1).sort(dim=1).values  # a sixth of the pixels is enough for two quantiles
    means = colours.mean((2, 3)) + _FLOOR
    fine, half = _octave(luma)
    middle, quarter = _octave(half)
    coarse, _ = _octave(quarter)
    step_x, step_y = luma[:, :, 1:] - luma[:, :, :-1], luma[:, 1:] - luma[:, :-1]
    slope_down, slope_up = luma[:, 1:, 1:] - luma[:, :-1, :-1], luma[:, 1:, :-1] - luma[:, :-1, 1:]
    steps = torch.stack([_mean_size(step) for step in (step_x, step_y, slope_down, slope_up)], dim=1)
    steps[:, 2:] *= 0.5**0.5  # their neighbours are farther apart
    values = [
        pixels.mean(1),
        pixels.std(1),
        ordered[:, int(0.05 * ordered.shape[1])],
        ordered[:, int(0.95 * ordered.shape[1])],
        least.flatten(1).mean(1),
        ((largest - least) / (largest + _FLOOR)).flatten(1).mean(1),
        torch.log(means[:, 0] / means[:, 1]),
        torch.log(means[:, 2] / means[:, 1]),
        torch.log(_noise(luma) + _FLOOR),
        torch.log(_noise(red - green) + _FLOOR),
        _speckles(luma),
        torch.log(_deviation(fine) + _FLOOR),
        torch.log(_deviation(middle) + _FLOOR),
        torch.log(_deviation(coarse) + _FLOOR),
        (_share_of_flat(step_x) + _share_of_flat(step_y)) / 2,
        torch.log((steps.amax(1) + _FLOOR) / (steps.amin(1) + _FLOOR)),
        _blocks(step_x, step_y),
    ]
    return torch.stack(values, dim=1).numpy()


def _octave(luma: Tensor) -> tuple[Tensor, Tensor]:
    """The detail (N, H, W) that halving the resolution loses, and the halved image."""
    half = F.avg_pool2d(luma[:, None], 2)
    back = F.interpolate(half, size=luma.shape[1:], mode="bilinear", align_corners=False)
    return luma - back[:, 0], half[:, 0]


def _noise(plane: Tensor) -> Tensor:
    """Noise level (N,) of planes (N, H, W): the mean response to a mask that is blind to ramps (Immerkaer 1996)."""
    rows = plane[:, 2:] - 2 * plane[:, 1:-1] + plane[:, :-2]
    response = rows[:, :, 2:] - 2 * rows[:, :, 1:-1] + rows[:, :, :-2]
    level: Tensor = response.abs().flatten(1).mean(1) * (np.pi / 2) ** 0.5 / 6
    return level


def _speckles(luma: Tensor) -> Tensor:
    """Share (N,) of pixels that are far above the highest or below the lowest of their four neighbours."""
    neighbours = (luma[:, 1:-1, 2:], luma[:, 1:-1, :-2], luma[:, 2:, 1:-1], luma[:, :-2, 1:-1])
    around = torch.stack(neighbours)
    centre = luma[:, 1:-1, 1:-1]
    outside = torch.maximum(centre - around.amax(0), around.amin(0) - centre)
    return (outside > 0.1).flatten(1).float().mean(1)


def _blocks(step_x: Tensor, step_y: Tensor) -> Tensor:
    """How much larger steps are on the borders of 8x8 blocks than beside them, as a logarithm (N,)."""
    if step_x.shape[2] < 8 or step_y.shape[1] < 8:  # one block
        return torch.zeros(len(step_x))
    on = _mean_size(step_x[:, :, 7::8]) + _mean_size(step_y[:, 7::8])
    beside = _mean_size(step_x[:, :, 3::8]) + _mean_size(step_y[:, 3::8])
    return torch.log((on + _FLOOR) / (beside + _FLOOR))


def _share_of_flat(step: Tensor) -> Tensor:
    return (step.abs() < 0.5 / 255).flatten(1).float().mean(1)


def _mean_size(step: Tensor) -> Tensor:
    return step.abs().flatten(1).mean(1)


def _deviation(detail: Tensor) -> Tensor:
    return detail.flatten(1).std(1)
