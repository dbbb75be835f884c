"""The `model` and `train` sections of params.yaml: what is trained and how.

It imports neither torch nor timm (seconds each), so that a wrong value is refused at once.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from stages.core.errors import InputError
from stages.core.params import Section

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Probability = Annotated[float, Field(ge=0, le=1)]


class ModelParams(Section):
    """The `model` section."""

    name: str
    pretrained: bool
    weights: Annotated[str, Field(min_length=1)] | None

    @field_validator("name")
    @classmethod
    def _is_in_timm(cls, name: str) -> str:
        architecture = name.split(".")[0]
        if architecture not in timm_architectures():
            close = difflib.get_close_matches(architecture, timm_architectures(), n=3)
            hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
            raise ValueError(
                f"{name!r} is no model of timm{hint} (valid: the {len(timm_architectures())} names that "
                '`python -c "import timm; print(timm.list_models())"` lists)'
            )
        return name

    @model_validator(mode="after")
    def _has_one_origin(self) -> ModelParams:
        if self.pretrained and self.weights is not None:
            raise ValueError("pretrained (the hub's weights) and weights (a local file) exclude each other: keep one")
        return self


class TrainParams(Section):
    """The `train` section."""

    seed: Annotated[int, Field(ge=0, lt=2**63)]
    image_size: Annotated[int, Field(ge=8, le=1024)]
    progressive: Annotated[int, Field(ge=8, le=1024)] | None
    epochs: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)]
    grad_accumulation: Annotated[int, Field(ge=1)]
    optimizer: Literal["adamw", "sgd", "muon"]
    lr: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    momentum: Annotated[float, Field(ge=0, lt=1)]
    schedule: Literal["cosine", "linear", "constant"]
    warmup_epochs: Annotated[float, Field(ge=0)]
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    grad_clip: Annotated[float, Field(gt=0)] | None
    crop_scale: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=2, max_length=2)]
    crop_ratio: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=2, max_length=2)]
    flip: Probability
    ema_decay: Annotated[float, Field(ge=0, lt=1)]
    precision: Precision
    log_every: Annotated[int, Field(ge=1)]

    @property
    def smallest_side(self) -> int:
        """Side in pixels of the smallest images that are trained on."""
        return self.image_size if self.progressive is None else self.progressive

    def share(self, num_processes: int) -> int:
        """Images of a batch that each of several processes computes; InputError when its parts would not be whole."""
        num_parts = num_processes * self.grad_accumulation
        if self.batch_size % num_parts:
            raise InputError(
                f"params.yaml: train.batch_size: {self.batch_size} does not divide into {num_processes} processes "
                f"with train.grad_accumulation {self.grad_accumulation}: use a multiple of {num_parts}"
            )
        return self.batch_size // num_processes

    @field_validator("crop_scale", "crop_ratio")
    @classmethod
    def _is_a_range(cls, value: list[float]) -> list[float]:
        if value[0] > value[1]:
            raise ValueError(f"{value} must be [low, high] with low <= high")
        return value

    @model_validator(mode="after")
    def _warms_up_in_time(self) -> TrainParams:
        if self.warmup_epochs >= self.epochs and self.warmup_epochs > 0:
            raise ValueError(f"warmup_epochs: {self.warmup_epochs} must be less than epochs ({self.epochs})")
        return self

    @model_validator(mode="after")
    def _parts_are_whole(self) -> TrainParams:
        if self.batch_size % self.grad_accumulation:
            raise ValueError(f"grad_accumulation: {self.grad_accumulation} must divide batch_size ({self.batch_size})")
        if self.progressive is not None and self.progressive > self.image_size:
            raise ValueError(f"progressive: {self.progressive} must be at most image_size ({self.image_size})")
        return self


@cache
def timm_architectures() -> tuple[str, ...]:
    """The names of timm.list_models(), read from timm's sources: importing timm takes seconds."""
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("timm is not installed: run `make setup`")
    pattern = re.compile(r"^@register_model\n(?:@.*\n)*def (\w+)\(", re.MULTILINE)
    sources = sorted((Path(spec.origin).parent / "models").glob("*.py"))
    return tuple(sorted({name for source in sources for name in pattern.findall(source.read_text("utf-8"))}))
