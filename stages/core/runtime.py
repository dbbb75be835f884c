"""Where and with how much of the machine a stage runs: knobs that do not change its result by intent."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from stages.core.errors import InputError
from stages.core.params import Section

Resident = Literal["auto"] | bool
_MOST_READERS = 8

# Threads that wait for each other spin, a millisecond or more by default. Beside any other busy process that costs a
# step several times its time; so they sleep sooner. OpenMP reads this when torch is imported, later than this module.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


class RuntimeParams(Section):
    """The `runtime` section of params.yaml."""

    device: str
    threads: Annotated[int, Field(ge=1)] | Literal["auto"]
    workers: Annotated[int, Field(ge=0)] | Literal["auto"]
    processes: Annotated[int, Field(ge=1)] | Literal["gpu"]
    resident: Resident
    checkpoint_seconds: Annotated[float, Field(gt=0)] | None
    checkpoint_steps: Annotated[int, Field(ge=1)] | None
    cache_dir: Annotated[str, Field(min_length=1)]

    @field_validator("device")
    @classmethod
    def _is_a_device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", value):
            raise ValueError(f"{value!r} is no device (valid: auto, cpu, cuda, cuda:N, mps)")
        return value


def num_cpus() -> int:
    """CPUs that this process may use: of its affinity mask, where the system has one, as many as its container may."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(there, int(cpu_quota() or there)))


def cpu_quota(folder: Path = Path("/sys/fs/cgroup")) -> float | None:
    """CPUs that the control group (version 2 or 1) may use on average; None without a limit."""
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        files = [folder / name for name in names]
        if all(file.is_file() for file in files):
            quota, period = " ".join(file.read_text() for file in files).split()
            return None if quota in ("max", "-1") else int(quota) / int(period)
    return None


def num_threads(runtime: RuntimeParams) -> int:
    """CPU threads of PyTorch."""
    return num_cpus() if runtime.threads == "auto" else runtime.threads


def num_workers(runtime: RuntimeParams) -> int:
    """Worker processes; 0 means that the main process does the work."""
    return num_cpus() if runtime.workers == "auto" else runtime.workers


def num_readers(runtime: RuntimeParams, processes: int = 1) -> int:
    """Threads that read batches ahead in each of `processes`; 0 means that the main thread does.

    `auto` is one a CPU, but eight at most: each holds up to two batches, and eight read 30,000 images a second
    (docs/BENCHMARKS.md).
    """
    if runtime.workers == "auto":
        return max(1, min(_MOST_READERS, num_cpus() // processes))
    return runtime.workers


def cache_dir(runtime: RuntimeParams) -> Path:
    """Absolute folder for downloads, outside the repository: clones and `--temp` runs share it."""
    return Path(runtime.cache_dir).expanduser().absolute()


def make_cache_dir(folder: Path) -> None:
    """Make a folder inside `runtime.cache_dir`; InputError when it cannot be made there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"params.yaml: runtime.cache_dir: {folder} cannot be made: {error.strerror}; name another folder"
        ) from None
