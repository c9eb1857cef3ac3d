"""Projection of the mean gradient on the dual cone."""

from mtl_jax._base import Weighting
from mtl_jax._typing import PyTree
from mtl_jax.gramian_weightings._solved import preferred
from mtl_jax.solvers import dual_cone_projection


def dual_proj(preference: PyTree | None = None) -> Weighting:
    r"""DualProj: the direction nearest to the mean gradient that harms no task.

    .. math:: d = \arg\min_{x : \; \langle g_j, x \rangle \ge 0 \; \forall j} \|x - g\|, \qquad
              g = \sum_k p_k g_k

    No task's loss rises to first order, and if g itself harms none, d = g. The projection is
    exact: nothing is added to the Gramian, which would let conflicts pass. The losses are not read:
    they may be 0 or negative.

    Args:
      preference: p, a pytree like the losses of numbers that are not negative; by default 1/K for
        K present tasks.

    Returns:
      The weighting; its state holds ``state.inner.residual``.

    Raises:
      ValueError: if a preference is negative or not finite; in ``init``, if ``preference`` has
        another structure than the losses.
      TypeError: if a preference is not a number.

    References:
      Lopez-Paz and Ranzato, `Gradient Episodic Memory for Continual Learning
      <https://arxiv.org/abs/1706.08840>`_, NeurIPS 2017, equation 11; for several tasks as in
      Quinton and Rey, `Jacobian Descent for Multi-Objective Optimization
      <https://arxiv.org/abs/2406.16232>`_, 2024

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_jax
      >>> weighting = mtl_jax.dual_proj()
      >>> state = weighting.init((1.0, 1.0))
      >>> gramian = jnp.array([[1.0, -2.0], [-2.0, 16.0]])
      >>> weights, state = weighting.update((1.0, 1.0), state, gramian=gramian)
      >>> [round(float(weight), 3) for weight in weights]
      [1.0, 0.5]
    """

    def solve(gramian, preference, present):
        return dual_cone_projection(gramian, preference, present)

    return preferred(solve, preference, "dual_proj")
