"""One training run: a network, a weighting, a seed."""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from mtl_jax._base import Aggregator, MultiTaskGradient, MultiTaskValue, Signal, Weighting
from mtl_jax._tasks import read_mask, read_tasks
from mtl_jax._train import TrainState, make_train_step
from mtl_jax._transforms import (
    representation_value_and_grad,
    value_and_grad,
)
from mtl_jax._typing import PyTree
from mtl_jax.compare.batches import orders, steps_per_epoch, take
from mtl_jax.compare.checkpoints import RunCheckpoints
from mtl_jax.compare.devices import number_of_devices, place, replicated, spread
from mtl_jax.compare.fingerprint import Fingerprint, digest, text_digest, where_it_runs
from mtl_jax.compare.metrics import Evaluator
from mtl_jax.compare.problem import Batch, Problem
from mtl_jax.compare.run import Place, Run
from mtl_jax.compare.sources import Source, by_source, joined


class History(NamedTuple):
    """What is kept of every step of an epoch: an array of so many entries in each place."""

    losses: dict[str, Array]
    weights: dict[str, Array] | None
    conflict: dict[str, Array] | None


class Trainer:
    """Trains a problem's network with one weighting, compiled once for all seeds.

    The task gradients are measured if the weighting reads them or their Gramian, or if the
    conflicts are asked for: at the representation if the problem has an encoder and heads, and over
    the shared parameters if it has not, or for an aggregator.

    Args:
      problem: the problem.
      evaluate: computes the metrics after every epoch.
      weighting: the weighting, or the aggregator.
      name: the name of the runs.
      tasks: the tasks to train; all of the problem's by default.
      conflict: whether to measure conflicts also where the weighting does not need it.
      mesh: the devices that each batch is spread over.
    """

    def __init__(
        self,
        problem: Problem,
        evaluate: Evaluator,
        weighting: Weighting | Aggregator,
        name: str,
        tasks: list[str] | None = None,
        conflict: bool = False,
        mesh: Mesh | None = None,
    ) -> None:
        self.problem, self.evaluate, self.mesh = problem, evaluate, mesh
        self.weighting, self.name = weighting, name
        self.tasks = list(problem.tasks) if tasks is None else tasks
        self.measured_at: Place | None = _measured_at(problem, weighting, conflict)
        self.steps = steps_per_epoch(problem)
        self.optimizer = problem.optimizer(problem.learning_rate, self.steps * problem.epochs)
        in_parts = self.measured_at == "representation"
        self.train_step = make_train_step(
            self.gradient(),
            self.optimizer,
            new_model_state=lambda aux: aux[0] if in_parts else aux,
        )
        self._lowered: jax.stages.Lowered | None = None
        self._compiled: jax.stages.Compiled | None = None

    def run(self, seed: int, checkpoints: RunCheckpoints | None = None) -> Iterator[Run]:
        """Train with a seed. Yields the run after every epoch, as far as it has come.

        With checkpoints the run goes on from where they end, which must not be at its end.

        Raises:
          OtherConfigurationError: if the checkpoints are of a run with another configuration.
          OSError: if a checkpoint cannot be written.
        """
        state, order_key, train = self._start(seed)
        run = Run(self.name, seed, measured_at=self.measured_at)
        if checkpoints is not None:
            fingerprint = self._fingerprint(state, order_key, train)
            run, state = checkpoints.restore(fingerprint, state) or (run, state)
        while not self.is_finished(run):
            key = jax.random.fold_in(order_key, run.epochs)
            train_epoch = self._compile(run, state, train, key)
            start = time.perf_counter()
            state, history = jax.block_until_ready(train_epoch(state, train, key))
            run.epoch_seconds.append(time.perf_counter() - start)
            self._record(run, state, jax.device_get(history))
            if checkpoints is not None:
                checkpoints.save(run, state, self.is_finished(run))
            yield run

    def read(self, seed: int, checkpoints: RunCheckpoints) -> Run | None:
        """The run of a seed as its checkpoints have it; ``None`` if there is no good one.

        Raises:
          OtherConfigurationError: as :meth:`run`.
        """
        state, order_key, train = self._start(seed)
        with checkpoints:
            restored = checkpoints.restore(self._fingerprint(state, order_key, train), state)
        return None if restored is None else restored[0]

    def fingerprint(self, seed: int) -> Fingerprint:
        """What decides the numbers of the run of a seed."""
        return self._fingerprint(*self._start(seed))

    def is_finished(self, run: Run) -> bool:
        """Whether the run has come to its end, or failed."""
        return run.failure is not None or run.epochs == self.problem.epochs

    def _start(self, seed: int) -> tuple[TrainState, Array, Batch]:
        """The first state, the key that the order of the data is drawn from, and the data."""
        init_key, order_key, rng, weighting_key = jax.random.split(jax.random.key(seed), 4)
        params, model_state = jax.jit(self.problem.init)(init_key)
        sources = by_source(self.problem.train)
        train = joined(jax.tree.map(jnp.asarray, {s: dict(sources[s]) for s in sources}))
        batch = take(train, {s: slice(n) for s, n in self.problem.batch_sizes().items()})
        state = self.train_step.init(
            params, batch, model_state=model_state, rng=rng, weighting_key=weighting_key
        )
        return place((state, order_key, train), replicated(self.mesh))

    def _fingerprint(self, state: TrainState, order_key: Array, train: Batch) -> Fingerprint:
        """What decides the numbers of the run that starts so."""
        key = jax.random.fold_in(order_key, 0)
        return {
            "epochs": self.problem.epochs,
            "batch_size": joined(self.problem.batch_sizes()),
            "learning_rate": self.problem.learning_rate,
            "tasks": self.tasks,
            "start": digest((state, order_key)),
            "program": text_digest(self._lower(state, train, key).as_text()),
            **self.evaluate.digests(state.params, state.model_state),
            **where_it_runs(),
            "devices": number_of_devices(self.mesh),
        }

    def _losses(
        self, params: PyTree, model_state: PyTree, rng: Array, batch: Batch
    ) -> tuple[dict[str, Array], PyTree]:
        losses, model_state = self.problem.losses(params, model_state, rng, batch)
        return {task: losses[task] for task in self.tasks}, model_state

    def gradient(self) -> MultiTaskGradient:
        """The gradient of the training step, called with parameters, model state, key and batch.

        ``aux`` of its value is ``(model_state, None)`` in the representation form, and the model
        state else.
        """
        encoder, heads = self.problem.encoder, self.problem.heads
        if self.measured_at != "representation":
            return value_and_grad(
                self._losses,
                self.weighting,
                has_aux=True,
                shared=self.problem.shared,
                diagnostics=self.measured_at is not None,
            )
        assert encoder is not None
        assert heads is not None
        assert isinstance(self.weighting, Weighting)

        def heads_of_tasks(
            params: PyTree, zs: dict[str, PyTree], model_state: PyTree, rng: Array, batch: Batch
        ) -> tuple[dict[str, Array], None]:
            # The problem's heads want a representation for tasks that are not trained, too.
            everyone = dict.fromkeys(self.problem.tasks, zs[self.tasks[0]]) | zs
            losses = heads(params, everyone, batch)
            return {task: losses[task] for task in self.tasks}, None

        return representation_value_and_grad(
            encoder,
            heads_of_tasks,
            self.weighting,
            tasks=self.tasks,
            has_aux=True,
            diagnostics=True,
        )

    def _lower(self, *args: Any) -> jax.stages.Lowered:
        if self._lowered is None:
            self._lowered = jax.jit(
                self._train_epoch, donate_argnums=0, out_shardings=replicated(self.mesh)
            ).lower(*args)
        return self._lowered

    def _compile(self, run: Run, *args: Any) -> Callable[..., Any]:
        if self._compiled is None:
            start = time.perf_counter()
            self._compiled = self._lower(*args).compile()
            run.compile_seconds += time.perf_counter() - start
        run.memory_bytes = _memory_bytes(self._compiled)
        return self._compiled

    def _train_epoch(
        self, state: TrainState, train: Batch, key: Array
    ) -> tuple[TrainState, History]:
        """One pass over the training split, in a random order, within one `scan`.

        Where the weighting reads a second batch, it is that of the next step; the last step's is
        the first.
        """

        def batch_of(order: dict[Source, Array]) -> tuple[Batch, dict[str, Array] | None]:
            batch = take(train, order)
            if self.mesh is not None:
                batch = jax.lax.with_sharding_constraint(batch, spread(self.mesh))
            present = self.problem.present(batch)
            return batch, None if present is None else {task: present[task] for task in self.tasks}

        def step(
            state: TrainState, both: tuple[dict[Source, Array], dict[Source, Array] | None]
        ) -> tuple[TrainState, History]:
            (batch, mask), second = batch_of(both[0]), None
            if both[1] is not None:
                another, labelled = batch_of(both[1])
                second = (another,)
                if mask is not None:  # of both batches
                    mask = jax.tree.map(jnp.logical_and, mask, labelled)
            state, value = self.train_step(state, batch, mask=mask, second=second)
            losses, weights = value.losses, value.weights
            if mask is not None:  # an absent task has neither
                losses, weights = _of_present(losses, mask), weights and _of_present(weights, mask)
            return state, History(losses, weights, _conflict(value, mask))

        order, following = orders(self.problem, key), None
        if _reads_second(self.weighting):
            following = jax.tree.map(lambda one: jnp.roll(one, -1, axis=0), order)
        return jax.lax.scan(step, state, (order, following))

    def _record(self, run: Run, state: TrainState, history: History) -> None:
        skipped = int(state.skipped)
        if skipped - run.skipped == self.steps:
            run.failure = f"no finite update in epoch {run.epochs}"
        run.skipped = skipped
        scores = {
            part: self.evaluate(state.params, state.model_state, part)
            for part in ("validation", "test")
        }
        for task in self.tasks:
            losses = np.asarray(history.losses[task])
            finite = losses[np.isfinite(losses)]
            mean = float(finite.mean()) if finite.size else float("nan")
            run.train_losses.setdefault(task, []).append(mean)
            run.validation.setdefault(task, []).append(scores["validation"][task])
            run.test.setdefault(task, []).append(scores["test"][task])
        if history.weights is not None:
            for task in self.tasks:
                _extend(run.weights, task, history.weights[task])
        for kind, values in (history.conflict or {}).items():
            _extend(run.conflict, kind, values)


