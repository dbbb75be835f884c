"""The workflows: what they may do, and every step's commands executed for real, with real git, dvc and HTTP.

The steps run in a tiny repository whose pipeline has run, cloned from a bare one as a runner clones. Where the tests or
the image would be run whole, the commands are those of .ci/run or tests/docker/test_make.py, and are looked up there.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.ci.github_api import Repository
from tests.ci.workflows import WORKFLOWS, Runner, all_steps, read, run_steps, step
from tests.helpers import ROOT, run

# Steps whose commands are run whole elsewhere, and where.
ELSEWHERE = {
    ("ci", "Style, format, types"): ".ci/run",
    ("ci", "Tests"): ".ci/run",
    ("image", "Pull data and models"): "tests/docker/test_make.py",
    ("image", "The pipeline in the container"): "tests/docker/test_make.py",
    ("image", "The tests in the container"): "tests/docker/test_make.py",
}
HERE = {
    *(("ci", name) for name in ("Set up", "The pipeline on the generated sample", "Nothing is left to do", "Report")),
    ("report", "Comment"),
    *(("image", name) for name in ("Look for a remote", "Name")),
    *(("train", name) for name in ("Set up", "Pull data and models", "Train", "Push data and models")),
    *(("train", name) for name in ("Push the branch", "Open the pull request")),
    *(("monitor", name) for name in ("Set up", "Pull data and models", "Make what the remote lacks")),
    *(("monitor", name) for name in ("Judge the newest batch", "File an issue", "Start a retraining")),
}


def test_every_step_is_executed() -> None:
    assert {(each.workflow, each.name) for each in run_steps()} == HERE | ELSEWHERE.keys()
    executed = Path(__file__).read_text()
    for workflow, name in HERE:
        assert f'step("{workflow}", "{name}")' in executed
    for (workflow, name), file in ELSEWHERE.items():
        assert step(workflow, name).run.strip() in (ROOT / file).read_text()


def test_actions_are_pinned_by_commit_with_their_version() -> None:
    for path in WORKFLOWS:
        for line in path.read_text().splitlines():
            if "uses:" in line:
                assert re.search(r"uses: [\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line), line


def test_one_action_has_one_version() -> None:
    pins = {each["uses"] for *_, each in all_steps() if "uses" in each}
    assert len(pins) == len({pin.partition("@")[0] for pin in pins})


def test_permissions_are_given_to_jobs_one_by_one() -> None:
    for path in WORKFLOWS:
        workflow = read(path)
        assert workflow["permissions"] == {}
        assert all(job["permissions"] for job in workflow["jobs"].values())


def test_what_runs_the_code_of_forks_has_no_secret_and_cannot_write() -> None:
    workflow = read(ROOT / ".github/workflows/ci.yml")
    assert "secrets." not in (ROOT / ".github/workflows/ci.yml").read_text()
    assert all(job["permissions"] == {"contents": "read"} for job in workflow["jobs"].values())
    image = read(ROOT / ".github/workflows/image.yml")["jobs"]
    assert image["check"]["permissions"] == {"contents": "read"}
    assert image["push"]["if"] == "startsWith(github.ref, 'refs/tags/v')"


def test_what_writes_on_pull_requests_checks_out_no_code_of_theirs() -> None:
    (job,) = read(ROOT / ".github/workflows/report.yml")["jobs"].values()
    (checkout,) = [each for each in job["steps"] if each.get("uses", "").startswith("actions/checkout@")]
    assert checkout["with"] == {"persist-credentials": False}  # no `ref`: the default branch


def test_a_secret_reaches_the_steps_that_move_data_only() -> None:
    for workflow, _, each in all_steps():
        if "secrets." in json.dumps(each):
            assert each["name"] in ("Pull data and models", "Push data and models"), (workflow, each["name"])


# --- the steps -----------------------------------------------------------------------------------------------------


@pytest.fixture
def make_runner(repository: Path, tmp_path: Path) -> Callable[[], Runner]:
    """A clone of a bare repository, data in a remote. Its dvc cache starts empty, as a runner's does."""
    run(repository, "git", "switch", "-q", "-C", "main")
    run(repository, "dvc", "remote", "add", "--default", "local", str(tmp_path / "remote"))
    run(repository, "git", "commit", "-qam", "Remote")
    run(repository, "dvc", "push", "-q")
    run(tmp_path, "git", "clone", "-q", "--bare", str(repository), "origin.git")

    def make() -> Runner:
        folder = tmp_path / f"run-{len(list(tmp_path.glob('run-*')))}"
        (folder / "temporary").mkdir(parents=True)
        run(folder, "git", "clone", "-q", str(tmp_path / "origin.git"), "checkout")
        return Runner(folder / "checkout", folder / "temporary")

    return make


