"""The process that talks to W&B: reads a stage's messages from stdin, one JSON object a line, until the stage ends.

Its argument is a folder of the stage's for temporary files, which it removes: the stage may not live to do so.

The first message says what the run is; then come `log`, `results`, `model`, and at last `end`. What goes wrong is said
in one line on stderr, everything else that wandb prints is dropped. A run that W&B does not take stays on this disk,
whole, for `wandb sync`.

    <cache_dir>/wandb/[offline-]run-*/    the runs
    <cache_dir>/wandb/groups/HASH         the group of the run that made the model of this hash
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import psutil

from stages.core.wandb_access import prepare_environment, unreachable
from stages.core.wandb_run import VERBS, open_run

_SECONDS_ALONE = 2.0  # to finish the run of a stage that was killed


class Warnings:
    """At most one line for the user, whatever goes wrong."""

    def __init__(self) -> None:
        self._stderr = os.fdopen(os.dup(2), "w")
        self._said = False
        self.secret: str | None = None  # what must not be said

    def say(self, problem: str, folder: Path | None) -> None:
        """Say the first problem, and what to do with the run that lies in `folder`."""
        if self._said:
            return
        self._said = True
        problem = " ".join(problem.split())[:300].rstrip(".")
        if self.secret:
            problem = problem.replace(self.secret, "***")
        then = f"; send it later: wandb sync {folder}" if folder else "; this run is not mirrored"
        with suppress(OSError):  # nobody listens any more
            print(f"wandb: warning: {problem}{then}", file=self._stderr, flush=True)


class Inbox:
    """The stage's messages. When the last has come, or the stage is gone, the process has to end in time."""

    def __init__(self, when_late: Callable[[], object]) -> None:
        self._messages: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._when_late = when_late
        self.ended = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        self.first = self._messages.get()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All messages; the last is `end`."""
        while True:
            message = self._messages.get()
            yield message
            if message["verb"] == "end":
                return

    def _read(self) -> None:
        message: dict[str, Any] = {}
        with suppress(ValueError):  # half a line, when the stage was killed
            for line in sys.stdin.buffer:
                message = json.loads(line)
                self._messages.put(message)
        if message.get("verb") != "end":  # it was
            message = {"verb": "end", "exit_code": 1, "deadline": time.time() + _SECONDS_ALONE}
            self._messages.put(message)
        self.ended.set()
        time.sleep(max(message["deadline"] - time.time(), 0.0))
        self._when_late()


def main() -> None:
    """Mirror one stage."""
    warnings = Warnings()
    run: Any = None
    # wandb removes its temporary files when Python ends in the ordinary way, which this process does not.
    scratch = os.environ["TMPDIR"] = sys.argv[1]

    def when_late() -> None:
        warnings.say("W&B did not take everything in time", _folder(run))
        end_now(0, scratch)

    inbox = Inbox(when_late)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    start = inbox.first
    if "verb" in start:  # the stage was killed before it could say anything
        end_now(0, scratch)
    warnings.secret = prepare_environment(Path(start["folder"]))
    try:
        problem = unreachable(inbox.ended) if start["mode"] == "online" else None
        if start["mode"] == "online" and problem is None:
            try:
                run = open_run(start, "online")
            except Exception as error:
                problem = f"W&B opens no run: {_words(error)}"
        run = run or open_run(start, "offline")
        if problem:
            warnings.say(problem, _folder(run))
    except Exception as error:  # whatever wandb raises is a warning
        warnings.say(_words(error), None)
        end_now(1, scratch)
    for message in inbox:
        try:
            VERBS[message["verb"]](run, start, message)
        except Exception as error:
            warnings.say(_words(error), _folder(run))
    end_now(0, scratch)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _folder(run: Any) -> Path | None:
    return Path(run.dir).parent if run is not None else None


def end_now(exit_code: int, scratch: str) -> NoReturn:
    """End this process and wandb's, and remove `scratch`: wandb's own way of ending may wait for the network."""
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            child.kill()
    shutil.rmtree(scratch, ignore_errors=True)
    os._exit(exit_code)


if __name__ == "__main__":
    main()
