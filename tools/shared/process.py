"""A tool as a process: told to stop, it ends what it has started, removes what is temporary, and says so."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping, Sequence


def run_tool(main: Callable[[], int | None], name: str) -> None:
    """The body of a tool's process, which `main` returns the exit status of; SIGTERM ends it as Ctrl-C does, with 143.

    What `main` then has open is closed: KeyboardInterrupt is raised in it.
    """
    from stages.core.stopping import run_stage  # needs packages; the doctor, which uses `run`, does without

    def body() -> None:
        if status := main():
            raise SystemExit(status)

    run_stage(body, name)


def run(command: Sequence[str], env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, its words captured. It does not outlive an interrupt of this process.

    `subprocess.run` would kill it then, and git, which removes its locks when it is asked to end, would leave them.
    """
    with subprocess.Popen(  # noqa: S603
        command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            output, errors = process.communicate()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)
