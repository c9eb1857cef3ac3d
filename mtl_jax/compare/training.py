"""One training run: a network, a weighting, a seed.

What is compiled is a training step, or a few of them, and not an epoch: the loop that calls it
takes its batches from the host, whatever the size of the data, and can say how far it has come. The
learning rate and the weighting's own numbers are arguments of the program, so that a weighting is
compiled once for all seeds and all trials of a tuning.
"""

import collections
import dataclasses
import functools
import hashlib
import itertools
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.errors import JAXTypeError
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from mtl_jax._base import (
    Aggregator,
    MultiTaskGradient,
    MultiTaskValue,
    Signal,
    Weighting,
    reads_second_batch,
)
from mtl_jax._metrics import MetricsState, with_metrics
from mtl_jax._tasks import read_mask, read_tasks
from mtl_jax._train import TrainState, TrainStep, make_train_step
from mtl_jax._transforms import representation_value_and_grad, value_and_grad
from mtl_jax._typing import PyTree
from mtl_jax.compare.checkpoints import Epoch, RunCheckpoints
from mtl_jax.compare.data import Batch, arrays_for_device, take
from mtl_jax.compare.devices import Devices
from mtl_jax.compare.problem import Problem
from mtl_jax.compare.results import BASELINE, Place, Run, Trial, alone_name, environment
from mtl_jax.compare.weightings import WEIGHTINGS, MakeWeighting
from mtl_jax.methods import RunSettings, SingleTask

STEPS = 256
"""The most steps between two looks at what they found."""

SECONDS = 1.0
"""About the longest time between them, where a call makes one step."""

SMALL = 5e6
"""Floating-point operations of a forward pass up to which one call makes several steps.

Up to here, about a third of a millisecond on a core, a step takes less time than calling it. Above,
the loop inside the program costs more than it saves on CPU, where it keeps a step to one core."""

_EVALUATED = ("validation", "test")

_AHEAD = 3
"""Steps that are handed to the device before the loop waits for the first of them."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the runs of a problem differ in, beside their seed.

    Attributes:
      name: the name of the runs.
      make: makes the weighting.
      learning_rate: the optimizer's learning rate.
      parameters: the weighting's own parameters; those that are not here have their defaults.
      task: the task that is trained alone; ``None`` for a weighting.
      single_task: what each task reaches alone with the seed of the run, for the weightings that
        are made of it; before that is known numbers that stand for it; ``None`` if it never is.
    """

    name: str
    make: MakeWeighting
    learning_rate: float
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    task: str | None = None
    single_task: SingleTask | None = None


def settings_of(
    problem: Problem, weightings: Mapping[str, MakeWeighting], alone: bool
) -> list[Setting]:
    """The default settings of the weightings and, if the problem has it so, of each task alone."""
    rate, alone = problem.learning_rate, alone and problem.alone
    unknown = single_task(problem, {}) if alone else None
    settings = [Setting(name, make, rate, single_task=unknown) for name, make in weightings.items()]
    for task in problem.tasks if alone else ():
        settings.append(Setting(alone_name(task), WEIGHTINGS[BASELINE], rate, task=task))
    return settings


def single_task(problem: Problem, runs: Mapping[str, Run | Trial]) -> SingleTask:
    """What each task reached alone, from these runs by task; 1 where there is none.

    A run that failed is taken to have stayed where it was last finite.
    """
    losses, metrics, higher = {}, {}, {}
    for task, description in problem.tasks.items():
        curve = _finite(runs[task].train_losses[task] if task in runs else [1.0])
        missing = problem.epochs - len(curve)
        losses[task] = np.pad(curve, (0, missing), mode="edge")
        for first in description.metrics[:1]:
            metrics[task], higher[task] = 1.0, first.higher_is_better
            if task in runs:
                run = runs[task]
                found = run.validation if isinstance(run, Trial) else run.metrics["validation"]
                metrics[task] = float(_finite(found[task][first.name])[-1])
    return SingleTask(losses, metrics, higher)


def _finite(values: Sequence[float]) -> Float[np.ndarray, "known"]:
    """The finite ones of these values; one NaN if there is none."""
    known = np.asarray(values, np.float32)
    known = known[np.isfinite(known)]
    return known if len(known) else np.full(1, np.nan, np.float32)


