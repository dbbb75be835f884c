"""The device that computes, and PyTorch settings under which the same run gives the same bits."""

from __future__ import annotations

import os
import re
import sys

import torch

from stages.core.errors import InputError
from stages.core.runtime import RuntimeParams, num_threads


def set_up(runtime: RuntimeParams, rank: int = 0, count: int = 1) -> torch.device:
    """Choose the device, set the number of threads and deterministic algorithms.

    `auto` takes CUDA, then MPS, then the CPU; where it passes over all GPUs, it says on stderr why. A device that is
    asked for by name and cannot be used raises InputError.
    Of `count` processes on this machine, number `rank` takes its share of the threads and the GPU of its number.
    """
    torch.set_num_threads(max(1, num_threads(runtime) // count))
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
    torch.use_deterministic_algorithms(True)
    # On by default with it: a help in finding reads of uninitialised memory, and 14 % of a train step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    device = resolve(runtime.device)
    if runtime.device == "auto" and device.type != "cuda" and rank == 0:
        for index in range(_num_cuda()):
            print(f"runtime.device: auto: {without_code(index)}; it is not used", file=sys.stderr)
    if count > 1 and device.type != "cuda":
        return torch.device("cpu")
    if count > 1:
        if ":" in runtime.device:
            raise InputError(
                f"params.yaml: runtime.device: {runtime.device!r} is one GPU for {count} processes; use cuda"
            )
        device = resolve(f"cuda:{rank}")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # a CUDA graph is captured on the current device
    return device


def num_processes(runtime: RuntimeParams) -> int:
    """Processes that train together on this machine; `gpu` is one for each GPU. InputError when there are too few."""
    count = _num_cuda()
    if runtime.processes == "gpu":
        if count == 0:
            raise InputError("params.yaml: runtime.processes: 'gpu', but there is no GPU; use a number")
        return count
    if runtime.processes > max(1, count) and runtime.device != "cpu" and resolve(runtime.device).type == "cuda":
        raise InputError(f"params.yaml: runtime.processes: {runtime.processes} is more than the {count} GPUs")
    return runtime.processes


def resolve(name: str) -> torch.device:
    """The torch device of `auto`, `cpu`, `cuda`, `cuda:N` or `mps`; InputError when it is missing or cannot be used."""
    if name == "auto":
        for index in range(_num_cuda()):
            if without_code(index) is None:
                return torch.device("cuda", index)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        count, index = _num_cuda(), device.index or 0
        if index >= count:
            raise InputError(f"params.yaml: runtime.device: {name!r} is not there ({_what_there_is(count)})")
        if reason := without_code(index):
            raise InputError(f"params.yaml: runtime.device: {name!r}: {reason}; use auto or cpu, or another PyTorch")
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError(f"params.yaml: runtime.device: {name!r} is not there ({_what_there_is(0)})")
    return device


def seed(device: torch.device, value: int) -> None:
    """Seed the generators that dropout and the like draw from. (torch.manual_seed is slow where CUDA is unused.)"""
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(value)
    elif device.type == "mps":
        torch.mps.manual_seed(value)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it; the CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def without_code(index: int) -> str | None:
    """Why nothing would run on a CUDA GPU: this PyTorch has no code for its kind; None where it has.

    PyTorch itself warns, and fails in its first kernel (`no kernel image is available`).
    """
    built_for = torch.cuda.get_arch_list()
    if torch.version.cuda is None or not built_for:  # AMD's GPUs have names of another form
        return None
    capability = torch.cuda.get_device_capability(index)
    if any(_runs_on(architecture, capability) for architecture in built_for):
        return None
    kind = "sm_{}{}".format(*capability)
    return f"{torch.cuda.get_device_name(index)} is {kind}, and this PyTorch is built for {', '.join(built_for)}"


def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for `architecture` runs on a GPU: within a major version upwards; compute_ for all later ones."""
    kind, _, version = architecture.partition("_")
    built = divmod(int(re.sub(r"\D", "", version)), 10)
    return built <= capability and (kind == "compute" or built[0] == capability[0])


def _num_cuda() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _what_there_is(num_cuda: int) -> str:
    there = ["cpu", *(f"cuda:{i}" for i in range(num_cuda)), *(["mps"] if torch.backends.mps.is_available() else [])]
    return f"this machine has: {', '.join(there)}; or use auto"
