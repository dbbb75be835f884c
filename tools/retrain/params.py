"""What retraining reads of params.yaml."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from stages.core.params import Section
from stages.core.recipe import ModelParams, TrainParams
from stages.core.runtime import RuntimeParams
from stages.evaluate import EvaluateParams
from stages.extract import DataParams
from stages.preprocess import PreprocessParams


class RetrainParams(Section):
    """The `retrain` section of params.yaml."""

    epochs: Annotated[int, Field(ge=1)]
    lr: Annotated[float, Field(gt=0)]
    warmup_epochs: Annotated[float, Field(ge=0)]
    held_out: Annotated[float, Field(gt=0, lt=1)]
    simulated_share: Annotated[float, Field(gt=0, le=1)]
    min_recovered: Annotated[float, Field(ge=0, le=1)]
    max_clean_loss: Annotated[float, Field(ge=0, le=1)]

    @model_validator(mode="after")
    def _warms_up_in_time(self) -> RetrainParams:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs: {self.warmup_epochs} must be less than epochs ({self.epochs})")
        return self


class Params(Section):
    """What retraining reads of params.yaml."""

    data: DataParams
    preprocess: PreprocessParams
    model: ModelParams
    train: TrainParams
    evaluate: EvaluateParams
    retrain: RetrainParams
    runtime: RuntimeParams
