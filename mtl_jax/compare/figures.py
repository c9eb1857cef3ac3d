"""The pictures of a comparison: changes, curves over the training, trade-offs, difficulty."""

import math
import textwrap
from collections.abc import Callable, Sequence

import matplotlib.figure
import matplotlib.ticker
import numpy as np
import scipy.stats
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection

from mtl_jax.compare.analysis import ALONE, Analysis, Estimate
from mtl_jax.compare.results import BASELINE, POINTS, Place, Run
from mtl_jax.evaluation._paired import FEWEST_SEEDS

PLACES: dict[Place, str] = {
    "representation": "at the representation",
    "parameters": "over the shared parameters",
}
CONFLICT = (("share", "conflicting pairs (%)", 100), ("cosine", "mean cosine", 1))
"""What is shown of a run's conflicts: name, label and scale."""
CONFLICT_POINTS = 25
"""Points of a curve of conflicts, which are noisier than weights: of two tasks, 0 or 1 a step."""
LEGEND_LINE = 0.24
"""The height of a line of the legend, in inches."""
LONGEST_LABEL = 9
"""Longer names of tasks stand upright under a table's columns."""
LONGEST_STEP = 0.05
"""Between known points farther apart than this share of the axis, unless all are, is a gap."""
COLORED = 2
"""Relative weights from 2 to the power of minus this to 2 to the power of it differ in color."""
LOWEST = 5
"""Of many tasks, relative weights are drawn down to 2 to the power of minus this."""
MOST_BANDS = 3
"""More bands over each other hide each other, and the lines: a panel with more has none."""
SMALL = 6
"""With more panels they are small, and more of them in a row."""

Figure = matplotlib.figure.Figure


CAPTIONS = {
    "changes": (
        "What every task gains (right of 0) or loses: from equal weights, and from being trained "
        "alone, where that was done. Mean over the seeds with its 95 % interval, the best mean on "
        "top."
    ),
    "metrics": (
        "Every test metric after every epoch: which weighting learns faster, and how far. What is "
        "outside the range of the curves after the first quarter is cut off."
    ),
    "losses": "The mean training loss in every epoch: whether a task still learns at the end.",
    "weights": (
        "The weight of each task over the training steps, relative to the mean of the tasks: what "
        "a weighting prefers, and when. That mean, which may rise or fall, is not shown."
    ),
    "difficulty": (
        "Whether a weighting gives harder tasks more weight: the mean weight of each task over the "
        "training, relative to the mean of the tasks. To the right are the tasks of which more of "
        "the first epoch's training loss is left in the last one; from three tasks on the rank "
        "correlation of the two is in parentheses."
    ),
    "front": (
        "What one metric gains and the other one loses: on the Pareto front no other weighting is "
        "better in one and as good in the other."
    ),
    "conflict": (
        "How the tasks' gradients lie to each other over the training steps: two of them conflict "
        "where their cosine is negative, and hardly do where it is near 0, at right angles."
    ),
}
"""What is to be seen in each picture, in the order of the page."""


def figures(analysis: Analysis) -> dict[str, Figure]:
    """All pictures that there is something to show in, by name."""
    makers: dict[str, Callable[[Analysis], Figure | None]] = {
        "changes": changes_figure,
        "metrics": metrics_figure,
        "losses": losses_figure,
        "weights": weights_figure,
        "difficulty": difficulty_figure,
        "front": front_figure,
        "conflict": conflict_figure,
    }
    made = {name: make(analysis) for name, make in makers.items()}
    return {name: figure for name, figure in made.items() if figure is not None}


