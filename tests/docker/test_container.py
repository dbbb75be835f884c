"""The image for real: users, a root file system that cannot be written to, no network, signals, the pipeline, keys."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
import time
import zipfile
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.ci.test_lock import explained
from tests.docker.conftest import LOCKED_DOWN, docker
from tests.helpers import run, set_params, step_reached, wait_until

pytestmark = pytest.mark.slow
InContainer = Callable[..., subprocess.CompletedProcess[str]]
SECRET = "MIIEvSECRETSECRETSECRET"
KEY = json.dumps({"type": "service_account", "private_key": SECRET})


def test_the_image_is_the_environment_and_nothing_else(image: str, in_container: InContainer) -> None:
    assert in_container("--", "id", "-u").stdout.strip() == "1000"
    assert in_container("--", "ls", "-A", "/workspace").stdout == ""
    versions = in_container(
        "--", "python", "-c", "import torch, torchvision, pydrive2; print(torch.__version__)"
    ).stdout
    assert versions.startswith("2.")
    # What docs/REMOTE.md explains, in the words of the image's pip.
    check = in_container("--", "python", "-m", "pip", "check", check=False).stdout.lower()
    assert sorted(check.splitlines()) == sorted(explained())
    history = docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", image).stdout
    assert "GDRIVE" not in history


def test_nothing_but_two_files_is_in_the_build_context(image: str, engine: None, tmp_path: Path) -> None:
    """A key beside the Dockerfile cannot get into a layer: .dockerignore lets in two files by name."""
    (tmp_path / ".dockerignore").write_text((Path(__file__).parents[2] / ".dockerignore").read_text())
    (tmp_path / ".secrets").mkdir()
    for name in (".secrets/gdrive-key.json", "key.json", ".env", "requirements.txt", "docker-entrypoint.sh"):
        (tmp_path / name).write_text(SECRET)
    (tmp_path / "Dockerfile").write_text(f"FROM {image}\nCOPY . /context/\n")
    docker("build", "-t", "driftline:context", str(tmp_path))
    listed = docker("run", "--rm", "--entrypoint", "find", "driftline:context", "/context", "-type", "f").stdout
    docker("rmi", "driftline:context")
    assert sorted(listed.split()) == ["/context/docker-entrypoint.sh", "/context/requirements.txt"]


@pytest.mark.parametrize("user", ["owner", "image", "nobody"])
def test_the_pipeline_runs_as_any_user_on_a_repository_of_any_owner(
    in_container: InContainer, repository: Path, user: str
) -> None:
    """Without a network, a name, a writable root file system or an identity for git."""
    set_params(repository / "params.yaml", {"runtime.cache_dir": "~/.cache/driftline"})
    run(repository, "git", "config", "--unset", "user.name")
    run(repository, "git", "config", "--unset", "user.email")
    owner = {"owner": f"{os.getuid()}:{os.getgid()}", "image": "1000:1000", "nobody": "54321:54321"}[user]
    if os.getuid() == 0:
        run(repository, "chown", "-R", owner, ".")
        run(repository, "chown", "0:0", ".")  # git asks who owns the top folder
        repository.chmod(0o777)
    elif user != "owner":
        pytest.skip("only root can give a repository away")
    output = in_container(
        *("--volume", f"{repository}:/workspace", "--user", owner, "--"),
        *("dvc", "exp", "run", "-S", "train.seed=7", "-S", "profile.timed_steps=3"),
    ).stdout
    assert "Running stage 'train'" in output
    assert "Ran experiment(s)" in output
    assert in_container(
        "--volume", f"{repository}:/workspace", "--user", owner, "--", "dvc", "status"
    ).stdout.startswith("Data and pipelines are up to date")


def test_tests_run_inside(in_container: InContainer, repository: Path, mine: tuple[str, ...]) -> None:
    output = in_container(
        *mine, "--", "python", "-m", "pytest", "-p", "no:cacheprovider", "tests/test_pipeline.py"
    ).stdout
    assert re.search(r"\[100%\]", output), output


def test_several_processes_train_without_a_network(
    in_container: InContainer, repository: Path, mine: tuple[str, ...]
) -> None:
    """Where the host's own name does not resolve: the processes meet on the loopback interface."""
    lookup = "import socket; socket.getaddrinfo(socket.gethostname(), 0)"
    assert in_container("--", "python", "-c", lookup, check=False).returncode
    set_params(repository / "params.yaml", {"runtime.cache_dir": "~/.cache/driftline", "runtime.processes": 2})
    output = in_container(*mine, "--", "dvc", "exp", "run", "-S", "train.seed=9", "train").stdout
    assert "on 2 x cpu" in output


