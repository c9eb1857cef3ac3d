"""Tuning: the learning rate and the parameters of every weighting, with one budget for all."""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jax.sharding import Mesh

from mtl_jax._search_space import Range, Space
from mtl_jax.compare.checkpoints import check_same
from mtl_jax.compare.devices import is_first_process
from mtl_jax.compare.problem import Problem
from mtl_jax.compare.results import (
    BASELINE,
    PRUNED,
    ByEpoch,
    ProblemInfo,
    Run,
    Trial,
    Tuning,
    alone_name,
    file_name,
    read_with_digest,
    write_with_digest,
)
from mtl_jax.compare.training import Setting, Trainer, settings_of, single_task
from mtl_jax.compare.weightings import SPACES, WEIGHTINGS, MakeWeighting

if TYPE_CHECKING:
    import optuna

TUNING_SEED = 1000
"""The seed of tuning, which no reported run may have."""

LEARNING_RATE_FACTOR = 10.0
"""How far the search goes from the default learning rate, downwards and upwards."""

Select = Literal["mean", "worst"]
"""What is tuned for: the mean change of the tasks' metrics, or the worst task's."""

_LEARNING_RATE = "learning rate"
_COARSE = (0.0, 0.5, -0.5, 1.0, -1.0)
"""The learning rates of the first trials, as places from the least (-1) to the greatest (1)."""

_FINE = (-0.1, 0.15, -0.2, 0.25, -0.05)
"""The next ones, from the best of the first; no two as far, so that none is tried twice where they
are turned back at an end of the range."""

_Metrics = Mapping[str, Mapping[str, float]]


class TuningError(ValueError):
    """There is nothing that trials can be measured against."""


def tune(
    problem: Problem,
    weightings: Mapping[str, MakeWeighting],
    *,
    trials: int,
    select: Select = "mean",
    seed: int = TUNING_SEED,
    alone: bool = True,
    spaces: Mapping[str, Space] = MappingProxyType({}),
    prune: bool = False,
    folder: str | os.PathLike[str] | None = None,
    mesh: Mesh | None = None,
    on_steps: Callable[[Run, int, Mapping[str, float]], None] = lambda run, step, losses: None,
    on_trial: Callable[[str, Sequence[Trial]], None] = lambda name, trials: None,
) -> Tuning:
    r"""Search for the best setting of every weighting, with the same number of trials for each.

    A trial trains the network once with one setting: a learning rate within a factor of 10 of the
    problem's, and values of the weighting's own parameters. The first trial of each is the default
    setting, so that what is chosen is never worse than that on the validation split. The next four
    have other learning rates, a factor of 3.2 apart and the same for all, and the default
    parameters; the next five learning rates near the best of these and parameters drawn at random.
    Then Optuna searches both, by the tree-structured Parzen estimator. Equal weights, constant
    weights and each task alone are always tuned besides.

    What is maximised is how the validation metrics after the last epoch changed against a
    reference. The relative changes of a task's metrics :math:`m_{kj}`, of which
    :math:`s_{kj} = \pm 1` says whether higher is better, are averaged first,

    .. math:: c_k = \frac{1}{J_k} \sum_j s_{kj} \frac{m_{kj} - m^0_{kj}}{|m^0_{kj}|},

    and then over the tasks, or the smallest is taken. The reference of the mean is equal weights in
    their default setting. That of the worst task is what each task reached alone, in the best of
    its trials: against themselves equal weights have no worst task, and would never leave their
    default setting. A task alone is measured against its own default setting. A metric that the
    reference leaves at 0, or undefined, is left out, as is a task without a metric. The test split
    is not used.

    A trial that finds no finite update in a whole epoch, or whose metrics are not finite, has
    failed; the search goes on. The same arguments give the same trials.

    Args:
      problem: the problem.
      weightings: functions that make the weightings, by name.
      trials: the number of trials for each weighting and each task alone.
      select: ``"mean"`` for the mean over the tasks, ``"worst"`` for the worst task, as above.
      seed: of the search, and of the training runs. Not one of the seeds of the comparison, which
        would be chosen for then: :func:`compare` refuses that.
      alone: whether to tune each task alone, too.
      spaces: what to search for a weighting besides the learning rate: for those of ``WEIGHTINGS``
        instead of what ``SPACES`` has, for others instead of nothing.
      prune: whether to end trials early whose score after an epoch is below the median of the
        trials before (from the sixth trial and the second epoch on).
      folder: where finished trials are kept, in a folder of the problem's name a file for each
        weighting. Those that are there are not trained again.
      mesh: devices to spread each batch over, as in :func:`compare`.
      on_steps: called every now and then with the run of a trial, the number of its steps so far
        and the mean losses of the last ones.
      on_trial: called with the name and its trials after every trial, and with those that were
        read.

    Returns:
      All trials; its ``chosen`` gives the best.

    Raises:
      ValueError: if ``trials`` is not at least 1, there is no such ``select``, it is ``"worst"``
        without the tasks alone, there is a space for an unknown weighting, or a weighting cannot
        run on the problem.
      TuningError: a ``ValueError``; if the reference failed, or left all metrics of a task at 0.
      OtherSettingsError: a ``ValueError``; if the folder's trials are of another search.

    Example:
      With the problem ``molecules`` of the example of :class:`Problem`::

          tuning = tune(molecules, named_weightings(["adaptive", "dwa"]), trials=10)
          tuning.chosen("adaptive").learning_rate
    """
    return tune_with(
        Trainer(problem, mesh=mesh),
        weightings,
        trials=trials,
        select=select,
        seed=seed,
        alone=alone,
        spaces=spaces,
        prune=prune,
        folder=folder,
        reuse=(),
        on_steps=on_steps,
        on_trial=on_trial,
    )


