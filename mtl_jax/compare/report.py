"""Runs comparisons and leaves their results in a folder."""

import contextlib
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import rich.console
import rich.markdown
from jax.sharding import Mesh

from mtl_jax.compare.checkpoints import Checkpoints
from mtl_jax.compare.devices import is_first_process, wait_for_all
from mtl_jax.compare.files import check_folder, replace, write_json, write_text
from mtl_jax.compare.findings import Findings
from mtl_jax.compare.numbers import results, timing
from mtl_jax.compare.page import page
from mtl_jax.compare.pictures import figures
from mtl_jax.compare.problem import Problem
from mtl_jax.compare.progress import compare_with_progress, tune_with_progress
from mtl_jax.compare.referee import Comparison, compare, make_weightings
from mtl_jax.compare.sections import markdown_report
from mtl_jax.compare.settings import TUNING_SEED
from mtl_jax.compare.tables import cost_table, main_table, seeds_note
from mtl_jax.compare.tensorboard import TensorBoard
from mtl_jax.compare.tuning import tune
from mtl_jax.compare.weightings import MakeWeighting


def compare_and_report(
    problems: Sequence[Problem],
    weightings: Mapping[str, MakeWeighting],
    folder: str | os.PathLike[str],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    alone: bool = True,
    conflict: bool = False,
    tune_trials: int | None = None,
    prune: bool = False,
    jobs: int = 1,
    checkpoint_seconds: int | None = 10,
    resume: bool = False,
    mesh: Mesh | None = None,
    command: str = "",
    log: Literal["tensorboard"] | None = None,
) -> list[Comparison]:
    """Compare the weightings on every problem, print the tables and write the results.

    The folder receives ``report.html`` (all that follows on one page), ``results.json`` (all that
    is the same when run again on the same machine), ``timing.json`` (times, memory, versions,
    machine), and for each problem ``<problem>.md`` (the tables) and pictures,
    ``<problem>_<picture>.png``: ``metrics``, ``losses``, ``weights``, ``difficulty`` (against
    weight), ``front`` (of two tasks) and, if the task gradients were measured, ``conflict``; its
    folders ``checkpoints`` and ``tuning`` hold what is needed to resume. Every file is replaced as
    a whole. Interrupted or failed, it leaves the tables and the numbers of the runs that are
    finished, without pictures.

    Args:
      problems: the problems.
      weightings: functions that make the weightings, by name.
      folder: where the results go; made if it does not exist.
      seeds: the seeds.
      alone: whether to train each task alone, too.
      conflict: whether to measure conflicts for all weightings, as in :func:`compare`.
      tune_trials: the number of trials for each weighting and each task alone, with which their
        settings are chosen first, as by :func:`tune`; ``None`` to run all as shipped.
      prune: whether trials that fall behind are ended early.
      jobs: how many weightings are tuned at once.
      checkpoint_seconds: the least time between two checkpoints of a run, each of which is saved
        after an epoch; ``None`` for no checkpoints. With them the trials are kept, too.
      resume: whether to continue the comparison that the folder holds, if it holds one. Finished
        runs are not run again; weightings, seeds and problems may be added.
      mesh: devices to spread each batch over, as in :func:`compare`. Of several processes, the
        first prints and writes; all must see the folder.
      command: the command that makes these results, for the reader of the tables.
      log: ``"tensorboard"`` to write losses, metrics, weights and conflicts of every run also as
        TensorBoard's event files, after every epoch, into the folder ``tensorboard``.

    Returns:
      The comparison on each problem.

    Raises:
      ValueError: as :func:`compare`, for any of the problems before the first is trained; or if
        there is no such ``log``.
      FileExistsError: if the folder holds a comparison that this is not to continue, or that it
        could not continue.
      TuningError: as :func:`tune`.
      OtherConfigurationError, OSError: as :func:`compare`.
    """
    for problem in problems:
        make_weightings(problem, weightings)
    folder = pathlib.Path(folder)
    checkpoints = None
    if checkpoint_seconds is None and resume:
        raise ValueError("To resume, `checkpoint_seconds` must be a number; it is None.")
    if tune_trials is not None and TUNING_SEED in seeds:
        raise ValueError(f"Seed {TUNING_SEED} is the one of the tuning; compare with other seeds.")
    if log not in (None, "tensorboard"):
        raise ValueError(f"`log` must be 'tensorboard' or None, got {log!r}.")
    if checkpoint_seconds is not None:
        checkpoints = Checkpoints(folder / "checkpoints", checkpoint_seconds, resume=resume)
    check_folder(folder, [problem.name for problem in problems], resume)
    wait_for_all("the folder is looked at")
    options: dict[str, Any] = {
        "seeds": seeds,
        "alone": alone,
        "conflict": conflict,
        "checkpoints": checkpoints,
        "mesh": mesh,
    }

    of_tuning: dict[str, Any] = {
        "trials": tune_trials,
        "alone": alone,
        "prune": prune,
        "jobs": jobs,
        "folder": None if checkpoints is None else folder / "tuning",
        "mesh": mesh,
    }
    if not is_first_process():
        comparisons = []
        for problem in problems:
            tuning = None if tune_trials is None else tune(problem, weightings, **of_tuning)
            comparisons.append(compare(problem, weightings, tuning=tuning, **options))
        return comparisons
    folder.mkdir(parents=True, exist_ok=True)
    console = rich.console.Console()
    if not console.is_terminal:  # a file or a pipe does not limit the width
        console = rich.console.Console(width=140)
    comparisons = []
    for problem in problems:
        finished: list[Comparison] = []  # as far as it has come, the latest last
        events = TensorBoard(folder / "tensorboard" / problem.name) if log else None
        try:
            with events or contextlib.nullcontext():
                tuning = None
                if tune_trials is not None:
                    tuning = tune_with_progress(problem, weightings, console, **of_tuning)
                comparison = compare_with_progress(
                    problem,
                    weightings,
                    console,
                    **options,
                    tuning=tuning,
                    on_run=finished.append,
                    on_epoch=None if events is None else events.write,
                )
        except BaseException:  # an interruption, too
            if finished:
                _write(folder, [*comparisons, finished[-1]], command, console)
            raise
        comparisons.append(comparison)
        _write(folder, comparisons, command, console)
    console.print(f"Everything on one page: {folder / 'report.html'}")
    return comparisons


def _write(
    folder: pathlib.Path,
    comparisons: Sequence[Comparison],
    command: str,
    console: rich.console.Console,
) -> None:
    """Print the tables of the last comparison, write its report, and the numbers of all."""
    last = comparisons[-1]
    name = last.problem.name
    interrupted = f" ({last.unfinished} runs not finished)" if last.unfinished else ""
    console.print(f"\n[bold]{name}[/bold]: test metrics after the last epoch{interrupted}")
    findings = Findings(last)
    for text in (main_table(findings).markdown(), seeds_note(findings)):
        console.print(rich.markdown.Markdown(text))
    console.print(rich.markdown.Markdown(cost_table(last).markdown()))
    write_text(folder / f"{name}.md", markdown_report(last, command=command))
    write_json(folder / "results.json", {c.problem.name: results(c) for c in comparisons})
    write_json(folder / "timing.json", timing(comparisons))
    if not last.unfinished:
        for kind, figure in figures(last).items():
            picture = folder / f"{name}_{kind}.png"
            replace(picture, lambda path, figure=figure: figure.savefig(path, dpi=120))
    write_text(folder / "report.html", page(comparisons, folder, command=command))
