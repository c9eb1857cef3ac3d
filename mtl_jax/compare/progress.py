"""A comparison with a progress bar."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import rich.console
import rich.progress

from mtl_jax.compare.problem import Problem
from mtl_jax.compare.referee import BASELINE, Comparison, compare
from mtl_jax.compare.run import Run
from mtl_jax.compare.weightings import MakeWeighting


def compare_with_progress(
    problem: Problem,
    weightings: Mapping[str, MakeWeighting],
    console: rich.console.Console,
    *,
    seeds: Sequence[int],
    alone: bool,
    on_epoch: Callable[[Run], None] | None = None,
    **options: Any,
) -> Comparison:
    """Compare, and show on the console how many epochs are done. As :func:`compare` else."""
    number = len({BASELINE, *weightings}) + (len(problem.tasks) if alone else 0)
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("epochs"),
        rich.progress.TimeRemainingColumn(),
    )
    done: dict[tuple[str, int], int] = {}
    with rich.progress.Progress(*columns, console=console) as progress:
        bar = progress.add_task(problem.name, total=number * len(seeds) * problem.epochs)

        def show(run: Run) -> None:
            if on_epoch is not None:
                on_epoch(run)
            done[run.weighting, run.seed] = run.epochs if run.failure is None else problem.epochs
            description = f"{problem.name}: {run.weighting}, seed {run.seed}"
            progress.update(bar, completed=sum(done.values()), description=description)

        comparison = compare(
            problem, weightings, seeds=seeds, alone=alone, on_epoch=show, **options
        )
        progress.update(bar, description=problem.name)
    return comparison