def changes_figure(analysis: Analysis) -> Figure | None:
    """The relative change of every task: from equal weights, and from being trained alone.

    A row for each weighting, the best mean on top; ``None`` if there is nothing to compare with.
    """
    references = [one for one in (BASELINE, ALONE) if one in analysis.values]
    means = {
        (name, reference): mean
        for name in analysis.values
        for reference in references
        if (mean := analysis.mean_change(name, reference)) and math.isfinite(mean.mean)
    }
    # Equal weights stand where nothing is gained; each task alone, only in their panel.
    order = {name: mean.mean for (name, of), mean in means.items() if of == references[0]}
    order |= {BASELINE: 0.0} if (BASELINE, ALONE) in means else {}
    if not order:
        return None
    names = sorted(order, key=lambda name: -order[name])
    tasks = list(analysis.task_changes(*next(iter(means))))
    few = len(tasks) <= SMALL
    size = (0.6 + 3.8 * len(references), 1.2 + 0.42 * len(names))
    figure = Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(1, len(references), sharey=True, squeeze=False).flat)
    # The mean above a few tasks, so that it hides none of them, and among many.
    offsets = np.linspace(-0.3, 0.3, len(tasks) + 1)
    offsets[0] = offsets[0] if 1 < len(tasks) <= SMALL else 0
    for axis, reference in zip(axes, references, strict=True):
        for place, name in enumerate(names):
            if (name, reference) not in means:
                continue
            mean, of_tasks = means[name, reference], analysis.task_changes(name, reference)
            for number, task in enumerate(tasks if len(tasks) > 1 else []):
                found = Estimate.from_values(of_tasks[task])
                axis.errorbar(
                    100 * found.mean,
                    place + offsets[number + 1],
                    xerr=100 * np.nan_to_num(found.half_width) if few else None,
                    fmt="o",
                    markersize=4 if few else 3,
                    elinewidth=1,
                    color=style(number)[0] if few else "0.6",
                    label=_label(task) if few else "a task",
                )
            axis.errorbar(
                100 * mean.mean,
                place + offsets[0],
                xerr=100 * np.nan_to_num(mean.half_width),
                fmt="D",
                markersize=6,
                capsize=3,
                color="black",
                label="mean of the tasks" if len(tasks) > 1 else _label(tasks[0]),
                zorder=3,
            )
        axis.axvline(0, color="gray", linewidth=0.8, zorder=0)
        against = "each task alone" if reference == ALONE else "equal weights"
        axis.set_xlabel(f"change from {against} (%)")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    title = f"{analysis.problem}: change of every task, more is better"
    few_seeds = len(analysis.seeds) < FEWEST_SEEDS
    finish(figure, axes, title, analysis, "mean over" if few_seeds else "95 % intervals over")
    return figure


def metrics_figure(analysis: Analysis) -> Figure | None:
    """Every test metric after every epoch: mean over seeds, band of one deviation."""
    columns = analysis.columns
    if not columns:
        return None
    figure, axes = panels(len(columns))
    several = any(len(metrics) > 1 for metrics in analysis.info.tasks.values())
    for axis, column in zip(axes, columns, strict=True):
        _over_epochs(
            analysis,
            axis,
            column.task,
            lambda run, column=column: (
                column.scale * np.array(run.metrics["test"][column.task][column.metric])
            ),
        )
        _without_the_start(axis)
        unit = column.info.unit
        axis.set_title(column.name)
        if several:  # the title names the metric
            axis.set_ylabel(unit)
        else:
            axis.set_ylabel(f"test {column.metric}" + f" ({unit})" * bool(unit))
    finish(figure, axes, f"{analysis.problem}: test metrics", analysis)
    return figure


def losses_figure(analysis: Analysis) -> Figure | None:
    """Mean training loss of each task in every epoch: mean over seeds, few with a band."""
    tasks = list(analysis.info.tasks)
    figure, axes = panels(len(tasks))
    for axis, task in zip(axes, tasks, strict=True):
        _over_epochs(
            analysis, axis, task, lambda run, task=task: np.array(run.train_losses.get(task, ()))
        )
        axis.set_title(task)
        axis.set_ylabel("training loss")
        _log_if_wide(axis)
    finish(figure, axes, f"{analysis.problem}: training losses", analysis)
    return figure


