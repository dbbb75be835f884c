"""git, dvc and gto, as the tools call them: their words in an InputError when they fail."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from stages.core.errors import InputError, Stopped
from tools.shared import process


def git(*arguments: str, check: bool = True, strip: bool = True, index: Path | None = None) -> str:
    """What git prints; with `check` off, nothing when it fails. `index` is a file in place of the repository's own."""
    output = _run(["git", *arguments], check, {} if index is None else {"GIT_INDEX_FILE": str(index.absolute())})
    return output.strip() if strip else output


def dvc(*arguments: str) -> str:
    """What dvc prints."""
    return _run([sys.executable, "-m", "dvc", *arguments])


def gto(*arguments: str) -> str:
    """What gto prints."""
    return _run([sys.executable, "-m", "gto.cli", *arguments])


def environment() -> dict[str, str]:
    """Stages are run as `python -m ...`: with this environment's python, and without the key to the remote."""
    inherited = {name: value for name, value in os.environ.items() if name != "GDRIVE_CREDENTIALS_DATA"}
    return inherited | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}


def _run(command: list[str], check: bool = True, variables: Mapping[str, str] | None = None) -> str:
    """What a program prints; InputError with its own words when it fails."""
    result = process.run(command, environment() | dict(variables or {}))
    if result.returncode < 0:
        raise Stopped(f"{command[0]} was ended by a signal; run the same command again", -result.returncode)
    if result.returncode and check:
        shown = " ".join(Path(command[0]).name if word == command[0] else word for word in command[:5])
        raise InputError(f"`{shown}` failed: {(result.stderr or result.stdout).strip()}")
    return result.stdout if result.returncode == 0 else ""