class Trainer:
    """Trains a problem's network, with any weighting.

    The task gradients are measured if the weighting reads them or their Gramian, or if the
    conflicts are asked for: at the representation if the problem has an encoder and heads, and over
    the shared parameters if it has not, or for an aggregator.

    A task alone is trained by the program of equal weights with the other tasks absent, which is
    the same for all tasks.

    Args:
      problem: the problem.
      conflict: whether to measure conflicts also where the weighting does not need it.
      mesh: the devices that each batch is spread over.

    Raises:
      ValueError: if the problem's settings do not fit its data, or the batches not the devices.
    """

    def __init__(
        self, problem: Problem, *, conflict: bool = False, mesh: Mesh | None = None
    ) -> None:
        self.problem, self.conflict, self.devices = problem, conflict, Devices(mesh)
        self.steps_per_epoch = problem.steps_per_epoch
        for batch_size in problem.batch_sizes.values():
            if batch_size % self.devices.number:
                raise ValueError(
                    f"The batch size of {problem.name!r}, {batch_size}, must be a multiple of the "
                    f"number of devices, {self.devices.number}."
                )
        self.evaluate = Evaluator(problem, self.devices)
        # What is drawn once a run need not be fast, and compiles in a third of the time like this.
        quick = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
        self._init = jax.jit(problem.init, compiler_options=quick)
        self._tell = jax.jit(with_metrics, out_shardings=self.devices.whole)
        self._programs: dict[Any, _Program] = {}

    def check_metrics(self) -> None:
        """Trace the metrics on the first batch of the validation split.

        Raises:
          ValueError: if one does not fit what the problem predicts, or its labels.
        """
        params, model_state = self.shapes[0]
        self.evaluate.check(params, model_state)

    # One run

    def new_run(self, setting: Setting, seed: int) -> Run:
        """The run of a setting and a seed before its first step.

        Raises:
          ValueError: if the weighting cannot run on the problem, as one that needs more tasks.
        """
        weighting = self._default(setting)
        params, _ = self.shapes[0]
        losses = dict.fromkeys(self.problem.tasks, jax.ShapeDtypeStruct((), jnp.float32))

        def initialize(params: PyTree, losses: PyTree, key: Array) -> PyTree:
            if isinstance(weighting, Weighting):
                return weighting.init(losses, key=key, params=params)
            return weighting.init(params, losses, key=key)

        try:
            jax.eval_shape(initialize, params, losses, jax.random.key(0))
        except ValueError as error:
            raise ValueError(
                f"{setting.name!r} cannot run on {self.problem.name!r}: {error}"
            ) from error
        return Run(
            self.problem.name,
            setting.name,
            seed,
            task=setting.task,
            learning_rate=setting.learning_rate,
            parameters=dict(setting.parameters),
            measured_at=self._measured_at(weighting, setting.task),
        )

    def run(
        self,
        setting: Setting,
        seed: int,
        *,
        splits: Sequence[str] = ("validation", "test"),
        checkpoints: RunCheckpoints | None = None,
        on_steps: Callable[[Run, int, Mapping[str, float]], None] = lambda run, step, losses: None,
    ) -> Iterator[Run]:
        """Train with a seed. Yields the run after every epoch, as far as it has come.

        With one seed, every setting starts from the same parameters and sees the same batches. A
        run that finds no finite update in a whole epoch ends there, and says so. One whose
        weighting cannot be made of what the tasks reached alone, as of a negative correlation, has
        failed before its first step.

        Args:
          setting: the setting.
          seed: the seed.
          splits: the splits whose metrics are computed after every epoch.
          checkpoints: where the run goes on from, and is saved.
          on_steps: called every now and then with the run, the number of its steps so far and the
            mean losses of the last ones.

        Raises:
          ValueError: as :meth:`new_run`.
          OtherSettingsError: a ``ValueError``; if the checkpoints are of other settings.
          OSError: if a checkpoint cannot be written.
        """
        try:
            run = self.new_run(setting, seed)
        except ValueError as error:
            if setting.single_task is None:
                raise
            not_known = single_task(self.problem, {})
            run = self.new_run(dataclasses.replace(setting, single_task=not_known), seed)
            run.failure = f"not to be made of what the tasks reach alone: {error}"
            run.provenance = self._provenance()
            yield run
            return
        numbers, program = _Numbers(setting), self._program(setting, run)
        compiling = _Compiling(run)
        with compiling:
            run.steps_per_call = self.steps_per_call
            run.provenance = self._provenance()
            init_key, rng, weighting_key = jax.random.split(jax.random.key(seed), 3)
            state = program.start(numbers, *self._init(init_key), rng, weighting_key)
            state, epoch = self.devices.replicate(state), Epoch()
        if checkpoints is not None:
            run, epoch, state = checkpoints.restore(run, state) or (run, epoch, state)
            compiling.run = run
        with _Loop(self, program, numbers, run, state) as loop:
            while not self.is_finished(run):
                start, compiled = time.perf_counter(), run.compile_seconds
                rows = loop.advance(compiling)
                epoch.seconds += time.perf_counter() - start - (run.compile_seconds - compiled)
                epoch.rows.append(rows)
                run.memory_bytes = program.memory_bytes
                ended = loop.step % self.steps_per_epoch == 0
                if ended:
                    self._end_epoch(run, epoch, loop.state, program.columns, splits, compiling)
                    epoch = Epoch()
                    with compiling:
                        loop.state = self._told(run, loop.state)
                on_steps(run, loop.step, _mean_losses(rows, program.columns, run.task))
                if checkpoints is not None and not self.is_finished(run):
                    checkpoints.save(loop.step, run, epoch, loop.state)
                if ended:
                    yield run

    def _provenance(self) -> dict[str, Any]:
        """What a run is made with."""
        devices = {"program": self.program, "devices of a batch": self.devices.number}
        return environment() | devices

    def warn_of_another_network(self, programs: Iterable[str | None], what: str) -> None:
        """Warn if something was trained with other programs (see :attr:`program`) than this one's.

        Args:
          programs: the digests that it was trained with.
          what: what it is, in the plural.
        """
        if any(program != self.program for program in programs):
            warnings.warn(
                f"The network or the losses of {self.problem.name!r} are not those that its {what} "
                "were trained with, as JAX lowers them. If you changed them, begin anew in another "
                "folder; another version of JAX or of a library can make a difference, too.",
                stacklevel=2,
            )

    def is_finished(self, run: Run) -> bool:
        """Whether the run has come to its end, or failed."""
        return run.failure is not None or run.epochs == self.problem.epochs

    def _end_epoch(
        self,
        run: Run,
        epoch: Epoch,
        state: TrainState,
        columns: Sequence[tuple[str, str]],
        splits: Sequence[str],
        compiling: "_Compiling",
    ) -> None:
        skipped = int(state.skipped)
        if skipped - run.skipped == self.steps_per_epoch:
            run.failure = f"no finite update in epoch {run.epochs + 1}"
        run.skipped = skipped
        run.epoch_seconds.append(epoch.seconds)
        tasks = list(self.problem.tasks) if run.task is None else [run.task]
        for split in splits:
            with compiling:
                found = self.evaluate(state.params, state.model_state, split, tasks)
            for task, metrics in found.items():
                courses = run.metrics.setdefault(split, {}).setdefault(task, {})
                for name, value in metrics.items():
                    courses.setdefault(name, []).append(value)
        for (kind, name), values in zip(columns, np.concatenate(epoch.rows).T, strict=True):
            if kind == "conflict":
                _extend(run.conflict, name, values)
            elif kind == "weight" and name in tasks:
                _extend(run.weights, name, values)
            elif kind == "loss" and name in tasks:
                run.train_losses.setdefault(name, []).append(_mean(values))

    def _told(self, run: Run, state: TrainState) -> TrainState:
        """The state, its weighting told the validation metrics, if it reads any."""
        if run.task is not None or not _reads_metrics(state.weighting_state):
            return state
        found = run.metrics["validation"]
        metrics = {
            name: found[name][task.metrics[0].name][-1] if task.metrics else np.nan
            for name, task in self.problem.tasks.items()
        }
        told = self._tell(state.weighting_state, self.devices.replicate(metrics))
        return state._replace(weighting_state=told)

    # What is compiled

    def _program(self, setting: Setting, run: Run) -> "_Program":
        """The program of a weighting, for all its numbers, or of the tasks alone."""
        key = ("alone" if setting.task else setting.name, _Numbers(setting).structure)
        if key not in self._programs:
            weighting = self._default(setting)
            columns = [("loss", task) for task in self.problem.tasks]
            if isinstance(weighting, Weighting):
                columns += [("weight", task) for task in self.problem.tasks]
            if run.measured_at is not None:
                columns += [("conflict", "share"), ("conflict", "cosine")]
            self._programs[key] = _Program(self, setting, columns, reads_second_batch(weighting))
        return self._programs[key]

    @functools.cached_property
    def program(self) -> str:
        """A digest of the network and its losses, as JAX lowers them."""
        return hashlib.sha256(self._lowered_losses.as_text().encode()).hexdigest()

    @functools.cached_property
    def steps_per_call(self) -> int:
        """How many steps one call of a program makes at most.

        Several where the data are on the device and a step is small; one where a convolution's
        gradient would be inside a loop on CPU, which XLA makes many times slower there.
        """
        cost = self._lowered_losses.cost_analysis() or {}
        small = 0 < cost.get("flops", np.inf) <= SMALL
        slow = jax.default_backend() == "cpu" and "convolution" in self._lowered_losses.as_text()
        return self.rows if small and not slow and self.data is not None else 1

    @property
    def rows(self) -> int:
        """For how many steps there is room for what they find."""
        return min(STEPS, self.steps_per_epoch)

    @functools.cached_property
    def shapes(self) -> tuple[tuple[PyTree, PyTree], Batch]:
        """The shapes of the parameters and the model state, and of a batch."""
        batch = _shapes_of(self.problem.train_batches(0).example())
        return jax.eval_shape(self.problem.init, jax.random.key(0)), batch

    @functools.cached_property
    def _lowered_losses(self) -> jax.stages.Lowered:
        (params, model_state), batch = self.shapes
        key = jax.eval_shape(jax.random.key, 0)
        return jax.jit(self.problem.losses).lower(params, model_state, key, batch)

    @functools.cached_property
    def data(self) -> PyTree | None:
        """The training data on the devices, if they are there."""
        data = self.problem.train_batches(0).device_data
        if data is None:
            return None
        return self.devices.replicate(jax.tree.map(jnp.asarray, data))

    def train_step(
        self,
        setting: Setting,
        learning_rate: Any,
        parameters: Mapping[str, Any],
        single_task: SingleTask | None,
    ) -> TrainStep:
        """The training step, of Python's numbers or of traced ones."""
        weighting = self._make(setting, learning_rate, parameters, single_task)
        place = self._measured_at(weighting, setting.task)
        in_parts = place == "representation"
        return make_train_step(
            self.gradient(weighting, place),
            self._optimizer(learning_rate),
            new_model_state=lambda aux: aux[0] if in_parts else aux,
        )

    def gradient(
        self, weighting: Weighting | Aggregator, measured_at: Place | None
    ) -> MultiTaskGradient:
        """The gradient of the training step, called with parameters, model state, key and batch.

        ``aux`` of its value is ``(model_state, None)`` in the representation form, and the model
        state else.
        """
        problem, tasks = self.problem, list(self.problem.tasks)
        if measured_at != "representation":

            def losses(
                params: PyTree, model_state: PyTree, rng: Array, batch: Batch
            ) -> tuple[dict[str, Array], PyTree]:
                losses, model_state = problem.losses(params, model_state, rng, batch)
                return {task: losses[task] for task in tasks}, model_state

            return value_and_grad(
                losses,
                weighting,
                has_aux=True,
                shared=problem.shared,
                diagnostics=measured_at is not None,
            )
        assert problem.encoder is not None
        assert isinstance(weighting, Weighting)

        def heads(
            params: PyTree, zs: dict[str, PyTree], model_state: PyTree, rng: Array, batch: Batch
        ) -> tuple[dict[str, Array], None]:
            assert problem.heads is not None
            losses = problem.heads(params, zs, batch)
            return {task: losses[task] for task in tasks}, None

        return representation_value_and_grad(
            problem.encoder, heads, weighting, tasks=tasks, has_aux=True, diagnostics=True
        )

    def _optimizer(self, learning_rate: Any) -> Any:
        return self.problem.optimizer(learning_rate, self.steps_per_epoch * self.problem.epochs)

    def _make(
        self,
        setting: Setting,
        learning_rate: Any,
        parameters: Mapping[str, Any],
        single_task: SingleTask | None,
    ) -> Weighting | Aggregator:
        optimizer = self._optimizer(learning_rate)
        settings = RunSettings(
            self.steps_per_epoch, self.problem.epochs, optimizer, single_task, learning_rate
        )
        return setting.make(settings, **parameters)

    def _default(self, setting: Setting) -> Weighting | Aggregator:
        """The weighting of a setting, of Python's numbers."""
        return self._make(setting, setting.learning_rate, setting.parameters, setting.single_task)

    def _measured_at(self, weighting: Weighting | Aggregator, task: str | None) -> Place | None:
        if isinstance(weighting, Aggregator) or weighting.needs is Signal.TASK_GRADIENTS:
            return "parameters"
        if reads_second_batch(weighting):  # whose gradients, too, are those by the parameters
            return "parameters" if self.conflict and task is None else None
        if weighting.needs is Signal.GRAMIAN or (self.conflict and task is None):
            return "parameters" if self.problem.encoder is None else "representation"
        return None


