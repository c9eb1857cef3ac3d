"""Pictures of a comparison: curves over the training, trade-offs, difficulty against weight."""

import math
from collections.abc import Callable, Mapping, Sequence

import matplotlib.figure
import numpy as np
import scipy.stats

from mtl_jax.compare.findings import Findings
from mtl_jax.compare.plots import (
    SMALL,
    complete,
    finish,
    line,
    log_if_wide,
    over_seeds,
    panels,
    style,
    thinned,
    whole_epochs,
)
from mtl_jax.compare.problem import Task
from mtl_jax.compare.referee import BASELINE, Comparison
from mtl_jax.compare.run import Place, Run

PLACES: dict[Place, str] = {
    "representation": "at the representation",
    "parameters": "over the shared parameters",
}
CONFLICT = (("share", "conflicting pairs (%)", 100), ("cosine", "mean cosine", 1))
"""What is shown of a run's conflicts: name, label and scale."""
CONFLICT_POINTS = 25
"""Points of a curve of conflicts, which are noisier than weights: of two tasks, 0 or 1 a step."""

Figure = matplotlib.figure.Figure


def figures(comparison: Comparison) -> dict[str, Figure]:
    """All pictures that there is something to show in, by name."""
    makers: dict[str, Callable[[Comparison], Figure | None]] = {
        "metrics": metrics_figure,
        "losses": losses_figure,
        "weights": weights_figure,
        "difficulty": difficulty_figure,
        "front": front_figure,
        "conflict": conflict_figure,
    }
    made = {name: make(comparison) for name, make in makers.items()}
    return {name: figure for name, figure in made.items() if figure is not None}


def metrics_figure(comparison: Comparison) -> Figure:
    """Test metric of each task after every epoch: mean over seeds, band of one deviation."""

    def label(task: Task) -> str:
        return f"test {task.metric}" + (" (%)" if task.percent else "")

    figure, axes = _over_epochs(
        comparison,
        lambda run, task: np.asarray(run.test[task]) * _scale(comparison.problem.tasks[task]),
        label,
    )
    finish(figure, axes, f"{comparison.problem.name}: test metrics", comparison)
    return figure


def losses_figure(comparison: Comparison) -> Figure:
    """Mean training loss of each task in every epoch: mean over seeds, band of one deviation."""
    figure, axes = _over_epochs(
        comparison, lambda run, task: run.train_losses[task], lambda task: "training loss"
    )
    for axis in axes:
        log_if_wide(axis)
    finish(figure, axes, f"{comparison.problem.name}: training losses", comparison)
    return figure


def weights_figure(comparison: Comparison) -> Figure | None:
    """Weight of each task over the steps: mean over seeds, band of one deviation.

    A panel for each weighting, and for more than six tasks a panel for each task. Aggregators,
    which have no weights, are left out.

    Returns:
      The figure; ``None`` if there are aggregators only.
    """
    weighted = {name: runs for name, runs in comparison.runs.items() if runs[0].weights}
    if not weighted:
        return None
    tasks, names = list(comparison.problem.tasks), list(comparison.runs)
    many = len(tasks) > SMALL
    figure, axes = panels(len(tasks) if many else len(weighted), 3.4)
    for column, (name, runs) in enumerate(weighted.items()):
        for number, task in enumerate(tasks):
            centres, _ = thinned(runs[0].weights[task])
            values = over_seeds([thinned(run.weights[task])[1] for run in complete(runs)])
            axis, label = (axes[number], name) if many else (axes[column], task)
            color, kind = style(names.index(name)) if many else style(number)
            line(axis, centres[: values.shape[1]], values, label, color, kind)
            axis.set_title(task if many else name)
    for axis in axes:
        axis.set_xlabel("step")
        axis.set_ylabel("weight")
        if not any((np.asarray(of.get_ydata()) < 0).any() for of in axis.lines):
            axis.set_ylim(bottom=0)
    finish(figure, axes, f"{comparison.problem.name}: weight of each task", comparison)
    return figure