@pytest.mark.slow
def test_ci(make_runner: Callable[[], Runner], github: Repository) -> None:
    runner = make_runner()
    runner.execute(step("ci", "Set up"))
    runner.execute(step("ci", "The pipeline on the generated sample"))
    runner.execute(step("ci", "Nothing is left to do"))
    (runner.checkout / "params.yaml").write_text(
        (runner.checkout / "params.yaml").read_text().replace("num_bins: 15", "num_bins: 5")
    )
    assert runner.attempt(step("ci", "Nothing is left to do")).returncode == 1
    base = run(runner.checkout, "git", "rev-parse", "HEAD~1").stdout.strip()
    runner.execute(step("ci", "Report"), BASE=base, NUMBER="7")
    assert base[:7] in runner.summary

    # The other workflow: the artifact's files, in another checkout.
    other = make_runner()
    shutil.copytree(runner.checkout / "report", other.temporary / "report")
    github.pulls = [{"number": 7, "head": {"sha": "abc"}}]
    other.execute(step("report", "Comment"), HEAD="abc", **github.environment)
    (comment,) = github.comments
    assert comment["issue"] == 7
    assert comment["body"].startswith("<!-- driftline-report -->")
    (other.temporary / "report/number").write_text("7; touch /tmp/x")
    assert other.attempt(step("report", "Comment"), HEAD="abc", **github.environment).returncode == 2


def test_a_push_has_a_report_too(make_runner: Callable[[], Runner]) -> None:
    runner = make_runner()
    runner.execute(step("ci", "Set up"))
    runner.execute(step("ci", "Report"), BASE="", NUMBER="")
    assert not (runner.checkout / "report/number").exists()
    assert "driftline-report" in runner.summary


@pytest.mark.slow
def test_an_experiment_becomes_a_pull_request(
    make_runner: Callable[[], Runner], github: Repository, tmp_path: Path
) -> None:
    runner = make_runner()
    runner.execute(step("train", "Set up"))
    shutil.move(tmp_path / "remote", tmp_path / "away")
    (tmp_path / "remote").mkdir()
    empty = runner.execute(step("train", "Pull data and models"), GDRIVE_CREDENTIALS_DATA="")
    assert "what the remote lacks is made here" in empty.stdout
    (tmp_path / "remote").rmdir()
    shutil.move(tmp_path / "away", tmp_path / "remote")
    runner.execute(step("train", "Pull data and models"), GDRIVE_CREDENTIALS_DATA="")
    assert (runner.checkout / "models/classifier/model.json").exists()
    inputs = {
        "BATCH": "",
        "BATCHES": "",
        "LABELS": "",
        "NAME": "slower",
        "OVERRIDES": " train.lr=0.001\n",
        "RECIPE": "",
    }
    runner.execute(step("train", "Train"), **inputs)
    assert runner.outputs == {"branch": "experiment/slower"}
    runner.execute(step("train", "Push data and models"), GDRIVE_CREDENTIALS_DATA="")
    assert runner.outputs["done"] == "true"
    runner.execute(step("train", "Push the branch"), BRANCH="experiment/slower", GITHUB_TOKEN="token")
    more = {"BASE": "main", "BRANCH": "experiment/slower"}
    runner.execute(step("train", "Open the pull request"), **more, **github.environment)
    (pull,) = github.pulls
    assert (pull["head"], pull["base"]) == ("experiment/slower", "main")
    assert "train.lr" in pull["body"]

    # Another run of the same name: its branch takes the place of the first one's, whose model is the same here.
    newer = run(runner.checkout, "git", "commit-tree", "experiment/slower^{tree}", "-p", "main", "-m", "Again").stdout
    run(runner.checkout, "git", "branch", "--force", "experiment/slower", newer.strip())
    runner.execute(step("train", "Push the branch"), BRANCH="experiment/slower", GITHUB_TOKEN="token")
    assert newer.strip() in run(runner.checkout, "git", "ls-remote", "origin", "experiment/slower").stdout

    # Somebody who checks the branch out gets that model, and has nothing to run.
    other = make_runner()
    other.execute(step("train", "Set up"))
    run(other.checkout, "git", "switch", "-q", "experiment/slower")
    assert "lr: 0.001" in (other.checkout / "params.yaml").read_text()
    other.execute(step("train", "Pull data and models"), GDRIVE_CREDENTIALS_DATA="")
    assert "Stage 'train' didn't change" in run(other.checkout, "dvc", "repro", "drift").stdout
    # The same again: nothing differs from the branch, and no pull request is asked for.
    again = other.execute(step("train", "Train"), **{**inputs, "NAME": "same"})
    assert "nothing differs" in again.stdout
    assert other.outputs == {}

    # Once more under a name that has run on this runner; checkout removes branches only.
    run(runner.checkout, "git", "branch", "--delete", "--force", "experiment/slower")
    runner.execute(step("train", "Train"), **{**inputs, "OVERRIDES": "train.lr=0.002"})
    shown = run(runner.checkout, "git", "show", "experiment/slower:params.yaml").stdout
    assert "lr: 0.002" in shown


