"""The study of a sweep: what is searched, and Optuna's record of what was tried; it can be taken up again.

sweeps/NAME/study.db     Optuna's storage (sqlite): every trial, the search space, the settings that it began with
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, Trial, TrialState

from stages.core.errors import InputError
from tools.shared import overrides as settings
from tools.shared.overrides import Settings, Value

FOLDER = Path("sweeps")
_RANDOM_TRIALS = 5  # before TPE proposes; Optuna's own 10 would make a sweep of 8 trials a random search
_MOST_CORNERS = 64

Space = dict[str, BaseDistribution]
Direction = Literal["minimize", "maximize"]


@dataclass(frozen=True)
class Question:
    """What a study asks; a study is taken up by the same question only."""

    recipes: list[str]
    fixed: Settings
    space: Space
    metric: str
    direction: Direction
    code: str  # hash of what the trials run

    def described(self, base: Mapping[str, Any]) -> dict[str, Any]:
        """As JSON, with all params that trials start from, but for those that each trial sets, and with their code."""
        return {
            "metric": f"{self.direction} {self.metric}",
            "space": {key: optuna.distributions.distribution_to_json(d) for key, d in sorted(self.space.items())},
            "params": {key: value for key, value in settings.flat(base).items() if key not in self.space},
            "code": self.code,
        }

    def default_name(self) -> str:
        """A name that the same command gives again."""
        words = [self.recipes, self.fixed, sorted(map(str, self.space.items())), self.metric, self.direction]
        return f"sweep-{hashlib.sha256(json.dumps(words, default=str).encode()).hexdigest()[:6]}"


def distribution(override: Override, current: Value) -> BaseDistribution:
    """What Hydra's grammar says about a key, as Optuna's distribution; `current` is the key's value, for its type."""
    swept, word = override.value(), override.input_line
    assert isinstance(swept, (ChoiceSweep, IntervalSweep, RangeSweep))
    if unknown := set(swept.tags) - {"log"}:
        raise InputError(f"{word}: unknown tag {', '.join(sorted(unknown))} (valid: log)")
    log = "log" in swept.tags
    try:
        if isinstance(swept, IntervalSweep):
            low, high = swept.start, swept.end
            assert low is not None
            assert high is not None
            if isinstance(current, int) and not isinstance(current, bool):
                if low != int(low) or high != int(high):
                    raise InputError(f"{word}: {override.key_or_group} is a whole number: give whole ends")
                return IntDistribution(int(low), int(high), log=log)
            return FloatDistribution(low, high, log=log)
        values = settings.swept_values(override)
        if isinstance(swept, RangeSweep) and len(values) > 1 and not swept.shuffle:
            step = values[1] - values[0]
            if step > 0 and all(isinstance(value, int) for value in values):
                return IntDistribution(values[0], values[-1], step=step, log=log)
            if step > 0:
                return FloatDistribution(values[0], values[-1], step=None if log else float(swept.step), log=log)
        if log:
            raise InputError(f"{word}: log goes with interval(...) and range(...)")
        # Optuna takes scalars only: choices are written as in an override.
        return CategoricalDistribution([settings.quoted(value) for value in values])
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{word}: {error}") from None


def value_of(key: str, chosen: Any, space: Space) -> Value:
    """What a trial's parameter means as a value of params.yaml."""
    if isinstance(space[key], CategoricalDistribution):
        _, (override,) = settings.parse([f"{key}={chosen}"])
        return settings.plain(override.value())
    return chosen


def check_space(base: Mapping[str, Any], space: Space, where: str) -> None:
    """InputError for an end or a choice that the stages would refuse whatever the other keys are."""
    ends = {key: _ends(d) for key, d in space.items()}
    errors: dict[tuple[str, Any], InputError] = {}
    good: set[tuple[str, Any]] = set()
    for corner in itertools.islice(_corners(ends), _MOST_CORNERS):
        chosen = {key: value_of(key, value, space) for key, value in corner.items()}
        try:
            settings.check(settings.changed(base, chosen), where)
            good.update(corner.items())
        except InputError as error:
            errors |= dict.fromkeys(corner.items(), error)
    for (key, value), refusal in errors.items():
        if (key, value) not in good and key in str(refusal):
            raise InputError(f"{key}: {value} in the search space: {refusal}")
    if not good:
        raise next(iter(errors.values()))


