"""The container's entrypoint, run without a container: which remotes a key of Google Drive is given to."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.helpers import ROOT, run

KEY = '{"type": "service_account"}'


@pytest.mark.parametrize(
    ("remotes", "given"),
    [
        (["gdrive=gdrive://a"], ["gdrive"]),
        (["gdrive=gdrive://FOLDER_ID", "storage=gdrive://b", "folder=/tmp/somewhere"], ["gdrive", "storage"]),
        (["storage=gdrive://b"], ["storage"]),
        ([], []),
    ],
)
def test_a_key_is_for_every_remote_on_google_drive(remotes: list[str], given: list[str], tmp_path: Path) -> None:
    """A section of a remote that is not there would break every command of dvc."""
    run(tmp_path, "git", "init", "--quiet")
    run(tmp_path, "dvc", "init", "--quiet")
    for name, url in (remote.split("=") for remote in remotes):
        run(tmp_path, "dvc", "remote", "add", name, url)
    shown = subprocess.run(
        ["sh", str(ROOT / "docker-entrypoint.sh"), "dvc", "config", "--list"],
        cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path), "GDRIVE_CREDENTIALS_DATA": KEY},
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0, shown.stderr
    lines = [line for line in shown.stdout.splitlines() if "gdrive_service_account_json_file_path" in line]
    assert [line.split(".")[1] for line in lines] == given
    for line in lines:
        assert Path(line.split("=")[1]).read_text() == KEY
