"""What the benchmark compares with: the training loop and the preprocessing that people write by hand."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from stages.core.device import synchronize
from stages.core.recipe import TrainParams

_PREFETCH = 2  # batches a worker of the DataLoader, its default
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


class PlainLoop:
    """ImageFolder, worker processes, PIL transforms, a float32 NCHW model, AdamW: no averaging, no mixed precision."""

    def __init__(
        self, folder: Path, architecture: str, params: TrainParams, device: torch.device, num_workers: int
    ) -> None:
        transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(
                    params.image_size, scale=tuple(params.crop_scale), ratio=tuple(params.crop_ratio)
                ),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(_MEAN, _STD),
            ]
        )
        images = ImageFolder(str(folder), transform)
        self._loader: DataLoader[tuple[Tensor, Tensor]] = DataLoader(
            images,
            batch_size=params.batch_size,
            shuffle=True,
            num_workers=num_workers,
            drop_last=True,
            pin_memory=device.type == "cuda",
            persistent_workers=num_workers > 0,
            prefetch_factor=_PREFETCH if num_workers else None,
        )
        self._num_ahead = _PREFETCH * num_workers
        self._batches = self._endless()
        self._batch_size, self._image_size = params.batch_size, params.image_size
        self._device = device
        self._model = timm.create_model(architecture, pretrained=False, num_classes=len(images.classes)).to(device)
        self._loss = nn.CrossEntropyLoss()
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=params.lr, weight_decay=params.weight_decay)

    def train(self, num_steps: int) -> float:
        """Images per second of training steps, loading included, after one step that is not timed."""
        with _ordinary_algorithms():
            self._step()
            synchronize(self._device)
            start = time.perf_counter()
            for _ in range(num_steps):
                self._step()
            synchronize(self._device)
        return num_steps * self._batch_size / (time.perf_counter() - start)

    def fit(self, num_epochs: int) -> None:
        """Train for whole epochs, the learning rate falling to 0 on a cosine."""
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimizer, num_epochs * len(self._loader))
        with _ordinary_algorithms():
            for number in range(1, num_epochs + 1):
                for _ in range(len(self._loader)):
                    self._step()
                    schedule.step()
                print(f"plain loop: epoch {number}/{num_epochs}", flush=True)

    @torch.inference_mode()
    def accuracy(self, folder: Path) -> float:
        """Top-1 share of the images of another folder, squeezed to the size of the network's input."""
        size = self._image_size
        transform = transforms.Compose(
            [transforms.Resize((size, size)), transforms.ToTensor(), transforms.Normalize(_MEAN, _STD)]
        )
        images = ImageFolder(str(folder), transform)
        loader: DataLoader[tuple[Tensor, Tensor]] = DataLoader(
            images, batch_size=self._batch_size, num_workers=self._loader.num_workers
        )
        self._model.eval()
        right = sum(
            int((self._model(batch.to(self._device)).argmax(dim=1).cpu() == labels).sum()) for batch, labels in loader
        )
        self._model.train()
        return right / len(images)

    def load(self, num_steps: int) -> float:
        """Images per second of the loader alone, when the batches that it had ready are used up."""
        for _ in range(self._num_ahead + 1):
            next(self._batches)
        start = time.perf_counter()
        for _ in range(num_steps):
            images, _ = next(self._batches)
            images.to(self._device, non_blocking=True)
        synchronize(self._device)
        return num_steps * self._batch_size / (time.perf_counter() - start)

    def _step(self) -> None:
        images, labels = (tensor.to(self._device, non_blocking=True) for tensor in next(self._batches))
        self._optimizer.zero_grad()
        self._loss(self._model(images), labels).backward()
        self._optimizer.step()

    def _endless(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from self._loader


class _ordinary_algorithms:  # noqa: N801  # used as a function
    """Lift the demand for deterministic algorithms, which the plain loop does not make."""

    def __enter__(self) -> None:
        torch.use_deterministic_algorithms(False)

    def __exit__(self, *exception: object) -> None:
        torch.use_deterministic_algorithms(True)


def pack_with_pillow(paths: Sequence[Path], size: int, out: Path) -> None:
    """Decode, bring the shorter side to `size`, cut out the middle, save one array; in one process, one by one."""
    pixels: NDArray[np.uint8] = np.empty((len(paths), size, size, 3), dtype=np.uint8)
    for row, path in enumerate(paths):
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        scale = size / min(image.size)
        width, height = max(size, round(scale * image.width)), max(size, round(scale * image.height))
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - size) // 2, (height - size) // 2
        pixels[row] = np.asarray(image.crop((left, top, left + size, top + size)))
    np.save(out, pixels)
