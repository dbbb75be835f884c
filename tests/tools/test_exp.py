"""Presets: composed, checked, and handed to the real dvc."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from dvc.utils.hydra import apply_overrides
from ruamel.yaml import YAML

from stages.core.errors import InputError
from stages.core.params import read_params
from tests.helpers import PATIENCE, ROOT, default_params, run, set_params, start, step_reached, wait_until
from tools import exp
from tools.shared import overrides


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default params.yaml, dvc.yaml and recipes, as the working directory."""
    default_params(tmp_path)
    shutil.copy2(ROOT / "dvc.yaml", tmp_path)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(*words: str, recipes: tuple[str, ...] = ()) -> str:
    with pytest.raises(InputError) as error:
        exp.plan(recipes, words)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- composition --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml")))
def test_every_recipe_composes_and_passes_the_stages_schemas(name: str, checkout: Path) -> None:
    found = exp.plan([name], [])
    recipe = overrides.flat(read_params(Path(f"recipes/{name}.yaml")))
    # All that a recipe says counts, except what params.yaml has already.
    committed = overrides.flat(read_params())
    assert found.settings == {key: value for key, value in recipe.items() if value != committed[key]}
    assert Path(f"recipes/{name}.yaml").read_text().startswith("# ")


def test_the_sample_recipe_is_the_default_and_brings_it_back(checkout: Path) -> None:
    assert exp.plan(["sample"], []).settings == {}
    set_params(Path("params.yaml"), {"train.lr": 0.5, "data.source": "imagenette2-160"})
    assert exp.plan(["sample"], []).settings == {"train.lr": 0.01, "data.source": "sample"}
    recipe, committed = (overrides.flat(read_params(Path(name))) for name in ("recipes/sample.yaml", "params.yaml"))
    made_of = {key for key in committed if key.split(".")[0] in ("sample", "preprocess", "model", "train")}
    assert made_of <= recipe.keys(), "whatever params.yaml says by now"


def test_a_recipe_with_data_leaves_out_what_a_retraining_has_added(checkout: Path) -> None:
    set_params(Path("params.yaml"), {"data.extra": "retrain/labelled.tar"})
    for path in Path("recipes").glob("*.yaml"):
        if "data" in read_params(path):
            assert exp.plan([path.stem], []).settings["data.extra"] is None


def test_the_measured_recipe_is_the_command_of_the_readme(checkout: Path) -> None:
    shown = (ROOT / "README.md").read_text().split("dvc exp run -S data.source=/path/to/imagenette2-160.tgz")[1]
    given = re.findall(r"-S '?([\w.]+=[^\s']+)", shown.split("```")[0])
    by_hand = exp.plan([], ["data.source=imagenette2-160", *given])
    assert len(given) == 9
    assert exp.plan(["imagenette160"], []).settings == by_hand.settings


def test_recipes_are_laid_over_each_other_and_overrides_over_them(checkout: Path) -> None:
    found = exp.plan(["imagenette160,finetune"], ["+recipe=gpu", "train.lr=0.5"]).settings
    assert found["train.epochs"] == 4  # finetune, not imagenette160
    assert found["train.label_smoothing"] == 0.1
    assert found["runtime.device"] == "cuda"
    assert found["train.lr"] == 0.5
    assert exp.plan(["imagenette160", "finetune"], ["+recipe=[gpu]", "train.lr=0.5"]).settings == found


