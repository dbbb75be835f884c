"""Weights & Biases as a mirror of the record: what a stage tells it, and how long it may keep the stage waiting.

The stage only puts messages into a queue; a process of its own (`mirror_process.py`) talks to W&B. Whatever W&B does
(hang, fail, print, draw random numbers, leave threads behind), the stage does not notice until it waits for that
process at its end, for `wandb.timeout` seconds at most. `wandb` is never imported into a stage's process.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import psutil
from pydantic import Field, field_validator

from stages.core.errors import Stopped
from stages.core.params import Section

# Named, not imported: it cannot change a result, so that editing it reruns no stage.
_PROCESS = "stages.core.mirror_process"
_MODES = ("disabled", "offline", "online")
_STOPPED_SECONDS = 1.0  # that a stage waits which was told to stop: its own end must not take longer than 5
_SPARE_SECONDS = 0.3  # at least: of the waiting time, for the process to end itself, and then for the stage to kill it


class WandbParams(Section):
    """The `wandb` section of params.yaml."""

    mode: Literal["disabled", "offline", "online"]
    project: Annotated[str, Field(min_length=1, pattern=r"^[^/\\#?%:]+$")]
    entity: Annotated[str, Field(min_length=1)] | None
    timeout: Annotated[float, Field(ge=1, le=600)]

    @field_validator("mode", mode="before")
    @classmethod
    def _environment_wins(cls, value: Any) -> Any:
        mode = os.environ.get("WANDB_MODE") or value
        if mode not in _MODES and mode != value:
            raise ValueError(f"the environment's WANDB_MODE is {mode!r} (valid: {', '.join(_MODES)})")
        return mode


class NoMirror:
    """Stands in where nothing is mirrored."""

    def log(self, step: int, metrics: dict[str, float], history: bool = True) -> None:
        """Nothing to do."""

    def results(self, metrics: Path, plots: Path) -> None:
        """Nothing to do."""

    def model(self, folder: Path) -> None:
        """Nothing to do."""


class Mirror:
    """Passes on what a stage records. No method waits but `close`, and none raises because of W&B."""

    def __init__(self, start: dict[str, Any]) -> None:
        """Start the process, with a folder for its temporary files. OSError when the machine has no room for either."""
        root = str(Path(__file__).parents[2])
        paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        self._messages: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._scratch = tempfile.mkdtemp(prefix="driftline-wandb-")  # a short path: sockets lie in it
        try:
            self._process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-m", _PROCESS, self._scratch],
                env=os.environ | {"PYTHONPATH": paths},
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the stage, which then says how it ended
            )
        except OSError:
            shutil.rmtree(self._scratch, ignore_errors=True)
            raise
        self._messages.put(start)
        self._sender = threading.Thread(target=self._send, daemon=True)
        self._sender.start()

    def log(self, step: int, metrics: dict[str, float], history: bool = True) -> None:
        """Metrics at an optimizer step; without `history` only their latest value is kept."""
        self._messages.put({"verb": "log", "step": step, "metrics": metrics, "history": history})

    def results(self, metrics: Path, plots: Path) -> None:
        """The numbers of a JSON file; the pictures and tables of a folder."""
        self._messages.put({"verb": "results", "metrics": str(metrics), "plots": str(plots)})

    def model(self, folder: Path) -> None:
        """The model that this stage made."""
        self._messages.put({"verb": "model", "folder": str(folder)})

    def close(self, exit_code: int, seconds: float) -> None:
        """Wait at most so many seconds until all is passed on; then end the process, and say so."""
        spare = max(_SPARE_SECONDS, seconds / 10)
        last = time.time() + seconds - spare
        self._messages.put({"verb": "end", "exit_code": exit_code, "deadline": last - spare})
        self._messages.put(None)
        try:
            self._process.wait(max(last - time.time(), 0.0))
        except subprocess.TimeoutExpired:
            print("wandb: warning: W&B's process did not end in time and was ended; the run is whole", file=sys.stderr)
        finally:
            _kill(self._process.pid)
            self._process.wait()
            self._sender.join(1)
            shutil.rmtree(self._scratch, ignore_errors=True)  # the process has done so, if it ended by itself

    def _send(self) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        with suppress(OSError), pipe:  # the process may be gone; why, it has said itself
            while (message := self._messages.get()) is not None:
                pipe.write(json.dumps(message).encode() + b"\n")
                pipe.flush()


@contextmanager
def open_mirror(
    stage: str,
    wandb: WandbParams,
    cache_dir: Path,
    params: Section,
    *,
    group: str | None = None,
    model: Path | None = None,
) -> Iterator[Mirror | NoMirror]:
    """Mirror a stage while the block runs, unless `wandb.mode` is disabled.

    W&B shows runs of one `group` together. A stage that uses a model gives its folder instead: its group is that of
    the run that made the model.
    """
    if wandb.mode == "disabled":
        yield NoMirror()
        return
    start = {
        "stage": stage,
        "mode": wandb.mode,
        "project": wandb.project,
        "entity": wandb.entity,
        "timeout": wandb.timeout,
        "folder": str(cache_dir),
        "params": params.model_dump(mode="json", exclude={"wandb"}),
        "group": group,
        "model": str(model) if model is not None else None,
        "pid": os.getpid(),
    }
    try:
        mirror = Mirror(start)
    except OSError as error:  # no place for temporary files, no process left
        print(f"wandb: warning: {error}; this run is not mirrored", file=sys.stderr)
        yield NoMirror()
        return
    exit_code, seconds = 1, min(wandb.timeout, _STOPPED_SECONDS)
    try:
        yield mirror
        exit_code, seconds = 0, wandb.timeout
    except Stopped as stop:
        exit_code = 128 + stop.signal_number
        raise
    finally:
        mirror.close(exit_code, seconds)


def _kill(pid: int) -> None:
    """End a process and those that it started (wandb-core has a session of its own)."""
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        children = process.children(recursive=True)
        for one in [*children, process]:
            with suppress(psutil.Error):
                one.kill()
        psutil.wait_procs(children, timeout=0.2)  # until then they may write