def _corners(ends: dict[str, list[Any]]) -> itertools.chain[dict[str, Any]]:
    """Combinations of ends: first so few that each end is in one, then all."""
    longest = max(len(values) for values in ends.values())
    few = ({key: values[i % len(values)] for key, values in ends.items()} for i in range(longest))
    return itertools.chain(few, (dict(zip(ends, values, strict=True)) for values in itertools.product(*ends.values())))


def _ends(d: BaseDistribution) -> list[Any]:
    if isinstance(d, CategoricalDistribution):
        return list(d.choices)
    assert isinstance(d, (FloatDistribution, IntDistribution))
    return [d.low, d.high]


# --- Optuna's study -----------------------------------------------------------------------------------------------


def open_study(name: str, question: Question, base: Mapping[str, Any], seed: int, startup: int) -> optuna.Study:
    """Make the study, or take it up; InputError when it has asked something else."""
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = f"sqlite:///{folder / 'study.db'}"
    before = [s for s in optuna.get_all_study_summaries(storage) if s.study_name == name]
    num_before = before[0].n_trials if before else 0
    study = optuna.create_study(
        storage=storage,
        study_name=name,
        direction=question.direction,
        load_if_exists=True,
        # The sampler's state is not stored: with the same seed it would propose the first trials again.
        sampler=optuna.samplers.TPESampler(
            seed=seed + num_before, n_startup_trials=_RANDOM_TRIALS, multivariate=False, constant_liar=True
        ),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=startup, n_warmup_steps=1),
    )
    asked = question.described(base)
    known = study.user_attrs.get("question")
    if known is None:
        study.set_user_attr("question", asked)
    elif known != json.loads(json.dumps(asked)):
        raise InputError(f"study {name} has asked something else: {_difference(known, asked)}; use another --study")
    return study


def _difference(known: dict[str, Any], asked: dict[str, Any]) -> str:
    if known["metric"] != asked["metric"]:
        return f"{known['metric']}, now {asked['metric']}"
    for part in ("space", "params"):
        for key in known[part].keys() | asked[part].keys():
            old, new = known[part].get(key), asked[part].get(key)
            if old != new:
                return f"{key} was {old}, is {new}"
    if known.get("code") != asked["code"]:
        return "its trials ran other code of the stages"
    return "its record is of another version"


def counted(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that were tried to an end; those that an interrupt cut short are tried again and do not count."""
    ended = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
    return [t for t in study.get_trials(deepcopy=False, states=ended) if not t.user_attrs.get("interrupted")]


def broken_off(study: optuna.Study) -> list[Trial]:
    """The trials that a killed sweep left running."""
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return [Trial(study, frozen._trial_id) for frozen in running]


def give_up(study: optuna.Study, trial: Trial, reason: str, again: bool = False) -> None:
    """End a trial without a result; `again`: it was cut short, and its parameters are proposed once more."""
    trial.set_user_attr("reason", reason)
    if again:
        trial.set_user_attr("interrupted", True)
        study.enqueue_trial(trial.params, skip_if_exists=False)
    study.tell(trial, state=TrialState.FAIL)


def best(trials: Sequence[FrozenTrial], direction: Direction) -> FrozenTrial | None:
    """The best of those that have a result."""
    complete = [t for t in trials if t.state is TrialState.COMPLETE and t.value is not None]
    if not complete:
        return None
    sign = 1 if direction == "maximize" else -1
    return max(complete, key=lambda t: (sign * (t.value or 0.0), -t.number))
