from __future__ import annotations

import resource
import signal
from pathlib import Path

import pytest

from stages.core.output import replace_directory, write_json, write_text


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    for content in ("first", "second"):
        with replace_directory(tmp_path / "a" / "out") as new:
            (new / content).write_text(content)
            assert not (tmp_path / "a" / "out" / content).exists()
        assert [path.name for path in (tmp_path / "a" / "out").iterdir()] == [content]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there(error: type[BaseException], tmp_path: Path) -> None:
    with replace_directory(tmp_path / "out") as new:
        (new / "old").touch()
    with pytest.raises(error), replace_directory(tmp_path / "out") as new:
        (new / "half").touch()
        raise error
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]


def test_leftovers_of_a_killed_run_are_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".out.new").mkdir()
    (tmp_path / ".out.new" / "half").touch()
    with replace_directory(tmp_path / "out") as new:
        assert not list(new.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_files_replace_their_predecessor(tmp_path: Path) -> None:
    write_text(tmp_path / "deep" / "a.txt", "ä")
    write_text(tmp_path / "deep" / "a.txt", "ö")
    assert (tmp_path / "deep" / "a.txt").read_bytes() == "ö".encode()
    assert len(list((tmp_path / "deep").iterdir())) == 1


def test_json_has_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert not (tmp_path / "a.json").exists()


def test_a_file_that_cannot_be_written_leaves_nothing_beside_it(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        with pytest.raises(OSError, match="too large"):
            write_text(tmp_path / "a.txt", "x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.txt": "old"}
