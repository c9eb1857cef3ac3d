"""The comparison: every weighting on one problem, over several seeds, beside each task alone."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mtl_jax._base import Aggregator, Weighting
from mtl_jax.compare.batches import check_devices, steps_per_epoch
from mtl_jax.compare.checkpoints import Checkpoints
from mtl_jax.compare.metrics import Evaluator
from mtl_jax.compare.problem import Problem
from mtl_jax.compare.run import Run
from mtl_jax.compare.settings import Tuning
from mtl_jax.compare.training import Trainer
from mtl_jax.compare.weightings import WEIGHTINGS, MakeWeighting, RunSettings
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
      unfinished: how many runs are missing, while or since the comparison was not finished.
      tuning: the trials that chose the settings of the runs; ``None`` if all ran as shipped.
    """

    problem: Problem
    seeds: tuple[int, ...]
    runs: Mapping[str, Sequence[Run]]
    alone: Mapping[str, Sequence[Run]]
    unfinished: int = 0
    tuning: Tuning | None = None

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
        """Mean relative change of the test metrics against each task alone with the same seed.

        NaN if a task alone failed, scored 0, or is not finished with this seed.
        """

        def metric(run: Run, task: str) -> float:
            return run.test[task][self.best_epoch(run) if best else -1]

        alone = {
            task: metric(lone, task)
            for task, runs in self.alone.items()
            for lone in runs
            if lone.seed == run.seed and lone.failure is None
        }
        if set(alone) != set(self.problem.tasks) or not all(alone.values()):
            return float("nan")
        directions = {task: self.problem.tasks[task].higher_is_better for task in alone}
        return delta_m({task: metric(run, task) for task in alone}, alone, directions)

    def step_seconds(self, name: str) -> float:
        """The wall time of a training step of a weighting, in its fastest epoch of all seeds.

        The fastest, since whatever else the machine does can only add to it.
        """
        fastest = min(seconds for run in self.runs[name] for seconds in run.epoch_seconds)
        return fastest / steps_per_epoch(self.problem)


def with_baselines(
    weightings: Mapping[str, MakeWeighting], *, tuned: bool = False
) -> dict[str, MakeWeighting]:
    """The weightings after what is always run: equal weights, and constant ones if tuned."""
    baselines = (BASELINE, "constant") if tuned else (BASELINE,)
    return {name: WEIGHTINGS[name] for name in baselines} | dict(weightings)


def lone_name(task: str) -> str:
    """The name of the runs of a task alone."""
    return f"{task} alone"


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
    return {
        name: make_weighting(problem, name, make)
        for name, make in with_baselines(weightings).items()
    }


def make_weighting(problem: Problem, name: str, make: MakeWeighting) -> Weighting | Aggregator:
    """Make one weighting for a problem, and check that it can run on it.

    Raises:
      ValueError: as :func:`make_weightings`.
    """
    steps = steps_per_epoch(problem)
    optimizer = problem.optimizer(problem.learning_rate, steps * problem.epochs)
    settings = RunSettings(steps, problem.epochs, optimizer, problem.learning_rate)
    weighting = make(settings)
    params, _ = jax.eval_shape(problem.init, jax.random.key(0))
    losses = dict.fromkeys(problem.tasks, jax.ShapeDtypeStruct((), jnp.float32))

    def initialize(params, losses, key):
        if isinstance(weighting, Weighting):
            return weighting.init(losses, key=key, params=params)
        return weighting.init(params, losses, key=key)

    try:
        jax.eval_shape(initialize, params, losses, jax.random.key(0))
    except ValueError as error:
        raise ValueError(f"{name!r} cannot run on {problem.name!r}: {error}") from error
    return weighting


def _as_chosen(
    problem: Problem, name: str, make: MakeWeighting, tuning: Tuning | None
) -> tuple[Problem, Weighting | Aggregator]:
    """The problem with the learning rate, and the weighting with the parameters, of a tuning."""
    if tuning is not None:
        chosen = tuning.chosen(name)
        problem = problem.with_settings(learning_rate=chosen.learning_rate)
        make = functools.partial(make, **chosen.parameters)
    return problem, make_weighting(problem, name, make)


