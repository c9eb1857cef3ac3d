"""Weightings that learn one parameter for each task with an optimizer of their own."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mtl_jax._typing import PyTree


class LearnedState(NamedTuple):
    """A learned parameter and its optimizer's state.

    Attributes:
      parameter: the parameter of each task, in logarithms of the weight or the variance.
      opt_state: the optimizer's state, each leaf with the task as its leading axis.
    """

    parameter: Float[Array, "tasks"]
    opt_state: PyTree

    @classmethod
    def create(
        cls, parameter: Float[Array, "tasks"], optimizer: optax.GradientTransformation
    ) -> "LearnedState":
        """The state before the first step."""
        return cls(parameter, per_task(optimizer).init(parameter))


def learned_step(
    state: LearnedState, gradient: Float[Array, "tasks"], optimizer: optax.GradientTransformation
) -> LearnedState:
    """One step of the optimizer, the parameter kept where its exponential is finite.

    The gradient is cut off where its square, which many optimizers take, would overflow.
    """
    largest = 1e-4 * jnp.finfo(gradient.dtype).max ** 0.5
    gradient = jnp.clip(gradient, -largest, largest)
    updates, opt_state = per_task(optimizer).update(gradient, state.opt_state, state.parameter)
    parameter = jnp.asarray(optax.apply_updates(state.parameter, updates))
    limit = 0.9 * jnp.log(jnp.finfo(state.parameter.dtype).max)
    return LearnedState(jnp.clip(parameter, -limit, limit), opt_state)


def per_task(
    transformation: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """The optimizer applied to each task's scalar on its own, its whole state kept per task.

    Then a task that is absent keeps all of its optimizer state, the step counter included.
    """
    return optax.GradientTransformation(
        init=jax.vmap(transformation.init), update=jax.vmap(transformation.update)
    )
