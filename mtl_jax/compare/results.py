"""The records of a comparison: runs, trials, what was planned; and their files.

All that is shown of a comparison (tables, pictures, verdicts) is a function of :class:`Results`.
A folder of results holds ``results.json`` (all that is the same when it is run again on the same
machine), ``timing.json`` (times, memory, versions, machine), and one file for each finished run,
``records/<problem>/<run>_seed<seed>.json``.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import jax
import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    import pandas

BASELINE = "equal"
"""The weighting that others are compared with; it is always run."""

PRUNED = "pruned"
"""The failure of a trial that was ended early since others were better."""

POINTS = 200
"""The most points that a file holds of a curve over the steps of a run."""

DIGITS = 6
"""Significant digits of the numbers in ``results.json``."""

T = TypeVar("T")

Place = Literal["representation", "parameters"]
"""Where the task gradients are measured."""

ByEpoch = dict[str, dict[str, list[float]]]
"""A metric after every epoch, by task and metric."""


class DamagedFileError(ValueError):
    """A file does not hold what was written."""


@dataclasses.dataclass(frozen=True)
class MetricInfo:
    """How a metric is read.

    Attributes:
      higher_is_better: whether a larger value is a better one.
      unit: its unit; ``"%"`` for a share, which is shown times 100.
    """

    higher_is_better: bool = True
    unit: str = ""


@dataclasses.dataclass(frozen=True)
class ProblemInfo:
    """What must be known of a problem to read its results.

    Attributes:
      name: the problem's name.
      description: a sentence for the reader.
      tasks: for each task its metrics, in order.
      examples: the number of examples, by split and dataset; ``""`` where there is only one.
      epochs: the passes over the training examples.
      steps_per_epoch: the training steps of one.
      batch_size: the number of examples in a batch, by dataset.
      learning_rate: the problem's default.
      data: a digest of the data.
    """

    name: str
    description: str
    tasks: Mapping[str, Mapping[str, MetricInfo]]
    examples: Mapping[str, Mapping[str, int]]
    epochs: int
    steps_per_epoch: int
    batch_size: Mapping[str, int]
    learning_rate: float
    data: str


@dataclasses.dataclass
class Run:
    """What came of one training run. Lists over epochs start after the first epoch.

    Attributes:
      problem: the problem's name.
      weighting: the weighting's name; ``"<task> alone"`` for a task that was trained alone.
      seed: the seed of initial parameters, batches and random numbers.
      task: the task that was trained alone; ``None`` for a weighting.
      learning_rate: the optimizer's learning rate.
      parameters: the weighting's own parameters; those that are not here have their defaults.
      failure: why the run ended early, or ``None``.
      skipped: the steps that were left out because their update was not finite.
      train_losses: for each task the mean training loss of every epoch.
      metrics: the metrics after every epoch, by split (``"validation"``, ``"test"``), task and
        metric.
      weights: for each task its weight at every step; empty for an aggregator, which has none.
      measured_at: where the task gradients were measured: at the representation, or over the
        parameters that the tasks share; ``None`` if they were not.
      conflict: how the task gradients lie to each other at every step: ``"share"``, the share of
        the pairs of tasks with a negative cosine, and ``"cosine"``, the mean cosine of the pairs.
        NaN at a step that did not measure them, or had labels of one task only. Empty if they
        were not measured.
      steps: the steps of ``weights`` and ``conflict`` where they were thinned; ``None`` for all of
        them.
      epoch_seconds: the wall time of every epoch's training.
      compile_seconds: the time that this run spent on compiling.
      compilations: the number of programs that it compiled.
      steps_per_call: the training steps that one call of the compiled program makes.
      memory_bytes: the memory of the compiled training step; ``None`` if the backend does not say.
      provenance: versions, device and program that it was made with (``environment()``).
    """

    problem: str
    weighting: str
    seed: int
    task: str | None = None
    learning_rate: float = math.nan
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    failure: str | None = None
    skipped: int = 0
    train_losses: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    metrics: dict[str, ByEpoch] = dataclasses.field(default_factory=dict)
    weights: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    measured_at: Place | None = None
    conflict: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    steps: np.ndarray | None = None
    epoch_seconds: list[float] = dataclasses.field(default_factory=list)
    compile_seconds: float = 0.0
    compilations: int = 0
    steps_per_call: int = 1
    memory_bytes: int | None = None
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def epochs(self) -> int:
        """The epochs that were trained so far."""
        return max((len(values) for values in self.train_losses.values()), default=0)

    def thinned(self, points: int = POINTS) -> "Run":
        """The run with its curves over steps thinned to so many points (see ``thin``)."""
        curves = [*self.weights.values(), *self.conflict.values()]
        if not curves:
            return dataclasses.replace(self, steps=None)
        steps = np.arange(len(curves[0])) if self.steps is None else self.steps
        return dataclasses.replace(
            self,
            weights={task: thin(values, points) for task, values in self.weights.items()},
            conflict={kind: thin(values, points) for kind, values in self.conflict.items()},
            steps=thin(steps, points),
        )


SETTINGS = ("task", "learning_rate", "parameters", "measured_at")
"""The fields of a run that say what was trained."""

# The fields of a run that differ when it is run again.
_TIMING = (
    "epoch_seconds",
    "compile_seconds",
    "compilations",
    "steps_per_call",
    "memory_bytes",
    "provenance",
)
_TRIAL_TIMING = ("seconds", "compile_seconds", "compilations")


@dataclasses.dataclass(frozen=True)
class Trial:
    """One setting that tuning tried, and what came of training with it.

    Attributes:
      learning_rate: the optimizer's learning rate.
      parameters: the weighting's own parameters; those that are not here have their defaults.
      validation: the metrics on the validation split after every epoch, by task and metric.
      score: what tuning maximises, of the last epoch's validation metrics; ``None`` if the trial
        was not trained to its end.
      failure: why it was not: ``"pruned"``, or what the run failed of.
      seconds: how long it took, compiling included.
      compile_seconds: the part of it that was compiling.
      compilations: the number of programs that it compiled.
      train_losses: of a task alone the mean training loss of every epoch.
    """

    learning_rate: float
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    validation: ByEpoch = dataclasses.field(default_factory=dict)
    score: float | None = None
    failure: str | None = None
    seconds: float = 0.0
    compile_seconds: float = 0.0
    compilations: int = 0
    train_losses: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)

    @property
    def epochs(self) -> int:
        """The epochs that were trained."""
        lengths = [len(v) for metrics in self.validation.values() for v in metrics.values()]
        return max(lengths, default=0)


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The trials of every weighting and of every task alone, the same number for each.

    Attributes:
      seed: the seed of the search and of all its training runs.
      select: what a trial's score is: ``"mean"``, the mean over the tasks of the relative change of
        their metrics from equal weights at the default learning rate, or ``"worst"``, the smallest
        change from what each task reached alone. Of a task alone it is the change from its own
        default setting.
      trials: the trials by the name of the runs, in the order in which they were made. The first is
        the default setting of the problem and the weighting.
    """

    seed: int
    select: Literal["mean", "worst"]
    trials: Mapping[str, Sequence[Trial]]

    def chosen(self, name: str) -> Trial:
        """The trial with the best score: the first of several, and the first if all failed.

        Raises:
          ValueError: if nothing of this name was tuned.
        """
        if name not in self.trials:
            raise ValueError(f"{name!r} was not tuned; tuned: {', '.join(self.trials)}.")
        return max(
            self.trials[name],
            key=lambda trial: -math.inf if trial.score is None else trial.score,
        )


