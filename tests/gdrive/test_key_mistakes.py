"""What can be wrong with a key, a folder or a clock: one line each, which names the fix and shows nothing secret."""

from __future__ import annotations

import base64
import copy
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.core.errors import InputError
from tests.gdrive.conftest import KEY_FILE, command, tool
from tests.gdrive.drive import FOLDER_ID, Item
from tests.gdrive.keys import Account
from tests.gdrive.server import StandIn
from tests.helpers import files, run
from tools.remote import command as remote
from tools.remote import drive_key

Set = Callable[..., None]


@pytest.fixture
def here(made_once: Path, google: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with the configuration that git tracks, and no key, as the working directory."""
    (tmp_path / ".dvc").mkdir()
    shutil.copy2(made_once / ".dvc/config", tmp_path / ".dvc/config")
    run(tmp_path, "git", "init", "-q")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GDRIVE_CREDENTIALS_DATA", raising=False)
    for name, value in google.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("httplib2.CA_CERTS", str(google.authority))  # read from the environment at the import, long ago
    return tmp_path


@pytest.fixture
def variable(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda text: monkeypatch.setenv("GDRIVE_CREDENTIALS_DATA", text)


@pytest.fixture
def refusal(account: Account, other_account: Account) -> Callable[[], str]:
    """What `check` refuses with, after looking at it for secrets."""

    def call() -> str:
        with pytest.raises(InputError) as error:
            remote.check()
        message = str(error.value)
        assert len(message.splitlines()) == 1
        for secret in account.secret_lines + other_account.secret_lines:
            assert secret not in message
            assert base64.b64encode(secret.encode()).decode()[4:-4] not in message
        return message

    return call


def key_file(text: str | bytes) -> None:
    Path(KEY_FILE).parent.mkdir(exist_ok=True)
    Path(KEY_FILE).write_bytes(text if isinstance(text, bytes) else text.encode())
    Path(KEY_FILE).chmod(0o600)


def test_a_good_key_is_taken_wherever_it_is(
    here: Path, account: Account, variable: Set, capsys: pytest.CaptureFixture[str]
) -> None:
    variable(account.text)
    remote.check()
    assert "the folder experiments in a Shared Drive, and pusher@" in capsys.readouterr().out
    assert not Path(".dvc/config.local").exists()
    key_file("\ufeff" + account.text)  # an editor's mark at the front
    os.environ.pop("GDRIVE_CREDENTIALS_DATA")
    remote.check()
    assert f"= ../{KEY_FILE}\n" in Path(".dvc/config.local").read_text()
    Path(KEY_FILE).chmod(0o644)
    remote.check()
    assert capsys.readouterr().err == f"remote: others may read the key {KEY_FILE}: chmod 600 {KEY_FILE}\n"


def test_missing(here: Path, refusal: Callable[[], str]) -> None:
    assert "put the service account's key file into .secrets/" in refusal()
    assert "docs/REMOTE.md" in refusal()


def test_base64(here: Path, account: Account, variable: Set, refusal: Callable[[], str]) -> None:
    encoded = base64.b64encode(account.text.encode()).decode()
    variable(encoded)
    message = refusal()
    assert "GDRIVE_CREDENTIALS_DATA is base64" in message
    fix = message.partition("itself: ")[2]
    shell = ["bash", "-c", f'{fix}; printf %s "$GDRIVE_CREDENTIALS_DATA"']
    assert subprocess.run(shell, capture_output=True, text=True, check=True).stdout == account.text  # the fix works
    os.environ.pop("GDRIVE_CREDENTIALS_DATA")
    key_file("\n".join(encoded[i : i + 76] for i in range(0, len(encoded), 76)))
    message = refusal()
    assert f"{KEY_FILE} is base64" in message
    subprocess.run(["bash", "-c", message.partition("itself: ")[2]], check=True)
    remote.check()


def test_a_path_in_the_variable(here: Path, account: Account, variable: Set, refusal: Callable[[], str]) -> None:
    Path("other.json").write_text(account.text)
    for path in ("other.json", "/no/such/key", "~/keys/drive.json"):
        variable(path)
        assert "holds a path, and must hold the file's text: export GDRIVE_CREDENTIALS_DATA=\"$(cat " in refusal()


@pytest.mark.parametrize(
    "damage",
    [
        lambda pem: pem.replace("\n", ""),
        lambda pem: pem.replace("\n", "\\n"),
        lambda pem: pem[: len(pem) // 2],
        lambda pem: pem.replace("BEGIN PRIVATE", "BEGIN PUBLIC"),
    ],
)
def test_broken_pem(
    here: Path, account: Account, damage: Callable[[str], str], variable: Set, refusal: Callable[[], str]
) -> None:
    variable(json.dumps(account.key | {"private_key": damage(account.key["private_key"])}))
    assert "private_key in GDRIVE_CREDENTIALS_DATA is damaged" in refusal()
    assert "copy the whole key file again" in refusal()


def test_wrong_key(
    here: Path, account: Account, other_account: Account, variable: Set, refusal: Callable[[], str]
) -> None:
    key_file(json.dumps(account.key | {"private_key": other_account.key["private_key"]}))
    assert "Google does not know the key pusher012345 of pusher@" in refusal()
    assert "make a new key in the console" in refusal()
    key_file(other_account.text)  # of an account that is gone
    assert "Google does not know the key stranger0123 of stranger@" in refusal()


def test_flag_off(here: Path, account: Account, variable: Set, refusal: Callable[[], str]) -> None:
    variable(account.text)
    config = Path(".dvc/config").read_text()
    flag = "    gdrive_use_service_account = true\n"
    for off in (flag.replace("true", "false"), ""):
        assert flag in config
        Path(".dvc/config").write_text(config.replace(flag, off))
        message = refusal()
        assert "dvc remote modify gdrive gdrive_use_service_account true, and commit .dvc/config" in message


def test_wrong_folder(here: Path, google: StandIn, account: Account, variable: Set, refusal: Callable[[], str]) -> None:
    variable(account.text)
    google.drive.shared = False
    message = refusal()
    assert f"the folder {FOLDER_ID} is not there, or not shared with {account.email}: share it" in message
    google.drive.shared, google.drive.role = True, "reader"
    assert f"{account.email} may only read the folder experiments: share it as Content manager" in refusal()
    google.drive.role, google.drive.root.trashed = "writer", True
    assert "is in the trash" in refusal()
    google.drive.root.trashed = False
    file = google.drive.insert({"title": "notes.txt", "parents": [{"id": FOLDER_ID}]})
    for url, words in (
        (f"gdrive://{file.id}", "is a file, not a folder"),
        ("gdrive://FOLDER_ID", "is not set yet: make remote-gdrive FOLDER=..."),
        (f"gdrive://{FOLDER_ID}/dvc", "make remote-gdrive FOLDER=<its address>"),
    ):
        config = Path(".dvc/config").read_text()
        Path(".dvc/config").write_text(config.replace(f"gdrive://{FOLDER_ID}", url))
        assert words in refusal()
        Path(".dvc/config").write_text(config)


def test_unreadable_file(
    here: Path, made_once: Path, google: StandIn, account: Account, variable: Set, refusal: Callable[[], str]
) -> None:
    variable(account.text)  # dvc prefers the file, even when it is missing
    Path(".dvc/config.local").write_text(
        "['remote \"gdrive\"']\n    gdrive_service_account_json_file_path = ../gone.json\n"
    )
    message = refusal()
    assert "the key file gone.json is missing" in message
    run(here, *message.partition("or dvc")[2].join(["dvc", ""]).split())  # the fix works
    remote.check()

    os.environ.pop("GDRIVE_CREDENTIALS_DATA")
    key_file(b"0\x82\x09\xff\xfe")
    assert "give the JSON key, not the .p12 one" in refusal()
    Path(KEY_FILE).unlink()
    Path(KEY_FILE).mkdir()
    assert f"{KEY_FILE} is a folder" in refusal()
    Path(KEY_FILE).rmdir()
    key_file(account.text)
    Path(KEY_FILE).chmod(0)
    # Root may read everything, unless it does without that.
    drop = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.getuid() == 0 else []
    if drop and not shutil.which("setpriv"):
        pytest.skip("root reads every file, and there is no setpriv to give that up")
    result = command(google, here, *drop, "python", "-m", "tools.remote", "check", check=False)
    assert result.returncode == 2
    assert result.stderr == (
        f"remote: error: {KEY_FILE} cannot be read (Permission denied): it must be yours and readable, "
        f"chown $(id -u) {KEY_FILE} && chmod 600 {KEY_FILE}\n"
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            {"installed": {"client_id": "x", "client_secret": "y"}},
            "is an OAuth client, not the key of a service",
        ),
        ({"type": "authorized_user", "refresh_token": "x"}, "is a person's login, not the key of a service account"),
        ({"type": "external_account"}, "is JSON of the type 'external_account', not the key of a service account"),
        ([1], "is a list in JSON"),
        ("{}", "is a string in JSON"),
        ({"type": "service_account"}, "lacks client_email, client_id, private_key_id, private_key, token_uri"),
    ],
)
def test_wrong_json(here: Path, content: object, words: str, variable: Set, refusal: Callable[[], str]) -> None:
    variable(json.dumps(content))
    assert words in refusal()


def test_text_that_is_no_json(here: Path, account: Account, variable: Set, refusal: Callable[[], str]) -> None:
    variable(account.text[:-3])
    assert "is not JSON: give the text of the service account's key file as it is" in refusal()


def test_wrong_clock(here: Path, google: StandIn, account: Account, variable: Set, refusal: Callable[[], str]) -> None:
    variable(account.text)
    google.clock_offset = -7200
    assert "this machine's clock is wrong by 120 minutes (fast): set it" in refusal()
    google.clock_offset = 7200
    assert "this machine's clock is wrong by 120 minutes (slow): set it" in refusal()


def test_several_keys_api_off_and_no_network(
    here: Path, google: StandIn, account: Account, refusal: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    key_file(account.text)
    Path(".secrets/old.json").write_text(account.text)
    assert "several key files (gdrive-key.json, old.json): say which one" in refusal()
    Path(".secrets/old.json").unlink()
    google.is_api_enabled = False
    assert "the Google Drive API is off in the project" in refusal()
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="Google Drive cannot be reached"):
        remote.check()


def test_a_key_shows_nothing(account: Account) -> None:
    shown = repr(drive_key.parse(account.text, "the key"))
    assert not any(secret in shown for secret in account.secret_lines)


def test_a_remote_of_another_name_gets_the_key(here: Path, account: Account) -> None:
    Path(".dvc/config").write_text(
        Path(".dvc/config").read_text().replace('gdrive"', 'storage"').replace("= gdrive\n", "= storage\n")
    )
    key_file(account.text)
    remote.check()
    assert "storage" in Path(".dvc/config.local").read_text()
    Path(".dvc/config.local").unlink()
    remote.save_key(Path(KEY_FILE))
    remote.check()
    assert "storage" in Path(".dvc/config.local").read_text()


def test_a_key_is_not_kept_where_no_remote_of_google_drive_is(here: Path, account: Account, tmp_path: Path) -> None:
    file = tmp_path / "downloaded.json"
    file.write_text("\ufeff" + account.text)  # as some editors of Windows write it
    Path(".dvc/config").write_text("[core]\n    analytics = false\n")
    with pytest.raises(InputError, match="no remote of Google Drive is configured: make remote-gdrive"):
        remote.save_key(file)
    assert not Path(KEY_FILE).exists()
    Path(".dvc/config").write_text(f"['remote \"gdrive\"']\n    url = gdrive://{FOLDER_ID}\n")
    remote.save_key(file)
    assert json.loads(Path(KEY_FILE).read_text())["client_email"] == account.email


@pytest.mark.parametrize(
    "folder",
    [
        FOLDER_ID,
        f"gdrive://{FOLDER_ID}",
        f"https://drive.google.com/drive/folders/{FOLDER_ID}?usp=sharing",
        f"https://drive.google.com/drive/u/1/folders/{FOLDER_ID}",
        f"https://drive.google.com/open?id={FOLDER_ID}",
    ],
)
def test_the_folder_is_set_for_everybody(folder: str, here: Path, account: Account, variable: Set) -> None:
    variable(account.text)
    Path(".dvc/config").write_text("[core]\n    analytics = false\n")
    remote.setup_local(here / "somewhere")
    remote.setup_gdrive(folder)
    config = Path(".dvc/config").read_text()
    for line in (f"url = gdrive://{FOLDER_ID}", "verify = true", "use_service_account = true", "remote = gdrive"):
        assert line in config
    assert "core" not in Path(".dvc/config.local").read_text()


def test_a_folder_that_is_none_is_refused(here: Path) -> None:
    for folder in ("", "my folder", "https://drive.google.com/drive/my-drive", f"{FOLDER_ID}/dvc"):
        with pytest.raises(InputError, match="is no folder of Google Drive"):
            remote.setup_gdrive(folder)


def test_nothing_secret_is_left_anywhere(
    small: Path, pushed_once: dict[str, Item], google: StandIn, account: Account, other_account: Account
) -> None:
    shutil.rmtree(small / ".secrets")
    (small / ".dvc/config.local").unlink()
    for output in ("raw", "model", "table"):
        shutil.rmtree(small / output)
    shutil.rmtree(small / ".dvc/cache")
    google.drive.items |= copy.deepcopy(pushed_once)
    key = account.text
    shutil.copy2(Path(__file__).parents[2] / "Makefile", small)
    (small / ".venv").symlink_to(Path(shutil.which("dvc") or "").parents[1])
    (small / "environment.log").unlink()
    shown = tool(google, small, "pull", GDRIVE_CREDENTIALS_DATA=key)
    # make runs the stages without the key, whatever it inherits; the numbers that it shows then are not here
    made = command(google, small, "make", "-o", ".venv/.installed", "repro", check=False, GDRIVE_CREDENTIALS_DATA=key)
    assert "Running stage 'raw'" in made.stdout
    shown_too = tool(google, small, "save-key", GDRIVE_CREDENTIALS_DATA=key)
    assert (small / KEY_FILE).stat().st_mode & 0o777 == 0o600
    checked = tool(google, small, "check")
    wrong = account.key | {"private_key": other_account.key["private_key"]}
    (small / KEY_FILE).write_text(json.dumps(wrong))
    refused = tool(google, small, "push", check=False)
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)

    printed = "".join(result.stdout + result.stderr for result in (shown, made, shown_too, checked, refused))
    kept = {name: content for name, content in files(small).items() if name != KEY_FILE and ".venv/" not in name}
    assert b"environment.log" not in kept["environment.log"]
    assert b"raw [(" in kept["environment.log"]
    for line in account.secret_lines + other_account.secret_lines:
        assert line not in printed
        assert [name for name, content in kept.items() if line.encode() in content] == []
    assert run(small, "git", "status", "--porcelain", "--untracked-files=all").stdout == "?? .venv\n?? Makefile\n"
