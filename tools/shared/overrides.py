"""Settings of an experiment: params.yaml, recipes over it, overrides over these; composed by Hydra, checked, quoted.

params.yaml itself is never written: what differs from it is handed to `dvc exp run` as `-S section.key=value`.
"""

from __future__ import annotations

import difflib
import importlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, QuotedString, RangeSweep, ValueType
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from ruamel.yaml import YAML

from stages.core.errors import InputError
from stages.core.params import PARAMS_FILE, check_params, read_params

RECIPES = Path("recipes")
_RECIPE = ("recipe", "recipes")  # as a key: +recipe=gpu

Value = Any  # of one key of params.yaml: str, int, float, bool, None, or a list of these
Settings = dict[str, Value]  # by `section.key`


# --- what the user wrote ------------------------------------------------------------------------------------------


def parse(words: Iterable[str], recipes: Sequence[str] = ()) -> tuple[list[str], list[Override]]:
    """Recipes (those given, comma-separated or not, and those of `+recipe=NAME`) and the other overrides.

    InputError for what is not Hydra's grammar, for a recipe or a key that does not exist.
    """
    names = [name for given in recipes for name in re.split(r"[,\s]+", given) if name]
    overrides: list[Override] = []
    keys = flat(read_params())
    for word in words:
        try:
            override = OverridesParser.create().parse_override(word)
        except HydraException as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{word}: not `section.key=value` in Hydra's grammar: {reason}; a value with commas, colons, "
                "brackets or ~ in it goes in quotes of its own: KEY='\"VALUE\"'"
            ) from None
        if override.key_or_group in _RECIPE:
            names += _recipe_names(override)
            continue
        if override.type is not OverrideType.CHANGE or override.package is not None:
            raise InputError(f"{word}: keys are neither added nor removed; write {override.key_or_group}=VALUE")
        _check_key(override.key_or_group, keys, "override")
        if override.value_type is ValueType.GLOB_CHOICE_SWEEP:
            raise InputError(f"{word}: glob(...) has nothing to match here; list the values: KEY=a,b")
        overrides.append(override)
    for name in names:
        _check_recipe(name, keys)
    return list(dict.fromkeys(names)), overrides