class Evaluator:
    """Computes the metrics of a problem's tasks, compiled once for all runs and both splits.

    Args:
      problem: the problem.
      devices: the devices that a batch is spread over.
      batch_size: examples of each dataset at a time, or a few more, so that every device has as
        many; by default four times those of a training step, and at most 500.
    """

    def __init__(
        self, problem: Problem, devices: Devices | None = None, batch_size: int | None = None
    ) -> None:
        self.problem, self.devices = problem, devices or Devices()
        if batch_size is None:
            batch_size = min(4 * max(problem.batch_sizes.values()), 500)
        sizes = [size for split in _EVALUATED for size in problem.sizes(split).values()]
        batch_size = min(batch_size, max(sizes))
        self._batch_size = batch_size + -batch_size % self.devices.number
        self._measure = jax.jit(self._statistics, out_shardings=self.devices.whole)
        self._kept: dict[str, list[tuple[Batch, PyTree]]] = {}

    def __call__(
        self, params: PyTree, model_state: PyTree, split: str, tasks: Sequence[str] | None = None
    ) -> dict[str, dict[str, float]]:
        """The metrics on a split, by task and metric; of all tasks by default."""
        found, waiting = [], None
        for batch in self._batches(split):
            measured = self._measure(params, model_state, *batch)
            if waiting is not None:  # is fetched while the device works on the next batch
                found.append(jax.device_get(waiting))
            waiting = measured
        found.append(jax.device_get(waiting))
        return {
            name: {
                metric.name: metric.over(
                    (statistics[name][metric.name], counted.get(name))
                    for statistics, counted in found
                )
                for metric in task.metrics
            }
            for name, task in self.problem.tasks.items()
            if tasks is None or name in tasks
        }

    def check(self, params: PyTree, model_state: PyTree) -> None:
        """Trace the metrics of one batch; parameters and model state may be shapes."""
        batches = self.problem.evaluation_batches("validation", self._batch_size)
        jax.eval_shape(self._statistics, params, model_state, *_shapes_of(next(iter(batches))))

    def _statistics(
        self,
        params: PyTree,
        model_state: PyTree,
        batch: Batch,
        valid: Mapping[str, Bool[Array, "batch"]],
    ) -> tuple[dict[str, dict[str, PyTree]], dict[str, Bool[Array, "batch"]]]:
        outputs = self.problem.predict(params, model_state, batch)
        labels, counted = self.problem.labels(batch), self.problem.counted(batch, valid)
        statistics: dict[str, dict[str, PyTree]] = {}
        for name, task in self.problem.tasks.items():
            found = statistics.setdefault(name, {})
            for metric in task.metrics:
                try:
                    found[metric.name] = metric.statistics(
                        outputs[name], labels[name], counted[name]
                    )
                except ValueError as error:
                    raise ValueError(
                        f"The metric {metric.name!r} of the task {name!r} does not fit what "
                        f"`predict` returns for it, or its labels. {error}"
                    ) from error
        # Only a metric over all predictions asks which of them count; to fetch an array costs time.
        gathering = {
            name for name, task in self.problem.tasks.items() if any(m.gather for m in task.metrics)
        }
        return statistics, {name: counted[name] for name in gathering}

    def _batches(self, split: str) -> Iterable[tuple[Batch, PyTree]]:
        """The batches of a split on the devices, which keep them where they fit."""
        if split in self._kept:
            return self._kept[split]
        batches = self.problem.evaluation_batches(split, self._batch_size)
        placed = (self.devices.spread_whole(batch) for batch in batches)
        if arrays_for_device(self.problem.datasets[split]) is None:
            return placed
        self._kept[split] = [jax.tree.map(jnp.asarray, batch) for batch in placed]
        return self._kept[split]