def tune_with(
    trainer: Trainer,
    weightings: Mapping[str, MakeWeighting],
    *,
    trials: int,
    select: Select,
    seed: int,
    alone: bool,
    spaces: Mapping[str, Space],
    prune: bool,
    folder: str | os.PathLike[str] | None,
    reuse: Sequence[pathlib.Path],
    on_steps: Callable[[Run, int, Mapping[str, float]], None],
    on_trial: Callable[[str, Sequence[Trial]], None],
) -> Tuning:
    """As :func:`tune`, with what trains, which keeps what it has compiled.

    Trials that are not in ``folder`` are taken from the folders ``reuse`` where they are the same.
    """
    alone = alone and trainer.problem.alone
    check_tuning(trials, select, alone)
    weightings = with_baselines(weightings, tuned=True)
    if unknown := set(spaces) - set(weightings):
        raise ValueError(
            f"There are spaces for {sorted(unknown)}, which are not compared; the weightings are "
            f"{', '.join(weightings)}."
        )
    known = (name for name in SPACES if weightings.get(name) is WEIGHTINGS[name])
    spaces = {name: SPACES[name] for name in known} | dict(spaces)
    problem = trainer.problem
    settings = settings_of(problem, weightings, alone)
    for setting in settings:
        trainer.new_run(setting, seed)  # raises where it cannot run
    found: dict[str, list[Trial]] = {setting.name: [] for setting in settings}
    reference: _Metrics | None = None
    # The tasks alone are what the worst task is measured against, and some weightings are made of;
    # equal weights are what the mean is measured against.
    order = {BASELINE: 1} | {setting.name: 0 for setting in settings if setting.task}
    tuning = Tuning(seed, select, found)
    with _quiet_optuna():
        for setting in sorted(settings, key=lambda setting: order.get(setting.name, 2)):
            if alone and setting.task is None:
                chosen = {task: tuning.chosen(alone_name(task)) for task in problem.tasks}
                setting = dataclasses.replace(setting, single_task=single_task(problem, chosen))
                if select == "worst" and reference is None:
                    reference = _reference(
                        {task: chosen[task].validation.get(task, {}) for task in problem.tasks},
                        problem,
                        "what each task reaches alone",
                    )
            place = (file_name(problem.name), f"{file_name(setting.name)}.json")
            file = None if folder is None else pathlib.Path(folder, *place)
            others = tuple(pathlib.Path(other, *place) for other in reuse)
            space = spaces.get(setting.name, {})
            search = _Search(trainer, setting, space, seed, select, prune, reference, file, others)
            for trial in search.trials(trials, on_steps):
                found[setting.name].append(trial)
                on_trial(setting.name, found[setting.name])
                if setting.name == BASELINE and reference is None:
                    what = f"equal weights at its own learning rate, {setting.learning_rate:g}"
                    reference = _reference(trial.validation, problem, what, trial.failure)
                    search.reference = reference
    return tuning


