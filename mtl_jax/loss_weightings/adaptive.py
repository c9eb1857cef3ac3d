"""Harder tasks get more weight: the scheme that this library comes from."""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtl_jax._base import Weighting
from mtl_jax._checks import check_option, read_number
from mtl_jax._lift import vector_weighting
from mtl_jax.loss_weightings._statistics import ema_rate


class AdaptiveState(NamedTuple):
    """Statistics of the losses.

    Attributes:
      average: the moving average of each loss.
      initial: the first loss of each task.
    """

    average: Float[Array, "tasks"]
    initial: Float[Array, "tasks"]


def adaptive(
    emphasis: float = 1.0,
    rule: Literal["proportional", "softmax"] = "proportional",
    relative_to: Literal["initial"] | None = None,
    decay: float = 0.0,
) -> Weighting:
    r"""Adaptive weights: the higher a task's loss, the higher its weight.

    With K present tasks, losses :math:`L` and emphasis :math:`p`,

    .. math::

       w_k = K \frac{L_k^p}{\sum_j L_j^p} \quad \text{(proportional)}, \qquad
       w_k = K \frac{e^{p L_k}}{\sum_j e^{p L_j}} \quad \text{(softmax)}.

    The weights sum to the number of present tasks. They are decided on the current losses, and no
    gradient flows through them.

    This is the scheme of the project's origin: *harder tasks get more weight*. The published
    summary states that principle and does not print a formula; the formula, its variants and
    their defaults are ours. ``emphasis=0`` is equal weights, 1 the plainest form of the principle.

    A loss is high because its task is hard, or because it is measured on a larger scale (a
    cross-entropy over 100 classes beside one over 2). The proportional rule does not tell the two
    apart; ``relative_to="initial"`` does, in part: each loss is then divided by its first value,
    and what counts is how little of it has been learned.

    The proportional rule is computed in logarithms, so that neither losses of 1e30 nor high powers
    overflow. Where all losses are 0 the weights are equal. A negative loss is outside the domain of
    the proportional rule and of ``relative_to="initial"``, and so is a first loss of 0 for the
    latter: the weights are then NaN and the state stays as it was. For ``relative_to="initial"``
    :func:`mtl_jax.value_and_grad` leaves a task out of a step in which its loss is exactly 0
    (``leave_out_zero``), so that its first loss is a positive one.

    Args:
      emphasis: the power p, at least 0.
      rule: ``"proportional"`` or ``"softmax"``. The softmax depends on the losses' differences,
        not their ratios, and takes losses of any sign.
      relative_to: ``None`` for the losses as they are; ``"initial"`` to divide each loss by the
        first one of its task.
      decay: the decay d, in [0, 1), of an exponential moving average that smooths the losses over
        the steps first: :math:`m_t = (1 - d) \sum_{s \le t} d^{\,t - s} L_s / (1 - d^t)`, which
        starts at the first loss. 0 does not smooth.

    Returns:
      The weighting.

    Raises:
      ValueError: if a parameter is not one of these.
      TypeError: if ``emphasis`` or ``decay`` is not a number.

    Example:
      >>> import mtl_jax
      >>> weighting = mtl_jax.adaptive()
      >>> losses = {"easy": 0.5, "hard": 1.5}
      >>> weights, state = weighting.update(losses, weighting.init(losses))
      >>> round(float(weights["easy"]), 3), round(float(weights["hard"]), 3)
      (0.5, 1.5)
    """
    emphasis = read_number(emphasis, "adaptive: `emphasis`", "[0, inf)")
    check_option(rule, ("proportional", "softmax"), "adaptive: `rule`")
    check_option(relative_to, (None, "initial"), "adaptive: `relative_to`")
    decay = read_number(decay, "adaptive: `decay`", "[0, 1)")

    def init(tasks, key):
        return AdaptiveState(average=tasks.full(0), initial=tasks.full(1))

    def update(losses, state, present, steps):
        if rule == "proportional" or relative_to == "initial":
            losses = jnp.where(losses >= 0, losses, jnp.nan)
        rate = ema_rate(decay, steps, losses.dtype)
        average = (1 - rate) * state.average + rate * losses
        initial = jnp.where(steps == 0, losses, state.initial)
        if relative_to == "initial":
            reference = jnp.where(initial == 0, jnp.nan, initial)
        else:
            reference = jnp.ones_like(losses)
        if rule == "softmax":
            difficulty = jnp.minimum(average / reference, jnp.finfo(losses.dtype).max)
            scores = emphasis * (difficulty - jnp.max(difficulty, where=present, initial=-jnp.inf))
        else:
            # Equal weights without emphasis, or if all losses are 0: not 0 times infinity.
            alike = (emphasis == 0) | jnp.all(average == 0, where=present)
            scores = emphasis * jnp.where(alike, 0 * reference, _log_ratio(average, reference))
        shares = jax.nn.softmax(scores, where=present)
        return jnp.sum(present, dtype=losses.dtype) * shares, AdaptiveState(average, initial)

    return vector_weighting(update, init, positive_losses=relative_to == "initial")


def _log_ratio(
    numerator: Float[Array, "tasks"], denominator: Float[Array, "tasks"]
) -> Float[Array, "tasks"]:
    """The logarithm of a ratio that may itself be too large or too small for its dtype."""
    (top, top_exponent), (bottom, bottom_exponent) = jnp.frexp(numerator), jnp.frexp(denominator)
    exponent = (top_exponent - bottom_exponent).astype(numerator.dtype)
    return jnp.log(top / bottom) + math.log(2) * exponent
