"""Weightings whose weights are the solution of a problem in the Gramian."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtl_jax._base import Signal, Weighting
from mtl_jax._lift import vector_weighting
from mtl_jax._preference import among_present, check_preference, preference_vector
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


def solved(solve: Solve, *, reads_losses: bool = False) -> Weighting:
    """The weighting with the weights ``solve(gramian, losses, present).x``."""

    def init(tasks: Tasks, key: Array | None) -> SolvedState:
        return SolvedState(jnp.zeros((), tasks.dtype))

    def update(losses, state, present, steps, gramian):
        solution = solve(gramian, losses, present)
        return solution.x, SolvedState(solution.residual)

    return vector_weighting(update, init, needs=Signal.GRAMIAN, reads_losses=reads_losses)


def preferred(solve: Solve, preference: PyTree | None, method: str) -> Weighting:
    """The weighting with the weights ``solve(gramian, preference, present).x``.

    The preference is 1/K for each of the K present tasks if none is given.
    """
    check_preference(preference, method)

    def init(tasks: Tasks, key: Array | None) -> PreferredState:
        vector = preference_vector(preference, tasks, method)
        return PreferredState(jnp.zeros((), tasks.dtype), vector)

    def update(losses, state, present, steps, gramian):
        chosen = among_present(state.preference, preference, present)
        solution = solve(gramian, chosen, present)
        return solution.x, state._replace(residual=solution.residual)

    return vector_weighting(update, init, needs=Signal.GRAMIAN, reads_losses=False)