def _reference(
    validation: ByEpoch, problem: Problem, what: str, failure: str | None = None
) -> _Metrics:
    """What trials are measured against: those metrics that there can be a change of."""
    metrics = _with_changes(validation)
    nothing = [
        task for task, about in problem.tasks.items() if about.metrics and not metrics.get(task)
    ]
    if failure is not None or nothing:
        undefined = f"the validation metrics of {', '.join(nothing)} are 0 or undefined"
        raise TuningError(
            f"Trials on {problem.name!r} are measured against {what}; but there "
            + (failure or undefined)
            + ". Give the problem a learning rate at which equal weights train."
        )
    return metrics


def _with_changes(validation: ByEpoch) -> _Metrics:
    """The last metrics that there can be a relative change of."""
    return {
        task: {
            name: values[-1]
            for name, values in by_name.items()
            if np.isfinite(values[-1]) and values[-1] != 0
        }
        for task, by_name in validation.items()
    }


def check_tuning(trials: int, select: str, alone: bool) -> None:
    """Raise a ``ValueError`` for what cannot be tuned with, or for."""
    if trials < 1:
        raise ValueError(f"The number of trials must be at least 1, got {trials}.")
    if select not in ("mean", "worst"):
        raise ValueError(f"`select` must be 'mean' or 'worst', got {select!r}.")
    if select == "worst" and not alone:
        raise ValueError(
            "The worst task is the one that is furthest behind what it reaches alone: to tune for "
            "it (`select`, --select), leave `alone` (--alone, also the problem's) at its default."
        )


def settings_of_problem(info: ProblemInfo) -> dict[str, Any]:
    """What of a problem must be the same when a search or a comparison goes on."""
    return {
        "epochs": info.epochs,
        "batch_size": dict(info.batch_size),
        "learning_rate": info.learning_rate,
        "tasks": {task: list(metrics) for task, metrics in info.tasks.items()},
        "data": info.data,
    }


def with_baselines(
    weightings: Mapping[str, MakeWeighting], *, tuned: bool = False
) -> dict[str, MakeWeighting]:
    """The weightings after what is always run: equal weights, and constant ones if tuned."""
    baselines = (BASELINE, "constant") if tuned else (BASELINE,)
    return {name: WEIGHTINGS[name] for name in baselines} | dict(weightings)


