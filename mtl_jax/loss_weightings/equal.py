"""Equal weights."""

import jax.numpy as jnp

from mtl_jax._base import Weighting
from mtl_jax._lift import vector_weighting


def equal() -> Weighting:
    r"""Equal weights, also called unitary scalarization: the plain sum of the losses.

    .. math:: w_k = 1

    The weights sum to the number of present tasks. The losses are not read: they may be 0 or
    negative.

    Returns:
      The weighting, which has no parameters and no state of its own.

    References:
      Kurin et al., `In Defense of the Unitary Scalarization for Deep Multi-Task Learning
      <https://arxiv.org/abs/2201.04122>`_, 2022

    Example:
      >>> import mtl_jax
      >>> weighting = mtl_jax.equal()
      >>> losses = {"depth": 0.5, "normals": 1.5}
      >>> weights, state = weighting.update(losses, weighting.init(losses))
      >>> float(weights["depth"]), float(weights["normals"])
      (1.0, 1.0)
    """

    def update(losses, state, present, steps):
        return jnp.ones_like(losses), state

    return vector_weighting(update, reads_losses=False)
