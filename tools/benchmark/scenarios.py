"""The scenarios of the retraining benchmark, and what must come of each.

Whether drift does harm is counted: the labelled images tell what the model loses by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Drift = tuple[str, int]


@dataclass(frozen=True)
class Scenario:
    """What production sees, what somebody labelled, and what must come of it."""

    name: str
    drift: Drift | None = None
    promotes: bool = True  # a new model, if the drift does harm
    labels: Literal["right", "wrong", "of clean images"] = "right"
    classes: int | None = None  # that production sees, the first ones; None: all
    simulate: bool = False  # in place of labelled images
    start: Literal["current", "scratch"] = "current"
    killed: Literal["all", "tool"] | None = None  # in mid-train, and run again
    seed: int = 0  # other images


def _drift(kind: str, severity: int, note: str = "", **changes: Any) -> Scenario:
    return Scenario(f"{kind} {severity}{note and ', ' + note}", (kind, severity), **changes)


SCENARIOS = (
    *(Scenario(f"clean images {seed}", seed=seed) for seed in (1, 2, 3)),
    *(Scenario(f"label shift, {n} of 10 classes", classes=n) for n in (1, 2, 4)),
    *(_drift(kind, 1) for kind in ("brightness", "saturate", "pixelate", "jpeg_compression")),
    _drift("jpeg_compression", 5),
    _drift("pixelate", 4),
    _drift("motion_blur", 4),
    _drift("gaussian_blur", 3),
    _drift("gaussian_noise", 4),
    _drift("shot_noise", 5),
    _drift("impulse_noise", 4),
    _drift("snow", 3),
    _drift("frost", 4),
    _drift("fog", 4),
    _drift("brightness", 4),
    _drift("contrast", 2),
    _drift("darkness", 4),
    _drift("spatter", 3),
    _drift("saturate", 5),
    _drift("colour_cast", 5),
    _drift("fog", 4, "simulated", simulate=True),
    _drift("darkness", 4, "from scratch", start="scratch"),
    _drift("darkness", 4, "killed in mid-train", killed="all", seed=4),
    _drift("contrast", 2, "the tool killed, dvc lives on", killed="tool", seed=5),
    _drift("brightness", 4, "wrong labels", labels="wrong", promotes=False),
    _drift("darkness", 4, "labels of clean images", labels="of clean images", promotes=False),
)


class Drop(NamedTuple):
    """What the model loses by the drift, counted on labelled images."""

    value: float  # of top-1
    error: float  # its standard error
    limit: float  # up to which drift is benign

    @property
    def verdicts(self) -> tuple[str, ...]:
        """What the monitor may say: two standard errors around the limit, either."""
        harmful = ("harmful",) if self.value > self.limit - 2 * self.error else ()
        harmless = ("ok", "benign") if self.value < self.limit + 2 * self.error else ()
        return harmless + harmful


def faults(
    scenario: Scenario,
    summary: dict[str, Any],
    drop: Drop,
    status: int,
    before: dict[str, str],
    after: dict[str, str],
) -> list[str]:
    """What is not as it should be."""
    found, decision, verdict = [], summary["decision"], summary["monitor"]["status"]
    right = drop.verdicts if scenario.drift else ("ok",)
    wanted = "nothing to do" if verdict != "harmful" else "promoted" if scenario.promotes else "not promoted"
    for what, is_so, allowed in (
        ("monitor says", verdict, right),
        ("decision is", decision, (wanted,)),
        ("exit status is", status, (1 if wanted == "not promoted" else 0,)),
    ):
        if is_so not in allowed:
            found.append(f"{what} {is_so!r} instead of {' or '.join(map(repr, allowed))}")
    # Under drift the predicted mix may change though the true one does not.
    if scenario.drift is None and summary["monitor"]["label_shift"]["detected"] != (scenario.classes is not None):
        found.append("label shift is not what it is")
    if decision == "promoted":
        if after["tags"] != "classifier@v0.0.1":
            found.append(f"tags: {after['tags']}")
        if after["HEAD"] != summary["commit"] or after["HEAD"] == before["HEAD"]:
            found.append("HEAD is not the promotion's commit")
        changed = [key for key in ("changes", "stale") if after[key] != before[key]]
    else:
        changed = [key for key in before if after[key] != before[key]]
    return found + [f"{key} changed: {after[key]}" for key in changed]
