"""The lock, the list of its packages, and what is never committed."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.ci.workflows import link_environment
from tests.helpers import ROOT, commit_all, copy_of_checkout, run


def test_every_package_of_the_lock_has_hashes() -> None:
    requirements = (ROOT / "requirements.txt").read_text()
    blocks = re.split(r"^(?=[a-z])", requirements, flags=re.MULTILINE)[1:]
    assert len(blocks) > 100
    for block in blocks:
        assert re.match(r"[a-z0-9.-]+(\[[a-z0-9,-]+\])?==\S+", block), block
        assert "--hash=sha256:" in block, block


def test_the_sbom_has_every_package_and_nothing_of_the_moment(tmp_path: Path) -> None:
    folder = copy_of_checkout(tmp_path)
    link_environment(folder)
    run(folder, "make", "sbom")
    bom = json.loads((folder / "sbom.json").read_text())
    assert not {"serialNumber", "timestamp"} & (bom.keys() | bom["metadata"].keys())
    assert bom["metadata"]["component"]["name"] == "driftline"
    listed = {(each["name"], each.get("version")) for each in bom["components"]}
    locked = set(
        re.findall(r"^([a-z][\w.-]*)(?:\[[^\]]*\])?==([^\s;]+)", (ROOT / "requirements.txt").read_text(), re.M)
    )
    assert locked <= listed


def test_keys_and_what_is_made_are_ignored(tmp_path: Path) -> None:
    folder = copy_of_checkout(tmp_path)
    run(folder, "git", "init", "-q")
    commit_all(folder)
    for name in (
        ".secrets/gdrive-key.json",
        ".env",
        "sbom.json",
        "report/report.md",
        "monitor/words.txt",
        "production/x/1.png",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    assert run(folder, "git", "status", "--short").stdout == ""
