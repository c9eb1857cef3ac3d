"""Runs comparisons with a progress bar and leaves their results in a folder."""

import importlib.metadata
import json
import os
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import rich.console
import rich.markdown
import rich.progress

from mtl_jax.compare.pictures import conflict_figure, metrics_figure, thinned, weights_figure
from mtl_jax.compare.problem import Problem
from mtl_jax.compare.referee import BASELINE, Comparison, compare, make_weightings
from mtl_jax.compare.tables import markdown_report, markdown_table
from mtl_jax.compare.training import Run
from mtl_jax.compare.weightings import MakeWeighting


def compare_and_report(
    problems: Sequence[Problem],
    weightings: Mapping[str, MakeWeighting],
    folder: str | os.PathLike[str],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    alone: bool = True,
    conflict: bool = False,
    command: str = "",
) -> list[Comparison]:
    """Compare the weightings on every problem, print the tables and write the results.

    The folder receives ``results.json`` (all that is the same when run again on the same machine),
    ``timing.json`` (times, versions, machine), and for each problem ``<problem>.md`` (the tables),
    ``<problem>_metrics.png``, ``<problem>_weights.png`` and, if the task gradients were measured,
    ``<problem>_conflict.png``.

    Args:
      problems: the problems.
      weightings: functions that make the weightings, by name.
      folder: where the results go; made if it does not exist.
      seeds: the seeds.
      alone: whether to train each task alone, too.
      conflict: whether to measure conflicts for all weightings, as in :func:`compare`.
      command: the command that makes these results, for the reader of the tables.

    Returns:
      The comparison on each problem.

    Raises:
      ValueError: as :func:`compare`, for any of the problems before the first is trained.
    """
    for problem in problems:
        make_weightings(problem, weightings)
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    console = rich.console.Console()
    if not console.is_terminal:  # a file or a pipe does not limit the width
        console = rich.console.Console(width=140)
    comparisons = []
    for problem in problems:
        comparison = _compare(problem, weightings, seeds, alone, conflict, console)
        comparisons.append(comparison)
        console.print(f"\n[bold]{problem.name}[/bold]: test metrics after the last epoch")
        console.print(rich.markdown.Markdown(markdown_table(comparison)))
        _write_text(folder / f"{problem.name}.md", markdown_report(comparison, command=command))
        for name, figure in (
            ("metrics", metrics_figure(comparison)),
            ("weights", weights_figure(comparison)),
            ("conflict", conflict_figure(comparison)),
        ):
            if figure is None:
                continue
            figure.savefig(folder / f"{problem.name}_{name}.png", dpi=120)
        _write_json(folder / "results.json", {c.problem.name: results(c) for c in comparisons})
        _write_json(folder / "timing.json", timing(comparisons))
    console.print(f"Tables, pictures and numbers: {folder}")
    return comparisons


def results(comparison: Comparison) -> dict[str, Any]:
    """All that a comparison found and that is the same when it is run again."""
    problem = comparison.problem
    return {
        "settings": {
            "epochs": problem.epochs,
            "batch_size": problem.batch_size,
            "learning_rate": problem.learning_rate,
            "seeds": list(comparison.seeds),
            "examples": {part: problem.size(part) for part in ("train", "validation", "test")},
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
    }


def timing(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """How long it took, with which versions and on what machine."""
    packages = ("mtl-jax", "jax", "jaxlib", "optax", "flax", "numpy")
    return {
        "machine": {
            "platform": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "devices": [device.device_kind for device in jax.devices()],
        },
        "versions": {"python": platform.python_version()}
        | {name: version for name in packages if (version := _version(name)) is not None},
        "problems": {
            comparison.problem.name: {
                "step_seconds": {name: comparison.step_seconds(name) for name in comparison.runs},
                "step_time_relative_to_equal": {
                    name: comparison.step_seconds(name) / comparison.step_seconds(BASELINE)
                    for name in comparison.runs
                },
                "runs": [
                    {
                        "run": run.weighting,
                        "seed": run.seed,
                        "compile_seconds": run.compile_seconds,
                        "epoch_seconds": run.epoch_seconds,
                    }
                    for runs in (*comparison.runs.values(), *comparison.alone.values())
                    for run in runs
                ],
            }
            for comparison in comparisons
        },
    }


def _compare(
    problem: Problem,
    weightings: Mapping[str, MakeWeighting],
    seeds: Sequence[int],
    alone: bool,
    conflict: bool,
    console: rich.console.Console,
) -> Comparison:
    number = len({BASELINE, *weightings}) + (len(problem.tasks) if alone else 0)
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("epochs"),
        rich.progress.TimeRemainingColumn(),
    )
    with rich.progress.Progress(*columns, console=console) as progress:
        bar = progress.add_task(problem.name, total=number * len(seeds) * problem.epochs)

        def on_epoch(run: Run) -> None:
            done = len(next(iter(run.test.values())))
            advance = 1 if run.failure is None else 1 + problem.epochs - done
            description = f"{problem.name}: {run.weighting}, seed {run.seed}"
            progress.update(bar, advance=advance, description=description)

        comparison = compare(
            problem, weightings, seeds=seeds, alone=alone, conflict=conflict, on_epoch=on_epoch
        )
        progress.update(bar, description=problem.name)
    return comparison


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


def _write_json(path: pathlib.Path, value: Any) -> None:
    _write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def _write_text(path: pathlib.Path, text: str) -> None:
    """Write a file so that at every moment the old or the new one is there, whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
