"""Where the time of a train step goes, out of the profiler's trace."""

from __future__ import annotations

import gzip
import json
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TRACE = Path("data/profile/trace-1.json.gz")
MAX_BYTES = 100_000_000  # of a compressed trace; a larger one takes minutes to read

_OTHER = "other"
_NO_OPERATOR = "Python, and waiting"
# The first word that a name contains decides; of operators of the CPU and kernels of CUDA.
_CATEGORIES = {
    "convolution": ("conv", "wgrad", "dgrad", "implicit_gemm"),
    "matrix products": ("aten::mm", "addmm", "bmm", "matmul", "linear", "gemm", "einsum"),
    "normalisation": ("batch_norm", "layer_norm", "group_norm", "norm_kernel", "bn_"),
    "activation, pooling, loss": ("relu", "gelu", "silu", "softmax", "threshold", "pool", "nll_loss", "cross_entropy"),
    "copies and casts": ("copy_", "::to", "clone", "memcpy", "memset", "contiguous", "fill_", "zero_"),
}


@dataclass(frozen=True)
class Profile:
    """Milliseconds a recorded step by category and by operator, the most expensive first."""

    num_steps: int
    step_ms: float
    on_gpu: bool
    categories: list[tuple[str, float]]
    operators: list[tuple[str, float, float]]  # name, milliseconds, calls


def read_profile(path: Path = TRACE) -> Profile | None:
    """The profile of a trace as the stage `profile` writes it; None where there is none, or it is too large."""
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        return None
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
        return _profile(events)
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError):
        return None  # cut or damaged: as if there were none


def _profile(events: list[dict[str, Any]]) -> Profile | None:
    steps = [event for event in events if event["name"].startswith("ProfilerStep")
             and event.get("cat") == "user_annotation"]  # fmt: skip
    if not steps:
        return None
    kernels = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    times: Iterable[tuple[str, str, float]]
    if kernels:
        times = ((category(event["name"]), event["name"], event["dur"]) for event in kernels)
    else:
        times = _self_times([event for event in events if event.get("cat") in ("cpu_op", "user_annotation")])
    by_category: dict[str, float] = defaultdict(float)
    by_operator: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for kind, name, microseconds in times:
        by_category[kind] += microseconds
        if kernels or "::" in name:
            by_operator[name][0] += microseconds
            by_operator[name][1] += 1
    total = sum(event["dur"] for event in steps)
    rest = total - sum(by_category.values())
    by_category["GPU idle" if kernels else _NO_OPERATOR] += max(0.0, rest)
    unit = 1e3 * len(steps)
    return Profile(
        num_steps=len(steps),
        step_ms=total / unit,
        on_gpu=bool(kernels),
        categories=sorted(((kind, time / unit) for kind, time in by_category.items()), key=lambda one: -one[1]),
        operators=sorted(
            ((name, time / unit, calls / len(steps)) for name, (time, calls) in by_operator.items()),
            key=lambda one: -one[1],
        ),
    )


def category(name: str) -> str:
    """What an operator or kernel does, by its name."""
    lower = name.lower()
    for kind, words in _CATEGORIES.items():
        if any(word in lower for word in words):
            return kind
    return _OTHER


def _self_times(events: list[dict[str, Any]]) -> Iterator[tuple[str, str, float]]:
    """(category, name, microseconds without what it calls) of the nested events of the thread of the train step.

    What the loader and the optimizer call is counted for them, whatever operator it is. Other threads work beside the
    step, so their time would be counted twice.
    """
    thread = next(event["tid"] for event in events if event["name"].startswith("ProfilerStep"))
    chosen = sorted((event for event in events if event["tid"] == thread), key=lambda one: (one["ts"], -one["dur"]))
    stack: list[tuple[dict[str, Any], str, list[float]]] = []

    def finished(until: float) -> Iterator[tuple[str, str, float]]:
        while stack and stack[-1][0]["ts"] + stack[-1][0]["dur"] <= until:
            event, kind, inner = stack.pop()
            yield kind, event["name"], max(0.0, event["dur"] - sum(inner))

    for event in chosen:
        yield from finished(event["ts"])
        above = stack[-1][1] if stack else _NO_OPERATOR
        if stack:
            stack[-1][2].append(event["dur"])
        stack.append((event, _kind(event, above), []))
    yield from finished(float("inf"))


def _kind(event: dict[str, Any], above: str) -> str:
    name = event["name"]
    if above in ("loader", "optimizer"):
        return above
    if event["cat"] == "user_annotation":
        if name == "load":
            return "loader"
        return "optimizer" if name.startswith("Optimizer.step") else _NO_OPERATOR
    return category(name)
