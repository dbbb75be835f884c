"""The same pipeline in odd places: what a clone, a login or a container may be like."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.reliability import case
from tests.helpers import BIN, commit_all, run, set_params, start, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.faults]

FIRST = ["extract", "preprocess"]
NEEDS_ROOT = pytest.mark.skipif(os.getuid() != 0 or sys.platform != "linux", reason="needs root on Linux")


def forget(repository: Path) -> None:
    """Nothing of data/ is left, nor in the cache: the first stages must run."""
    shutil.rmtree(repository / "data", ignore_errors=True)
    shutil.rmtree(repository / ".dvc/cache", ignore_errors=True)


def check_runs(
    repository: Path, *wrapper: str, environment: dict[str, str] | None = None, target: str = "preprocess"
) -> None:
    """`dvc repro` runs the first stages again, to the same hashes as in the undisturbed run."""
    before = (repository / "dvc.lock").read_text()
    forget(repository)
    ended = run(repository, *wrapper, "dvc", "repro", "--force", target, check=False, environment=environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
    assert [stage for stage in re.findall(r"Running stage '(\w+)'", ended.stdout) if stage in FIRST] == FIRST
    assert (repository / "dvc.lock").read_text() == before


@case(
    "no git",
    "Without git, `dvc repro` says so; after `dvc config core.no_scm true` it runs.",
)
def test_no_git(repository: Path) -> None:
    shutil.rmtree(repository / ".git")
    ended = run(repository, "dvc", "repro", "preprocess", check=False)
    if ended.returncode != 0:
        assert "git" in ended.stderr.lower()
        assert "Traceback" not in ended.stderr
        run(repository, "dvc", "config", "core.no_scm", "true")
    check_runs(repository)


@case("no git, training", "Training, whose recorder looks for git, works without it too.")
def test_no_git_training(repository: Path) -> None:
    shutil.rmtree(repository / ".git")
    ended = run(repository, "python", "-m", "stages.train", check=False)
    assert ended.returncode == 0, ended.stderr


@case("no commits", "A repository without a commit runs.")
def test_no_commits(repository: Path) -> None:
    shutil.rmtree(repository / ".git")
    run(repository, "git", "init", "-q")
    check_runs(repository)


@case("detached head", "A commit that no branch is at runs, and experiments work there.")
def test_detached_head(repository: Path) -> None:
    run(repository, "git", "checkout", "-q", "--detach")
    check_runs(repository)
    run(repository, "dvc", "exp", "run", "-S", "preprocess.interpolation=box", "-n", "boxes", "preprocess")
    assert "boxes" in run(repository, "dvc", "exp", "list", "--name-only").stdout


@case("shallow clone", "A clone of the last commit only runs.")
def test_shallow_clone(repository: Path, tmp_path: Path) -> None:
    (repository / "README.md").write_text("another commit")
    commit_all(repository)
    run(tmp_path, "git", "clone", "-q", "--depth", "1", f"file://{repository}", "shallow")
    check_runs(tmp_path / "shallow")


@case("submodule", "As a submodule of another repository it runs.")
def test_submodule(repository: Path, tmp_path: Path) -> None:
    outer = tmp_path / "outer"
    outer.mkdir()
    run(outer, "git", "init", "-q")
    run(outer, "git", "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(repository), "inner")
    check_runs(outer / "inner")


@case("worktree", "In a worktree of git it runs.")
def test_worktree(repository: Path, tmp_path: Path) -> None:
    run(repository, "git", "worktree", "add", "-q", str(tmp_path / "tree"), "-b", "other")
    check_runs(tmp_path / "tree")


@case("spaces and letters in the path", "A folder `mein Ordner å 深層 'x'` runs, training included.")
def test_odd_path(repository: Path, tmp_path: Path) -> None:
    odd = tmp_path / "mein Ordner å 深層 'x'"
    repository.rename(odd)
    set_params(odd / "params.yaml", {"runtime.cache_dir": str(odd / "Zwischen speicher")})
    check_runs(odd, target="evaluate")


ENVIRONMENTS: dict[str, tuple[str, dict[str, str]]] = {
    "LC_ALL=C": ("In the C locale the same bytes come.", {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0"}),
    "Turkish": ("A locale that is not there is no obstacle.", {"LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8"}),
    "another time zone": ("No time is in an output.", {"TZ": "Pacific/Kiritimati"}),
    "no terminal type": ("TERM, COLUMNS and the like may be missing.", {"TERM": "", "COLUMNS": "1"}),
    "hash seed": ("No output depends on Python's random hashes.", {"PYTHONHASHSEED": "12345"}),
    "optimised Python": ("Nothing that matters is checked by an assert alone.", {"PYTHONOPTIMIZE": "2"}),
    "proxy that is not there": (
        "Nothing of the default run asks the network.",
        {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "DVC_NO_ANALYTICS": "1"},
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=case(name, promise), id=name) for name, (promise, _) in ENVIRONMENTS.items()]
)
def test_an_environment(name: str, repository: Path) -> None:
    check_runs(repository, environment=ENVIRONMENTS[name][1])


@case("no HOME", "Without the variable HOME the pipeline runs.")
def test_no_home(repository: Path) -> None:
    check_runs(repository, "env", "-u", "HOME")


@case("HOME that is not there", "A home folder that cannot be made does not stop the pipeline, training included.")
def test_home_that_cannot_be_made(repository: Path) -> None:
    check_runs(repository, environment={"HOME": "/proc/nobody", "MPLCONFIGDIR": ""}, target="evaluate")


@case("no place for the cache_dir", "A `runtime.cache_dir` that cannot be made stops training with a message.")
def test_no_cache_dir(repository: Path) -> None:
    set_params(repository / "params.yaml", {"runtime.cache_dir": "/proc/nobody/cache", "train.seed": 2})
    ended = run(repository, "python", "-m", "stages.train", check=False)
    assert ended.returncode in (1, 2), ended.stderr
    assert "/proc/nobody" in ended.stderr
    assert "Traceback" not in ended.stderr


@case("umask 077", "Files that only the owner may read are no obstacle.")
def test_umask(repository: Path) -> None:
    check_runs(repository, "bash", "-c", 'umask 077; exec "$@"', "_")


@case("few open files", "64 open files are enough, workers included, or the message names the limit.")
def test_few_open_files(repository: Path) -> None:
    set_params(repository / "params.yaml", {"runtime.workers": 2})
    check_runs(repository, "bash", "-c", 'ulimit -n 64; exec "$@"', "_")


@case("one CPU", "On one CPU the same bytes come.")
@pytest.mark.skipif(shutil.which("taskset") is None, reason="needs taskset")
def test_one_cpu(repository: Path) -> None:
    set_params(repository / "params.yaml", {"runtime.workers": "auto"})
    check_runs(repository, "taskset", "-c", str(min(os.sched_getaffinity(0))))


@case("little memory", "1.5 GB of address space are enough to extract; with far too little it fails at once.")
def test_little_memory(repository: Path) -> None:
    for limit, succeeds in ((1_500_000, True), (150_000, False)):
        ended = run(
            repository, "bash", "-c", f"ulimit -v {limit}; exec {sys.executable} -m stages.extract", check=False
        )
        assert (ended.returncode == 0) == succeeds, ended.stderr


@case("no network", "With no network at all, not even the loopback, the default run works.")
@NEEDS_ROOT
def test_no_network(repository: Path) -> None:
    if subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode != 0:
        pytest.skip("unshare is not permitted here")
    check_runs(repository, "unshare", "--net")


@pytest.fixture
def silent_server() -> Iterator[tuple[str, list[socket.socket]]]:
    """A server that takes connections and never answers: its address, and the connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken: list[socket.socket] = []

        def take() -> None:
            while True:
                try:
                    taken.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=take, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", taken
        for connection in taken:
            connection.close()


