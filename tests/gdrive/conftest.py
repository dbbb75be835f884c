"""The stand-in of Google Drive, one for the session, and a small repository whose remote it is."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.gdrive.drive import FOLDER_ID, Item
from tests.gdrive.keys import Account, make_certificates
from tests.gdrive.server import HOSTS, StandIn
from tests.helpers import ROOT, commit_all, run

IMPATIENT = ("--patience", "4", "--attempts", "3")
KEY_FILE = ".secrets/gdrive-key.json"
PIPELINE = """\
stages:
  raw:
    cmd: python make.py raw 300000
    deps: [make.py]
    outs: [{raw: {push: false}}]
  model:
    cmd: python make.py model 70000
    deps: [make.py, raw]
    outs: [model]
  table:
    cmd: python make.py table 0
    deps: [model]
    outs: [table]
"""
MAKE = """\
import os, random, sys
from pathlib import Path

folder, size = Path(sys.argv[1]), int(sys.argv[2])
random.seed(folder.name)
folder.mkdir()
(folder / "numbers.bin").write_bytes(random.randbytes(size))
(folder / "name.txt").write_text(folder.name)
with open("environment.log", "a") as log:
    log.write(f"{folder} {sorted(os.environ.items())}\\n")
"""


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    server = StandIn(make_certificates(tmp_path_factory.mktemp("certificates"), HOSTS))
    yield server
    server.close()


@pytest.fixture(scope="session")
def account() -> Account:
    return Account("pusher")


@pytest.fixture(scope="session")
def other_account() -> Account:
    """Another service account, with a key of its own."""
    return Account("stranger")


@pytest.fixture
def google(stand_in: StandIn, account: Account) -> StandIn:
    """The stand-in as new: an empty Drive, one account that may write."""
    stand_in.reset()
    stand_in.accounts[account.email] = account.public
    return stand_in


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory, account: Account) -> Path:
    """A small repository whose pipeline has run, with this one's DVC configuration and the stand-in as the remote."""
    folder = tmp_path_factory.mktemp("small") / "repository"
    folder.mkdir()
    run(folder, "git", "init", "-q")
    for name in (".dvc/config", ".dvc/.gitignore", ".gitignore"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    set_folder(folder, FOLDER_ID)
    (folder / ".gitignore").write_text((folder / ".gitignore").read_text() + "/environment.log\n/raw\n/model\n/table\n")
    (folder / "dvc.yaml").write_text(PIPELINE)
    (folder / "make.py").write_text(MAKE)
    run(folder, "dvc", "repro")
    commit_all(folder)
    put_key(folder, account)
    return folder


@pytest.fixture(scope="session")
def pushed_once(made_once: Path, stand_in: StandIn, account: Account) -> dict[str, Item]:
    """What is on the Drive when its data has been pushed."""
    stand_in.reset()
    stand_in.accounts[account.email] = account.public
    tool(stand_in, made_once, "push")
    return copy.deepcopy(stand_in.drive.items)


@pytest.fixture
def small(made_once: Path, google: StandIn, tmp_path: Path) -> Path:
    """A copy of the small repository, with the key in its place."""
    folder = tmp_path / "small"
    shutil.copytree(made_once, folder, symlinks=True)
    return folder


@pytest.fixture
def empty(made_once: Path, pushed_once: dict[str, Item], google: StandIn, account: Account, tmp_path: Path) -> Path:
    """A fresh clone with the key and without any data, which is on the Drive."""
    google.drive.items |= copy.deepcopy(pushed_once)
    folder = tmp_path / "clone"
    run(made_once, "git", "clone", "-q", str(made_once), str(folder))
    put_key(folder, account)
    return folder


def set_folder(folder: Path, folder_id: str) -> None:
    """Make a folder of the Drive the default remote, as `setup-gdrive` does."""
    config = (folder / ".dvc/config").read_text()
    config = config.replace("gdrive://FOLDER_ID", f"gdrive://{folder_id}").replace(
        "[core]", "[core]\n    remote = gdrive"
    )
    (folder / ".dvc/config").write_text(config)


def put_key(folder: Path, account: Account) -> None:
    (folder / KEY_FILE).parent.mkdir(exist_ok=True)
    (folder / KEY_FILE).write_text(account.text)
    (folder / KEY_FILE).chmod(0o600)
    (folder / ".dvc/config.local").write_text(
        f"['remote \"gdrive\"']\n    gdrive_service_account_json_file_path = ../{KEY_FILE}\n"
    )


def tool(
    google: StandIn, folder: Path, *words: str, check: bool = True, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run `python -m tools.remote` in a folder, with Google being the stand-in."""
    return command(google, folder, "python", "-m", "tools.remote", *words, check=check, **variables)


def command(
    google: StandIn, folder: Path, *words: str, check: bool = True, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run any command in a folder, with Google being the stand-in."""
    # Where a test stores what DVC remembers of a remote: not where the user's own is.
    own = {"DVC_SITE_CACHE_DIR": f"{folder}/.dvc/tmp/site", "HOME": f"{folder}/.dvc/tmp", "PYTHONPATH": str(ROOT)}
    os.environ.pop("GDRIVE_CREDENTIALS_DATA", None)
    return run(folder, *words, check=check, environment=google.environment | own | variables)


def gone(process: psutil.Process | int) -> bool:
    """Whether a process (or that of this number) has ended, be it that nobody has asked for its exit status yet."""
    try:
        process = psutil.Process(process) if isinstance(process, int) else process
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
