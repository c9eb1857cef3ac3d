"""UPGrad."""

import jax
import jax.numpy as jnp

from mtl_jax._base import Weighting
from mtl_jax._typing import PyTree
from mtl_jax.gramian_weightings._solved import preferred
from mtl_jax.solvers import Solution, dual_cone_projection


def upgrad(preference: PyTree | None = None) -> Weighting:
    r"""UPGrad: each gradient projected so that it harms no task, then summed.

    .. math:: d = \sum_k p_k \, \pi(g_k), \qquad
              \pi(g) = \arg\min_{x : \; \langle g_j, x \rangle \ge 0 \; \forall j} \|x - g\|

    No task's loss rises to first order, and where no gradients conflict d is
    :math:`\sum_k p_k g_k`. The projections are exact: nothing is added to the Gramian, which would
    let conflicts pass. The losses are not read: they may be 0 or negative.

    Args:
      preference: p, a pytree like the losses of numbers that are not negative; by default 1/K for
        K present tasks, the paper's.

    Returns:
      The weighting; its state holds ``state.inner.residual``, the greatest of the K projections.

    Raises:
      ValueError: if a preference is negative or not finite; in ``init``, if ``preference`` has
        another structure than the losses.
      TypeError: if a preference is not a number.

    References:
      Quinton and Rey, `Jacobian Descent for Multi-Objective Optimization
      <https://arxiv.org/abs/2406.16232>`_, 2024

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_jax
      >>> weighting = mtl_jax.upgrad()
      >>> state = weighting.init((1.0, 1.0))
      >>> gramian = jnp.array([[1.0, -1.0], [-1.0, 4.0]])
      >>> weights, state = weighting.update((1.0, 1.0), state, gramian=gramian)
      >>> [round(float(weight), 3) for weight in weights]
      [1.0, 0.625]
    """

    def solve(gramian, preference, present):
        targets = jnp.diag(jnp.ones_like(preference))
        each = jax.vmap(lambda target: dual_cone_projection(gramian, target, present))(targets)
        x = jnp.einsum("k,kj->j", preference, each.x, precision=jax.lax.Precision.HIGHEST)
        return Solution(x, jnp.max(jnp.where(present, each.residual, 0)))

    return preferred(solve, preference, "upgrad")
