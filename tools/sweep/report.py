"""What a sweep found, as a table and as a picture."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import optuna
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from stages.core.figures import png
from stages.core.tables import as_csv
from tools.sweep.study import Direction, best

_STATES = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}
_WITHOUT_RESULT = {TrialState.PRUNED: "tab:grey", TrialState.FAIL: "tab:red"}  # and their colour
_AT_THE_BOTTOM = 0.02  # of the axes' height: where crosses stand for them
_MOST_PANELS = 6
_LONG_LABELS = 24  # letters that stand side by side below a panel
_FEWEST_FOR_IMPORTANCE = 4  # complete trials


def rows(trials: Sequence[FrozenTrial], study: str, metric: str) -> list[dict[str, Any]]:
    """One a trial, those with a result first as they are numbered."""
    keys = list(dict.fromkeys(key for trial in trials for key in trial.params))
    return [
        {
            "experiment": f"{study}-{trial.number}",
            "state": "interrupted" if trial.user_attrs.get("interrupted") else _STATES[trial.state],
            metric: trial.value if trial.state is TrialState.COMPLETE and trial.value is not None else "",
            "epochs": len(trial.intermediate_values),
            **{key: trial.params.get(key, "") for key in keys},
            "reason": trial.user_attrs.get("reason", ""),
        }
        for trial in trials
    ]


def csv(trials: Sequence[FrozenTrial], study: str, metric: str) -> str:
    """The table as CSV."""
    return as_csv(rows(trials, study, metric))


def table(trials: Sequence[FrozenTrial], study: str, metric: str) -> str:
    """The table as aligned text; a reason has the last column."""
    if not trials:
        return "no trials"
    cells = [list(row) for row in rows(trials, study, metric)[:1]]
    for row in rows(trials, study, metric):
        cells.append([f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()])
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]) - 1)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


def picture(study: optuna.Study, metric: str, direction: Direction) -> bytes:
    """PNG: the metric by trial, the epochs of every trial, and the metric by each parameter."""
    trials = study.get_trials(deepcopy=False)
    complete = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    shares = importances(study)
    keys = sorted({key for trial in complete for key in trial.params}, key=lambda key: -shares.get(key, 0.0))
    shown = keys[:_MOST_PANELS]
    columns = 2 if len(shown) <= 2 else 3
    num_rows = 1 + -(-len(shown) // columns)
    figure = plt.figure(figsize=(4.6 * columns, 3.5 * num_rows), layout="constrained")
    grid = figure.add_gridspec(num_rows, 2 * columns)
    _draw_history(figure.add_subplot(grid[0, :columns]), trials, metric, direction)
    _draw_epochs(figure.add_subplot(grid[0, columns:]), trials, direction)
    for i, key in enumerate(shown):
        row, column = 1 + i // columns, i % columns
        axes = figure.add_subplot(grid[row, 2 * column : 2 * column + 2])
        _draw_slice(axes, trials, key, metric, shares.get(key))
    figure.suptitle(f"Study {study.study_name}: {len(complete)} of {len(trials)} trials are complete")
    return png(figure)


def importances(study: optuna.Study) -> dict[str, float]:
    """Share of the metric's variance that each parameter explains (fANOVA); empty where it says nothing."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    common = set.intersection(*(set(trial.params) for trial in complete)) if complete else set()
    if len(complete) < _FEWEST_FOR_IMPORTANCE or len(common) < 2 or len({trial.value for trial in complete}) < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return optuna.importance.get_param_importances(study, evaluator=evaluator)


def _draw_history(axes: Axes, trials: Sequence[FrozenTrial], metric: str, direction: Direction) -> None:
    complete = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    axes.plot([t.number for t in complete], [t.value or 0.0 for t in complete], "o", color="tab:blue", label="complete")
    winners = [best(complete[: i + 1], direction) for i in range(len(complete))]
    values = [winner.value or 0.0 for winner in winners if winner is not None]
    # To the last trial: those that were pruned or failed after the best have not changed it.
    numbers = [*(t.number for t in complete), trials[-1].number]
    axes.step(numbers, [*values, values[-1]], where="post", color="tab:orange", label="best so far", zorder=1)
    for state, colour in _WITHOUT_RESULT.items():
        numbers = [trial.number for trial in trials if trial.state is state]
        if numbers:
            height = [_AT_THE_BOTTOM] * len(numbers)
            axes.plot(numbers, height, "x", color=colour, label=_STATES[state], transform=axes.get_xaxis_transform())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(title="Trials", xlabel="trial", ylabel=metric)
    # Below, where it hides no cross.
    axes.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)


def _draw_epochs(axes: Axes, trials: Sequence[FrozenTrial], direction: Direction) -> None:
    colours = {TrialState.COMPLETE: "tab:blue", TrialState.PRUNED: "tab:grey"}
    for trial in sorted(trials, key=lambda trial: trial.state is not TrialState.COMPLETE):  # the short ones on top
        epochs = [epoch + 1 for epoch in sorted(trial.intermediate_values)]
        values = [trial.intermediate_values[epoch - 1] for epoch in epochs]
        colour = colours.get(trial.state, "tab:red")
        axes.plot(epochs, values, marker=".", color=colour, alpha=0.6, linewidth=1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    measured = "top-1" if direction == "maximize" else "loss"
    axes.set(title="Epochs (grey: pruned, red: failed)", xlabel="epoch", ylabel=f"validation {measured}")


def _draw_slice(axes: Axes, trials: Sequence[FrozenTrial], key: str, metric: str, share: float | None) -> None:
    found = [trial for trial in trials if key in trial.params]
    kind = found[0].distributions[key]

    def place(trial: FrozenTrial) -> Any:
        value = trial.params[key]
        return kind.choices.index(value) if isinstance(kind, CategoricalDistribution) else value

    complete = [trial for trial in found if trial.state is TrialState.COMPLETE]
    dots = axes.scatter(
        [place(t) for t in complete],
        [t.value or 0.0 for t in complete],
        c=[t.number for t in complete],
        cmap="Blues",
        edgecolors="tab:blue",
        vmin=0,
        vmax=max(1, trials[-1].number),
    )
    for state, colour in _WITHOUT_RESULT.items():
        places = [place(trial) for trial in found if trial.state is state]
        axes.plot(places, [_AT_THE_BOTTOM] * len(places), "x", color=colour, transform=axes.get_xaxis_transform())
    if isinstance(kind, CategoricalDistribution):
        labels = [str(choice) for choice in kind.choices]
        long = len("".join(labels)) > _LONG_LABELS
        axes.set_xticks(range(len(labels)), labels, rotation=20 if long else 0, ha="right" if long else "center")
        axes.set_xlim(-0.5, len(kind.choices) - 0.5)
    elif isinstance(kind, (FloatDistribution, IntDistribution)) and kind.log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    title = key if share is None else f"{key}: {share:.0%} of the variance"
    axes.set(title=title, xlabel=key, ylabel=metric)
    axes.figure.colorbar(dots, ax=axes, label="trial", ticks=MaxNLocator(nbins=6, integer=True))
