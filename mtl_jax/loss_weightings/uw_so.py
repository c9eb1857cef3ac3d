"""Soft optimal uncertainty weighting."""

import jax
import jax.numpy as jnp

from mtl_jax._base import Weighting
from mtl_jax._checks import read_number
from mtl_jax._lift import vector_weighting


def uw_so(temperature: float) -> Weighting:
    r"""Soft optimal uncertainty weighting (UW-SO): the lower a task's loss, the higher its weight.

    .. math:: w_k = \frac{e^{1 / (T L_k)}}{\sum_j e^{1 / (T L_j)}}

    For a fixed loss the best variance in uncertainty weighting (:func:`mtl_jax.uncertainty`) is
    known: the weight is then :math:`1 / L_k`, without anything to learn. A softmax with the
    temperature T tames it. No gradient flows through the weights, which sum to 1. It is the
    opposite of :func:`mtl_jax.adaptive`: the hard task gets less weight.

    A loss that is not positive is outside the domain: the weights are then NaN and the state stays
    as it was. The weights depend on the unit of the losses, and the temperature with it.

    Args:
      temperature: T > 0; a high one brings the weights close to equal. It has no default: the paper
        tunes it for each data set.

    Returns:
      The weighting, which has no state of its own.

    Raises:
      ValueError: if ``temperature`` is not positive.
      TypeError: if it is not a number.

    References:
      Kirchdorfer et al., `Analytical Uncertainty-Based Loss Weighting in Multi-Task Learning
      <https://arxiv.org/abs/2408.07985>`_, GCPR 2024

    Example:
      >>> import mtl_jax
      >>> weighting = mtl_jax.uw_so(temperature=1.0)
      >>> weights, _ = weighting.update((0.5, 1.0), weighting.init((0.5, 1.0)))
      >>> [round(float(weight), 3) for weight in weights]
      [0.731, 0.269]
    """
    temperature = read_number(temperature, "uw_so: `temperature`", "(0, inf)")

    def update(losses, state, present, steps):
        losses = jnp.where(losses > 0, losses, jnp.nan)
        largest = jnp.finfo(losses.dtype).max
        scores = jnp.minimum(1 / temperature / losses, largest)
        return jax.nn.softmax(scores, where=present), state

    return vector_weighting(update, positive_losses=True)