def conflict_figure(comparison: Comparison) -> Figure | None:
    """Share of conflicting pairs of tasks, and their mean cosine, over the steps.

    A row of panels for each place where task gradients were measured, since those at the
    representation and those over the parameters are not the same; a line for each weighting that
    measured them: mean over seeds, band.

    Returns:
      The figure; ``None`` if no weighting measured them.
    """
    names = list(comparison.runs)
    rows = []
    for place, where in PLACES.items():
        measured = {
            name: runs for name, runs in comparison.runs.items() if runs[0].measured_at == place
        }
        if measured:
            rows.append((where, measured))
    if not rows:
        return None
    figure, axes = panels(2 * len(rows), 5.2, columns=2)
    for row, (where, measured) in enumerate(rows):
        for axis, (kind, label, scale) in zip(axes[2 * row :], CONFLICT, strict=False):
            for name, runs in measured.items():
                thin = [thinned(run.conflict[kind], CONFLICT_POINTS) for run in complete(runs)]
                values = over_seeds([means for _, means in thin])
                centres = thin[0][0][: values.shape[1]]
                line(axis, centres, scale * values, name, *style(names.index(name)))
            axis.set_title(where)
            axis.set_xlabel("step")
            axis.set_ylabel(label)
        axes[2 * row].set_ylim(0, 100)
        axes[2 * row + 1].axhline(0, color="black", linewidth=0.8)
    finish(figure, axes, f"{comparison.problem.name}: conflicts of the tasks", comparison)
    return figure


