"""Tuning: the learning rate and the parameters of every weighting, with one budget for all."""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mtl_jax.compare.fingerprint import Fingerprint, OtherConfigurationError, difference
from mtl_jax.compare.metrics import Evaluator
from mtl_jax.compare.problem import Problem
from mtl_jax.compare.referee import BASELINE, lone_name, make_weighting, with_baselines
from mtl_jax.compare.run import Run
from mtl_jax.compare.search_space import Range, Space
from mtl_jax.compare.settings import PRUNED, TUNING_SEED, Trial, Tuning, TuningError
from mtl_jax.compare.training import Trainer
from mtl_jax.compare.weightings import SPACES, WEIGHTINGS, MakeWeighting
from mtl_jax.evaluation import delta_m

if TYPE_CHECKING:
    import optuna

LEARNING_RATE_FACTOR = 10.0
"""How far the search goes from the shipped learning rate, downwards and upwards."""

_LEARNING_RATE = "learning rate"


def tune(
    problem: Problem,
    weightings: Mapping[str, MakeWeighting],
    *,
    trials: int,
    seed: int = TUNING_SEED,
    alone: bool = True,
    spaces: Mapping[str, Space] | None = None,
    prune: bool = False,
    folder: str | os.PathLike[str] | None = None,
    on_epoch: Callable[[Run], None] = lambda run: None,
    on_trial: Callable[[str, Sequence[Trial]], None] = lambda name, trials: None,
) -> Tuning:
    r"""Search for the best setting of every weighting, with the same number of trials for each.

    A trial trains the network once with one setting: a learning rate within a factor of 10 of the
    problem's, and values of the weighting's own parameters. The first trial of each is the setting
    as shipped, so that what is chosen is never worse than that on the validation split. Then Optuna
    searches, by the tree-structured Parzen estimator. Equal weights, constant weights and each task
    alone are always tuned besides.

    What is maximised is the mean relative change of the validation metrics after the last epoch,
    :func:`mtl_jax.evaluation.delta_m`, against equal weights as shipped; for a task alone, of its
    own metric. The test split is not used.

    A trial that finds no finite update in a whole epoch, or whose metrics are not finite, has
    failed; the search goes on. The same arguments give the same trials.

    Args:
      problem: the problem.
      weightings: functions that make the weightings, by name.
      trials: the number of trials for each weighting and each task alone.
      seed: of the search, and of the training runs. Not one of the seeds of the comparison, which
        would be chosen for then: :func:`compare` refuses that.
      alone: whether to tune each task alone, too.
      spaces: what to search for each weighting besides the learning rate. By default ``SPACES`` for
        the weightings of ``WEIGHTINGS``, and nothing for others.
      prune: whether to end trials early whose score after an epoch is below the median of the
        trials before (from the sixth trial and the second epoch on).
      folder: where finished trials are kept, a file for each weighting. Those that are there
        are not trained again.
      on_epoch: called with the run after every epoch of it.
      on_trial: called with the name and its trials after every trial, and with those that were
        read.

    Returns:
      All trials; its ``chosen`` gives the best.

    Raises:
      ValueError: if ``trials`` is not at least 1, there is a space for an unknown weighting, a
        weighting cannot run on the problem.
      TuningError: a ``ValueError``; if equal weights as shipped fail, or score 0 in a task.
      OtherConfigurationError: a ``ValueError``; if the folder's trials are of another
        configuration.
    """
    if trials < 1:
        raise ValueError(f"`trials` must be at least 1, got {trials}.")
    weightings = with_baselines(weightings, tuned=True)
    if spaces is None:
        known = (name for name in SPACES if weightings.get(name) is WEIGHTINGS[name])
        spaces = {name: SPACES[name] for name in known}
    if unknown := set(spaces) - set(weightings):
        raise ValueError(f"There are spaces for {sorted(unknown)}, and no such weightings.")
    # Without its test split, of which an example stays to have the fields.
    problem = dataclasses.replace(
        problem, test={field: values[:1] for field, values in problem.validation.items()}
    )
    for name, make in weightings.items():
        make_weighting(problem, name, make)
    evaluate = Evaluator(problem)
    searches = {
        name: _Search(problem, evaluate, seed, name, make, spaces.get(name, {}))
        for name, make in weightings.items()
    }
    for task in problem.tasks if alone else ():
        name = lone_name(task)
        searches[name] = _Search(problem, evaluate, seed, name, WEIGHTINGS[BASELINE], {}, [task])
    found: dict[str, list[Trial]] = {name: [] for name in searches}
    baseline: dict[str, float] | None = None
    with _quiet_optuna():
        for name, search in searches.items():
            file = None if folder is None else pathlib.Path(folder) / f"{_quoted(name)}.json"
            for trial in search.trials(trials, baseline, prune, file, on_epoch):
                found[name].append(trial)
                on_trial(name, found[name])
                baseline = baseline or _last_metrics(problem, trial)
    return Tuning(seed, found)