def test_inputs_are_data(make_runner: Callable[[], Runner]) -> None:
    runner = make_runner()
    runner.execute(step("train", "Set up"))
    nothing = dict.fromkeys(("BATCH", "BATCHES", "LABELS", "NAME", "OVERRIDES", "RECIPE"), "")
    for inputs, says in (
        ({"OVERRIDES": "train.lr=0.1 --queue"}, "override '--queue' is not section.key=value"),
        ({"OVERRIDES": "train.lr=0.1; touch pwned"}, "override 'touch' is not"),
        ({"OVERRIDES": "train.lr=$(touch${IFS}pwned)"}, "train.lr"),
        ({"OVERRIDES": "train.learning=1"}, "train.learning"),
        ({"NAME": "../x"}, "small letters, digits and dashes"),
        ({"RECIPE": "gpu --force"}, "names in recipes/"),
        ({"OVERRIDES": "train.lr=0.01,0.02"}, "one value for each key"),
        ({"BATCH": "b", "OVERRIDES": "train.lr=0.01"}, "leave overrides and recipe empty"),
        ({"BATCH": "b", "RECIPE": "fast"}, "leave overrides and recipe empty"),
    ):
        result = runner.attempt(step("train", "Train"), **{**nothing, **inputs})
        assert result.returncode == 2, result.stderr
        assert says in result.stderr
        assert not (runner.checkout / "pwned").exists()
        assert runner.outputs == {}


