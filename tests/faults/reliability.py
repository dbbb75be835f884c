"""The cases of the fault suite, and docs/RELIABILITY.md, which is made out of them.

    python -m tests.faults.reliability          write the page from what the last runs of tests/faults found
    python -m tests.faults.reliability --list   the cases as JSON

Every test in tests/faults carries `@case(name, promise)`. A run keeps what became of each in pytest's own cache.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "RELIABILITY.md"
RESULTS = "faults/results"  # in pytest's cache: {"<module>/<name>": Result as a dict}

# The modules of the suite, in the order of the page.
GROUPS = {
    "test_archives": "Archives and folders from strangers",
    "test_images": "Images from strangers",
    "test_parameters": "Mistakes in params.yaml",
    "test_numbers": "Data and numbers that training cannot use",
    "test_surroundings": "Surroundings",
    "test_storage": "Storage",
    "test_processes": "Processes",
    "test_network": "Network",
    "test_load": "Load",
    "test_properties": "Properties, looked for at random",
}

_HEAD = """# Reliability

What happens when something goes wrong: each line is a promise, and a test that does the harm for real (`tests/faults/`:
real dvc, git, processes, file systems). `make test-faults` runs them; `python -m tests.faults.reliability` writes this
page from what they found, and `make test` checks that it lists exactly the cases that there are.

"Refused" means: one message that names the file or key, exit status 2, no traceback, and what was there before stays.
"""


class Case(NamedTuple):
    """A named case: the module that it is in, its name and what is promised."""

    module: str
    name: str
    promise: str

    @property
    def key(self) -> str:
        return f"{self.module}/{self.name}"


def case(name: str, promise: str) -> pytest.MarkDecorator:
    """Name a test of the suite, and say what it holds the product to, in one sentence."""
    return pytest.mark.case(name, promise)


def case_of(item: pytest.Item) -> Case:
    """The case of a collected test; a test without one is an error."""
    marker = item.get_closest_marker("case")
    if marker is None:
        raise pytest.UsageError(f"{item.nodeid}: a test of the fault suite needs @case(name, promise)")
    return Case(item.path.stem, *marker.args)


class _Collector:
    """A plugin that keeps the collected tests."""

    def __init__(self) -> None:
        self.cases: list[Case] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.cases = [case_of(item) for item in session.items]


def collect() -> list[Case]:
    """All cases, in the order of the page. pytest collects: call it in a process of its own."""
    collector = _Collector()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", str(HERE)], plugins=[collector])
    if status != pytest.ExitCode.OK:
        raise RuntimeError(said.getvalue())
    order = list(GROUPS)
    return sorted(collector.cases, key=lambda each: order.index(each.module))


def row(each: Case, result: str) -> str:
    """A case's line of the table."""
    return f"| {each.name} | {each.promise} | {result} |"


def page(cases: Sequence[Case], results: dict[str, Any]) -> str:
    """docs/RELIABILITY.md."""
    found = [results.get(each.key, {"outcome": "not run", "seconds": 0.0, "measured": ""}) for each in cases]
    num_held = sum(result["outcome"] == "passed" for result in found)
    seconds = sum(result["seconds"] for result in found)
    days = sorted({result["day"] for result in found if "day" in result})
    when = " to ".join(dict.fromkeys((days[0], days[-1]))) if days else "never"
    lines = [
        _HEAD,
        f"**{num_held} of {len(cases)} cases hold** ({when}; on {os.cpu_count()} CPU cores without a GPU, their times "
        f"add up to {seconds / 60:.0f} minutes).",
    ]
    for module, title in GROUPS.items():
        some = [(each, result) for each, result in zip(cases, found, strict=True) if each.module == module]
        if some:
            lines += ["", f"## {title}", "", "| case | promise | result |", "|---|---|---|"]
            lines += [row(each, _in_words(result)) for each, result in some]
    return "\n".join(lines) + "\n"


def _in_words(result: dict[str, Any]) -> str:
    words = {"passed": "holds", "failed": "**broken**"}.get(result["outcome"], result["outcome"])
    return f"{words}: {result['measured']}" if result["measured"] else str(words)


def today() -> str:
    return datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()


def main(arguments: Sequence[str]) -> None:
    cases = collect()
    if "--list" in arguments:
        print(json.dumps(cases))
        return
    kept = HERE.parent.parent / ".pytest_cache/v" / RESULTS
    PAGE.write_text(page(cases, json.loads(kept.read_text()) if kept.exists() else {}), encoding="utf-8")
    print(f"{PAGE}: {len(cases)} cases")


if __name__ == "__main__":
    main(sys.argv[1:])
