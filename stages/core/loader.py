"""Batches of a packed set: shuffled and augmented for training, in order and whole for evaluation.

The pixels come as uint8 from the device's memory (resident) or from the file, read ahead by threads (streamed); crops
are resized on the device. Which of the two it is, and how many threads read, changes no bit of a batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stages.core.augment import NUM_CROP_DRAWS, crop_and_resize, random_crops
from stages.core.dataset import PackMeta, Split, read_rows
from stages.core.errors import InputError
from stages.core.keyed import uniforms
from stages.core.parallel import read_ahead
from stages.core.recipe import TrainParams
from stages.core.runtime import Resident

_RESIDENT_SHARE = 0.4  # of the device's free memory that `resident: auto` takes at most
_COPIES_AHEAD = 4  # batches that the host may be ahead of a CUDA device, when not resident
_SIZE_INCREMENT = 16  # pixels; progressive resizing grows in such steps, of which each is a captured graph on a GPU
_GROWING_SHARE = 0.75  # of a run, in which progressive resizing grows


@dataclass(frozen=True)
class Source:
    """A split, and where its pixels are taken from."""

    split: Split
    device: torch.device
    resident: Tensor | None  # uint8 (N, H, W, 3) on the device
    threads: int  # that read ahead, when not resident

    def __len__(self) -> int:
        return len(self.split.labels)


class Shard(NamedTuple):
    """Which part of every batch this process computes."""

    rank: int = 0
    num_shards: int = 1


def open_source(split: Split, device: torch.device, resident: Resident, threads: int) -> Source:
    """Decide where a split's pixels come from, and copy them to the device if that is there.

    `auto`: resident on a CUDA device whose free memory is ample. InputError when `true` does not fit.
    """
    if resident == "auto":
        keep = device.type == "cuda" and split.images.nbytes < _RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]
    else:
        keep = resident
    pixels = None
    if keep:
        try:
            pixels = torch.empty(split.images.shape, dtype=torch.uint8, device=device)
        except RuntimeError:  # torch.OutOfMemoryError on CUDA, a plain RuntimeError on the CPU
            raise InputError(
                f"params.yaml: runtime.resident: the {split.images.nbytes / 1e9:.1f} GB of images do not fit on "
                f"{device}; use auto or false"
            ) from None
        for start in range(0, len(pixels), 1024):
            stop = min(start + 1024, len(pixels))
            rows = np.empty((stop - start, *split.images.shape[1:]), dtype=np.uint8)
            read_rows(split, np.arange(start, stop), rows)
            pixels[start:stop] = torch.from_numpy(rows)
    return Source(split, device, pixels, threads)


def num_batches(num_images: int, batch_size: int) -> int:
    """Training steps an epoch: whole batches only. InputError when there is not even one."""
    if num_images < batch_size:
        raise InputError(f"params.yaml: train.batch_size: {batch_size} is more than the {num_images} training images")
    return num_images // batch_size


def input_size(params: TrainParams, step: int, num_steps: int) -> int:
    """Side in pixels of the network's input at a training step; with `train.progressive` it grows with the steps.

    Linear from `train.progressive` to `train.image_size` over the first three quarters of the run, between them in
    multiples of 16 pixels (progressive resizing: fast.ai's DAWNBench entry, 2018).
    """
    share = step / (_GROWING_SHARE * num_steps)
    if params.progressive is None or share >= 1:
        return params.image_size
    size = params.progressive + share * (params.image_size - params.progressive)
    return min(params.image_size, max(params.progressive, round(size / _SIZE_INCREMENT) * _SIZE_INCREMENT))


def input_sizes(params: TrainParams) -> list[int]:
    """All that `input_size` can be in a run, in rising order."""
    first, last = input_size(params, 0, 1), params.image_size
    between = range((first // _SIZE_INCREMENT + 1) * _SIZE_INCREMENT, last, _SIZE_INCREMENT)
    return sorted({first, *between, last})


def training_batches(
    source: Source,
    meta: PackMeta,
    params: TrainParams,
    dtype: torch.dtype,
    epoch: int,
    first: int = 0,
    shard: Shard = Shard(),  # noqa: B008  # immutable
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch's batches from its step `first` on: normalised images (B, 3, size, size) of `dtype`, labels int64 (B,).

    The order is a permutation keyed by (seed, epoch); each image's augmentation is keyed by (seed, epoch, index). B is
    this process's share of `train.batch_size`.
    """
    steps_per_epoch = num_batches(len(source), params.batch_size)
    order = np.random.default_rng([params.seed, epoch]).permutation(len(source))
    part = params.batch_size // shard.num_shards

    def plan(step: int) -> _Plan:
        start = step * params.batch_size + shard.rank * part
        indices = order[start : start + part]
        draws = uniforms(params.seed, epoch, indices, NUM_CROP_DRAWS + 1)
        boxes = random_crops(draws[:, :-1], meta.image_size, params.crop_scale, params.crop_ratio)
        size = input_size(params, epoch * steps_per_epoch + step, params.epochs * steps_per_epoch)
        return _Plan(indices, boxes, draws[:, -1] < params.flip, size)

    for images, labels in _batches(source, plan, range(first, steps_per_epoch), dtype):
        yield normalise(images, meta.mean, meta.std), labels


def evaluation_batches(
    source: Source,
    mean: Sequence[float],
    std: Sequence[float],
    image_size: int,
    batch_size: int,
    dtype: torch.dtype,
    shard: Shard = Shard(),  # noqa: B008  # immutable
) -> Iterator[Tensor]:
    """All images of this process's part, in order, whole, resized to `image_size`: normalised (B, 3, size, size)."""
    side = source.split.images.shape[1]
    first, last = (len(source) * rank // shard.num_shards for rank in (shard.rank, shard.rank + 1))

    def plan(start: int) -> _Plan:
        indices = np.arange(start, min(start + batch_size, last))
        boxes = np.tile(np.array([0, 0, side, side]), (len(indices), 1))
        return _Plan(indices, boxes, np.zeros(len(indices), dtype=bool), image_size)

    for images, _ in _batches(source, plan, range(first, last, batch_size), dtype):
        yield normalise(images, mean, std)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images / 255 - mean) / std per channel of (N, C, H, W), values 0 to 255; channels_last, the dtype kept."""
    scale = 1 / (255 * torch.tensor(std, dtype=torch.float32)).view(1, -1, 1, 1)
    shift = 255 * torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1)
    scale, shift = _to_device(scale, images.device), _to_device(shift, images.device)
    return ((images - shift) * scale).to(images.dtype, memory_format=torch.channels_last)


class _Plan(NamedTuple):
    """What a batch is made of: rows of the pack, their boxes (B, 4), whether they are mirrored, the side in pixels."""

    indices: NDArray[np.int64]
    boxes: NDArray[np.int64]
    flips: NDArray[np.bool_]
    size: int


def _batches(
    source: Source, plan: Callable[[int], _Plan], steps: Iterable[int], dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (B, 3, size, size) of `dtype`, values 0 to 255, and labels (B,), on the source's device."""
    pinned = source.device.type == "cuda"  # copies from pinned memory do not stop the host
    shape = source.split.images.shape[1:]

    def read(step: int) -> tuple[_Plan, Tensor | None]:
        chosen = plan(step)
        if source.resident is not None:
            return chosen, None
        pixels = torch.empty((len(chosen.indices), *shape), dtype=torch.uint8, pin_memory=pinned)
        read_rows(source.split, chosen.indices, pixels.numpy())
        return chosen, pixels

    copied: deque[torch.cuda.Event] = deque()
    for chosen, pixels in read_ahead(read, steps, source.threads):
        if pixels is not None:
            images = pixels.to(source.device, non_blocking=True)
            if pinned:  # far ahead of the device, every batch would pin memory anew, which takes longer than its copy
                copied.append(torch.cuda.current_stream(source.device).record_event())
                if len(copied) > _COPIES_AHEAD:
                    copied.popleft().synchronize()
        else:
            assert source.resident is not None
            images = source.resident.index_select(0, _to_device(torch.from_numpy(chosen.indices), source.device))
        boxes = _to_device(torch.from_numpy(chosen.boxes), source.device)
        flips = _to_device(torch.from_numpy(chosen.flips), source.device)
        labels = _to_device(torch.from_numpy(source.split.labels[chosen.indices]), source.device)
        yield crop_and_resize(images, boxes, flips, chosen.size, dtype), labels


def _to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy without a wait of the host for the device."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
