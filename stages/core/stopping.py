"""Requests to stop: SIGTERM, Ctrl-C, or the death of the process that started the run."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import psutil

from stages.core.errors import run_main

_POLL_SECONDS = 1.0


class StopRequest:
    """Whether somebody wants the run to stop; looked at between steps."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.signal_number: int = signal.SIGTERM

    def __bool__(self) -> bool:
        return self.reason is not None

    def ask(self, reason: str, signal_number: int = signal.SIGTERM) -> None:
        """Record the wish; the first one counts."""
        if self.reason is None:
            self.reason, self.signal_number = reason, signal_number


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn SIGTERM and SIGINT into a request while the block runs; a second SIGINT interrupts at once.

    dvc leaves a stage's process running and writing when dvc itself is killed, so the run also watches the dvc
    process (or torchrun's agent) that it belongs to.
    """
    request = StopRequest()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if request and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.ask(f"stopped by {signal.Signals(number).name}", number)

    ended = watch_owner(request.ask)
    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        ended.set()
        for number, handler in before.items():
            signal.signal(number, handler)


def run_stage(main: Callable[[], None], name: str) -> None:
    """`run_main` for a stage with nothing to save: SIGTERM, Ctrl-C and the death of dvc end it, and it cleans up."""
    asked = StopRequest()

    def stop(number: int, frame: FrameType | None) -> None:
        asked.ask("interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}", number)
        raise KeyboardInterrupt(asked.reason, asked.signal_number)

    def when_gone(reason: str) -> None:
        if not asked:  # else it is ending, and a second interrupt would break into that
            asked.ask(reason)
            os.kill(os.getpid(), signal.SIGTERM)

    def stopped_or_ended() -> None:
        try:
            main()
        except BaseException:
            if asked:  # libraries catch it at times, and fail of something else then
                raise KeyboardInterrupt(asked.reason, asked.signal_number) from None
            raise

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    watch_owner(when_gone)
    run_main(stopped_or_ended, name)


def watch_owner(when_gone: Callable[[str], None]) -> threading.Event:
    """Call `when_gone(reason)` from a thread when the process that this one belongs to dies, until the event is set."""
    ended = threading.Event()
    owner = _owner()

    def watch(owner: psutil.Process) -> None:
        while not ended.wait(_POLL_SECONDS):
            if not _is_alive(owner) or (owner.pid == 1 and not _is_dvc(owner) and "DVC_STAGE" in os.environ):
                when_gone(f"stopped, because the process that started it ({owner.pid}) is gone")
                return

    if owner is not None:
        threading.Thread(target=watch, args=(owner,), daemon=True).start()
    return ended


def _owner() -> psutil.Process | None:
    """The process whose death ends the run: torchrun's agent, or dvc (which may have a shell in between)."""
    parents = psutil.Process().parents()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return parents[0] if parents else None
    if "DVC_STAGE" not in os.environ:  # started by hand: nohup and the like must go on working
        return None
    return next(filter(_is_dvc, parents), parents[0] if parents else None)


def _is_dvc(process: psutil.Process) -> bool:
    try:
        return any(os.path.basename(word).startswith("dvc") for word in process.cmdline()[:3])
    except psutil.Error:
        return False


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running()) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
