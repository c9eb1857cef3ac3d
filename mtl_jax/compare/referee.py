"""The comparison: every weighting on one problem, over several seeds, beside each task alone."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

import mtl_jax
from mtl_jax.base import Aggregator, Weighting
from mtl_jax.compare.problem import Problem
from mtl_jax.compare.training import Evaluator, Run, Trainer, steps_per_epoch
from mtl_jax.compare.weightings import WEIGHTINGS, MakeWeighting, RunSettings
from mtl_jax.evaluation import delta_m
from mtl_jax.train import TrainState

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


def make_weightings(
    problem: Problem, weightings: Mapping[str, MakeWeighting]
) -> dict[str, Weighting | Aggregator]:
    """Make the weightings for a problem, equal weights first, and check that they can run on it.

    Args:
      problem: the problem.
      weightings: functions that make the weightings, by name.

    Returns:
      The weightings by name.

    Raises:
      ValueError: if a weighting cannot run on this problem, such as one that needs more tasks, or
        the problem's settings do not fit its data.
    """
    steps = steps_per_epoch(problem)
    optimizer = problem.optimizer(problem.learning_rate, steps * problem.epochs)
    settings = RunSettings(steps, problem.epochs, optimizer)
    params, _ = jax.eval_shape(problem.init, jax.random.key(0))
    losses = dict.fromkeys(problem.tasks, jax.ShapeDtypeStruct((), jnp.float32))
    made = {}
    for name, make in ({BASELINE: WEIGHTINGS[BASELINE]} | dict(weightings)).items():
        made[name] = weighting = make(settings)

        def initialize(params, losses, key, weighting=weighting):
            return TrainState.create(
                params, optimizer, weighting, losses, weighting_key=key, shared=problem.shared
            )

        try:
            jax.eval_shape(initialize, params, losses, jax.random.key(0))
        except ValueError as error:
            raise ValueError(f"{name!r} cannot run on {problem.name!r}: {error}") from error
    return made


def compare(
    problem: Problem,
    weightings: Mapping[str, MakeWeighting],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    alone: bool = True,
    conflict: bool = False,
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
      conflict: whether to measure how the task gradients conflict also for the weightings that do
        not read them. It costs them what reading the Gramian costs: little where the problem has an
        encoder and heads, else a backward pass for each task.
      on_epoch: called with the run after every epoch of it.

    Returns:
      The comparison.

    Raises:
      ValueError: if there are no seeds or one is given twice, the problem's settings do not fit
        its data, or a weighting cannot run on the problem; before anything is trained.
    """
    seeds = tuple(seeds)
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"At least one seed is needed, and none twice; got {list(seeds)}.")
    made = make_weightings(problem, weightings)
    evaluate = Evaluator(problem)
    trainers = [
        Trainer(problem, evaluate, weighting, name, conflict=conflict)
        for name, weighting in made.items()
    ]
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
