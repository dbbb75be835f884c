"""The image, built once, and containers of it. Skipped where no Docker engine answers or no base image can be had."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import ROOT

BASE = "python:3.11-slim-bookworm"
LOCKED_DOWN = (
    *("--network", "none", "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
    *("--memory", "4g", "--shm-size", "1g", "--volume", "/tmp", "--volume", "/home/driftline"),
)


def docker(*arguments: str, check: bool = True, timeout: float = 900) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=timeout)
    if check:
        assert result.returncode == 0, f"docker {arguments}: rc {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


@pytest.fixture(scope="session")
def engine() -> None:
    try:
        docker("info", timeout=30)
    except (OSError, AssertionError, subprocess.TimeoutExpired):
        pytest.skip("no Docker engine answers here (`docker info`)")
    present = docker("image", "inspect", BASE, check=False).returncode == 0
    if not present and docker("pull", "-q", BASE, check=False).returncode != 0:
        pytest.skip(f"{BASE} is not here and cannot be pulled")


@pytest.fixture(scope="session")
def image(engine: None) -> str:
    """The image of this checkout. Docker's layer cache makes it cheap when nothing changed."""
    name = os.environ.get("DRIFTLINE_IMAGE", "driftline:test")
    if "DRIFTLINE_IMAGE" not in os.environ:
        docker("build", "-t", name, str(ROOT), timeout=1800)
    return name


@pytest.fixture
def in_container(image: str) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command in a locked-down container; options of docker run go before `--`."""

    def run(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        options, command = words[: words.index("--")], words[words.index("--") + 1 :]
        return docker("run", "--rm", *LOCKED_DOWN, *options, image, *command, check=check)

    return run


@pytest.fixture
def mine(repository: Path) -> tuple[str, ...]:
    """Options that mount a finished repository and run as its owner, who has no name in the container."""
    return ("--volume", f"{repository}:/workspace", "--user", f"{os.getuid()}:{os.getgid()}")
