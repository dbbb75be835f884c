"""Read params.yaml strictly: what is unknown, missing, of the wrong type or out of range is refused by name.

Each stage composes the sections that it reads into a `Params` model of its own; the sections that several stages
share live beside the code that they steer (`recipe.py`, `runtime.py`).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.core.errors import InputError

PARAMS_FILE = Path("params.yaml")

# Every section that params.yaml may have. A stage reads only some of them, so that a misspelt one needs this list.
SECTIONS = (
    "data",
    "sample",
    "preprocess",
    "model",
    "train",
    "evaluate",
    "profile",
    "drift",
    "retrain",
    "runtime",
    "wandb",
)


class Section(BaseModel):
    """Base of every params model: frozen, no unknown keys, no silent conversion of types, no inf or nan."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


SectionType = TypeVar("SectionType", bound=Section)


def load_params(model: type[SectionType], path: Path = PARAMS_FILE) -> SectionType:
    """Read the sections that `model` names from a YAML 1.2 file (as DVC does, so that 1e-3 is a number).

    Raises InputError with one line a mistake, each naming its key and what is valid.
    """
    return check_params(model, read_params(path), str(path))


def read_params(path: Path = PARAMS_FILE) -> dict[str, Any]:
    """The sections of a YAML 1.2 file, unchecked. InputError when there is no such file, or it holds no sections."""
    try:
        document = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: not found; run stages from the root of the repository") from None
    except RecursionError:
        raise InputError(f"{path}: nested too deeply; it has sections, and keys in them") from None
    except (YAMLError, ValueError) as error:  # ValueError: bytes that are not UTF-8, a date that is none
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise InputError(f"{path}: expected sections ({', '.join(SECTIONS)}), found {document!r}")
    return document


def check_params(model: type[SectionType], document: Mapping[str, Any], where: str) -> SectionType:
    """The sections that `model` names, checked; `where` they come from begins the message of the InputError."""
    mistakes = [f"{key}: unknown section{_nearest(str(key), SECTIONS)}" for key in document if key not in SECTIONS]
    try:
        params = model.model_validate({key: document[key] for key in model.model_fields if key in document})
    except ValidationError as error:
        mistakes += _explain_all(error.errors(), model)
    if mistakes:
        raise InputError("\n  ".join([f"{where}:", *mistakes]) if len(mistakes) > 1 else f"{where}: {mistakes[0]}")
    return params


def _explain_all(errors: Sequence[ErrorDetails], model: type[BaseModel]) -> list[str]:
    """The errors of pydantic, one line a key: a key of several types has one error for each of them."""
    mistakes: dict[str, str] = {}
    for details in errors:
        key = _key(details, model)
        if key in mistakes and " is refused: " in mistakes[key]:
            mistakes[key] += " or " + details["msg"].removeprefix("Input should be ")
        elif key in mistakes:
            mistakes[key] += f"\n  {_explain(details, key, model)}"
        else:
            mistakes[key] = _explain(details, key, model)
    return list(mistakes.values())


def _key(details: ErrorDetails, model: type[BaseModel]) -> str:
    """The key that an error is about, without the names that pydantic gives to the types of a union."""
    parts: list[str] = []
    annotation: Any = model
    for part in map(str, details["loc"]):
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            parts.append(part)
            annotation = annotation.model_fields[part].annotation if part in annotation.model_fields else None
        elif part.isdigit():  # the place in a list
            parts.append(part)
    return ".".join(parts)


def _explain(details: ErrorDetails, key: str, model: type[BaseModel]) -> str:
    """One pydantic error as 'key: what is wrong (what is valid)'."""
    location = [str(part) for part in details["loc"]]
    kind = details["type"]
    if kind == "missing":
        return f"{key}: missing {'section' if len(location) == 1 else 'key'}; params.yaml as committed has it"
    if kind == "extra_forbidden":
        return f"{key}: unknown key{_nearest(location[-1], _keys_beside(location, model))}"
    value = details["input"]
    if kind == "value_error":  # raised by a validator of ours: the words are complete
        return f"{key}: {details['ctx']['error']}" if key else str(details["ctx"]["error"])
    reason = details["msg"][0].lower() + details["msg"][1:]
    return f"{key}: {value!r} is refused: {reason}"


def _keys_beside(location: list[str], model: type[BaseModel]) -> tuple[str, ...]:
    for part in location[:-1]:
        annotation: Any = model.model_fields[part].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return ()
        model = annotation
    return tuple(model.model_fields)


def _nearest(name: str, choices: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, choices, n=1)
    valid = f" (valid: {', '.join(choices)})" if choices else ""
    return f"; did you mean {close[0]!r}?{valid}" if close else valid
