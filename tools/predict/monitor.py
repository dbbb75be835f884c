"""The drift monitor's word on images that were predicted. It needs PyTorch, so it is asked in a process of its own."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stages.core.errors import InputError
from stages.core.production import Window
from tools.monitor.command import EXIT_STATUS, in_words
from tools.shared import process


def judge(windows: Sequence[Window], folder: Path, name: str) -> int:
    """Print the verdict on stderr, and return the monitor's exit status.

    `folder` is that of the exported model, beside which its classifier and detector lie; where it was fetched for the
    registered `name`, theirs are fetched as well. The images go over as pixels: nothing is decoded twice.
    """
    names = [name for window in windows for name in window.names]
    places = {what: _beside(folder, name, what) for what in ("classifier", "drift")}
    with tempfile.TemporaryDirectory(prefix="predict-") as scratch:
        images, report_file = Path(scratch) / "images.npy", Path(scratch) / "report.json"
        np.save(images, np.concatenate([window.images for window in windows]))
        command = [sys.executable, "-m", "tools.monitor", str(images), "--json", str(report_file)]
        command += ["--classifier", str(places["classifier"]), "--detector", str(places["drift"])]
        ended = process.run(command)
        if ended.returncode not in EXIT_STATUS.values():
            if ended.returncode < 0:  # the kernel's out-of-memory killer leaves no words
                raise InputError(
                    f"--monitor: no verdict: the monitor was ended by signal {-ended.returncode} (out of memory?); the "
                    "predictions are not affected"
                )
            said = ended.stderr.strip().removeprefix("monitor: error: ").replace(str(images), "these images")
            raise InputError(f"--monitor: no verdict: {said}; the predictions are not affected")
        report: dict[str, Any] = json.loads(report_file.read_text())
    for row in report["images"]:
        row["path"] = names[int(row["path"].rpartition("[")[2].rstrip("]"))]
    print(in_words(report), file=sys.stderr)
    return ended.returncode


def _beside(folder: Path, name: str, what: str) -> Path:
    place = folder.parent / what
    if not place.is_dir():
        from tools.registry.revision import CACHE, model_folder

        if folder.is_relative_to(CACHE):
            return model_folder(name, f"models/{what}")
    return place
