"""Relative loss balancing with random lookback."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from mtl_jax._base import Weighting
from mtl_jax._checks import is_traced, read_number, require_key
from mtl_jax._lift import vector_weighting


class RelobraloState(NamedTuple):
    """State of the method.

    Attributes:
      weights: the weights of the step before.
      previous: the losses of the step before.
      initial: the losses of the first step.
      key: the key from which the lookback is drawn, or ``None`` if none was given.
    """

    weights: Float[Array, "tasks"]
    previous: Float[Array, "tasks"]
    initial: Float[Array, "tasks"]
    key: Key[Array, ""] | None


def relobralo(alpha: float = 0.999, temperature: float = 1.0, rho: float = 1.0) -> Weighting:
    r"""ReLoBRaLo: the less a loss fell since the step before, or the first, the higher its weight.

    .. math::

       w(t) = \alpha \big(\rho_t\, w(t - 1) + (1 - \rho_t)\, b(t, 0)\big)
              + (1 - \alpha)\, b(t, t - 1), \qquad
       b_k(t, t') = K \,\mathrm{softmax}_k\Big(\frac{L_k(t)}{T\, L_k(t')}\Big),

    with :math:`\rho_t` drawn from a Bernoulli distribution at every step: 0 is a look back to the
    first step. The weights are 1 at a task's first step and :math:`b(t, t - 1)` at its second, as
    in the published code; they sum to the number of tasks while all are present (an absent
    task's share is kept for its return, and the present ones' rescaled). A ratio to a loss of 0
    is taken as 1. Meant for positive losses; others have a ratio, too, but it does not mean
    progress. The first step is the first, as in the paper; the published driver takes the second.

    Args:
      alpha: the decay of the weights, in [0, 1].
      temperature: T > 0; a high one brings the weights close to equal.
      rho: the expected value of :math:`\rho_t`, in [0, 1]; the paper's saudade. At 1 nothing is
        drawn and no key is needed. The defaults of all three are the published driver's.

    Returns:
      The weighting. Its ``init`` needs ``key`` if ``rho`` is below 1.

    Raises:
      ValueError: if a parameter is outside its range; in ``init``, if the key is missing.
      TypeError: if a parameter is not a number; in ``init``, if ``key`` is not a key.

    References:
      Bischof and Kraus, `Multi-Objective Loss Balancing for Physics-Informed Deep Learning
      <https://arxiv.org/abs/2110.09813>`_, 2021

    Example:
      >>> import mtl_jax
      >>> weighting = mtl_jax.relobralo(alpha=0.9)
      >>> state = weighting.init((1.0, 1.0))
      >>> for losses in [(1.0, 1.0), (0.9, 0.5)]:
      ...     weights, state = weighting.update(losses, state)
      >>> [round(float(weight), 3) for weight in weights]
      [1.197, 0.803]
    """
    temperature = read_number(temperature, "relobralo: `temperature`", "(0, inf)")
    alpha, rho = (
        read_number(value, f"relobralo: `{name}`", "[0, 1]")
        for name, value in (("alpha", alpha), ("rho", rho))
    )

    def init(tasks, key):
        return RelobraloState(
            weights=tasks.full(1),
            previous=tasks.full(1),
            initial=tasks.full(1),
            # The state has the same structure for all rho, of which one may be traced.
            key=require_key(key, "relobralo with rho < 1") if is_traced(rho) or rho < 1 else key,
        )

    def update(losses, state, present, steps):
        number = jnp.sum(present, dtype=losses.dtype)
        initial = jnp.where(steps == 0, losses, state.initial)
        previous = jnp.where(steps == 0, losses, state.previous)
        largest = jnp.finfo(losses.dtype).max

        def balanced(reference):
            ratio = jnp.where(reference == 0, 1, losses / jnp.where(reference == 0, 1, reference))
            scores = jnp.clip(ratio / temperature, -largest, largest)
            return number * jax.nn.softmax(scores, where=present)

        history, next_key = state.weights, None
        if state.key is not None:
            next_key, key = jax.random.split(state.key)
            history = jnp.where(jax.random.bernoulli(key, rho), history, balanced(initial))
        decay = jnp.where(steps == 0, 1, jnp.where(steps == 1, 0, alpha))
        weights = decay * history + (1 - decay) * balanced(previous)
        weights = weights * number / jnp.sum(weights, where=present)
        return weights, RelobraloState(weights, losses, initial, next_key)

    return vector_weighting(update, init)
