"""Weightings that learn one parameter for each task with an optimizer of their own."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mtl_jax._optimizers import check_optimizer, optimizer_update
from mtl_jax._tasks import square_limit
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


def check_learner(optimizer: Any, where: str) -> None:
    """Raise a ``TypeError`` for what is no optimizer of one number for each task."""
    check_optimizer(optimizer, where)

    def try_out(parameter: Array) -> tuple[Array, PyTree]:
        opt_state = per_task(optimizer).init(parameter)
        return step_per_task(optimizer, jnp.square, parameter, opt_state)

    try:
        with jax.numpy_dtype_promotion("standard"):  # as optax needs it
            jax.eval_shape(try_out, jax.ShapeDtypeStruct((2,), jnp.float32))
    except Exception as error:
        raise TypeError(
            f"{where}: `optimizer` cannot learn one number for each task; it raises "
            f"{type(error).__name__}: {error}"
        ) from error


Objective = Callable[..., Float[Array, ""]]
"""``objective(parameter, *of_the_task) -> value``: what one task's parameter is to minimise."""


def learned_step(
    state: LearnedState,
    objective: Objective,
    *of_tasks: Float[Array, "tasks"],
    optimizer: optax.GradientTransformation,
) -> LearnedState:
    """One step of the optimizer, the parameter kept where its exponential is finite.

    The gradient is cut off where its square, which many optimizers take, would overflow.
    """
    dtype = state.parameter.dtype
    largest = square_limit(dtype)
    parameter, opt_state = step_per_task(
        optimizer, objective, state.parameter, state.opt_state, *of_tasks, largest=largest
    )
    limit = 0.9 * jnp.log(jnp.finfo(dtype).max)
    return LearnedState(jnp.clip(parameter, -limit, limit), opt_state)


def step_per_task(
    optimizer: optax.GradientTransformation,
    objective: Objective,
    parameter: Float[Array, "tasks"],
    opt_state: PyTree,
    *of_tasks: Float[Array, "tasks"],
    largest: float = math.inf,
) -> tuple[Float[Array, "tasks"], PyTree]:
    """One step of the optimizer on each task's objective, as if the others were not there.

    Args:
      optimizer: the optimizer. Where it asks for the value, it gets that of the task's objective.
      objective: what the parameter is to minimise.
      parameter: the parameter of each task.
      opt_state: the optimizer's state.
      *of_tasks: the further arguments of the objective, for each task.
      largest: where the gradient is cut off.
    """

    def step(parameter: Array, opt_state: PyTree, *of_task: Array) -> tuple[Array, PyTree]:
        def value_fn(parameter: Array) -> Array:
            return objective(parameter, *of_task)

        value, gradient = jax.value_and_grad(value_fn)(parameter)
        updates, opt_state = optimizer_update(
            optimizer,
            jnp.clip(gradient, -largest, largest),
            opt_state,
            parameter,
            value=value,
            value_fn=value_fn,
        )
        return jnp.asarray(optax.apply_updates(parameter, updates)), opt_state

    return jax.vmap(step)(parameter, opt_state, *of_tasks)


def per_task(
    transformation: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """The optimizer applied to each task's scalar on its own, its whole state kept per task.

    Then a task that is absent keeps all of its optimizer state, the step counter included.
    """
    return optax.GradientTransformation(
        init=jax.vmap(transformation.init), update=jax.vmap(transformation.update)
    )
