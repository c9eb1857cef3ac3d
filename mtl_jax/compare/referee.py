"""The comparison: every weighting on one problem, over several seeds, beside each task alone."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

import mtl_jax
from mtl_jax.compare.problem import Problem
from mtl_jax.compare.training import Evaluator, Run, Trainer, steps_per_epoch
from mtl_jax.compare.weightings import MakeWeighting, RunSettings
from mtl_jax.evaluation import delta_m

BASELINE = "equal"
"""The weighting that others are measured against; it is always run."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The runs on one problem.

    Attributes:
      problem: the problem, with the settings that the runs had.
      seeds: the seeds.
      runs: the runs of each weighting, in the order of the seeds.
      alone: for each task, the runs of the network trained on that task alone.
    """

    problem: Problem
    seeds: tuple[int, ...]
    runs: Mapping[str, Sequence[Run]]
    alone: Mapping[str, Sequence[Run]]

    def metrics(self, run: Run, epoch: int = -1) -> dict[str, float]:
        """The test metric of each task that the run trained, after an epoch."""
        return {task: values[epoch] for task, values in run.test.items()}

    def best_epoch(self, run: Run) -> int:
        """The epoch with the best validation metrics, the first being 0.

        Best is the highest mean relative change of the tasks' metrics from the last epoch's, so
        that metrics on different scales count alike.
        """
        last = {task: values[-1] for task, values in run.validation.items()}
        if not all(last.values()):
            return len(next(iter(run.validation.values()))) - 1
        directions = {task: self.problem.tasks[task].higher_is_better for task in run.validation}
        changes = [
            delta_m(
                {task: values[epoch] for task, values in run.validation.items()}, last, directions
            )
            for epoch in range(len(next(iter(run.validation.values()))))
        ]
        return int(np.nanargmax(changes)) if np.isfinite(changes).any() else len(changes) - 1

    def change_from_alone(self, run: Run, *, best: bool = False) -> float:
        """Mean relative change of the test metrics against each task alone with the same seed."""

        def metric(run: Run, task: str) -> float:
            return run.test[task][self.best_epoch(run) if best else -1]

        number = self.seeds.index(run.seed)
        alone = {task: metric(runs[number], task) for task, runs in self.alone.items()}
        if any(runs[number].failure for runs in self.alone.values()) or not all(alone.values()):
            return float("nan")
        directions = {task: self.problem.tasks[task].higher_is_better for task in alone}
        return delta_m({task: metric(run, task) for task in alone}, alone, directions)

    def step_seconds(self, name: str) -> float:
        """The wall time of a training step of a weighting, in its fastest epoch of all seeds.

        The fastest, since whatever else the machine does can only add to it.
        """
        fastest = min(seconds for run in self.runs[name] for seconds in run.epoch_seconds)
        return fastest / steps_per_epoch(self.problem)


def compare(
    problem: Problem,
    weightings: Mapping[str, MakeWeighting],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    alone: bool = True,
    on_epoch: Callable[[Run], None] = lambda run: None,
) -> Comparison:
    """Train the problem's network with every weighting and every seed.

    With one seed, every weighting starts from the same parameters and sees the same batches in
    the same order. Equal weights are always run, as the baseline. A run that finds no finite
    update in a whole epoch ends there and says so; the others go on.

    Args:
      problem: the problem.
      weightings: functions that make the weightings, by name.
      seeds: the seeds.
      alone: whether to train each task alone, too: the same network on that task's loss only.
      on_epoch: called with the run after every epoch of it.

    Returns:
      The comparison.

    Raises:
      ValueError: if there are no seeds or one is given twice, or the problem's settings do not
        fit its data.
    """
    seeds = tuple(seeds)
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"At least one seed is needed, and none twice; got {list(seeds)}.")
    settings = RunSettings(
        steps_per_epoch(problem),
        problem.epochs,
        problem.optimizer(problem.learning_rate, steps_per_epoch(problem) * problem.epochs),
    )
    evaluate = Evaluator(problem)
    made = {BASELINE: mtl_jax.equal()} | {name: make(settings) for name, make in weightings.items()}
    trainers = [Trainer(problem, evaluate, weighting, name) for name, weighting in made.items()]
    lone_trainers = [
        Trainer(problem, evaluate, mtl_jax.equal(), f"{task} alone", [task])
        for task in (problem.tasks if alone else ())
    ]
    runs: dict[str, list[Run]] = {trainer.name: [] for trainer in trainers + lone_trainers}
    for seed in seeds:  # outermost, so that a slow moment of the machine falls on all alike
        for trainer in trainers + lone_trainers:
            run = Run(trainer.name, seed)
            for run in trainer.run(seed):
                on_epoch(run)
            runs[trainer.name].append(run)
    return Comparison(
        problem=problem,
        seeds=seeds,
        runs={trainer.name: runs[trainer.name] for trainer in trainers},
        alone={trainer.tasks[0]: runs[trainer.name] for trainer in lone_trainers},
    )
