"""Nash-MTL."""

import jax.numpy as jnp

from mtl_jax._base import Weighting
from mtl_jax._checks import read_number
from mtl_jax.gramian_weightings._solved import solved
from mtl_jax.gramian_weightings._spectral import cosines, gradient_norms
from mtl_jax.solvers import fair_point
from mtl_jax.solvers._cosines import product


def nash_mtl(max_norm: float | None = None) -> Weighting:
    r"""Nash-MTL: the Nash bargaining solution among the tasks.

    .. math:: G w = 1 / w, \quad w > 0

    elementwise: the direction :math:`d = \sum_k w_k g_k` maximises the sum of the logarithms of
    the tasks' gains :math:`\langle g_k, d \rangle` over a ball; every gain is positive. The norm of
    d is :math:`\sqrt K` whatever the gradients' norms: the step no longer shrinks with the
    gradients, and each weight goes with the inverse of its gradient's norm. Solved exactly, by
    damped Newton steps. Decide the weights every few steps with :func:`mtl_jax.every`, as the
    paper does.

    At Pareto-stationary parameters there is no solution. The weights are then finite and sum to 1,
    the direction is near 0, and ``state.inner.residual`` is about 1. A task with a zero gradient
    makes them so; :func:`mtl_jax.value_and_grad` leaves it out (``leave_out_zero``). The losses are
    not read: they may be 0 or negative.

    Args:
      max_norm: the greatest norm of d where the weights are decided. The paper has none; the
        authors' code scales the weights to norm 1, which is to divide them by :math:`\sqrt K`.
        Under :func:`mtl_jax.every` the norm changes in between: there, for a bound at every step,
        put ``optax.clip_by_global_norm`` into the optimizer, under ``optax.masked`` if it is to
        bound the shared parameters alone.

    Returns:
      The weighting; its state holds ``state.inner.residual``.

    Raises:
      ValueError: if ``max_norm`` is not positive.
      TypeError: if it is not a number.

    References:
      Navon et al., `Multi-Task Learning as a Bargaining Game <https://arxiv.org/abs/2202.01017>`_,
      ICML 2022

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_jax
      >>> weighting = mtl_jax.nash_mtl()
      >>> state = weighting.init((1.0, 1.0))
      >>> gramian = jnp.array([[1.0, 0.0], [0.0, 4.0]])
      >>> weights, state = weighting.update((1.0, 1.0), state, gramian=gramian)
      >>> [round(float(weight), 3) for weight in weights]
      [1.0, 0.5]
    """
    if max_norm is not None:
        max_norm = read_number(max_norm, "nash_mtl: `max_norm`", "(0, inf)")

    def solve(gramian, losses, present):
        solution = fair_point(gramian, 1.0, present)
        if max_norm is None:
            return solution
        shares = solution.x * gradient_norms(gramian)
        norm = jnp.sqrt(jnp.maximum(shares @ product(cosines(gramian), shares), 0))
        return solution._replace(x=solution.x / jnp.maximum(norm / max_norm, 1))

    return solved(solve)