class _Numbers:
    """The numbers of a setting that a program can be given as arguments, and how to put them back.

    Attributes:
      values: the learning rate and what else is a float, or an array of such.
      structure: all else, the same for settings that share a program.
    """

    def __init__(self, setting: Setting) -> None:
        tree = (float(setting.learning_rate), dict(setting.parameters), setting.single_task)
        leaves, structure = jax.tree.flatten(tree)
        numbers = (float, np.ndarray)
        self.values = tuple(leaf for leaf in leaves if isinstance(leaf, numbers))
        rest = tuple(None if isinstance(leaf, numbers) else leaf for leaf in leaves)
        self.structure = (structure, rest)

    @property
    def constants(self) -> tuple[Any, ...]:
        """The values as constants of a program, by which it can be told from another one."""
        return tuple(
            tuple(map(float, value)) if isinstance(value, np.ndarray) else value
            for value in self.values
        )

    def join(self, values: Sequence[Any]) -> tuple[Any, Mapping[str, Any], SingleTask | None]:
        """The learning rate, the parameters and the baselines, with these values."""
        structure, rest = self.structure
        numbers = iter(values)
        return jax.tree.unflatten(
            structure, [next(numbers) if leaf is None else leaf for leaf in rest]
        )


class _Program:
    """The compiled training steps of a weighting.

    The numbers of a setting are arguments of it. Only where something of the problem or the
    weighting must know their values while it is traced, as `if learning_rate > 0` does, are they
    constants, and other ones need another program.

    Attributes:
      columns: what is kept of every step.
      reads_second: whether the weighting reads a second batch: the items are then pairs.
      memory_bytes: the memory that it takes; ``None`` if the backend does not say.
    """

    def __init__(
        self,
        trainer: Trainer,
        setting: Setting,
        columns: Sequence[tuple[str, str]],
        reads_second: bool,
    ) -> None:
        self._trainer, self._setting, self.columns = trainer, setting, columns
        self.reads_second = reads_second
        self._join = _Numbers(setting).join
        self._traced = True
        self._compiled: dict[Any, jax.stages.Compiled] = {}
        self.memory_bytes: int | None = None
        self._start_of_traced = jax.jit(self._start)
        self._start_of_constant = jax.jit(self._start, static_argnums=0)

    def start(self, numbers: _Numbers, *args: Any) -> TrainState:
        """The state before the first step, of parameters, model state and two keys."""
        if self._traced:
            try:
                return self._start_of_traced(numbers.values, *args)
            except JAXTypeError:
                self._traced = False
        return self._start_of_constant(numbers.constants, *args)

    def steps(
        self, numbers: _Numbers, args: tuple[Any, ...], compiling: "_Compiling"
    ) -> tuple[TrainState, Array, Array]:
        """Take steps; the last of what is returned is there to be waited for."""
        compiled = self._compiled.get(None if self._traced else numbers.constants)
        if compiled is None:
            with compiling:
                compiled = self._compile(numbers, args)
            stats = compiled.memory_analysis()
            if stats is not None:
                kept = stats.argument_size_in_bytes + stats.output_size_in_bytes
                self.memory_bytes = kept - stats.alias_size_in_bytes + stats.temp_size_in_bytes
        return compiled(numbers.values, *args) if self._traced else compiled(*args)

    def _compile(self, numbers: _Numbers, args: tuple[Any, ...]) -> jax.stages.Compiled:
        options: dict[str, Any] = {
            "donate_argnums": (2, 3),
            "out_shardings": self._trainer.devices.whole,
        }
        if self._traced:
            program = jax.jit(self._steps, **options)
            try:
                self._compiled[None] = program.lower(numbers.values, *args).compile()
                return self._compiled[None]
            except JAXTypeError:
                self._traced = False
        program = jax.jit(self._steps, static_argnums=0, **options)
        constants = numbers.constants
        self._compiled[constants] = program.lower(constants, *args).compile()
        return self._compiled[constants]

    def _train_step(self, values: Sequence[Any]) -> TrainStep:
        return self._trainer.train_step(self._setting, *self._join(values))

    def _start(
        self, values: Sequence[Any], params: PyTree, model_state: PyTree, rng: Array, key: Array
    ) -> TrainState:
        _, batch = self._trainer.shapes
        return self._train_step(values).init(
            params, batch, model_state=model_state, rng=rng, weighting_key=key
        )

    def _steps(
        self,
        values: Sequence[Any],
        only: dict[str, Array] | None,
        state: TrainState,
        found: Float[Array, "rows columns"],
        data: PyTree,
        items: PyTree,
        count: Array,
    ) -> tuple[TrainState, Float[Array, "rows columns"], Array]:
        """Take ``count`` steps, one if a call makes no more; traced."""
        trainer, update = self._trainer, self._train_step(values)

        def take_step(item: PyTree, state: TrainState, found: Array) -> tuple[TrainState, Array]:
            items = item if self.reads_second else (item,)
            batch, *others = (trainer.devices.constrain(take(data, one)) for one in items)
            mask = only
            for one in (batch, *others):  # a task is present if it has labels in all of them
                mask = _both(mask, trainer.problem.present(one))
            row = state.step % len(found)
            state, value = update(state, batch, mask=mask, second=tuple(others) or None)
            return state, found.at[row].set(_row(value, mask, self.columns).astype(found.dtype))

        if trainer.steps_per_call == 1:
            state, found = take_step(items, state, found)
        else:
            state, found = jax.lax.fori_loop(
                0,
                count,
                lambda i, carry: take_step(jax.tree.map(lambda x: x[i], items), *carry),
                (state, found),
            )
        return state, found, state.step


