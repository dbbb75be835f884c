"""Every fault that the doctor names is made, and it names the fault and what to type; then it says that all is well."""

from __future__ import annotations

import http.server
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from dvc.cli import main as dvc_main
from ruamel.yaml import YAML

from stages.core import runtime
from stages.core.errors import InputError
from tests.helpers import BIN, commit_all, run, set_params, write_files
from tests.wandb_runs import KEY, bad_server
from tools.doctor import command as doctor
from tools.doctor import environment, hardware, repository, storage, tracking
from tools.doctor.finding import Finding


@pytest.fixture(scope="session")
def checkout(make_repository: Callable[..., Path]) -> Path:
    """This checkout as a repository with one commit, whose pipeline has not run."""
    return make_repository()


@pytest.fixture
def here(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "checkout"
    shutil.copytree(checkout, folder, symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", f"{BIN}{os.pathsep}{os.environ['PATH']}")
    return folder


def finds(finding: Finding, status: str, says: str, fix: str = "") -> None:
    """The finding is this one, in one line."""
    assert finding.status == status, finding
    assert says in finding.says, finding
    assert fix in finding.fix, finding
    assert bool(finding.fix) == (status != "ok")
    assert "\n" not in doctor.line("name", finding)


def write_program(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(0o755)


def type_in(command: str) -> None:
    """Do what the user is told to: dvc in this process, the rest in one of its own."""
    words = shlex.split(command)
    if words[0] == "dvc":
        assert dvc_main(words[1:]) == 0
    else:
        run(Path.cwd(), *words)


@contextmanager
def http_server(status: int, of_folder: int | None = None, password: str | None = None) -> Iterator[str]:
    """The address of a folder on a server that answers everything with a status, or the folder with another one."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            answer = of_folder if of_folder and self.path == "/data" else status
            if password and self.headers["Authorization"] != f"Basic {b64encode(f'me:{password}'.encode()).decode()}":
                answer = 401
            self.send_response(answer)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD  # noqa: N815

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/data"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def closed_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


# --- the whole ----------------------------------------------------------------------------------------------------


def test_a_good_set_up_passes_and_json_says_the_same(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only what belongs to the machine may be a warning; the pipeline of the checkout has not run."""
    storage = "[core]\n    remote = storage\n['remote \"storage\"']\n    url = ../../storage\n    verify = true\n"
    (here / ".dvc/config").write_text(storage)
    (here.parent / "storage").mkdir()
    commit_all(here)
    result = run(here, "python", "-m", "tools.doctor", check=False)
    lines = result.stdout.splitlines()
    assert (result.returncode, len(lines)) == (0, len(doctor.CHECKS) + 1), result.stdout + result.stderr
    assert [line.split()[1] for line in lines[:-1]] == list(doctor.CHECKS)
    not_ok = {line.split()[1] for line in lines[:-1] if not line.startswith("ok    ")}
    assert {"dvc.lock"} <= not_ok <= {"dvc.lock", "threads", "gpu", "bf16"}, result.stdout
    assert lines[-1] == f"doctor: {len(doctor.CHECKS)} checks, 0 failed, {len(not_ok)} to look at"
    assert run(here, "git", "status", "--porcelain").stdout == ""  # nothing was changed
    monkeypatch.setattr(doctor, "CHECKS", dict(list(doctor.CHECKS.items())[:3]))
    assert doctor.main(as_json=True) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [doctor.line(item.pop("name"), Finding(**item)) for item in listed] == lines[:3]


def test_failures_are_counted_and_end_with_1(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = {"params": repository.params, "git": repository.git, "threads": hardware.threads}
    monkeypatch.setattr(doctor, "CHECKS", checks)
    assert doctor.main(as_json=False) == 0
    set_params(here / "params.yaml", {"train.lr": -1, "runtime.threads": 0})
    capsys.readouterr()
    assert doctor.main(as_json=False) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("FAIL  params     params.yaml: runtime.threads")
    assert said[1].startswith("ok    git ")
    assert said[2].startswith("warn  threads    cannot be checked (params.yaml is refused)  ->  mend params.yaml first")
    assert said[3] == "doctor: 3 checks, 1 failed, 1 to look at"


def test_outside_of_a_repository_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"no dvc\.yaml and pyproject\.toml here; run this from the root"):
        doctor.main(as_json=False)


def test_a_conflict_in_the_lock_is_told_once(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = (small / "dvc.lock").read_text()
    (small / "dvc.lock").write_text(f"<<<<<<< HEAD\n{lock}=======\n{lock}>>>>>>> other\n")
    checks = {"dvc.lock": repository.stale, "cache": storage.cache, "disk": storage.disk}
    monkeypatch.setattr(doctor, "CHECKS", checks)
    found = dict(doctor.examine())
    finds(found["dvc.lock"], "FAIL", "dvc cannot read the pipeline", "git diff dvc.yaml dvc.lock")
    for name in ("cache", "disk"):
        finds(found[name], "warn", "cannot be checked", "mend dvc.lock first")


def test_a_name_that_is_no_text_is_shown(here: Path) -> None:
    """As old archives unpack to, where they were made on Windows."""
    Path(os.fsdecode(b"f\xfcr mich.py")).touch()
    shown = run(here, "python", "-m", "tools.doctor", check=False, environment={"PYTHONIOENCODING": "utf-8:strict"})
    assert "Traceback" not in shown.stderr
    assert r"git add 'f\udcfcr mich.py'" in shown.stdout
    assert shown.stdout.splitlines()[-1].startswith("doctor: ")


def test_a_check_that_breaks_does_not_hide_the_others(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "params.yaml").unlink()
    (here / "params.yaml").mkdir()  # no error that a check foresees
    monkeypatch.setattr(doctor, "CHECKS", {"params": repository.params, "history": repository.history})
    found = dict(doctor.examine())
    finds(found["params"], "FAIL", "cannot be checked (IsADirectoryError: ", "--force-reinstall")
    finds(found["history"], "ok", "1 commits, whole")


# --- environment --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "status", "says"),
    [
        ((3, 9, 18), "FAIL", "3.9.18 is too old: 3.10 to 3.13 is needed"),
        ((3, 10, 0), "ok", "3.10.0 ("),
        ((3, 13, 9), "ok", "3.13.9 ("),
        ((3, 14, 0), "FAIL", "3.14.0 is too new: 3.10 to 3.13 is needed"),
    ],
)
def test_versions_of_python(here: Path, version: tuple[int, ...], status: str, says: str) -> None:
    finds(environment.python(version), status, says, "" if status == "ok" else "make setup PYTHON=")


def test_an_old_python_is_told_in_one_line(here: Path) -> None:
    candidates = [shutil.which(f"python3.{minor}") for minor in (8, 9)]
    candidates += [str(path) for path in Path.home().glob(".pyenv/versions/3.[89].*/bin/python3")]
    old = next((python for python in candidates if python and works(python)), None)
    if old is None:
        pytest.skip("no Python 3.8 or 3.9 on this machine")
    result = run(here, old, "-m", "tools.doctor", check=False)
    assert (result.returncode, result.stderr) == (1, "")
    lines = result.stdout.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("FAIL  python     3.")
    assert "too old: 3.10 to 3.13 is needed" in lines[0]


def works(python: str) -> bool:
    return subprocess.run([python, "-c", ""], capture_output=True).returncode == 0


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with nothing in it."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    run(folder.parent, "python", "-m", "venv", "--without-pip", str(folder))
    return folder


def test_an_environment_without_packages_is_examined_to_the_end(here: Path, bare: Path) -> None:
    path = {"PATH": f"{bare / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    result = run(here, str(bare / "bin/python"), "-m", "tools.doctor", check=False, environment=path)
    found = dict(line.split(None, 2)[1::-1] for line in result.stdout.splitlines()[:-1])
    assert (result.returncode, result.stderr, list(found)) == (1, "", list(doctor.CHECKS))
    assert {name for name, status in found.items() if status == "FAIL"} == {"commands", "lock", "gdrive"}
    assert {name for name, status in found.items() if status == "ok"} == {"python", "git", "history", "secrets"}
    line = next(line for line in result.stdout.splitlines() if " lock " in line)
    assert "the packages are not installed here  ->  python -m pip install" in line
    assert "cannot be checked (ModuleNotFoundError: No module named 'dvc')" in result.stdout


def test_another_python_first_on_path(here: Path, bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finds(environment.commands(), "ok", f"python and dvc of {BIN}")
    good = os.environ["PATH"]
    monkeypatch.setenv("PATH", f"{bare / 'bin'}{os.pathsep}{good}")
    finds(environment.commands(), "FAIL", f"the first `python` on PATH, {bare}/bin/python, which", f"export PATH={BIN}")
    (here / ".venv/bin").mkdir(parents=True)
    (here / ".venv/bin/python").symlink_to(sys.executable)
    finds(environment.commands(), "FAIL", "which is not that of", "source .venv/bin/activate")
    monkeypatch.setenv("PATH", str(here / "nowhere"))
    finds(environment.commands(), "FAIL", "there is no `python` on PATH", "source .venv/bin/activate")
    write_program(here.parent / "own/python", f'exec {sys.executable} "$@"')
    monkeypatch.setenv("PATH", str(here.parent / "own"))
    finds(environment.commands(), "FAIL", "there is no `dvc` on PATH", "source .venv/bin/activate")
    write_program(here.parent / "own/dvc")
    finds(environment.commands(), "FAIL", "/own/dvc, of another environment", "source .venv/bin/activate")


def test_packages_against_the_lock(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = here / "requirements.txt"
    finds(environment.lock(), "ok", "packages as in requirements.txt")
    text = lock.read_text()
    lock.write_text(
        text + "nobody-has-this==1.0\nnumpy==1.0.0 \\\n    --hash=sha256:00\nold==1 ; python_version < '3'\n"
    )
    found = environment.lock()
    is_image = sys.prefix == sys.base_prefix  # whose packages are the image's, not those of a virtual environment
    fix = "make docker-build" if is_image else "python -m pip install --no-deps -r"
    finds(found, "FAIL", "missing: nobody-has-this; another version: numpy ", fix)
    assert found.says.startswith("2 of ")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "prefix", sys.base_prefix)
        if not environment._IMAGE_MARK.exists():
            finds(environment.lock(), "FAIL", "missing: nobody-has-this", "make setup && source .venv/bin/activate")
        patch.setattr(environment, "_IMAGE_MARK", here)
        finds(environment.lock(), "FAIL", "missing: nobody-has-this", "exit && make docker-build")
    lock.unlink()
    finds(environment.lock(), "FAIL", "requirements.txt is missing", "git checkout requirements.txt")


def test_a_torch_without_cuda_needs_no_cuda_packages(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("requirements.txt").write_text("torch==2.14.1\nnvidia-nothing==1.0\ntriton-of-nobody==1.0\n")
    found = environment.lock()
    assert "missing: nvidia-nothing, triton-of-nobody" in found.says
    description = here.parent / "packages/torch-2.14.1+cpu.dist-info/METADATA"
    description.parent.mkdir(parents=True)
    description.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.14.1+cpu\n")
    monkeypatch.syspath_prepend(description.parents[1])
    found = environment.lock()
    finds(found, "FAIL", "1 of 2 packages are not those of requirements.txt; missing: triton-of-nobody")


def test_a_pyopenssl_that_cryptography_has_left_behind(here: Path) -> None:
    """pyOpenSSL 22 reads a name that cryptography no longer has; a plain `pip install dvc-gdrive` brings it."""
    packages = here.parent / "packages"
    (packages / "OpenSSL").mkdir(parents=True)
    (packages / "OpenSSL/__init__.py").write_text("from OpenSSL import crypto\n")
    (packages / "OpenSSL/crypto.py").write_text(
        "from cryptography.hazmat.bindings.openssl.binding import Binding\n"
        "prefixes = {Binding().lib.GEN_EMAIL: 'email'}\n"
    )
    (packages / "pyOpenSSL-22.0.0.dist-info").mkdir()
    (packages / "pyOpenSSL-22.0.0.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: pyOpenSSL\nVersion: 22.0.0\n"
    )
    ask = "from tools.doctor.environment import gdrive; print(gdrive())"
    result = run(here, "python", "-c", ask, environment={"PYTHONPATH": str(packages)})
    assert "status='FAIL', says=\"the Google Drive plugin cannot be imported (AttributeError: " in result.stdout
    assert "GEN_EMAIL" in result.stdout
    assert "fix='python -m pip uninstall --yes pyOpenSSL'" in result.stdout
    finds(environment.gdrive(), "ok", "dvc-gdrive 3")


# --- repository ---------------------------------------------------------------------------------------------------


def test_git_and_what_it_needs(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finds(repository.git(), "ok", "commit ")
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(here / "nowhere"))
        finds(repository.git(), "FAIL", "git is not installed", "apt-get install git")
    with monkeypatch.context() as patch:
        patch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own way to try it without another user
        patch.setenv("GIT_CONFIG_SYSTEM", os.devnull)  # the image's trusts every folder
        finds(repository.git(), "FAIL", "git refuses this repository", f"--add safe.directory {here}")
    run(here, "git", "config", "user.useConfigOnly", "true")
    run(here, "git", "config", "--unset", "user.name")
    with monkeypatch.context() as patch:
        for name in ("GLOBAL", "SYSTEM"):
            patch.setenv(f"GIT_CONFIG_{name}", os.devnull)
        for name in ("GIT_COMMITTER_NAME", "GIT_AUTHOR_NAME"):
            patch.delenv(name, raising=False)
        finds(repository.git(), "FAIL", "git does not know your name", "git config --global user.name")
    run(here, "git", "config", "user.name", "t")
    (here / ".dvc/config").rename(here / "config")
    finds(repository.git(), "FAIL", ".dvc/config is missing", "git checkout .dvc/config")
    (here / "config").rename(here / ".dvc/config")
    shutil.rmtree(here / ".git")
    finds(repository.git(), "FAIL", "this is no git repository", "git clone")
    run(here, "git", "init", "-q")
    finds(repository.git(), "FAIL", "there is no commit yet", "git add -A && git commit")


def test_a_shallow_clone(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(here, "git", "commit", "-q", "--allow-empty", "-m", "second")
    finds(repository.history(), "ok", "2 commits, whole")
    run(here.parent, "git", "clone", "-q", "--depth", "1", here.as_uri(), "shallow")
    monkeypatch.chdir(here.parent / "shallow")
    finds(repository.history(), "warn", "this clone is shallow", "git fetch --unshallow")
    type_in(repository.history().fix)
    finds(repository.history(), "ok", "2 commits, whole")


def test_keys_that_git_tracks_or_would(here: Path) -> None:
    finds(repository.secrets(), "ok", "no key is tracked")
    (here / ".env").write_text(f"WANDB_API_KEY={KEY}\n")
    (here / ".secrets").mkdir()
    (here / ".secrets/gdrive.json").write_text("{}")
    finds(repository.secrets(), "ok", "no key is tracked")
    run(here, "git", "add", "-f", ".env", ".secrets")
    found = repository.secrets()
    finds(found, "FAIL", "git tracks .env, .secrets/gdrive.json", "git rm -r --cached .env .secrets")
    type_in(found.fix)
    finds(repository.secrets(), "ok", "no key is tracked")
    assert (here / ".env").exists()
    (here / ".gitignore").write_text("/data/\n")
    finds(repository.secrets(), "FAIL", "git does not ignore .env", "echo .env >> .gitignore")


def test_params_that_stages_would_refuse(here: Path) -> None:
    finds(repository.params(), "ok", "keys of params.yaml are valid")
    text = (here / "params.yaml").read_text()
    (here / "params.yaml").write_text(text.replace("  flip: 0.5", "  flipp: 0.5"))
    with pytest.raises(InputError, match=r"train\.flipp: unknown key; did you mean 'flip'"):
        repository.params()


def test_what_experiments_in_another_folder_would_not_find(here: Path) -> None:
    finds(repository.untracked(), "ok", "every file that is not ignored is tracked")
    for name in ("notes.txt", "stages/core/new.py"):
        (here / name).write_text("")
    found = repository.untracked()
    finds(found, "warn", "git does not track stages/core/new.py, notes.txt:", "git add stages/core/new.py notes.txt")
    type_in(found.fix)
    finds(repository.untracked(), "ok", "")
    (here / "data/pets").mkdir(parents=True)
    set_params(here / "params.yaml", {"data.source": "data/pets"})
    found = repository.untracked()
    finds(found, "warn", "data.source of params.yaml: a relative path", f"-S data.source={here}/data/pets")
    (here / "data/pets.dvc").touch()  # dvc checks it out in the experiment's folder, too
    finds(repository.untracked(), "ok", "every file that is not ignored is tracked")


def test_a_stale_lock(small: Path) -> None:
    finds(repository.stale(), "ok", "2 stages up to date")
    set_params(small / "params.yaml", {"make.count": 4})
    finds(repository.stale(), "warn", "out of date: make (make: modified make.count)", "dvc repro")
    run(small, "git", "checkout", "-q", ".")
    (small / "total.py").write_text((small / "total.py").read_text() + "\n")
    finds(repository.stale(), "warn", "out of date: total (total: modified total.py)", "dvc repro")
    run(small, "git", "checkout", "-q", ".")
    (small / "models/total.txt").write_text("by hand\n")
    finds(repository.stale(), "warn", "out of date: total (total: modified models/total.txt)", "dvc repro")
    shutil.rmtree(small / "models")
    shutil.rmtree(small / "data")
    found = repository.stale()
    finds(found, "warn", "outputs of make, total are in DVC's cache, but not here", "dvc checkout")
    type_in(found.fix)
    finds(repository.stale(), "ok", "2 stages up to date")
    shutil.rmtree(small / "models")
    shutil.rmtree(small / ".dvc/cache")
    finds(repository.stale(), "warn", "are not in DVC's cache", "dvc pull || dvc repro")
    write_files(small, {"retrain/x.tar.dvc": b"outs:\n- md5: 9dd4e461268c8034f5c8564e155c67a6\n  path: x.tar\n"})
    finds(repository.stale(), "warn", "retrain/x.tar.dvc are not in DVC's cache", "make pull")
    (small / "retrain/x.tar").write_text("a")
    finds(repository.stale(), "warn", "retrain/x.tar.dvc", "dvc repro")
    (small / "dvc.lock").unlink()
    finds(repository.stale(), "warn", "the pipeline has not run yet", "dvc repro")
    (small / "dvc.yaml").write_text("stages:\n  make:\n    cmds: none\n")
    finds(repository.stale(), "FAIL", "dvc cannot read the pipeline", "git diff dvc.yaml")


def test_a_dvc_that_is_at_work_is_no_fault(small: Path) -> None:
    """DVC's own list of who writes what: another process, which lives."""
    output = next(out["path"] for out in YAML(typ="safe").load(small / "dvc.lock")["stages"]["total"]["outs"])
    held = {"write": {str(small / output): {"pid": os.getppid(), "cmd": "dvc repro"}}, "read": {}}
    (small / ".dvc/tmp").mkdir(exist_ok=True)
    (small / ".dvc/tmp/rwlock").write_text(json.dumps(held))
    finds(repository.stale(), "warn", "dvc is at work, look again when it has ended", "make doctor")


# --- storage ------------------------------------------------------------------------------------------------------


def set_size(folder: Path, size: int) -> None:
    """Let dvc.lock say that the last output has so many bytes."""
    yaml = YAML()
    lock = yaml.load(folder / "dvc.lock")
    lock["stages"]["total"]["outs"][0]["size"] = size
    yaml.dump(lock, folder / "dvc.lock")


def test_how_files_get_out_of_the_cache(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    type_in("dvc config --local cache.type hardlink")
    finds(storage.cache(), "ok", f"hard links of 0.0 GB in {small}/.dvc/cache")
    type_in("dvc config --local cache.type copy")
    finds(storage.cache(), "ok", "copies of 0.0 GB")
    set_size(small, 3_000_000_000)
    found = storage.cache()
    finds(found, "warn", "outputs are copied out of", "hardlink,symlink && dvc checkout --relink")
    assert "3.0 GB twice on the disk" in found.says
    assert sorted(path.name for path in small.iterdir() if "link" in path.name) == []  # what it tried is gone
    (small / "file").write_text("")
    type_in(f"dvc cache dir --local {small / 'file/cache'}")
    finds(storage.cache(), "FAIL", "is not writable (Not a directory)", "dvc cache dir --local")


def test_links_between_two_file_systems(small: Path, tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    if not (memory.is_dir() and memory.stat().st_dev != tmp_path.stat().st_dev):
        pytest.skip("no second file system here")
    cache = memory / f"driftline-test-{os.getpid()}"
    try:
        type_in(f"dvc cache dir --local {cache}")
        type_in("dvc config --local cache.type reflink,hardlink")
        found = storage.cache()
        finds(found, "FAIL", "cache.type is reflink,hardlink, and between", "cache.type symlink,copy")
        type_in(found.fix)
        finds(storage.cache(), "ok", "symbolic links")
    finally:
        shutil.rmtree(cache, ignore_errors=True)


def test_a_disk_that_is_too_small(small: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(small)
    shutil.copy2(here / "params.yaml", small)
    finds(storage.disk(), "ok", "GB free, a new run writes about 1.0 GB")
    set_size(small, 10**15)
    found = storage.disk()
    finds(found, "FAIL", "free for this folder and DVC's cache", "dvc gc --all-commits --all-experiments")
    assert "a new run writes about 2,000,001.0 GB" in found.says


def test_remotes_that_are_folders(small: Path, tmp_path: Path) -> None:
    finds(storage.remote(), "warn", "there is no default remote", "make remote-local")
    type_in(f"dvc remote add storage {tmp_path / 'storage'}")
    found = storage.remote()
    finds(found, "warn", "there is no default remote", "dvc remote default storage")
    type_in(found.fix)
    found = storage.remote()
    finds(found, "warn", "there is no folder", f"mkdir -p {tmp_path}/storage")
    type_in(found.fix)
    found = storage.remote()
    finds(found, "warn", "does not verify", "dvc remote modify storage verify true")
    type_in(found.fix)
    finds(storage.remote(), "ok", f"storage: the folder {tmp_path}/storage")
    if os.geteuid() != 0:  # root may do anything
        (tmp_path / "storage").chmod(0o555)
        finds(storage.remote(), "warn", "you may not write into", "ask its owner")
        (tmp_path / "storage").chmod(0o000)
        finds(storage.remote(), "FAIL", "you may not read", "ask its owner")
        (tmp_path / "storage").chmod(0o755)
    (tmp_path / "storage").rmdir()
    (tmp_path / "storage").write_text("")
    finds(storage.remote(), "FAIL", "is no folder", "dvc remote modify storage url")
    type_in("dvc config core.remote other")
    finds(storage.remote(), "FAIL", "the default remote other is not configured", "dvc remote add other")


def test_remotes_on_servers(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)

    def set_url(url: str) -> None:
        (small / ".dvc/config").write_text(f"[core]\n    remote = web\n['remote \"web\"']\n    url = {url}\n")

    with http_server(404) as url:  # before the first push, nothing is there
        set_url(url)
        finds(storage.remote(), "ok", f"web: {url} answers")
    with http_server(403) as url:
        set_url(url)
        finds(storage.remote(), "FAIL", "the server answers with status 403", "dvc remote modify web url")
    with http_server(404, of_folder=403) as url:  # which does not list folders
        set_url(url)
        finds(storage.remote(), "ok", f"web: {url} answers")
    word = "open-sesame"
    with http_server(404, password=word) as url:
        set_url(url)
        finds(storage.remote(), "FAIL", "the server answers with status 401", "dvc remote modify web url")
        type_in("dvc remote modify --local web auth basic")
        with pytest.raises(InputError, match="auth is basic, and its user or password is not set"):
            storage.remote()
        type_in("dvc remote modify --local web ask_password true")
        finds(storage.remote(), "ok", f"web: {url} answers")
        type_in("dvc remote modify --local web ask_password false")
        type_in("dvc remote modify --local web user me")
        type_in("dvc remote modify --local web password wrong")
        finds(storage.remote(), "FAIL", "the server answers with status 401")
        type_in(f"dvc remote modify --local web password {word}")
        finds(storage.remote(), "ok", f"web: {url} answers")
    (small / ".dvc/config.local").unlink()
    set_url(f"http://me:{word}@127.0.0.1:{closed_port()}/")
    found = storage.remote()
    finds(found, "FAIL", "(http://***@127.0.0.1:")
    assert word not in str(found)
    set_url(f"http://127.0.0.1:{closed_port()}/")
    finds(storage.remote(), "FAIL", "cannot be reached: ", "dvc remote modify web url")
    with bad_server("hang") as url:
        set_url(url)
        monkeypatch.setattr(storage, "_SECONDS_TO_ANSWER", 0.2)
        finds(storage.remote(), "FAIL", "cannot be reached: ")
    set_url("s3://bucket/data")  # its plugin is not in the lock
    finds(storage.remote(), "FAIL", "s3 is supported, but requires 'dvc-s3'")


def test_a_google_drive_remote_that_is_set_up_in_part(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def after(command: str) -> Finding:
        type_in(command)
        return storage.remote()

    monkeypatch.delenv("GDRIVE_CREDENTIALS_DATA", raising=False)
    found = after("dvc remote add -d gdrive gdrive://FOLDER")
    finds(found, "FAIL", "does not use the service account", "dvc remote modify gdrive gdrive_use_service_account true")
    after(found.fix)
    found = after("dvc remote modify gdrive verify false")
    finds(found, "warn", "does not verify", "dvc remote modify gdrive verify true")
    found = after(found.fix)
    finds(found, "FAIL", "gdrive://FOLDER names no folder", "make remote-gdrive FOLDER=")


def test_a_google_drive_remote_without_a_key(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GDRIVE_CREDENTIALS_DATA", raising=False)
    type_in("dvc remote add -d gdrive gdrive://0123456789abcdef")
    type_in("dvc remote modify gdrive gdrive_use_service_account true")
    with pytest.raises(InputError, match="key"):
        storage.remote()


# --- hardware -----------------------------------------------------------------------------------------------------


needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


def test_the_device_that_is_asked_for(here: Path) -> None:
    finds(hardware.gpu(), "ok", f"cpu by runtime.device: cpu, PyTorch {torch.__version__}")
    count = torch.cuda.device_count()
    set_params(here / "params.yaml", {"runtime.device": f"cuda:{count}"})
    with pytest.raises(InputError, match=rf"runtime\.device: 'cuda:{count}' is not there"):
        hardware.gpu()


@needs_no_gpu
def test_a_gpu_that_pytorch_does_not_see(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's tool is a script that prints what it prints; there is no GPU to take a driver from."""
    set_params(here / "params.yaml", {"runtime.device": "auto"})

    def driver(version: str, cuda: str) -> None:
        write_program(
            here.parent / "driver/nvidia-smi",
            f'[ -n "$1" ] && echo "NVIDIA H100 80GB HBM3, {version}" && exit',
            f'echo "| NVIDIA-SMI {version}    Driver Version: {version}   CUDA Version: {cuda}  |"',
        )

    monkeypatch.setenv("PATH", f"{here.parent / 'driver'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    driver("535.104.05", "12.2")
    finds(hardware.gpu(), "FAIL", "driver 535.104.05, which knows CUDA up to 12.2, but this PyTorch is built for ")
    driver("999.0", "99.0")
    finds(hardware.gpu(), "FAIL", "but PyTorch does not see it", "torch.cuda.init()")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    finds(hardware.gpu(), "FAIL", "CUDA_VISIBLE_DEVICES='' hides it", "unset CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.version, "cuda", None)
    finds(hardware.gpu(), "FAIL", "is built without CUDA", "pip install --force-reinstall")
    set_params(here / "params.yaml", {"runtime.device": "cpu"})
    finds(hardware.gpu(), "ok", "NVIDIA H100 80GB HBM3 is not used (runtime.device)")
    write_program(here.parent / "driver/nvidia-smi", "echo 'No devices were found' && exit 6")
    finds(hardware.gpu(), "ok", f"cpu by runtime.device: cpu, PyTorch {torch.__version__}")


@needs_no_gpu
def test_a_gpu_that_pytorch_has_no_code_for(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's report of a GPU is made up: no old one is at hand."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA GeForce GTX 1080")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80"])
    set_params(here / "params.yaml", {"runtime.device": "auto"})
    reason = "NVIDIA GeForce GTX 1080 is sm_61, and this PyTorch is built for sm_75, sm_80"
    finds(hardware.gpu(), "warn", f"{reason}: the cpu computes", "install a PyTorch")
    set_params(here / "params.yaml", {"runtime.device": "cuda"})
    with pytest.raises(InputError, match=rf"runtime\.device: 'cuda': {reason}"):
        hardware.gpu()


def test_bfloat16(here: Path) -> None:
    assert hardware.bf16().status == "ok"  # precision: auto is right everywhere
    finds(hardware.precision("fp32", "cpu", True), "warn", "but train.precision is fp32", "-S train.precision=auto")
    finds(
        hardware.precision("bf16", "cpu", False),
        "warn",
        "the cpu is not known to multiply in bfloat16",
        "-S train.precision=auto",
    )
    finds(hardware.precision("fp16", "cuda", False), "ok", "the cuda has no bfloat16, train.precision: fp16")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity on this system")
def test_threads_against_cpus(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "cpu_quota", lambda: None)
    cpus = os.sched_getaffinity(0)
    set_params(here / "params.yaml", {"runtime.threads": 2})
    try:
        os.sched_setaffinity(0, {min(cpus)})
        found = hardware.threads()
        finds(found, "warn", "runtime.threads is 2, and this process may use 1 CPUs", "-S runtime.threads=1")
        set_params(here / "params.yaml", {"runtime.threads": 1})
        finds(hardware.threads(), "ok", "1 of 1 CPUs")
    finally:
        os.sched_setaffinity(0, cpus)
    if len(cpus) > 1 and not shutil.which("nvidia-smi"):
        found = hardware.threads()
        finds(found, "warn", f"runtime.threads is 1 of {len(cpus)} CPUs", f"-S runtime.threads={len(cpus)}")
    monkeypatch.setattr(runtime, "cpu_quota", lambda: 1.5)
    set_params(here / "params.yaml", {"runtime.threads": "auto"})
    finds(hardware.threads(), "ok", "1 of 1 CPUs")
    set_params(here / "params.yaml", {"runtime.threads": 2})
    finds(hardware.threads(), "warn", "runtime.threads is 2, and the container's limit is 1.5 CPUs", "=1 (")


# --- tracking -----------------------------------------------------------------------------------------------------


@pytest.fixture
def no_key(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(here.parent))
    return here


def test_wandb_that_is_off(no_key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finds(tracking.wandb(), "ok", "disabled by wandb.mode of params.yaml")
    monkeypatch.setenv("WANDB_MODE", "offline")
    finds(tracking.wandb(), "ok", "offline by WANDB_MODE, kept in ")
    monkeypatch.setenv("WANDB_MODE", "onlein")
    with pytest.raises(InputError, match="WANDB_MODE is 'onlein'"):
        tracking.wandb()


@pytest.mark.parametrize(
    ("server", "key", "status", "says", "fix"),
    [
        ("401", "", "FAIL", "no key for W&B", "wandb login"),
        ("401", KEY, "FAIL", "refuses the key", "wandb login"),
        ("closed", KEY, "warn", "cannot be reached", "export WANDB_MODE=offline"),
        ("late", KEY, "ok", "W&B takes the key", ""),
    ],
)
def test_wandb_online(no_key: Path, server: str, key: str, status: str, says: str, fix: str) -> None:
    """In a process of its own: wandb reads its settings once."""
    (no_key / ".env").write_text(f"WANDB_API_KEY={key}\n")
    set_params(no_key / "params.yaml", {"wandb.mode": "online"})
    ask = (
        "import dataclasses, json, os\nfrom tools.doctor import tracking\nbefore = dict(os.environ)\n"
        "print(json.dumps(dataclasses.asdict(tracking.wandb())))\nassert dict(os.environ) == before"
    )
    with bad_server(server) as url:
        address = f"http://127.0.0.1:{closed_port()}" if server == "closed" else url
        result = run(no_key, "python", "-c", ask, environment={"WANDB_BASE_URL": address, "HOME": str(no_key.parent)})
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    finds(Finding(**found), status, says, fix)
    assert KEY not in result.stdout + result.stderr
