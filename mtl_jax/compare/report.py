"""Runs comparisons with a progress bar and leaves their results in a folder."""

import importlib.metadata
import json
import os
import pathlib
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import rich.console
import rich.markdown
import rich.progress

from mtl_jax.compare.checkpoints import Checkpoints, problems_in
from mtl_jax.compare.pictures import conflict_figure, metrics_figure, thinned, weights_figure
from mtl_jax.compare.problem import Problem
from mtl_jax.compare.referee import BASELINE, Comparison, compare, make_weightings
from mtl_jax.compare.run import Run
from mtl_jax.compare.sources import joined
from mtl_jax.compare.tables import markdown_report, markdown_table
from mtl_jax.compare.weightings import MakeWeighting


def compare_and_report(
    problems: Sequence[Problem],
    weightings: Mapping[str, MakeWeighting],
    folder: str | os.PathLike[str],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    alone: bool = True,
    conflict: bool = False,
    checkpoint_seconds: int | None = 10,
    resume: bool = False,
    command: str = "",
) -> list[Comparison]:
    """Compare the weightings on every problem, print the tables and write the results.

    The folder receives ``results.json`` (all that is the same when run again on the same machine),
    ``timing.json`` (times, versions, machine), and for each problem ``<problem>.md`` (the tables),
    ``<problem>_metrics.png``, ``<problem>_weights.png`` and, if the task gradients were measured,
    ``<problem>_conflict.png``; its folder ``checkpoints`` holds what is needed to resume. Every
    file is replaced as a whole. Interrupted or failed, it leaves the tables and the numbers of the
    runs that are finished, without pictures.

    Args:
      problems: the problems.
      weightings: functions that make the weightings, by name.
      folder: where the results go; made if it does not exist.
      seeds: the seeds.
      alone: whether to train each task alone, too.
      conflict: whether to measure conflicts for all weightings, as in :func:`compare`.
      checkpoint_seconds: the least time between two checkpoints of a run, each of which is saved
        after an epoch; ``None`` for no checkpoints.
      resume: whether to continue the comparison that the folder holds, if it holds one. Finished
        runs are not run again; weightings, seeds and problems may be added.
      command: the command that makes these results, for the reader of the tables.

    Returns:
      The comparison on each problem.

    Raises:
      ValueError: as :func:`compare`, for any of the problems before the first is trained.
      FileExistsError: if the folder holds a comparison that this is not to continue, or that it
        could not continue.
      OtherConfigurationError, OSError: as :func:`compare`.
    """
    for problem in problems:
        make_weightings(problem, weightings)
    folder = pathlib.Path(folder)
    checkpoints = None
    if checkpoint_seconds is None and resume:
        raise ValueError("To resume, `checkpoint_seconds` must be a number; it is None.")
    if checkpoint_seconds is not None:
        checkpoints = Checkpoints(folder / "checkpoints", checkpoint_seconds, resume=resume)
    _check_folder(folder, [problem.name for problem in problems], resume)
    folder.mkdir(parents=True, exist_ok=True)
    console = rich.console.Console()
    if not console.is_terminal:  # a file or a pipe does not limit the width
        console = rich.console.Console(width=140)
    comparisons = []
    for problem in problems:
        finished: list[Comparison] = []  # as far as it has come, the latest last
        try:
            comparison = _compare(
                problem,
                weightings,
                console,
                seeds=seeds,
                alone=alone,
                conflict=conflict,
                checkpoints=checkpoints,
                on_run=finished.append,
            )
        except BaseException:  # an interruption, too
            if finished:
                _write(folder, [*comparisons, finished[-1]], command, console)
            raise
        comparisons.append(comparison)
        _write(folder, comparisons, command, console)
        for name, figure in (
            ("metrics", metrics_figure(comparison)),
            ("weights", weights_figure(comparison)),
            ("conflict", conflict_figure(comparison)),
        ):
            if figure is None:
                continue
            picture = folder / f"{problem.name}_{name}.png"
            _replace(picture, lambda path, figure=figure: figure.savefig(path, dpi=120))
    console.print(f"Tables, pictures and numbers: {folder}")
    return comparisons


def _write(
    folder: pathlib.Path,
    comparisons: Sequence[Comparison],
    command: str,
    console: rich.console.Console,
) -> None:
    """Print the table of the last comparison, write its report, and the numbers of all."""
    last = comparisons[-1]
    name = last.problem.name
    interrupted = f" ({last.unfinished} runs not finished)" if last.unfinished else ""
    console.print(f"\n[bold]{name}[/bold]: test metrics after the last epoch{interrupted}")
    console.print(rich.markdown.Markdown(markdown_table(last)))
    _write_text(folder / f"{name}.md", markdown_report(last, command=command))
    _write_json(folder / "results.json", {c.problem.name: results(c) for c in comparisons})
    _write_json(folder / "timing.json", timing(comparisons))


def _check_folder(folder: pathlib.Path, problems: Sequence[str], resume: bool) -> None:
    """Never mix two comparisons in a folder."""
    checkpoints = folder / "checkpoints"
    ways_out = "choose another folder (--name on the command line), or remove this one"
    if not resume and ((folder / "results.json").exists() or checkpoints.exists()):
        raise FileExistsError(
            f"{folder} holds a comparison already. Continue it with resume=True (--resume on the "
            f"command line), or {ways_out}."
        )
    if not checkpoints.exists() and (folder / "results.json").exists():
        raise FileExistsError(
            f"{folder} holds results and no checkpoints to resume from: {ways_out}."
        )
    others = problems_in(checkpoints) - set(problems)
    if others:
        raise FileExistsError(
            f"{folder} holds a comparison on {', '.join(sorted(others))}, too. To continue it, "
            f"give all its problems; else {ways_out}."
        )


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
    } | ({"unfinished_runs": comparison.unfinished} if comparison.unfinished else {})


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
    console: rich.console.Console,
    *,
    seeds: Sequence[int],
    alone: bool,
    **options: Any,
) -> Comparison:
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

        def on_epoch(run: Run) -> None:
            done[run.weighting, run.seed] = run.epochs if run.failure is None else problem.epochs
            description = f"{problem.name}: {run.weighting}, seed {run.seed}"
            progress.update(bar, completed=sum(done.values()), description=description)

        comparison = compare(
            problem, weightings, seeds=seeds, alone=alone, on_epoch=on_epoch, **options
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
    _replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _replace(path: pathlib.Path, write: Callable[[pathlib.Path], Any]) -> None:
    """Write a file so that at every moment the old or the new one is there, whole."""
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