@pytest.mark.parametrize("signal", ["TERM", "INT"])
def test_a_signal_to_the_container_ends_the_run_in_time_with_a_checkpoint(
    image: str, repository: Path, mine: tuple[str, ...], tmp_path: Path, signal: str
) -> None:
    set_params(repository / "params.yaml", {"runtime.cache_dir": "~/.cache/driftline", "train.epochs": 5000})
    set_params(repository / "params.yaml", {"runtime.checkpoint_seconds": None})
    (tmp_path / "cache").mkdir()
    name = f"driftline-test-{os.getpid()}-{signal.lower()}"
    volume = ("--volume", f"{tmp_path}/cache:/home/driftline/.cache/driftline")
    command = ("dvc", "exp", "run", "-S", "train.seed=8")
    try:
        before = step_reached(repository)
        docker("run", "--detach", "--name", name, *LOCKED_DOWN, *mine, *volume, image, *command)
        wait_until(
            lambda: 0 < step_reached(repository) != before and "epoch 2/" in docker("logs", name).stdout, poll=0.5
        )
        asked = time.monotonic()
        docker("kill", "--signal", signal, name)
        docker("wait", name)
        took = time.monotonic() - asked
        output = docker("logs", name)
        assert took < 5, f"{took:.1f} s\n{output.stdout}\n{output.stderr}"
        assert "run the same command again" in output.stderr
    finally:
        docker("rm", "--force", "--volumes", name)
    (checkpoint,) = (tmp_path / "cache").rglob("step-*.pt")
    steps = int(checkpoint.stem.split("-")[1])
    # The run goes on from there in another container.
    try:
        docker("run", "--detach", "--name", name, *LOCKED_DOWN, *mine, *volume, image, *command)
        wait_until(lambda: f"goes on after step {steps}" in docker("logs", name).stdout, poll=0.5)
    finally:
        docker("rm", "--force", "--volumes", name)


@pytest.mark.parametrize("by", ["variable", "file"])
def test_a_key_reaches_dvc_and_no_stage(
    in_container: InContainer, mine: tuple[str, ...], tmp_path: Path, repository: Path, by: str
) -> None:
    """A stage that prints its environment and dvc's configuration shows where the key is, and no byte of it."""
    run(repository, "dvc", "remote", "add", "gdrive", "gdrive://folder", "-f")
    run(
        repository,
        "dvc",
        "stage",
        "add",
        "-q",
        "-f",
        "-n",
        "spy",
        "env; find /tmp -name gdrive-key.json -printf '%m %s'",
    )
    (tmp_path / "key.json").write_text(KEY)
    key = {
        "variable": ("--env", f"GDRIVE_CREDENTIALS_DATA={KEY}"),
        "file": ("--volume", f"{tmp_path}/key.json:/run/secrets/gdrive-key.json:ro"),
    }[by]
    output = in_container(*mine, *key, "--", "dvc", "repro", "--single-item", "spy")
    assert f"600 {len(KEY)}" in output.stdout
    assert SECRET not in output.stdout + output.stderr
    assert "GDRIVE_CREDENTIALS_DATA" not in output.stdout
    merged = in_container(*mine, *key, "--", "dvc", "remote", "list").stdout
    assert "gdrive://folder" in merged
    option = in_container(
        *(*mine, *key, "--", "python", "-c"),
        "from dvc.config import Config; print(open(Config.from_cwd()['remote']['gdrive']"
        "['gdrive_service_account_json_file_path']).read())",
    ).stdout
    assert json.loads(option) == json.loads(KEY)
    assert not [path for path in (repository / ".dvc").glob("config*") if SECRET in path.read_text()]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--env", "GDRIVE_CREDENTIALS_DATA=eyJ0eXBlIjogInNlcnZpY2VfYWNjb3VudCJ9"), "is not JSON"),
        (("--env", "GDRIVE_CREDENTIALS_DATA=.secrets/gdrive-key.json"), "not its path"),
        (("--env", "GDRIVE_KEY_FILE=/run/secrets/missing.json"), "is no file"),
        (("--volume", "/run/secrets/gdrive-key.json"), "docker makes a folder where the path is wrong"),
    ],
)
def test_a_key_that_cannot_be_one_ends_in_one_line(
    in_container: InContainer, options: tuple[str, ...], says: str
) -> None:
    result = in_container(*options, "--", "true", check=False)
    assert result.returncode == 2
    assert says in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


