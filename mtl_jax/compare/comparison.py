"""The comparison: all weightings and each task alone, on every problem, with all seeds."""

import contextlib
import dataclasses
import datetime
import functools
import os
import pathlib
import time
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, Self

import rich.console
import rich.progress
import rich.text
from jax.sharding import Mesh

from mtl_jax._search_space import Space
from mtl_jax.compare.checkpoints import (
    OtherSettingsError,
    RunCheckpoints,
    SettingsError,
    check_same,
    check_same_settings,
)
from mtl_jax.compare.devices import is_first_process, wait_for_all
from mtl_jax.compare.problem import Problem
from mtl_jax.compare.report import print_place, print_tables, write_report
from mtl_jax.compare.results import (
    BASELINE,
    Results,
    Run,
    Trial,
    Tuning,
    file_name,
    read_run,
    record_path,
    write_run,
)
from mtl_jax.compare.tensorboard import TensorBoard
from mtl_jax.compare.training import Setting, Trainer, settings_of, single_task
from mtl_jax.compare.tuning import (
    TUNING_SEED,
    Select,
    check_tuning,
    settings_of_problem,
    tune_with,
    with_baselines,
)
from mtl_jax.compare.weightings import MakeWeighting, named_weightings


def compare(
    problems: Problem | Sequence[Problem],
    weightings: Mapping[str, MakeWeighting] | Sequence[str],
    folder: str | os.PathLike[str] | None = None,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    alone: bool = True,
    conflict: bool = False,
    tune: int | None = None,
    select: Select = "mean",
    prune: bool = False,
    spaces: Mapping[str, Space] = MappingProxyType({}),
    checkpoint_seconds: float | None = 10,
    resume: bool = False,
    reuse: Sequence[str | os.PathLike[str]] = (),
    mesh: Mesh | None = None,
    log: Literal["tensorboard"] | None = None,
    command: str = "",
    console: rich.console.Console | None = None,
) -> Results:
    """Train the network of each problem with every weighting and every seed.

    With one seed, every weighting starts from the same parameters and sees the same batches in
    the same order; all weightings run on one seed before the next. Equal weights are always run, as
    the baseline. A run that finds no finite update in a whole epoch ends there and says so; the
    others go on.

    The folder receives ``results.json`` (all that is the same when run again on the same machine),
    ``timing.json`` (times, memory, versions, machine), a file in ``records`` for each finished run,
    and after each problem its tables and pictures and ``report.html``, all on one page
    (:func:`write_report`). Every file is replaced as a whole. Interrupted or failed, it leaves the
    tables and the numbers of the runs that are finished.

    Args:
      problems: the problem, or several.
      weightings: names of ``WEIGHTINGS``, or functions that make the weightings, by name.
      folder: where the results go; made if it does not exist. ``None`` to write nothing.
      seeds: the seeds.
      alone: whether to train each task alone, too: the same network on that task's loss only. Not
        for a problem with ``alone=False``.
      conflict: whether to measure how the task gradients conflict also for the weightings that do
        not read them. It costs them what reading the Gramian costs: little where the problem has an
        encoder and heads, else a backward pass for each task.
      tune: the number of trials for each weighting and each task alone, with which :func:`tune`
        chooses their settings first; constant weights are then run, too. ``None`` to run all in
        their default settings.
      select: what is tuned for: the mean over the tasks, or the worst task, as in :func:`tune`.
      prune: whether trials that fall behind are ended early.
      spaces: what is searched for a weighting besides the learning rate, as in :func:`tune`.
      checkpoint_seconds: the least time between two checkpoints of a run; 0 for as many as can be,
        ``None`` for none within runs.
      resume: whether to continue the comparison that the folder holds, if it holds one. Finished
        runs are read, whatever version or device made them, and are not run again; one in the
        middle goes on from its last good checkpoint. On the same machine with the same versions the
        results are then those of a comparison that was never interrupted, bit for bit. Weightings,
        seeds and problems may be added.
      reuse: folders of other comparisons on the same data. Their finished runs and trials are taken
        over where they have the same settings, and need not be run again: tuned for the mean and
        then for the worst task, two comparisons share all trials but those that were searched by
        their score.
      mesh: devices that each batch is spread over, the parameters being on all; of several
        processes, if ``jax.distributed`` is initialised. All of them then call this function
        alike and see one file system; the first one prints and writes. ``None`` for one device.
      log: ``"tensorboard"`` to write losses, metrics, weights and conflicts of every run also as
        TensorBoard's event files, after every epoch, into the folder ``tensorboard``.
      command: the command that makes these results, for the reader of the tables.
      console: where progress and tables are shown; ``None`` for nowhere.

    Returns:
      The results.

    Raises:
      SettingsError: a ``ValueError``; if there are no seeds or one is given twice, a problem's
        settings do not fit its data, a metric does not fit what is predicted, a weighting cannot
        run on a problem, or another argument is wrong; before anything is trained.
      FileExistsError: if the folder holds a comparison that this is not to continue, or that it
        could not continue.
      OtherSettingsError: a ``SettingsError``; if it holds runs with other settings or other data,
        or a folder to reuse has other data.
      FileNotFoundError: if a folder to reuse holds no comparison.
      DamagedFileError: a ``ValueError``; if a record there is not what was written.
      TuningError: a ``ValueError``; as :func:`tune`.
      OSError: if a file cannot be written.

    Example:
      With the problem ``molecules`` of the example of :class:`Problem`::

          results = compare(molecules, ["adaptive", "dwa"], "runs/molecules", tune=10)
          results.tunings["molecules"].chosen("dwa").parameters
    """
    problems = [problems] if isinstance(problems, Problem) else list(problems)
    if not isinstance(weightings, Mapping):
        weightings = named_weightings(list(weightings))
    seeds, folder = tuple(seeds), None if folder is None else pathlib.Path(folder)
    with _refusing():
        _check_arguments(problems, seeds, checkpoint_seconds, log)
        if tune is not None:
            for problem in problems:
                check_tuning(tune, select, alone and problem.alone)
            if TUNING_SEED in seeds:
                raise ValueError(
                    f"Seed {TUNING_SEED} is the one of the tuning: its runs are those that were "
                    "chosen for. Compare with other seeds."
                )
        elif prune or select != "mean":
            raise ValueError(
                "`prune` and `select` (--prune, --select) are about the trials of tuning, which is "
                "not asked for: `tune` (--tune)."
            )
        if folder is None and (resume or log or reuse):
            raise ValueError("`resume`, `reuse` and `log` need a folder.")
        plans = []
        for problem in problems:
            trainer = Trainer(problem, conflict=conflict, mesh=mesh)
            trainer.check_metrics()
            made = with_baselines(weightings, tuned=tune is not None)
            settings = settings_of(problem, made, alone)
            for setting in settings:
                trainer.new_run(setting, seeds[0])  # raises where it cannot run
            plans.append(_Plan(trainer, settings, seeds))
    others = [pathlib.Path(other) for other in reuse]
    results = Results(
        problems={plan.name: plan.trainer.problem.info() for plan in plans},
        planned={
            plan.name: [(one.name, seed) for seed in seeds for one in plan.settings]
            for plan in plans
        },
        command=command,
    )
    first = is_first_process()
    output = _Output(results, folder if first else None, console if first else None)
    for other in others:
        _check_same_problems(other, results)
    if folder is not None:
        holds_one = _check_folder(folder, results, resume)
        for plan in plans if tune is None else ():
            plan.read_finished(folder)  # all are checked before anything is trained
        if holds_one and tune is not None and (folder / "results.json").exists():
            # Until it is their turn, the problems have what they were tuned to before.
            results.tunings |= Results.read(folder).tunings
        wait_for_all("the folder is looked at")
        if first and not (holds_one and (folder / "results.json").exists()):
            results.write(folder)
    events = None
    if log and output.folder is not None:
        events = TensorBoard(output.folder / "tensorboard")
    number = sum(len(plan.runs) + len(plan.settings) * (tune or 0) for plan in plans)
    if output.console is not None:
        output.console.print(
            f"{number:,} runs. The first of each weighting is compiled, which can take longer than "
            "its training.",
            highlight=False,
        )
    with (
        _Progress(plans, tune or 0, output.console) as progress,
        events or contextlib.nullcontext(),
    ):
        for plan in plans:
            try:
                if tune is not None:
                    results.tunings[plan.name] = tune_with(
                        plan.trainer,
                        weightings,
                        trials=tune,
                        select=select,
                        seed=TUNING_SEED,
                        alone=alone,
                        prune=prune,
                        spaces=spaces,
                        folder=None if folder is None else folder / "tuning",
                        reuse=[other / "tuning" for other in others],
                        on_steps=progress.steps,
                        on_trial=functools.partial(progress.trial, plan.name),
                    )
                    plan.choose(results.tunings[plan.name])
                finished = {} if folder is None else plan.read_finished(folder, others)
                if output.folder is not None:
                    results.write(output.folder)
                for run in _runs(plan, finished, folder, checkpoint_seconds, progress):
                    if events is not None:
                        events.write(run)
                    if plan.trainer.is_finished(run):
                        results.runs.append(run)
            except BaseException:  # an interruption, too
                if results.of(plan.name):
                    output.show(plan.name, pictures=False)
                raise
            output.show(plan.name, pictures=True)
    output.end()
    return results


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Whatever is wrong in here is an error of its own kind."""
    try:
        yield
    except ValueError as error:
        raise SettingsError(*error.args).with_traceback(error.__traceback__) from error.__cause__


def _check_arguments(
    problems: Sequence[Problem],
    seeds: Sequence[int],
    checkpoint_seconds: float | None,
    log: str | None,
) -> None:
    names = [problem.name for problem in problems]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"Two of the problems have the same name: {', '.join(sorted(twice))}.")
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"At least one seed is needed, and none twice; got {list(seeds)}.")
    if checkpoint_seconds is not None and not checkpoint_seconds >= 0:
        raise ValueError(f"`checkpoint_seconds` must be at least 0, got {checkpoint_seconds}.")
    if log not in (None, "tensorboard"):
        raise ValueError(f"`log` must be 'tensorboard' or None, got {log!r}.")


@dataclasses.dataclass
class _Output:
    """Where results go: a folder, a console, or neither."""

    results: Results
    folder: pathlib.Path | None
    console: rich.console.Console | None

    def show(self, problem: str, *, pictures: bool) -> None:
        """Write all results so far, and print what the last problem's are."""
        results = self.results
        if self.folder is not None:
            if self.console is not None and pictures:
                self.console.print("The runs are finished; tables and pictures are drawn.")
            write_report(results, self.folder, pictures=[problem] if pictures else [])
            results = Results.read(self.folder)  # what is printed is what can be shown again
        if self.console is not None:
            print_tables(results, problem, self.console)

    def end(self) -> None:
        """Say where to look."""
        if self.folder is not None and self.console is not None:
            print_place(self.folder, self.console)