def _reads_second(weighting: Weighting | Aggregator) -> bool:
    return isinstance(weighting, Weighting) and weighting.needs is Signal.SECOND_BATCH


def _measured_at(
    problem: Problem, weighting: Weighting | Aggregator, conflict: bool
) -> Place | None:
    if isinstance(weighting, Aggregator) or weighting.needs is Signal.TASK_GRADIENTS:
        return "parameters"
    if _reads_second(weighting):  # whose gradients, too, are those by the parameters
        return "parameters" if conflict else None
    if weighting.needs is Signal.GRAMIAN or conflict:
        return "parameters" if problem.encoder is None else "representation"
    return None


def _of_present(values: dict[str, Array], mask: dict[str, Array]) -> dict[str, Array]:
    return jax.tree.map(lambda value, m: jnp.where(m, value, jnp.nan), values, mask)


def _memory_bytes(compiled: jax.stages.Compiled) -> int | None:
    """The memory of a compiled program: arguments, results and what is temporary."""
    stats = compiled.memory_analysis()
    if stats is None:
        return None
    kept = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return kept + stats.temp_size_in_bytes


def _conflict(value: MultiTaskValue, mask: PyTree | None) -> dict[str, Float[Array, ""]] | None:
    """The share of conflicting pairs of present tasks and their mean cosine; NaN without a pair."""
    if value.diagnostics is None:
        return None
    present = read_mask(mask, read_tasks(value.losses))
    pairs = jnp.triu(present[:, None] & present[None, :], 1)
    number = jnp.sum(pairs)
    cosine = jnp.sum(jnp.where(pairs, value.diagnostics.cosines, 0)) / jnp.maximum(number, 1)
    found = {"share": value.diagnostics.conflicting, "cosine": cosine}
    known = (number > 0) & (True if value.measured is None else value.measured)
    return jax.tree.map(lambda x: jnp.where(known, x, jnp.nan), found)


def _extend(steps: dict[str, np.ndarray], name: str, values: Array) -> None:
    more = np.asarray(values)
    steps[name] = np.concatenate([steps[name], more]) if name in steps else more
