"""params.yaml as a document to change: reading the file anew for each of hundreds of cases would take minutes."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

from stages.core.params import read_params
from tests.helpers import DEFAULT_PARAMS, TINY


@cache
def _defaults() -> dict[str, Any]:
    return read_params(DEFAULT_PARAMS)


def document(overrides: dict[str, Any] | None = None, *, tiny: bool = True) -> dict[str, Any]:
    """The default params, made tiny, with further keys such as `train.lr` changed."""
    changed = copy.deepcopy(_defaults())
    for key, value in ((TINY if tiny else {}) | (overrides or {})).items():
        section, name = key.split(".")
        changed[section][name] = value
    return changed