@dataclasses.dataclass
class _Plan:
    """What is to be run on a problem.

    Attributes:
      trainer: what trains.
      settings: the settings of the weightings and of each task alone.
      seeds: the seeds.
    """

    trainer: Trainer
    settings: list[Setting]
    seeds: tuple[int, ...]

    @property
    def name(self) -> str:
        """The problem's name."""
        return self.trainer.problem.name

    @property
    def runs(self) -> list[tuple[Setting, int]]:
        """All runs. Seeds outermost, so that a slow moment of the machine falls on all alike.

        After equal weights comes each task alone: some weightings are made of what it reaches.
        """
        settings = sorted(self.settings, key=lambda one: one.task is None and one.name != BASELINE)
        return [(setting, seed) for seed in self.seeds for setting in settings]

    def read_finished(
        self, folder: pathlib.Path, others: Sequence[pathlib.Path] = ()
    ) -> dict[tuple[str, int], Run]:
        """The runs that the folder has records of, by name and seed.

        What it lacks and one of the other folders has with the same settings is put there.

        Raises:
          OtherSettingsError: if one of the folder's has other settings.
          DamagedFileError: if one is not what was written.
        """
        found = {}
        for setting, seed in self.runs:
            for place in (folder, *others):
                path = record_path(place, self.name, setting.name, seed)
                if not path.exists():
                    continue
                run = read_run(path)
                wanted = self.trainer.new_run(setting, seed)
                try:
                    check_same_settings(wanted, run, f"{path} is the record")
                except OtherSettingsError:
                    if place == folder:
                        raise
                    continue
                if place != folder and is_first_process():
                    write_run(folder, run)
                found[setting.name, seed] = run
                break
        return found

    def choose(self, tuning: Tuning) -> None:
        """Take the settings that tuning chose."""
        self.settings = [
            dataclasses.replace(
                setting,
                learning_rate=tuning.chosen(setting.name).learning_rate,
                parameters=tuning.chosen(setting.name).parameters,
            )
            for setting in self.settings
        ]


