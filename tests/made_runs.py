"""Comparisons made of numbers, for the tests of what is said of them."""

import numpy as np
from toy_problem import make_problem, split

from mtl_jax.compare import Comparison, Run, Task

TASKS = {"topic": Task(), "depth": Task("error", higher_is_better=False, percent=False)}
EQUAL = {"topic": [0.50, 0.52, 0.54, 0.53], "depth": [1.0, 1.1, 0.9, 1.2]}


def made_run(name, seed, metrics, epochs=3, failure=None, weights=None, seconds=2.0, losses=None):
    """A run whose metrics begin at half their last values, or with their course."""
    course = {
        task: list(np.linspace(value / 2, value, epochs)) if np.isscalar(value) else list(value)
        for task, value in metrics.items()
    }
    steps = 6 * epochs
    return Run(
        name,
        seed,
        failure=failure,
        test=course,
        validation=course,
        train_losses=losses or {task: [2.0] * (epochs - 1) + [1.0] for task in metrics},
        weights={task: np.ones(steps) for task in metrics} if weights is None else weights,
        epoch_seconds=[seconds] * epochs,
        memory_bytes=12_345_678,
    )


def made_comparison(rows, tasks=TASKS, alone=None, epochs=3, name="made", **options):
    """A comparison of the metrics ``rows[weighting][task][seed]``."""
    tasks = TASKS if tasks is None else tasks
    problem = make_problem(
        tasks=tasks,
        targets={},
        train=split(200, 0),
        epochs=epochs,
        name=options.pop("name", "made"),
    )
    number = len(next(iter(next(iter(rows.values())).values())))

    def runs(name, row):
        return [
            made_run(name, seed, {task: values[seed] for task, values in row.items()}, epochs)
            for seed in range(number)
        ]

    return Comparison(
        problem=problem,
        seeds=tuple(range(number)),
        runs={name: runs(name, row) for name, row in rows.items()},
        alone={task: runs(f"{task} alone", {task: row}) for task, row in (alone or {}).items()},
        **options,
    )


def shifted(by):
    """The metrics of equal weights with something added to each seed."""
    return {task: list(np.add(EQUAL[task], by[task])) for task in EQUAL}