def weights_figure(analysis: Analysis) -> Figure | None:
    """Weight of each task over the steps, relative to the mean of the tasks that have one.

    Mean over seeds, band of one deviation; all panels have one scale.

    A panel for each weighting, and for more than six tasks a panel for each task. Aggregators,
    which have no weights, are left out; ``None`` if there are aggregators only.
    """
    weighted = _weighted(analysis)
    if not weighted:
        return None
    tasks, names = list(analysis.info.tasks), list(analysis.weightings)
    many = len(tasks) > SMALL
    figure, axes = panels(len(tasks) if many else len(weighted))
    for column, (name, runs) in enumerate(weighted.items()):
        steps, thin = _steps(runs, POINTS)
        relative = [_relative_weights(run, tasks) for run in thin]
        for number, task in enumerate(tasks):
            values = over_seeds([run[task] for run in relative])
            axis, label = (axes[number], name) if many else (axes[column], task)
            color, kind = style(names.index(name)) if many else style(number)
            line(axis, steps, values, label, color, kind)
            axis.set_title(task if many else name)
    drawn = [np.asarray(curve.get_ydata(), float) for axis in axes for curve in axis.lines]
    lowest = min(map(np.nanmin, drawn), default=0)
    for axis in axes:
        axis.set_ylabel("relative weight")
        axis.sharey(axes[0])
        axis.label_outer(remove_inner_ticks=False)  # those of the first column
        axis.xaxis.set_tick_params(labelbottom=True)
        axis.set_xlabel("step")
    if many and lowest >= 0:
        axes[0].set_yscale("log", base=4)
        axes[0].yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axes[0].set_ylim(max(lowest, 2.0**-LOWEST), 1.3 * len(tasks))
    else:
        axes[0].set_ylim(bottom=None if lowest < 0 else 0)
    finish(figure, axes, f"{analysis.problem}: weight of each task", analysis)
    return figure


def conflict_figure(analysis: Analysis) -> Figure | None:
    """Share of conflicting pairs of tasks, and their mean cosine, over the steps.

    A row of panels for each place where task gradients were measured, since those at the
    representation and those over the parameters are not the same; a line for each weighting that
    measured them: mean over seeds, band. ``None`` if no weighting measured them.
    """
    names = list(analysis.weightings)
    rows = []
    for place, where in PLACES.items():
        measured = {n: r for n, r in analysis.weightings.items() if r[0].measured_at == place}
        if measured:
            rows.append((where, measured))
    if not rows:
        return None
    figure, axes = panels(2 * len(rows), 4.2, columns=2)
    for row, (where, measured) in enumerate(rows):
        for axis, (kind, label, scale) in zip(axes[2 * row :], CONFLICT, strict=False):
            for name, runs in measured.items():
                steps, thin = _steps(runs, CONFLICT_POINTS)
                values = over_seeds([run.conflict[kind] for run in thin])
                line(axis, steps, scale * values, name, *style(names.index(name)))
            axis.set_title(where)
            axis.set_xlabel("step")
            axis.set_ylabel(label)
        axes[2 * row].set_ylim(0, 100)
        axes[2 * row + 1].axhline(0, color="black", linewidth=0.8)
    finish(figure, axes, f"{analysis.problem}: conflicts of the tasks", analysis)
    return figure


