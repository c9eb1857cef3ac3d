"""A comparison, and its tuning, with a progress bar."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import rich.console
import rich.progress

from mtl_jax.compare.problem import Problem
from mtl_jax.compare.referee import Comparison, compare, with_baselines
from mtl_jax.compare.run import Run
from mtl_jax.compare.settings import Trial, Tuning
from mtl_jax.compare.tuning import tune
from mtl_jax.compare.weightings import MakeWeighting


def compare_with_progress(
    problem: Problem,
    weightings: Mapping[str, MakeWeighting],
    console: rich.console.Console,
    *,
    seeds: Sequence[int],
    alone: bool,
    tuning: Tuning | None = None,
    on_epoch: Callable[[Run], None] | None = None,
    **options: Any,
) -> Comparison:
    """Compare, and show on the console how many epochs are done. As :func:`compare` else."""
    number = _number(problem, weightings, alone, tuned=tuning is not None)
    done: dict[tuple[str, int], int] = {}
    with _progress(console) as progress:
        bar = progress.add_task(problem.name, total=number * len(seeds) * problem.epochs)

        def show(run: Run) -> None:
            if on_epoch is not None:
                on_epoch(run)
            done[run.weighting, run.seed] = run.epochs if run.failure is None else problem.epochs
            description = f"{problem.name}: {run.weighting}, seed {run.seed}"
            progress.update(bar, completed=sum(done.values()), description=description)

        comparison = compare(
            problem,
            weightings,
            seeds=seeds,
            alone=alone,
            tuning=tuning,
            on_epoch=show,
            **options,
        )
        progress.update(bar, description=problem.name)
    return comparison


def tune_with_progress(
    problem: Problem,
    weightings: Mapping[str, MakeWeighting],
    console: rich.console.Console,
    *,
    trials: int,
    alone: bool,
    **options: Any,
) -> Tuning:
    """Tune, and show on the console how many epochs are done. As :func:`tune` else."""
    number = _number(problem, weightings, alone, tuned=True)
    done: dict[str, int] = {}
    with _progress(console) as progress:
        bar = progress.add_task(problem.name, total=number * trials * problem.epochs)

        def show(name: str, trials: Sequence[Trial]) -> None:
            done[name] = len(trials) * problem.epochs
            description = f"{problem.name}, tuning: {name}"
            progress.update(bar, completed=sum(done.values()), description=description)

        return tune(problem, weightings, trials=trials, alone=alone, on_trial=show, **options)


def _number(
    problem: Problem, weightings: Mapping[str, MakeWeighting], alone: bool, *, tuned: bool
) -> int:
    """How many weightings and tasks alone are run."""
    return len(with_baselines(weightings, tuned=tuned)) + (len(problem.tasks) if alone else 0)


def _progress(console: rich.console.Console) -> rich.progress.Progress:
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("epochs"),
        rich.progress.TimeRemainingColumn(),
        console=console,
    )
