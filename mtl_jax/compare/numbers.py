"""The numbers of a comparison, as JSON has them: what it found, and how long it took."""

import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mtl_jax.compare.findings import Findings, time_to_reach_equal
from mtl_jax.compare.plots import thinned
from mtl_jax.compare.referee import BASELINE, Comparison
from mtl_jax.compare.run import Run
from mtl_jax.compare.settings import Trial, Tuning
from mtl_jax.compare.sources import joined
from mtl_jax.evaluation import PairedComparison


def results(comparison: Comparison) -> dict[str, Any]:
    """All that a comparison found and that is the same when it is run again."""
    problem = comparison.problem
    return {
        "settings": {
            "epochs": problem.epochs,
            "batch_size": joined(problem.batch_sizes()),
            "learning_rate": problem.learning_rate,
            "seeds": list(comparison.seeds),
            "examples": {
                part: joined(problem.sizes(part)) for part in ("train", "validation", "test")
            },
        },
        "tasks": {
            name: {"metric": task.metric, "higher_is_better": task.higher_is_better}
            for name, task in problem.tasks.items()
        },
        "weightings": {
            name: [_run_results(comparison, run) for run in runs]
            for name, runs in comparison.runs.items()
        },
        "alone": {
            task: [_run_results(comparison, run) for run in runs]
            for task, runs in comparison.alone.items()
        },
        "against_equal": {
            name: {task: _verdict(found) for task, found in row.items()}
            for name, row in Findings(comparison).against_equal.items()
        },
        **({"unfinished_runs": comparison.unfinished} if comparison.unfinished else {}),
        **({"tuning": _tuning(comparison.tuning)} if comparison.tuning else {}),
    }


def _tuning(tuning: Tuning) -> dict[str, Any]:
    def of(trial: Trial) -> dict[str, Any]:
        return {
            "learning_rate": trial.learning_rate,
            "parameters": dict(trial.parameters),
            "validation_change": trial.score,
            "failure": trial.failure,
            "epochs": trial.epochs,
        }

    return {
        "seed": tuning.seed,
        "chosen": {name: of(tuning.chosen(name)) for name in tuning.trials},
        "trials": {name: [of(trial) for trial in row] for name, row in tuning.trials.items()},
    }


def timing(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """How long it took, with which versions and on what machine."""
    return {
        "machine": machine(),
        "versions": versions(),
        "problems": {
            comparison.problem.name: {
                "step_seconds": {name: comparison.step_seconds(name) for name in comparison.runs},
                "step_time_relative_to_equal": {
                    name: comparison.step_seconds(name) / comparison.step_seconds(BASELINE)
                    for name in comparison.runs
                },
                "time_to_reach_equal": {
                    name: [
                        None if of is None else {"epoch": of[0], "seconds": of[1]}
                        for of in time_to_reach_equal(comparison, name)
                    ]
                    for name in comparison.runs
                },
                "runs": [
                    {
                        "run": run.weighting,
                        "seed": run.seed,
                        "compile_seconds": run.compile_seconds,
                        "epoch_seconds": run.epoch_seconds,
                        "memory_bytes": run.memory_bytes,
                    }
                    for runs in (*comparison.runs.values(), *comparison.alone.values())
                    for run in runs
                ],
            }
            for comparison in comparisons
        },
    }


def machine() -> dict[str, Any]:
    """What it runs on."""
    return {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "devices": [device.device_kind for device in jax.devices()],
    }


def versions() -> dict[str, str]:
    """The versions of what decides the numbers."""
    packages = ("mtl-jax", "jax", "jaxlib", "optax", "flax", "numpy")
    return {"python": platform.python_version()} | {
        name: version for name in packages if (version := _version(name)) is not None
    }


def _run_results(comparison: Comparison, run: Run) -> dict[str, Any]:
    return {
        "seed": run.seed,
        "failure": run.failure,
        "skipped_steps": run.skipped,
        "best_epoch": comparison.best_epoch(run) + 1,
        "train_loss": _rounded(run.train_losses),
        "validation": _rounded(run.validation),
        "test": _rounded(run.test),
        "weights": _thinned(run.weights),
        "conflict": {"measured_at": run.measured_at} | _thinned(run.conflict),
    }


def _verdict(found: PairedComparison) -> dict[str, Any]:
    numbers = {
        "difference": [found.difference],
        "interval": found.interval,
        "corrected_p_value": [found.corrected_p_value],
    }
    difference, interval, p_value = _rounded(numbers).values()
    return {
        "seeds": found.seeds,
        "difference": difference[0],
        "interval": interval,
        "corrected_p_value": p_value[0],
        "verdict": found.verdict,
    }


def _thinned(steps: Mapping[str, np.ndarray]) -> dict[str, list[float | None]]:
    """Values by step, thinned, and the middle step of each piece; empty if there are none."""
    if not steps:
        return {}
    thin = {name: thinned(values) for name, values in steps.items()}
    centres = next(iter(thin.values()))[0]
    return {"step": centres.tolist()} | _rounded({name: means for name, (_, means) in thin.items()})


def _rounded(values: Mapping[str, Sequence[float] | np.ndarray]) -> dict[str, list[float | None]]:
    """Six significant digits; ``None`` for what is not finite, as JSON has no word for it."""
    return {
        name: [float(f"{value:.6g}") if np.isfinite(value) else None for value in row]
        for name, row in values.items()
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
