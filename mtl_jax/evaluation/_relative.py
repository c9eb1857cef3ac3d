"""The change of the tasks' metrics relative to a baseline, in one number."""

from collections.abc import Iterable, Mapping
from typing import Literal, TypeVar

import numpy as np

Value = TypeVar("Value", float, bool)

ByTask = Mapping[str, Value] | Mapping[str, Mapping[str, Value]]
"""One value a task, or for tasks with several metrics one value a metric."""


def delta_m(
    metrics: ByTask[float],
    baseline: ByTask[float],
    higher_is_better: ByTask[bool],
    *,
    better: Literal["positive", "negative"] = "positive",
    average: Literal["tasks", "metrics"] = "tasks",
) -> float:
    r"""Mean relative change of the tasks' metrics against a baseline.

    With the :math:`N_k` metrics of task k, :math:`s_{kn}` = 1 where a higher metric is better and
    -1 where a lower one is,

    .. math:: \Delta_m = \frac1K \sum_k \frac1{N_k} \sum_n
              s_{kn} \frac{M_{kn} - B_{kn}}{|B_{kn}|} \quad \text{or} \quad
              \Delta_m = \frac1{\sum_k N_k} \sum_{k, n} s_{kn} \frac{M_{kn} - B_{kn}}{|B_{kn}|}.

    Two things differ between publications, and change the verdict:

    - The sign. With ``better="positive"`` a gain is positive, as in Maninis et al., LibMTL and
      DB-MTL. CAGrad, Nash-MTL and FAMO report the drop, a gain being negative:
      ``better="negative"``.
    - The average. ``average="tasks"``, the first form, is taken within each task first, so that a
      task counts once however many metrics it has: LibMTL and DB-MTL. ``average="metrics"``, the
      second form, gives every metric the same weight: CAGrad, Nash-MTL and FAMO. On NYUv2 five of
      the nine metrics are of the surface normals, which then decide the number. With one metric a
      task, as in Maninis et al., they are the same.

    Args:
      metrics: the metric of each task, or a mapping of its metrics.
      baseline: the same of what to compare with, such as the tasks trained alone.
      higher_is_better: the direction of each metric.
      better: the sign of a gain.
      average: whether to average within each task first, or over all metrics at once.

    Returns:
      The change, as a fraction: 0.01 is one per cent.

    Raises:
      ValueError: if the three do not have the same tasks and metrics, a baseline is 0, or an
        option is none of those above.

    References:
      Maninis et al., `Attentive Single-Tasking of Multiple Tasks
      <https://arxiv.org/abs/1904.08918>`_, CVPR 2019;
      Lin and Zhang, `LibMTL <https://arxiv.org/abs/2203.14338>`_, JMLR 2023;
      Lin et al., `Dual-Balancing for Multi-Task Learning <https://arxiv.org/abs/2308.12029>`_,
      2023 (DB-MTL);
      Liu et al., `Conflict-Averse Gradient Descent <https://arxiv.org/abs/2110.14048>`_,
      NeurIPS 2021 (CAGrad);
      Navon et al., `Multi-Task Learning as a Bargaining Game <https://arxiv.org/abs/2202.01017>`_,
      ICML 2022 (Nash-MTL);
      Liu et al., `FAMO <https://arxiv.org/abs/2306.03792>`_, NeurIPS 2023

    Example:
      >>> from mtl_jax.evaluation import delta_m
      >>> metrics = {"segmentation": {"miou": 0.55, "pixel": 0.5}, "depth": {"error": 0.8}}
      >>> alone = {"segmentation": {"miou": 0.50, "pixel": 0.5}, "depth": {"error": 1.0}}
      >>> directions = {"segmentation": {"miou": True, "pixel": True}, "depth": {"error": False}}
      >>> f"{delta_m(metrics, alone, directions):.3f}"
      '0.125'
      >>> f"{delta_m(metrics, alone, directions, average='metrics'):.3f}"
      '0.100'
      >>> f"{delta_m(metrics, alone, directions, better='negative'):.3f}"
      '-0.125'
    """
    if better not in ("positive", "negative"):
        raise ValueError(f"delta_m: better must be 'positive' or 'negative', got {better!r}.")
    if average not in ("tasks", "metrics"):
        raise ValueError(f"delta_m: average must be 'tasks' or 'metrics', got {average!r}.")
    values, base, directions = (_flat(each) for each in (metrics, baseline, higher_is_better))
    if not base or not values.keys() == base.keys() == directions.keys():
        raise ValueError(
            "delta_m: the metrics, the baseline and the directions must have the same tasks, at "
            f"least one, and these the same metrics; got {_names(values)}, {_names(base)} and "
            f"{_names(directions)}."
        )
    zero = _names([name for name, value in base.items() if value == 0])
    if zero:
        raise ValueError(f"delta_m: the baseline of {', '.join(zero)} is 0: leave it out.")
    by_task: dict[str, list[float]] = {}
    for name, value in base.items():
        sign = 1 if directions[name] else -1
        by_task.setdefault(name[0], []).append(sign * (values[name] - value) / abs(value))
    groups = list(by_task.values())
    if average == "metrics":
        groups = [[change for group in groups for change in group]]
    change = float(np.mean([np.mean(group) for group in groups]))
    return change if better == "positive" else -change


def _flat(values: ByTask[Value]) -> dict[tuple[str, ...], Value]:
    flat: dict[tuple[str, ...], Value] = {}
    for task, value in values.items():
        if isinstance(value, Mapping):
            flat |= {(task, metric): of_metric for metric, of_metric in value.items()}
        else:
            flat[(task,)] = value
    return flat


def _names(names: Iterable[tuple[str, ...]]) -> list[str]:
    return sorted("/".join(name) for name in names)
