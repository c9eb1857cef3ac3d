"""Weightings whose weights are the solution of a problem in the Gramian."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtl_jax._base import Signal, Weighting
from mtl_jax._checks import check_numbers
from mtl_jax._lift import vector_weighting
from mtl_jax._tasks import Tasks
from mtl_jax._typing import PyTree
from mtl_jax.solvers import Solution


class SolvedState(NamedTuple):
    """How well the problem was solved.

    Attributes:
      residual: the residual of the latest solution (see :mod:`mtl_jax.solvers`): near the rounding
        error where the problem has a solution, about 1 where it has none.
    """

    residual: Float[Array, ""]


class PreferredState(NamedTuple):
    """How well the problem was solved, and the preference among the tasks.

    Attributes:
      residual: as of :class:`SolvedState`.
      preference: how much each task counts.
    """

    residual: Float[Array, ""]
    preference: Float[Array, "tasks"]


Solve = Callable[
    [Float[Array, "tasks tasks"], Float[Array, "tasks"], Bool[Array, "tasks"]], Solution
]


def solved(solve: Solve) -> Weighting:
    """The weighting with the weights ``solve(gramian, losses, present).x``."""

    def init(tasks: Tasks, key: Array | None) -> SolvedState:
        return SolvedState(jnp.zeros((), tasks.dtype))

    def update(losses, state, present, steps, gramian):
        solution = solve(gramian, losses, present)
        return solution.x, SolvedState(solution.residual)

    return vector_weighting(update, init, needs=Signal.GRAMIAN)


def preferred(solve: Solve, preference: PyTree | None, method: str) -> Weighting:
    """The weighting with the weights ``solve(gramian, preference, present).x``.

    The preference is 1/K for each of the K present tasks if none is given.
    """
    name = f"{method}: a preference"
    check_numbers(preference, name, "[0, inf)")

    def init(tasks: Tasks, key: Array | None) -> PreferredState:
        values = 1.0 if preference is None else preference
        vector = tasks.vector(values, f"{method}: `preference`")
        return PreferredState(jnp.zeros((), tasks.dtype), vector)

    def update(losses, state, present, steps, gramian):
        number = jnp.sum(present, dtype=losses.dtype)
        share = 1 / jnp.maximum(number, 1) if preference is None else 1
        chosen = jnp.where(present, share * state.preference, 0)
        solution = solve(gramian, chosen, present)
        return solution.x, state._replace(residual=solution.residual)

    return vector_weighting(update, init, needs=Signal.GRAMIAN)