def front_figure(analysis: Analysis) -> Figure | None:
    """Two test metrics against each other after the last epoch.

    A small point for each seed and a large one for their mean; a line joins the means on the
    Pareto front. ``None`` if there are not two metrics, or every weighting failed.
    """
    columns = analysis.columns
    scales = np.array([[column.scale] for column in columns])
    rows = {name: scales * values for name, values in analysis.values.items() if columns}
    rows = {name: row for name, row in rows.items() if np.isfinite(row).any(axis=1).all()}
    if len(columns) != 2 or not rows:
        return None
    figure, (axis,) = panels(1, 4.8, height=4.2)
    for number, (name, points) in enumerate(rows.items()):
        color, marker = style(number)[0], "os^"[number // 10 % 3]
        if name == ALONE:
            color, marker = "black", "x"
        axis.scatter(*points, s=14, color=color, alpha=0.45, marker=marker, linewidths=1)
        axis.scatter(
            *np.nanmean(points, axis=1), s=80, color=color, label=_label(name), marker=marker
        )
    front = np.array([rows[row.name].mean(axis=1) for row in analysis.rows if row.on_front])
    if len(front):
        x, y = front[np.argsort(front[:, 0])].T
        ring = {"markersize": 13, "markerfacecolor": "none", "markeredgecolor": "gray"}
        axis.plot(x, y, "o--", color="gray", linewidth=1, label="Pareto front", zorder=0, **ring)
    for column, label in zip(columns, (axis.set_xlabel, axis.set_ylabel), strict=True):
        direction = "higher" if column.info.higher_is_better else "lower"
        unit = f", {column.info.unit}" if column.info.unit else ""
        label(f"{column.task}: test {column.metric}{unit} ({direction} is better)")
    title = f"{analysis.problem}: one metric against the other"
    finish(figure, [axis], title, analysis, "small: each seed, large: mean of")
    return figure


def difficulty_figure(analysis: Analysis) -> Figure | None:
    """The weight that each task got, from the easiest to the hardest one.

    A task is the harder, the more of its first epoch's training loss is left in the last epoch:
    where it was trained alone, since a weighting changes what is left, or with equal weights if
    that was not done. Its weight is the mean over all steps, relative to the mean of the tasks.
    Beside the names is the rank correlation of the two, Spearman's, from three tasks on.

    ``None`` for a single task, for one epoch, without weights, and for losses that are not
    positive.
    """
    tasks = list(analysis.info.tasks)
    weighted = _weighted(analysis)
    of_task = analysis.alone or dict.fromkeys(tasks, analysis.weightings.get(BASELINE, []))
    left = {task: _left(of_task.get(task, ()), task) for task in tasks}
    if len(tasks) < 2 or not weighted or not all(len(shares) for shares in left.values()):
        return None
    tasks.sort(key=lambda task: left[task].mean())
    found = np.full((len(weighted), len(tasks)), np.nan)
    for row, runs in zip(found, weighted.values(), strict=True):
        relative = [_relative_weights(run, tasks) for run in complete(runs)]
        for number, task in enumerate(tasks):
            of_runs = [np.nanmean(w[task]) for w in relative if np.isfinite(w[task]).any()]
            row[number] = np.mean(of_runs) if of_runs else np.nan
    shares = np.array([left[task].mean() for task in tasks])
    longest = max(map(len, tasks))
    slanted = longest > LONGEST_LABEL
    width = 2.4 + max(0.75 * len(tasks), 2.8)
    height = 1.6 + 0.3 * len(weighted) + (0.1 * longest if slanted else 0)
    figure = Figure(figsize=(width, height), layout="constrained")
    axis = figure.subplots()
    colors = np.log2(np.clip(found, 2.0**-COLORED, 2.0**COLORED))
    axis.imshow(colors, cmap="coolwarm", vmin=-COLORED, vmax=COLORED, aspect="auto", alpha=0.8)
    for (row, column), weight in np.ndenumerate(found):
        text = "" if np.isnan(weight) else f"{weight:.2f}"
        axis.text(column, row, text, ha="center", va="center", fontsize=9)
    names = [f"{n}{_correlation(shares, r)}" for n, r in zip(weighted, found, strict=True)]
    axis.set_yticks(range(len(names)), names)
    labels = [f"{task}\n{share:.2g}" for task, share in zip(tasks, shares, strict=True)]
    axis.set_xticks(range(len(tasks)), labels, rotation=90 if slanted else 0)
    axis.tick_params(length=0)
    how = "trained alone" if analysis.alone else "with equal weights"
    axis.set_xlabel(
        f"share of the first epoch's loss left in the last,\n{how}: the harder, the more"
    )
    finish(figure, [axis], f"{analysis.problem}: relative weight", analysis, "mean over")
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)
    return figure


