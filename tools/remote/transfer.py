"""dvc push and pull with patience: a time limit on standing still, and another try where that may help.

What has arrived stays, so a further try goes on where the last one stopped.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from stages.core.errors import InputError, Stopped
from stages.core.stopping import StopRequest, stop_requests
from tools.shared.commands import environment

PATIENCE = 120.0  # seconds without any progress; PyDrive2 waits up to 20 s between two tries of its own
ATTEMPTS = 4
_POLL_SECONDS = 0.1
_SECONDS_TO_END = 5.0
_NOWHERE = "neither locally nor on remote"


def transfer(
    arguments: list[str], patience: float, attempts: int, explain: Callable[[str], None], variables: dict[str, str]
) -> None:
    """Run a dvc command that moves data, again and again when it fails or stands still.

    `explain` gets the reasons of a failure and raises where another try is useless; `variables` are added to the
    environment. ConnectionError after the last attempt, Stopped when somebody asked for it.
    """
    name = arguments[0]
    with stop_requests() as request:
        for attempt in range(1, attempts + 1):
            reasons = _run(arguments, patience, variables, request)
            if reasons is None:
                return
            explain(reasons)
            reason = _first_error(reasons)
            if attempt < attempts:
                pause = 2.0 ** (attempt - 1)
                print(
                    f"remote: {name} failed ({reason}); again in {pause:g} s, {attempt + 1} of {attempts}",
                    file=sys.stderr,
                )
                _wait(pause, request)
    raise ConnectionError(
        f"{name} failed {attempts} times, the last time with: {reason}; what has arrived stays, so run it again later"
    )


def _run(arguments: list[str], patience: float, variables: dict[str, str], request: StopRequest) -> str | None:
    """One attempt: None when it went well, else why it did not."""
    with tempfile.TemporaryDirectory(prefix="driftline-transfer-") as folder:
        reasons = Path(folder) / "reasons"
        reasons.touch()
        process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "tools.remote.patient_dvc", str(reasons), str(patience / 2), *arguments],
            env=environment() | variables,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            stands_still = _watch(process, patience, request)
        finally:
            _end(process)
        if request:
            raise Stopped(f"{arguments[0]} {request.reason}; what has arrived stays", request.signal_number)
        if stands_still:
            return f"ERROR: no progress for {patience:g} s"
        said = reasons.read_text(errors="replace")
        lacks = arguments[0] == "push" and _NOWHERE in said  # a warning to dvc
        return said if process.returncode or lacks else None


def _first_error(reasons: str) -> str:
    """The first error, which is that of a file; the last one only says how many there were."""
    error = next((line for line in reasons.splitlines() if line.startswith("ERROR: ")), "ERROR: dvc said nothing")
    if "CheckoutError" in error:
        return "a download was damaged: its hash differs"
    return error.removeprefix("ERROR: ")[:300]


def _watch(process: subprocess.Popen[bytes], patience: float, request: StopRequest) -> bool:
    """Wait for a process; whether it stood still, which is to use no processor time at all for `patience` seconds.

    Reading, hashing, encrypting and sending all use some. Waiting for an answer uses none.
    """
    used, moved = 0.0, time.monotonic()
    while process.poll() is None and not request:
        now = _processor_seconds(process.pid)
        if now > used:
            used, moved = now, time.monotonic()
        if time.monotonic() - moved > patience:
            return True
        with suppress(subprocess.TimeoutExpired):
            process.wait(_POLL_SECONDS)
    return False


def _processor_seconds(pid: int) -> float:
    """What a process has used, in steps of about 0.01 s; 0 when it is gone."""
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all of its group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_SECONDS_TO_END)
            return


def _wait(seconds: float, request: StopRequest) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if request:
            raise Stopped(f"{request.reason}; what has arrived stays", request.signal_number)
        time.sleep(_POLL_SECONDS)


def final_reason(reasons: str) -> None:
    """InputError for what no further try can mend, whatever the remote is."""
    if "CheckoutError" in reasons and "nor on remote" in reasons:
        raise InputError(
            "the remote does not have everything that dvc.lock names: make push where it was made, or "
            "make it here: dvc repro"
        )
    if _NOWHERE in reasons and "CheckoutError" not in reasons:
        raise InputError(
            "the remote does not have everything that dvc.lock names, nor has DVC's cache: make push where it was "
            "made, or make it here: dvc repro"
        )
    if "unsaved files" in reasons:
        paths = reasons.partition("to force. ")[2].splitlines()[0]
        raise InputError(
            f"not what DVC has of them: {paths}; move them away, or `dvc checkout --force` puts DVC's in their place; "
            "then pull again"
        )
    if "No space left on device" in reasons or "Errno 28" in reasons:
        raise InputError(
            f"a disk is full: {_first_error(reasons)}; make room on it (in DVC's cache, by `dvc gc --all-commits "
            "--all-experiments`, which keeps what commits and experiments use)"
        )
