"""What the results of a comparison say, as typed values: verdicts, changes, ranks, cost.

Tables, pictures and sentences are made of these values and compute nothing themselves.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from mtl_jax.compare.results import BASELINE, MetricInfo, ProblemInfo, Results, Run, Tuning
from mtl_jax.evaluation import (
    PairedComparison,
    compare_table,
    hypervolume,
    mean_interval,
    mean_rank,
    pareto_front,
)
from mtl_jax.evaluation._paired import FEWEST_SEEDS

ALONE = "each task alone"
"""The row of the tasks that were each trained alone."""

MOST_FOR_HYPERVOLUME = 6
"""Its time grows exponentially with the number of metrics."""


@dataclasses.dataclass(frozen=True)
class Column:
    """A metric of a task.

    Attributes:
      task: the task.
      metric: the metric's name.
      info: its direction and its unit.
      name: what it is called in a sentence: the task, with the metric if the task has several.
      digits: the decimals that are shown of it.
    """

    task: str
    metric: str
    info: MetricInfo
    name: str
    digits: int

    @property
    def title(self) -> str:
        """Task, metric, unit, and an arrow to the better side."""
        unit = f", {self.info.unit}" if self.info.unit else ""
        return f"{self.task} {self.metric}{unit} {'↑' if self.info.higher_is_better else '↓'}"

    @property
    def scale(self) -> int:
        """What a value is multiplied with to be shown."""
        return 100 if self.info.unit == "%" else 1


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
      values: the value with each seed; NaN where there is none.
      mean: the mean of those that are there; NaN without any.
      half_width: that of its 95 % interval, by Student's t distribution; NaN for less than three
        values, whose interval would be wider than anything that is compared.
    """

    values: tuple[float, ...]
    mean: float
    half_width: float

    @staticmethod
    def from_values(values: Sequence[float] | np.ndarray) -> "Estimate":
        """The mean of values, and its interval."""
        known = [float(value) for value in values if not math.isnan(value)]
        mean, half_width = mean_interval(known) if known else (math.nan, math.nan)
        half_width = half_width if len(known) >= FEWEST_SEEDS else math.nan
        return Estimate(tuple(map(float, values)), mean, half_width)


@dataclasses.dataclass(frozen=True)
class Cell:
    """What a weighting, or each task alone, reached in one metric.

    Attributes:
      estimate: the test metric over the row's runs that did not fail.
      runs: the number of its runs.
      failed: how many of them failed.
      against_equal: how it compares with equal weights, seed by seed; ``None`` for equal weights.
    """

    estimate: Estimate
    runs: int
    failed: int
    against_equal: PairedComparison | None