def test_a_key_of_somebody_else_is_said(in_container: InContainer, tmp_path: Path) -> None:
    key = tmp_path / "key.json"
    key.write_text(KEY)
    key.chmod(0o600)
    result = in_container(
        *("--volume", f"{key}:/run/secrets/gdrive-key.json:ro", "--user", "54321:54321", "--", "true"), check=False
    )
    assert (result.returncode, "cannot be read by user 54321" in result.stderr) == (2, True)


def test_an_empty_variable_is_no_key(in_container: InContainer) -> None:
    """As GitHub gives a secret that is not set."""
    result = in_container("--env", "GDRIVE_CREDENTIALS_DATA=", "--env", "CI_MODE=1", "--", "env")
    assert "GDRIVE" not in result.stdout
    assert "no Google Drive key" in result.stderr
    assert "GIT_TERMINAL_PROMPT=0" in result.stdout


def test_without_a_place_to_write_it_says_what_to_add(image: str) -> None:
    result = docker("run", "--rm", "--read-only", image, "true", check=False)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].endswith("say -v /tmp -v /home/driftline")


@pytest.mark.parametrize("index", ["", "https://index.example/cpu"])
def test_torch_is_apart_from_the_rest_of_the_lock(engine: None, index: str) -> None:
    root = Path(__file__).parents[2]
    docker("build", "--target", "lock", "--build-arg", f"TORCH_INDEX={index}", "-t", "driftline:lock", str(root))
    torch, rest = (
        docker("run", "--rm", "driftline:lock", "cat", f"/lock/{name}.txt").stdout for name in ("torch", "rest")
    )
    docker("rmi", "driftline:lock")
    names = {
        name: set(re.findall(r"^([a-z][\w.-]*)==", text, re.M)) for name, text in (("torch", torch), ("rest", rest))
    }
    cuda = {name for name in names["torch"] if name.startswith(("nvidia-", "cuda-", "triton"))}
    assert names["torch"] - cuda == {"torch", "torchvision"}
    assert bool(cuda) == (not index)
    assert "--hash" not in torch or not index
    everything = set(re.findall(r"^([a-z][\w.-]*)==", (root / "requirements.txt").read_text(), re.M))
    left_out = everything - names["torch"] - names["rest"]
    assert all(name.startswith(("nvidia-", "cuda-", "triton")) for name in left_out)
    assert bool(left_out) == bool(index)
    assert {"nvidia-ml-py", "dvc", "numpy"} <= names["rest"]


def test_an_index_of_other_builds_gives_torch_and_nothing_else(image: str, tmp_path: Path) -> None:
    """The build argument with an index on this machine, whose torch and torchvision are empty packages."""
    lock = (Path(__file__).parents[2] / "requirements.txt").read_text()
    blocks = {block.partition("==")[0]: block for block in re.split(r"^(?=[a-z])", lock, flags=re.MULTILINE)}
    context, index = tmp_path / "context", tmp_path / "index"
    context.mkdir()
    for name in ("Dockerfile", "docker-entrypoint.sh", ".dockerignore"):
        shutil.copy2(Path(__file__).parents[2] / name, context)
    wanted = ("torch", "torchvision", "triton", "packaging")
    (context / "requirements.txt").write_text("".join(blocks[name] for name in wanted))
    for name in ("torch", "torchvision"):
        empty_wheel(index / name, name, re.findall(r"==(\S+)", blocks[name])[0] + "+cpu")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(index))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        arguments = ("--network", "host", "--build-arg", f"TORCH_INDEX={address}", "-t", "driftline:index")
        docker("build", *arguments, str(context))
        server.shutdown()
    listed = docker("run", "--rm", "driftline:index", "python", "-m", "pip", "list", "--format", "freeze").stdout
    docker("rmi", "driftline:index")
    assert re.search(r"^torch==\S+\+cpu$", listed, re.MULTILINE)
    assert re.search(r"^torchvision==\S+\+cpu$", listed, re.MULTILINE)
    assert "packaging==" in listed
    assert "triton" not in listed


def empty_wheel(folder: Path, name: str, version: str) -> None:
    """A package without any module, as pip installs it."""
    folder.mkdir(parents=True)
    information = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{information}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{information}/RECORD", "")
