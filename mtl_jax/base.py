"""The protocol of a weighting, and the one constructor that lifts vector methods to pytrees.

A method is written as its paper writes it, on a vector of K task losses. What every method shares
(names, dtypes, missing tasks, values that are not finite, error messages) is held here, once.
"""

import enum
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int32, PyTree

from mtl_jax.tasks import Losses, Tasks, Weights, leaf_name, read_mask, read_tasks


class Signal(enum.Enum):
    """What a weighting reads at every step, and so what a step costs."""

    LOSSES = "losses"
    """The task losses: one forward and one backward pass, as plain training."""


class InitFn(Protocol):
    """``init(losses, *, key=None) -> state``."""

    def __call__(self, losses: Losses, *, key: Array | None = None) -> PyTree:
        """Return the state before the first step."""
        ...


class UpdateFn(Protocol):
    """``update(losses, state, *, mask=None) -> (weights, state)``."""

    def __call__(
        self, losses: Losses, state: PyTree, *, mask: PyTree | None = None
    ) -> tuple[Weights, PyTree]:
        """Return the weights and the next state."""
        ...


class ObserveFn(Protocol):
    """``observe(losses_after_the_step, state, *, mask=None) -> state``."""

    def __call__(self, losses: Losses, state: PyTree, *, mask: PyTree | None = None) -> PyTree:
        """Return the next state."""
        ...


class Weighting(NamedTuple):
    """A loss weighting: pure functions from the task losses to one weight for each task.

    The training gradient of a step is that of ``sum_k weights_k * losses_k``, the weights held
    constant. A weighting holds functions, so close over it or make it a static argument of ``jit``.

    Attributes:
      init: ``init(losses, *, key=None) -> state``. Reads only the structure and the dtypes of the
        losses, which may be arrays or ``jax.ShapeDtypeStruct``. ``key`` is a ``jax.random.key``,
        needed by the methods that draw random numbers. Every leaf of the state is a fresh buffer,
        so a state can be donated.
      update: ``update(losses, state, *, mask=None) -> (weights, state)``. ``mask`` is a pytree of
        booleans with the structure of the losses: ``False`` for a task without labels in this
        batch, which then has weight 0 and leaves its statistics as they were. A loss that is not
        finite, or for which the method has no finite answer, leaves the whole state as it was and
        gives NaN for the weights of all present tasks, so that the step can be recognised and
        skipped (:func:`mtl_jax.make_train_step` does).
      needs: the signal that ``update`` reads.
      observe: ``observe(losses, state, *, mask=None) -> state``, to be called with the losses of
        the same batch after the parameters were updated; ``None`` where a method does not ask.

    Example:
      >>> import mtl_jax
      >>> losses = {"depth": 0.5, "normals": 1.5}
      >>> weighting = mtl_jax.adaptive()
      >>> state = weighting.init(losses)
      >>> weights, state = weighting.update(losses, state)
      >>> {task: round(float(weight), 3) for task, weight in weights.items()}
      {'depth': 0.5, 'normals': 1.5}
    """

    init: InitFn
    update: UpdateFn
    needs: Signal = Signal.LOSSES
    observe: ObserveFn | None = None


class WeightingState(NamedTuple):
    """The state of a weighting made by :func:`vector_weighting`.

    Attributes:
      steps: for each task, the updates in which it was present and which were not skipped.
      inner: what the method itself carries.
    """

    steps: Int32[Array, "tasks"]
    inner: PyTree


VectorInit = Callable[[Tasks, Array | None], PyTree]
VectorUpdate = Callable[
    [Float[Array, "tasks"], PyTree, Bool[Array, "tasks"], Int32[Array, "tasks"]],
    tuple[Float[Array, "tasks"], PyTree],
]
VectorObserve = Callable[[Float[Array, "tasks"], PyTree, Bool[Array, "tasks"]], PyTree]


