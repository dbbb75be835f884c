"""A tool as a process: told to stop, it ends what it has started, removes what is temporary, and says so."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager


def run_tool(main: Callable[[], int | None], name: str) -> None:
    """The body of a tool's process, which `main` returns the exit status of; SIGTERM ends it as Ctrl-C does, with 143.

    What `main` then has open is closed: KeyboardInterrupt is raised in it.
    """
    from stages.core.stopping import run_stage  # needs packages; the doctor, which uses `run`, does without

    def body() -> None:
        if status := main():
            raise SystemExit(status)

    run_stage(body, name)


@contextmanager
def signals_held() -> Iterator[None]:
    """SIGTERM and SIGINT that come meanwhile are handled when the block ends.

    Around `Popen`: an interrupt between the start of a process and the end of the call would leave it running with no
    name here. Only the main thread is interrupted, so other threads need nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for late in came:
            signal.raise_signal(late)


def run(command: Sequence[str], env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, its words captured. It does not outlive an interrupt of this process.

    `subprocess.run` would kill it then, and git, which removes its locks when it is asked to end, would leave them.
    """
    with ExitStack() as stack:
        with signals_held():
            process = subprocess.Popen(  # noqa: S603
                command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="surrogateescape",  # names of files need not be UTF-8
            )
            stack.enter_context(process)
            stack.callback(_end, process)
        output, errors = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.terminate()
        process.wait()
