"""Dynamic weight average."""

import jax
import jax.numpy as jnp

from mtl_jax._base import Weighting
from mtl_jax._checks import read_integer, read_number
from mtl_jax._lift import vector_weighting
from mtl_jax.loss_weightings._statistics import WindowMeans


def dwa(window: int, temperature: float = 2.0) -> Weighting:
    r"""Dynamic weight average (DWA): the more slowly a task's loss falls, the higher its weight.

    .. math:: w_k = K \frac{e^{r_k / T}}{\sum_j e^{r_j / T}}, \qquad
              r_k = \frac{\bar L_k(t - 1)}{\bar L_k(t - 2)},

    where :math:`\bar L_k(t)` is the mean loss over window t, the paper's epoch. Until a task has
    two complete windows, and where the older mean is 0, its :math:`r_k` is 1. Each task counts
    its windows in the steps in which it is present. The weights sum to the number of present
    tasks. Meant for positive losses; others have a ratio too, but it does not mean progress.

    Args:
      window: the number of training steps to average over; in the paper, one epoch's.
      temperature: T > 0; a high one brings the weights close to equal. The default is the paper's.

    Returns:
      The weighting.

    Raises:
      ValueError: if ``window`` is not a positive integer or ``temperature`` is not positive.
      TypeError: if ``temperature`` is not a number.

    References:
      Liu et al., `End-to-End Multi-Task Learning with Attention
      <https://arxiv.org/abs/1803.10704>`_, CVPR 2019

    Example:
      >>> import mtl_jax
      >>> weighting = mtl_jax.dwa(window=1)
      >>> state = weighting.init((1.0, 1.0))
      >>> for losses in [(1.0, 1.0), (0.9, 0.1), (0.9, 0.1)]:
      ...     weights, state = weighting.update(losses, state)
      >>> [round(float(weight), 3) for weight in weights]
      [1.197, 0.803]
    """
    read_integer(window, "dwa: `window`")
    temperature = read_number(temperature, "dwa: `temperature`", "(0, inf)")

    def init(tasks, key):
        return WindowMeans.zeros(tasks, windows=2)

    def update(losses, state, present, steps):
        older, newer = state.means[:, 0], state.means[:, 1]
        comparable = (steps >= 2 * window) & (older != 0)
        ratio = jnp.where(comparable, newer / jnp.where(comparable, older, 1), 1)
        largest = jnp.finfo(losses.dtype).max
        scores = jnp.clip(ratio / temperature, -largest, largest)
        weights = jnp.sum(present, dtype=losses.dtype) * jax.nn.softmax(scores, where=present)
        return weights, state.add(losses, steps, window)

    return vector_weighting(update, init)
