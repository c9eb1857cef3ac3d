"""Impartial multi-task learning, loss balance."""

import jax.numpy as jnp
import optax

from mtl_jax._base import Weighting
from mtl_jax._learned import LearnedState, check_learner, learned_step
from mtl_jax._lift import vector_weighting


def imtl_l(optimizer: optax.GradientTransformation) -> Weighting:
    r"""IMTL-L: learned scales that bring every weighted loss to 1.

    The total that is minimised over the network and over s is

    .. math:: \sum_k e^{s_k} L_k - s_k, \qquad w_k = e^{s_k},

    with s = 0 at the start. The gradient by s, :math:`e^{s_k} L_k - 1`, is known in closed form;
    ``optimizer`` takes one step on it after the weights of a step are decided, with the same
    losses. The weights keep this scale and do not sum to K. s is kept within the range in which
    :math:`e^s` is finite, about ±80 in float32. With -s for s it is the ``"kendall"`` form of
    :func:`mtl_jax.uncertainty`, and trains alike where the optimizer treats both signs alike.
    At a loss of 0, and at a negative one, no s is best: it grows to its limit, and the weight with
    it; :func:`mtl_jax.value_and_grad` leaves a task out of a step in which its loss is exactly 0
    (``leave_out_zero``). The gradient by s is cut off where its square would overflow (in float32,
    above 1.8e15).

    Args:
      optimizer: the optax optimizer of s; it is applied to each task's s on its own. The paper
        optimises s with the network's own optimizer. One that asks for more than the gradient (a
        line search, ``optax.polyak_sgd``) gets the task's term of this total, as a value and as a
        function of s.

    Returns:
      The weighting; its state holds s as ``state.inner.parameter``.

    Raises:
      TypeError: if ``optimizer`` is not an optax optimizer, or cannot be applied to one number.

    References:
      Liu et al., `Towards Impartial Multi-Task Learning
      <https://openreview.net/forum?id=IMPnRXEWpvr>`_, ICLR 2021

    Example:
      >>> import optax
      >>> import mtl_jax
      >>> weighting = mtl_jax.imtl_l(optax.sgd(0.1))
      >>> state = weighting.init((0.5, 2.0))
      >>> for _ in range(200):
      ...     weights, state = weighting.update((0.5, 2.0), state)
      >>> [round(float(weight), 3) for weight in weights]
      [2.0, 0.5]
    """
    check_learner(optimizer, "imtl_l")

    def init(tasks, key):
        return LearnedState.create(tasks.full(0), optimizer)

    def objective(s, loss):
        return jnp.exp(s) * loss - s

    def update(losses, state, present, steps):
        weights = jnp.exp(state.parameter)
        return weights, learned_step(state, objective, losses, optimizer=optimizer)

    return vector_weighting(update, init, positive_losses=True)
