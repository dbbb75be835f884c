"""The machine and the packages that a report is made with."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("torch", "torchvision", "timm", "dvc", "dvclive", "numpy")


def environment() -> list[tuple[str, str]]:
    """(what, value). Nothing is imported for it: PyTorch alone would take seconds."""
    packages = [(name, _version(name)) for name in _PACKAGES]
    machine = [("CPU", f"{cpu_name()}, {os.cpu_count()} cores"), ("GPU", _gpu()), ("system", platform.platform())]
    return [("Python", platform.python_version()), *packages, *machine]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def cpu_name() -> str:
    """The processor, as /proc/cpuinfo names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _gpu() -> str:
    """As the driver's own tool names it."""
    if not (tool := shutil.which("nvidia-smi")):
        return "none found"
    command = [tool, "--query-gpu=name", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return "none found"
    names = [line.strip() for line in result.stdout.splitlines() if line.strip()] if result.returncode == 0 else []
    return ", ".join(names) or "none found"
