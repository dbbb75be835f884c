"""How a process ends."""

from __future__ import annotations

import sys

import pytest

from tests.helpers import ROOT, run

PROCESS = """
import atexit, gc
from stages.core.errors import InputError, run_main

def main():
    # What is registered after `run_main` has begun comes before what it registers, the rest after it.
    atexit.register(lambda: print(gc.get_freeze_count() > 0))
    {body}

atexit.register(lambda: print(gc.get_freeze_count() > 1000))
run_main(main, "tool")
"""


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("return 10", 10, ""),
        ("return None", 0, ""),
        ("raise InputError('params.yaml: bad')", 2, "tool: error: params.yaml: bad\n"),
        ("raise ConnectionError('gone')", 1, "tool: gone\n"),
        ("raise OSError(28, 'No space left', 'models/x')", 1, "tool: error: models/x: No space left; "),
        ("raise KeyboardInterrupt", 130, "tool: interrupted; run the same command again\n"),
    ],
)  # fmt: skip
def test_nothing_is_collected_at_the_end(body: str, status: int, said: str) -> None:
    ended = run(ROOT, sys.executable, "-c", PROCESS.format(body=body), check=False)
    assert (ended.returncode, ended.stdout) == (status, "False\nTrue\n")
    assert ended.stderr.startswith(said)
    assert bool(ended.stderr) == bool(said)