@dataclasses.dataclass
class Results:
    """All that one or several comparisons found.

    Attributes:
      problems: the problems by name.
      runs: the runs that are finished.
      tunings: the trials that chose the runs' settings, by problem; a problem that is not here ran
        with the default settings.
      planned: for each problem the name and the seed of all its runs. What ``runs`` lacks of them
        is not finished.
      command: the command that makes these results.
    """

    problems: dict[str, ProblemInfo] = dataclasses.field(default_factory=dict)
    runs: list[Run] = dataclasses.field(default_factory=list)
    tunings: dict[str, Tuning] = dataclasses.field(default_factory=dict)
    planned: dict[str, list[tuple[str, int]]] = dataclasses.field(default_factory=dict)
    command: str = ""

    def of(self, problem: str) -> dict[str, list[Run]]:
        """The finished runs of a problem, by name; both in the order in which they were planned."""
        found = {(run.weighting, run.seed): run for run in self.runs if run.problem == problem}
        runs: dict[str, list[Run]] = {}
        planned = self.planned.get(problem, found)
        for name, seed in planned:
            if (name, seed) in found:
                runs.setdefault(name, []).append(found[name, seed])
        # Comparisons that were combined may have other seeds: one order for all names.
        place = {seed: i for i, seed in enumerate(dict.fromkeys(seed for _, seed in planned))}
        return {
            name: sorted(of_name, key=lambda run: place[run.seed]) for name, of_name in runs.items()
        }

    def unfinished(self, problem: str) -> list[tuple[str, int]]:
        """The name and the seed of the runs of a problem that are not finished."""
        found = {(run.weighting, run.seed) for run in self.runs if run.problem == problem}
        return [key for key in self.planned.get(problem, []) if key not in found]

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write ``results.json`` and ``timing.json``, each replaced as a whole."""
        folder = pathlib.Path(folder)
        planned = [run for name in self.problems for runs in self.of(name).values() for run in runs]
        runs = [_plain(vars(run.thinned())) for run in planned]
        tunings = {name: _plain(dataclasses.asdict(t)) for name, t in self.tunings.items()}
        timing = {
            "runs": [
                {key: run[key] for key in ("problem", "weighting", "seed")}
                | {key: run.pop(key) for key in _TIMING}
                for run in runs
            ],
            "tunings": {
                problem: {
                    name: [{key: trial.pop(key) for key in _TRIAL_TIMING} for trial in trials]
                    for name, trials in tuning["trials"].items()
                }
                for problem, tuning in tunings.items()
            },
        }
        results = {
            "command": self.command,
            "problems": {name: dataclasses.asdict(info) for name, info in self.problems.items()},
            "planned": self.planned,
            "tunings": tunings,
            "runs": runs,
        }
        # Settings are kept to the last digit: a comparison that goes on must have the same.
        rounded = _plain(results, digits=DIGITS) | {"problems": _plain(results["problems"])}
        _write_json(folder / "results.json", rounded)
        _write_json(folder / "timing.json", timing)

    @staticmethod
    def read(folder: str | os.PathLike[str]) -> "Results":
        """Read what :meth:`write` wrote, whatever version of JAX made it.

        Runs that were planned, are finished and are not in ``results.json``, since the comparison
        was killed, are taken from ``records``.

        Raises:
          FileNotFoundError: if the folder holds no ``results.json``.
          DamagedFileError: a ``ValueError``; if a file does not hold what was written.
        """
        folder = pathlib.Path(folder)
        path = folder / "results.json"
        if not path.exists():
            raise FileNotFoundError(
                f"{folder} holds no results of a comparison (results.json); name the folder that "
                "one wrote, such as runs/compare."
            )
        times = folder / "timing.json"
        timing = _read_json(times) if times.exists() else {"runs": [], "tunings": {}}
        try:
            results = _results(_read_json(path), timing)
        except (AttributeError, KeyError, TypeError) as error:
            raise DamagedFileError(f"{path} or {times} does not hold results: {error!r}") from error
        for problem in results.problems:
            for name, seed in results.unfinished(problem):
                record = record_path(folder, problem, name, seed)
                if record.exists():
                    results.runs.append(read_run(record))
        return results

    @staticmethod
    def combine(parts: Sequence["Results"]) -> "Results":
        """The results of several comparisons in one. Of runs that several have, the first is taken.

        Raises:
          ValueError: if the same problem had other data or settings, or was tuned otherwise, or the
            runs of one name have other settings.
        """
        whole = Results(command="\n".join(dict.fromkeys(p.command for p in parts if p.command)))
        for part in parts:
            for name, info in part.problems.items():
                if name not in whole.problems:
                    whole.problems[name] = info
                    whole.planned[name] = []
                    if name in part.tunings:
                        whole.tunings[name] = part.tunings[name]
                else:
                    _check_same(whole, part, name)
                    if name in whole.tunings:
                        old, new = whole.tunings[name], part.tunings[name]
                        trials = {**new.trials, **old.trials}
                        whole.tunings[name] = dataclasses.replace(old, trials=trials)
                taken = {(run.weighting, run.seed) for run in whole.runs if run.problem == name}
                whole.runs += [
                    run
                    for run in part.runs
                    if run.problem == name and (run.weighting, run.seed) not in taken
                ]
                plan = [*whole.planned[name], *part.planned.get(name, [])]
                whole.planned[name] = list(dict.fromkeys(plan))
                for of_name in whole.of(name).values():
                    _check_same_settings(of_name)
        return whole


def _check_same(one: Results, other: Results, name: str) -> None:
    settings = [vars(results.problems[name]) | _tuned(results, name) for results in (one, other)]
    for key in settings[0]:
        if settings[0][key] != settings[1][key]:
            raise ValueError(
                f"The problem {name!r} differs between the folders in its {key.replace('_', ' ')}, "
                f"{settings[0][key]!r} and {settings[1][key]!r}: report them apart."
            )


def _check_same_settings(runs: Sequence[Run]) -> None:
    for run in runs:
        for key in SETTINGS:
            found, first = getattr(run, key), getattr(runs[0], key)
            if found != first:
                raise ValueError(
                    f"The runs of {run.weighting!r} on {run.problem!r} differ between the folders "
                    f"in their {key.replace('_', ' ')}, {first!r} and {found!r}: report them apart."
                )


def _tuned(results: Results, name: str) -> dict[str, Any]:
    tuning = results.tunings.get(name)
    return {"tuning": None if tuning is None else (tuning.seed, tuning.select)}


def alone_name(task: str) -> str:
    """The name of the runs of a task that is trained alone."""
    return f"{task} alone"


def thin(values: np.ndarray, points: int) -> Float[np.ndarray, "points"]:
    """The means over so many pieces of the values, or the values if they are no more than that.

    What is not finite does not count; a piece of nothing else is NaN.

    Example:
      >>> import numpy as np
      >>> thin(np.array([1.0, 3.0, np.nan, 4.0]), 2).tolist()
      [2.0, 4.0]
    """
    means = []
    for piece in np.array_split(np.asarray(values, np.float64), max(1, min(points, len(values)))):
        finite = piece[np.isfinite(piece)]
        means.append(finite.mean() if finite.size else math.nan)
    return np.array(means)


def environment() -> dict[str, Any]:
    """Versions and machine that a run is made with, for its ``provenance``."""
    packages = ("mtl-jax", "jax", "jaxlib", "optax", "flax", "numpy")
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    devices = jax.devices()
    return {
        "versions": versions,
        "device": f"{len(devices)} x {devices[0].device_kind} ({jax.default_backend()})",
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "").strip(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
    }


def write_run(folder: str | os.PathLike[str], run: Run) -> pathlib.Path:
    """Write the record of a finished run into a folder of results; returns its path."""
    content = _plain(vars(run.thinned()))
    path = record_path(folder, run.problem, run.weighting, run.seed)
    write_with_digest(path, "run", content)
    return path


def read_run(path: str | os.PathLike[str]) -> Run:
    """Read the record of a run. Its curves have at most 200 points.

    Raises:
      DamagedFileError: a ``ValueError``; if it is not what was written.
    """
    return read_with_digest(path, "run", _run, "Remove it to train this run again.")


def record_path(folder: str | os.PathLike[str], problem: str, name: str, seed: int) -> pathlib.Path:
    """The file with the record of a run."""
    return (
        pathlib.Path(folder) / "records" / file_name(problem) / f"{file_name(name)}_seed{seed}.json"
    )


def file_name(name: str) -> str:
    """The name of a problem or a run in that of a file; ``urllib.parse.unquote`` reads it."""
    return urllib.parse.quote(name, safe=" ")


def load_results(folder: str | os.PathLike[str]) -> "pandas.DataFrame":
    """All that was measured after every epoch, as one table.

    Args:
      folder: the folder of a comparison.

    Returns:
      A row for each number, with the columns ``problem``, ``weighting`` (``"<task> alone"`` for a
      task that was trained alone), ``seed``, ``task``, ``metric``, ``split``, ``epoch`` (from 1)
      and ``value``. The training loss is the metric ``"loss"`` of the split ``"train"``.

    Raises:
      FileNotFoundError, DamagedFileError: as :meth:`Results.read`.

    Example:
      What every weighting reached, in the mean over the seeds::

          table = load_results("runs/compare")
          last = table[(table.split == "test") & (table.epoch == table.epoch.max())]
          last.groupby(["problem", "weighting", "task", "metric"]).value.mean()
    """
    import pandas  # half a second, which no other part of a comparison needs

    rows = []
    for run in Results.read(folder).runs:
        losses = {task: {"loss": values} for task, values in run.train_losses.items()}
        for split, tasks in {"train": losses, **run.metrics}.items():
            for task, metrics in tasks.items():
                for metric, values in metrics.items():
                    where = (run.problem, run.weighting, run.seed, task, metric, split)
                    rows += [(*where, epoch, value) for epoch, value in enumerate(values, start=1)]
    columns = ("problem", "weighting", "seed", "task", "metric", "split", "epoch", "value")
    return pandas.DataFrame(rows, columns=list(columns))


def load_curves(folder: str | os.PathLike[str]) -> "pandas.DataFrame":
    """All curves over the training steps, as one table.

    Args:
      folder: the folder of a comparison.

    Returns:
      A row for each point of a curve, which is the mean over some steps, with the columns
      ``problem``, ``weighting``, ``seed``, ``curve`` (``"weight"``, or ``"share"`` and ``"cosine"``
      of the conflicts), ``task`` (empty for conflicts), ``step`` (from 0, the middle of the steps)
      and ``value``.

    Raises:
      FileNotFoundError, DamagedFileError: as :meth:`Results.read`.

    Example:
      The mean weight of each task, by weighting::

          curves = load_curves("runs/compare").query("curve == 'weight'")
          curves.groupby(["weighting", "task"])["value"].mean()
    """
    import pandas

    rows = []
    for run in Results.read(folder).runs:
        curves = {("weight", task): values for task, values in run.weights.items()}
        curves |= {(kind, ""): values for kind, values in run.conflict.items()}
        for (curve, task), values in curves.items():
            steps = range(len(values)) if run.steps is None else run.steps.tolist()
            where = (run.problem, run.weighting, run.seed, curve, task)
            rows += [(*where, *point) for point in zip(steps, values.tolist(), strict=True)]
    columns = ("problem", "weighting", "seed", "curve", "task", "step", "value")
    return pandas.DataFrame(rows, columns=list(columns))


def replace_file(path: pathlib.Path, write: Callable[[pathlib.Path], Any]) -> None:
    """Write a file so that at every moment the old or the new one is there, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
    """Write a text file, replaced as a whole."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _write_json(path: pathlib.Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def _read_json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON, or of the encoding
        raise DamagedFileError(f"{path} is damaged: {error}.") from error


def write_with_digest(path: pathlib.Path, name: str, content: Any) -> None:
    """Write what :func:`read_with_digest` reads."""
    write_text(path, json.dumps({"digest": _digest(content), name: content}, indent=1) + "\n")


def read_with_digest(
    path: str | os.PathLike[str], name: str, read: Callable[[Any], T], hint: str
) -> T:
    """Read a file, and make of its content what it stands for.

    Raises:
      DamagedFileError: if it is not what was written, with a hint what to do then.
    """
    try:
        stored = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        if _digest(stored[name]) != stored["digest"]:
            raise ValueError("its content and its digest differ")
        return read(stored[name])
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(f"{path} is damaged: {error}. {hint}") from error


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _plain(value: Any, digits: int | None = None) -> Any:
    """A value as JSON has it, which has no word for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry, digits) for key, entry in value.items()}
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _plain(np.asarray(value).tolist(), digits)
    if isinstance(value, list | tuple):
        return [_plain(entry, digits) for entry in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return value if digits is None else float(f"{value:.{digits}g}")
    return value


def _numbers(value: Any) -> Any:
    """Lists of numbers with NaN for what JSON has no word for."""
    if isinstance(value, dict):
        return {key: _numbers(entry) for key, entry in value.items()}
    return [math.nan if entry is None else float(entry) for entry in value]


def _run(content: dict[str, Any]) -> Run:
    """The run that JSON has, without or with its timing."""
    fields = dict(content)
    for key in ("train_losses", "metrics"):
        fields[key] = _numbers(content[key])
    for key in ("weights", "conflict"):
        fields[key] = {name: np.array(_numbers(row)) for name, row in content[key].items()}
    if content["steps"] is not None:
        fields["steps"] = np.array(content["steps"])
    if content["learning_rate"] is None:
        fields["learning_rate"] = math.nan
    return Run(**fields)


def _results(content: dict[str, Any], timing: dict[str, Any]) -> Results:
    times = {(run["problem"], run["weighting"], run["seed"]): run for run in timing["runs"]}
    problems = {
        name: ProblemInfo(
            **info
            | {
                "tasks": {
                    task: {metric: MetricInfo(**about) for metric, about in metrics.items()}
                    for task, metrics in info["tasks"].items()
                }
            }
        )
        for name, info in content["problems"].items()
    }
    tunings = {}
    for problem, tuning in content["tunings"].items():
        trials = {}
        for name, of_name in tuning["trials"].items():
            seconds = timing["tunings"].get(problem, {}).get(name) or [{}] * len(of_name)
            trials[name] = [
                Trial(
                    **trial
                    | took
                    | {key: _numbers(trial[key]) for key in ("validation", "train_losses")}
                )
                for trial, took in zip(of_name, seconds, strict=False)
            ]
        tunings[problem] = Tuning(tuning["seed"], tuning["select"], trials)
    return Results(
        problems=problems,
        runs=[
            _run(run | times.get((run["problem"], run["weighting"], run["seed"]), {}))
            for run in content["runs"]
        ],
        tunings=tunings,
        planned={
            name: [(run, seed) for run, seed in runs] for name, runs in content["planned"].items()
        },
        command=content["command"],
    )
