"""What the network and Google may do to a push: it heals, or ends in bounded time with a line that says why."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gdrive.conftest import IMPATIENT, gone, tool
from tests.gdrive.server import Fault, StandIn
from tests.helpers import ROOT, files, wait_until
from tools.remote.transfer import transfer


def test_push_heals_what_google_asks_to_try_again(small: Path, google: StandIn) -> None:
    google.faults = [
        *(Fault(call, "503") for call in ("metadata", "list", "folder", "upload", "chunk")),
        *(Fault(call, "403") for call in ("list", "upload")),
        *(Fault(call, "401") for call in ("list", "folder", "upload")),
    ]
    result = tool(google, small, "push")
    assert google.is_exhausted()
    assert "again in" not in result.stderr  # the client's own retries do
    assert google.drive.files().items() <= files(small / ".dvc/cache").items()
    assert len(google.drive.files()) == 6


@pytest.mark.parametrize("kind", ["drop", "stall"])
def test_a_broken_upload_is_sent_again(kind: str, small: Path, google: StandIn) -> None:
    google.faults = [Fault("chunk", kind, min_bytes=10_000)]
    tool(google, small, "push", *IMPATIENT)
    assert google.is_exhausted()
    assert google.drive.files().items() <= files(small / ".dvc/cache").items()
    assert len(google.drive.files()) == 6


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


def test_what_stands_still_is_ended_with_all_that_it_started(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (small / "dvc.yaml").write_text("stages: {wait: {cmd: 'echo $$ > pid.txt && exec sleep 1000'}}\n")
    monkeypatch.chdir(small)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with pytest.raises(ConnectionError, match=r"repro failed 1 times, the last time with: no progress for 10 s"):
        transfer(["repro", "wait"], 10, 1, lambda reasons: None, {})
    pid = int((small / "pid.txt").read_text())
    wait_until(lambda: gone(pid))