def compare(
    problem: Problem,
    weightings: Mapping[str, MakeWeighting],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    alone: bool = True,
    conflict: bool = False,
    tuning: Tuning | None = None,
    checkpoints: str | os.PathLike[str] | Checkpoints | None = None,
    mesh: Mesh | None = None,
    on_epoch: Callable[[Run], None] = lambda run: None,
    on_run: Callable[[Comparison], None] = lambda comparison: None,
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
      tuning: the trials of :func:`tune`. Every weighting and each task alone then run with what was
        chosen for them, and constant weights are always run, too.
      checkpoints: a folder for checkpoints of the runs, or :class:`Checkpoints`, which says also
        how often they are saved, and whether to resume. Resumed, a comparison comes out as if it
        had never been interrupted, bit for bit: runs that are finished are read, and the one that
        is not goes on from its last checkpoint.
      mesh: devices that each batch is spread over, the parameters being on all; of several
        processes, if ``jax.distributed`` is initialised. All of them then call this function
        alike and, with checkpoints, see one file system. ``None`` for one device.
      on_epoch: called with the run after every epoch of it, and with every run that was read.
      on_run: called with the comparison as far as it has come, after every run and after all that
        is finished was read.

    Returns:
      The comparison.

    Raises:
      ValueError: if there are no seeds or one is given twice, the problem's settings do not fit
        its data, a weighting cannot run on the problem, or the tuning lacks a weighting or was
        done with one of the seeds; before anything is trained.
      FileExistsError: if there are checkpoints, and it was not said to resume.
      OtherConfigurationError: a ``ValueError``; if the checkpoints are of runs with other settings,
        data or programs than these, or were made elsewhere.
      OSError: if a checkpoint cannot be written.
    """
    seeds = tuple(seeds)
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"At least one seed is needed, and none twice; got {list(seeds)}.")
    if tuning is not None and tuning.seed in seeds:
        raise ValueError(
            f"Seed {tuning.seed} is the one of the tuning: its runs are those that were chosen "
            "for. Compare with other seeds."
        )
    made = [
        (name, *_as_chosen(problem, name, make, tuning))
        for name, make in with_baselines(weightings, tuned=tuning is not None).items()
    ]
    made_alone = [
        (task, *_as_chosen(problem, lone_name(task), WEIGHTINGS[BASELINE], tuning))
        for task in (problem.tasks if alone else ())
    ]
    check_devices(problem, mesh)
    evaluate = Evaluator(problem, mesh=mesh)
    trainers = [
        Trainer(own, evaluate, weighting, name, conflict=conflict, mesh=mesh)
        for name, own, weighting in made
    ]
    lone_trainers = [
        Trainer(own, evaluate, weighting, lone_name(task), [task], mesh=mesh)
        for task, own, weighting in made_alone
    ]
    if checkpoints is not None:
        if not isinstance(checkpoints, Checkpoints):
            checkpoints = Checkpoints(checkpoints)
        checkpoints.begin(problem.name)
    # Seeds outermost, so that a slow moment of the machine falls on all alike.
    plan = [(trainer, seed) for seed in seeds for trainer in trainers + lone_trainers]
    finished: dict[tuple[str, int], Run] = {}

    def so_far() -> Comparison:
        def of(trainer: Trainer) -> list[Run]:
            keys = [(trainer.name, seed) for seed in seeds]
            return [finished[key] for key in keys if key in finished]

        return Comparison(
            problem=problem,
            seeds=seeds,
            runs={trainer.name: of(trainer) for trainer in trainers if of(trainer)},
            alone={trainer.tasks[0]: of(trainer) for trainer in lone_trainers if of(trainer)},
            unfinished=len(plan) - len(finished),
            tuning=tuning,
        )

    # What is finished is read, and all configurations are checked, before anything is trained.
    if checkpoints is not None:
        for trainer, seed in plan:
            of_run = checkpoints.of_run(problem.name, trainer.name, seed)
            run = trainer.read(seed, of_run) if of_run.folder.exists() else None
            if run is not None and trainer.is_finished(run):
                finished[trainer.name, seed] = run
                on_epoch(run)
    if finished:
        on_run(so_far())
    for trainer, seed in plan:
        if (trainer.name, seed) in finished:
            continue
        run = Run(trainer.name, seed)
        with (
            contextlib.nullcontext()
            if checkpoints is None
            else checkpoints.of_run(problem.name, trainer.name, seed)
        ) as saved:
            for run in trainer.run(seed, saved):
                on_epoch(run)
        finished[trainer.name, seed] = run
        on_run(so_far())
    return so_far()
