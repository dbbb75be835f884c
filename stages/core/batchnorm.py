"""Batch normalisation over the whole batch when several processes share it.

torch's SyncBatchNorm does it on GPUs, and on nothing else; for CPU processes the same is written here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn import functional


def share_statistics(model: nn.Module, device: torch.device) -> nn.Module:
    """Make the model's batch norms compute mean and variance over all processes; names and values stay."""
    if device.type == "cuda":
        shared: nn.Module = convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        return shared
    for module in model.modules():
        if isinstance(module, BatchNormAct2d):  # timm's, with dropout and activation in one module
            module.__class__ = _SharedBatchNormAct
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = _SharedBatchNorm
    return model


class _SharedBatchNorm(nn.modules.batchnorm._BatchNorm):
    def forward(self, images: Tensor) -> Tensor:
        return _batch_norm(self, images)

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002  # torch names it
        """Any shape (N, C, ...)."""


class _SharedBatchNormAct(BatchNormAct2d):
    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.act(self.drop(_batch_norm(self, images)))
        return result


def _batch_norm(module: nn.modules.batchnorm._BatchNorm, images: Tensor) -> Tensor:
    """Images (N, C, ...) normalised by the statistics of all processes, each of which holds as many images."""
    if not module.training:
        return functional.batch_norm(
            images, module.running_mean, module.running_var, module.weight, module.bias, False, 0.0, module.eps
        )
    values = images.float()
    axes = [axis for axis in range(values.ndim) if axis != 1]
    shape = [1, -1, *[1] * (values.ndim - 2)]
    # The mean first, then the squares around it: E[x^2] - E[x]^2 would cancel.
    mean: Tensor = _MeanOverProcesses.apply(values.mean(axes))
    centred = values - mean.view(shape)
    variance: Tensor = _MeanOverProcesses.apply(centred.square().mean(axes))
    if module.track_running_stats and module.running_mean is not None and module.running_var is not None:
        count = dist.get_world_size() * values.numel() / values.shape[1]
        assert module.num_batches_tracked is not None
        module.num_batches_tracked.add_(1)
        momentum = module.momentum if module.momentum is not None else 1 / float(module.num_batches_tracked)
        with torch.no_grad():
            module.running_mean.lerp_(mean, momentum)
            module.running_var.lerp_(variance * (count / (count - 1)), momentum)
    result = centred * torch.rsqrt(variance + module.eps).view(shape)
    if module.affine:
        result = result * module.weight.view(shape) + module.bias.view(shape)
    return result.to(images.dtype)


class _MeanOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return _mean(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _mean(gradient)


def _mean(values: Tensor) -> Tensor:
    result = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result)
    return result / dist.get_world_size()
