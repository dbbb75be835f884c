"""What the network and Google may do to a pull: it heals, or ends in bounded time with a line that says why."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.gdrive.conftest import IMPATIENT, gone, tool
from tests.gdrive.server import Fault, StandIn
from tests.helpers import PATIENCE, ROOT, files, start, wait_until


def test_pull_heals_what_google_asks_to_try_again(empty: Path, made_once: Path, google: StandIn) -> None:
    google.faults = [Fault("download", kind) for kind in ("503", "403", "401")]
    google.faults += [Fault("metadata", kind) for kind in ("503", "403", "401", "drop")]  # those of the check before it
    result = tool(google, empty, "pull")
    assert google.is_exhausted()
    assert "again in" not in result.stderr
    assert files(empty / "model", empty / "table") == files(made_once / "model", made_once / "table")


@pytest.mark.parametrize("kind", ["corrupt", "drop", "stall"])
def test_a_broken_download_is_fetched_again(kind: str, empty: Path, made_once: Path, google: StandIn) -> None:
    google.faults = [Fault("download", kind, min_bytes=10_000)]
    result = tool(google, empty, "pull", *IMPATIENT)
    assert google.is_exhausted()
    assert "pull failed (" in result.stderr
    assert "again in 1 s, 2 of 3" in result.stderr
    assert files(empty / "model", empty / "table") == files(made_once / "model", made_once / "table")


def test_a_network_that_is_away_for_a_while_is_waited_for(empty: Path, made_once: Path, google: StandIn) -> None:
    """The download breaks, and so does the question why."""
    google.faults = [Fault("download", "drop", min_bytes=10_000), Fault("metadata", "drop", times=3, after="download")]
    result = tool(google, empty, "pull", *IMPATIENT)
    assert google.is_exhausted()
    assert "again in 1 s, 2 of 3" in result.stderr
    assert files(empty / "model", empty / "table") == files(made_once / "model", made_once / "table")


def test_a_network_that_stays_broken_ends_the_pull(empty: Path, google: StandIn) -> None:
    google.faults = [Fault("download", "stall", times=1000)]
    began = time.monotonic()
    result = tool(google, empty, "pull", "--patience", "1", "--attempts", "2", check=False)
    assert time.monotonic() - began < 900, "the stand-in would let go after 1800 s"
    assert result.returncode == 1
    assert "remote: pull failed 2 times, the last time with: " in result.stderr
    assert "run it again later" in result.stderr
    assert not (empty / "model").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_when_the_tool_ends_so_does_dvc(number: int, empty: Path, google: StandIn) -> None:
    google.faults = [Fault("download", "stall", times=1000)]
    environment = google.environment | {"PYTHONPATH": str(ROOT)}
    process = start(empty, "python", "-m", "tools.remote", "pull", environment=environment)
    wait_until(lambda: "download" in google.calls)
    (child,) = psutil.Process(process.pid).children()
    process.send_signal(number)
    if number == signal.SIGTERM:
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 128 + signal.SIGTERM
        assert output.splitlines()[-1] == "remote: pull stopped by SIGTERM; what has arrived stays"
    else:
        process.communicate(timeout=PATIENCE)
    wait_until(lambda: gone(child))