class _Loop:
    """Calls a program with batch after batch, as far ahead of the device as it may be."""

    def __init__(
        self, trainer: Trainer, program: _Program, numbers: _Numbers, run: Run, state: TrainState
    ) -> None:
        self._trainer, self._program, self._numbers = trainer, program, numbers
        self.state, self.step = state, int(state.step)
        place = trainer.devices.replicate
        self._found = place(jnp.zeros((trainer.rows, len(program.columns)), float))
        tasks = trainer.problem.tasks
        self._only = run.task and place({task: jnp.asarray(task == run.task) for task in tasks})
        processes = (jax.process_index(), jax.process_count())
        self._batches = iter(trainer.problem.train_batches(run.seed, self.step, *processes))
        # A second batch is that of the next step.
        pairs = program.reads_second
        self._items = itertools.pairwise(self._batches) if pairs else self._batches

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._batches.close()  # ends worker processes

    def advance(self, compiling: "_Compiling") -> Float[np.ndarray, "steps columns"]:
        """Take steps to the end of the epoch, or of the room for what they find, or for a while.

        Returns:
          What they found.
        """
        begin, (rows, epoch) = self.step, (self._trainer.rows, self._trainer.steps_per_epoch)
        end = begin + min(rows - begin % rows, epoch - begin % epoch)
        if self._trainer.steps_per_call > 1:
            self._call([next(self._items) for _ in range(end - begin)], compiling)
        else:
            start, running = time.perf_counter(), collections.deque[Array]()
            while self.step < end:
                running.append(self._call([next(self._items)], compiling))
                if len(running) > _AHEAD:
                    jax.block_until_ready(running.popleft())
                # Processes that train together look at the same steps.
                if jax.process_count() == 1 and time.perf_counter() - start > SECONDS:
                    break
        return np.asarray(self._found)[np.arange(begin, self.step) % rows]

    def _call(self, items: list[PyTree], compiling: "_Compiling") -> Array:
        trainer = self._trainer
        if trainer.steps_per_call > 1:
            item = jax.tree.map(lambda *leaves: _filled_up(leaves, trainer.rows), *items)
        else:
            (item,) = items
        on_host = trainer.data is None
        item = (trainer.devices.spread_parts if on_host else trainer.devices.replicate)(item)
        count = trainer.devices.replicate(np.int32(len(items)))
        arguments = (self._only, self.state, self._found, trainer.data, item, count)
        self.state, self._found, tick = self._program.steps(self._numbers, arguments, compiling)
        self.step += len(items)
        return tick


