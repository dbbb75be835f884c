"""A stream of images, judged window by window, with a chosen run length to a false alarm."""

from __future__ import annotations

import math
import os
import stat
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stages.core.detector import Detector, Judgement
from stages.core.errors import InputError
from stages.core.features import Extractor
from stages.core.production import ImageFile, distinct, is_image_name, lines_of_stdin, printable, read_images, walk

_POLL_SECONDS = 0.5
_SETTLED_SECONDS = 0.5  # a file that was written to later may be unfinished
_OLD_SECONDS = 60  # a file that was written to so long ago is whole; clocks of file servers differ by less
_MEMORY_SECONDS = 3600  # that a file which is gone is remembered for, should it come back unchanged
_MOST_NULL_WINDOWS = 100_000  # to calibrate a stream with: they take memory
_PER_ALARM = 10  # of them by window to a false alarm, as Detector.num_windows has it


class Judged(NamedTuple):
    """A window of the stream."""

    number: int  # from 1
    names: list[str]
    judgement: Judgement


def stream_alpha(detector: Detector, window: int, run_length: int) -> float:
    """The false-alarm rate of one window, at which a false alarm comes every `run_length` images on average.

    Windows do not overlap, so the number of windows to a false alarm is geometric: alpha is window / run_length.
    InputError when the detector's clean images cannot tell so rare an event.
    """
    if not 2 <= window <= detector.largest_window:
        raise InputError(f"--window: {window}; this detector can test windows of 2 to {detector.largest_window} images")
    if run_length < 2 * window:
        raise InputError(f"--run-length: {run_length} images must be at least two windows of {window}")
    longest = window * (_MOST_NULL_WINDOWS + 1) // _PER_ALARM
    if run_length > longest:
        raise InputError(
            f"--run-length: {run_length:,} is more than {longest:,}, the longest for windows of {window}: calibrating "
            f"would take more than {_MOST_NULL_WINDOWS:,} windows of clean images"
        )
    num_clean = len(detector.threshold)
    if (num_windows := math.comb(num_clean, window)) * window < _PER_ALARM * run_length:
        raise InputError(
            f"--window: {num_clean} clean images make {num_windows:,} different windows of {window}, too few to tell a "
            f"false alarm every {run_length:,} images; take a larger window, a shorter --run-length, or have more "
            "validation images"
        )
    return window / run_length


def judge_stream(
    detector: Detector, extractor: Extractor, files: Iterator[ImageFile], window: int, run_length: int
) -> Iterator[Judged]:
    """Judge windows of `window` images, each read when it comes.

    Images that cannot be read are left out, and those at the end that fill no window: stderr says which.
    InputError when the stream ends before the first window is full.
    """
    alpha = stream_alpha(detector, window, run_length)
    calibration = detector.calibration(window, alpha)
    spec = detector.spec
    images: list[NDArray[np.uint8]] = []
    names: list[str] = []
    number = came = 0
    for file in files:
        came += 1
        read = read_images([file], spec.image_size, spec.crop_mode, spec.interpolation)
        for name, reason in read.skipped:
            print(f"monitor: left out {printable(name)}: {reason}", file=sys.stderr)
        images.extend(read.images)
        names.extend(read.names)
        if len(names) < window:
            continue
        number += 1
        pixels = np.stack(images)
        if num_copies := window - len(distinct(pixels)[0]):
            what = f"{num_copies} of {window} images are copies of others, so its p-value is too small"
            print(f"monitor: window {number}: {what}", file=sys.stderr)
        features = extractor.features(pixels)
        adapted = extractor.adapted_to_all(pixels, detector.largest_fitted)
        yield Judged(number, names, detector.judge(features, adapted, alpha, calibration))
        images, names = [], []
    if not number:
        unreadable = f", {came - len(names)} of which cannot be read" if came > len(names) else ""
        raise InputError(
            f"no verdict: the stream ended after {came} image{'s' * (came != 1)}{unreadable}; a window needs {window}"
        )
    if names:
        print(
            f"monitor: {len(names)} image{'s' * (len(names) != 1)} at the end fill{'s' * (len(names) == 1)} "
            f"no window of {window}; not judged",
            file=sys.stderr,
        )