def vector_weighting(
    update: VectorUpdate,
    init: VectorInit = lambda tasks, key: (),
    *,
    observe: VectorObserve | None = None,
) -> Weighting:
    """Make a :class:`Weighting` of functions written on the vector of K task losses.

    The functions see the losses of all K tasks as one vector of at least float32, cut from the
    gradient; the loss of an absent task reads 1, and only the entries of present tasks are used of
    what ``update`` returns. A method that has no answer returns NaN.

    Args:
      update: ``update(losses, state, present, steps) -> (weights, state)``, with ``present:
        bool[K]``, and ``steps: int32[K]``, for each task the earlier updates that it took part in.
      init: ``init(tasks, key) -> state``, ``tasks`` being a :class:`Tasks`. In the state, an array
        of one or more dimensions is a statistic of the tasks, its leading axis being the task:
        the rows of absent tasks are kept as they were. A scalar is shared by the tasks.
      observe: ``observe(losses, state, present) -> state``, for a method that reads the losses
        after the step.

    Returns:
      The weighting.

    Example:
      Weights that grow with the task's loss, and sum to the number of tasks:

      >>> import jax.numpy as jnp
      >>> import mtl_jax
      >>> def update(losses, state, present, steps):
      ...     return losses / jnp.mean(losses, where=present), state
      >>> weighting = mtl_jax.vector_weighting(update)
      >>> weights, _ = weighting.update((1.0, 3.0), weighting.init((1.0, 3.0)))
      >>> [float(weight) for weight in weights]
      [0.5, 1.5]
    """

    def init_fn(losses: Losses, *, key: Array | None = None) -> WeightingState:
        tasks = read_tasks(losses)
        if key is not None and not isinstance(key, jax.Array):
            raise TypeError(f"`key` must be a jax.random.key, got {key!r}.")
        if key is not None and not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.wrap_key_data(key)
        inner = init(tasks, key)
        for path, leaf in jax.tree_util.tree_leaves_with_path(inner):
            if jnp.ndim(leaf) and jnp.shape(leaf)[0] != tasks.number:
                raise TypeError(
                    f"The state's leaf {leaf_name(path)!r} has shape {jnp.shape(leaf)}: an array "
                    f"in a weighting's state has the tasks ({tasks.number}) as its leading axis."
                )
        # Copies, so that no leaf aliases an argument, a constant or another leaf.
        inner = jax.tree.map(jnp.copy, inner)
        return WeightingState(steps=jnp.zeros((tasks.number,), jnp.int32), inner=inner)

    def read(
        losses: Losses, state: WeightingState, mask: PyTree | None
    ) -> tuple[Tasks, Float[Array, "tasks"], Bool[Array, "tasks"]]:
        tasks = read_tasks(losses)
        if not isinstance(state, WeightingState):
            raise TypeError(
                f"Expected the state that this weighting's `init` returned, got {type(state)}."
            )
        expected = state.steps.shape[0]
        if tasks.number != expected:
            raise ValueError(
                f"The state was initialised for {expected} tasks, but there are losses for "
                f"{tasks.number}: {', '.join(tasks.names)}. Call `init` with these losses."
            )
        present = read_mask(mask, tasks)
        vector = jnp.stack(
            [jnp.asarray(leaf).astype(tasks.dtype) for leaf in jax.tree.leaves(losses)]
        )
        return tasks, jnp.where(present, jax.lax.stop_gradient(vector), 1), present

    def update_fn(
        losses: Losses, state: WeightingState, *, mask: PyTree | None = None
    ) -> tuple[Weights, WeightingState]:
        tasks, vector, present = read(losses, state, mask)
        weights, inner = update(vector, state.inner, present, state.steps)
        weights = jax.lax.stop_gradient(weights)
        inner = _keep_absent(inner, state.inner, present)
        valid = (
            jnp.all(jnp.isfinite(vector))
            & jnp.all(jnp.isfinite(jnp.where(present, weights, 0)))
            & all_finite(inner)
        )
        steps = jnp.where(present, optax.safe_increment(state.steps), state.steps)
        weights = jnp.where(present, jnp.where(valid, weights, jnp.nan), 0)
        new_state = tree_where(valid, WeightingState(steps, inner), state)
        return jax.tree.unflatten(tasks.structure, jnp.unstack(weights)), new_state

    def observe_fn(
        losses: Losses, state: WeightingState, *, mask: PyTree | None = None
    ) -> WeightingState:
        assert observe is not None
        _, vector, present = read(losses, state, mask)
        inner = _keep_absent(observe(vector, state.inner, present), state.inner, present)
        valid = jnp.all(jnp.isfinite(vector)) & all_finite(inner)
        return tree_where(valid, WeightingState(state.steps, inner), state)

    return Weighting(
        init=init_fn, update=update_fn, observe=observe_fn if observe is not None else None
    )


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether every floating-point number in the tree is finite."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return functools.reduce(
        jnp.logical_and, (jnp.all(jnp.isfinite(leaf)) for leaf in leaves), jnp.asarray(True)
    )


def tree_where(condition: Bool[Array, "..."], chosen: PyTree, otherwise: PyTree) -> PyTree:
    """``chosen`` where the condition holds, else ``otherwise``, in the dtypes of ``otherwise``."""
    return jax.tree.map(
        lambda new, old: jnp.where(condition, _cast(new, old.dtype), old), chosen, otherwise
    )


def _cast(leaf: Array, dtype: Any) -> Array:
    return leaf if leaf.dtype == dtype else leaf.astype(dtype)


def per_task(
    transformation: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """The optimizer applied to each task's scalar on its own, its whole state kept per task.

    Then a task that is absent keeps all of its optimizer state, the step counter included.
    """
    return optax.GradientTransformation(
        init=jax.vmap(transformation.init), update=jax.vmap(transformation.update)
    )


def require_key(key: Array | None, method: str) -> Array:
    """The key, or an error that says where it is to be given."""
    if key is None:
        raise ValueError(
            f"{method} draws random numbers: call its `init` with key=jax.random.key(seed)."
        )
    return key


def positive_steps(value: int, name: str, method: str) -> int:
    """The number of steps, checked to be a positive integer."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise ValueError(
            f"{method}: `{name}` is a number of training steps, an integer of at least 1, "
            f"got {value!r}."
        )
    return int(value)


def _keep_absent(new: PyTree, old: PyTree, present: Bool[Array, "tasks"]) -> PyTree:
    """The new state, but with the rows of absent tasks as they were."""

    def keep(new: Array, old: Array) -> Array:
        if not old.ndim:
            return new
        rows = jnp.reshape(present, (-1,) + (1,) * (old.ndim - 1))
        return jnp.where(rows, _cast(new, old.dtype), old)

    return jax.tree.map(keep, new, old)