def _runs(
    plan: _Plan,
    finished: Mapping[tuple[str, int], Run],
    folder: pathlib.Path | None,
    checkpoint_seconds: float | None,
    progress: "_Progress",
) -> Iterator[Run]:
    """The runs of a plan, each after every epoch of it, or as it was read."""
    programs = (run.provenance.get("program") for run in finished.values())
    plan.trainer.warn_of_another_network(programs, "finished runs")
    alone = {(run.task, run.seed): run for run in finished.values() if run.task is not None}
    for run in finished.values():
        progress.run(run)
        yield run  # to be logged again
    for setting, seed in plan.runs:
        if (setting.name, seed) in finished:
            continue
        reached = {task: run for (task, own), run in alone.items() if own == seed}
        if setting.task is None and setting.name != BASELINE and reached:
            known = single_task(plan.trainer.problem, reached)
            setting = dataclasses.replace(setting, single_task=known)
        checkpoints = None
        if folder is not None and checkpoint_seconds is not None:
            where = folder / "checkpoints" / file_name(plan.name)
            where /= f"{file_name(setting.name)}_seed{seed}"
            checkpoints = RunCheckpoints(where, checkpoint_seconds)
        with checkpoints or contextlib.nullcontext():
            epochs = plan.trainer.run(
                setting, seed, checkpoints=checkpoints, on_steps=progress.steps
            )
            for run in epochs:
                if plan.trainer.is_finished(run):
                    progress.run(run)
                    if run.task is not None:
                        alone[run.task, seed] = run
                    if folder is not None and is_first_process():
                        write_run(folder, run)
                yield run
        if checkpoints is not None:
            checkpoints.remove()