@case("proxy that hangs", "A download through it waits, and Ctrl-C ends it at once, without a traceback or a leftover.")
def test_a_proxy_that_hangs(repository: Path, silent_server: tuple[str, list[socket.socket]]) -> None:
    proxy, connections = silent_server
    set_params(repository / "params.yaml", {"data.source": "http://example.org/images.tgz"})
    environment = {"http_proxy": proxy, "HTTP_PROXY": proxy, "no_proxy": ""}
    process = start(repository, "python", "-m", "stages.extract", environment=environment)
    wait_until(lambda: bool(connections))
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=10)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert [path.name for path in (repository / "data").iterdir() if path.name.startswith(".")] == []


@case("another owner", "Files of another user, which can be read but not written, end with a message that says so.")
@NEEDS_ROOT
def test_another_owner(repository: Path) -> None:
    # root's right to write everywhere is taken away, which is as good as being another user
    command = ("setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner")
    if shutil.which("setpriv") is None or subprocess.run([*command, "true"], capture_output=True).returncode != 0:
        pytest.skip("needs setpriv, and the right to use it")
    repository.chmod(0o755)  # pytest closes its folders to others
    for path in (repository, *repository.rglob("*")):
        os.chown(path, 65534, 65534, follow_symlinks=False)
    ended = run(repository, *command, sys.executable, "-m", "stages.extract", check=False)
    assert ended.returncode == 1, ended.stderr
    assert "Permission denied; you may not" in ended.stderr
    assert "Traceback" not in ended.stderr


@case("clock set back", "Files that are dated in the future are judged by their content: nothing runs needlessly.")
def test_a_clock_that_was_set_back(repository: Path) -> None:
    for path in repository.rglob("*"):
        if path.is_file() and ".git/" not in str(path) and ".dvc/" not in str(path):
            os.utime(path, (4_000_000_000, 4_000_000_000))
    assert "Running stage" not in run(repository, "dvc", "repro").stdout


@case("started elsewhere", "A stage that is run from another folder says to run it from the root.")
def test_started_elsewhere(repository: Path, tmp_path: Path) -> None:
    ended = run(
        tmp_path, sys.executable, "-m", "stages.extract", check=False, environment={"PYTHONPATH": str(repository)}
    )
    assert ended.returncode == 2
    assert "params.yaml: not found; run stages from the root of the repository" in ended.stderr


@case("python without the packages", "With another python first on PATH it fails, and names what is missing.")
def test_another_python(repository: Path, tmp_path: Path) -> None:
    system = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    if system is None:
        pytest.skip("no other Python here")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(system)
    forget(repository)
    path = f"PATH={tmp_path / 'bin'}:{os.environ['PATH']}"
    ended = run(repository, "env", path, str(BIN / "dvc"), "repro", "--force", "extract", check=False)
    if ended.returncode == 0:
        pytest.skip("the other Python has the packages")
    assert "No module named" in ended.stderr + ended.stdout