@dataclasses.dataclass(frozen=True)
class _Search:
    """The search for one weighting or one task alone."""

    problem: Problem
    evaluate: Evaluator
    seed: int
    name: str
    make: MakeWeighting
    space: Space
    tasks: list[str] | None = None

    def trials(
        self,
        number: int,
        baseline: Mapping[str, float] | None,
        prune: bool,
        file: pathlib.Path | None,
        on_epoch: Callable[[Run], None],
    ) -> Iterator[Trial]:
        """The trials one by one. Without a baseline the first one is it."""
        import optuna

        pruner = optuna.pruners.MedianPruner(5, 1) if prune else optuna.pruners.NopPruner()
        sampler = optuna.samplers.TPESampler(seed=self.seed)
        study = optuna.create_study(direction="maximize", sampler=sampler, pruner=pruner)
        study.enqueue_trial(self._first())
        kept: list[Trial] = []
        fingerprint: Fingerprint = {}
        if file is not None:
            trainer = self._trainer(self.problem.learning_rate, {})
            fingerprint = trainer.fingerprint(self.seed) | {
                "pruning": prune,
                "optuna": optuna.__version__,
            }
            kept = _read(file, fingerprint)
        for index in range(number):
            asked = study.ask()
            learning_rate, parameters = self._draw(asked)
            if index < len(kept):
                # The search is gone through again, so that it goes on as it would have.
                trial = kept[index]
                if (trial.learning_rate, trial.parameters) != (learning_rate, parameters):
                    raise _other(file, "what is searched differs")
                if baseline is not None:
                    for epoch in range(trial.epochs):
                        asked.report(self._score(trial.validation, baseline, epoch), epoch)
            else:
                trial = self._train(asked, learning_rate, parameters, baseline, on_epoch)
                kept.append(trial)
                if file is not None:
                    _write(file, fingerprint, kept)
            if trial.score is not None:
                study.tell(asked, trial.score)
            else:
                pruned = trial.failure == PRUNED
                states = optuna.trial.TrialState
                study.tell(asked, state=states.PRUNED if pruned else states.FAIL)
            yield trial
            baseline = baseline or _last_metrics(self.problem, trial)

    def _first(self) -> dict[str, Any]:
        first = {_LEARNING_RATE: self.problem.learning_rate}
        for name, dimension in self.space.items():
            first |= dimension.first(name, list(self.problem.tasks))
        return first

    def _draw(self, asked: "optuna.Trial") -> tuple[float, dict[str, Any]]:
        shipped = self.problem.learning_rate
        factor = LEARNING_RATE_FACTOR
        rates = Range(shipped, shipped / factor, shipped * factor, log=True)
        tasks = list(self.problem.tasks)
        learning_rate = rates.draw(asked, _LEARNING_RATE, tasks)
        return learning_rate, {
            name: dimension.draw(asked, name, tasks) for name, dimension in self.space.items()
        }

    def _trainer(self, learning_rate: float, parameters: Mapping[str, Any]) -> Trainer:
        problem = self.problem.with_settings(learning_rate=learning_rate)
        make = functools.partial(self.make, **parameters)
        weighting = make_weighting(problem, self.name, make)
        return Trainer(problem, self.evaluate, weighting, self.name, self.tasks)

    def _train(
        self,
        asked: "optuna.Trial",
        learning_rate: float,
        parameters: Mapping[str, Any],
        baseline: Mapping[str, float] | None,
        on_epoch: Callable[[Run], None],
    ) -> Trial:
        start = time.perf_counter()
        run, pruned = Run(self.name, self.seed), False
        for run in self._trainer(learning_rate, parameters).run(self.seed):
            on_epoch(run)
            if baseline is not None and run.failure is None:
                asked.report(self._score(run.validation, baseline, run.epochs - 1), run.epochs - 1)
                if run.epochs < self.problem.epochs and asked.should_prune():
                    pruned = True
                    break
        score, failure = None, PRUNED if pruned else run.failure
        if failure is None:
            last = [values[-1] for values in run.validation.values()]
            score = 0.0 if baseline is None else self._score(run.validation, baseline, -1)
            if not np.isfinite([score, *last]).all():
                score, failure = None, "a metric is not finite"
        seconds = time.perf_counter() - start
        return Trial(learning_rate, parameters, run.validation, score, failure, seconds)

    def _score(
        self,
        validation: Mapping[str, Sequence[float]],
        baseline: Mapping[str, float],
        epoch: int,
    ) -> float:
        tasks = self.tasks or list(self.problem.tasks)
        return delta_m(
            {task: validation[task][epoch] for task in tasks},
            {task: baseline[task] for task in tasks},
            {task: self.problem.tasks[task].higher_is_better for task in tasks},
        )


def _last_metrics(problem: Problem, first: Trial) -> dict[str, float]:
    """What all trials are measured against."""
    metrics = {task: values[-1] for task, values in first.validation.items()}
    zero = [task for task, value in metrics.items() if value == 0]
    if first.failure is not None or zero:
        raise TuningError(
            f"Trials on {problem.name!r} are measured against equal weights at its own learning "
            f"rate, {problem.learning_rate:g}; but there "
            + (first.failure or f"the validation metric of {', '.join(zero)} is 0")
            + ". Give the problem a learning rate at which equal weights train."
        )
    return metrics


def _read(file: pathlib.Path, fingerprint: Fingerprint) -> list[Trial]:
    if not file.exists():
        return []
    content = json.loads(file.read_text(encoding="utf-8"))
    if changed := difference(fingerprint, content["fingerprint"]):
        raise _other(file, changed)
    return [Trial(**trial) for trial in content["trials"]]


def _write(file: pathlib.Path, fingerprint: Fingerprint, trials: Sequence[Trial]) -> None:
    """At every moment the old or the new file is there, whole."""
    content = {"fingerprint": fingerprint, "trials": [dataclasses.asdict(t) for t in trials]}
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(temporary, file)


def _other(file: pathlib.Path | None, difference: str) -> OtherConfigurationError:
    return OtherConfigurationError(
        f"The trials in {file} are of another configuration: {difference}. Go on with the old one, "
        "or begin with the new one in another folder."
    )


def _quoted(name: str) -> str:
    return urllib.parse.quote(name, safe=" ")


@contextlib.contextmanager
def _quiet_optuna() -> Iterator[None]:
    """Without a log line for every trial; the progress is the caller's to show."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
