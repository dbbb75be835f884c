"""What drift detection looks at: a model's outputs, its penultimate embedding, and how the images look."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stages.core.augment import crop_and_resize
from stages.core.errors import InputError, ran_out_of_memory
from stages.core.image_statistics import image_statistics
from stages.core.loader import normalise
from stages.core.model import ModelSpec
from stages.core.precision import Policy

# Images that the training statistics of a batch norm count for beside those of a window (Schneider et al. 2020).
_PRIOR_IMAGES = 16
LARGEST_GROUP = 256  # images that are adapted to together
_THINNED_SIDE = 16  # of a feature map, in pixels, from which on a quarter of it is enough for its statistics


@dataclass(frozen=True)
class Features:
    """Of N images, float32."""

    logits: NDArray[np.float32]  # (N, num_classes)
    embedding: NDArray[np.float32]  # (N, dim), what the classifier layer sees
    statistics: NDArray[np.float32]  # (N, len(STATISTICS))

    def __len__(self) -> int:
        return len(self.logits)

    def rows(self, indices: NDArray[np.int64]) -> Features:
        """The features of some of the images."""
        return Features(self.logits[indices], self.embedding[indices], self.statistics[indices])


@dataclass(frozen=True)
class Extractor:
    """A classifier on a device, ready to look at images."""

    network: nn.Module
    spec: ModelSpec
    policy: Policy
    device: torch.device
    batch_size: int = 64

    @torch.inference_mode()
    def features(self, images: NDArray[np.uint8]) -> Features:
        """Features of uint8 images (N, H, W, 3), N > 0; the network sees them whole, resized to its input size."""
        heads = self._heads()
        seen: list[list[Tensor]] = [[] for _ in heads]

        def keep(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            seen[heads.index(module)].append(inputs[0].float().flatten(1).cpu())

        hooks = [head.register_forward_pre_hook(keep) for head in heads]
        try:
            batches = range(0, len(images), self.batch_size)
            logits = [self._logits(images[start : start + self.batch_size]) for start in batches]
        finally:
            for hook in hooks:
                hook.remove()
        embedding = torch.cat([torch.cat(parts) for parts in seen], dim=1)
        return Features(torch.cat(logits).numpy(), embedding.numpy(), image_statistics(images))

    def _heads(self) -> list[nn.Module]:
        """The layers that make the logits of the labels: one, or one a branch."""
        head: Any = self.network.get_classifier()  # type: ignore[operator]  # timm has it
        if isinstance(head, tuple | list):  # distilled models have two: the first is that of the labels
            head = head[0]
        return list(head) if isinstance(head, nn.ModuleList) else [head]

    def adapted_logits(self, images: NDArray[np.uint8], group: int) -> NDArray[np.float32] | None:
        """Logits (N, num_classes) of the model with its batch norms adapted to each `group` of images in turn.

        Their statistics are those of the group, with the training set's as a prior (Schneider et al. 2020, "Improving
        robustness against common corruptions by covariate shift adaptation"). None of a model without batch norms.
        """
        group = min(group, LARGEST_GROUP)
        return self._adapted_logits(images[start : start + group] for start in range(0, len(images), group))

    def adapted_to_all(self, images: NDArray[np.uint8], size: int) -> NDArray[np.float32] | None:
        """`adapted_logits` in equal groups of about `size` (fewer: one), the same in whatever order the images come.

        A folder lists its images class by class. Batch norms that are adapted to one class alone misjudge it.
        """
        order = np.argsort([zlib.crc32(image.tobytes()) for image in images], kind="stable")
        num_groups = max(1, round(len(images) / size), math.ceil(len(images) / LARGEST_GROUP))
        mixed = self._adapted_logits(images[rows] for rows in np.array_split(order, num_groups))
        if mixed is None:
            return None
        logits = np.empty_like(mixed)
        logits[order] = mixed
        return logits

    @torch.inference_mode()
    def _adapted_logits(self, groups: Iterable[NDArray[np.uint8]]) -> NDArray[np.float32] | None:
        modules = (module for module in self.network.modules() if isinstance(module, _BatchNorm))
        norms = [module for module in modules if module.running_mean is not None]
        if not norms:
            return None
        logits = []
        for images in groups:
            with _adapted(norms, len(images)):
                logits.append(self._logits(images))
        return torch.cat(logits).numpy()

    def _logits(self, images: NDArray[np.uint8]) -> Tensor:
        try:
            pixels = torch.from_numpy(np.array(images)).to(self.device)
            boxes = torch.tensor([[0, 0, *pixels.shape[1:3]]], device=self.device).expand(len(pixels), 4)
            flips = torch.zeros(len(pixels), dtype=torch.bool, device=self.device)
            batch = crop_and_resize(pixels, boxes, flips, self.spec.image_size, torch.float32)
            with self.policy.autocast(self.device):
                logits: Tensor = self.network(normalise(batch, self.spec.mean, self.spec.std))
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
            way_out = "" if self.device.type == "cpu" else ", or set runtime.device to cpu"
            raise InputError(
                f"out of memory on {self.device} with {len(images)} images of {self.spec.image_size} px at once; free "
                f"some of it{way_out}"
            ) from None
        if not logits.isfinite().all():
            raise InputError("the classifier's outputs are not finite: the training run that made it diverged")
        return logits.float().cpu()


@contextmanager
def _adapted(norms: Sequence[_BatchNorm], num_images: int) -> Iterator[None]:
    """Within it, each batch norm mixes the statistics of its input into its own before it uses them."""
    share = num_images / (num_images + _PRIOR_IMAGES)
    buffers = [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var) if buffer is not None]
    kept = [buffer.clone() for buffer in buffers]

    def mix(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        values = inputs[0]
        if values.dim() == 4 and min(values.shape[2:]) >= _THINNED_SIDE:
            values = values[:, :, ::2, ::2]
        values = values.float()
        dims = [dim for dim in range(values.dim()) if dim != 1]
        mean = values.mean(dims)
        variance = (values * values).mean(dims) - mean * mean  # on a CPU, many times as fast as torch.var
        norm.running_mean.lerp_(mean, share)  # type: ignore[operator]
        norm.running_var.lerp_(variance.clamp_min_(0), share)  # type: ignore[operator]

    hooks = [norm.register_forward_pre_hook(mix) for norm in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for buffer, before in zip(buffers, kept, strict=True):
            buffer.copy_(before)
