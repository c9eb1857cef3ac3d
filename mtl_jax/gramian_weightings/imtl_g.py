"""Impartial multi-task learning, gradient balance."""

import jax.numpy as jnp

from mtl_jax._base import Signal, Weighting
from mtl_jax._lift import vector_weighting
from mtl_jax.gramian_weightings._spectral import gradient_norms, rounding, spectrum
from mtl_jax.solvers._precision import in_float64


def imtl_g() -> Weighting:
    r"""IMTL-G: the direction whose projections on all task gradients are equally long.

    With the Gramian G of the task gradients and their norms d,

    .. math:: w = \frac{v}{\sum_k v_k}, \qquad v = G^+ d.

    The weights sum to 1 and may be negative. They do not depend on the losses' common scale. For
    linearly independent gradients this is the paper's closed form. For dependent ones, where that
    is undefined, the pseudo-inverse makes the projections equal in the sense of least squares, and
    of all such weights takes the shortest. A task with a zero gradient has weight 0.

    Where the sum of v is zero up to rounding, as for two opposite gradients of equal length or
    if all gradients are zero, there is no such direction, and all weights are 0: a step that stands
    still. The losses are not read: they may be 0 or negative.

    Returns:
      The weighting.

    References:
      Liu et al., `Towards Impartial Multi-Task Learning
      <https://openreview.net/forum?id=IMPnRXEWpvr>`_, ICLR 2021

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_jax
      >>> weighting = mtl_jax.imtl_g()
      >>> state = weighting.init((1.0, 1.0))
      >>> gramian = jnp.diag(jnp.array([1.0, 9.0]))  # two orthogonal gradients, of norms 1 and 3
      >>> weights, state = weighting.update((1.0, 1.0), state, gramian=gramian)
      >>> [round(float(weight), 3) for weight in weights]
      [0.75, 0.25]
    """

    def weights(gramian, *, eps):
        eigen = spectrum(gramian, eps)
        norms = gradient_norms(gramian) / eigen.unit  # only their ratios count
        v = eigen.apply(1 / eigen.values, norms)
        total = jnp.sum(v)
        # What rounding makes of the sum: in adding it up, and, to first order, in the entries of
        # the Gramian, each of which may be off by eps times the product of two norms.
        sizes = eigen._replace(vectors=jnp.abs(eigen.vectors)).apply(1 / eigen.values, norms)
        slope = eigen.apply(1 / eigen.values, jnp.ones_like(norms))
        noise = rounding(gramian) * jnp.sum(sizes)
        noise += 4 * eps * jnp.linalg.norm(slope * norms) * jnp.linalg.norm(v * norms)
        exists = jnp.abs(total) > noise
        return jnp.where(exists, v / jnp.where(exists, total, 1), 0)

    def update(losses, state, present, steps, gramian):
        return in_float64(weights, gramian), state

    return vector_weighting(update, needs=Signal.GRAMIAN, reads_losses=False)
