"""params.yaml as a document to change: reading the file anew for each of hundreds of cases would take minutes."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

from stages.core.params import read_params
from tests.helpers import ROOT, TINY


@cache
def _committed() -> dict[str, Any]:
    return read_params(ROOT / "params.yaml")


def document(overrides: dict[str, Any] | None = None, *, tiny: bool = True) -> dict[str, Any]:
    """The committed params.yaml, made tiny, with further keys such as `train.lr` changed."""
    changed = copy.deepcopy(_committed())
    for key, value in ((TINY if tiny else {}) | (overrides or {})).items():
        section, name = key.split(".")
        changed[section][name] = value
    return changed
