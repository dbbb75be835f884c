"""dvc, as `tools.remote.transfer` runs it: no socket waits for ever, and why something failed is written down.

    python -m tools.remote.patient_dvc REASONS SECONDS push ...

PyDrive2 sets no timeout on its connections, so one that is dropped in the middle of an answer hangs dvc for ever. Here
all of them have a timeout of SECONDS. Errors go into the file REASONS instead of stderr, one a line. It ends when the
process that started it is gone.
"""

from __future__ import annotations

import functools
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path


class _Reasons(logging.Handler):
    """Writes each warning and error, with its causes, into a line of a file."""

    def __init__(self, path: Path) -> None:
        super().__init__(logging.WARNING)
        self.path = path

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        parts = [record.getMessage(), *(f"{type(cause).__name__}: {cause}" for cause in _causes(error))]
        line = " <- ".join(" ".join(part.split()) for part in parts if part)
        with self.path.open("a") as file:
            file.write(f"{record.levelname}: {line}\n")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


@contextmanager
def timeouts(seconds: float, drive: bool = True) -> Iterator[None]:
    """New connections do not wait longer than that for a byte; with `drive`, those of Google Drive's client neither."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        with _drive_timeouts(seconds) if drive else nullcontext():
            yield
    finally:
        socket.setdefaulttimeout(before)


@contextmanager
def _drive_timeouts(seconds: float) -> Iterator[None]:
    """PySocks, through which httplib2 uses a proxy, does not mind the default of sockets."""
    from pydrive2.auth import GoogleAuth

    before = GoogleAuth.__init__
    GoogleAuth.__init__ = functools.partialmethod(before, http_timeout=seconds)
    try:
        yield
    finally:
        GoogleAuth.__init__ = before


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main(reasons: Path, seconds: float, arguments: list[str]) -> int:
    """Run dvc; its exit status."""
    from dvc.cli import main as run_dvc

    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    handler = _Reasons(reasons)
    for name in ("dvc", "dvc_data", "dvc_objects"):
        logger = logging.getLogger(name)
        for shown in logger.handlers:
            if shown.level >= logging.WARNING:  # dvc's own, of stderr
                shown.addFilter(lambda record: record.levelno < logging.ERROR)
        logger.addHandler(handler)
    with timeouts(seconds):
        return int(run_dvc(arguments) or 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
