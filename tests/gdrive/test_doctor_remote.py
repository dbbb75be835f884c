"""The doctor and Google Drive: what it says of a key, a folder and a network, and a cache that is mended from there."""

from __future__ import annotations

import copy
import shutil
import time
from argparse import Namespace
from pathlib import Path

import pytest

from stages.core.errors import InputError
from tests.gdrive.conftest import KEY_FILE, command
from tests.gdrive.drive import FOLDER_ID, Item
from tests.gdrive.keys import Account
from tests.gdrive.server import Fault, StandIn
from tests.helpers import files
from tools.doctor import storage
from tools.verify import command as verify
from tools.verify import repair


@pytest.fixture
def here(small: Path, google: StandIn, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with its key, as the working directory of this process."""
    monkeypatch.chdir(small)
    monkeypatch.delenv("GDRIVE_CREDENTIALS_DATA", raising=False)
    for name, value in google.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("httplib2.CA_CERTS", str(google.authority))  # read from the environment at the import, long ago
    return small


def test_a_remote_that_works_and_what_can_be_wrong_with_it(here: Path, google: StandIn, account: Account) -> None:
    found = storage.remote()
    assert (found.status, found.says) == ("ok", f"gdrive: gdrive://{FOLDER_ID} answers")
    (here / KEY_FILE).write_text(account.text[:-20])
    with pytest.raises(InputError, match=KEY_FILE) as error:
        storage.remote()
    assert not any(secret in str(error.value) for secret in account.secret_lines)
    (here / KEY_FILE).write_text(account.text)
    google.accounts.clear()
    with pytest.raises(InputError):
        storage.remote()
    google.accounts[account.email] = account.public
    config = here / ".dvc/config"
    config.write_text(config.read_text().replace(FOLDER_ID, "a-folder-that-nobody-shares"))
    with pytest.raises(InputError, match=f"not shared with {account.email}: share it"):
        storage.remote()


def test_a_lost_model_comes_back_from_google_drive(
    here: Path, made_once: Path, pushed_once: dict[str, Item], google: StandIn
) -> None:
    google.drive.items |= copy.deepcopy(pushed_once)
    shutil.rmtree(here / ".dvc/cache")
    (here / "model/numbers.bin").write_bytes(b"by hand")
    (here / "table/numbers.bin").unlink()
    result = command(google, here, "python", "-m", "tools.verify", "--repair")
    assert "files fetched into the cache, from the remote gdrive" in result.stderr
    assert "runs again" not in result.stderr
    for output in ("raw", "model", "table"):
        assert files(here / output) == files(made_once / output)
    assert b"by hand" in files(here / ".dvc/tmp/set-aside").values()


@pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning")  # dvc's use of pygtrie
def test_a_download_that_stalls_ends_and_reruns_nothing(
    here: Path, pushed_once: dict[str, Item], google: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    google.drive.items |= copy.deepcopy(pushed_once)
    shutil.rmtree(here / ".dvc/cache")
    shutil.rmtree(here / "table")
    google.faults = [Fault("download", "stall", times=1000)]
    monkeypatch.setattr(repair, "_PATIENCE", 0.5)
    began = time.monotonic()
    with pytest.raises(InputError, match="the remote gdrive does not give it .*dvc repro --force --single-item"):
        verify.main(Namespace(repair=True, json=False))
    assert time.monotonic() - began < 900, "the stand-in would let go after 1800 s"
    assert not (here / "table").exists()