@dataclasses.dataclass(frozen=True)
class Row:
    """A weighting, or the tasks that were each trained alone.

    A change is relative to the reference's metric with the same seed, a gain being positive, and
    is averaged over the metrics of a task.

    Attributes:
      name: its name.
      cells: what it reached, by column.
      mean: the mean over the columns, if all have the same metric.
      against_equal: the mean over the tasks of the change from equal weights.
      against_alone: the same, from each task alone.
      worst_task: the task with the smallest mean change from being trained alone, or from equal
        weights where that was not done.
      worst: that change.
      rank: the mean rank among the weightings, over all metrics; last where a run failed.
      on_front: whether no other weighting is at least as good in every metric and better in one.
      hypervolume: of its seeds, as a share of the box from the worst to the best metrics of all
        runs.
      step_time: the time of a training step, relative to equal weights.
      runs: the number of its runs.
      failed: how many of them failed.
      skipped: the skipped steps of all its runs.
    """

    name: str
    cells: tuple[Cell, ...]
    mean: Estimate | None
    against_equal: Estimate | None
    against_alone: Estimate | None
    worst_task: str | None
    worst: Estimate | None
    rank: float | None
    on_front: bool | None
    hypervolume: float | None
    step_time: float | None
    runs: int
    failed: int
    skipped: int

    @property
    def verdicts(self) -> list[str]:
        """What the comparison with equal weights says, by column."""
        return [cell.against_equal.verdict for cell in self.cells if cell.against_equal]


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a weighting costs.

    Attributes:
      name: its name.
      step_seconds: the time of a training step in the fastest epoch of all seeds, since whatever
        else the machine does can only add to it; NaN if it is not known.
      memory_bytes: the memory of a compiled training step; ``None`` if it is not known.
      compile_seconds: the time that its runs spent on compiling.
      until_equal: for each seed the first epoch (from 1) after which the mean change of the test
        metrics from those that equal weights reached at their end is not negative, and the seconds
        of training up to its end; ``None`` if that never happened.
    """

    name: str
    step_seconds: float
    memory_bytes: int | None
    compile_seconds: float
    until_equal: tuple[tuple[int, float] | None, ...]


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What the results on one problem say.

    All comparisons are paired over the seeds with which every row has a run: all of them, unless
    the comparison was interrupted. A run that failed has NaN for its metrics.

    Attributes:
      results: the results.
      problem: the problem's name.
      best: whether each run's metrics are those of the epoch with its best validation metrics
        instead of those of the last epoch.
    """

    results: Results
    problem: str
    best: bool = False

    @property
    def info(self) -> ProblemInfo:
        """The problem."""
        return self.results.problems[self.problem]

    @property
    def tuning(self) -> Tuning | None:
        """The trials that chose the runs' settings."""
        return self.results.tunings.get(self.problem)

    @functools.cached_property
    def at_best(self) -> "Analysis":
        """The same at the epochs with the best validation metrics."""
        return dataclasses.replace(self, best=True)

    @functools.cached_property
    def weightings(self) -> dict[str, list[Run]]:
        """The runs of each weighting."""
        runs = self.results.of(self.problem)
        return {name: of_name for name, of_name in runs.items() if of_name[0].task is None}

    @functools.cached_property
    def alone(self) -> dict[str, list[Run]]:
        """The runs of each task that was trained alone, by task."""
        runs = self.results.of(self.problem).values()
        return {str(of_name[0].task): of_name for of_name in runs if of_name[0].task is not None}

    @functools.cached_property
    def all_runs(self) -> list[Run]:
        """All runs of the problem."""
        return [run for runs in self.results.of(self.problem).values() for run in runs]

    @functools.cached_property
    def columns(self) -> list[Column]:
        """The metrics that there is a number of, in the order of the problem's tasks."""
        columns = []
        for task, metrics in self.info.tasks.items():
            for metric, info in metrics.items():
                column = Column(
                    task, metric, info, task if len(metrics) == 1 else f"{task} {metric}", 2
                )
                values = [self.metric(run, column) for run in self.all_runs]
                known = column.scale * np.abs([value for value in values if math.isfinite(value)])
                if len(known) or all(run.failure for run in self.all_runs):
                    if info.unit != "%" and known.any():  # four significant digits
                        digits = 3 - math.floor(math.log10(np.median(known[known > 0])))
                        column = dataclasses.replace(column, digits=min(max(digits, 0), 8))
                    columns.append(column)
        return columns

    @functools.cached_property
    def planned_seeds(self) -> list[int]:
        """The seeds of the comparison."""
        return list(dict.fromkeys(seed for _, seed in self.results.planned[self.problem]))

    @functools.cached_property
    def seeds(self) -> list[int]:
        """The seeds with which every row has a run, in the order of the runs."""
        runs = [*self.weightings.values(), *self.alone.values()]
        found = [{run.seed for run in of_name} for of_name in runs]
        planned = self.planned_seeds if found else []
        return [seed for seed in planned if all(seed in seeds for seeds in found)]

    @functools.cached_property
    def values(self) -> dict[str, Float[np.ndarray, "columns seeds"]]:
        """The test metrics of each row, with the seeds that all rows have."""
        rows = {
            name: dict.fromkeys(self.info.tasks, runs) for name, runs in self.weightings.items()
        }
        if set(self.alone) == set(self.info.tasks):
            rows[ALONE] = self.alone
        return {
            name: np.array(
                [
                    [self.metric(run, column) for run in row[column.task] if run.seed in self.seeds]
                    for column in self.columns
                ]
            )
            for name, row in rows.items()
        }

    @functools.cached_property
    def against_equal(self) -> dict[str, list[PairedComparison]]:
        """Every row but equal weights', in every column, corrected by Holm's method."""
        if BASELINE not in self.values or not self.columns:
            return {}
        table = {
            name: {str(number): row for number, row in enumerate(values)}
            for name, values in self.values.items()
        }
        up = {str(number): c.info.higher_is_better for number, c in enumerate(self.columns)}
        compared = compare_table(table, up, baseline=BASELINE)
        return {name: list(row.values()) for name, row in compared.items()}

    @functools.cached_property
    def mean_against_equal(self) -> dict[str, PairedComparison]:
        """The mean over the tasks of every row's change from equal weights, compared with none.

        Corrected by Holm's method for all rows.
        """
        changes = {name: self.mean_change(name, BASELINE) for name in self.values}
        found = {
            name: (np.array(one.values), self.no_change(BASELINE))
            for name, one in changes.items()
            if one is not None
        }
        return dict(zip(found, _against_nothing(found.values()), strict=True)) if found else {}

    @functools.cached_property
    def rows(self) -> list[Row]:
        """All weightings, then each task alone."""
        ranks, front, volumes = self._ranks(), self._front(), self._hypervolumes()
        seconds = {cost.name: cost.step_seconds for cost in self.costs}
        alike = len({(column.metric, column.info) for column in self.columns}) == 1
        rows = []
        names = [*self.weightings, *([ALONE] if self.alone else [])]
        for name in names:
            cells = self._cells(name)
            values = self.values.get(name)
            task, worst = self._worst(name)
            runs = self.weightings.get(name) or list(itertools.chain(*self.alone.values()))
            step_time = seconds.get(name, math.nan) / seconds.get(BASELINE, math.nan)
            rows.append(
                Row(
                    name=name,
                    cells=cells,
                    mean=Estimate.from_values(values.mean(axis=0))
                    if alike and values is not None
                    else None,
                    against_equal=self.mean_change(name, BASELINE),
                    against_alone=self.mean_change(name, ALONE),
                    worst_task=task,
                    worst=worst,
                    rank=ranks.get(name),
                    on_front=front.get(name),
                    hypervolume=volumes.get(name),
                    step_time=step_time if math.isfinite(step_time) else None,
                    runs=len(runs),
                    failed=sum(run.failure is not None for run in runs),
                    skipped=sum(run.skipped for run in runs),
                )
            )
        return rows

    @functools.cached_property
    def costs(self) -> list[Cost]:
        """What each weighting costs."""
        costs = []
        for name, runs in self.weightings.items():
            seconds = [second for run in runs for second in run.epoch_seconds]
            costs.append(
                Cost(
                    name=name,
                    step_seconds=min(seconds, default=math.nan) / self.info.steps_per_epoch,
                    memory_bytes=max(run.memory_bytes or 0 for run in runs) or None,
                    compile_seconds=sum(run.compile_seconds for run in runs),
                    until_equal=self._until_equal(runs),
                )
            )
        return costs

    @functools.cached_property
    def provenance(self) -> dict[str, dict[str, int]]:
        """Where runs differ in what they were made with: the number of runs by what and which."""
        found = made_with(self.all_runs)
        return {key: by_value for key, by_value in found.items() if len(by_value) > 1}

    def metric(self, run: Run, column: Column) -> float:
        """The test metric of a run; NaN if it failed, or trained another task."""
        values = run.metrics.get("test", {}).get(column.task, {}).get(column.metric)
        if run.failure is not None or not values:  # a task that was trained alone has no other's
            return math.nan
        return values[self.best_epoch(run) - 1 if self.best else -1]

    def best_epoch(self, run: Run) -> int:
        """The epoch with the best validation metrics, the first being 1.

        Best is the highest mean relative change of the tasks' metrics from the last epoch's, so
        that metrics on different scales count alike.
        """
        validation = [
            (Column(task, metric, self.info.tasks[task][metric], "", 0), values)
            for task, metrics in run.metrics.get("validation", {}).items()
            for metric, values in metrics.items()
            if math.isfinite(values[-1]) and values[-1] != 0
        ]
        if not validation:
            return run.epochs
        columns, values = zip(*validation, strict=True)
        by_epoch = np.array(values)
        changes = np.mean(list(_task_changes(columns, by_epoch, by_epoch[:, -1:]).values()), axis=0)
        return int(np.nanargmax(changes)) + 1

    def task_changes(self, name: str, reference: str) -> dict[str, Float[np.ndarray, "seeds"]]:
        """The relative change of each task's metrics from another row's, seed by seed.

        NaN where one of the two failed, or the reference is 0. Empty for the reference itself, and
        if there is no such row.
        """
        if name == reference or name not in self.values or reference not in self.values:
            return {}
        return _task_changes(self.columns, self.values[name], self.values[reference])

    def mean_change(self, name: str, reference: str) -> Estimate | None:
        """The mean over the tasks of :meth:`task_changes`; ``None`` if that is empty."""
        changes = self.task_changes(name, reference)
        if not changes or not self.seeds:
            return None
        return Estimate.from_values(np.mean(list(changes.values()), axis=0))

    def weights_apart(self, name: str) -> float | None:
        """How far apart the tasks' mean weights over a run were at most, as a share of their mean.

        ``None`` for an aggregator, which has no weights.
        """
        apart = []
        for run in self.weightings[name]:
            known = [weights[np.isfinite(weights)] for weights in run.weights.values()]
            means = [np.mean(weights) for weights in known if weights.size]
            if means:
                total = np.mean(means)
                apart.append(np.ptp(means) / total if total > 0 else math.inf)
        return float(max(apart)) if apart else None

    def worst_change(self, name: str, reference: str) -> Estimate | None:
        """How much better the worst task is than that of another row, seed by seed.

        A row's worst task is the one with the smallest change from being trained alone; from equal
        weights where that was not done, and 0 for these themselves. It need not be the same one in
        both rows. ``None`` where :meth:`mean_change` is.
        """
        if not self.task_changes(name, reference) or not self.seeds:
            return None
        start = ALONE if ALONE in self.values else BASELINE
        nothing = {"": np.zeros(len(self.seeds))}
        ours, theirs = (
            np.min(list((self.task_changes(row, start) or nothing).values()), axis=0)
            for row in (name, reference)
        )
        return Estimate.from_values(ours - theirs)

    def no_change(
        self, reference: str, of: Literal["mean", "worst"] = "mean"
    ) -> Float[np.ndarray, "seeds"]:
        """What a row without a change has, seed by seed: 0.

        NaN where there is no change of any row: the reference failed there, or is 0.
        """
        worst_from = ALONE if ALONE in self.values else BASELINE
        start = reference if of == "mean" else worst_from
        found = _task_changes(self.columns, self.values[reference], self.values[start])
        return 0 * np.sum(list(found.values()), axis=0)

    def _worst(self, name: str) -> tuple[str | None, Estimate | None]:
        changes = self.task_changes(name, ALONE if ALONE in self.values else BASELINE)
        found = {task: Estimate.from_values(values) for task, values in changes.items()}
        known = {task: one for task, one in found.items() if math.isfinite(one.mean)}
        if not known:
            return None, None
        return min(known.items(), key=lambda item: item[1].mean)

    def _cells(self, name: str) -> tuple[Cell, ...]:
        cells = []
        for number, column in enumerate(self.columns):
            runs = self.alone.get(column.task, []) if name == ALONE else self.weightings[name]
            finished = [run for run in runs if run.failure is None]
            compared = self.against_equal.get(name)
            cells.append(
                Cell(
                    Estimate.from_values([self.metric(run, column) for run in finished]),
                    len(runs),
                    len(runs) - len(finished),
                    compared[number] if compared else None,
                )
            )
        return tuple(cells)

    def _means(self) -> dict[str, Float[np.ndarray, "columns"]]:
        """The mean test metrics of each weighting; NaN if one of its runs failed.

        Rounded to what records hold, so that equal means are equal, whatever they were added from.
        """
        if not self.seeds or not self.columns:
            return {}
        rows = self.values.items()
        means = {name: values.mean(axis=1) for name, values in rows if name != ALONE}
        return {
            name: np.array([float(f"{mean:.5g}") for mean in of_name])
            for name, of_name in means.items()
        }

    def _ranks(self) -> dict[str, float]:
        numbers = [str(number) for number in range(len(self.columns))]
        table = {
            name: dict(zip(numbers, means.tolist(), strict=True))
            for name, means in self._means().items()
        }
        up = [column.info.higher_is_better for column in self.columns]
        return mean_rank(table, dict(zip(numbers, up, strict=True))) if table else {}

    def _front(self) -> dict[str, bool]:
        means = self._means()
        if len(self.columns) < 2 or not means:
            return {}
        up = [column.info.higher_is_better for column in self.columns]
        front = pareto_front(np.array(list(means.values())), up)
        return dict(zip(means, front.tolist(), strict=True))

    def _hypervolumes(self) -> dict[str, float]:
        """Empty for one metric or for many, and if the box around all runs has no volume."""
        if not 2 <= len(self.columns) <= MOST_FOR_HYPERVOLUME or not self.seeds:
            return {}
        points = {name: v.T for name, v in self.values.items() if name != ALONE}
        everything = np.concatenate([np.empty((0, len(self.columns))), *points.values()])
        everything = everything[np.isfinite(everything).all(axis=1)]
        if not len(everything) or not (np.ptp(everything, axis=0) > 0).all():
            return {}
        low, high = everything.min(axis=0), everything.max(axis=0)
        up = np.array([column.info.higher_is_better for column in self.columns])
        worst, best = np.where(up, low, high), np.where(up, high, low)
        corner = np.zeros(len(self.columns))
        return {
            name: hypervolume((found - worst) / (best - worst), corner, higher_is_better=True)
            for name, found in points.items()
        }

    def _until_equal(self, runs: Sequence[Run]) -> tuple[tuple[int, float] | None, ...]:
        ends = {run.seed: run for run in self.weightings.get(BASELINE, []) if run.failure is None}
        found: list[tuple[int, float] | None] = []
        for run in runs:
            if run.seed not in ends or not ends[run.seed].epoch_seconds:
                continue
            first = None
            if run.failure is None and self.columns:
                by_epoch, equal = (
                    np.array([one.metrics["test"][c.task][c.metric] for c in self.columns])
                    for one in (run, ends[run.seed])
                )
                changes = _task_changes(self.columns, by_epoch, equal[:, -1:])
                mean = np.mean(list(changes.values()), axis=0)
                if np.isnan(mean).all():  # of equal weights that end at 0
                    continue
                reached = np.flatnonzero(mean >= 0)
                first = int(reached[0]) + 1 if len(reached) else None
            found.append(None if first is None else (first, sum(run.epoch_seconds[:first])))
        return tuple(found)


