"""Tuning: the learning rate and the parameters of every weighting, with one budget for all."""

import concurrent.futures
import contextlib
import dataclasses
import os
import pathlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

from jax.sharding import Mesh

from mtl_jax._search_space import Space
from mtl_jax.compare.batches import check_devices
from mtl_jax.compare.metrics import Evaluator
from mtl_jax.compare.problem import Problem
from mtl_jax.compare.referee import BASELINE, lone_name, make_weighting, with_baselines
from mtl_jax.compare.run import Run, folder_name
from mtl_jax.compare.search import Search, last_metrics
from mtl_jax.compare.settings import TUNING_SEED, Trial, Tuning
from mtl_jax.compare.sources import by_source, joined
from mtl_jax.compare.weightings import SPACES, WEIGHTINGS, MakeWeighting


def tune(
    problem: Problem,
    weightings: Mapping[str, MakeWeighting],
    *,
    trials: int,
    seed: int = TUNING_SEED,
    alone: bool = True,
    spaces: Mapping[str, Space] = MappingProxyType({}),
    prune: bool = False,
    jobs: int = 1,
    folder: str | os.PathLike[str] | None = None,
    mesh: Mesh | None = None,
    on_epoch: Callable[[Run], None] = lambda run: None,
    on_trial: Callable[[str, Sequence[Trial]], None] = lambda name, trials: None,
) -> Tuning:
    r"""Search for the best setting of every weighting, with the same number of trials for each.

    A trial trains the network once with one setting: a learning rate within a factor of 10 of the
    problem's, and values of the weighting's own parameters. The first trial of each is the setting
    as shipped, so that what is chosen is never worse than that on the validation split. The next
    nine have learning rates that are spread evenly and are the same for all, and parameters drawn
    at random. Then Optuna searches, by the tree-structured Parzen estimator. Equal weights,
    constant weights and each task alone are always tuned besides.

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
      spaces: what to search for a weighting besides the learning rate: for those of ``WEIGHTINGS``
        instead of what ``SPACES`` has, for others instead of nothing.
      prune: whether to end trials early whose score after an epoch is below the median of the
        trials before (from the sixth trial and the second epoch on).
      jobs: how many weightings are searched at once, in threads. The trials are the same for any
        number. Settings of JAX that were made in a ``with`` statement do not hold in threads.
      folder: where finished trials are kept, in a folder of the problem's name a file for each
        weighting. Those that are there are not trained again.
      mesh: devices to spread each batch over, as in :func:`compare`; for one job only, since all
        processes must train in the same order.
      on_epoch: called with the run after every epoch of it.
      on_trial: called with the name and its trials after every trial, and with those that were
        read.

    Returns:
      All trials; its ``chosen`` gives the best.

    Raises:
      ValueError: if ``trials`` or ``jobs`` is not at least 1, there is a space for an unknown
        weighting, or a weighting cannot run on the problem.
      TuningError: a ``ValueError``; if equal weights as shipped fail, or score 0 in a task.
      OtherConfigurationError: a ``ValueError``; if the folder's trials are of another
        configuration.
    """
    if trials < 1:
        raise ValueError(f"`trials` must be at least 1, got {trials}.")
    if jobs < 1:
        raise ValueError(f"`jobs` must be at least 1, got {jobs}.")
    if jobs > 1 and mesh is not None:
        raise ValueError(
            f"On a mesh one weighting is tuned at a time: `jobs` must be 1, got {jobs}."
        )
    weightings = with_baselines(weightings, tuned=True)
    if unknown := set(spaces) - set(weightings):
        raise ValueError(f"There are spaces for {sorted(unknown)}, and no such weightings.")
    known = (name for name in SPACES if weightings.get(name) is WEIGHTINGS[name])
    spaces = {name: SPACES[name] for name in known} | dict(spaces)
    problem = _without_test_split(problem)
    for name, make in weightings.items():
        make_weighting(problem, name, make)
    check_devices(problem, mesh)
    evaluate = Evaluator(problem, mesh=mesh)
    searches = {
        name: Search(problem, evaluate, seed, name, make, spaces.get(name, {}), mesh=mesh)
        for name, make in weightings.items()
    }
    for task in problem.tasks if alone else ():
        name = lone_name(task)
        make = WEIGHTINGS[BASELINE]
        searches[name] = Search(problem, evaluate, seed, name, make, {}, [task], mesh)
    found: dict[str, list[Trial]] = {name: [] for name in searches}
    at_once = _AtOnce(jobs)

    def add(name: str, trial: Trial) -> None:
        found[name].append(trial)
        on_trial(name, found[name])

    def make_trials(name: str, baseline: Mapping[str, float] | None) -> Iterator[Trial]:
        file = None
        if folder is not None:
            file = pathlib.Path(folder, folder_name(problem.name), f"{folder_name(name)}.json")
        return searches[name].trials(trials, baseline, prune, file, at_once.guard(on_epoch))

    with _quiet_optuna():
        streams = {BASELINE: make_trials(BASELINE, None)}
        first = next(streams[BASELINE])
        add(BASELINE, first)
        baseline = last_metrics(problem, first)
        streams |= {name: make_trials(name, baseline) for name in searches if name != BASELINE}
        at_once.exhaust(streams, add)
    return Tuning(seed, found)


def _without_test_split(problem: Problem) -> Problem:
    """The problem with an example of the validation split for its test split, for the form."""
    examples = {
        source: {field: values[:1] for field, values in fields.items()}
        for source, fields in by_source(problem.validation).items()
    }
    return dataclasses.replace(problem, test=joined(examples))


class _AtOnce:
    """Exhausts several streams of trials at once, in threads; what they call is called in turn."""

    def __init__(self, jobs: int) -> None:
        self._jobs, self._lock, self._stopped = jobs, threading.Lock(), threading.Event()

    def guard(self, call: Callable[[Run], None]) -> Callable[[Run], None]:
        """The function, never called by two threads at once nor after an interruption."""

        def guarded(run: Run) -> None:
            with self._lock:
                if self._stopped.is_set():
                    raise concurrent.futures.CancelledError
                call(run)

        return guarded

    def exhaust(
        self, streams: Mapping[str, Iterator[Trial]], add: Callable[[str, Trial], None]
    ) -> None:
        """Call ``add`` with all that the streams yield; the first exception ends all of them."""

        def follow(name: str) -> None:
            for trial in streams[name]:
                with self._lock:
                    add(name, trial)

        if self._jobs == 1:
            for name in streams:
                follow(name)
            return
        with concurrent.futures.ThreadPoolExecutor(self._jobs) as pool:
            try:
                done = [pool.submit(follow, name) for name in streams]
                for one in concurrent.futures.as_completed(done):
                    one.result()
            except BaseException:  # an interruption, too
                self._stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise


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
