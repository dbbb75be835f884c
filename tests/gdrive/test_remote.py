"""Data goes to Google Drive and comes back, by the real dvc and its real client; the stand-in checks what they send."""

from __future__ import annotations

import copy
import io
import json
import os
import random
import shutil
from pathlib import Path

import pytest
from googleapiclient.errors import HttpError
from googleapiclient.http import MediaIoBaseDownload, MediaIoBaseUpload

from stages.core.errors import InputError
from tests.gdrive.conftest import command, tool
from tests.gdrive.drive import FOLDER_ID, Item
from tests.gdrive.keys import Account
from tests.gdrive.server import Fault, StandIn
from tests.helpers import files, run
from tools.remote.transfer import final_reason


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
    for words in ("pull", "push", "check"):  # a disk that is not mounted, say: dvc would make it anew for a push
        result = tool(google, second, words, check=False)
        assert result.returncode == 2
        assert f"there is no folder {tmp_path}/driftline-remote: mount its disk" in result.stderr
    (tmp_path / "driftline-remote").mkdir()
    result = tool(google, second, "pull", check=False)
    assert result.returncode == 2
    assert "make push where it was made" in result.stderr.splitlines()[-1]
    result = tool(google, second, "push", check=False)  # to dvc, files that are nowhere are a warning
    assert result.returncode == 2
    assert "nor has DVC's cache: make push where it was made" in result.stderr.splitlines()[-1]


@pytest.fixture
def shared(made_once: Path, google: StandIn, tmp_path: Path) -> tuple[Path, Path]:
    """A folder that is a remote with everything in it, and a clone whose remote it is and that has nothing yet."""
    first, second = (tmp_path / name for name in ("first", "second"))
    shutil.copytree(made_once, first, symlinks=True)
    run(made_once, "git", "clone", "-q", str(first), str(second))
    for folder in (first, second):
        tool(google, folder, "setup-local", str(tmp_path / "a remote"))
    tool(google, first, "push")
    return tmp_path / "a remote", second


def test_a_damaged_file_of_a_folder_is_not_taken(shared: tuple[Path, Path], google: StandIn) -> None:
    remote, clone = shared
    largest = max(remote.rglob("*"), key=lambda path: path.stat().st_size)
    largest.chmod(0o644)
    largest.write_text("not what it was")
    result = tool(google, clone, "pull", check=False)
    assert result.returncode == 2
    assert "the remote local has a damaged file, which was not taken" in result.stderr
    assert "not what it was" not in [path.read_text(errors="replace") for path in clone.glob("model/*")]


def test_a_pull_takes_nothing_from_the_user(shared: tuple[Path, Path], google: StandIn) -> None:
    _, clone = shared
    (clone / "model").mkdir()
    (clone / "model/name.txt").write_text("mine")
    result = tool(google, clone, "pull", check=False)
    assert result.returncode == 2
    assert f"not what DVC has of them: {clone}/model/name.txt; move them away, or `dvc checkout" in result.stderr
    assert (clone / "model/name.txt").read_text() == "mine"
    (clone / "model/name.txt").unlink()
    tool(google, clone, "pull")
    assert (clone / "model/name.txt").read_text() == "model"


def test_a_pull_where_nothing_has_run_and_a_conflict(shared: tuple[Path, Path], google: StandIn) -> None:
    _, clone = shared
    lock = (clone / "dvc.lock").read_text()
    (clone / "dvc.lock").write_text(f"<<<<<<< HEAD\n{lock}=======\n{lock}>>>>>>> other\n")
    for words in ("pull", "push"):
        result = tool(google, clone, words, check=False)
        assert result.returncode == 2
        assert "dvc cannot read the pipeline: unable to read: 'dvc.lock'" in result.stderr
        assert "Traceback" not in result.stderr
    (clone / "dvc.lock").unlink()
    assert "nothing has run yet" in tool(google, clone, "pull").stdout


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_one_may_only_read(shared: tuple[Path, Path], google: StandIn) -> None:
    remote, clone = shared
    remote.chmod(0o555)
    result = tool(google, clone, "push", check=False)
    tool(google, clone, "pull")
    remote.chmod(0o755)
    assert (result.returncode, "you may not write into" in result.stderr) == (2, True)


def test_a_full_disk_is_named() -> None:
    """In dvc's own words, of a push to a disk that was full."""
    path = "'/repository/.dvc/cache/files/md5/47/f7' -> '/full/files/md5/47/.Lj.tmp'"
    said = f"ERROR: failed to transfer '47f7' <- OSError: [Errno 28] No space left on device: {path}\n"
    with pytest.raises(InputError, match=r"a disk is full: .*/full/files.*; make room on it .*--all-commits") as caught:
        final_reason(said)
    assert "gc -w" not in str(caught.value)
