"""The geometric mean of the losses."""

import jax.numpy as jnp

from mtl_jax._base import Weighting
from mtl_jax._lift import vector_weighting


def geometric() -> Weighting:
    r"""Geometric loss strategy (GLS): minimise the geometric mean of the losses.

    .. math:: M = \Big(\prod_k L_k\Big)^{1/K}, \qquad w_k = \frac{\partial M}{\partial L_k}
              = \frac{M}{K L_k},

    computed in logarithms, so that no product overflows. The direction does not depend on the
    losses' scales; the weights keep the scale above and do not sum to K. A loss that is not
    positive is outside the domain: the weights are then NaN and the state stays as it was. So it
    is where a weight overflows, beside a loss some 1e38 times smaller than the mean.
    :func:`mtl_jax.value_and_grad` leaves a task out of a step in which its loss is exactly 0
    (``leave_out_zero``).

    Returns:
      The weighting, which has no parameters and no state of its own.

    References:
      Chennupati et al., `MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy
      for Multi-Task Learning <https://arxiv.org/abs/1904.08492>`_, CVPR Workshops 2019

    Example:
      >>> import mtl_jax
      >>> weighting = mtl_jax.geometric()
      >>> weights, _ = weighting.update((0.5, 2.0), weighting.init((0.5, 2.0)))
      >>> [round(float(weight), 6) for weight in weights]
      [1.0, 0.25]
    """

    def update(losses, state, present, steps):
        log_losses = jnp.log(losses)
        mean = jnp.mean(log_losses, where=present)
        return jnp.exp(mean - log_losses) / jnp.sum(present, dtype=losses.dtype), state

    return vector_weighting(update, positive_losses=True)
