"""What the wrappers with a state share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int32

from mtl_jax.base import Weighting
from mtl_jax.pytree import PyTree
from mtl_jax.state import check_like, tree_where
from mtl_jax.tasks import (
    Losses,
    Tasks,
    Weights,
    read_mask,
    read_tasks,
    stack_tasks,
    unstack_tasks,
)

Vector = Float[Array, "tasks"]
Mask = Bool[Array, "tasks"]


class WrapperState(NamedTuple):
    """The state of a wrapper that has one.

    Attributes:
      inner: the state of the weighting inside.
      steps: for each task, the steps it was present in; skipped ones are not counted.
      total: the steps, whoever was present; skipped ones are not counted.
      weights: the weights that the wrapper keeps: the held ones, or their average.
    """

    inner: PyTree
    steps: Int32[Array, "tasks"]
    total: Int32[Array, ""]
    weights: Float[Array, "tasks"]


def initial(weighting: Weighting, value: float) -> Callable[..., WrapperState]:
    """The ``init`` of a wrapper that keeps weights, which are ``value`` at the start."""

    def init(losses, *, key=None):
        tasks = read_tasks(losses)
        return WrapperState(
            inner=weighting.init(losses, key=key),
            steps=jnp.zeros((tasks.number,), jnp.int32),
            total=jnp.zeros((), jnp.int32),
            weights=tasks.full(value),
        )

    return init


def read_state(state: Any, losses: Losses | None = None) -> WrapperState:
    """The state, checked to be a wrapper's; with losses, to be one for their tasks."""
    if not isinstance(state, WrapperState):
        raise TypeError(
            "Expected the state that the `init` of this weighting, with its wrappers, returned, "
            f"got {type(state)}."
        )
    expected = {"total": jax.ShapeDtypeStruct((), jnp.int32)}
    if losses is not None:
        tasks = read_tasks(losses)
        expected["steps"] = jax.ShapeDtypeStruct((tasks.number,), jnp.int32)
        expected["weights"] = jax.ShapeDtypeStruct((tasks.number,), tasks.dtype)
    own = {name: getattr(state, name) for name in expected}
    check_like(own, expected, "The wrapper's state", "Call `init` with these losses.")
    return state._replace(**jax.tree.map(jnp.asarray, own))


def read(losses: Losses, weights: Weights, mask: PyTree | None) -> tuple[Tasks, Mask, Vector]:
    """The tasks, which of them are present, and the weights as a vector."""
    tasks = read_tasks(losses)
    return tasks, read_mask(mask, tasks), jax.lax.stop_gradient(stack_tasks(weights, tasks))


def finish(
    weights: Vector, kept: Vector, inner: PyTree, state: WrapperState, tasks: Tasks, present: Mask
) -> tuple[Weights, WrapperState]:
    """The weights and the next state; or NaN and the old state, if a weight is not finite."""
    weights = jnp.where(present, weights, 0)
    valid = jnp.all(jnp.isfinite(weights))
    weights = jnp.where(present & ~valid, jnp.nan, weights)
    next_state = WrapperState(
        inner,
        jnp.where(present, optax.safe_increment(state.steps), state.steps),
        jnp.asarray(optax.safe_increment(state.total)),
        kept,
    )
    return unstack_tasks(weights, tasks), tree_where(valid, next_state, state)
