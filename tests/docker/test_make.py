"""The docker verbs of the Makefile, with a real engine: on a finished repository, as the user who calls make."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.docker.conftest import docker
from tests.gdrive.conftest import tool
from tests.gdrive.drive import FOLDER_ID
from tests.gdrive.keys import Account, make_certificates
from tests.gdrive.server import HOSTS, StandIn
from tests.helpers import ROOT, commit_all, files, run, set_params

pytestmark = pytest.mark.slow


def make(folder: Path, line: str, *variables: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a line such as `make docker-train` with the image of this checkout."""
    return run(folder, *line.split(), *variables, check=check, environment={"HOME": str(folder.parent), **env})


@pytest.fixture
def named(image: str) -> tuple[str, str]:
    name, _, tag = image.rpartition(":")
    return f"IMAGE_NAME={name}", f"IMAGE_TAG={tag}"


def test_build(image: str) -> None:
    """The image is in docker's layer cache: nothing is downloaded."""
    if "DRIFTLINE_IMAGE" in os.environ:
        pytest.skip("the image is a given one (DRIFTLINE_IMAGE)")
    make(
        ROOT,
        "make docker-build",
        "IMAGE_NAME=driftline",
        "IMAGE_TAG=made",
        "ARGS=--label test=yes",
        HOME=os.environ["HOME"],
    )
    label = docker("image", "inspect", "-f", '{{index .Config.Labels "test"}}', "driftline:made").stdout
    docker("rmi", "driftline:made")
    assert label.strip() == "yes"


def test_train(named: tuple[str, str], repository: Path) -> None:
    set_params(repository / "params.yaml", {"runtime.cache_dir": "~/.cache/driftline"})
    commit_all(repository)
    output = make(repository, "make docker-train", *named).stdout
    assert "Stage 'train' didn't change" in output  # runtime is the profile's affair
    output = make(repository, "make docker-train", *named, "ARGS=-S train.lr=0.003 -n other").stdout
    assert "Running stage 'train'" in output
    assert "other" in run(repository, "dvc", "exp", "list").stdout
    # Checkpoints, which a finished run removes, were where runs outside look for them; nothing belongs to anybody else.
    assert (repository.parent / ".cache/driftline/checkpoints").is_dir()
    assert {path.stat().st_uid for path in repository.rglob("*")} == {os.getuid()}


def test_pull_with_a_cache_of_the_host(named: tuple[str, str], repository: Path, tmp_path: Path) -> None:
    """From a remote in a mounted folder, into a cache outside the repository."""
    cache, remote = tmp_path / "cache", repository / "remote"
    run(repository, "dvc", "remote", "add", "--default", "local", str(remote))
    run(repository, "dvc", "push", "-q")
    run(repository, "dvc", "remote", "modify", "local", "url", "/workspace/remote")
    run(repository, "rm", "-rf", ".dvc/cache", "models", "data")
    variables = (*named, f"HOST_DVC_CACHE_DIR={cache}")
    make(repository, "make docker-pull", *variables)
    assert json.loads((repository / "models/classifier/model.json").read_text())["classes"]
    assert not (repository / "data/raw").exists(), "it is not pushed, and nothing failed for the lack of it"
    assert any((cache / "files").rglob("*"))
    assert not (repository / ".dvc/cache/files").exists()

    run(repository, "rm", "-rf", "remote", "models", str(cache))
    result = make(repository, "make docker-pull", *variables, check=False)
    assert "there is no folder /workspace/remote: mount its disk, or make it" in result.stderr
    assert not (repository / "remote").exists()
    (repository / "remote").mkdir()
    result = make(repository, "make docker-pull", *variables, check=False)
    assert "the remote does not have everything that dvc.lock names" in result.stderr
    make(repository, "make docker-pull ARGS=--allow-missing", *variables)


def test_pull_from_google_drive(named: tuple[str, str], repository: Path, tmp_path: Path) -> None:
    """With the key where `save-key` put it on the host, from the stand-in of Google on the host."""
    account = Account("puller")
    key = tmp_path / "key.json"
    key.write_text(account.text)
    google = StandIn(make_certificates(tmp_path, HOSTS))
    try:
        google.accounts[account.email] = account.public
        for words in (f"setup-gdrive {FOLDER_ID}", "push"):
            tool(google, repository, *words.split(), GDRIVE_CREDENTIALS_DATA=account.text)
        tool(google, repository, "save-key", str(key))
        expected = files(repository / "models")
        run(repository, "rm", "-rf", ".dvc/cache", "models", "data")
        environment = " ".join(f"--env {name}={value}" for name, value in google.environment.items() if value)
        trust = f"--volume {google.authority}:{google.authority}:ro"
        make(repository, "make docker-pull", *named, f"DOCKER_OPTS=--network host {environment} {trust}")
    finally:
        google.close()
    assert files(repository / "models") == expected
    assert not (repository / "data/raw").exists()
    config = (repository / ".dvc/config.local").read_text()
    assert "= ../.secrets/gdrive-key.json\n" in config, "the same file inside and outside"


def test_tests(named: tuple[str, str], repository: Path) -> None:
    output = make(repository, "make docker-test", *named, "ARGS=tests/stages/core/test_parallel.py").stdout
    assert re.search(r"\d+ passed", output), output


def test_shell_and_options(named: tuple[str, str], repository: Path) -> None:
    """The shell needs a terminal: `script` has one."""
    options = "DOCKER_MEMORY_OPTS='--memory 3g' DOCKER_OPTS='--network none'"
    command = f"make docker-shell {' '.join(named)} {options}"
    words = "cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max; ls /sys/class/net; pwd; exit\n"
    shell = subprocess.run(
        ["script", "-qec", command, "/dev/null"],
        cwd=repository,
        env=os.environ | {"HOME": str(repository.parent)},
        input=words,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert str(3 * 2**30) in shell.stdout, shell.stdout
    assert "/workspace" in shell.stdout
    assert "eth0" not in shell.stdout


@pytest.mark.parametrize("verb", ["docker-pull", "docker-shell"])
def test_a_key_that_is_missing_is_told(repository: Path, verb: str) -> None:
    """Docker would make a folder of that name."""
    result = make(repository, f"make {verb}", "HOST_SERVICE_ACCOUNT_KEY_PATH=nowhere.json", check=False)
    assert (result.returncode, "nowhere.json is no file" in result.stderr) == (2, True)
    assert not (repository / "nowhere.json").exists()


def test_a_key_is_mounted(named: tuple[str, str], repository: Path) -> None:
    (repository / ".secrets").mkdir()
    (repository / ".secrets/gdrive-key.json").write_text("not a key")
    result = make(repository, "make docker-pull", *named, check=False)
    assert "/run/secrets/gdrive-key.json is not JSON" in result.stderr


def test_a_key_in_the_environment_arrives(named: tuple[str, str], repository: Path) -> None:
    result = make(repository, "make docker-pull", *named, check=False, GDRIVE_CREDENTIALS_DATA="not a key")
    assert "GDRIVE_CREDENTIALS_DATA is not JSON" in result.stderr
    assert "not a key" not in result.stdout + result.stderr