def _check_folder(folder: pathlib.Path, results: Results, resume: bool) -> bool:
    """Never mix two comparisons in a folder; returns whether there is one to continue.

    Raises:
      FileExistsError: if the folder holds a comparison that this is not to continue, or that it
        could not continue.
      OtherSettingsError: if the problems of that have other settings or data.
    """
    ways_out = "choose another folder (--name on the command line), or remove this one"
    parts = [folder / name for name in ("records", "checkpoints", "tuning")]
    held = {
        urllib.parse.unquote(path.name)
        for part in parts
        if part.exists()
        for path in part.iterdir()
        if any(file.is_file() and not file.name.startswith(".") for file in path.rglob("*"))
    }
    path = folder / "results.json"
    if not held and (not path.exists() or (path.is_file() and not Results.read(folder).runs)):
        return False  # nothing was finished there
    if not resume:
        raise FileExistsError(
            f"{folder} holds a comparison already. Continue it with resume=True (--resume on the "
            f"command line), or {ways_out}."
        )
    if others := held - set(results.problems):
        raise FileExistsError(
            f"{folder} holds a comparison on {', '.join(sorted(others))}, too. To continue it, "
            f"give all its problems; else {ways_out}."
        )
    if path.exists():
        _check_same_problems(folder, results)
    return True


def _check_same_problems(folder: pathlib.Path, results: Results) -> None:
    """Whether the problems that a comparison has, too, are the same there.

    Raises:
      OtherSettingsError: if one has other settings or data.
      FileNotFoundError: if the folder holds no comparison.
    """
    before = Results.read(folder)
    for name, info in results.problems.items():
        if name in before.problems:
            what = f"{folder} holds runs on {name!r} with other settings"
            check_same(settings_of_problem(info), settings_of_problem(before.problems[name]), what)


