"""Pictures of a comparison: test metrics per epoch, and the weight of each task over the steps."""

from collections.abc import Sequence

import matplotlib.figure
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes

from mtl_jax.compare.referee import Comparison
from mtl_jax.compare.training import Run


def metrics_figure(comparison: Comparison) -> matplotlib.figure.Figure:
    """Test metric of each task after every epoch: mean over seeds, band of one deviation."""
    problem = comparison.problem
    figure, axes = _panels(len(problem.tasks), 4.2)
    for axis, (task, description) in zip(axes, problem.tasks.items(), strict=True):
        scale = 100 if description.percent else 1
        lines = [(name, runs, "-") for name, runs in comparison.runs.items()]
        if comparison.alone:
            lines.append(("task alone", comparison.alone[task], "--"))
        for number, (name, runs, style) in enumerate(lines):
            values = _over_seeds([run.test[task] for run in runs if run.failure is None])
            epochs = np.arange(1, values.shape[1] + 1)
            color = "black" if style == "--" else f"C{number}"
            _line(axis, epochs, scale * values, name, color, style)
        axis.set_title(task)
        axis.set_xlabel("epoch")
        axis.set_ylabel(f"test {description.metric}" + (" (%)" if description.percent else ""))
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    _finish(figure, axes, f"{problem.name}: test metrics", comparison)
    return figure


def weights_figure(comparison: Comparison) -> matplotlib.figure.Figure:
    """Weight of each task over the steps, a panel for each weighting: mean over seeds, band."""
    figure, axes = _panels(len(comparison.runs), 3.4)
    for axis, (name, runs) in zip(axes, comparison.runs.items(), strict=True):
        for number, task in enumerate(comparison.problem.tasks):
            centres, _ = thinned(runs[0].weights[task])
            values = _over_seeds([thinned(run.weights[task])[1] for run in _complete(runs)])
            _line(axis, centres[: values.shape[1]], values, task, f"C{number}", "-")
        axis.set_title(name)
        axis.set_xlabel("step")
        axis.set_ylabel("weight")
        axis.set_ylim(bottom=0)
    _finish(figure, axes, f"{comparison.problem.name}: weight of each task", comparison)
    return figure


def thinned(values: np.ndarray, points: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Means over at most ``points`` consecutive pieces, and the middle step of each piece."""
    pieces = np.array_split(np.arange(len(values)), min(points, len(values)))
    means = [np.mean(values[piece], dtype=np.float64) for piece in pieces]
    return np.array([piece.mean() for piece in pieces]), np.array(means)


def _complete(runs: Sequence[Run]) -> list[Run]:
    """The runs that did not fail, or all if all failed."""
    return [run for run in runs if run.failure is None] or list(runs)


def _over_seeds(values: Sequence[Sequence[float] | np.ndarray]) -> np.ndarray:
    """The values as ``[seeds, points]``, cut to the shortest; empty if there are none."""
    shortest = min((len(value) for value in values), default=0)
    return np.array([value[:shortest] for value in values]).reshape(len(values), shortest)


def _panels(number: int, width: float) -> tuple[matplotlib.figure.Figure, list[Axes]]:
    columns = min(number, 4)
    rows = -(-number // columns)
    figure = matplotlib.figure.Figure(figsize=(width * columns, 3.4 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[number:]:
        axis.remove()
    return figure, axes[:number]


def _line(
    axis: Axes, x: np.ndarray, values: np.ndarray, label: str, color: str, style: str
) -> None:
    if not values.size:
        return
    mean, deviation = values.mean(axis=0), values.std(axis=0)
    axis.plot(x, mean, style, color=color, label=label, linewidth=1.5)
    axis.fill_between(x, mean - deviation, mean + deviation, color=color, alpha=0.15, linewidth=0)


def _finish(
    figure: matplotlib.figure.Figure, axes: Sequence[Axes], title: str, comparison: Comparison
) -> None:
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    number = len(comparison.seeds)
    seeds = "one seed" if number == 1 else f"mean and standard deviation over {number} seeds"
    figure.suptitle(f"{title} ({seeds})")
