"""Numbers that a weighting is told between steps, such as validation accuracies."""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from mtl_jax._checks import leaf_type
from mtl_jax._tasks import Tasks
from mtl_jax._typing import PyTree

State = TypeVar("State")


class MetricsState(NamedTuple):
    """One number for each task, set between steps, in the state of a weighting that reads it.

    ``init`` puts ``MetricsState.create(tasks)`` into the state, :func:`with_metrics` sets the
    numbers, and ``update`` takes them in.

    Attributes:
      latest: the numbers that were set last.
      fresh: which of them have not been taken in.
      average: the moving average of what was taken in; undefined before that.
      updates: for each task, how many numbers were taken in.
      tasks: whose numbers they are; not an array.
    """

    latest: Float[Array, "tasks"]
    fresh: Bool[Array, "tasks"]
    average: Float[Array, "tasks"]
    updates: Int32[Array, "tasks"]
    tasks: Tasks

    @classmethod
    def create(cls, tasks: Tasks) -> "MetricsState":
        """No number set yet."""
        zeros = jnp.zeros((tasks.number,), jnp.int32)
        return cls(tasks.full(0), zeros > 0, tasks.full(0), zeros, tasks)

    def taken_in(self, decay: float = 0.0) -> "MetricsState":
        """The fresh numbers put into the average, with 1 - decay; the first replaces it."""
        mean = decay * self.average + (1 - decay) * self.latest
        mean = jnp.where(self.updates == 0, self.latest, mean)
        return self._replace(
            fresh=jnp.zeros_like(self.fresh),
            average=jnp.where(self.fresh, mean, self.average),
            updates=self.updates + self.fresh.astype(jnp.int32),
        )


def with_metrics(state: State, metrics: PyTree) -> State:
    """Tell a weighting the current metric of each task, such as its validation accuracy.

    A pure function from state to state, to be called between steps, in or outside ``jit``. The
    weighting takes a number in once, at the next step in which the task is present and which is not
    skipped; until then a further call replaces it. The numbers are a part of the state, so that a
    checkpoint holds them.

    Args:
      state: the state of a weighting that reads metrics (:func:`achievement`,
        :func:`dynamic_task_prioritization`), of a wrapper around it, or anything that holds it,
        such as a :class:`TrainState`.
      metrics: a pytree like the losses: one number for each task. A task whose number is not finite
        keeps the one it has: NaN is for a task that was not measured.

    Returns:
      The state with the numbers.

    Raises:
      ValueError: if no weighting in ``state`` reads metrics, or ``metrics`` has another structure
        than the losses.
      TypeError: if a metric is not one real number.

    Example:
      >>> import mtl_jax
      >>> weighting = mtl_jax.dynamic_task_prioritization(gamma=1.0, performance="metrics")
      >>> losses = {"easy": 0.1, "hard": 0.1}
      >>> state = weighting.init(losses)
      >>> state = mtl_jax.with_metrics(state, {"easy": 0.9, "hard": 0.5})  # say, after an epoch
      >>> weights, state = weighting.update(losses, state)
      >>> {task: round(float(weight), 3) for task, weight in weights.items()}
      {'easy': 0.011, 'hard': 0.347}
    """
    found = []

    def tell(node):
        if not isinstance(node, MetricsState):
            return node
        _check_node(node)
        found.append(node)
        values = node.tasks.numbers(metrics, "with_metrics: the metrics")
        known = jnp.isfinite(values)
        latest = jnp.where(known, values.astype(node.latest.dtype), node.latest)
        return node._replace(latest=latest, fresh=node.fresh | known)

    told = jax.tree.map(tell, state, is_leaf=lambda node: isinstance(node, MetricsState))
    if not found:
        raise ValueError(
            "with_metrics: no weighting in this state reads metrics, as mtl_jax.achievement and "
            "mtl_jax.dynamic_task_prioritization(performance='metrics') do."
        )
    return told


def _check_node(node: MetricsState) -> None:
    """Raise a ``ValueError`` for metrics that are not as ``MetricsState.create`` made them."""
    for leaf, kind in ((node.latest, jnp.floating), (node.fresh, jnp.bool_)):
        shape, dtype = leaf_type(leaf, "with_metrics: a leaf of the state")
        if shape != (node.tasks.number,) or not jnp.issubdtype(dtype, kind):
            raise ValueError(
                f"with_metrics: the state holds metrics of {dtype}{list(shape)} for "
                f"{node.tasks.number} tasks. Pass a state as `init` or a step returned it."
            )
