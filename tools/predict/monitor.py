"""The drift monitor's word on images that were predicted. It needs PyTorch, so it is asked in a process of its own."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from stages.core.errors import InputError
from stages.core.production import Window
from tools.monitor.command import EXIT_STATUS, in_words
from tools.shared import process


class Monitored:
    """The pixels of predicted images, in a temporary file until the monitor is asked: nothing is decoded twice.

    A context: at its end, the file is gone. What goes wrong here leaves the predictions as they are.
    """

    def __init__(self, size: int) -> None:
        """Images are squares of `size` pixels. Raises InputError where there is no place for temporary files."""
        try:
            self._scratch = tempfile.TemporaryDirectory(prefix="predict-")
        except OSError as error:
            raise InputError(f"--monitor: no place for temporary files: {error.strerror}; set TMPDIR to one") from None
        self._names: list[str] = []
        self._size = size
        self._path = Path(self._scratch.name) / "images.npy"
        self._file: IO[bytes] = self._path.open("wb")
        self._failed: OSError | None = None
        self._attempt(self._write_header)

    def __enter__(self) -> Monitored:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._attempt(self._file.close)
        self._scratch.cleanup()

    def add(self, window: Window) -> None:
        """Keep the images of a window."""
        self._names += window.names
        self._attempt(lambda: self._file.write(window.images.data))

    def judge(self, folder: Path, name: str) -> int:
        """Print the verdict on stderr, and return the monitor's exit status.

        `folder` is that of the exported model, beside which its classifier and detector lie; where it was fetched for
        the registered `name`, theirs are fetched as well.
        """
        self._attempt(self._write_header)
        self._attempt(self._file.close)
        if self._failed:
            raise InputError(
                f"--monitor: no verdict: {self._path.parent.parent}: {self._failed.strerror}; free some space there, "
                "or set TMPDIR to another place; the predictions are not affected"
            )
        places = {what: _beside(folder, name, what) for what in ("classifier", "drift")}
        report_file = self._path.with_name("report.json")
        command = [sys.executable, "-m", "tools.monitor", str(self._path), "--json", str(report_file)]
        command += ["--classifier", str(places["classifier"]), "--detector", str(places["drift"])]
        ended = process.run(command)
        if ended.returncode not in EXIT_STATUS.values():
            if ended.returncode < 0:  # the kernel's out-of-memory killer leaves no words
                raise InputError(
                    f"--monitor: no verdict: the monitor was ended by signal {-ended.returncode} (out of memory?); the "
                    "predictions are not affected"
                )
            said = ended.stderr.strip().split("monitor: error: ")[-1].replace(str(self._path), "these images")
            raise InputError(f"--monitor: no verdict: {said}; the predictions are not affected")
        report: dict[str, Any] = json.loads(report_file.read_text())
        for row in report["images"]:
            row["path"] = self._names[int(row["path"].rpartition("[")[2].rstrip("]"))]
        print(in_words(report), file=sys.stderr)
        return ended.returncode

    def _write_header(self) -> None:
        """Write the header of a .npy file at its beginning: NumPy leaves room in it for the number to grow."""
        shape = (len(self._names), self._size, self._size, 3)
        self._file.seek(0)
        np.lib.format.write_array_header_1_0(self._file, {"descr": "|u1", "fortran_order": False, "shape": shape})

    def _attempt(self, write: Callable[[], object]) -> None:
        if self._failed is None:
            try:
                write()
            except OSError as error:
                self._failed = error


def _beside(folder: Path, name: str, what: str) -> Path:
    place = folder.parent / what
    if not place.is_dir():
        from tools.registry.revision import CACHE, model_folder

        if folder.is_relative_to(CACHE):
            return model_folder(name, f"models/{what}")
    return place
