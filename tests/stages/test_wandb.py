"""The W&B mirror: it holds what DVCLive holds, and whatever W&B does, the run is the same and ends in time."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from stages import drift, evaluate, train
from stages.core.errors import InputError
from stages.core.mirror import open_mirror
from stages.core.params import load_params
from tests.helpers import PATIENCE, ROOT, files, run, set_params, start, step_reached, wait_until
from tests.wandb_runs import KEY, Run, bad_server, processes_of_wandb, read_run, run_folders, runs

PROMISED = 5.0  # seconds


def tolerated(undisturbed: float) -> float:
    """Seconds more than an undisturbed stage: the machine of the tests may be busy, the more the longer that took."""
    return PROMISED + undisturbed


def clean_environment(folder: Path) -> dict[str, str]:
    """No key and no settings of whoever runs the tests."""
    return {"PYTHONPATH": str(ROOT), "HOME": str(folder / "home"), "WANDB_API_KEY": "", "WANDB_MODE": ""}


def results(folder: Path) -> dict[str, bytes]:
    return files(folder / "models", folder / "metrics", folder / "plots")


def recorded(folder: Path) -> dict[int, dict[str, float]]:
    """DVCLive's history, by step."""
    history: dict[int, dict[str, float]] = {}
    root = folder / "metrics/train/plots/metrics"
    for path in root.rglob("*.tsv"):
        with path.open() as file:
            for row in csv.DictReader(file, delimiter="\t"):
                name = path.relative_to(root).with_suffix("").as_posix()
                history.setdefault(int(row["step"]), {})[name] = float(row[path.stem])
    return history


def mirrored(one: Run) -> dict[int, dict[str, float]]:
    return {
        row["_step"]: {name: value for name, value in row.items() if not name.startswith("_")} for row in one.history
    }


def seconds_of(output: str) -> float:
    """What a stage says that it took."""
    match = re.search(r"\((\d+\.\d) s\)", output)
    assert match, output
    return float(match[1])


def warnings_in(output: str) -> list[str]:
    return [line for line in output.splitlines() if "wandb" in line.lower() or "W&B" in line]


def left_over() -> list[Path]:
    """Temporary files, but for PyTorch's own."""
    return [path for path in Path(os.environ["TMPDIR"]).iterdir() if not path.name.startswith("torchinductor")]


