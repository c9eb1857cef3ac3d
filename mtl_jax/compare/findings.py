"""What the runs of a comparison say: against equal weights, in rank, as trade-offs, in cost."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from mtl_jax.compare.referee import BASELINE, Comparison
from mtl_jax.compare.run import Run
from mtl_jax.evaluation import (
    PairedComparison,
    compare_table,
    delta_m,
    hypervolume,
    mean_rank,
    pareto_front,
)

ALONE = "each task alone"
"""The row of the tasks that were each trained alone."""

MOST_TASKS_FOR_HYPERVOLUME = 6
"""Its time grows exponentially with the number of tasks."""


@dataclasses.dataclass(frozen=True)
class Findings:
    """What the test metrics of a comparison say.

    A row is a weighting, or the tasks each trained alone. All of it is paired over the seeds with
    which every row has a run: all of them, unless the comparison was interrupted. A run that failed
    has NaN for its metrics.

    Attributes:
      comparison: the comparison.
      best: whether each run's metrics are those of the epoch with its best validation metrics,
        instead of the last epoch's.
    """

    comparison: Comparison
    best: bool = False

    def metric(self, run: Run, task: str) -> float:
        """The test metric of a run; NaN if it failed."""
        if run.failure is not None:
            return math.nan
        return run.test[task][self.comparison.best_epoch(run) if self.best else -1]

    @functools.cached_property
    def directions(self) -> dict[str, bool]:
        """For each task whether a higher metric is better."""
        tasks = self.comparison.problem.tasks
        return {name: task.higher_is_better for name, task in tasks.items()}

    @functools.cached_property
    def values(self) -> dict[str, dict[str, np.ndarray]]:
        """The metric over the seeds, by row and task."""
        tasks = self.comparison.problem.tasks
        rows: dict[str, Mapping[str, Sequence[Run]]] = {
            name: dict.fromkeys(tasks, runs) for name, runs in self.comparison.runs.items()
        }
        if set(self.comparison.alone) == set(tasks):
            rows[ALONE] = self.comparison.alone
        cells = [{run.seed: run for run in runs} for row in rows.values() for runs in row.values()]
        seeds = [seed for seed in self.comparison.seeds if all(seed in cell for cell in cells)]
        return {
            name: {
                task: np.array([self.metric(run, task) for run in row[task] if run.seed in seeds])
                for task in tasks
            }
            for name, row in rows.items()
        }

    @functools.cached_property
    def weightings(self) -> dict[str, dict[str, np.ndarray]]:
        """The metric over the seeds, without the tasks trained alone."""
        return {name: row for name, row in self.values.items() if name != ALONE}

    @functools.cached_property
    def against_equal(self) -> dict[str, dict[str, PairedComparison]]:
        """Every row but equal weights' against those, in every task, corrected by Holm's method."""
        if BASELINE not in self.values:
            return {}
        return compare_table(self.values, self.directions, baseline=BASELINE)

    @functools.cached_property
    def ranks(self) -> dict[str, float]:
        """The mean rank of each weighting by its mean over the seeds; last if it failed once."""
        if not self.seeds:
            return {}
        means = {
            name: {task: float(values.mean()) for task, values in row.items()}
            for name, row in self.weightings.items()
        }
        return mean_rank(means, self.directions)

    @functools.cached_property
    def front(self) -> dict[str, bool]:
        """Whether no other weighting is at least as good in every task and better in one."""
        if not self.seeds:
            return {}
        means = [[row[task].mean() for task in self.directions] for row in self.weightings.values()]
        on_it = pareto_front(means, list(self.directions.values()))
        return dict(zip(self.weightings, on_it.tolist(), strict=True))

    @functools.cached_property
    def hypervolumes(self) -> dict[str, float]:
        """The hypervolume of each weighting's seeds, as a share of the box around all runs.

        Its corners are the worst and the best metric of each task over all weightings and seeds.
        Empty for more than six tasks, or if there is no such box.
        """
        tasks = list(self.directions)
        points = {
            name: np.stack([row[task] for task in tasks], axis=1)
            for name, row in self.weightings.items()
        }
        everything = np.concatenate(list(points.values()))
        everything = everything[np.isfinite(everything).all(axis=1)]
        if not 2 <= len(tasks) <= MOST_TASKS_FOR_HYPERVOLUME or not len(everything):
            return {}
        low, high = everything.min(axis=0), everything.max(axis=0)
        if not (high > low).all():
            return {}
        up = np.array(list(self.directions.values()))
        worst, best = np.where(up, low, high), np.where(up, high, low)
        corner = np.zeros(len(tasks))
        return {
            name: hypervolume((found - worst) / (best - worst), corner, higher_is_better=True)
            for name, found in points.items()
        }

    @functools.cached_property
    def seeds(self) -> int:
        """The number of seeds with which every row has a run."""
        return len(next(iter(next(iter(self.values.values())).values())))

    def changes(self, name: str, reference: str) -> np.ndarray:
        """Mean relative change of a row's metrics from another row's, seed by seed.

        A gain is positive. NaN where one of the two failed, or the other scored 0.
        """
        row, other = self.values[name], self.values[reference]
        return np.array(
            [
                _change(
                    {task: values[seed] for task, values in row.items()},
                    {task: values[seed] for task, values in other.items()},
                    self.directions,
                )
                for seed in range(self.seeds)
            ]
        )

    def task_changes(self, name: str) -> dict[str, float]:
        """The relative change of each task's mean metric from equal weights', a gain positive."""
        row, other = self.values[name], self.values[BASELINE]
        return {
            task: _change({task: row[task].mean()}, {task: other[task].mean()}, {task: up})
            for task, up in self.directions.items()
        }


def time_to_reach_equal(comparison: Comparison, name: str) -> list[tuple[int, float] | None]:
    """How long each run of a weighting took to be as good as equal weights at their end.

    That is the first epoch after which the mean relative change of the test metrics from equal
    weights' last ones, with the same seed, is not negative.

    Args:
      comparison: the comparison.
      name: the weighting.

    Returns:
      For each seed with which equal weights did not fail that epoch, the first being 1, and the
      seconds of training up to its end, without compiling and without computing the metrics;
      ``None`` if the run never came there, or failed.
    """
    directions = {task: of.higher_is_better for task, of in comparison.problem.tasks.items()}
    ends = {
        run.seed: comparison.metrics(run)
        for run in comparison.runs.get(BASELINE, ())
        if run.failure is None
    }
    found: list[tuple[int, float] | None] = []
    for run in comparison.runs[name]:
        if run.seed not in ends:
            continue
        epochs = (
            epoch
            for epoch in range(0 if run.failure else run.epochs)
            if _change(comparison.metrics(run, epoch), ends[run.seed], directions) >= 0
        )
        first = next(epochs, None)
        found.append(None if first is None else (first + 1, sum(run.epoch_seconds[: first + 1])))
    return found


def _change(
    metrics: Mapping[str, float], baseline: Mapping[str, float], directions: Mapping[str, bool]
) -> float:
    if not all(baseline.values()) or not np.isfinite(list(baseline.values())).all():
        return math.nan
    return delta_m(metrics, baseline, directions)
