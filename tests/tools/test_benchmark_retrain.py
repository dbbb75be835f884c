"""The benchmark of retraining: what it holds back is never trained on, and the truth says what the monitor may say."""

from __future__ import annotations

import json
import sys
import tarfile
from itertools import islice
from pathlib import Path

import pytest

from stages.core import sample
from stages.core.archive import Limits, open_image_set
from stages.core.errors import InputError
from stages.core.packing import Geometry
from tests.helpers import image_files, run, write_files
from tools.benchmark.retrain import selected
from tools.benchmark.scenarios import SCENARIOS, Drop, Scenario, faults
from tools.benchmark.unseen import UnseenOfArchive, hold_back

COMMAND = (sys.executable, "-m", "tools.benchmark.retrain")
LIMITS = Limits(files=1000, total_bytes=10**8, ratio=200)


def test_what_is_held_back_is_nowhere_else(tmp_path: Path) -> None:
    files = image_files(num_train=12, num_val=2)
    source, rest = write_files(tmp_path / "images", files), tmp_path / "rest.tar"
    held_back = hold_back(source, rest, 3, 4, LIMITS, tmp_path)
    with tarfile.open(rest) as tar:
        left = {name: member.read() for name in tar.getnames() if (member := tar.extractfile(name))}
    taken = [content for images in held_back.values() for content in images]
    assert {name: len(images) for name, images in held_back.items()} == {"cat": 5, "dog": 5}
    assert sorted([*taken, *left.values()]) == sorted(files.values())
    assert len({*taken} & {*left.values()}) == 0
    assert {name for name in left if name.startswith("val/")} == {name for name in files if name.startswith("val/")}
    with open_image_set(rest, LIMITS, tmp_path) as splits:  # a data.source as any other
        assert len(splits["train"]) == 14

    images = UnseenOfArchive(held_back, 3, Geometry(16, "center", "bilinear"))
    production, labelled = ({*images.production(seed)} for seed in (0, 1)), {*images.labelled(0)}
    for indices in production:
        assert len(indices) == 6
        assert not indices & labelled
    assert len(labelled) == 4
    assert [*islice(images.production(0), 4)] != [*islice(images.production(1), 4)], "other images come first"
    assert images.pixels(0).shape == (16, 16, 3)


def test_a_class_that_would_have_none_left_is_named(tmp_path: Path) -> None:
    source = write_files(tmp_path / "images", image_files(num_train=5))
    with pytest.raises(InputError, match="5 training images of cat, and 5 of each class are held back"):
        hold_back(source, tmp_path / "rest.tar", 3, 4, LIMITS, tmp_path)


@pytest.mark.parametrize(
    ("value", "verdicts"),
    [(0.2, {"harmful"}), (0.0, {"ok", "benign"}), (-0.1, {"ok", "benign"}), (0.06, {"ok", "benign", "harmful"})],
)
def test_the_truth_says_what_the_monitor_may_say(value: float, verdicts: set[str]) -> None:
    assert {*Drop(value, error=0.01, limit=0.05).verdicts} == verdicts


def test_scenarios_come_in_the_order_of_the_words_and_once_each() -> None:
    assert selected(None) == list(SCENARIOS)
    names = [each.name for each in selected("wrong labels,clean images,labels of clean")]
    clean = [f"clean images {number}" for number in (1, 2, 3)]
    assert names == ["brightness 4, wrong labels", *clean, "darkness 4, labels of clean images"]
    assert len(selected("darkness 4,killed")) == 5


HARM, LEFT = Drop(0.3, error=0.01, limit=0.05), {"HEAD": "a", "tags": "", "changes": "", "stale": ""}


@pytest.mark.parametrize(
    ("scenario", "verdict", "decision", "status", "after", "found"),
    [
        (Scenario("fog", ("fog", 4)), "harmful", "promoted", 0, {"HEAD": "b", "tags": "classifier@v0.0.1"}, []),
        (
            Scenario("fog", ("fog", 4)), "harmful", "not promoted", 1, {"HEAD": "b"},
            ["decision is 'not promoted' instead of 'promoted'", "exit status is 1 instead of 0", "HEAD changed: b"],
        ),
        (
            Scenario("fog", ("fog", 4)), "benign", "nothing to do", 0, {},
            ["monitor says 'benign' instead of 'harmful'"],
        ),
        (Scenario("fog", ("fog", 4), labels="wrong", promotes=False), "harmful", "not promoted", 1, {}, []),
        (Scenario("clean"), "ok", "nothing to do", 0, {}, []),
        (Scenario("clean"), "ok", "nothing to do", 0, {"changes": "M x"}, ["changes changed: M x"]),
        (Scenario("one class", classes=1), "ok", "nothing to do", 0, {}, ["label shift is not what it is"]),
    ],
)  # fmt: skip
def test_what_came_of_a_scenario_is_held_against_what_must(
    scenario: Scenario, verdict: str, decision: str, status: int, after: dict[str, str], found: list[str]
) -> None:
    summary = {
        "monitor": {"status": verdict, "label_shift": {"detected": False}}, "decision": decision, "commit": "b",
    }  # fmt: skip
    assert faults(scenario, summary, HARM, status, LEFT, LEFT | after) == found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "clean,nono"], "--only clean,nono: no scenario is named 'nono'"),
        (["--data", "no/such.tgz"], "--data: no/such.tgz: no such file or folder"),
        (["--data", ".", "--recipe", "nono"], "recipes/nono.yaml: no such recipe"),
        (["trian.lr=0.1"], "did you mean 'train.lr'?"),
        (["--recipe", "imagenette160"], "'imagenette2-160' is not the generated sample; name it by --data"),
    ],
)
def test_wrong_input_is_refused(repository: Path, words: list[str], message: str) -> None:
    result = run(repository, *COMMAND, *words, check=False)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_it_plays_scenarios_on_images_of_ones_own(repository: Path, tmp_path: Path) -> None:
    files = {
        f"{split}/{sample.CLASSES[index % 10]}/{index:03d}.jpg": sample.render(1, number, index, 32)
        for number, (split, count) in enumerate((("train", 400), ("val", 300)))
        for index in range(count)
    }
    images = write_files(tmp_path / "images", files)
    out = tmp_path / "results.json"
    words = ("--production", "10", "--labelled", "50", "--only", "clean images 1,labels of clean", "--out", str(out))
    result = run(repository, *COMMAND, "--data", str(images), *words, check=False)
    assert result.returncode in {0, 1}, result.stderr  # so little training tells us nothing of the verdicts

    clean, mislabelled = json.loads(out.read_text())
    assert abs(clean["drop"]["value"]) < 0.3
    assert clean["decision"] == "nothing to do"
    assert mislabelled["decision"] in {"nothing to do", "not promoted"}
    for scenario in (clean, mislabelled):
        assert not [fault for fault in scenario["faults"] if "changed" in fault]
    assert run(repository, "git", "status", "--porcelain").stdout == ""