def made_with(runs: Iterable[Run]) -> dict[str, dict[str, int]]:
    """What runs were made with: versions and devices, each with the number of runs."""
    found: dict[str, dict[str, int]] = {}
    for run in runs:
        flat = {**run.provenance.get("versions", {}), **run.provenance}
        for key, value in flat.items():
            if key not in ("versions", "begun with"):  # what is nested
                text = str(value)[:8] if key == "program" else str(value)  # a digest
                by_value = found.setdefault(key, {})
                by_value[text] = by_value.get(text, 0) + 1
    return found


def over_problems(
    results: Results,
    weighting: str | None = None,
    *,
    of: Literal["mean", "worst"] = "mean",
    others: Sequence[str] | None = None,
) -> dict[str, dict[str, PairedComparison]]:
    """What all problems say together: Δm seed by seed, corrected for all comparisons by Holm.

    Args:
      results: the results of at least one problem.
      weighting: the weighting to compare with every other one; ``None`` to compare every weighting
        with equal weights.
      of: ``"mean"`` for the mean change over the tasks (:meth:`Analysis.mean_change`), ``"worst"``
        for that of the worst task (:meth:`Analysis.worst_change`).
      others: the names to compare, where not with all; a name may be :data:`ALONE`.

    Returns:
      By problem, and then by the weighting that is compared with equal weights, or that the given
      one is compared with: the comparison of the change with none.

    Raises:
      ValueError: if no problem has a run of that weighting.
    """
    changes: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}
    for problem in results.problems:
        analysis = Analysis(results, problem)
        change = analysis.mean_change if of == "mean" else analysis.worst_change
        for name in analysis.weightings if others is None else others:
            pair = (name, BASELINE) if weighting is None else (weighting, name)
            found = change(*pair)
            if found is not None:
                changes[problem, name] = np.array(found.values), analysis.no_change(pair[1], of)
    if weighting is not None and not changes:
        raise ValueError(
            f"There is nothing to compare {weighting!r} with: it, or another weighting beside it, "
            f"did not run on {', '.join(map(repr, results.problems))}."
        )
    table: dict[str, dict[str, PairedComparison]] = {}
    for (problem, name), found in zip(changes, _against_nothing(changes.values()), strict=True):
        table.setdefault(problem, {})[name] = found
    return table


def _against_nothing(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> list[PairedComparison]:
    """The comparison of each row of changes with one of none, corrected for all of them."""
    numbered = {str(number): pair for number, pair in enumerate(pairs)}
    table = {
        name: {number: pair[place] for number, pair in numbered.items()}
        for place, name in enumerate(("change", "none"))
    }
    up = dict.fromkeys(numbered, True)
    return list(compare_table(table, up, baseline="none")["change"].values())


def _task_changes(
    columns: Sequence[Column], values: np.ndarray, baseline: np.ndarray
) -> dict[str, Any]:
    """The relative change of each task's metrics ``[columns, ...]``, averaged within the task."""
    signs = np.array([[1.0] if column.info.higher_is_better else [-1.0] for column in columns])
    known = np.where(baseline == 0, np.nan, baseline)
    changes = signs * (values - known) / np.abs(known)
    tasks: Mapping[str, None] = dict.fromkeys(column.task for column in columns)
    return {
        task: changes[[column.task == task for column in columns]].mean(axis=0) for task in tasks
    }
