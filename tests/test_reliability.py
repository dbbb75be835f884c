"""docs/RELIABILITY.md lists the cases of the fault suite, all of them and no others, with what they promise."""

from __future__ import annotations

import json

from tests.faults.reliability import GROUPS, PAGE, Case
from tests.helpers import ROOT, run


def test_the_page_lists_the_cases() -> None:
    listed = run(ROOT, "python", "-m", "tests.faults.reliability", "--list").stdout
    cases = [Case(*each) for each in json.loads(listed)]
    assert len(cases) >= 60
    assert len({each.key for each in cases}) == len(cases), "two cases of one name"
    sections = PAGE.read_text(encoding="utf-8").split("\n## ")[1:]
    shown = {
        (section.splitlines()[0], *line.split(" | ", 2)[:2])
        for section in sections
        for line in section.splitlines()
        if line.startswith("| ") and not line.startswith("| case |")
    }
    assert shown == {(GROUPS[each.module], f"| {each.name}", each.promise) for each in cases}
    assert "**broken**" not in PAGE.read_text(encoding="utf-8")
