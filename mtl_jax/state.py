"""The state of weightings and aggregators: per task, fresh, and kept where nothing was learned."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int32, PyTree

from mtl_jax.tasks import Tasks, leaf_name


class WeightingState(NamedTuple):
    """The state of a weighting made by :func:`vector_weighting`.

    Attributes:
      steps: for each task, the updates in which it was present and which were not skipped.
      inner: what the method itself carries.
    """

    steps: Int32[Array, "tasks"]
    inner: PyTree


def initial_state(inner: PyTree, tasks: Tasks) -> WeightingState:
    """The state before the first step, its buffers fresh, its arrays checked to be by task."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(inner):
        if jnp.ndim(leaf) and jnp.shape(leaf)[0] != tasks.number:
            raise TypeError(
                f"The state's leaf {leaf_name(path)!r} has shape {jnp.shape(leaf)}: an array "
                f"in a weighting's state has the tasks ({tasks.number}) as its leading axis."
            )
    # Copies, so that no leaf aliases an argument, a constant or another leaf.
    inner = jax.tree.map(jnp.copy, inner)
    return WeightingState(steps=jnp.zeros((tasks.number,), jnp.int32), inner=inner)


def next_state(
    inner: PyTree, state: WeightingState, present: Bool[Array, "tasks"]
) -> WeightingState:
    """The state with another inner part, the step of the present tasks counted."""
    steps = jnp.where(present, optax.safe_increment(state.steps), state.steps)
    return WeightingState(steps, inner)


def check_state(state: Any, tasks: Tasks) -> None:
    """Raise an error for what is not a state for these tasks."""
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


def keep_absent(new: PyTree, old: PyTree, present: Bool[Array, "tasks"]) -> PyTree:
    """The new state, but with the rows of absent tasks as they were."""

    def keep(new: Array, old: Array) -> Array:
        if not old.ndim:
            return new
        rows = jnp.reshape(present, (-1,) + (1,) * (old.ndim - 1))
        return jnp.where(rows, _cast(new, old.dtype), old)

    return jax.tree.map(keep, new, old)


def tree_where(condition: Bool[Array, "..."], chosen: PyTree, otherwise: PyTree) -> PyTree:
    """``chosen`` where the condition holds, else ``otherwise``, in the dtypes of ``otherwise``."""
    return jax.tree.map(
        lambda new, old: jnp.where(condition, _cast(new, old.dtype), old), chosen, otherwise
    )


def _cast(leaf: Array, dtype: Any) -> Array:
    return leaf if leaf.dtype == dtype else leaf.astype(dtype)


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether every floating-point number in the tree is finite."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return functools.reduce(
        jnp.logical_and, (jnp.all(jnp.isfinite(leaf)) for leaf in leaves), jnp.asarray(True)
    )
