"""The lock in a virtual environment of its own, installed by `make setup`: its dvc pushes to Google Drive."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from tests.gdrive.conftest import command, put_key, set_folder
from tests.gdrive.drive import FOLDER_ID
from tests.gdrive.keys import Account, make_certificates
from tests.gdrive.server import HOSTS, StandIn
from tests.helpers import ROOT, copy_of_checkout, files, run, start


def explained() -> list[str]:
    """What docs/REMOTE.md says that `pip check` says."""
    shown = re.search(r"^\$ python -m pip check\n(.*?)^```", (ROOT / "docs/REMOTE.md").read_text(), re.M | re.S)
    assert shown is not None
    return shown[1].splitlines()


@pytest.mark.slow  # minutes: it installs all packages
def test_a_fresh_environment_pushes_and_its_complaints_are_explained(tmp_path: Path) -> None:
    checkout = copy_of_checkout(tmp_path / "checkout")
    installation = start(checkout, "make", "setup")
    output, _ = installation.communicate(timeout=1800)  # two minutes, where nothing else runs
    assert installation.returncode == 0, output
    fresh = checkout / ".venv/bin"
    alone = {"PATH": f"{fresh}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": ""}  # and not of this environment
    imported = "import dvc, dvc_gdrive, pydrive2.fs; print(dvc.__file__, dvc_gdrive.__file__, pydrive2.fs.__file__)"
    for path in run(tmp_path, str(fresh / "python"), "-c", imported, environment=alone).stdout.split():
        assert Path(path).is_relative_to(checkout / ".venv")

    result = run(tmp_path, str(fresh / "python"), "-m", "pip", "check", check=False, environment=alone)
    assert sorted(result.stdout.splitlines()) == sorted(explained())

    account = Account("pusher")
    repository = repository_of_one_file(tmp_path / "repository", account)
    google = StandIn(make_certificates(tmp_path, HOSTS))
    google.accounts[account.email] = account.public
    try:
        pushed = command(google, repository, str(fresh / "dvc"), "push", PATH=alone["PATH"], PYTHONPATH="").stdout
    finally:
        google.close()
    assert "1 file pushed" in pushed
    assert google.drive.files() == files(repository / ".dvc/cache")


def repository_of_one_file(folder: Path, account: Account) -> Path:
    """With this one's DVC configuration, a folder of the stand-in as its remote, and the key in its place."""
    (folder / ".dvc").mkdir(parents=True)
    run(folder, "git", "init", "-q")
    shutil.copy2(ROOT / ".dvc/config", folder / ".dvc/config")
    set_folder(folder, FOLDER_ID)
    put_key(folder, account)
    (folder / "numbers.bin").write_bytes(bytes(range(256)) * 1000)
    run(folder, "dvc", "add", "-q", "numbers.bin")
    return folder
