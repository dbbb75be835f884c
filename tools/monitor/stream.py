"""A stream of images, judged window by window, with a chosen run length to a false alarm."""

from __future__ import annotations

import os
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stages.core.detector import Detector, Judgement
from stages.core.errors import InputError
from stages.core.features import Extractor
from stages.core.production import ImageFile, is_image_name, lines_of_stdin, printable, read_images

_POLL_SECONDS = 0.5
_SETTLED_SECONDS = 0.5  # a file that was written to later may be unfinished
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
    return window / run_length


def judge_stream(
    detector: Detector, extractor: Extractor, files: Iterator[ImageFile], window: int, run_length: int
) -> Iterator[Judged]:
    """Judge windows of `window` images as they come; images that cannot be read are left out, and said.

    So are, on stderr, those at the end that fill no window. InputError when the stream ends before the first is full.
    """
    alpha = stream_alpha(detector, window, run_length)
    calibration = detector.calibration(window, alpha)
    spec = detector.spec
    pending: list[ImageFile] = []
    images: list[NDArray[np.uint8]] = []
    names: list[str] = []
    number = came = 0

    def read_pending() -> None:
        read = read_images(pending, spec.image_size, spec.crop_mode, spec.interpolation)
        pending.clear()
        for name, reason in read.skipped:
            print(f"monitor: left out {printable(name)}: {reason}", flush=True)
        images.extend(read.images)
        names.extend(read.names)

    for file in files:
        came += 1
        pending.append(file)
        if len(names) + len(pending) < window:
            continue
        read_pending()
        if len(names) < window:
            continue
        number += 1
        pixels = np.stack(images)
        features = extractor.features(pixels)
        adapted = extractor.adapted_logits(pixels, window)
        yield Judged(number, names, detector.judge(features, adapted, alpha, calibration))
        images, names = [], []
    read_pending()
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
    """Images of a folder in the order in which they come, for ever, or until none came for `idle` seconds."""
    if not folder.is_dir():
        raise InputError(f"{folder}: a stream needs a folder that grows, or - for paths on stdin")
    seen: set[Path] = set()
    growing: dict[Path, tuple[int, int, float]] = {}  # modification time, size, and since when they are so
    last = time.monotonic()
    while True:
        now = time.monotonic()
        fresh = []
        for path, modified, size in _image_files(folder):
            if path in seen:
                continue
            known = growing.get(path)
            if known is None or known[:2] != (modified, size):
                # What was written to long ago is whole; a clock that is ahead says nothing.
                age = time.time() - modified / 1e9
                since = now - age if age > 0 else now
                known = growing[path] = (modified, size, since)
                last = now
            if now - known[2] >= _SETTLED_SECONDS:
                fresh.append((modified, path))
        for _, path in sorted(fresh):
            seen.add(path)
            del growing[path]
            yield ImageFile(str(path), path.read_bytes)
        if fresh:
            last = time.monotonic()
        elif idle is not None and now - last > idle:
            return
        else:
            time.sleep(_POLL_SECONDS)


def _image_files(folder: Path) -> Iterator[tuple[Path, int, int]]:
    """Image files below a folder, with modification time (ns) and size (bytes), while others remove some."""
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            if is_image_name(path.relative_to(folder).as_posix()):
                try:
                    info = path.stat()
                except OSError:
                    continue
                if stat.S_ISREG(info.st_mode):
                    yield path, info.st_mtime_ns, info.st_size


def paths_from_stdin() -> Iterator[ImageFile]:
    """Images named on stdin, one path a line, until it ends."""
    for line in lines_of_stdin():
        path = Path(line)
        yield ImageFile(str(path), path.read_bytes)


def open_stream(places: list[str], idle: float | None) -> Iterator[ImageFile]:
    """The images of a stream: a growing folder, or `-` for stdin."""
    if places == ["-"]:
        return paths_from_stdin()
    if len(places) != 1:
        raise InputError(f"a stream is one folder, or - for paths on stdin; got {len(places)} places")
    return growing_folder(Path(places[0]), idle)
