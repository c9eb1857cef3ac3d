"""The state of weightings and aggregators: per task, fresh, and kept where nothing was learned."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int32

from mtl_jax.arguments import is_key, leaf_type
from mtl_jax.pytree import PyTree
from mtl_jax.tasks import Tasks, describe, leaf_name


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
        shape, _ = leaf_type(leaf, f"The state's leaf {leaf_name(path)!r}")
        if shape and shape[0] != tasks.number:
            raise TypeError(
                f"The state's leaf {leaf_name(path)!r} has shape {shape}: an array in a "
                f"weighting's state has the tasks ({tasks.number}) as its leading axis."
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


def check_state(
    state: Any, tasks: Tasks, expected: Callable[[bool], WeightingState] | None
) -> None:
    """Raise an error for what is not a state for these tasks.

    Args:
      state: the state.
      tasks: the tasks.
      expected: the shapes of a state before the first step, with or without a random key in it:
        where a method's own parameters decide what draws, a key is the user's choice. ``None`` if
        they cannot be known.
    """
    if not isinstance(state, WeightingState):
        raise TypeError(
            f"Expected the state that this weighting's `init` returned, got {type(state)}."
        )
    shape, _ = leaf_type(state.steps, "The state's leaf 'steps'")
    if len(shape) == 1 and shape != (tasks.number,):
        raise ValueError(
            f"The state was initialised for {shape[0]} tasks, but there are losses for "
            f"{tasks.number}: {', '.join(tasks.names)}. Call `init` with these losses."
        )
    if expected is None:
        return
    keyed = any(is_key(leaf) for leaf in jax.tree.leaves(state.inner))
    hint = "Pass the state that this weighting's `init` returned."
    check_like(state, expected(keyed), "The weighting's state", hint)


def _kind(dtype: Any) -> Any:
    """What dtypes have in common that may stand in for each other in a state."""
    kinds = (jnp.floating, jax.dtypes.prng_key)
    return next((kind for kind in kinds if jnp.issubdtype(dtype, kind)), dtype)


def shapes_of_state(init: Callable[[Array | None], PyTree], tasks: Tasks, keyed: bool) -> Any:
    """The shapes of the state before the first step, ``init`` being a function of the key."""
    return jax.eval_shape(lambda: initial_state(init(jax.random.key(0) if keyed else None), tasks))


def read_result(output: Any, state: PyTree, returned: str) -> tuple[Any, PyTree]:
    """What a method's update returned, its state checked to be as the one before."""
    if not isinstance(output, tuple) or len(output) != 2:
        raise TypeError(
            f"`update` must return a pair ({returned}, state), got {type(output).__name__}."
        )
    result, inner = output
    check_like(inner, state, "The state that `update` returned", "It must be as `init` made it.")
    return result, jax.tree.map(jnp.asarray, inner)


def check_like(tree: PyTree, expected: PyTree, what: str, hint: str) -> None:
    """Raise an error for a tree whose structure, shapes or kinds of numbers are not as expected."""
    if jax.tree.structure(tree) != jax.tree.structure(expected):
        raise ValueError(
            f"{what} has the structure {describe(jax.tree.structure(tree))} instead of "
            f"{describe(jax.tree.structure(expected))}. {hint}"
        )
    leaves = zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(expected), strict=True)
    for (path, leaf), like in leaves:
        name = f"{what}: the leaf {leaf_name(path)!r}"
        shape, dtype = leaf_type(leaf, name)
        if shape != like.shape or _kind(dtype) != _kind(like.dtype):
            raise ValueError(
                f"{name} is {dtype}{list(shape)} instead of {like.dtype}{list(like.shape)}. {hint}"
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
        lambda new, old: jnp.where(condition, _cast(new, old.dtype), old),
        chosen,
        jax.tree.map(jnp.asarray, otherwise),
    )


def _cast(leaf: Array, dtype: Any) -> Array:
    leaf = jnp.asarray(leaf)
    return leaf if leaf.dtype == dtype else leaf.astype(dtype)


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether every floating-point number in the tree is finite."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return functools.reduce(
        jnp.logical_and, (jnp.all(jnp.isfinite(leaf)) for leaf in leaves), jnp.asarray(True)
    )