@pytest.fixture
def ready(packed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (packed / "home").mkdir()
    set_params(packed / "params.yaml", {"wandb.timeout": 120})  # a busy machine takes its time for what is to work
    for name, value in clean_environment(packed).items():
        monkeypatch.setenv(name, value)
    with tempfile.TemporaryDirectory() as temporary:  # short: sockets lie in it
        monkeypatch.setenv("TMPDIR", temporary)
        monkeypatch.setattr(tempfile, "tempdir", temporary)
        yield packed
        wait_until(lambda: not any(Path(temporary).glob("driftline-wandb-*")), 20)  # however the test's stages ended


@pytest.fixture
def stage(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run a stage in this process; gives all that it and its processes print."""

    def work(name: str, **environment: str) -> str:
        capfd.readouterr()
        with monkeypatch.context() as patch:
            for key, value in environment.items():
                patch.setenv(key, value)
            module = {"train": train, "evaluate": evaluate, "drift": drift}[name]
            module.main(load_params(module.Params))
        return "".join(capfd.readouterr())

    return work


def test_an_offline_run_holds_what_dvclive_holds(ready: Path, stage: Callable[..., str]) -> None:
    stage("train")
    stage("evaluate")
    plain = results(ready)
    assert not (ready / "cache/wandb").exists(), "disabled by default"
    set_params(ready / "params.yaml", {"wandb.mode": "offline"})
    said = stage("train")
    stage("evaluate")
    assert results(ready) == plain, "the mirror changes no byte"
    assert not warnings_in(said)

    trained, evaluated = runs(ready / "cache")
    history = recorded(ready)
    assert len(history) == 4
    assert {"train/loss", "train/lr", "val/loss", "val/top1"} == set().union(*history.values())
    assert mirrored(trained) == history
    assert trained.summary["epoch"] == 2
    assert trained.config["train"]["lr"] == 0.01
    assert trained.config["model"]["name"] == "test_resnet"
    assert trained.num_samples > 0, "no system metrics"
    (artifact,) = trained.artifacts
    assert (artifact.type, artifact.name) == ("model", "classifier")
    staged = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}  # outlives the run
    assert {name: path.read_bytes() for name, path in staged.items()} == files(ready / "models/classifier")

    expected = json.loads((ready / "metrics/evaluate.json").read_text())
    assert {name: evaluated.history[0][f"evaluate/{name}"] for name in expected} == expected
    mirrored_pictures = list(evaluated.folder.glob("files/media/images/evaluate/*.png"))
    assert {path.name.split("_0_")[0]: path.read_bytes() for path in mirrored_pictures} == {
        path.stem: path.read_bytes() for path in (ready / "plots/evaluate").glob("*.png")
    }
    per_class = next(evaluated.folder.glob("files/media/table/evaluate/per_class_table*.json"))
    assert len(json.loads(per_class.read_text())["data"]) == 10

    tables = [Path(entry.local_path) for one in evaluated.artifacts for entry in one.manifest.contents]
    assert tables
    assert all(path.exists() for path in tables), "`wandb sync` needs them"

    assert trained.facts.run_group == evaluated.facts.run_group
    assert trained.facts.run_group.startswith("train-")
    assert (trained.facts.job_type, evaluated.facts.job_type) == ("train", "evaluate")
    assert trained.config["model_sha256"] == evaluated.config["model_sha256"]
    assert trained.exit_code == evaluated.exit_code == 0
    wait_until(lambda: not processes_of_wandb(ready / "cache"))
    assert not left_over()


@pytest.mark.slow
def test_a_drift_run_is_linked_and_shows_its_pictures(ready: Path, stage: Callable[..., str]) -> None:
    set_params(ready / "params.yaml", {"wandb.mode": "offline"})
    stage("train")
    stage("drift")
    trained, drifted = runs(ready / "cache")
    assert trained.facts.run_group == drifted.facts.run_group
    summary = json.loads((ready / "metrics/drift.json").read_text())
    assert drifted.history[0]["drift/clean_accuracy"] == summary["clean_accuracy"]
    assert drifted.history[0]["drift/false_alarms/4/mean"] == summary["false_alarms"]["4"]["mean"]
    for name in ("severity", "power", "estimates", "corruptions"):
        assert drifted.history[0][f"drift/{name}._type"] == "image-file"


def test_other_models_are_another_group(ready: Path, stage: Callable[..., str]) -> None:
    stage("train")
    stage("evaluate", WANDB_MODE="offline")
    (evaluated,) = runs(ready / "cache")
    assert evaluated.facts.run_group == f"model-{evaluated.config['model_sha256'][:12]}"


FAULTS = {
    "refused": r"cannot be reached \(ConnectionError\)",
    "unknown name": r"cannot be reached|does not answer within 3 s",
    "no key": r"no key for W&B: set WANDB_API_KEY in the environment or in \.env",
    "401": r"refuses the key: set WANDB_API_KEY",
    "500": r"answers with status 500",
    "hangs": r"does not answer within 3 s",
    "trickle": r"does not answer within 3 s",
    "late": r"W&B did not take (the model within 2 s|everything in time)",
}
SLOW_FAULTS = ("refused", "unknown name", "401", "500", "trickle")


@pytest.mark.parametrize("fault", [
    pytest.param(name, marks=[pytest.mark.slow] if name in SLOW_FAULTS else []) for name in FAULTS
])  # fmt: skip
def test_faults_cost_a_warning_and_little_time(fault: str, ready: Path, stage: Callable[..., str]) -> None:
    # Longer than W&B has to answer and open a run, as real stages are.
    late = {"wandb.timeout": 4} if fault == "late" else {}
    set_params(ready / "params.yaml", {"train.epochs": 30} | late)
    undisturbed = stage("train")
    expected = results(ready)
    with bad_server(fault) as address:
        addresses = {"refused": "http://127.0.0.1:9", "unknown name": "http://nowhere.invalid"}
        environment = {"WANDB_MODE": "online", "WANDB_BASE_URL": addresses.get(fault, address)}
        if fault != "no key":
            environment["WANDB_API_KEY"] = KEY
        disturbed = stage("train", **environment)
    added = seconds_of(disturbed) - seconds_of(undisturbed)
    print(f"{fault}: {added:.1f} s more")
    assert added < tolerated(seconds_of(undisturbed))
    assert results(ready) == expected
    (warning,) = warnings_in(disturbed)
    assert re.search(FAULTS[fault], warning)
    match = re.search(r"; send it later: wandb sync (\S+)$", warning)
    assert match, warning
    # What the warning names holds all metrics.
    assert mirrored(read_run(Path(match[1]))) == recorded(ready)
    wait_until(lambda: not processes_of_wandb(ready / "cache"))
    check_no_key(ready, disturbed)


def check_no_key(folder: Path, said: str) -> None:
    assert KEY not in said
    with_key = [path for path, content in files(folder).items() if KEY.encode() in content and path != ".env"]
    assert not with_key


def test_the_key_comes_from_dotenv_and_goes_nowhere(ready: Path, stage: Callable[..., str]) -> None:
    (ready / ".env").write_text(f"OTHER=1\nWANDB_API_KEY={KEY}\n")
    set_params(ready / "params.yaml", {"train.epochs": 30})  # as above
    with bad_server("401") as address:
        said = stage("train", WANDB_MODE="online", WANDB_BASE_URL=address)
    assert "refuses the key" in said
    check_no_key(ready, said)
    assert run(ROOT, "git", "check-ignore", ".env").stdout.strip() == ".env"


def test_a_folder_that_cannot_be_written_costs_a_warning(ready: Path, stage: Callable[..., str]) -> None:
    (ready / "cache").mkdir(exist_ok=True)
    (ready / "cache/wandb").write_text("in the way")
    said = stage("train", WANDB_MODE="offline")
    (warning,) = warnings_in(said)
    assert warning.endswith("; this run is not mirrored")
    assert (ready / "models/classifier/model.json").exists()
    wait_until(lambda: not processes_of_wandb(ready / "cache"))


@pytest.mark.slow
def test_a_full_disk_costs_a_warning_at_most(ready: Path, stage: Callable[..., str]) -> None:
    undisturbed = stage("train")
    expected = results(ready)
    (ready / "cache/wandb").mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(ready / "cache/wandb")],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        said = stage("train", WANDB_MODE="offline")
    finally:
        subprocess.run(["umount", "-l", str(ready / "cache/wandb")], check=True)
    assert seconds_of(said) - seconds_of(undisturbed) < tolerated(seconds_of(undisturbed))
    assert results(ready) == expected
    assert len(warnings_in(said)) <= 1
    wait_until(lambda: not processes_of_wandb(ready / "cache"))


def _is_written(cache: Path) -> bool:
    """Whether W&B's own process has begun to write the run."""
    return any(path.stat().st_size > 0 for path in cache.glob("wandb/*run-*/*.wandb"))


LONG = {"train.epochs": 12, "runtime.checkpoint_steps": 5, "runtime.checkpoint_seconds": None, "wandb.mode": "offline"}


@pytest.mark.slow
def test_a_killed_run_goes_on_as_a_run_that_holds_the_whole_history(ready: Path, stage: Callable[..., str]) -> None:
    set_params(ready / "params.yaml", LONG | {"train.epochs": 60})
    process = start(ready, sys.executable, "-m", "stages.train", environment=clean_environment(ready))
    wait_until(lambda: step_reached(ready) >= 14 and _is_written(ready / "cache"), poll=0.002)
    process.kill()
    process.communicate(timeout=PATIENCE)  # ends when the mirror's process does, which has the same stderr
    wait_until(lambda: not processes_of_wandb(ready / "cache"))
    said = stage("train")
    assert "goes on after step" in said
    killed, whole = runs(ready / "cache")
    assert mirrored(whole) == recorded(ready)
    assert killed.facts.run_group == whole.facts.run_group
    assert killed.exit_code != 0
    assert len(whole.history) > len(killed.history)


@pytest.mark.parametrize("mode", [pytest.param("offline", marks=pytest.mark.slow), "online"])
def test_a_signal_ends_a_mirrored_run_in_time(mode: str, ready: Path) -> None:
    set_params(ready / "params.yaml", LONG | {"train.epochs": 200, "runtime.checkpoint_steps": None})
    with bad_server("hangs") as address:
        environment = {"WANDB_BASE_URL": address, "WANDB_API_KEY": KEY, "WANDB_MODE": mode}
        process = start(ready, sys.executable, "-m", "stages.train", environment=clean_environment(ready) | environment)
        wait_until(lambda: step_reached(ready) >= 6)
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=PATIENCE)
        seconds = time.monotonic() - begin
    assert process.returncode == 128 + signal.SIGTERM, output
    assert seconds < PROMISED, output
    assert list((ready / "cache/checkpoints").glob("*/step-*.pt"))
    assert "Traceback" not in output
    wait_until(lambda: not processes_of_wandb(ready / "cache"))


def test_a_process_that_hangs_is_ended_and_leaves_nothing(ready: Path, capfd: pytest.CaptureFixture[str]) -> None:
    params = load_params(train.Params)
    wandb = params.wandb.model_copy(update={"mode": "offline", "timeout": 10})  # a busy machine is slow to begin
    with open_mirror("train", wandb, ready / "cache", params):
        wait_until(lambda: _is_written(ready / "cache"))
        living = [one for one in psutil.Process().children() if one.status() != psutil.STATUS_ZOMBIE]
        if not (found := [one for one in living if "mirror_process" in " ".join(one.cmdline())]):
            pytest.skip("W&B gave up by itself: this machine is too busy for it")
        (process,) = found
        processes = [process, *process.children(recursive=True)]
        for one in processes:
            with suppress(psutil.NoSuchProcess):  # wandb asks git now and then
                one.suspend()
        assert any(Path(os.environ["TMPDIR"]).glob("driftline-wandb-*"))
        begun = time.monotonic()
    assert time.monotonic() - begun < wandb.timeout + 2
    assert "wandb: warning: W&B's process did not end in time and was ended" in capfd.readouterr().err
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive
    assert not left_over()


def test_where_the_process_cannot_be_started_nothing_is_mirrored(
    ready: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    params = load_params(train.Params)
    wandb = params.wandb.model_copy(update={"mode": "offline"})
    for place, name, value in ((tempfile, "tempdir", str(ready / "nowhere")), (sys, "executable", "nowhere/python")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, value)
            with open_mirror("train", wandb, ready / "cache", params) as mirror:
                mirror.log(1, {"loss": 1.0})
        (warning,) = warnings_in(capfd.readouterr().err)
        assert "nowhere" in warning
        assert warning.endswith("; this run is not mirrored")
        assert not left_over()


@pytest.mark.slow
def test_two_processes_make_one_run(ready: Path, stage: Callable[..., str]) -> None:
    set_params(ready / "params.yaml", {"runtime.processes": 2, "wandb.mode": "offline"})
    stage("train")
    (one,) = runs(ready / "cache")
    assert mirrored(one) == recorded(ready)


@pytest.mark.parametrize(("overrides", "environment", "message"), [
    ({}, "onlin", r"wandb\.mode: the environment's WANDB_MODE is 'onlin' \(valid: disabled, offline, online\)"),
    ({"wandb.mode": "of"}, "", r"wandb\.mode: 'of' is refused: .*'disabled', 'offline' or 'online'"),
    ({"wandb.timeout": 0}, "", r"wandb\.timeout: 0 is refused"),
    ({"wandb.project": "a/b"}, "", r"wandb\.project: 'a/b' is refused"),
])  # fmt: skip
def test_wrong_params_are_refused(
    overrides: dict[str, object], environment: str, message: str, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_params(workspace / "params.yaml", overrides)
    monkeypatch.setenv("WANDB_MODE", environment)
    with pytest.raises(InputError, match=message):
        load_params(train.Params)


def test_our_code_does_not_import_wandb_into_a_stage(ready: Path) -> None:
    """(timm does, where it is installed, but only looks whether it is there.)"""
    modules = "stages.train, stages.evaluate, stages.drift, stages.core.mirror, stages.core.tracking"
    code = f"import sys, {modules}; assert 'wandb' not in sys.modules and 'requests' not in stages.core.mirror.__dict__"
    run(ready, sys.executable, "-c", code, environment={"PYTHONPATH": str(ROOT)})


def test_toggling_reruns_nothing(repository: Path) -> None:
    for mode in ("offline", "online", "disabled"):
        set_params(repository / "params.yaml", {"wandb.mode": mode, "wandb.timeout": 2})
        assert json.loads(run(repository, "dvc", "status", "--json").stdout) == {}


@pytest.mark.slow
def test_an_experiment_is_named_in_its_runs(repository: Path) -> None:
    """In a folder of its own, as queue workers do it; the key is found in the repository's .env."""
    cache = Path(re.search(r"cache_dir: (\S+)", (repository / "params.yaml").read_text())[1])  # type: ignore[index]
    known = run_folders(cache)
    (repository / ".env").write_text(f"WANDB_API_KEY={KEY}\n")
    with bad_server("401") as address:
        environment = {"WANDB_MODE": "online", "WANDB_BASE_URL": address, "HOME": os.environ["HOME"]}
        settings = ("-S", "train.lr=0.005", "-S", "train.epochs=30", "-S", "wandb.timeout=120", "--name", "slower")
        said = run(repository, "dvc", "exp", "run", "--temp", *settings, "evaluate", environment=environment)
    head = run(repository, "git", "rev-parse", "HEAD").stdout.strip()
    new = [read_run(folder) for folder in run_folders(cache) if folder not in known]
    assert [one.facts.job_type for one in new] == ["train", "evaluate"]
    assert "refuses the key" in said.stdout + said.stderr
    for one in new:
        assert one.config["dvc"]["experiment"] == "slower"
        assert one.config["dvc"]["baseline"] == head
        assert re.fullmatch(r"[0-9a-f]{40}", one.config["git"]["revision"])
        assert "slower" in one.facts.tags
        assert one.facts.display_name == f"{one.facts.job_type} slower"
    assert len({one.facts.run_group for one in new}) == 1
