"""Verbs of the Makefile that no other test calls."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.helpers import ROOT, run


def test_clean_leaves_what_the_pipeline_did_not_make(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    made = ("data/raw/train/a.png", "data/.raw.new/a.png", "data/processed/a.npy", "models/onnx/a", "models/drift/a")
    mine = ("data/pets.tgz", "data/pets/train/cat/a.png", "stages/a.py")
    for name in (*made, *mine, "stages/__pycache__/a.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    run(tmp_path, "make", "clean")
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == sorted(("Makefile", *mine))
    assert not (tmp_path / "models").exists()


def test_a_key_below_a_folder_with_a_blank_is_mounted(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    key = tmp_path / "my keys/k.json"
    key.parent.mkdir()
    key.touch()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/docker").write_text('#!/bin/sh\nfor word in "$@"; do echo "[$word]"; done\n')
    (tmp_path / "bin/docker").chmod(0o755)
    environment = {"PATH": f"{tmp_path}/bin:/usr/local/bin:/usr/bin:/bin", "HOME": str(tmp_path)}
    for name in (str(key), "my keys/k.json"):
        given = run(tmp_path, "make", "docker-pull", f"HOST_SERVICE_ACCOUNT_KEY_PATH={name}", environment=environment)
        assert f"[{key}:/run/secrets/gdrive-key.json:ro]" in given.stdout.splitlines()
