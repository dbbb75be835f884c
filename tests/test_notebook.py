"""The notebook runs from top to bottom on a finished run, and is kept in git without what it shows."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
from PIL import Image

from tests.helpers import ROOT, run

NOTEBOOK = ROOT / "notebooks/explore.ipynb"
PICTURES = ["experiments", "curves", "confusion", "reliability", "mistakes", "drift"]  # in the order of the cells


def execute(repository: Path, folder: Path) -> tuple[str, list[Image.Image]]:
    """Run the notebook of a repository as Jupyter would; returns the texts that it shows, and the pictures."""
    made = folder / "executed.ipynb"
    # In a process of its own, as a user runs it: the kernel's warnings are not ours.
    run(repository, "jupyter", "execute", "notebooks/explore.ipynb", "--output", str(made), "--timeout=300")
    texts: list[str] = []
    pictures: list[Image.Image] = []
    for cell in json.loads(made.read_text())["cells"]:
        for output in cell.get("outputs", []):
            data: dict[str, Any] = output.get("data", {})
            assert output.get("name") != "stderr", "".join(output["text"])
            texts.append("".join(output.get("text") or data.get("text/markdown") or ""))
            if "image/png" in data:
                pictures.append(Image.open(io.BytesIO(base64.b64decode(data["image/png"]))))
    return "\n".join(texts), pictures


def test_the_notebook_shows_the_run(repository: Path, tmp_path: Path) -> None:
    before = run(repository, "git", "status", "--porcelain").stdout
    text, pictures = execute(repository, tmp_path)
    top1 = json.loads((repository / "metrics/evaluate.json").read_text())["top1"]
    assert "test_resnet on sample, 2 epochs with muon" in text
    assert f"| workspace | {top1:.4g} |" in text
    assert "No experiments on this commit yet" in text
    wrong = sum(len(set(line.split(","))) == 2 for line in _lines(repository / "plots/evaluate/confusion.csv"))
    assert f"{wrong} of 60 validation images are wrong" in text
    assert len(pictures) == len(PICTURES)
    for name, picture in zip(PICTURES, pictures, strict=True):
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 10, f"{name} is empty"
    assert run(repository, "git", "status", "--porcelain").stdout == before


def test_the_notebook_compares_experiments(repository: Path, tmp_path: Path) -> None:
    run(repository, "dvc", "exp", "run", "-S", "evaluate.num_bins=3", "-n", "coarser", "evaluate")
    text, _ = execute(repository, tmp_path)
    assert "No experiments" not in text
    header, _, *rows = [line for line in text.splitlines() if line.startswith("|")][3:]
    assert header == "| name | top1 | nll | ece | evaluate.num_bins |"
    bins = {cells[1]: cells[-2] for row in rows if len(cells := [cell.strip() for cell in row.split("|")]) == 7}
    assert (bins.pop("workspace"), bins.pop("coarser"), list(bins.values())) == ("3", "3", ["15"])  # the last: HEAD


def test_what_the_notebook_shows_is_not_in_git() -> None:
    """Outputs are large, differ on every machine, and hide in a diff what was changed."""
    notebook = json.loads(NOTEBOOK.read_text())
    nbformat.validate(notebook)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None), "clear all outputs, then save"


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()[1:]
