"""tools/github.py against a stand-in of GitHub's API, over real HTTP."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.ci.github_api import Repository
from tests.helpers import ROOT

REPORT = "<!-- driftline-report -->\n## better\nby @somebody\n"


@pytest.fixture
def page(tmp_path: Path) -> Path:
    file = tmp_path / "report.md"
    file.write_text(REPORT)
    return file


def call(github: Repository, *words: object, **env: str) -> subprocess.CompletedProcess[str]:
    """As a step does: with no virtual environment and no site packages."""
    return subprocess.run(
        [sys.executable, "-S", "-m", "tools.github", *map(str, words)],
        cwd=ROOT,
        env={**github.environment, "PATH": "/usr/bin:/bin", **env},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_comment_replaces_the_last_one_and_mentions_nobody(github: Repository, page: Path) -> None:
    github.pulls = [{"number": 7, "head": {"sha": "abc"}}]
    others = [{"id": n + 1, "issue": 7, "user": {"type": "User"}, "body": REPORT} for n in range(130)]
    github.comments = list(others)
    words = ("comment", page, "--pull", 7, "--head", "abc")
    assert call(github, *words).returncode == 0
    assert "@\u200bsomebody" in github.comments[-1]["body"]
    page.write_text(REPORT.replace("better", "worse"))
    assert call(github, *words).returncode == 0
    assert len(github.comments) == 131  # a person's comment is left alone, whatever it begins with
    assert "worse" in github.comments[-1]["body"]
    assert github.comments[:130] == others


def test_issues_that_are_switched_off_are_said_to_be(github: Repository, tmp_path: Path) -> None:
    """A fork has none until somebody switches them on."""
    github.failures = [410]
    (tmp_path / "verdict.md").write_text("harmful\n")
    result = call(github, "issue", tmp_path / "verdict.md", "--title", "t", "--label", "drift", "--key", "b")
    assert result.returncode == 2
    assert "switch Issues on (Settings, General, Features)" in result.stderr


def test_a_report_of_another_commit_is_not_posted(github: Repository, page: Path) -> None:
    """The number of the pull request comes from a run on somebody else's code: it may name any pull request."""
    github.pulls = [{"number": 7, "head": {"sha": "abc"}}]
    result = call(github, "comment", page, "--pull", 7, "--head", "def")
    assert (result.returncode, "nothing posted" in result.stdout) == (0, True)
    assert not github.comments


def test_a_page_that_is_none_is_refused(github: Repository, tmp_path: Path) -> None:
    github.pulls = [{"number": 7, "head": {"sha": "abc"}}]
    (tmp_path / "x.md").write_text("buy here\n")
    result = call(github, "comment", tmp_path / "x.md", "--pull", 7, "--head", "abc")
    assert (result.returncode, "no marker" in result.stderr) == (2, True)
    assert call(github, "comment", tmp_path / "y.md", "--pull", 7, "--head", "abc").returncode == 2


def test_a_long_page_is_cut(github: Repository, page: Path) -> None:
    github.pulls = [{"number": 7, "head": {"sha": "abc"}}]
    page.write_text(REPORT + "@" * 70_000)
    assert call(github, "comment", page, "--pull", 7, "--head", "abc").returncode == 0
    assert len(github.comments[0]["body"]) == 65_000


def test_an_issue_is_filed_once_for_a_key(github: Repository, page: Path, tmp_path: Path) -> None:
    github.issues = [{"number": 1, "state": "open", "labels": ["drift"], "body": None}]  # somebody's own
    output = tmp_path / "output"

    def report(key: str) -> str:
        output.write_text("")
        words = ("issue", page, "--title", "Drift", "--label", "drift", "--key", key)
        result = call(github, *words, GITHUB_OUTPUT=str(output))
        assert result.returncode == 0, result.stderr
        return output.read_text()

    assert report("monday") == "number=101\nnew=true\nstarted=false\n"
    assert report("monday") == "number=101\nnew=false\nstarted=false\n"
    assert report("tuesday") == "number=101\nnew=true\nstarted=false\n"
    assert report("tuesday") == "number=101\nnew=false\nstarted=false\n"
    assert (len(github.issues), len(github.comments)) == (2, 1)
    github.issues[1]["state"] = "closed"
    assert report("monday") == report("tuesday") == "number=101\nnew=false\nstarted=false\n", "and it stays closed"
    assert "new=true" in report("wednesday")
    assert len(github.issues) == 3
    assert len(github.comments) == 1


def test_what_could_not_be_started_is_started_later_and_once(github: Repository, page: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"

    def started() -> str:
        words = ("issue", page, "--title", "Drift", "--label", "drift", "--key", "monday")
        assert call(github, *words, GITHUB_OUTPUT=str(output)).returncode == 0
        return output.read_text().splitlines()[-1]

    start = ("dispatch", "train.yml", "batch=monday", "--issue", "100", "--key", "monday")
    assert started() == "started=false"
    github.failures = [502]
    assert call(github, *start).returncode == 1
    assert started() == "started=false", "the issue is there, the retraining is not"
    assert call(github, *start).returncode == 0
    assert started() == "started=true"
    assert len(github.dispatches) == 1
    assert call(github, *start[:-2]).returncode == 2


def test_a_pull_request_is_opened_once(github: Repository, page: Path) -> None:
    words = ("pull-request", page, "--branch", "experiment/slower", "--title")
    assert "is open" in call(github, *words, "One").stdout
    assert "up to date" in call(github, *words, "Two").stdout
    assert [(each["title"], each["base"]) for each in github.pulls] == [("Two", "main")]


def test_a_workflow_is_started(github: Repository) -> None:
    assert call(github, "dispatch", "train.yml", "batch=a=b", "--ref", "other").returncode == 0
    assert github.dispatches == [{"workflow": "train.yml", "ref": "other", "inputs": {"batch": "a=b"}}]
    assert call(github, "dispatch", "train.yml", "batch").returncode == 2


def test_a_lost_answer_is_asked_for_again_but_nothing_is_posted_twice(github: Repository, page: Path) -> None:
    github.pulls = [{"number": 7, "head": {"sha": "abc"}}]
    words = ("comment", page, "--pull", 7, "--head", "abc")
    github.failures = [502]
    assert call(github, *words).returncode == 0
    assert len(github.comments) == 1
    before = github.calls
    github.failures = [503]
    result = call(github, "dispatch", "train.yml")
    assert (result.returncode, "run the job again" in result.stderr) == (1, True)
    assert github.calls == before + 1


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"GITHUB_TOKEN": ""}, "GITHUB_TOKEN is not set"),
        ({"GITHUB_TOKEN": "another"}, "does the job have the permission"),
        ({"GITHUB_REPOSITORY": ""}, "GITHUB_REPOSITORY is not set"),
    ],
)
def test_a_mistake_ends_in_one_line(github: Repository, env: dict[str, str], says: str) -> None:
    result = call(github, "dispatch", "train.yml", **env)
    assert result.returncode == 2
    assert says in result.stderr
    assert len(result.stderr.splitlines()) == 1
