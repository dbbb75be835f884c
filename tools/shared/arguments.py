"""Arguments that several tools take."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def output_file(text: str) -> Path:
    """A file to write, for argparse: refused before the work is done where a folder is, or where no folder can be."""
    path = Path(text)
    if os.path.isdir(text):  # noqa: PTH112  # unlike Path.is_dir, it says no to a name that is too long
        raise argparse.ArgumentTypeError(f"{text} is a folder; name a file")
    there = next(parent for parent in path.absolute().parents if os.path.exists(parent))  # noqa: PTH110
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: {there} is a file, not a folder")
    return path
