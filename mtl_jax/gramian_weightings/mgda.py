"""Multiple gradient descent algorithm."""

from typing import Literal

import jax.numpy as jnp

from mtl_jax.base import Weighting
from mtl_jax.gramian_weightings.solved import solved
from mtl_jax.gramian_weightings.spectral import gradient_norms
from mtl_jax.solvers import minimum_norm_point


def mgda(normalization: Literal["l2", "loss", "loss+"] | None = None) -> Weighting:
    r"""MGDA: the shortest vector in the convex hull of the task gradients.

    .. math:: w = \arg\min_{w \ge 0,\; \sum_k w_k = 1} \Big\| \sum_k w_k \frac{g_k}{n_k} \Big\|,
              \qquad n_k = 1, \; \|g_k\|, \; L_k \; \text{or} \; L_k \|g_k\|.

    Without normalisation no task's loss rises to first order, and where the shortest vector is 0
    no direction improves all of them: the parameters are Pareto stationary. The shortest vector
    leans to the task with the smallest gradient; a task with a zero gradient takes all the weight.
    The weights sum to 1, as in the paper, and multiply the gradients as they are; the
    normalisation serves only to find them, as in the authors' code. The problem is solved exactly,
    not by the paper's Frank-Wolfe iterations.

    Args:
      normalization: what each gradient is divided by: nothing (the paper), its ``"l2"`` norm, the
        ``"loss"``, or both, ``"loss+"`` (the authors' code). With the loss in it, a loss that is
        negative, or 0 with a gradient, is outside the domain: the weights are then NaN.

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
    if normalization not in (None, "l2", "loss", "loss+"):
        raise ValueError(
            f"mgda: `normalization` must be None, 'l2', 'loss' or 'loss+', got {normalization!r}."
        )

    def solve(gramian, losses, present):
        if normalization is None:
            return minimum_norm_point(gramian, present)
        norms = gradient_norms(gramian)
        # A zero gradient is one whatever it is divided by.
        size = jnp.where(norms > 0, norms, 1) if normalization in ("l2", "loss+") else 1
        size = size * jnp.where(norms > 0, losses, 1) if "loss" in normalization else size
        size = jnp.where(present & (norms > 0), size, jnp.inf)
        size = jnp.where(size > 0, size, jnp.nan)
        smallest = jnp.min(size)
        scale = jnp.where(jnp.isfinite(size), smallest / size, jnp.where(norms > 0, size, 1))
        return minimum_norm_point(gramian * scale[:, None] * scale[None, :], present)

    return solved(solve)
