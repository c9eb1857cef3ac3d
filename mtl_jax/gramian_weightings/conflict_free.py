"""Conflict-free gradients (ConFIG)."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from mtl_jax._base import Signal, Weighting
from mtl_jax._lift import vector_weighting
from mtl_jax._preference import check_preference, preference_vector
from mtl_jax._typing import Gramian, PyTree, Vector
from mtl_jax.gramian_weightings._spectral import cosines, gradient_norms, rounding, spectrum
from mtl_jax.solvers._precision import in_float64


class ConflictFreeState(NamedTuple):
    """State of the method.

    Attributes:
      preference: the cosine of each task's angle to the direction, up to a common factor.
    """

    preference: Float[Array, "tasks"]


def conflict_free(preference: PyTree | None = None) -> Weighting:
    r"""ConFIG: the direction at one and the same acute angle to every task gradient.

    With the unit task gradients as the rows of U, and the task gradients :math:`g_k`,

    .. math:: g = \Big(\sum_k \langle g_k, u \rangle\Big)\, u, \qquad
              u = \frac{U^+ p}{\lVert U^+ p \rVert}, \qquad p = \mathbf 1.

    With other preferences p the cosines of the angles are in proportion to them. The weights are
    those that give this direction; they keep the paper's scale, which grows with the number of
    tasks as a sum does, and may be negative. A task's loss on another scale changes the length
    alone. For linearly independent gradients every loss falls; for dependent ones the cosines are
    as wanted in the sense of least squares, and a loss may rise. A task with a zero gradient has
    weight 0.

    Where :math:`U^+ p` is zero up to rounding, as for two opposite gradients or if all are
    zero, no such direction exists, and all weights are 0: a step that stands still. The losses are
    not read: they may be 0 or negative. For one task gradient a step, averaged over time:
    :func:`mtl_jax.conflict_free_momentum`.

    Args:
      preference: p, a pytree like the losses of numbers that are not negative; by default 1 for
        each task, the paper's.

    Returns:
      The weighting.

    Raises:
      ValueError: if a preference is negative or not finite; in ``init``, if ``preference`` has
        another structure than the losses.
      TypeError: if a preference is not a number.

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
    check_preference(preference, "conflict_free")

    def init(tasks, key):
        return ConflictFreeState(preference_vector(preference, tasks, "conflict_free"))

    def update(losses, state, present, steps, gramian):
        chosen = jnp.where(present, state.preference, 0)
        return conflict_free_weights(gramian, chosen), state

    return vector_weighting(update, init, needs=Signal.GRAMIAN, reads_losses=False)


def conflict_free_weights(gramian: Gramian, preference: Vector) -> Vector:
    """The weights of a Gramian and preferences; 0 for a task gradient of 0."""
    return in_float64(_weights, gramian, preference)


def _weights(gramian: Gramian, preference: Vector, *, eps: float) -> Vector:
    norms, eigen = gradient_norms(gramian), spectrum(cosines(gramian), eps)
    p = jnp.where(norms > 0, preference, 0)
    v = eigen.apply(1 / eigen.values, p)
    size = jnp.sum(p * v)  # = |U^+ p|^2
    unit_products = eigen.apply(jnp.ones_like(eigen.values), p)  # = U U^+ p
    length = jnp.sum(norms * unit_products)
    # The same sum without cancellation; a square, so its rounding is one too.
    sizes = eigen._replace(vectors=jnp.abs(eigen.vectors)).apply(1 / eigen.values, p)
    exists = size > rounding(gramian, eps) ** 2 * jnp.sum(p * sizes)
    scale = jnp.where(exists, size, 1) * jnp.where(norms > 0, norms, 1)
    return jnp.where(exists, v * (length / scale), 0)
