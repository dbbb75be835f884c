"""What the network and Google may do to a transfer: it heals, or ends in bounded time with a line that says why."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.gdrive.conftest import tool
from tests.gdrive.server import Fault, StandIn
from tests.helpers import ROOT, files, start, wait_until
from tools.remote.transfer import transfer

IMPATIENT = ("--patience", "4", "--attempts", "3")


def exhausted(google: StandIn) -> bool:
    return all(fault.times == 0 for fault in google.faults)


def test_push_heals_what_google_asks_to_try_again(small: Path, google: StandIn) -> None:
    google.faults = [
        *(Fault(call, "503") for call in ("metadata", "list", "folder", "upload", "chunk")),
        *(Fault(call, "403") for call in ("list", "upload")),
        *(Fault(call, "401") for call in ("list", "folder", "upload")),
    ]
    result = tool(google, small, "push", *IMPATIENT)
    assert exhausted(google)
    assert "again in" not in result.stderr  # the client's own retries do
    assert google.drive.files().items() <= files(small / ".dvc/cache").items()
    assert len(google.drive.files()) == 6


def test_pull_heals_what_google_asks_to_try_again(empty: Path, made_once: Path, google: StandIn) -> None:
    google.faults = [Fault("download", kind) for kind in ("503", "403", "401")]
    google.faults += [Fault("metadata", kind) for kind in ("503", "403", "401", "drop")]  # those of the check before it
    result = tool(google, empty, "pull", *IMPATIENT)
    assert exhausted(google)
    assert "again in" not in result.stderr
    assert files(empty / "model", empty / "table") == files(made_once / "model", made_once / "table")


@pytest.mark.parametrize("kind", ["corrupt", "drop", "stall"])
def test_a_broken_download_is_fetched_again(kind: str, empty: Path, made_once: Path, google: StandIn) -> None:
    google.faults = [Fault("download", kind, min_bytes=10_000)]
    result = tool(google, empty, "pull", *IMPATIENT)
    assert exhausted(google)
    assert "pull failed (" in result.stderr
    assert "again in 1 s, 2 of 3" in result.stderr
    assert files(empty / "model", empty / "table") == files(made_once / "model", made_once / "table")


@pytest.mark.parametrize("kind", ["drop", "stall"])
def test_a_broken_upload_is_sent_again(kind: str, small: Path, google: StandIn) -> None:
    google.faults = [Fault("chunk", kind, min_bytes=10_000)]
    tool(google, small, "push", *IMPATIENT)
    assert exhausted(google)
    assert google.drive.files().items() <= files(small / ".dvc/cache").items()
    assert len(google.drive.files()) == 6


def test_a_network_that_stays_broken_ends_the_pull(empty: Path, google: StandIn) -> None:
    google.faults = [Fault("download", "stall", times=1000)]
    began = time.monotonic()
    result = tool(google, empty, "pull", "--patience", "1", "--attempts", "2", check=False)
    assert time.monotonic() - began < 60
    assert result.returncode == 1
    assert "remote: pull failed 2 times, the last time with: " in result.stderr
    assert "run it again later" in result.stderr
    assert not (empty / "model").exists()


def test_a_full_drive_is_named(small: Path, google: StandIn) -> None:
    google.drive.quota = 50_000
    result = tool(google, small, "push", *IMPATIENT, check=False)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("remote: error: no storage is left for pusher@driftline-tests")
    assert "use a folder in a Shared Drive" in result.stderr
    assert len(result.stderr.splitlines()) == 1

    google.drive.drive_id, google.drive.quota = None, 0  # a folder in My Drive: refused before anything is sent
    google.calls.clear()
    result = tool(google, small, "push", *IMPATIENT, check=False)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert "use a folder in a Shared Drive" in result.stderr
    assert set(google.calls) == {"token", "metadata", "about"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_when_the_tool_ends_so_does_dvc(number: int, empty: Path, google: StandIn) -> None:
    google.faults = [Fault("download", "stall", times=1000)]
    environment = google.environment | {"PYTHONPATH": str(ROOT)}
    process = start(empty, "python", "-m", "tools.remote", "pull", environment=environment)
    wait_until(lambda: "download" in google.calls)
    (child,) = psutil.Process(process.pid).children()
    process.send_signal(number)
    if number == signal.SIGTERM:
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGTERM
        assert output.splitlines()[-1] == "remote: pull stopped by SIGTERM; what has arrived stays"
    else:
        process.communicate(timeout=60)
    wait_until(lambda: gone(child), seconds=20)


def test_what_stands_still_is_ended_with_all_that_it_started(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (small / "dvc.yaml").write_text("stages: {wait: {cmd: 'echo $$ > pid.txt && exec sleep 1000'}}\n")
    monkeypatch.chdir(small)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with pytest.raises(ConnectionError, match=r"repro failed 1 times, the last time with: no progress for 2 s"):
        transfer(["repro", "wait"], 2, 1, lambda reasons: None, {})
    pid = int((small / "pid.txt").read_text())
    wait_until(lambda: not psutil.pid_exists(pid) or gone(psutil.Process(pid)), seconds=20)


def gone(process: psutil.Process) -> bool:
    """Whether a process has ended, be it that nobody has asked for its exit status yet."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