@dataclasses.dataclass
class _Search:
    """The search for one weighting or one task alone.

    Attributes:
      trainer: what trains.
      setting: the default setting.
      space: what is searched besides the learning rate.
      seed: of the search and of the training runs.
      select: what a score is.
      prune: whether to end trials early that fall behind.
      reference: the validation metrics that trials are measured against; until they are known,
        those of the first trial that did not fail.
      file: where finished trials are kept.
      others: files of other comparisons, whose trials are taken if the file is not there.
    """

    trainer: Trainer
    setting: Setting
    space: Space
    seed: int
    select: Select
    prune: bool
    reference: _Metrics | None
    file: pathlib.Path | None
    others: tuple[pathlib.Path, ...]

    def trials(
        self, number: int, on_steps: Callable[[Run, int, Mapping[str, float]], None]
    ) -> Iterator[Trial]:
        """Make that many trials, those that are in the file included, one by one."""
        import optuna

        pruner = optuna.pruners.MedianPruner(5, 1) if self.prune else optuna.pruners.NopPruner()
        study = optuna.create_study(direction="maximize", pruner=pruner)
        kept, known = self._read(), self._read_others()
        programs = {one["program"] for one in (*kept, *known.values())}
        self.trainer.warn_of_another_network(programs, "trials")
        for index in range(number):
            if index < len(kept):
                trial = Trial(**kept[index]["trial"])
                study.add_trial(_as_optuna_has_it(kept[index]["optuna"]))
            else:
                trial, program = self._next(study, index, known, on_steps)
                of_optuna = _as_json(study.trials[-1])
                kept.append(
                    {
                        "trial": dataclasses.asdict(trial),
                        "program": program,
                        "optuna": of_optuna,
                    }
                )
                self._write(kept)
            if self.reference is None and trial.failure is None:
                self.reference = _with_changes(trial.validation)
            yield trial

    def _next(
        self,
        study: "optuna.Study",
        index: int,
        known: Mapping[str, Mapping[str, Any]],
        on_steps: Callable[[Run, int, Mapping[str, float]], None],
    ) -> tuple[Trial, str]:
        """The next trial, and the program that it was trained with."""
        import optuna

        # Each trial draws from a generator of its own, so that one that goes on after others were
        # read draws what it would have drawn.
        draws = int(np.random.SeedSequence((self.seed, index)).generate_state(1)[0])
        first = len(_COARSE) + len(_FINE)
        study.sampler = optuna.samplers.TPESampler(n_startup_trials=first, seed=draws)
        if index < len(_COARSE):
            study.enqueue_trial(self._default() | {_LEARNING_RATE: _rate(_COARSE[index])})
        elif index < first:
            place = self._best_place(study) + _FINE[index - len(_COARSE)]
            study.enqueue_trial({_LEARNING_RATE: _rate(place)})
        asked = study.ask()
        tasks, rate = list(self.trainer.problem.tasks), self.setting.learning_rate
        factor = Range(1.0, 1 / LEARNING_RATE_FACTOR, LEARNING_RATE_FACTOR, log=True)
        setting = dataclasses.replace(
            self.setting,
            learning_rate=rate * factor.draw(asked, _LEARNING_RATE, tasks),
            parameters={name: one.draw(asked, name, tasks) for name, one in self.space.items()},
        )
        key = _key(setting.learning_rate, setting.parameters)
        if key in known:
            trial, program = Trial(**known[key]["trial"]), known[key]["program"]
        else:
            trial, program = self._train(setting, asked, on_steps), self.trainer.program
        if trial.failure is None:
            score = self._score(trial.validation)
            finite = np.isfinite(score)
            trial = dataclasses.replace(
                trial,
                score=score if finite else None,
                failure=None if finite else "a metric is not finite",
            )
        if trial.score is not None:
            study.tell(asked, trial.score)
        else:
            states = optuna.trial.TrialState
            study.tell(asked, state=states.PRUNED if trial.failure == PRUNED else states.FAIL)
        return trial, program

    def _train(
        self,
        setting: Setting,
        asked: "optuna.Trial",
        on_steps: Callable[[Run, int, Mapping[str, float]], None],
    ) -> Trial:
        """Train with a setting; the score is not known yet."""
        start, run, failure = time.perf_counter(), Run("", "", 0), None
        for run in self.trainer.run(setting, self.seed, splits=["validation"], on_steps=on_steps):
            failure = run.failure
            if self.reference is not None and failure is None:
                asked.report(self._score(run.metrics["validation"]), run.epochs - 1)
                if run.epochs < self.trainer.problem.epochs and asked.should_prune():
                    failure = PRUNED
                    break
        return Trial(
            setting.learning_rate,
            setting.parameters,
            run.metrics.get("validation", {}),
            None,
            failure,
            time.perf_counter() - start,
            run.compile_seconds,
            run.compilations,
            {} if self.setting.task is None else run.train_losses,
        )

    def _best_place(self, study: "optuna.Study") -> float:
        """The place of the learning rate that was best in the first trials; 0 if all failed."""
        scores = [trial.value for trial in study.trials[: len(_COARSE)]]
        best = max(scores, key=lambda score: -np.inf if score is None else score)
        return 0.0 if best is None else _COARSE[scores.index(best)]

    def _default(self) -> dict[str, Any]:
        default: dict[str, Any] = {_LEARNING_RATE: 1.0}
        for name, dimension in self.space.items():
            default |= dimension.first(name, list(self.trainer.problem.tasks))
        return default

    def _score(self, validation: ByEpoch) -> float:
        if self.reference is None:  # this is what the others are measured against
            return 0.0
        tasks, found = self.trainer.problem.info().tasks, []
        for task, metrics in validation.items():
            changes = [
                (1 if tasks[task][name].higher_is_better else -1)
                * (metrics[name][-1] - value)
                / abs(value)
                for name, value in self.reference.get(task, {}).items()
            ]
            if changes:
                found.append(np.mean(changes))
        if not found:  # a task alone without a metric: there is nothing to choose by
            return 0.0
        return float(np.mean(found) if self.select == "mean" else np.min(found))

    # The file

    def _search_settings(self) -> dict[str, Any]:
        return settings_of_problem(self.trainer.problem.info()) | {
            "space": {name: repr(dimension) for name, dimension in self.space.items()},
            "seed": self.seed,
            "select": self.select,
            "pruning": self.prune,
        }

    def _read(self) -> list[dict[str, Any]]:
        if self.file is not None and self.file.exists():
            content = _read_trials(self.file)
            what = f"The trials in {self.file} are of another search"
            check_same(self._search_settings(), content["search"], what)
            return content["trials"]
        return []

    def _read_others(self) -> dict[str, dict[str, Any]]:
        """The trials of other comparisons that were trained as these are, by their setting."""
        own, known = self._search_settings(), {}
        for file in self.others:
            if file.exists():
                content = _read_trials(file)
                if content["search"] == own | {"select": content["search"]["select"]}:
                    for one in content["trials"]:
                        key = _key(one["trial"]["learning_rate"], one["trial"]["parameters"])
                        known.setdefault(key, one)
        return {key: one for key, one in known.items() if one["trial"]["failure"] != PRUNED}

    def _write(self, kept: list[dict[str, Any]]) -> None:
        if self.file is not None and is_first_process():
            content = {"search": self._search_settings(), "trials": kept}
            write_with_digest(self.file, "tuning", content)


