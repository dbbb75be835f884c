"""Sections of params.yaml, read as the stages read them."""

from __future__ import annotations

from typing import Any


def section(name: str) -> Any:
    """`runtime`, `train` or `wandb` as the model of the stages; InputError names a key that they would refuse."""
    from pydantic import create_model

    from stages.core.mirror import WandbParams
    from stages.core.params import Section, load_params
    from stages.core.recipe import TrainParams
    from stages.core.runtime import RuntimeParams

    kind = {"runtime": RuntimeParams, "train": TrainParams, "wandb": WandbParams}[name]
    fields: dict[str, Any] = {name: (kind, ...)}
    return getattr(load_params(create_model("Params", __base__=Section, **fields)), name)
