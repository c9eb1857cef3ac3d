"""Conflict-averse gradient descent."""

from typing import Literal

from mtl_jax._base import Weighting
from mtl_jax._checks import check_option, read_number
from mtl_jax.gramian_weightings._solved import solved
from mtl_jax.solvers import maximin_in_ball


def cagrad(c: float = 0.5, rescale: Literal["1+c", "1+c^2"] | None = None) -> Weighting:
    r"""CAGrad: near the mean gradient, the direction in which the worst-off task gains most.

    .. math:: d = \arg\max_d \min_k \langle g_k, d \rangle \quad \text{subject to} \quad
              \|d - g_0\| \le c \|g_0\|, \qquad g_0 = \frac{1}{K} \sum_k g_k

    The weights are 1/K and what is added, so with c = 0 they are those of the mean. For c < 1 the
    paper proves convergence to where the mean loss is stationary, and a task may be harmed. From
    c = 1 on 0 is in the ball, so that no task is, and points where the tasks can only be traded
    against each other are stationary, too; the larger c, the nearer d comes to the direction of
    :func:`mtl_jax.mgda`. Solved exactly. Where the gradients can be combined to 0 and several
    directions are equally good, d is the one nearest to :math:`g_0`. The losses are not read: they
    may be 0 or negative.

    Args:
      c: the radius of the ball relative to the mean gradient's norm, at least 0. The paper tunes it
        for each data set, between 0.2 and 0.5; 0.5 is its default.
      rescale: what the weights are divided by: nothing (the paper's algorithm), ``"1+c^2"`` (the
        default of the authors' code), or ``"1+c"``. (The Nash-MTL and FAMO repositories multiply
        by K besides: :func:`mtl_jax.normalized` or a learning rate does the same.)

    Returns:
      The weighting; its state holds ``state.inner.residual``.

    Raises:
      ValueError: if ``c`` is negative or not finite, or ``rescale`` is unknown.
      TypeError: if ``c`` is not a number.

    References:
      Liu et al., `Conflict-Averse Gradient Descent for Multi-task Learning
      <https://arxiv.org/abs/2110.14048>`_, NeurIPS 2021

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_jax
      >>> weighting = mtl_jax.cagrad(c=0.5)
      >>> state = weighting.init((1.0, 1.0))
      >>> gramian = jnp.array([[1.0, 0.0], [0.0, 4.0]])
      >>> weights, state = weighting.update((1.0, 1.0), state, gramian=gramian)
      >>> [round(float(weight), 3) for weight in weights]
      [1.059, 0.5]
    """
    c = read_number(c, "cagrad: `c`", "[0, inf)")
    factors = {None: 1.0, "1+c": 1 / (1 + c), "1+c^2": 1 / (1 + c**2)}
    check_option(rescale, tuple(factors), "cagrad: `rescale`")

    def solve(gramian, losses, present):
        solution = maximin_in_ball(gramian, c, present)
        return solution._replace(x=factors[rescale] * solution.x)

    return solved(solve)
