"""Programs that a tool runs end with it, whenever it is told to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from typing import Any

import pytest

from tools.shared.process import run, signals_held


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_moment_of_the_start_ends_the_program(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[subprocess.Popen[str]] = []

    class Signalled(subprocess.Popen[str]):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            signal.raise_signal(number)
            begun.append(self)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Signalled)
    before = signal.signal(number, interrupt)
    try:
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            run(["sleep", "60"])
        assert signal.getsignal(number) is interrupt
    finally:
        signal.signal(number, before)
    assert begun[0].returncode == -signal.SIGTERM
    assert time.monotonic() - started < 30


def test_signals_that_come_meanwhile_are_handled_at_the_end() -> None:
    found: list[str] = []
    before = signal.signal(signal.SIGTERM, lambda *_: found.append("handled"))
    try:
        with signals_held():
            signal.raise_signal(signal.SIGTERM)
            found.append("inside")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert found == ["inside", "handled"]


def test_programs_run_from_any_thread() -> None:
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(run(["echo", "said"]).stdout))
    thread.start()
    thread.join()
    assert found == ["said\n"]


def test_names_that_are_not_utf8_come_back_as_they_are() -> None:
    assert os.fsencode(run(["printf", r"caf\351.jpg"]).stdout) == b"caf\xe9.jpg"
