"""What the workflows ask of GitHub: a comment on a pull request, an issue filed once, a pull request, a run.

    python3 -m tools.github comment report.md --pull 7 --head SHA
    python3 -m tools.github issue drift.md --title "Harmful drift" --label drift --key 2026-11-25.tgz
    python3 -m tools.github pull-request report.md --branch experiment/slower --title "Experiment slower"
    python3 -m tools.github dispatch train.yml batch=2026-11-25.tgz --issue 7 --key 2026-11-25.tgz

GITHUB_REPOSITORY, GITHUB_TOKEN and GITHUB_API_URL are what GitHub Actions gives a step. Only Python's standard library
is used, so the step needs no virtual environment. Results for later steps (`number`, `new`, `started`) go to
GITHUB_OUTPUT.

Exit status: 0 done, or nothing to do; 1 GitHub did not answer; 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from stages.core.errors import InputError, run_main

_LONGEST = 65_000  # characters of a comment; GitHub takes 65,536
_PAGE = 100
_TIMEOUT = 30  # seconds
_TRIES = 3
_MARKER = re.compile(r"<!-- [\w-]+ -->")
_ISSUE_MARKER = "<!-- driftline-drift -->"


class GitHub:
    """The API of one repository."""

    def __init__(self) -> None:
        self._address = urlsplit(os.environ.get("GITHUB_API_URL") or "https://api.github.com")
        self.repository = _from_environment("GITHUB_REPOSITORY")
        self._token = _from_environment("GITHUB_TOKEN")

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The answer's JSON, None where it is empty. ConnectionError after several tries, InputError when refused.

        A POST is not tried again: the first may have done its work.
        """
        tries = 1 if method == "POST" else _TRIES
        for left in reversed(range(tries)):
            try:
                status, content = self._once(method, path, body)
            except (OSError, HTTPException) as error:
                status, content = 599, str(error).encode()
            if status < 500 or not left:
                break
            time.sleep(2 * (tries - left) - 1)
        words = content.decode(errors="replace")
        if status >= 500:
            raise ConnectionError(
                f"{method} {path}: GitHub does not answer ({status}: {words[:200]}); run the job again"
            )
        if status == 410 and "/issues" in path:
            raise InputError(f"{method} {path}: switch Issues on (Settings, General, Features): {words[:200]}")
        if status >= 300:
            raise InputError(
                f"{method} {path}: GitHub refuses it ({status}: {words[:200]}); does the job have the permission?"
            )
        return json.loads(words) if words else None

    def pages(self, path: str) -> Iterator[dict[str, Any]]:
        """All items of a list, from page to page."""
        joint = "&" if "?" in path else "?"
        number = 0
        while True:
            number += 1
            items = self.call("GET", f"{path}{joint}per_page={_PAGE}&page={number}")
            yield from items
            if len(items) < _PAGE:
                return

    def _once(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, bytes]:
        kind = HTTPSConnection if self._address.scheme == "https" else HTTPConnection
        connection = kind(self._address.netloc, timeout=_TIMEOUT)
        headers = {
            "Accept": "application/vnd.github+json",
            "Authorization": f"Bearer {self._token}",
            "Content-Type": "application/json",
            "User-Agent": "driftline",
            "X-GitHub-Api-Version": "2022-11-28",
        }
        try:
            url = f"{self._address.path.rstrip('/')}/repos/{self.repository}{path}"
            connection.request(method, url, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


def comment(github: GitHub, file: Path, pull: int, head: str) -> None:
    """Write a page onto a pull request, over the one that is there.

    The page and the number come from a run on somebody else's code: nothing is posted unless that run's commit is the
    head of the pull request, and the page mentions nobody.
    """
    page = file.read_text(encoding="utf-8")[:_LONGEST].replace("@", "@\u200b")[:_LONGEST]
    marker = page.partition("\n")[0].strip()
    if not _MARKER.fullmatch(marker):
        raise InputError(f"{file}: its first line is no marker such as <!-- driftline-report -->")
    if github.call("GET", f"/pulls/{pull}")["head"]["sha"] != head:
        print(f"github: pull request {pull} is at another commit by now; nothing posted")
        return
    for there in github.pages(f"/issues/{pull}/comments"):
        if there["user"]["type"] == "Bot" and there["body"].startswith(marker):
            github.call("PATCH", f"/issues/comments/{there['id']}", {"body": page})
            print(f"github: the comment on pull request {pull} is replaced")
            return
    github.call("POST", f"/issues/{pull}/comments", {"body": page})
    print(f"github: commented on pull request {pull}")


def issue(github: GitHub, file: Path, title: str, label: str, key: str) -> None:
    """File an issue, or add to the open one; once for each key, whether the issue that has it is open or closed."""
    if not re.fullmatch(r"[\w.-]+", key):
        raise InputError(f"--key {key!r}: letters, digits, dots, dashes and underscores only")
    body = f"{_ISSUE_MARKER}\n<!-- key: {key} -->\n{file.read_text(encoding='utf-8')[: _LONGEST - 500]}"
    open_one: int | None = None
    for there in github.pages(f"/issues?state=all&labels={quote(label)}"):
        if not (there["body"] or "").startswith(_ISSUE_MARKER):
            continue
        number = there["number"]
        said = [there["body"], *(each["body"] for each in github.pages(f"/issues/{number}/comments"))]
        if any(f"<!-- key: {key} -->" in text for text in said):
            print(f"github: issue {number} knows of {key}")
            started = any(_started(key) in text for text in said)
            return _output(number=number, new="false", started=str(started).lower())
        if there["state"] == "open" and open_one is None:
            open_one = number
    if open_one is not None:
        number = open_one
        github.call("POST", f"/issues/{number}/comments", {"body": body})
        print(f"github: {key} is added to issue {number}")
        return _output(number=number, new="true", started="false")
    made = github.call("POST", "/issues", {"title": title, "body": body, "labels": [label]})
    print(f"github: issue {made['number']} is filed")
    return _output(number=made["number"], new="true", started="false")


def pull_request(github: GitHub, file: Path, branch: str, title: str, base: str) -> None:
    """Open a pull request of a pushed branch, or bring the text of the open one up to date."""
    body = file.read_text(encoding="utf-8")[:_LONGEST]
    owner = github.repository.partition("/")[0]
    there = github.call("GET", f"/pulls?state=open&head={quote(f'{owner}:{branch}')}&base={quote(base)}")
    if there:
        number = there[0]["number"]
        github.call("PATCH", f"/pulls/{number}", {"title": title, "body": body})
        print(f"github: pull request {number} is brought up to date")
    else:
        number = github.call("POST", "/pulls", {"title": title, "body": body, "head": branch, "base": base})["number"]
        print(f"github: pull request {number} is open")
    _output(number=number)


def dispatch(
    github: GitHub, workflow: str, ref: str, words: list[str], issue_number: int | None = None, key: str | None = None
) -> None:
    """Start a workflow with inputs, and say so on an issue, which then tells that it was started for the key."""
    if wrong := [word for word in words if "=" not in word]:
        raise InputError(f"{wrong[0]!r}: an input is NAME=VALUE")
    inputs = dict(word.split("=", 1) for word in words)
    github.call("POST", f"/actions/workflows/{quote(workflow)}/dispatches", {"ref": ref, "inputs": inputs})
    print(f"github: {workflow} is started on {ref}")
    if issue_number is not None:
        body = f"{_started(key or '')}\n`{workflow}` is started on `{ref}`: {', '.join(words)}"
        github.call("POST", f"/issues/{issue_number}/comments", {"body": body})


def _started(key: str) -> str:
    return f"<!-- started: {key} -->"


def _from_environment(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise InputError(f"{name} is not set: this runs in a step of GitHub Actions, with `env: {name}: ...`")
    return value


def _output(**values: object) -> None:
    """Give results to later steps."""
    if path := os.environ.get("GITHUB_OUTPUT"):
        with Path(path).open("a", encoding="utf-8") as file:
            file.writelines(f"{name}={value}\n" for name, value in values.items())


def main(arguments: argparse.Namespace) -> int:
    """Do what is asked for."""
    github = GitHub()
    if "file" in arguments and not arguments.file.is_file():
        raise InputError(f"{arguments.file} is no file")
    if arguments.verb == "comment":
        comment(github, arguments.file, arguments.pull, arguments.head)
    elif arguments.verb == "issue":
        issue(github, arguments.file, arguments.title, arguments.label, arguments.key)
    elif arguments.verb == "pull-request":
        pull_request(github, arguments.file, arguments.branch, arguments.title, arguments.base)
    else:
        if (arguments.issue is None) != (arguments.key is None):
            raise InputError("--issue and --key go together")
        dispatch(github, arguments.workflow, arguments.ref, arguments.inputs, arguments.issue, arguments.key)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.github", description=(__doc__ or "").splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    of_file = argparse.ArgumentParser(add_help=False)
    of_file.add_argument("file", type=Path, metavar="FILE", help="the text, in Markdown")
    verb = verbs.add_parser("comment", parents=[of_file], help="write a page onto a pull request, over the last one")
    verb.add_argument("--pull", type=int, required=True, metavar="N", help="number of the pull request")
    verb.add_argument("--head", required=True, metavar="SHA", help="commit that the page is about")
    verb = verbs.add_parser("issue", parents=[of_file], help="file an issue, or add to the open one")
    verb.add_argument("--title", required=True)
    verb.add_argument("--label", required=True)
    verb.add_argument("--key", required=True, help="what is said once only, such as the name of a batch of images")
    verb = verbs.add_parser("pull-request", parents=[of_file], help="open a pull request of a pushed branch")
    verb.add_argument("--branch", required=True)
    verb.add_argument("--title", required=True)
    verb.add_argument("--base", default="main", help="where it is to be merged (main)")
    verb = verbs.add_parser("dispatch", help="start a workflow")
    verb.add_argument("workflow", metavar="WORKFLOW", help="its file name, such as train.yml")
    verb.add_argument("inputs", nargs="*", metavar="NAME=VALUE")
    verb.add_argument("--ref", default="main", help="branch to run it on (main)")
    verb.add_argument("--issue", type=int, metavar="N", help="issue that is told, which `issue` then knows")
    verb.add_argument("--key", help="what it is started for, as of `issue`")
    return parser


if __name__ == "__main__":
    run_main(lambda: main(_parser().parse_args()), "github")
