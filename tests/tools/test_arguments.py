"""Arguments that several tools take."""

from __future__ import annotations

import os
from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from stages.core.errors import InputError
from tests.helpers import ROOT, run
from tools.shared.arguments import at_least, output_file, write_output


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert output_file(str(tmp_path / "new/folder/out.json")) == tmp_path / "new/folder/out.json"
    assert output_file(str(tmp_path / "file")) == tmp_path / "file"
    assert output_file("x" * 300) == Path("x" * 300)  # whoever writes it says what is wrong with it
    with pytest.raises(ArgumentTypeError, match="is a folder; name a file"):
        output_file(str(tmp_path))
    with pytest.raises(ArgumentTypeError, match="file is a file, not a folder"):
        output_file(str(tmp_path / "file/out.json"))
    with pytest.raises(ArgumentTypeError, match="an empty name"):
        output_file("")


def test_what_a_link_points_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "ahead").symlink_to("new/file")
    for name in ("link", "ahead"):
        write_output("--json", tmp_path / name, "new")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / name).read_text() == "new"


def test_a_pipe_gets_the_text_and_stays_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_output("--json", tmp_path / "pipe", "text")
    assert os.read(reader, 100) == b"text"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
    write_output("--json", Path(os.devnull), "text")
    assert Path(os.devnull).is_char_device()


def test_what_cannot_be_written_is_said_with_the_option(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--json: .*x: File name too long"):
        write_output("--json", tmp_path / ("x" * 252), "text")
    with pytest.raises(InputError, match="--json: /dev/full: No space left on device"):
        write_output("--json", Path("/dev/full"), "text")


def test_numbers_have_a_smallest_one() -> None:
    assert at_least(1)("7") == 7
    assert at_least(0.0)("0.5") == 0.5
    for smallest, text, said in ((1, "0", "whole number of at least 1"), (1, "1.5", "whole"), (0.0, "-1", "number of")):
        with pytest.raises(ArgumentTypeError, match=f"'{text}' is no {said}"):
            at_least(smallest)(text)
    with pytest.raises(ArgumentTypeError, match="'nan' is no number of at least 0"):
        at_least(0.0)("nan")


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
