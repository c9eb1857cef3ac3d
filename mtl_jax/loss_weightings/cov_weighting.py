"""Coefficient-of-variation weights."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from mtl_jax._base import Weighting
from mtl_jax._checks import read_number
from mtl_jax._lift import vector_weighting
from mtl_jax._tasks import square_limit


class CovWeightingState(NamedTuple):
    """Running statistics.

    Attributes:
      mean_loss: the mean of each loss.
      mean_ratio: the mean of each loss ratio, the loss divided by the mean loss before it.
      squares: the sum of the squared deviations of each loss ratio.
    """

    mean_loss: Float[Array, "tasks"]
    mean_ratio: Float[Array, "tasks"]
    squares: Float[Array, "tasks"]


def cov_weighting(decay: float | None = None) -> Weighting:
    r"""CoV weighting: the more a task's loss ratio still varies, the higher its weight.

    .. math:: \ell_k(t) = \frac{L_k(t)}{\mu_{L_k}(t - 1)}, \qquad
              w_k = \frac{c_k}{\sum_j c_j}, \quad c_k = \frac{\sigma_{\ell_k}}{\mu_{\ell_k}},

    with running means and the running population standard deviation of the steps before, found by
    Welford's algorithm. The weights sum to 1, as in the paper; they are 1/K until every present
    task has been seen twice. As in the published code, 1e-8 is added to the variance of the ratio,
    which has no unit. A ratio to a mean loss of 0 is taken as 1, and a ratio so large that its
    square overflows is cut off (in float32, above 1.8e15). A negative loss is outside the domain:
    the weights are then NaN and the state stays as it was.

    Args:
      decay: ``None``, the default of the published code, takes means over all steps; a number in
        [0, 1) takes exponential moving averages with this decay (published code: 0.9).

    Returns:
      The weighting.

    Raises:
      ValueError: if ``decay`` is not in [0, 1).
      TypeError: if it is not a number.

    References:
      Groenendijk et al., `Multi-Loss Weighting with Coefficient of Variations
      <https://arxiv.org/abs/2009.01717>`_, WACV 2021

    Example:
      >>> import mtl_jax
      >>> weighting = mtl_jax.cov_weighting()
      >>> state = weighting.init((1.0, 1.0))
      >>> for losses in [(1.0, 1.0), (0.9, 0.5), (0.8, 0.4)]:
      ...     weights, state = weighting.update(losses, state)
      >>> [round(float(weight), 3) for weight in weights]
      [0.136, 0.864]
    """
    if decay is not None:
        decay = read_number(decay, "cov_weighting: `decay`", "[0, 1)")

    def init(tasks, key):
        return CovWeightingState(*(tasks.full(0) for _ in CovWeightingState._fields))

    def update(losses, state, present, steps):
        losses = jnp.where(losses >= 0, losses, jnp.nan)
        seen = steps.astype(losses.dtype)
        deviation = jnp.sqrt(state.squares / jnp.maximum(seen, 1) + 1e-8)
        variation = deviation / jnp.where(steps > 0, jnp.maximum(state.mean_ratio, 1e-8), 1)
        ready = jnp.all(steps >= 2, where=present)
        variation = jnp.where(ready, variation, 1)
        weights = variation / jnp.sum(variation, where=present)

        undefined = (steps == 0) | (state.mean_loss < jnp.finfo(losses.dtype).tiny)
        ratio = jnp.where(undefined, 1, losses / jnp.where(undefined, 1, state.mean_loss))
        ratio = jnp.where(jnp.isnan(losses), losses, jnp.minimum(ratio, square_limit(losses.dtype)))
        keep = jnp.where(steps == 0, 0, 1 - 1 / (seen + 1) if decay is None else decay)
        mean_ratio = keep * state.mean_ratio + (1 - keep) * ratio
        squares = state.squares + (ratio - state.mean_ratio) * (ratio - mean_ratio)
        mean_loss = keep * state.mean_loss + (1 - keep) * losses
        return weights, CovWeightingState(mean_loss, mean_ratio, squares)

    return vector_weighting(update, init)
