"""The device that computes, and PyTorch settings under which the same run gives the same bits."""

from __future__ import annotations

import os

import torch

from stages.core.errors import InputError
from stages.core.runtime import RuntimeParams, num_threads


def set_up(runtime: RuntimeParams) -> torch.device:
    """Choose the device, set the number of threads and deterministic algorithms.

    `auto` takes CUDA, then MPS, then the CPU; a device that is asked for by name and is not there raises InputError.
    """
    torch.set_num_threads(num_threads(runtime))
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
    torch.use_deterministic_algorithms(True)
    # On by default with it: a help in finding reads of uninitialised memory, and 14 % of a train step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    return resolve(runtime.device)


def resolve(name: str) -> torch.device:
    """The torch device of `auto`, `cpu`, `cuda`, `cuda:N` or `mps`; InputError when it is missing."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", 0)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise InputError(f"params.yaml: runtime.device: {name!r} is not there ({_what_there_is(count)})")
        return torch.device("cuda", device.index or 0)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError(f"params.yaml: runtime.device: {name!r} is not there ({_what_there_is(0)})")
    return device


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it; the CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _what_there_is(num_cuda: int) -> str:
    there = ["cpu", *(f"cuda:{i}" for i in range(num_cuda)), *(["mps"] if torch.backends.mps.is_available() else [])]
    return f"this machine has: {', '.join(there)}; or use auto"
