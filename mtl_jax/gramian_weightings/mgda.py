"""Multiple gradient descent algorithm."""

from typing import Literal

import jax.numpy as jnp

from mtl_jax._base import Weighting
from mtl_jax._checks import check_option
from mtl_jax.gramian_weightings._solved import solved
from mtl_jax.solvers import minimum_norm_point
from mtl_jax.solvers._cosines import inverse_lengths, read_gramian
from mtl_jax.solvers._precision import in_float64
from mtl_jax.solvers._quadratic import shortest_combination


def mgda(normalization: Literal["l2", "loss", "loss+"] | None = None) -> Weighting:
    r"""MGDA: the shortest vector in the convex hull of the task gradients.

    .. math:: w = \arg\min_{w \ge 0,\; \sum_k w_k = 1} \left\| \sum_k w_k \frac{g_k}{n_k} \right\|,
              \qquad n_k = 1, \; \|g_k\|, \; L_k \; \text{or} \; L_k \|g_k\|.

    Without normalisation no task's loss rises to first order, and where the shortest vector is 0 no
    direction improves all of them: the parameters are Pareto stationary. The shortest vector leans
    to the task with the smallest gradient; a task with a zero gradient takes all the weight, if it
    is not left out, as :func:`mtl_jax.value_and_grad` does (``leave_out_zero``). The weights sum to
    1, as in the paper, and multiply the gradients as they are; the normalisation serves only to
    find them, as in the authors' code. The problem is solved exactly, not by the paper's
    Frank-Wolfe iterations.

    Args:
      normalization: what each gradient is divided by: nothing (the paper), its ``"l2"`` norm, the
        ``"loss"``, or both, ``"loss+"`` (the authors' code). With the loss in it, a loss that is
        negative, or 0 with a gradient, is outside the domain: the weights are then NaN and the
        state stays as it was. Without it the losses are not read.

    Returns:
      The weighting; its state holds ``state.inner.residual``.

    Raises:
      ValueError: if ``normalization`` is unknown.

    References:
      Désidéri, `Multiple-gradient descent algorithm (MGDA) for multiobjective optimization
      <https://doi.org/10.1016/j.crma.2012.03.014>`_, 2012

      Sener and Koltun, `Multi-Task Learning as Multi-Objective Optimization
      <https://arxiv.org/abs/1810.04650>`_, NeurIPS 2018

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_jax
      >>> weighting = mtl_jax.mgda()
      >>> state = weighting.init((1.0, 1.0))
      >>> gramian = jnp.array([[1.0, 0.0], [0.0, 4.0]])
      >>> weights, state = weighting.update((1.0, 1.0), state, gramian=gramian)
      >>> [round(float(weight), 3) for weight in weights]
      [0.8, 0.2]
    """
    check_option(normalization, (None, "l2", "loss", "loss+"), "mgda: `normalization`")

    def solve(gramian, losses, present):
        if normalization is None:
            return minimum_norm_point(gramian, present)
        return in_float64(normalized, gramian, losses, present)

    def normalized(gramian, losses, present, *, eps):
        rows = read_gramian(gramian, present, eps)
        # A zero gradient is one whatever it is divided by.
        valid = jnp.asarray(True) if normalization == "l2" else jnp.all((losses > 0) | ~rows.usable)
        # The inverse lengths after the division; the lengths themselves may overflow.
        inverse = rows.usable.astype(losses.dtype)
        tiny = jnp.finfo(losses.dtype).tiny
        if normalization != "l2":
            sizes = jnp.where(rows.usable & valid, losses, tiny)
            inverse = inverse * (sizes / jnp.max(sizes))
        if normalization == "loss":
            inverse = inverse * inverse_lengths(rows)
        inverse = inverse / jnp.maximum(jnp.max(inverse), tiny)
        inverse = jnp.where(rows.usable, jnp.maximum(inverse, tiny), 0)
        solution = shortest_combination(rows, inverse)
        return solution._replace(x=jnp.where(valid, solution.x, jnp.nan))

    return solved(solve, reads_losses=normalization in ("loss", "loss+"))
