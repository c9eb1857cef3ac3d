"""One training run: a network, a weighting, a seed."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from mtl_jax.base import Weighting
from mtl_jax.compare.problem import Batch, Problem, Split
from mtl_jax.train import TrainState, make_train_step
from mtl_jax.transforms import value_and_grad


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
      weights: for each task its weight at every step.
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
    epoch_seconds: list[float] = dataclasses.field(default_factory=list)
    compile_seconds: float = 0.0


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

    Args:
      problem: the problem.
      evaluate: computes the metrics after every epoch.
      weighting: the weighting.
      name: the name of the runs.
      tasks: the tasks to train; all of the problem's by default.
    """

    def __init__(
        self,
        problem: Problem,
        evaluate: Evaluator,
        weighting: Weighting,
        name: str,
        tasks: list[str] | None = None,
    ) -> None:
        self.problem, self.evaluate = problem, evaluate
        self.weighting, self.name = weighting, name
        self.tasks = list(problem.tasks) if tasks is None else tasks
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
        )
        run = Run(self.name, seed)
        weights = []
        for epoch in range(self.problem.epochs):
            key = jax.random.fold_in(order_key, epoch)
            train_epoch = self._compile(run, state, train, key)
            start = time.perf_counter()
            state, history = jax.block_until_ready(train_epoch(state, train, key))
            run.epoch_seconds.append(time.perf_counter() - start)
            epoch_losses, epoch_weights = jax.device_get(history)
            weights.append(epoch_weights)
            self._record(run, state, epoch_losses, weights)
            yield run
            if run.failure is not None:
                return

    def _losses(
        self, params: PyTree, model_state: PyTree, rng: Array, batch: Batch
    ) -> tuple[dict[str, Array], PyTree]:
        losses, model_state = self.problem.losses(params, model_state, rng, batch)
        return {task: losses[task] for task in self.tasks}, model_state

    def _compile(self, run: Run, *args: Any) -> Callable[..., Any]:
        if self._compiled is None:
            start = time.perf_counter()
            self._compiled = jax.jit(self._train_epoch, donate_argnums=0).lower(*args).compile()
            run.compile_seconds = time.perf_counter() - start
        return self._compiled

    def _train_epoch(
        self, state: TrainState, train: Batch, key: Array
    ) -> tuple[TrainState, tuple[PyTree, PyTree]]:
        """One pass over the training split, in a random order, within one `scan`."""
        size, batch_size = self.problem.size("train"), self.problem.batch_size
        order = jax.random.permutation(key, size)[: self.steps * batch_size]
        gradient_fn = value_and_grad(self._losses, self.weighting, has_aux=True)
        train_step = make_train_step(
            gradient_fn,
            self.optimizer,
            self.weighting,
            losses_fn=lambda *args: self._losses(*args)[0],
        )

        def step(state: TrainState, indices: Array) -> tuple[TrainState, tuple[PyTree, PyTree]]:
            batch = jax.tree.map(lambda field: field[indices], train)
            present = self.problem.present(batch)
            mask = None if present is None else {task: present[task] for task in self.tasks}
            state, value = train_step(state, batch, mask=mask)
            losses = value.losses
            if mask is not None:  # an absent task has no loss
                losses = jax.tree.map(lambda m, loss: jnp.where(m, loss, jnp.nan), mask, losses)
            return state, (losses, value.weights)

        return jax.lax.scan(step, state, order.reshape(self.steps, batch_size))

    def _record(
        self,
        run: Run,
        state: TrainState,
        losses: Mapping[str, np.ndarray],
        weights: list[Mapping[str, np.ndarray]],
    ) -> None:
        skipped = int(state.skipped)
        if skipped - run.skipped == self.steps:
            run.failure = f"no finite update in epoch {len(weights)}"
        run.skipped = skipped
        scores = {
            part: self.evaluate(state.params, state.model_state, part)
            for part in ("validation", "test")
        }
        for task in self.tasks:
            finite = losses[task][np.isfinite(losses[task])]
            mean = float(finite.mean()) if finite.size else float("nan")
            run.train_losses.setdefault(task, []).append(mean)
            run.validation.setdefault(task, []).append(scores["validation"][task])
            run.test.setdefault(task, []).append(scores["test"][task])
            run.weights[task] = np.concatenate([epoch[task] for epoch in weights])


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