def _shapes_of(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)), tree)


def _both(mask: PyTree | None, other: PyTree | None) -> PyTree | None:
    """The tasks that are present in two masks; ``None`` for all."""
    if mask is None or other is None:
        return other if mask is None else mask
    return {task: mask[task] & other[task] for task in mask}


def _reads_metrics(state: PyTree) -> bool:
    """Whether a weighting whose state this is reads metrics."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, MetricsState))
    return any(isinstance(node, MetricsState) for node in nodes)


class _Compiling:
    """A context: if anything is compiled in it, its time is put down to the run as that."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __enter__(self) -> None:
        self._start, self._number = time.perf_counter(), _programs.number

    def __exit__(self, *error: object) -> None:
        if (number := _programs.number - self._number) > 0:
            self.run.compile_seconds += time.perf_counter() - self._start
            self.run.compilations += number


class _Programs:
    """Counts the programs that XLA compiles in this process."""

    number = 0

    def __call__(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        self.number += event == "/jax/core/compile/backend_compile_duration"


_programs = _Programs()
jax.monitoring.register_event_duration_secs_listener(_programs)


def _filled_up(arrays: Sequence[np.ndarray], size: int) -> np.ndarray:
    """The arrays along a new leading axis of this size."""
    found = np.zeros((size, *arrays[0].shape), arrays[0].dtype)
    found[: len(arrays)] = arrays
    return found


def _row(
    value: MultiTaskValue, mask: PyTree | None, columns: Sequence[tuple[str, str]]
) -> Float[Array, "columns"]:
    """What is kept of a step. An absent task has neither loss nor weight."""
    present = read_mask(mask, read_tasks(value.losses))
    by_kind: dict[str, Any] = {"loss": value.losses, "weight": value.weights}
    if mask is not None:
        by_kind = {
            kind: values and {t: jnp.where(mask[t], values[t], jnp.nan) for t in values}
            for kind, values in by_kind.items()
        }
    if value.diagnostics is not None:
        # The share of conflicting pairs of present tasks, and their mean cosine; NaN without one.
        pairs = jnp.triu(present[:, None] & present[None, :], 1)
        number = jnp.sum(pairs)
        cosines = jnp.sum(jnp.where(pairs, value.diagnostics.cosines, 0))
        conflict = {
            "share": value.diagnostics.conflicting,
            "cosine": cosines / jnp.maximum(number, 1),
        }
        known = (number > 0) & (True if value.measured is None else value.measured)
        by_kind["conflict"] = {
            name: jnp.where(known, found, jnp.nan) for name, found in conflict.items()
        }
    return jnp.stack([by_kind[kind][name].astype(float) for kind, name in columns])


def _mean_losses(
    rows: Float[np.ndarray, "steps columns"],
    columns: Sequence[tuple[str, str]],
    task: str | None,
) -> dict[str, float]:
    return {
        name: _mean(values)
        for (kind, name), values in zip(columns, rows.T, strict=True)
        if kind == "loss" and task in (None, name)
    }


def _mean(values: Float[np.ndarray, "steps"]) -> float:
    """The mean of what is finite; NaN if nothing is."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else float("nan")


def _extend(curves: dict[str, np.ndarray], name: str, values: np.ndarray) -> None:
    curves[name] = np.concatenate([curves[name], values]) if name in curves else values