def test_drift_is_filed_once_and_starts_a_retraining(
    make_runner: Callable[[], Runner], github: Repository, tmp_path: Path
) -> None:
    runner = make_runner()
    runner.execute(step("monitor", "Set up"))
    runner.execute(step("monitor", "Pull data and models"), GDRIVE_CREDENTIALS_DATA="")
    made = runner.execute(step("monitor", "Make what the remote lacks")).stdout
    assert "Running stage 'preprocess'" in made
    assert "Stage 'train' didn't change" in made
    batches = tmp_path / "batches"
    clean = np.load(runner.checkout / "data/processed/val_images.npy")
    write_batch(batches / "2026-11-24", clean)
    write_batch(batches / "2026-11-25", 255 - clean // 8)

    def judge() -> dict[str, str]:
        runner.execute(step("monitor", "Judge the newest batch"), BATCHES=str(batches))
        return runner.outputs

    assert judge() == {"batch": "2026-11-25", "verdict": "harmful"}
    assert "2026-11-25: harmful" in runner.summary
    assert (runner.checkout / "monitor/monitor.html").stat().st_size > 10_000
    for new in ("true", "false"):
        runner.execute(step("monitor", "File an issue"), BATCH="2026-11-25", **github.environment)
        assert (runner.outputs["new"], runner.outputs["started"]) == (new, "false")
    start = {"BATCH": "2026-11-25", "BRANCH": "main", "ISSUE": runner.outputs["number"]}
    runner.execute(step("monitor", "Start a retraining"), **start, **github.environment)
    runner.execute(step("monitor", "File an issue"), BATCH="2026-11-25", **github.environment)
    assert (runner.outputs["new"], runner.outputs["started"]) == ("false", "true")
    (issue,) = github.issues
    assert "estimated accuracy" in issue["body"]
    (dispatch,) = github.dispatches
    assert dispatch["inputs"] == {"batch": "2026-11-25", "name": "retrain-77"}
    assert (
        dispatch["inputs"].keys()
        <= read(ROOT / ".github/workflows/train.yml")["on"]["workflow_dispatch"]["inputs"].keys()
    )
    (batches / "2026-11-25").rename(batches / "2026-11-23")
    assert judge()["verdict"] == "ok"


def test_a_retraining_runs_on_the_batch(make_runner: Callable[[], Runner], repository: Path, tmp_path: Path) -> None:
    """What comes of it is the model's affair (tests/tools/test_retrain.py); here it is asked on the right images."""
    runner = make_runner()
    runner.execute(step("train", "Set up"))
    runner.execute(step("train", "Pull data and models"), GDRIVE_CREDENTIALS_DATA="")
    # A lock of another kind of CPU: what is made here differs.
    lock = runner.checkout / "dvc.lock"
    lock.write_text(
        re.sub(r"(path: metrics/evaluate.json\n\s+hash: md5\n\s+md5: )\w+", r"\g<1>" + "f" * 32, lock.read_text())
    )
    run(runner.checkout, "git", "commit", "--quiet", "--all", "--message", "Made elsewhere")
    clean = np.load(repository / "data/processed/val_images.npy")
    write_batch(tmp_path / "batches/monday", clean)
    for number, name in enumerate(json.loads((repository / "data/processed/meta.json").read_text())["class_ids"]):
        write_batch(tmp_path / "labels/monday" / name, clean[4 * number : 4 * number + 4])
    inputs = {"BATCH": "monday", "BATCHES": str(tmp_path / "batches"), "LABELS": str(tmp_path / "labels")}
    result = runner.execute(step("train", "Train"), **inputs, NAME="", OVERRIDES="", RECIPE="")
    assert "nothing to do: no drift" in result.stdout
    assert "nothing differs" in result.stdout
    assert run(runner.checkout, "git", "log", "-1", "--format=%s").stdout.strip() == "Results of this runner"
    (runner.checkout / "tools/retrain/__main__.py").write_text("raise OSError('the disk is full')")
    broken = runner.attempt(step("train", "Train"), **inputs, NAME="", OVERRIDES="", RECIPE="")
    assert (broken.returncode, "nothing differs" in broken.stdout) == (1, False), "status 1 is not only: not promoted"
    inputs["BATCH"] = "../monday"
    result = runner.attempt(step("train", "Train"), **inputs, NAME="", OVERRIDES="", RECIPE="")
    assert (result.returncode, "is no name of a batch" in result.stderr) == (2, True)


@pytest.mark.parametrize(("key", "asked"), [("", False), ("not a key", True)])
def test_google_drive_is_asked_where_there_is_a_key(make_runner: Callable[[], Runner], key: str, asked: bool) -> None:
    runner = make_runner()
    runner.execute(step("train", "Set up"))
    run(runner.checkout, "dvc", "remote", "add", "--default", "drive", "gdrive://folder")
    run(runner.checkout, "dvc", "remote", "modify", "drive", "gdrive_use_service_account", "true")
    result = runner.attempt(step("train", "Pull data and models"), GDRIVE_CREDENTIALS_DATA=key)
    assert ("is not set" in result.stdout) == (not asked)
    assert result.returncode == (2 if asked else 0)
    assert "not a key" not in result.stdout + result.stderr


def test_the_image_pulls_where_there_is_a_default_remote(make_runner: Callable[[], Runner]) -> None:
    runner = make_runner()
    runner.execute(step("image", "Look for a remote"))
    assert runner.outputs == {"name": "local"}
    run(runner.checkout, "dvc", "config", "--unset", "core.remote")
    runner.execute(step("image", "Look for a remote"))
    assert runner.outputs == {"name": ""}
    (pull,) = [each for *_, each in all_steps() if each.get("run", "").startswith("make docker-pull")]
    assert pull["if"] == "env.HAS_KEY == 'true' && steps.remote.outputs.name != ''"


def test_the_name_of_the_image_has_small_letters(make_runner: Callable[[], Runner]) -> None:
    runner = make_runner()
    runner.execute(step("image", "Name"), GITHUB_REF_NAME="v1.2.0")
    assert runner.outputs == {"name": "ghcr.io/owner/driftline:v1.2.0"}


def write_batch(folder: Path, images: np.ndarray) -> None:
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number}.png")