class _Progress:
    """Shows how far a comparison has come: the run, its losses and metrics, the time that is left.

    What an epoch of a run will take is what one of its weighting has taken so far, or else one of
    the same problem, or else one of any; compiling is left out.
    """

    def __init__(
        self, plans: Sequence[_Plan], trials: int, console: rich.console.Console | None
    ) -> None:
        self._console, self._plans = console, {plan.name: plan for plan in plans}
        keys = [(plan.name, setting.name) for plan in plans for setting in plan.settings]
        runs = trials + len(plans[0].seeds)
        self._left = {key: float(runs * self._epochs(key[0])) for key in keys}
        self._spent = dict.fromkeys(keys, 0.0)
        self._done = dict.fromkeys(keys, 0.0)
        self._total = sum(self._left.values())
        self._place: tuple[Any, float] = (None, 0.0)  # the run, and the epochs of it that are done
        self._then, self._trials, self._metrics = time.monotonic(), trials, ""
        self._bar: _Bar | None = None

    def __enter__(self) -> Self:
        if self._console is not None and self._console.is_terminal:
            self._bar = _Bar(
                rich.progress.BarColumn(),
                rich.progress.TaskProgressColumn(),
                rich.progress.TextColumn("{task.description}"),
                console=self._console,
            )
            self._bar.add_task("", total=self._total)
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def steps(self, run: Run, step: int, losses: Mapping[str, float]) -> None:
        """The run has come to this step."""
        key, plan = (run.problem, run.weighting), self._plans[run.problem]
        of_run, before = self._place
        now, done = time.monotonic(), step / plan.trainer.steps_per_epoch
        spent = now - self._then
        if of_run != (*key, run.seed):
            before, spent, self._metrics = 0.0, max(0.0, spent - run.compile_seconds), ""
        self._left[key] -= done - before
        self._done[key] += done - before
        self._spent[key] += spent
        self._place, self._then = ((*key, run.seed), done), now
        if self._bar is not None:
            if metrics := run.metrics.get("validation"):
                self._metrics = "; validation: " + ", ".join(
                    f"{task} {name} {values[-1]:.4g}"
                    for task, by_name in metrics.items()
                    for name, values in by_name.items()
                )
            what = "tuning" if run.seed == TUNING_SEED and self._trials else f"seed {run.seed}"
            found = ", ".join(f"{task} {loss:.4g}" for task, loss in losses.items())
            self._show(
                f"{run.problem}: {run.weighting}, {what}, epoch {done:.1f} of "
                f"{self._epochs(run.problem)}; losses: {found}{self._metrics}"
            )

    def trial(self, problem: str, name: str, trials: Sequence[Trial]) -> None:
        """A trial is over, or was read."""
        if not self._end((problem, name)):
            return
        score = trials[-1].failure or f"{100 * (trials[-1].score or 0):+.2f} %"
        self._say(f"{problem}: {name}, trial {len(trials)} of {self._trials}: {score}")

    def run(self, run: Run) -> None:
        """A run is over, or was read."""
        if self._end((run.problem, run.weighting)):
            self._say(
                f"{run.problem}: {run.weighting}, seed {run.seed}: {run.failure or 'finished'}"
            )

    def _epochs(self, problem: str) -> int:
        return self._plans[problem].trainer.problem.epochs

    def _end(self, key: tuple[str, str]) -> bool:
        """Nothing is left of it; returns whether it was trained just now."""
        of_run, done = self._place
        self._left[key] -= self._epochs(key[0]) - (0 if of_run is None else done)
        self._place, self._then = (None, 0.0), time.monotonic()
        return of_run is not None

    def _show(self, line: str) -> None:
        if self._bar is not None:
            self._bar.line = line
            done = self._total - sum(self._left.values())
            self._bar.update(self._bar.task_ids[0], completed=done, description=self._time_left())

    def _say(self, line: str) -> None:
        """One line for what is over, where there is no bar: in a file or a pipe."""
        if self._bar is not None:
            self._show(line)
        elif self._console is not None:
            self._console.print(f"{line}; {self._time_left()}", markup=False, highlight=False)

    def _time_left(self) -> str:
        seconds = sum(left * self._rate(key) for key, left in self._left.items())
        return f"{datetime.timedelta(seconds=round(seconds))} left"

    def _rate(self, key: tuple[str, str]) -> float:
        """The seconds of an epoch."""
        everything = list(self._left)
        for keys in ([key], [other for other in everything if other[0] == key[0]], everything):
            if done := sum(self._done[one] for one in keys):
                return sum(self._spent[one] for one in keys) / done
        return 0.0


class _Bar(rich.progress.Progress):
    """A progress bar with a line below."""

    line = ""

    def get_renderables(self) -> Iterable[rich.console.RenderableType]:
        """The bar and the line, which is cut where the terminal ends."""
        yield from super().get_renderables()
        yield rich.text.Text(self.line, no_wrap=True, overflow="ellipsis")