def growing_folder(folder: Path, idle: float | None) -> Iterator[ImageFile]:
    """Images of a folder in the order in which they come, for ever, or until none came for `idle` seconds.

    A file that is written anew is another image; one that is only moved within the folder is not.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: a stream needs a folder that grows, or - for paths on stdin")
    seen: dict[tuple[object, ...], float] = {}  # names of what was handed on, and when they were last there
    growing: dict[Path, tuple[_Version, float]] = {}  # files that are new, and since when they are as they are
    last = time.monotonic()

    def read(file: _File) -> bytes:
        try:
            return file.path.read_bytes()
        except FileNotFoundError:  # moved meanwhile, maybe within the folder: then it is still to come
            for name in file.names:
                seen.pop(name, None)
            raise

    is_there = True
    while True:
        now = time.monotonic()
        if is_there != _can_be_listed(folder):
            is_there = not is_there
            print(f"monitor: {folder} {'is back' if is_there else 'cannot be listed; waiting for it'}", file=sys.stderr)
        fresh = []
        before, growing = growing, {}
        for file in _image_files(folder):
            if any(name in seen for name in file.names):
                seen |= dict.fromkeys(file.names, now)
                continue
            version, since = before.get(file.path, (None, now))
            if version != file.version:
                # What was written to long ago is whole; a clock that is ahead says nothing.
                age = time.time() - file.version.modified / 1e9
                since = now - age if age > _OLD_SECONDS else now
                last = now
            growing[file.path] = file.version, since
            if now - since >= _SETTLED_SECONDS:
                fresh.append(file)
        for file in sorted(fresh, key=lambda file: (file.version.modified, file.path)):
            seen |= dict.fromkeys(file.names, now)
            del growing[file.path]
            yield ImageFile(str(file.path), partial(read, file))
        seen = {name: there for name, there in seen.items() if now - there < _MEMORY_SECONDS}
        if fresh:
            last = time.monotonic()
        elif idle is not None and now - last > idle:
            return
        else:
            time.sleep(_POLL_SECONDS)


class _Version(NamedTuple):
    """What a file was at one time."""

    modified: int  # ns
    size: int  # bytes


class _File(NamedTuple):
    """An image file that was found."""

    version: _Version
    path: Path
    inode: tuple[int, int]  # device and number, which a file keeps when it is moved; not on every file system

    @property
    def names(self) -> tuple[tuple[object, ...], ...]:
        """What it is known again by, each alone."""
        return (self.path, self.version), (self.inode, self.version)


def _can_be_listed(folder: Path) -> bool:
    try:
        os.scandir(folder).close()
    except OSError:
        return False
    return True


def _image_files(folder: Path) -> Iterator[_File]:
    """Image files below a folder, while others remove some."""
    for parent, names in walk(folder):
        for name in names:
            path = Path(parent, name)
            if is_image_name(path.relative_to(folder).as_posix()):
                try:
                    info = path.stat()
                except OSError:
                    continue
                if stat.S_ISREG(info.st_mode):
                    yield _File(_Version(info.st_mtime_ns, info.st_size), path, (info.st_dev, info.st_ino))


def paths_from_stdin() -> Iterator[ImageFile]:
    """Images named on stdin, one path a line, until it ends."""
    for line in lines_of_stdin():
        path = Path(line)
        yield ImageFile(str(path), path.read_bytes)


def open_stream(places: list[str], idle: float | None) -> Iterator[ImageFile]:
    """The images of a stream: a growing folder, or `-` for stdin."""
    if places == ["-"]:
        if idle is not None:
            raise InputError("--idle: paths on stdin end when stdin does; leave it out")
        return paths_from_stdin()
    if len(places) != 1:
        raise InputError(f"a stream is one folder, or - for paths on stdin; got {len(places)} places")
    return growing_folder(Path(places[0]), idle)
