"""What the pictures of a comparison are drawn with: panels, curves over seeds, a legend."""

import math
from collections.abc import Sequence

import matplotlib.figure
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection

from mtl_jax.compare.referee import Comparison
from mtl_jax.compare.run import Run

LEGEND_LINE = 0.24
"""The height of a line of the legend, in inches."""
LONGEST_STEP = 0.05
"""Between known points farther apart than this share of the axis, unless all are, is a gap."""
SMALL = 6
"""With more panels they are small, and more of them in a row."""


def panels(
    number: int, width: float = 4.2, height: float = 3.4, columns: int = 4
) -> tuple[matplotlib.figure.Figure, list[Axes]]:
    """A figure with so many panels; above six they are small."""
    if number > SMALL:
        columns, width, height = 5, 2.8, 2.2
    columns = min(number, columns)
    rows = -(-number // columns)
    size = (width * columns, height * rows)
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[number:]:
        axis.remove()
    return figure, axes[:number]


def style(number: int) -> tuple[str, str]:
    """Color and line style of a weighting: ten colors, then again with other lines."""
    return f"C{number % 10}", ("-", "-.", ":")[number // 10 % 3]


def line(axis: Axes, x: np.ndarray, values: np.ndarray, label: str, color: str, kind: str) -> None:
    """The mean of ``values[seeds, points]``, with a band of one standard deviation.

    Points of which nothing is known are left out, and a long row of them is a gap.
    """
    known = np.isfinite(values).any(axis=0)
    if not known.any():
        return
    x, values = x[known].astype(float), values[:, known]
    mean, deviation = np.nanmean(values, axis=0), np.nanstd(values, axis=0)
    steps = np.diff(x)
    if steps.size:
        longest = max(LONGEST_STEP * (x[-1] - x[0]), 3 * np.median(steps))
        gaps = np.flatnonzero(steps > longest) + 1
        x, mean, deviation = (np.insert(of, gaps, np.nan) for of in (x, mean, deviation))
    marker = "." if len(x) == 1 else ""
    axis.plot(x, mean, kind, color=color, label=label, linewidth=1.5, marker=marker)
    axis.fill_between(x, mean - deviation, mean + deviation, color=color, linewidth=0)


def complete(runs: Sequence[Run]) -> list[Run]:
    """The runs that did not fail, or all if all failed."""
    return [run for run in runs if run.failure is None] or list(runs)


def over_seeds(values: Sequence[Sequence[float] | np.ndarray]) -> np.ndarray:
    """The values as ``[seeds, points]``, cut to the shortest; empty if there are none."""
    shortest = min((len(value) for value in values), default=0)
    return np.array([value[:shortest] for value in values]).reshape(len(values), shortest)


def thinned(values: np.ndarray, points: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Means over at most ``points`` consecutive pieces, and the middle step of each piece.

    What is not finite does not count; a piece of nothing else is NaN.
    """
    pieces = np.array_split(np.arange(len(values)), min(points, len(values)))
    finite = [values[piece][np.isfinite(values[piece])] for piece in pieces]
    means = [np.mean(part, dtype=np.float64) if part.size else np.nan for part in finite]
    return np.array([piece.mean() for piece in pieces]), np.array(means)


def whole_epochs(axis: Axes) -> None:
    """Epochs along the axis of a panel."""
    axis.set_xlabel("epoch")
    axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))


def finish(
    figure: matplotlib.figure.Figure,
    axes: Sequence[Axes],
    title: str,
    comparison: Comparison,
    shown: str = "mean and standard deviation over",
) -> None:
    """Title, grid, and one legend for all panels, for which the figure is made wider."""
    small = len(axes) > SMALL
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if small:
            axis.tick_params(labelsize=8)
            axis.set_title(axis.get_title(), fontsize=9)
            axis.set_xlabel(axis.get_xlabel(), fontsize=8)
            axis.set_ylabel(axis.get_ylabel(), fontsize=8)
        bands = [of for of in axis.collections if isinstance(of, PolyCollection)]
        for band in bands:  # many bands over each other would hide the lines
            band.set_alpha(min(0.15, 0.6 / len(bands)))
    labelled = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        labelled |= dict(zip(labels, handles, strict=True))
    if labelled:
        columns = -(-len(labelled) // int(figure.get_figheight() / LEGEND_LINE))
        width = columns * (0.8 + 0.085 * max(map(len, labelled)))
        figure.set_figwidth(figure.get_figwidth() + width)
        figure.legend(
            labelled.values(), labelled, loc="outside right center", frameon=False, ncols=columns
        )
    number = len(comparison.seeds)
    seeds = "one seed" if number == 1 else f"{shown} {number} seeds"
    whole = f"{title} ({seeds})"
    # About 0.1 inches a letter; a narrow figure has the title in two lines.
    narrow = 0.1 * len(whole) > figure.get_figwidth()
    figure.suptitle(f"{title}\n({seeds})" if narrow else whole)


def log_if_wide(axis: Axes) -> None:
    """A logarithmic axis where all curves are positive and span more than a factor of 20."""
    values = np.concatenate([np.asarray(of.get_ydata(), float) for of in axis.lines] or [[]])
    values = values[np.isfinite(values)]
    if values.size and values.min() > 0 and math.log(values.max() / values.min()) > math.log(20):
        axis.set_yscale("log")
