"""Progress outside a terminal: lines now and then, and what passes through stays the same."""

from __future__ import annotations

import pytest

from stages.core import progress as module
from stages.core.progress import progress


def test_short_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress(range(100), "some", 100)) == list(range(100))
    assert capsys.readouterr() == ("", "")


def test_long_work_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    assert list(progress("abcd", "pack", 4, scale=32)) == list("abcd")
    said = capsys.readouterr()
    assert said.out == "", "it may be what somebody reads by machine"
    assert said.err.splitlines() == [
        "pack: 64 of 128, 1.6 img/s, 40 s left",
        "pack: 128 of 128, 1.6 img/s, 0 s left",
    ]
