"""One training run: a network, a weighting, a seed."""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mtl_jax.base import Aggregator, Signal, Weighting
from mtl_jax.compare.checkpoints import RunCheckpoints
from mtl_jax.compare.fingerprint import Fingerprint, digest, text_digest, where_it_runs
from mtl_jax.compare.metrics import Evaluator
from mtl_jax.compare.problem import Batch, Problem
from mtl_jax.compare.run import Place, Run
from mtl_jax.pytree import PyTree
from mtl_jax.representation import representation_value_and_grad
from mtl_jax.tasks import read_mask, read_tasks
from mtl_jax.train import TrainState, make_train_step
from mtl_jax.transforms import value_and_grad
from mtl_jax.weighing import GradientFn, MultiTaskValue


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
    """

    def __init__(
        self,
        problem: Problem,
        evaluate: Evaluator,
        weighting: Weighting | Aggregator,
        name: str,
        tasks: list[str] | None = None,
        conflict: bool = False,
    ) -> None:
        self.problem, self.evaluate = problem, evaluate
        self.weighting, self.name = weighting, name
        self.tasks = list(problem.tasks) if tasks is None else tasks
        self.measured_at: Place | None = _measured_at(problem, weighting, conflict)
        self.steps = steps_per_epoch(problem)
        self.optimizer = problem.optimizer(problem.learning_rate, self.steps * problem.epochs)
        self._lowered: jax.stages.Lowered | None = None
        self._compiled: Callable[..., Any] | None = None

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

    def is_finished(self, run: Run) -> bool:
        """Whether the run has come to its end, or failed."""
        return run.failure is not None or run.epochs == self.problem.epochs

    def _start(self, seed: int) -> tuple[TrainState, Array, Batch]:
        """The first state, the key that the order of the data is drawn from, and the data."""
        init_key, order_key, rng, weighting_key = jax.random.split(jax.random.key(seed), 4)
        params, model_state = jax.jit(self.problem.init)(init_key)
        train = jax.tree.map(jnp.asarray, dict(self.problem.train))
        batch = jax.tree.map(lambda field: field[: self.problem.batch_size], train)
        losses, _ = jax.eval_shape(self._losses, params, model_state, rng, batch)
        state = TrainState.create(
            params,
            self.optimizer,
            self.weighting,
            losses,
            model_state=model_state,
            rng=rng,
            weighting_key=weighting_key,
            shared=self.problem.shared,
        )
        return state, order_key, train

    def _fingerprint(self, state: TrainState, order_key: Array, train: Batch) -> Fingerprint:
        """What decides the numbers of the run that starts so."""
        key = jax.random.fold_in(order_key, 0)
        return {
            "epochs": self.problem.epochs,
            "batch_size": self.problem.batch_size,
            "learning_rate": self.problem.learning_rate,
            "tasks": self.tasks,
            "start": digest((state, order_key)),
            "program": text_digest(self._lower(state, train, key).as_text()),
            **self.evaluate.digests(state.params, state.model_state),
            **where_it_runs(),
        }

    def _losses(
        self, params: PyTree, model_state: PyTree, rng: Array, batch: Batch
    ) -> tuple[dict[str, Array], PyTree]:
        losses, model_state = self.problem.losses(params, model_state, rng, batch)
        return {task: losses[task] for task in self.tasks}, model_state

    def gradient_fn(self) -> GradientFn:
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
            self._lowered = jax.jit(self._train_epoch, donate_argnums=0).lower(*args)
        return self._lowered

    def _compile(self, run: Run, *args: Any) -> Callable[..., Any]:
        if self._compiled is None:
            start = time.perf_counter()
            self._compiled = self._lower(*args).compile()
            run.compile_seconds += time.perf_counter() - start
        return self._compiled

    def _train_epoch(
        self, state: TrainState, train: Batch, key: Array
    ) -> tuple[TrainState, History]:
        """One pass over the training split, in a random order, within one `scan`."""
        size, batch_size = self.problem.size("train"), self.problem.batch_size
        order = jax.random.permutation(key, size)[: self.steps * batch_size]
        in_parts = self.measured_at == "representation"
        train_step = make_train_step(
            self.gradient_fn(),
            self.optimizer,
            self.weighting,
            losses_fn=lambda *args: self._losses(*args)[0],
            new_model_state=lambda aux: aux[0] if in_parts else aux,
        )

        def step(state: TrainState, indices: Array) -> tuple[TrainState, History]:
            batch = jax.tree.map(lambda field: field[indices], train)
            present = self.problem.present(batch)
            mask = None if present is None else {task: present[task] for task in self.tasks}
            state, value = train_step(state, batch, mask=mask)
            losses = value.losses
            if mask is not None:  # an absent task has no loss
                losses = jax.tree.map(lambda m, loss: jnp.where(m, loss, jnp.nan), mask, losses)
            return state, History(losses, value.weights, _conflict(value, mask))

        return jax.lax.scan(step, state, order.reshape(self.steps, batch_size))

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


def _measured_at(
    problem: Problem, weighting: Weighting | Aggregator, conflict: bool
) -> Place | None:
    if isinstance(weighting, Aggregator):
        return "parameters"
    if weighting.needs is Signal.GRAMIAN or conflict:
        return "parameters" if problem.encoder is None else "representation"
    return None


def _conflict(value: MultiTaskValue, mask: PyTree | None) -> dict[str, Float[Array, ""]] | None:
    """The share of conflicting pairs of present tasks and their mean cosine; NaN without a pair."""
    if value.diagnostics is None:
        return None
    present = read_mask(mask, read_tasks(value.losses))
    pairs = jnp.triu(present[:, None] & present[None, :], 1)
    number = jnp.sum(pairs)
    cosine = jnp.sum(jnp.where(pairs, value.diagnostics.cosines, 0)) / jnp.maximum(number, 1)
    found = {"share": value.diagnostics.conflicting, "cosine": cosine}
    return jax.tree.map(lambda x: jnp.where(number > 0, x, jnp.nan), found)


def steps_per_epoch(problem: Problem) -> int:
    """The number of training steps in an epoch of the problem.

    Raises:
      ValueError: if the batch size or the epochs are not at least 1, or the batch is larger than
        the training split.
    """
    size = problem.size("train")
    for name in ("epochs", "batch_size"):
        if getattr(problem, name) < 1:
            raise ValueError(f"`{name}` must be at least 1, got {getattr(problem, name)}.")
    if problem.batch_size > size:
        raise ValueError(
            f"The batch size, {problem.batch_size}, is larger than the training data of "
            f"{problem.name!r}: {size} examples."
        )
    return size // problem.batch_size


def _extend(steps: dict[str, np.ndarray], name: str, values: Array) -> None:
    more = np.asarray(values)
    steps[name] = np.concatenate([steps[name], more]) if name in steps else more
