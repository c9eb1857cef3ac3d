"""The interval of a mean over seeds."""

from collections.abc import Sequence

import numpy as np
import scipy.stats


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """The mean, and the half-width of its confidence interval by Student's t distribution.

    Args:
      values: one value for each independent run, such as a metric over seeds.
      confidence: the coverage of the interval.

    Returns:
      ``(mean, half_width)``; the half-width is NaN for a single value.

    Raises:
      ValueError: if there are no values, or ``confidence`` is not between 0 and 1.

    Example:
      >>> from mtl_jax.evaluation import mean_interval
      >>> mean, half_width = mean_interval([1.0, 2.0, 3.0])
      >>> print(f"{mean:.2f} ± {half_width:.2f}")
      2.00 ± 2.48
    """
    array = np.asarray(values, np.float64)
    if not array.size:
        raise ValueError("mean_interval: there are no values.")
    if not 0 < confidence < 1:
        raise ValueError(f"mean_interval: confidence must be between 0 and 1, got {confidence}.")
    if array.size == 1:
        return float(array[0]), float("nan")
    quantile = scipy.stats.t.ppf((1 + confidence) / 2, array.size - 1)
    return float(array.mean()), float(quantile * scipy.stats.sem(array))
