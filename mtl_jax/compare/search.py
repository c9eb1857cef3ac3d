"""The search for the setting of one weighting, or of one task alone."""

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.stats
from jax.sharding import Mesh

from mtl_jax._search_space import Range, Space
from mtl_jax.compare.devices import is_first_process
from mtl_jax.compare.files import write_text
from mtl_jax.compare.fingerprint import Fingerprint, OtherConfigurationError, difference
from mtl_jax.compare.metrics import Evaluator
from mtl_jax.compare.problem import Problem
from mtl_jax.compare.referee import make_weighting
from mtl_jax.compare.run import Run
from mtl_jax.compare.settings import PRUNED, Trial, TuningError
from mtl_jax.compare.training import Trainer
from mtl_jax.compare.weightings import MakeWeighting
from mtl_jax.evaluation import delta_m

if TYPE_CHECKING:
    import optuna

LEARNING_RATE_FACTOR = 10.0
"""How far the search goes from the shipped learning rate, downwards and upwards."""

_LEARNING_RATE = "learning rate"
_SPREAD = 10
"""The trials, the shipped setting included, before the search looks at what was found."""


@dataclasses.dataclass(frozen=True)
class Search:
    """The search for one weighting or one task alone.

    Attributes:
      problem: the problem, without its test split.
      evaluate: computes the metrics.
      seed: of the search and of the training runs.
      name: the name of the runs.
      make: makes the weighting.
      space: what is searched besides the learning rate.
      tasks: the tasks to train; all of the problem's by default.
      mesh: the devices that each batch is spread over.
    """

    problem: Problem
    evaluate: Evaluator
    seed: int
    name: str
    make: MakeWeighting
    space: Space
    tasks: list[str] | None = None
    mesh: Mesh | None = None

    def trials(
        self,
        number: int,
        baseline: Mapping[str, float] | None,
        prune: bool,
        file: pathlib.Path | None,
        on_epoch: Callable[[Run], None],
    ) -> Iterator[Trial]:
        """Make the trials, one by one.

        Args:
          number: how many.
          baseline: the validation metrics that they are measured against; without them, those of
            the first trial.
          prune: whether to end trials early that fall behind.
          file: where finished trials are kept; those that are there are not trained again.
          on_epoch: called with the run after every epoch.

        Yields:
          The trials.

        Raises:
          TuningError: if the first trial is to be the baseline, and has failed.
          OtherConfigurationError: if the file's trials are of another configuration.
        """
        import optuna

        pruner = optuna.pruners.MedianPruner(5, 1) if prune else optuna.pruners.NopPruner()
        sampler = optuna.samplers.TPESampler(n_startup_trials=_SPREAD, seed=self.seed)
        study = optuna.create_study(direction="maximize", sampler=sampler, pruner=pruner)
        study.enqueue_trial(self._first())
        for rate in self._first_learning_rates():
            study.enqueue_trial({_LEARNING_RATE: rate})
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
            baseline = baseline or last_metrics(self.problem, trial)

    def _first(self) -> dict[str, Any]:
        first = {_LEARNING_RATE: self.problem.learning_rate}
        for name, dimension in self.space.items():
            first |= dimension.first(name, list(self.problem.tasks))
        return first

    def _first_learning_rates(self) -> list[float]:
        """Those of the first trials but one, spread evenly and the same for every search.

        Drawn at random, a few could all lie low for one weighting and not for another.
        """
        # The sequence begins with the end and the middle of the range, 0 and 1/2.
        places = scipy.stats.qmc.Halton(1, scramble=False).random(_SPREAD + 1)[2:, 0]
        rates = self.problem.learning_rate * LEARNING_RATE_FACTOR ** (2 * places - 1)
        return rates.tolist()

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
        return Trainer(problem, self.evaluate, weighting, self.name, self.tasks, mesh=self.mesh)

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


def last_metrics(problem: Problem, first: Trial) -> dict[str, float]:
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
    if is_first_process():
        content = {"fingerprint": fingerprint, "trials": [vars(trial) for trial in trials]}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(content, indent=1))


def _other(file: pathlib.Path | None, difference: str) -> OtherConfigurationError:
    return OtherConfigurationError(
        f"The trials in {file} are of another configuration: {difference}. Go on with the old one, "
        "or begin with the new one in another folder."
    )
