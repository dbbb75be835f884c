"""Arguments that several tools take."""

from __future__ import annotations

import argparse
from pathlib import Path


def output_file(text: str) -> Path:
    """A file to write, for argparse: refused before the work is done where a folder is, or where no folder can be."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; name a file")
    there = next(parent for parent in path.absolute().parents if parent.exists())
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: {there} is a file, not a folder")
    return path
