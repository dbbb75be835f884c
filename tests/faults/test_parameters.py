"""Every key of params.yaml, spoilt in many ways: refused at once, by name."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stages import drift, evaluate, extract, preprocess, profile, train
from stages.core.errors import InputError
from stages.core.params import SECTIONS, Section, check_params, load_params
from tests.faults.reliability import case
from tests.faults.settings import document
from tests.helpers import ROOT, run, set_params
from tools.retrain import command as retrain

pytestmark = [pytest.mark.slow, pytest.mark.faults]

READERS: list[type[Section]] = [
    module.Params for module in (extract, preprocess, train, evaluate, profile, drift, retrain)
]
SECONDS = 2.0  # that a refusal may take, as a process too


def reader_of(section: str) -> type[Section]:
    return next(model for model in READERS if section in model.model_fields)


def mutations(section: str, key: str, value: Any) -> Iterator[tuple[str, Callable[[dict[str, Any]], None]]]:
    """What is wrong, and how the section comes to have it."""

    def setting(wrong: Any) -> Callable[[dict[str, Any]], None]:
        return lambda some: some.update({key: wrong})

    yield "a mapping", setting({"a": 1})
    yield "a list of texts", setting(["a", "b", "c"])
    if isinstance(value, bool | int | float):
        yield "not a number", setting(float("nan"))
        yield "infinite", setting(float("inf"))
        yield "a text", setting("1e-3x")
    if isinstance(value, bool):
        yield "a number for a choice of two", setting(7)
    elif isinstance(value, int | float):
        yield "negative", setting(-1)
        yield "a choice of two for a number", setting(True)
        yield "none", setting(None)
    elif isinstance(value, str):
        yield "an empty text", setting("")
        yield "a number for a text", setting(7)
        yield "none", setting(None)
    elif isinstance(value, list):
        yield "an empty list", setting([])
        yield "a list with not a number", setting([float("nan"), 1.0])

    def misspell(some: dict[str, Any]) -> None:
        some[f"{key}_"] = some.pop(key)

    yield "misspelt", misspell
    yield "missing", lambda some: some.pop(key)


# What is right all the same.
FINE = {
    ("runtime.checkpoint_seconds", "none"),
    ("runtime.workers", "a number for a text"),
    ("drift.contamination", "an empty list"),
}


@pytest.mark.parametrize(
    "section",
    [
        pytest.param(
            name,
            marks=case(
                f"section {name}",
                "Each key with a wrong type or sign, NaN, infinity, nothing, misspelt or missing: refused by name.",
            ),
            id=name,
        )
        for name in SECTIONS
    ],
)
def test_every_key_of_a_section(section: str, measured: Callable[[str], None]) -> None:
    model = reader_of(section)
    committed = document(tiny=False)
    start, count, taken = time.perf_counter(), 0, []
    for key, value in committed[section].items():
        for what, spoil in mutations(section, key, value):
            spoilt = document(tiny=False)
            spoil(spoilt[section])
            try:
                check_params(model, spoilt, "params.yaml")
            except InputError as error:
                assert re.search(rf"\b{section}[.:] ?.*{key}", str(error)), str(error)  # noqa: PT017
                assert str(error).count("\n") <= (3 if "list" in what else 2 if what == "misspelt" else 0)  # noqa: PT017
            else:
                taken.append((f"{section}.{key}", what))
            count += 1
    assert set(taken) == {(name, what) for name, what in FINE if name.startswith(f"{section}.")}
    measured(f"{count} mutations, {(time.perf_counter() - start) / count * 1000:.0f} ms each")


TEXTS = {
    "empty file": ("", "expected sections"),
    "list": ("- a\n", "expected sections"),
    "tab": ("train:\n\tlr: 1\n", "not valid YAML"),
    "unclosed bracket": ("train: [1\n", "not valid YAML"),
    "key twice": ("train:\n  lr: 1\n  lr: 2\n", "not valid YAML.*duplicate key"),
    "Python object": ("train: !!python/object/apply:os.system ['true']\n", "not valid YAML|train"),
    "million laughs": (
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{new}: &{new} [{f'*{old},' * 9}]\n" for old, new in zip("abcdefg", "bcdefgh", strict=True)),
        "unknown section",
    ),
    "deep nesting": ("train: " + "[" * 500 + "]" * 500 + "\n", "nested too deeply"),
    "no such day": ("train: {lr: 2026-13-45}\n", "not valid YAML|train"),
    "NUL": ("train:\n  lr: \0\n", "not valid YAML"),
    "Latin-1": ("train: # \xe9\n", "not valid YAML"),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=case(f"file: {name}", "Refused, naming the file."), id=name) for name in TEXTS]
)
def test_a_broken_file(name: str, tmp_path: Path) -> None:
    text, message = TEXTS[name]
    path = tmp_path / "params.yaml"
    path.write_bytes(text.encode("latin-1"))
    start = time.perf_counter()
    with pytest.raises(InputError, match=message) as caught:
        load_params(train.Params, path)
    assert "params.yaml" in str(caught.value)
    assert time.perf_counter() - start < SECONDS
    assert len(str(caught.value)) < 20_000


PROCESSES: dict[str, dict[str, Any]] = {
    "extract": {"data.max_bytes": "much"},
    "preprocess": {"preprocess.image_size": 10**12},
    "train": {"train.lr": "1e-3 "},
    "evaluate": {"evaluate.num_bins": -3},
    "profile": {"profile.active": True},
    "drift": {"drift.alpha": 1.5},
    "export": {"runtime.threads": "many"},
}


@pytest.mark.parametrize(
    "stage",
    [
        pytest.param(
            name,
            marks=case(f"process: {name}", f"`python -m stages.{name}` with a wrong value: status 2 in under 2 s."),
            id=name,
        )
        for name in PROCESSES
    ],
)
def test_a_stage_as_a_process(stage: str, workspace: Path, measured: Callable[[str], None]) -> None:
    set_params(workspace / "params.yaml", PROCESSES[stage])
    times = []
    for _ in range(3):  # the machine may be busy: the best of three is what the refusal takes
        start = time.perf_counter()
        ended = run(workspace, "python", "-m", f"stages.{stage}", check=False, environment={"PYTHONPATH": str(ROOT)})
        times.append(time.perf_counter() - start)
        assert ended.returncode == 2
        (key,) = PROCESSES[stage]
        assert ended.stderr.startswith(f"{stage}: error: params.yaml: {key}: ")
        assert len(ended.stderr.splitlines()) == 1
        if times[-1] < SECONDS:
            break
    assert min(times) < SECONDS
    measured(f"{min(times):.1f} s")
