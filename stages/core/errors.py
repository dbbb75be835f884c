"""Errors that the user can mend, and the one place where a process turns them into a message."""

from __future__ import annotations

import atexit
import errno
import gc
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

# What the machine refuses, and what to do: no defect of ours.
_MACHINE = {
    errno.ENOSPC: "free some space (or inodes, `df -i`) and run the same command again",
    errno.EDQUOT: "your quota is used up: free some space and run the same command again",
    errno.EROFS: "the place cannot be written to: mount it writable, or work in another place",
    errno.EACCES: "you may not: see who owns it (`ls -ld`)",
    errno.EPERM: "you may not: see who owns it (`ls -ld`)",
    errno.EMFILE: "raise the limit of open files (`ulimit -n 1024`)",
    errno.ENFILE: "the machine has too many open files: end some programs",
    errno.EIO: "the disk has a fault",
}


class InputError(ValueError):
    """Something the user gave is wrong: the message names the file or key, what is wrong and what to do."""


class DamagedError(InputError):
    """A file is not what it should be: damaged, cut off, or something else altogether."""


def where_dvc_has_it(path: Path) -> str:
    """What a message about a file that is not there ends with: how to get it, if DVC keeps it; else nothing."""
    pointer = path.with_name(f"{path.name}.dvc")
    if not os.path.isfile(pointer):  # noqa: PTH113  # unlike Path.is_file, it says no to a name that is too long
        return ""
    return f"; DVC keeps it: `make pull` or `dvc checkout {pointer}` (`dvc exp run --temp` has it if no stage is named)"


def ran_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error of PyTorch, which is not imported for this, says that device or host memory is exhausted."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


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
    an interrupt with 128 plus the signal's number; a ConnectionError and what the machine refuses (a full disk), which
    are no fault of this process, with a message and 1. Anything else is a defect of ours and keeps its traceback.
    """
    # The interpreter's last collections walk through all of PyTorch, a second and more, and free nothing that matters.
    atexit.register(gc.freeze)
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
    except OSError as error:
        if error.errno not in _MACHINE:
            raise
        place = f"{error.filename}: " if error.filename else ""
        print(f"{name}: error: {place}{error.strerror}; {_MACHINE[error.errno]}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt as interrupt:
        reason, number = interrupt.args or ("interrupted", signal.SIGINT)
        print(f"{name}: {reason}; run the same command again", file=sys.stderr)
        status = 128 + number
    raise SystemExit(status or 0)


def _leave(status: int) -> NoReturn:
    """End the process, but do not take PyTorch apart: that takes seconds, which `docker stop` may not give."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
