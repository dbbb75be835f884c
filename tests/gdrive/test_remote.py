"""Data goes to Google Drive and comes back, by the real dvc and its real client; the stand-in checks what they send."""

from __future__ import annotations

import json
from pathlib import Path

from tests.gdrive.conftest import clone, command, put_key, tool
from tests.gdrive.keys import Account
from tests.gdrive.server import StandIn
from tests.helpers import files, run


def test_pushed_data_comes_back_into_a_fresh_clone(
    small: Path, google: StandIn, account: Account, tmp_path: Path
) -> None:
    tool(google, small, "push")
    cached = files(small / ".dvc/cache")
    pushed = google.drive.files()
    assert pushed.items() <= cached.items()
    assert sorted(len(cached[name]) for name in cached.keys() - pushed.keys())[-1] == 300_000  # raw is not pushed
    assert len(google.tokens) >= 2  # each for a signed assertion
    assert json.loads(command(google, small, "dvc", "status", "--cloud", "--json", "model", "table").stdout) == {}

    there = clone(small, tmp_path / "clone")
    put_key(there, account)
    tool(google, there, "pull")
    for output in ("model", "table"):
        assert files(there / output) == files(small / output)
    assert not (there / "raw").exists()
    # What was not pushed is made again, with the same bytes, and nothing else is stale.
    shown = command(google, there, "dvc", "repro", "--pull").stdout
    assert "Running stage 'raw'" in shown
    assert "Running stage 'model'" not in shown
    assert files(there / "raw") == files(small / "raw")
    assert run(there, "git", "status", "--porcelain").stdout == ""
