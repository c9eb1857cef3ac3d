"""SoftAdapt."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax._base import Weighting
from mtl_jax._checks import check_option, read_integer, read_number
from mtl_jax._lift import vector_weighting
from mtl_jax.loss_weightings._statistics import WindowMeans


def softadapt(
    window: int,
    beta: float = 0.1,
    order: int = 1,
    variant: Literal["original", "normalized", "loss_weighted"] = "original",
) -> Weighting:
    r"""SoftAdapt: the faster a task's loss rises, the higher its weight.

    .. math::

       \text{original:}\; w = \mathrm{softmax}(\beta s), \qquad
       \text{normalized:}\; w = \mathrm{softmax}\Big(\frac{\beta s}{\sum_j |s_j|}\Big), \qquad
       \text{loss}\_\text{weighted:}\;
       w_k = \frac{\bar L_k e^{\beta s_k}}{\sum_j \bar L_j e^{\beta s_j}},

    where :math:`s_k` is the rate of change of the mean loss from window to window and
    :math:`\bar L_k` the mean over the last ``order + 1`` windows. The weights sum to 1, as in the
    paper, and are 1/K until every present task has ``order + 1`` complete windows. Each task
    counts its windows in the steps in which it is present.

    The rate is the finite difference of accuracy ``order`` over the last ``order + 1`` means. As
    in the published code, it is the slope at the *oldest* of them. The published normalised
    variant divides by the signed sum of the rates, which turns the preference round while the
    losses fall; here it is the sum of their sizes, so that all variants prefer the same task.
    Where all rates, or for the third variant all losses, are 0 the weights are equal. The first
    two variants take losses of any sign, the third no negative one: the weights are then NaN and
    the state stays as it was.

    Args:
      window: the number of training steps to average over; in the paper, one epoch's or one.
      beta: how strongly to prefer; positive for the task that does worst, negative for the one
        that does best. The default is the published code's.
      order: the accuracy order of the finite difference, from 1 to 20.
      variant: ``"original"``, ``"normalized"`` or ``"loss_weighted"``.

    Returns:
      The weighting.

    Raises:
      ValueError: if ``window`` is not a positive integer, ``order`` not one from 1 to 20, ``beta``
        not finite, or ``variant`` unknown.
      TypeError: if ``beta`` is not a number.

    References:
      Heydari et al., `SoftAdapt: Techniques for Adaptive Loss Weighting of Neural Networks with
      Multi-Part Loss Functions <https://arxiv.org/abs/1912.12355>`_, 2019

    Example:
      >>> import mtl_jax
      >>> weighting = mtl_jax.softadapt(window=1, beta=1.0)
      >>> state = weighting.init((5.0, 5.0))
      >>> for losses in [(5.0, 5.0), (4.0, 4.9), (4.0, 4.9)]:
      ...     weights, state = weighting.update(losses, state)
      >>> [round(float(weight), 2) for weight in weights]
      [0.29, 0.71]
    """
    read_integer(window, "softadapt: `window`")
    order = read_integer(order, "softadapt: `order`", 1, 20)
    check_option(variant, ("original", "normalized", "loss_weighted"), "softadapt: `variant`")
    beta = read_number(beta, "softadapt: `beta`")
    # The weights c of the forward difference: sum_j c_j j^n is 1 for n = 1, else 0, up to `order`.
    nodes = np.arange(order + 1.0)
    difference = np.linalg.solve(np.vander(nodes, increasing=True).T, nodes == 1)

    def init(tasks, key):
        return WindowMeans.zeros(tasks, windows=order + 1)

    def update(losses, state, present, steps):
        if variant == "loss_weighted":
            losses = jnp.where(losses >= 0, losses, jnp.nan)
        rates = jnp.sum(state.means * jnp.asarray(difference, losses.dtype)[None, :], axis=1)
        if variant == "normalized":
            size = jnp.sum(jnp.abs(rates), where=present)
            rates = rates / jnp.where(size == 0, 1, size)
        largest = jnp.finfo(losses.dtype).max
        scores = jnp.clip(beta * rates, -largest, largest)
        if variant == "loss_weighted":
            average = jnp.mean(state.means, axis=1)
            nothing = jnp.max(average, where=present, initial=0) == 0
            scores = jnp.where(nothing, 0, scores + jnp.log(average))
        ready = jnp.all(steps >= (order + 1) * window, where=present)
        scores = jnp.where(ready, scores, 0)
        return jax.nn.softmax(scores, where=present), state.add(losses, steps, window)

    return vector_weighting(update, init)