def _key(learning_rate: float, parameters: Mapping[str, Any]) -> str:
    return json.dumps([learning_rate, parameters], sort_keys=True)


def _read_trials(file: pathlib.Path) -> dict[str, Any]:
    """What a file of trials holds."""
    return read_with_digest(file, "tuning", dict, "Remove it to make its trials again.")


def _rate(place: float) -> float:
    """The factor of the learning rate at a place, those beyond the range turned back into it."""
    turned = place if abs(place) <= 1 else math.copysign(2, place) - place
    return LEARNING_RATE_FACTOR**turned


def _as_json(trial: "optuna.trial.FrozenTrial") -> dict[str, Any]:
    from optuna.distributions import distribution_to_json

    return {
        "state": trial.state.name,
        "value": trial.value,
        "params": trial.params,
        "distributions": {
            name: distribution_to_json(one) for name, one in trial.distributions.items()
        },
        "intermediate_values": trial.intermediate_values,
    }


def _as_optuna_has_it(found: dict[str, Any]) -> "optuna.trial.FrozenTrial":
    import optuna

    return optuna.trial.create_trial(
        state=optuna.trial.TrialState[found["state"]],
        value=found["value"],
        params=found["params"],
        distributions={
            name: optuna.distributions.json_to_distribution(text)
            for name, text in found["distributions"].items()
        },
        intermediate_values={int(e): value for e, value in found["intermediate_values"].items()},
    )


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
