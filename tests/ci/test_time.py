"""A run of CI that has no time left begins no test, and says so."""

from __future__ import annotations

import sys
import time

import pytest

from tests.helpers import ROOT, run


@pytest.mark.parametrize(("seconds", "outcome"), [(-1, "1 skipped"), (600, "1 passed")])
def test_nothing_begins_after_the_time_for_tests(seconds: int, outcome: str) -> None:
    words = ["-n0", "-p", "no:cacheprovider", "tests/test_docs.py", "-k", "make_help"]
    until = {"CI_TESTS_UNTIL": str(time.time() + seconds)}
    result = run(ROOT, sys.executable, "-m", "pytest", *words, environment=until)
    assert outcome in result.stdout, result.stdout
