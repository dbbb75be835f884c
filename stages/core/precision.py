"""Mixed precision as a policy: which dtype the forward pass computes in, and whether gradients are scaled."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from stages.core.errors import InputError
from stages.core.recipe import Precision


@dataclass(frozen=True)
class Policy:
    """Compute dtype of the forward pass; weights and optimizer state stay float32."""

    dtype: torch.dtype
    scale_gradients: bool  # float16 needs it, bfloat16 has float32's range

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """Context of the forward pass; does nothing in float32."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.dtype)


# oneDNN's bfloat16 gradient of a strided 3x3 convolution reads uninitialised memory where its input is 1x1 pixels (seen
# with PyTorch 2.14.1: other bits at every run, and NaN), as the last stage of most networks has it for smaller images.
_SMALLEST_BF16_SIDE = 32


def resolve(
    precision: Precision,
    device: torch.device,
    smallest_side: int = _SMALLEST_BF16_SIDE,
    key: str = "train.precision",
) -> Policy:
    """The policy of `auto`, `fp32`, `bf16` or `fp16` on a device; InputError where it cannot work.

    `auto` is bf16 where the hardware computes in it, and fp32 elsewhere. `smallest_side`: side in pixels of the
    smallest images that will be trained on; below 32, bf16 is not exact on a CPU. `key` is the one of params.yaml.
    """
    too_small = device.type == "cpu" and smallest_side < _SMALLEST_BF16_SIDE
    if precision == "auto":
        precision = "bf16" if has_bf16(device) and not too_small else "fp32"
    if precision == "bf16" and too_small:
        raise InputError(
            f"params.yaml: {key}: bf16 gives wrong gradients for images of {smallest_side} px on a CPU; use "
            f"auto or fp32, or train.image_size and train.progressive of at least {_SMALLEST_BF16_SIDE}"
        )
    if precision == "fp16" and device.type == "cpu":
        raise InputError(f"params.yaml: {key}: fp16 needs a GPU; on a CPU use auto, bf16 or fp32")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return Policy(dtype, scale_gradients=precision == "fp16")


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies in bfloat16 (emulation is slower than float32)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False