def test_only_what_differs_from_params_yaml_is_handed_on(checkout: Path) -> None:
    set_params(Path("params.yaml"), {"train.epochs": 5})
    assert exp.plan([], ["train.epochs=5", "train.lr=0.01", "train.flip=0"]).words == ["-S", "train.flip=0"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "train.lrr=1",
            "override: train.lrr: no such key in params.yaml; did you mean 'train.lr'? (valid: train.seed,",
        ),
        ("lr=1", "override: lr: no such key in params.yaml; did you mean 'train.lr'?"),
        ("trian.lr=1", "override: trian.lr: no such key in params.yaml; did you mean 'train.lr'?"),
        ("train=1", "override: train is a section; name a key in it, as in train.seed"),
        ("+train.new=1", "+train.new=1: keys are neither added nor removed; write train.new=VALUE"),
        ("~train.lr", "~train.lr: keys are neither added nor removed"),
        ("train.lr", "train.lr: not `section.key=value` in Hydra's grammar"),
        ("data.source=/a(b)", "goes in quotes of its own: KEY='\"VALUE\"'"),
        ("data.source=~/a.tgz", "brackets or ~ in it goes in quotes of its own"),
        ("train.lr=-1", "params.yaml + overrides: train.lr: -1 is refused: input should be greater than 0"),
        ("train.epochs=2.5", "params.yaml + overrides: train.epochs: 2.5 is refused"),
        ("model.name=resnet81", "params.yaml + overrides: model.name: 'resnet81' is no model of timm; did you mean"),
        ("retrain.lr=0", "params.yaml + overrides: retrain.lr: 0 is refused"),
        ("train.lr=0.1,-1", "params.yaml + overrides (train.lr=-1): train.lr: -1 is refused"),
        ("train.lr=interval(0.1,1)", "python -m tools.sweep 'train.lr=interval(0.1,1)'"),
        ("model.name=glob(res*)", "model.name=glob(res*): glob(...) has nothing to match here"),
        ("+recipe=gpx", "recipes/gpx.yaml: no such recipe; did you mean 'gpu'? (valid: finetune, gpu,"),
        ("+recipe=gpu,sample", "write +recipe=[one,two]"),
        ("train.seed=range(0,2000)", "2,000 combinations; at most 1,000"),
    ],
)
def test_what_is_wrong_is_refused_by_name(word: str, message: str, checkout: Path) -> None:
    assert message in refused(word)


def test_a_range_of_decimals_ends_before_its_end(checkout: Path) -> None:
    assert exp.plan((), ["train.lr=range(0.1,0.4,0.1)"]).sweeps == {"train.lr": [0.1, 0.2, 0.3]}
    assert exp.plan((), ["train.lr=range(0.3,0.1,-0.1)"]).sweeps == {"train.lr": [0.3, 0.2]}
    assert exp.plan((), ["train.seed=range(1,7,2)"]).sweeps == {"train.seed": [1, 3, 5]}


def test_a_typo_in_a_recipe_is_refused_with_the_nearest_key(checkout: Path) -> None:
    Path("recipes/mine.yaml").write_text("train:\n  lr: 0.1\n  weigth_decay: 0.1\n")
    message = refused(recipes=("mine",))
    assert message.startswith("recipes/mine.yaml: train.weigth_decay: no such key in params.yaml; did you mean")
    assert "'train.weight_decay'" in message
    Path("recipes/mine.yaml").write_text("trian:\n  lr: 0.1\n")
    assert "trian.lr: no such key in params.yaml; did you mean 'train.lr'?" in refused(recipes=("mine",))
    Path("recipes/mine.yaml").write_text("train:\n  momentum: 1.5\n")
    assert refused(recipes=("mine",)).startswith("params.yaml + recipes/mine.yaml: train.momentum: 1.5 is refused")
    Path("recipes/mine.yaml").write_text("lr: 0.1\n")
    assert refused(recipes=("mine",)) == "recipes/mine.yaml: lr must be a section of keys, not 0.1"


