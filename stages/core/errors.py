"""Errors that the user can mend, and the one place where a process turns them into a message."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn


class InputError(ValueError):
    """Something the user gave is wrong: the message names the file or key, what is wrong and what to do."""


class Stopped(Exception):  # noqa: N818  # no error: somebody asked for it
    """The run was asked to stop and has saved what it needs to go on.

    The message says how to go on; it is empty where another process says it.
    """

    def __init__(self, message: str, signal_number: int = signal.SIGTERM) -> None:
        super().__init__(message)
        self.signal_number = signal_number


def run_main(main: Callable[[], int | None], name: str) -> None:
    """Run `main` as the body of a process, and end the process.

    An `InputError` ends it with its message alone on stderr (exit status 2 for tools and stages alike); `Stopped` and
    an interrupt with 128 plus the signal's number; a ConnectionError, which is no fault of this process, with its
    message and 1. Anything else is a defect of ours and keeps its traceback.
    """
    try:
        status = main()
    except InputError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        status = 2
    except Stopped as stop:
        if str(stop):
            print(f"{name}: {stop}", file=sys.stderr)
        _leave(128 + stop.signal_number)
    except ConnectionError as error:
        print(f"{name}: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        status = 128 + signal.SIGINT
    raise SystemExit(status or 0)


def _leave(status: int) -> NoReturn:
    """End the process, but do not take PyTorch apart: that takes seconds, which `docker stop` may not give."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
