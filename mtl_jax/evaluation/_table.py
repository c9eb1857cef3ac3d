"""Every weighting of a table against the baseline, corrected for the number of comparisons."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mtl_jax.evaluation._paired import PairedComparison, compare_to_baseline, verdict_of


def compare_table(
    table: Mapping[str, Mapping[str, ArrayLike]],
    higher_is_better: Mapping[str, bool],
    *,
    baseline: str = "equal",
    test: Literal["t", "sign-flip"] = "t",
    confidence: float = 0.95,
) -> dict[str, dict[str, PairedComparison]]:
    """Compare every row of a table with the baseline's, in every column.

    Each comparison is that of :func:`compare_to_baseline`, its p-value corrected by Holm's method
    for all the comparisons of the table: without a single difference in truth, the chance that any
    of them is called better or worse is at most 1 - ``confidence``.

    Args:
      table: the metrics over the seeds, by weighting and column, such as a column a task.
      higher_is_better: the direction of each column's metric.
      baseline: the row to compare with.
      test: the test that gives the p-values.
      confidence: as in :func:`compare_to_baseline`.

    Returns:
      The :class:`PairedComparison` of every row but the baseline's and every column.

    Raises:
      ValueError: if the baseline is not in the table, a row has other columns than
        ``higher_is_better``, or a comparison cannot be made.

    Example:
      >>> from mtl_jax.evaluation import compare_table
      >>> table = {
      ...     "equal": {"language": [93.7, 93.5, 93.9, 93.6], "topic": [56.2, 55.9, 56.8, 56.1]},
      ...     "adaptive": {"language": [93.8, 93.2, 94.0, 93.7], "topic": [58.8, 58.7, 59.5, 58.6]},
      ... }
      >>> found = compare_table(table, {"language": True, "topic": True})
      >>> {column: of_column.verdict for column, of_column in found["adaptive"].items()}
      {'language': 'undecided', 'topic': 'better'}
    """
    if baseline not in table:
        raise ValueError(
            f"compare_table: the baseline {baseline!r} is not among the rows {list(table)}."
        )
    for name, row in table.items():
        if set(row) != set(higher_is_better):
            raise ValueError(
                f"compare_table: {name} has the columns {sorted(row)}, the directions "
                f"{sorted(higher_is_better)}; they must be the same."
            )
    found = {
        (name, column): compare_to_baseline(
            row[column], table[baseline][column], direction, test=test, confidence=confidence
        )
        for name, row in table.items()
        if name != baseline
        for column, direction in higher_is_better.items()
    }
    corrected = holm([of_cell.p_value for of_cell in found.values()])
    number = int(np.sum(np.isfinite(corrected)))
    compared = {name: {} for name in table if name != baseline}
    for (name, column), p_value in zip(found, corrected.tolist(), strict=True):
        cell = found[name, column]._replace(corrected_p_value=p_value)
        verdict = verdict_of(cell, higher_is_better[column], test, confidence, number)
        compared[name][column] = cell._replace(verdict=verdict)
    return compared


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    r"""Correct p-values for the number of comparisons, by Holm's method.

    With the m p-values in rising order,

    .. math:: \tilde p_{(i)} = \min\left(1, \max_{j \le i} (m - j + 1) \, p_{(j)}\right).

    Those below 0.05 hold at that level together: the chance that even one of them is without an
    effect is at most 5 %, however the comparisons depend on each other.

    Args:
      p_values: the p-values, of any shape; NaN for a comparison that could not be made, which
        stays NaN and is not counted.

    Returns:
      The corrected p-values, in the same shape.

    References:
      Holm, `A Simple Sequentially Rejective Multiple Test Procedure
      <https://www.jstor.org/stable/4615733>`_, Scandinavian Journal of Statistics 1979

    Example:
      >>> from mtl_jax.evaluation import holm
      >>> holm([0.01, 0.04, 0.03]).tolist()
      [0.03, 0.06, 0.06]
    """
    corrected = np.array(p_values, np.float64)
    made = np.isfinite(corrected)
    rising = np.sort(corrected[made])
    number_left = np.arange(rising.size, 0, -1)
    bound = np.minimum(1, np.maximum.accumulate(number_left * rising))
    corrected[made] = bound[np.searchsorted(rising, corrected[made], side="right") - 1]
    return corrected