def recipe_names() -> list[str]:
    """The recipes that there are."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def _recipe_names(override: Override) -> list[str]:
    if override.is_sweep_override():
        raise InputError(f"{override.input_line}: recipes are laid over each other: write +recipe=[one,two]")
    value = plain(override.value())
    return [str(name) for name in (value if isinstance(value, list) else [value])]


def _check_recipe(name: str, keys: Settings) -> None:
    """InputError unless the recipe exists and names keys of params.yaml only."""
    path = RECIPES / f"{name}.yaml"
    if name not in recipe_names():
        raise InputError(f"{path}: no such recipe{_nearest(name, recipe_names())}")
    for key in flat(read_params(path), str(path)):
        _check_key(key, keys, str(path))


def _check_key(key: str, keys: Settings, where: str) -> None:
    if key in keys:
        return
    section = key.split(".")[0]
    if key == section and any(valid.startswith(f"{section}.") for valid in keys):
        raise InputError(f"{where}: {key} is a section; name a key in it, as in {_beside(section, keys)[0]}")
    raise InputError(f"{where}: {key}: no such key in {PARAMS_FILE}{_nearest(key, list(keys), _beside(section, keys))}")


def _beside(section: str, keys: Iterable[str]) -> list[str]:
    return [key for key in keys if key.startswith(f"{section}.")]


def _nearest(name: str, choices: Sequence[str], shown: Sequence[str] | None = None) -> str:
    # The right key in the wrong section, or without one, counts as near.
    same_end = [key for key in choices if key.split(".")[-1] == name.split(".")[-1]]
    close = same_end or difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    valid = shown if shown is not None else choices
    return f"{hint} (valid: {', '.join(valid)})" if valid else hint


# --- composition --------------------------------------------------------------------------------------------------


def compose_params(recipes: Sequence[str], settings: Mapping[str, Value]) -> dict[str, Any]:
    """The sections of params.yaml with the recipes in their order and then the settings laid over them, by Hydra."""
    words = [f"+{RECIPES.name}@_global_=[{','.join(recipes)}]"] if recipes else []
    words += [f"{key}={quoted(value)}" for key, value in settings.items()]
    try:
        with initialize_config_dir(config_dir=str(Path.cwd()), version_base="1.3"):
            composed = compose(config_name=PARAMS_FILE.stem, overrides=words)
        sections = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(f"{origin(recipes)}: {str(error).splitlines()[0]}") from None
    assert isinstance(sections, dict)
    return {str(section): content for section, content in sections.items()}


def compose_one(words: Iterable[str], recipe: str | None, fixed: Mapping[str, Value]) -> dict[str, Any]:
    """The checked params of one run: params.yaml, a recipe, `words` and then `fixed` laid over it; nothing is swept."""
    recipes, overrides = parse(words, [recipe] if recipe else [])
    if swept := [override.input_line for override in overrides if override.is_sweep_override()]:
        raise InputError(f"{swept[0]}: one value, not several")
    settings = {override.key_or_group: plain(override.value()) for override in overrides}
    params = compose_params(recipes, {**settings, **fixed})
    check(params, origin(recipes))
    return params


def check(params: Mapping[str, Any], where: str) -> None:
    """Check every section as the stages will, so that a wrong value costs nothing; `where` begins the InputError."""
    stages = YAML(typ="safe", pure=True).load(Path("dvc.yaml"))["stages"].values()
    found = re.findall(r"\bpython -m (stages\.\w+)", " ".join(str(stage.get("cmd", "")) for stage in stages))
    for name in [*found, "tools.retrain.command"]:
        check_params(importlib.import_module(name).Params, params, where)


def origin(recipes: Sequence[str], overrides: bool = True) -> str:
    """Where composed params come from, for messages."""
    return " + ".join([str(PARAMS_FILE), *(f"{RECIPES}/{name}.yaml" for name in recipes), *["overrides"] * overrides])


def changed(params: Mapping[str, Any], settings: Mapping[str, Value]) -> dict[str, Any]:
    """A copy with other values of keys that are known to exist."""
    result = {section: dict(content) for section, content in params.items()}
    for key, value in settings.items():
        section, name = key.split(".")
        result[section][name] = value
    return result


def differences(params: Mapping[str, Any]) -> Settings:
    """What differs from params.yaml as it is."""
    committed = flat(read_params())
    return {key: value for key, value in flat(params).items() if not _same(value, committed[key])}


def flat(params: Mapping[str, Any], where: str = str(PARAMS_FILE)) -> Settings:
    """Sections as `section.key`."""
    for section, content in params.items():
        if not isinstance(content, Mapping):
            raise InputError(f"{where}: {section} must be a section of keys, not {content!r}")
    return {f"{section}.{key}": value for section, content in params.items() for key, value in content.items()}


def _same(one: Value, other: Value) -> bool:
    # 1 and true are equal to Python; 1 and 1.0 are the same number to the stages.
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


# --- values -------------------------------------------------------------------------------------------------------


def swept_values(override: Override) -> list[Value]:
    """The values of `KEY=a,b`, choice(...) or range(...), one by one."""
    swept = override.value()
    if isinstance(swept, RangeSweep) and not swept.shuffle and swept.step:
        numbers = (swept.start, swept.step, swept.stop)
        first, by, end = (Decimal(str(number)) for number in numbers)
        as_type = int if all(isinstance(number, int) for number in numbers) else float
        # In decimals: with floats, 0.1, 0.2 and 0.3 would be followed by 0.4 in a range that ends before it.
        return [as_type(first + i * by) for i in range(max(0, math.ceil((end - first) / by)))]
    return [plain(value) for value in override.sweep_iterator(transformer=lambda value: value)]


def plain(value: Any) -> Value:
    """A value of Hydra's parser without its marks of quoting."""
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [plain(element) for element in value]
    if isinstance(value, dict):
        return {plain(key): plain(element) for key, element in value.items()}
    return value


def quoted(value: Value) -> str:
    """A value in Hydra's grammar, which is that of `dvc exp run -S` too."""
    if isinstance(value, str):
        if re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", value) and value.lower() not in (
            "null",
            "true",
            "false",
            "nan",
            "inf",
        ):
            return value
        # Backslashes count only before a quote (and ours closes the string) and before the ${ of an interpolation.
        text = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", value)
        text = re.sub(r"(\\*)('|\Z)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text)
        return f"'{text}'"
    if isinstance(value, list):
        return "[" + ",".join(map(quoted, value)) + "]"
    if isinstance(value, dict):
        raise InputError(f"{value}: no key of {PARAMS_FILE} holds a mapping")
    return json.dumps(value)
