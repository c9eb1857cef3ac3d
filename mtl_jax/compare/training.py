"""One training run: a network, a weighting, a seed."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from mtl_jax.base import Aggregator, Signal, Weighting
from mtl_jax.compare.problem import Batch, Problem, Split
from mtl_jax.representation import representation_value_and_grad
from mtl_jax.tasks import read_mask, read_tasks
from mtl_jax.train import TrainState, make_train_step
from mtl_jax.transforms import value_and_grad
from mtl_jax.weighing import GradientFn, MultiTaskValue

Place = Literal["representation", "parameters"]
"""Where the task gradients are measured."""


@dataclasses.dataclass
class Run:
    """What came of one run. Lists over epochs start after the first epoch.

    Attributes:
      weighting: the weighting's name.
      seed: the seed of initial parameters, batches and random numbers.
      failure: why the run ended early, or ``None``.
      skipped: the steps that were left out because their update was not finite.
      train_losses: for each task the mean training loss of every epoch.
      validation: for each task the metric on the validation split after every epoch.
      test: for each task the metric on the test split after every epoch.
      weights: for each task its weight at every step; empty for an aggregator, which has none.
      measured_at: where the task gradients were measured: at the representation, or over the
        parameters that the tasks share; ``None`` if they were not.
      conflict: how the task gradients lie to each other at every step: ``"share"``, the share of
        the pairs of tasks with a negative cosine, and ``"cosine"``, the mean cosine of the pairs.
        NaN at a step that did not measure them, or had labels of one task only. Empty if they were
        not measured.
      epoch_seconds: the wall time of every epoch's training.
      compile_seconds: the time that compiling the training took, if this run did.
    """

    weighting: str
    seed: int
    failure: str | None = None
    skipped: int = 0
    train_losses: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    validation: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    test: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    weights: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    measured_at: Place | None = None
    conflict: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    epoch_seconds: list[float] = dataclasses.field(default_factory=list)
    compile_seconds: float = 0.0


class History(NamedTuple):
    """What is kept of every step of an epoch: an array of so many entries in each place."""

    losses: dict[str, Array]
    weights: dict[str, Array] | None
    conflict: dict[str, Array] | None


class Evaluator:
    """Computes the metrics of a problem's tasks, compiled once for all runs.

    Args:
      problem: the problem.
      batch_size: examples at a time.
    """

    def __init__(self, problem: Problem, batch_size: int = 500) -> None:
        self.problem = problem
        self._sums = jax.jit(self._sum_scores)
        self._batches = {
            part: list(_padded_batches(getattr(problem, part), problem.size(part), batch_size))
            for part in ("validation", "test")
        }

    def __call__(self, params: PyTree, model_state: PyTree, part: str) -> dict[str, float]:
        """The metric of each task: the mean score of the split's examples with its label."""
        sums = [
            jax.device_get(self._sums(params, model_state, batch, valid))
            for batch, valid in self._batches[part]
        ]
        metrics = {}
        for task in self.problem.tasks:
            total = sum(float(batch[task][0]) for batch in sums)
            count = sum(int(batch[task][1]) for batch in sums)
            metrics[task] = total / count if count else float("nan")
        return metrics

    def _sum_scores(
        self, params: PyTree, model_state: PyTree, batch: Batch, valid: Array
    ) -> dict[str, tuple[Array, Array]]:
        scores = self.problem.scores(params, model_state, batch)
        labelled = None if self.problem.labelled is None else self.problem.labelled(batch)
        sums = {}
        for task in self.problem.tasks:
            counted = valid if labelled is None else valid & labelled[task]
            sums[task] = jnp.sum(jnp.where(counted, scores[task], 0)), jnp.sum(counted)
        return sums


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
        self._compiled: Callable[..., Any] | None = None

    def run(self, seed: int) -> Iterator[Run]:
        """Train with a seed. Yields the run after every epoch, as far as it has come."""
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
        run = Run(self.name, seed, measured_at=self.measured_at)
        history = []
        for epoch in range(self.problem.epochs):
            key = jax.random.fold_in(order_key, epoch)
            train_epoch = self._compile(run, state, train, key)
            start = time.perf_counter()
            state, epoch_history = jax.block_until_ready(train_epoch(state, train, key))
            run.epoch_seconds.append(time.perf_counter() - start)
            history.append(jax.device_get(epoch_history))
            self._record(run, state, history)
            yield run
            if run.failure is not None:
                return

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

    def _compile(self, run: Run, *args: Any) -> Callable[..., Any]:
        if self._compiled is None:
            start = time.perf_counter()
            self._compiled = jax.jit(self._train_epoch, donate_argnums=0).lower(*args).compile()
            run.compile_seconds = time.perf_counter() - start
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

    def _record(
        self,
        run: Run,
        state: TrainState,
        history: list[History],
    ) -> None:
        skipped = int(state.skipped)
        if skipped - run.skipped == self.steps:
            run.failure = f"no finite update in epoch {len(history)}"
        run.skipped = skipped
        scores = {
            part: self.evaluate(state.params, state.model_state, part)
            for part in ("validation", "test")
        }
        for task in self.tasks:
            losses = np.asarray(history[-1].losses[task])
            finite = losses[np.isfinite(losses)]
            mean = float(finite.mean()) if finite.size else float("nan")
            run.train_losses.setdefault(task, []).append(mean)
            run.validation.setdefault(task, []).append(scores["validation"][task])
            run.test.setdefault(task, []).append(scores["test"][task])
        steps = jax.tree.map(lambda *epochs: np.concatenate(epochs), *history)
        if steps.weights is not None:
            run.weights = {task: steps.weights[task] for task in self.tasks}
        if steps.conflict is not None:
            run.conflict = steps.conflict


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


def _padded_batches(split: Split, size: int, batch_size: int) -> Iterator[tuple[Batch, Array]]:
    """The split in batches of one size, the last one filled up, and which examples are real."""
    for start in range(0, size, batch_size):
        indices = np.arange(start, start + batch_size)
        valid = indices < size
        taken = np.where(valid, indices, 0)
        batch = {field: jnp.asarray(values[taken]) for field, values in split.items()}
        yield batch, jnp.asarray(valid)
