"""Arguments that several tools take."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from stages.core.errors import InputError
from stages.core.output import write_text

_Number = TypeVar("_Number", int, float)


def output_file(text: str) -> Path:
    """A file to write, for argparse: refused before the work is done where a folder is, or where no folder can be."""
    path = Path(text)
    if not text:
        raise argparse.ArgumentTypeError("an empty name; name a file")
    if os.path.isdir(text):  # noqa: PTH112  # unlike Path.is_dir, it says no to a name that is too long
        raise argparse.ArgumentTypeError(f"{text} is a folder; name a file")
    there = next(parent for parent in path.absolute().parents if os.path.exists(parent))  # noqa: PTH110
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: {there} is a file, not a folder")
    return path


def write_output(option: str, path: Path, text: str) -> None:
    """Write the file that `option` names, whole or not at all; InputError where that cannot be.

    What a link points to is written. A device or a pipe (/dev/stdout, `>(jq .)`) is given the text and stays one.
    """
    try:
        if path.absolute().is_relative_to("/dev") or (path.exists() and not path.is_file()):
            sys.stdout.flush()
            with path.open("a", encoding="utf-8") as stream:
                stream.write(text)
        else:
            write_text(path.resolve(), text)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise InputError(f"{option}: {path}: {error.strerror}") from None


def close_stdout() -> None:
    """Nobody reads it: so that Python does not try again to print the rest when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def at_least(smallest: _Number) -> Callable[[str], _Number]:
    """Numbers of the type of `smallest` that are not below it, for argparse."""
    kind = type(smallest)

    def convert(text: str) -> _Number:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not value >= smallest:  # so it refuses NaN
            name = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is no {name} of at least {smallest:g}")
        return value

    return convert
