"""Conflict-free gradients (ConFIG)."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from mtl_jax._base import Signal, Weighting
from mtl_jax._lift import vector_weighting
from mtl_jax._typing import Gramian
from mtl_jax.gramian_weightings._spectral import cosines, gradient_norms, rounding, spectrum
from mtl_jax.solvers._precision import in_float64


def conflict_free() -> Weighting:
    r"""ConFIG: the direction at one and the same acute angle to every task gradient.

    With the unit task gradients as the rows of U, and the task gradients :math:`g_k`,

    .. math:: g = \Big(\sum_k \langle g_k, u \rangle\Big)\, u, \qquad
              u = \frac{U^+ \mathbf 1}{\lVert U^+ \mathbf 1 \rVert}.

    The weights are those that give this direction; they keep the paper's scale, which grows with
    the number of tasks as a sum does, and may be negative. A task's loss on another scale changes
    the length alone. For linearly independent gradients every loss falls; for dependent ones the
    angles are equal in the sense of least squares, and a loss may rise. A task with a zero
    gradient has weight 0.

    Where :math:`U^+ \mathbf 1` is zero up to rounding, as for two opposite gradients or if all are
    zero, no such direction exists, and all weights are 0: a step that stands still. The losses are
    not read: they may be 0 or negative. For one task gradient a step, averaged over time:
    :func:`mtl_jax.conflict_free_momentum`.

    Returns:
      The weighting.

    References:
      Liu et al., `ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks
      <https://arxiv.org/abs/2408.11104>`_, ICLR 2025

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_jax
      >>> weighting = mtl_jax.conflict_free()
      >>> state = weighting.init((1.0, 1.0))
      >>> gramian = jnp.diag(jnp.array([1.0, 9.0]))  # two orthogonal gradients, of norms 1 and 3
      >>> weights, state = weighting.update((1.0, 1.0), state, gramian=gramian)
      >>> [round(float(weight), 3) for weight in weights]
      [2.0, 0.667]
    """

    def update(losses, state, present, steps, gramian):
        return conflict_free_weights(gramian), state

    return vector_weighting(update, needs=Signal.GRAMIAN)


def conflict_free_weights(gramian: Gramian) -> Float[Array, "tasks"]:
    """The weights of a Gramian; 0 for a task gradient of 0."""
    return in_float64(_weights, gramian)


def _weights(gramian: Gramian, *, eps: float) -> Float[Array, "tasks"]:
    norms, eigen = gradient_norms(gramian), spectrum(cosines(gramian), eps)
    ones = (norms > 0).astype(gramian.dtype)
    v = eigen.apply(1 / eigen.values, ones)
    size = jnp.sum(v)  # = |U^+ 1|^2
    unit_products = eigen.apply(jnp.ones_like(eigen.values), ones)  # = U U^+ 1
    length = jnp.sum(norms * unit_products)
    # The same sum without cancellation; a square, so its rounding is one too.
    sizes = eigen._replace(vectors=jnp.abs(eigen.vectors)).apply(1 / eigen.values, ones)
    exists = size > rounding(gramian, eps) ** 2 * jnp.sum(sizes)
    scale = jnp.where(exists, size, 1) * jnp.where(norms > 0, norms, 1)
    return jnp.where(exists, v * (length / scale), 0)
