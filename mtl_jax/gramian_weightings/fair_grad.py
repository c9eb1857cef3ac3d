"""FairGrad."""

import jax
import jax.numpy as jnp

from mtl_jax._base import Weighting
from mtl_jax._checks import read_number
from mtl_jax.gramian_weightings._solved import solved
from mtl_jax.solvers import Solution, fair_point


def fair_grad(alpha: float = 1.0) -> Weighting:
    r"""FairGrad: the alpha-fair solution among the tasks.

    .. math:: G w = w^{-1/\alpha}, \quad w > 0

    elementwise: the direction :math:`d = \sum_k w_k g_k` maximises
    :math:`\sum_k \langle g_k, d \rangle^{1 - \alpha} / (1 - \alpha)` over a ball; every gain
    :math:`\langle g_k, d \rangle` is positive. :math:`\alpha = 1` is proportional fairness, which
    is :func:`mtl_jax.nash_mtl`; the larger :math:`\alpha`, the more the task that gains least
    counts. The weights scale with the gradients' norms to the power
    :math:`-2 \alpha / (1 + \alpha)`. Solved exactly, by damped Newton steps. (The authors' code
    multiplies the weights by K besides.)

    With :math:`\alpha = 0` the weights are 1: the plain sum has the greatest total gain, whoever
    loses by it. Small :math:`\alpha` tends to it only where no task loses: with
    :math:`\alpha > 0` every gain is positive.

    At Pareto-stationary parameters there is no solution. The weights are then finite and sum to 1,
    the direction is near 0, and ``state.inner.residual`` is about 1. A task with a zero gradient
    makes them so; :func:`mtl_jax.value_and_grad` leaves it out (``leave_out_zero``). The losses are
    not read: they may be 0 or negative.

    Args:
      alpha: at least 0. The default is that of the authors' code; the paper tunes it.

    Returns:
      The weighting; its state holds ``state.inner.residual``.

    Raises:
      ValueError: if ``alpha`` is negative or not finite.
      TypeError: if it is not a number.

    References:
      Ban and Ji, `Fair Resource Allocation in Multi-Task Learning
      <https://arxiv.org/abs/2402.15638>`_, ICML 2024

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_jax
      >>> weighting = mtl_jax.fair_grad(alpha=2.0)
      >>> state = weighting.init((1.0, 1.0))
      >>> gramian = jnp.array([[1.0, 0.0], [0.0, 8.0]])
      >>> weights, state = weighting.update((1.0, 1.0), state, gramian=gramian)
      >>> [round(float(weight), 3) for weight in weights]
      [1.0, 0.25]
    """
    alpha = read_number(alpha, "fair_grad: `alpha`", "[0, inf)")

    def solve(gramian, losses, present):
        found = fair_point(gramian, jnp.where(alpha == 0, 1.0, alpha), present)
        plain = Solution(jnp.ones_like(found.x), jnp.zeros_like(found.residual))
        # A select, not a branch: alpha may be traced.
        return jax.tree.map(lambda one, other: jnp.where(alpha == 0, one, other), plain, found)

    return solved(solve)