VALUES: list[Any] = [
    *("a", "imagenette2-160", "a'b", "a\\'b", "a\\", "a\\\\", "", "a,b", "a=b", "${x}", "\\${x}", "$x", "a b", "null"),
    *(
        "True",
        "nan",
        "1",
        "1e3",
        "[a]",
        "choice(x)",
        "ä",
        "http://h:1/x?y=1&z",
        'a"b',
        "#x",
        "a\nb",
        "/a/b c.tgz",
        "~/x",
    ),
    *(1, 0, -1.5, 1e-5, 1e20, 0.1, True, False, None, [0.5, 1.0], ["a'b", None, "x,y"], []),
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_quoting_comes_back_from_dvcs_own_parser(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("a:  # kept\n  b: old\n")
    apply_overrides(path, [f"a.b={overrides.quoted(value)}"])
    found = YAML(typ="safe", pure=True).load(path.read_text())["a"]["b"]
    assert found == value
    assert type(found) is type(value)
    assert "# kept" in path.read_text()


# --- with dvc -----------------------------------------------------------------------------------------------------


def exp_run(folder: Path, *words: str) -> str:
    return run(folder, "python", "-m", "tools.exp", *words).stdout


def edited(folder: Path) -> bytes:
    """A hand edit and a comment of the user's in params.yaml, not committed."""
    path = folder / "params.yaml"
    text = path.read_text().replace("flip: 0.5 ", "flip: 0.25 ", 1) + "# mine, until Friday\n"
    path.write_text(text)
    return text.encode()


def params_of(folder: Path, name: str) -> dict[str, Any]:
    (reference,) = run(folder, "git", "for-each-ref", "--format=%(refname)", f"refs/exps/*/*/{name}").stdout.split()
    text = run(folder, "git", "show", f"{reference}:params.yaml").stdout
    assert "# mine, until Friday" in text
    return overrides.flat(YAML(typ="safe", pure=True).load(text))


def test_temp_leaves_params_yaml_byte_for_byte_and_takes_its_edits_along(repository: Path) -> None:
    (repository / "recipes/mine.yaml").write_text("train:\n  epochs: 1\n  warmup_epochs: 0.5\n")
    before = edited(repository)
    exp_run(repository, "-r", "mine", "train.lr=0.02", "--temp", "--name", "apart", "train")
    assert (repository / "params.yaml").read_bytes() == before
    found = params_of(repository, "apart")
    assert (found["train.epochs"], found["train.lr"], found["train.flip"]) == (1, 0.02, 0.25)


def test_a_run_in_the_workspace_keeps_comments_and_edits(repository: Path) -> None:
    before = edited(repository).decode()
    expected = overrides.flat(YAML(typ="safe", pure=True).load(before)) | {"train.lr": 0.02, "train.epochs": 1}
    expected["train.warmup_epochs"] = 0.5
    exp_run(repository, "train.lr=0.02", "train.epochs=1", "train.warmup_epochs=0.5", "-n", "here", "train")
    after = (repository / "params.yaml").read_text()
    assert overrides.flat(YAML(typ="safe", pure=True).load(after)) == expected == params_of(repository, "here")
    assert re.findall(r"#.*", after) == re.findall(r"#.*", before)
    # What is not set and no list (dvc writes those one element a line) keeps its line as it is.
    same = [line for line in before.splitlines() if re.match(r"  \w+: [^\[]*$", line) and "# " in line]
    assert len([line for line in same if line in after.splitlines()]) >= len(same) - 3


def test_a_refusal_costs_no_run(repository: Path) -> None:
    before = run(repository, "git", "status", "--porcelain").stdout, (repository / "params.yaml").read_bytes()
    result = run(repository, "python", "-X", "importtime", "-m", "tools.exp", "train.lrr=1", check=False)
    said = [line for line in result.stderr.splitlines() if not line.startswith("import time:")]
    assert result.returncode == 2
    assert len(said) == 1
    assert said[0].startswith("exp: error: override: train.lrr: no such key in params.yaml; did you mean 'train.lr'?")
    assert not re.search(r"\| +(torch|dvc)$", result.stderr, re.MULTILINE)
    assert (run(repository, "git", "status", "--porcelain").stdout, (repository / "params.yaml").read_bytes()) == before


def test_several_values_are_queued(repository: Path) -> None:
    before = edited(repository)
    shown = exp_run(repository, "train.lr=0.01,0.02", "model.name=choice(test_resnet,test_vit)", "--queue", "-n", "g")
    assert "exp: dvc exp run --queue --name g" in shown
    listed = run(repository, "dvc", "queue", "status").stdout
    assert re.findall(r"g-\d", listed)
    assert len(re.findall(r"Queued", listed)) == 4
    assert (repository / "params.yaml").read_bytes() == before


@pytest.mark.slow
def test_several_values_run(repository: Path) -> None:
    before = edited(repository)
    exp_run(
        repository, "train.seed=range(1,3)", "train.epochs=1", "train.warmup_epochs=0", "-n", "seed", "-j", "2", "train"
    )

    def names() -> set[str]:
        return set(run(repository, "dvc", "exp", "list", "--name-only").stdout.split())

    wait_until(lambda: names() == {"seed-1", "seed-2"}, poll=3)
    assert [params_of(repository, f"seed-{i}")["train.seed"] for i in (1, 2)] == [1, 2]
    assert (repository / "params.yaml").read_bytes() == before


@pytest.mark.slow
def test_an_interrupt_is_dvcs(repository: Path) -> None:
    """Ctrl-C reaches the stage, which saves its checkpoint; nothing is left behind."""
    process = start(repository, "python", "-m", "tools.exp", "train.epochs=500", "train")
    wait_until(lambda: step_reached(repository) >= 10)  # the committed run has 6 steps
    run(repository, "bash", "-c", f"kill -INT -{process.pid}")
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    assert "train: stopped by SIGINT" in said
