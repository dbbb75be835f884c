"""Arguments that several tools take."""

from __future__ import annotations

from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from tests.helpers import ROOT, run
from tools.shared.arguments import output_file


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert output_file(str(tmp_path / "new/folder/out.json")) == tmp_path / "new/folder/out.json"
    assert output_file(str(tmp_path / "file")) == tmp_path / "file"
    assert output_file("x" * 300) == Path("x" * 300)  # whoever writes it says what is wrong with it
    with pytest.raises(ArgumentTypeError, match="is a folder; name a file"):
        output_file(str(tmp_path))
    with pytest.raises(ArgumentTypeError, match="file is a file, not a folder"):
        output_file(str(tmp_path / "file/out.json"))


@pytest.mark.parametrize(
    "words",
    [
        ("monitor", "images", "--json", "."),
        ("monitor", "images", "--html", "."),
        ("retrain", "images", "--json", "."),
        ("report", "--html", "."),
        ("predict", "image.png", "--output", "."),
    ],
)
def test_tools_refuse_it(words: tuple[str, ...]) -> None:
    result = run(ROOT, "python", "-m", f"tools.{words[0]}", *words[1:], check=False)
    assert result.returncode == 2
    assert f"argument {words[-2]}: . is a folder; name a file" in result.stderr