def panels(
    number: int, width: float = 3.2, height: float = 2.7, columns: int = 3
) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels; above six they are small."""
    if number > SMALL:
        columns, width, height = 4, 2.5, 2.0
    rows = -(-number // columns)
    columns = -(-number // rows)  # as many in each row as can be
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[number:]:
        axis.remove()
    return figure, axes[:number]


def style(number: int) -> tuple[str, str]:
    """Color and line style of a weighting: ten colors, then again with other lines."""
    return f"C{number % 10}", ("-", "-.", ":")[number // 10 % 3]


def line(
    axis: Axes,
    x: Float[np.ndarray, "points"],
    values: Float[np.ndarray, "seeds points"],
    label: str,
    color: str,
    kind: str,
) -> None:
    """The mean over the seeds, with a band of one standard deviation.

    Points of which nothing is known are left out, and a long row of them is a gap.
    """
    known = np.isfinite(values).any(axis=0)
    if not known.any():
        return
    x, values = x[: known.size][known].astype(float), values[:, known]
    mean, deviation = np.nanmean(values, axis=0), np.nanstd(values, axis=0)
    steps = np.diff(x)
    if steps.size:
        longest = max(LONGEST_STEP * (x[-1] - x[0]), 3 * np.median(steps))
        gaps = np.flatnonzero(steps > longest) + 1
        x, mean, deviation = (np.insert(curve, gaps, np.nan) for curve in (x, mean, deviation))
    marker = "." if len(x) == 1 else ""
    axis.plot(x, mean, kind, color=color, label=_label(label), linewidth=1.5, marker=marker)
    axis.fill_between(x, mean - deviation, mean + deviation, color=color, linewidth=0)


def complete(runs: Sequence[Run]) -> list[Run]:
    """The runs that did not fail, or all if all failed."""
    return [run for run in runs if run.failure is None] or list(runs)


def over_seeds(values: Sequence[np.ndarray]) -> Float[np.ndarray, "seeds points"]:
    """The values of all seeds, cut to the shortest; empty if there are none."""
    length = min((len(row) for row in values), default=0)
    return np.array([row[:length] for row in values], float).reshape(len(values), length)


def finish(
    figure: Figure,
    axes: Sequence[Axes],
    title: str,
    analysis: Analysis,
    shown: str = "",
) -> None:
    """Title, grid, and one legend for all panels, for which the figure is made wider."""
    small, banded = len(axes) > SMALL, False
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if small:
            axis.tick_params(labelsize=8)
            axis.set_title(textwrap.fill(axis.get_title(), 32), fontsize=9)
            axis.set_xlabel(axis.get_xlabel(), fontsize=8)
            axis.set_ylabel(axis.get_ylabel(), fontsize=8)
        bands = [drawn for drawn in axis.collections if isinstance(drawn, PolyCollection)]
        for band in bands:
            band.set_alpha(0.15) if len(bands) <= MOST_BANDS else band.remove()
        banded |= 0 < len(bands) <= MOST_BANDS
    labelled, texts = {}, []
    for axis in axes:
        texts += [axis.title, axis.xaxis.label, axis.yaxis.label]
        for one in (axis.xaxis, axis.yaxis):
            if isinstance(one.get_major_locator(), matplotlib.ticker.FixedLocator):  # names
                texts += one.get_ticklabels()
        handles, labels = axis.get_legend_handles_labels()
        labelled |= dict(zip(labels, handles, strict=True))
    if labelled:
        columns = -(-len(labelled) // int(figure.get_figheight() / LEGEND_LINE))
        width = columns * (0.8 + 0.085 * max(map(len, labelled)))
        figure.set_figwidth(figure.get_figwidth() + width)
        legend = figure.legend(
            labelled.values(), labelled, loc="outside right center", frameon=False, ncols=columns
        )
        texts += legend.get_texts()
    rows = analysis.results.of(analysis.problem).values()
    numbers = {sum(run.failure is None for run in runs) for runs in rows} - {0} or {0}
    number, fewest = max(numbers), min(numbers)
    shown = shown or ("mean and standard deviation over" if banded else "mean over")
    number_text = f"{number}" if number == fewest else f"{fewest} to {number}"
    seeds = "one seed" if number == 1 else f"{shown} {number_text} seeds"
    whole = f"{title} ({seeds})"
    # About 0.1 inches a letter; a narrow figure has the title in two lines.
    narrow = 0.1 * len(whole) > figure.get_figwidth()
    texts.append(figure.suptitle(f"{title}\n({seeds})" if narrow else whole))
    for text in texts:
        text.set_parse_math(False)  # a dollar in a name is one


def _label(name: str) -> str:
    """A name in a legend, which leaves out what begins with an underscore."""
    return f" {name}" if name.startswith("_") else name


def _over_epochs(
    analysis: Analysis, axis: Axes, task: str, values_of: Callable[[Run], np.ndarray]
) -> None:
    """A line for each weighting and for the task alone."""
    lines = [
        (name, runs, *style(number))
        for number, (name, runs) in enumerate(analysis.weightings.items())
    ]
    if analysis.alone:
        lines.append(("task alone", analysis.alone.get(task, []), "black", "--"))
    for name, runs, color, kind in lines:
        values = over_seeds([values_of(run) for run in runs if run.failure is None])
        line(axis, np.arange(1, values.shape[1] + 1), values, name, color, kind)
    axis.set_xlabel("epoch")
    axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))


def _without_the_start(axis: Axes) -> None:
    """Show the range of the curves after the first quarter, in which they would be one line."""
    ends = [np.asarray(curve.get_ydata(), float) for curve in axis.lines]
    ends = np.concatenate([curve[len(curve) // 4 :] for curve in ends] or [[]])
    ends = ends[np.isfinite(ends)]
    if ends.size and np.ptp(ends) > 1e-6 * np.abs(ends).max():  # more than rounding
        margin = 0.08 * np.ptp(ends)
        low, high = axis.get_ylim()
        axis.set_ylim(max(low, ends.min() - margin), min(high, ends.max() + margin))


def _log_if_wide(axis: Axes) -> None:
    """A logarithmic axis where all curves are positive and span more than a factor of 20."""
    values = np.concatenate([np.asarray(curve.get_ydata(), float) for curve in axis.lines] or [[]])
    values = values[np.isfinite(values)]
    if values.size and values.min() > 0 and math.log(values.max() / values.min()) > math.log(20):
        axis.set_yscale("log")


def _weighted(analysis: Analysis) -> dict[str, list[Run]]:
    return {name: runs for name, runs in analysis.weightings.items() if runs[0].weights}


def _steps(runs: Sequence[Run], points: int) -> tuple[Float[np.ndarray, "points"], list[Run]]:
    """So many steps, and the runs that did not fail, or ended like the first, at these."""
    thin = [run.thinned(points) for run in complete(runs)]
    steps = np.asarray(thin[0].steps)
    return steps, [run for run in thin if np.array_equal(np.asarray(run.steps), steps)]


def _left(runs: Sequence[Run], task: str) -> Float[np.ndarray, "seeds"]:
    """The share of the first epoch's loss that is left in the last one, of each run."""
    losses = [run.train_losses[task] for run in runs if run.failure is None and run.epochs > 1]
    shares = [loss[-1] / loss[0] for loss in losses if min(loss[0], loss[-1]) > 0]
    return np.array([share for share in shares if math.isfinite(share)])


def _relative_weights(run: Run, tasks: Sequence[str]) -> dict[str, Float[np.ndarray, "steps"]]:
    """The weights of a run divided by their mean over the tasks that have one at the step."""
    weights = np.array([run.weights[task] for task in tasks], float)
    known = np.isfinite(weights)
    mean = np.where(known, weights, 0).sum(0) / np.maximum(known.sum(0), 1)
    relative = np.where(known & (mean != 0), weights / np.where(mean == 0, 1, mean), np.nan)
    return dict(zip(tasks, relative, strict=True))


def _correlation(difficulty: np.ndarray, weights: np.ndarray) -> str:
    """Spearman's correlation, for a label; empty where it says nothing."""
    known = np.isfinite(weights)
    pairs = difficulty[known], weights[known]
    if known.sum() < 3 or min(map(np.ptp, pairs)) < 1e-6:
        return ""
    correlation, _ = scipy.stats.spearmanr(*pairs)
    return f" ({correlation:+.2f})"
