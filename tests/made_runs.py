"""Results made of numbers, without training, for the tests of what is said of them."""

import numpy as np

from mtl_jax.compare import MetricInfo, ProblemInfo, Results, Run, Trial, Tuning
from mtl_jax.compare.results import alone_name

ACCURACY = {"accuracy": MetricInfo(higher_is_better=True, unit="%")}
ERROR = {"error": MetricInfo(higher_is_better=False)}
TASKS = {"topic": ACCURACY, "depth": ERROR}
EQUAL = {"topic": [0.50, 0.52, 0.54, 0.53], "depth": [1.0, 1.1, 0.9, 1.2]}
VERSIONS = {"versions": {"jax": "0.10.0", "numpy": "2.3.1"}, "device": "1 x cpu (cpu)"}


def made_problem(tasks=TASKS, name="made", epochs=3):
    return ProblemInfo(
        name=name,
        description=f"The problem {name}.",
        tasks=tasks,
        examples={"train": {"": 200}, "validation": {"": 50}, "test": {"": 70}},
        epochs=epochs,
        steps_per_epoch=6,
        batch_size={"": 32},
        learning_rate=0.01,
        data="0123",
    )


def made_run(info, name, seed, values, task=None, **changes):
    """A run whose metrics begin at half their last values, or with their course.

    The values are by task, of its one metric, or by task and metric.
    """
    by_metric = {
        of_task: value if isinstance(value, dict) else {next(iter(info.tasks[of_task])): value}
        for of_task, value in values.items()
    }
    course = {
        of_task: {
            metric: list(np.linspace(value / 2, value, info.epochs))
            if np.isscalar(value)
            else list(value)
            for metric, value in metrics.items()
        }
        for of_task, metrics in by_metric.items()
    }
    found = {
        "task": task,
        "learning_rate": 0.01,
        "train_losses": {of_task: [2.0] * (info.epochs - 1) + [1.0] for of_task in values},
        "metrics": {"validation": course, "test": course},
        "weights": {
            of_task: np.full(6 * info.epochs, 1.0 + number) for number, of_task in enumerate(values)
        },
        "epoch_seconds": [2.0] * info.epochs,
        "compile_seconds": 1.5,
        "compilations": 1,
        "memory_bytes": 12_345_678,
        "provenance": VERSIONS,
    }
    return Run(info.name, name, seed, **(found | changes))


def made_results(rows, tasks=TASKS, alone=None, name="made", epochs=3, tuning=None):
    """Results of the values ``rows[weighting][task][seed]``, or ``[task][metric][seed]``."""
    info = made_problem(tasks, name, epochs)

    def one_seed(values, seed):
        return {
            key: one_seed(value, seed) if isinstance(value, dict) else value[seed]
            for key, value in values.items()
        }

    def number(values):
        first = next(iter(values.values()))
        return number(first) if isinstance(first, dict) else len(first)

    runs = []
    for seed in range(number(next(iter(rows.values())))):
        for weighting, row in rows.items():
            runs.append(made_run(info, weighting, seed, one_seed(row, seed)))
        for task, values in (alone or {}).items():
            own = one_seed({task: values}, seed)
            runs.append(made_run(info, alone_name(task), seed, own, task))
    return Results(
        problems={name: info},
        runs=runs,
        tunings={} if tuning is None else {name: tuning},
        planned={name: [(run.weighting, run.seed) for run in runs]},
        command="mtl-jax compare my:problem",
    )


def made_tuning(*names, select="mean"):
    """A tuning of three trials, the second of which is the best and the last of which failed."""
    trials = [
        Trial(
            0.01,
            {},
            {"topic": {"accuracy": [0.4, 0.5]}},
            score=0.0,
            seconds=3.0,
            train_losses={"topic": [2.0, 1.0]},
        ),
        Trial(0.03, {"beta": 0.25, "form": "half"}, score=0.0215, seconds=2.0, compilations=1),
        Trial(0.1, {"beta": 0.5}, failure="no finite update in epoch 1", seconds=1.0),
    ]
    return Tuning(1000, select, dict.fromkeys(names, trials))


def shifted(by):
    """The metrics of equal weights with something added to each seed."""
    return {task: list(np.add(EQUAL[task], by[task])) for task in EQUAL}
