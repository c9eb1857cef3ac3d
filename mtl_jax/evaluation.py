"""What the metrics of a comparison say: change against a baseline, and intervals over seeds."""

from collections.abc import Mapping, Sequence

import numpy as np
import scipy.stats


def delta_m(
    metrics: Mapping[str, float],
    baseline: Mapping[str, float],
    higher_is_better: Mapping[str, bool],
) -> float:
    r"""Mean relative change of the tasks' metrics against a baseline; positive is better.

    .. math:: \Delta_m = \frac1K \sum_k s_k \frac{M_k - B_k}{|B_k|},

    with :math:`s_k` = 1 where a higher metric is better and -1 where a lower one is. This is the
    sign of Maninis et al.; the papers that report a :math:`\Delta_m` to be made small (CAGrad,
    Nash-MTL, FAMO) use the opposite one.

    Args:
      metrics: the metric of each task.
      baseline: the metric of each task to compare with, such as that of the task trained alone.
      higher_is_better: the direction of each task's metric.

    Returns:
      The change, as a fraction: 0.01 is one per cent better.

    Raises:
      ValueError: if the three do not have the same tasks, or a baseline is 0.

    References:
      Maninis et al., `Attentive Single-Tasking of Multiple Tasks
      <https://arxiv.org/abs/1904.08918>`_, CVPR 2019

    Example:
      >>> from mtl_jax.evaluation import delta_m
      >>> change = delta_m({"seg": 0.55, "depth": 0.8}, {"seg": 0.5, "depth": 1.0},
      ...                  {"seg": True, "depth": False})
      >>> round(change, 6)
      0.15
    """
    if not set(metrics) == set(baseline) == set(higher_is_better):
        raise ValueError(
            "delta_m: the metrics, the baseline and the directions must have the same tasks, got "
            f"{sorted(metrics)}, {sorted(baseline)} and {sorted(higher_is_better)}."
        )
    zero = [task for task, value in baseline.items() if value == 0]
    if zero:
        raise ValueError(f"delta_m: the baseline of {', '.join(zero)} is 0.")
    changes = [
        (1 if higher_is_better[task] else -1) * (metrics[task] - value) / abs(value)
        for task, value in baseline.items()
    ]
    return float(np.mean(changes))


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """The mean, and the half-width of its confidence interval by Student's t distribution.

    Args:
      values: one value for each independent run, such as a metric over seeds.
      confidence: the coverage of the interval.

    Returns:
      ``(mean, half_width)``; the half-width is NaN for a single value.

    Raises:
      ValueError: if there are no values.

    Example:
      >>> from mtl_jax.evaluation import mean_interval
      >>> mean, half_width = mean_interval([1.0, 2.0, 3.0])
      >>> print(f"{mean:.2f} ± {half_width:.2f}")
      2.00 ± 2.48
    """
    array = np.asarray(values, np.float64)
    if not array.size:
        raise ValueError("mean_interval: there are no values.")
    if array.size == 1:
        return float(array[0]), float("nan")
    quantile = scipy.stats.t.ppf((1 + confidence) / 2, array.size - 1)
    return float(array.mean()), float(quantile * scipy.stats.sem(array))
