"""Data goes to Google Drive and comes back, by the real dvc and its real client; the stand-in checks what they send."""

from __future__ import annotations

import copy
import io
import json
import random
import shutil
from pathlib import Path

import pytest
from googleapiclient.errors import HttpError
from googleapiclient.http import MediaIoBaseDownload, MediaIoBaseUpload

from tests.gdrive.conftest import command, tool
from tests.gdrive.drive import FOLDER_ID, Item
from tests.gdrive.keys import Account
from tests.gdrive.server import Fault, StandIn
from tests.helpers import files, run


def test_pushed_data_comes_back_into_a_fresh_clone(
    empty: Path, made_once: Path, pushed_once: dict[str, Item], google: StandIn
) -> None:
    cached, on_drive = files(made_once / ".dvc/cache"), google.drive.files()
    assert on_drive.items() <= cached.items()
    assert max(len(cached[name]) for name in cached.keys() - on_drive.keys()) == 300_000  # raw is not pushed

    tool(google, empty, "pull")
    for output in ("model", "table"):
        assert files(empty / output) == files(made_once / output)
    assert not (empty / "raw").exists()
    assert len(google.tokens) >= 2  # each for an assertion whose signature was checked
    # What was not pushed is made again, with the same bytes, and nothing else is stale.
    shown = command(google, empty, "dvc", "repro", "--pull").stdout
    assert "Running stage 'raw'" in shown
    assert "Running stage 'model'" not in shown
    assert files(empty / "raw") == files(made_once / "raw")
    assert run(empty, "git", "status", "--porcelain").stdout == ""
    assert json.loads(command(google, empty, "dvc", "status", "--cloud", "--json", "model", "table").stdout) == {}


def test_gc_moves_to_the_trash_what_no_version_needs(
    small: Path, pushed_once: dict[str, Item], google: StandIn
) -> None:
    google.drive.items |= copy.deepcopy(pushed_once)
    (small / "dvc.yaml").write_text((small / "dvc.yaml").read_text().replace("model 70000", "model 80000"))
    old = google.drive.files()
    command(google, small, "dvc", "repro")
    tool(google, small, "push")
    command(google, small, "dvc", "gc", "--workspace", "--cloud", "--force")
    new = google.drive.files()
    gone = old.keys() - new.keys()
    assert sorted(len(old[name]) for name in gone)[-1] == 70_000
    assert 80_000 in map(len, new.values())
    assert set(google.drive.trash()) == gone  # a content manager may not delete, and nothing is lost by mistake


def test_a_listing_of_many_pages_and_an_upload_in_parts_by_the_client_itself(
    google: StandIn, account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in google.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("httplib2.CA_CERTS", str(google.authority))  # read from the environment at the import, long ago
    from pydrive2.fs import GDriveFileSystem

    drive = GDriveFileSystem(FOLDER_ID, use_service_account=True, client_json=account.text)
    content = random.Random(0).randbytes(1_000_000)
    http = drive.client.auth.Get_Http_Object()
    media = MediaIoBaseUpload(io.BytesIO(content), "application/octet-stream", chunksize=256 * 1024, resumable=True)
    body = {"title": "large.bin", "parents": [{"id": FOLDER_ID}]}
    request = drive.client.auth.service.files().insert(body=body, media_body=media, supportsAllDrives=True)
    assert request.next_chunk(http=http)[1] is None
    google.faults = [Fault("chunk", "503")]
    with pytest.raises(HttpError, match="503"):
        request.next_chunk(http=http)
    assert request.next_chunk(http=http)[0].resumable_progress == 2 * 256 * 1024  # it asked what had arrived
    request.execute(http=http)
    for number in range(8):
        drive.upload_fobj(io.BytesIO(bytes([number])), f"{FOLDER_ID}/few/{number}.bin")
    google.calls.clear()
    names = {f"{FOLDER_ID}/large.bin"} | {f"{FOLDER_ID}/few/{number}.bin" for number in range(8)}
    assert set(drive.find(FOLDER_ID)) == names
    assert google.calls.count("list") >= 4
    target = io.BytesIO()
    (item,) = (item for item in google.drive.items.values() if item.title == "large.bin")
    download = MediaIoBaseDownload(target, drive.client.auth.service.files().get_media(fileId=item.id), 300_000)
    while not download.next_chunk()[1]:
        pass
    assert target.getvalue() == content
    assert google.calls.count("download") == 4  # ranges
    auth = drive.client.auth
    for connections in (http, auth.http, auth.thread_local.http, auth.service._http):
        connections.close()


def test_a_folder_serves_as_the_remote_without_an_account(made_once: Path, google: StandIn, tmp_path: Path) -> None:
    first, second = (tmp_path / name for name in ("first", "second"))
    shutil.copytree(made_once, first, symlinks=True)
    run(made_once, "git", "clone", "-q", str(first), str(second))
    (first / ".dvc/config.local").unlink()
    tool(google, first, "setup-local")
    tool(google, first, "push")
    tool(google, second, "setup-local")
    tool(google, second, "pull")
    assert [run(folder, "git", "status", "--porcelain").stdout for folder in (first, second)] == ["", ""]
    assert google.calls == []
    assert (tmp_path / "driftline-remote/files/md5").is_dir()
    assert files(second / "model") == files(first / "model")

    shutil.rmtree(tmp_path / "driftline-remote")
    shutil.rmtree(second / "model")
    shutil.rmtree(second / ".dvc/cache")
    result = tool(google, second, "pull", check=False)
    assert result.returncode == 2
    assert "make push where it was made" in result.stderr.splitlines()[-1]
    result = tool(google, second, "push", check=False)  # to dvc, files that are nowhere are a warning
    assert result.returncode == 2
    assert "nor has DVC's cache: make push where it was made" in result.stderr.splitlines()[-1]
