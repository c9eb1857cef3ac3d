"""Pictures of a comparison: test metrics per epoch; weights and conflicts over the steps."""

from collections.abc import Sequence

import matplotlib.figure
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes

from mtl_jax.compare.referee import Comparison
from mtl_jax.compare.run import Place, Run

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


def metrics_figure(comparison: Comparison) -> matplotlib.figure.Figure:
    """Test metric of each task after every epoch: mean over seeds, band of one deviation."""
    problem = comparison.problem
    figure, axes = _panels(len(problem.tasks), 4.2)
    for axis, (task, description) in zip(axes, problem.tasks.items(), strict=True):
        scale = 100 if description.percent else 1
        lines = [
            (name, runs, *_style(number))
            for number, (name, runs) in enumerate(comparison.runs.items())
        ]
        if comparison.alone:
            lines.append(("task alone", comparison.alone[task], "black", "--"))
        for name, runs, color, style in lines:
            values = _over_seeds([run.test[task] for run in runs if run.failure is None])
            epochs = np.arange(1, values.shape[1] + 1)
            _line(axis, epochs, scale * values, name, color, style)
        axis.set_title(task)
        axis.set_xlabel("epoch")
        axis.set_ylabel(f"test {description.metric}" + (" (%)" if description.percent else ""))
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    _finish(figure, axes, f"{problem.name}: test metrics", comparison)
    return figure


def weights_figure(comparison: Comparison) -> matplotlib.figure.Figure:
    """Weight of each task over the steps, a panel for each weighting: mean over seeds, band.

    Aggregators, which have no weights, are left out.
    """
    weighted = {name: runs for name, runs in comparison.runs.items() if runs[0].weights}
    figure, axes = _panels(len(weighted), 3.4)
    for axis, (name, runs) in zip(axes, weighted.items(), strict=True):
        for number, task in enumerate(comparison.problem.tasks):
            centres, _ = thinned(runs[0].weights[task])
            values = _over_seeds([thinned(run.weights[task])[1] for run in _complete(runs)])
            _line(axis, centres[: values.shape[1]], values, task, f"C{number}", "-")
        axis.set_title(name)
        axis.set_xlabel("step")
        axis.set_ylabel("weight")
        if not any((np.asarray(line.get_ydata()) < 0).any() for line in axis.lines):
            axis.set_ylim(bottom=0)
    _finish(figure, axes, f"{comparison.problem.name}: weight of each task", comparison)
    return figure


def conflict_figure(comparison: Comparison) -> matplotlib.figure.Figure | None:
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
    figure, axes = _panels(2 * len(rows), 5.2, columns=2)
    for row, (where, measured) in enumerate(rows):
        for axis, (kind, label, scale) in zip(axes[2 * row :], CONFLICT, strict=False):
            for name, runs in measured.items():
                thin = [thinned(run.conflict[kind], CONFLICT_POINTS) for run in _complete(runs)]
                values = _over_seeds([means for _, means in thin])
                centres = thin[0][0][: values.shape[1]]
                _line(axis, centres, scale * values, name, *_style(names.index(name)))
            axis.set_title(where)
            axis.set_xlabel("step")
            axis.set_ylabel(label)
        axes[2 * row].set_ylim(0, 100)
        axes[2 * row + 1].axhline(0, color="black", linewidth=0.8)
    _finish(figure, axes, f"{comparison.problem.name}: conflicts of the tasks", comparison)
    return figure


def thinned(values: np.ndarray, points: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Means over at most ``points`` consecutive pieces, and the middle step of each piece.

    What is not finite does not count; a piece of nothing else is NaN.
    """
    pieces = np.array_split(np.arange(len(values)), min(points, len(values)))
    finite = [values[piece][np.isfinite(values[piece])] for piece in pieces]
    means = [np.mean(part, dtype=np.float64) if part.size else np.nan for part in finite]
    return np.array([piece.mean() for piece in pieces]), np.array(means)


def _complete(runs: Sequence[Run]) -> list[Run]:
    """The runs that did not fail, or all if all failed."""
    return [run for run in runs if run.failure is None] or list(runs)


def _over_seeds(values: Sequence[Sequence[float] | np.ndarray]) -> np.ndarray:
    """The values as ``[seeds, points]``, cut to the shortest; empty if there are none."""
    shortest = min((len(value) for value in values), default=0)
    return np.array([value[:shortest] for value in values]).reshape(len(values), shortest)


def _style(number: int) -> tuple[str, str]:
    """Color and line style of a weighting: ten colors, then again with other lines."""
    return f"C{number % 10}", ("-", "-.", ":")[number // 10 % 3]


def _panels(
    number: int, width: float, columns: int = 4
) -> tuple[matplotlib.figure.Figure, list[Axes]]:
    columns = min(number, columns)
    rows = -(-number // columns)
    figure = matplotlib.figure.Figure(figsize=(width * columns, 3.4 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[number:]:
        axis.remove()
    return figure, axes[:number]


def _line(
    axis: Axes, x: np.ndarray, values: np.ndarray, label: str, color: str, style: str
) -> None:
    known = np.isfinite(values).any(axis=0)
    if not known.any():
        return
    x, values = x[known], values[:, known]
    mean, deviation = np.nanmean(values, axis=0), np.nanstd(values, axis=0)
    axis.plot(x, mean, style, color=color, label=label, linewidth=1.5)
    axis.fill_between(x, mean - deviation, mean + deviation, color=color, linewidth=0)


def _finish(
    figure: matplotlib.figure.Figure, axes: Sequence[Axes], title: str, comparison: Comparison
) -> None:
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        for band in axis.collections:  # many bands over each other would hide the lines
            band.set_alpha(min(0.15, 0.6 / len(axis.collections)))
    labelled = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        labelled |= dict(zip(labels, handles, strict=True))
    figure.legend(
        labelled.values(),
        labelled,
        loc="outside right center",
        frameon=False,
        ncols=-(-len(labelled) // int(figure.get_figheight() / LEGEND_LINE)),
    )
    number = len(comparison.seeds)
    seeds = "one seed" if number == 1 else f"mean and standard deviation over {number} seeds"
    figure.suptitle(f"{title} ({seeds})")