def front_figure(comparison: Comparison) -> Figure | None:
    """The test metrics of two tasks against each other after the last epoch.

    A small point for each seed and a large one for their mean; a line joins the means on the Pareto
    front.

    Returns:
      The figure; ``None`` if there are not two tasks, or every weighting failed.
    """
    tasks = comparison.problem.tasks
    found = Findings(comparison)
    scales = np.array([[_scale(task)] for task in tasks.values()])
    rows = {name: scales * list(row.values()) for name, row in found.values.items()}
    rows = {name: row for name, row in rows.items() if np.isfinite(row).any(axis=1).all()}
    if len(tasks) != 2 or not rows:
        return None
    figure, (axis,) = panels(1, 6.0, height=4.8)
    for number, (name, points) in enumerate(rows.items()):
        color, marker = style(number)[0], "os^"[number // 10 % 3]
        if name not in comparison.runs:
            color, marker = "black", "x"
        axis.scatter(*points, s=14, color=color, alpha=0.45, marker=marker, linewidths=1)
        axis.scatter(*np.nanmean(points, axis=1), s=80, color=color, label=name, marker=marker)
    front = np.array([rows[name].mean(axis=1) for name, on_it in found.front.items() if on_it])
    if len(front):
        x, y = front[np.argsort(front[:, 0])].T
        ring = {"markersize": 13, "markerfacecolor": "none", "markeredgecolor": "gray"}
        axis.plot(x, y, "o--", color="gray", linewidth=1, label="Pareto front", zorder=0, **ring)
    for (task, of), label in zip(tasks.items(), (axis.set_xlabel, axis.set_ylabel), strict=True):
        direction = "higher" if of.higher_is_better else "lower"
        unit = ", %" if of.percent else ""
        label(f"{task}: test {of.metric}{unit} ({direction} is better)")
    title = f"{comparison.problem.name}: one task against the other"
    finish(figure, [axis], title, comparison, "small: each seed, large: mean of")
    return figure


def difficulty_figure(comparison: Comparison) -> Figure | None:
    """How hard each task is against the weight that it got: whether harder tasks got more.

    A task is the harder, the more of its first epoch's training loss is left in the last epoch:
    where it was trained alone, since a weighting changes what is left, or with equal weights if
    that was not done. Its weight is the mean over all steps, relative to the mean of the tasks. For
    three tasks and more the titles have the rank correlation of the two, Spearman's.

    Returns:
      The figure; ``None`` if there is one task, one epoch, no weights, or losses that are not
      positive.
    """
    tasks = list(comparison.problem.tasks)
    weighted = {name: runs for name, runs in comparison.runs.items() if runs[0].weights}
    of_task = comparison.alone or dict.fromkeys(tasks, comparison.runs.get(BASELINE, ()))
    left = {task: _left(of_task.get(task, ()), task) for task in tasks}
    if len(tasks) < 2 or not weighted or not all(len(of) for of in left.values()):
        return None
    figure, axes = panels(len(weighted), 3.4)
    for axis, (name, runs) in zip(axes, weighted.items(), strict=True):
        weights = {task: _relative_weights(complete(runs), tasks, task) for task in tasks}
        for number, (task, of) in enumerate(weights.items()):
            if not of.size:
                continue
            axis.errorbar(
                left[task].mean(),
                of.mean(),
                xerr=left[task].std(),
                yerr=of.std(),
                fmt="o",
                color=style(number)[0] if len(tasks) <= SMALL else "C0",
                label=task if len(tasks) <= SMALL else None,
                elinewidth=1,
            )
        axis.axhline(1, color="gray", linewidth=0.8, zorder=0)
        axis.set_title(name + _correlation(left, weights))
        axis.set_xlabel("share of the first loss left")
        axis.set_ylabel("weight, relative to the mean")
        axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
    how = "trained alone" if comparison.alone else "with equal weights"
    title = f"{comparison.problem.name}: weight against difficulty, {how}"
    finish(figure, axes, title, comparison)
    return figure


def _over_epochs(
    comparison: Comparison,
    values_of: Callable[[Run, str], Sequence[float] | np.ndarray],
    label: Callable[[Task], str],
) -> tuple[Figure, list]:
    """A panel for each task, a line for each weighting and for the task alone."""
    problem = comparison.problem
    figure, axes = panels(len(problem.tasks))
    for axis, (task, description) in zip(axes, problem.tasks.items(), strict=True):
        lines = [
            (name, runs, *style(number))
            for number, (name, runs) in enumerate(comparison.runs.items())
        ]
        if comparison.alone:
            lines.append(("task alone", comparison.alone[task], "black", "--"))
        for name, runs, color, kind in lines:
            values = over_seeds([values_of(run, task) for run in runs if run.failure is None])
            line(axis, np.arange(1, values.shape[1] + 1), values, name, color, kind)
        axis.set_title(task)
        axis.set_ylabel(label(description))
        whole_epochs(axis)
    return figure, axes


def _left(runs: Sequence[Run], task: str) -> np.ndarray:
    """The share of the first epoch's loss that is left in the last one, of each run."""
    losses = [run.train_losses[task] for run in runs if run.failure is None and run.epochs > 1]
    shares = [of[-1] / of[0] for of in losses if min(of[0], of[-1]) > 0]
    return np.array([share for share in shares if math.isfinite(share)])


def _relative_weights(runs: Sequence[Run], tasks: Sequence[str], task: str) -> np.ndarray:
    """The mean weight of a task over the steps that have it, relative to all tasks', of each run.

    Runs that never gave it a weight are left out.
    """
    found = []
    for run in runs:
        finite = {name: run.weights[name][np.isfinite(run.weights[name])] for name in tasks}
        means = {name: float(of.mean()) for name, of in finite.items() if of.size}
        if task in means and sum(means.values()):
            found.append(means[task] / np.mean(list(means.values())))
    return np.array(found)


def _correlation(difficulty: Mapping[str, np.ndarray], weights: Mapping[str, np.ndarray]) -> str:
    """Spearman's correlation of the means, for a title; empty where it says nothing."""
    of_both = [task for task, of in weights.items() if of.size]
    pairs = np.array([(difficulty[task].mean(), weights[task].mean()) for task in of_both])
    if len(pairs) < 3 or (np.ptp(pairs, axis=0) < 1e-6).any():
        return ""
    correlation, _ = scipy.stats.spearmanr(*pairs.T)
    return f" ({correlation:+.2f})"


def _scale(task: Task) -> int:
    return 100 if task.percent else 1
