"""What becomes of each case is kept; nothing that a test started may be left running."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults.reliability import RESULTS, case_of, today
from tests.helpers import TINY

_HERE = Path(__file__).parent
_PATIENCE = 15.0  # seconds that processes get to end on their own
_MARK = "DRIFTLINE_FAULTS"  # in the environment of all that the suite starts: the number of its process
_found = pytest.StashKey[dict[str, dict[str, Any]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "case(name, promise): a case of the fault suite, a line of docs/RELIABILITY.md")
    config.addinivalue_line("markers", "faults: the fault suite; make test-faults runs it")
    config.stash[_found] = {}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, None]:
    report = (yield).get_result()
    if _HERE not in item.path.parents:
        return
    result = item.config.stash[_found].setdefault(
        case_of(item).key, {"outcome": "passed", "seconds": 0.0, "measured": "", "day": today()}
    )
    result["seconds"] += report.duration
    if report.failed:
        result["outcome"] = "failed"
    elif report.skipped:
        result["outcome"] = "skipped"
        result["measured"] = str(report.longrepr[2]).removeprefix("Skipped: ")
    for name, value in report.user_properties:
        if name == "measured":
            result["measured"] = value
    cache = getattr(item.config, "cache", None)  # missing with -p no:cacheprovider
    if report.when == "teardown" and cache is not None:  # at once: a run that is cut short keeps what it found
        cache.set(RESULTS, cache.get(RESULTS, {}) | item.config.stash[_found])


@pytest.fixture
def measured(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Call it with what was measured, for the page."""
    return lambda words: record_property("measured", words)


@pytest.fixture(autouse=True)
def no_orphans() -> Iterator[None]:
    """Fail a test that leaves a process of ours behind, and end that process."""
    os.environ[_MARK] = str(os.getpid())
    before = set(_ours())
    yield
    deadline = time.monotonic() + _PATIENCE
    while (left := set(_ours()) - before) and time.monotonic() < deadline:
        time.sleep(0.1)
    told = [_describe(process) for process in left]
    for process in left:
        process.kill()
    assert not told, f"left running: {told}"


def _ours() -> list[psutil.Process]:
    """Processes below this one, and those that lost their parent since: they still have our mark."""
    found = psutil.Process().children(recursive=True)
    for process in psutil.process_iter():
        try:
            if process.ppid() == 1 and process.environ().get(_MARK) == str(os.getpid()):
                found.append(process)
        except psutil.Error:
            continue
    return [process for process in found if _runs(process)]


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running()) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _describe(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return str(process)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Overrides under which a run takes seconds, its downloads and checkpoints in a folder of the session's."""
    return TINY | {"runtime.cache_dir": str(tmp_path_factory.mktemp("cache"))}
