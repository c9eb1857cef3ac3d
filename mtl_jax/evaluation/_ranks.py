"""The mean rank of each weighting."""

from collections.abc import Mapping

import numpy as np
import scipy.stats


def mean_rank(
    table: Mapping[str, Mapping[str, float]], higher_is_better: Mapping[str, bool]
) -> dict[str, float]:
    r"""The rank of each weighting among all, averaged over the columns of a table.

    .. math:: \mathrm{MR}_i = \frac1C \sum_c
              \operatorname{rank}\{M_{ic} \text{ among } M_{1c}, \ldots, M_{Wc}\},

    1 being the best and equal metrics sharing the mean of their ranks. The papers rank over all
    metrics, whichever task they belong to; the row of the tasks trained alone is not ranked. A
    rank says nothing of how large a difference is, and it depends on which weightings there are:
    numbers from tables with other rows do not compare.

    Args:
      table: the metric, or its mean over seeds, by weighting and column; NaN, for a weighting that
        failed, comes last.
      higher_is_better: the direction of each column's metric.

    Returns:
      The mean rank of each weighting.

    Raises:
      ValueError: if there are no columns, or a weighting has others than ``higher_is_better``.

    References:
      Navon et al., `Multi-Task Learning as a Bargaining Game <https://arxiv.org/abs/2202.01017>`_,
      ICML 2022 (MR);
      Liu et al., `FAMO <https://arxiv.org/abs/2306.03792>`_, NeurIPS 2023

    Example:
      >>> from mtl_jax.evaluation import mean_rank
      >>> table = {"equal": {"seg": 0.5, "depth": 1.0}, "dwa": {"seg": 0.6, "depth": 1.0}}
      >>> mean_rank(table, {"seg": True, "depth": False})
      {'equal': 1.75, 'dwa': 1.25}
    """
    columns = list(higher_is_better)
    for name, row in table.items():
        if not columns or set(row) != set(columns):
            raise ValueError(
                f"mean_rank: {name} has the columns {sorted(row)}, the directions {columns}; they "
                "must be the same, at least one."
            )
    if not table:
        return {}
    signs = np.array([1 if higher_is_better[column] else -1 for column in columns])
    merit = signs * np.array([[row[column] for column in columns] for row in table.values()], float)
    ranks = scipy.stats.rankdata(-np.where(np.isnan(merit), -np.inf, merit), axis=0)
    return dict(zip(table, ranks.mean(axis=1).tolist(), strict=True))
