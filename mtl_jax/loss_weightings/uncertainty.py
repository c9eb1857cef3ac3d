"""Homoscedastic uncertainty weights."""

from typing import Literal

import jax
import jax.numpy as jnp
import optax

from mtl_jax._base import Weighting
from mtl_jax._checks import check_option, read_number
from mtl_jax._learned import LearnedState, check_learner, learned_step
from mtl_jax._lift import vector_weighting


def uncertainty(
    optimizer: optax.GradientTransformation,
    initial_log_variance: float = 0.0,
    form: Literal["kendall", "half", "revised"] = "kendall",
) -> Weighting:
    r"""Uncertainty weights: each task's loss is divided by a variance that is learned.

    With :math:`s_k = \log \sigma_k^2`, the total that is minimised over the network and over s is

    .. math::

       \text{kendall:}\; \sum_k e^{-s_k} L_k + s_k, \qquad
       \text{half:}\; \sum_k \tfrac12 e^{-s_k} L_k + \tfrac12 s_k, \qquad
       \text{revised:}\; \sum_k \tfrac12 e^{-s_k} L_k + \log(1 + e^{s_k}).

    The weights are the derivatives by the losses: :math:`e^{-s_k}`, or half of it. The gradient
    by s is known in closed form; ``optimizer`` takes one step on it after the weights of a step
    are decided, with the same losses. The weights keep this scale and do not sum to K.

    ``"kendall"`` is what the paper's authors published as code and is derived for a Gaussian
    likelihood up to a factor 2; ``"half"`` is common in later code (and the derivation's own
    scale); ``"revised"`` keeps the regulariser positive.

    s is kept within the range in which :math:`e^{-s}` and :math:`e^s` are finite, about ±80 in
    float32. At a loss of 0, and at a negative one, no s is best: it falls to its limit, and the
    weight grows; :func:`mtl_jax.value_and_grad` leaves a task out of a step in which its loss is
    exactly 0 (``leave_out_zero``). The gradient by s is cut off where its square would overflow (in
    float32, above 1.8e15).

    Args:
      optimizer: the optax optimizer of s; it is applied to each task's s on its own. The paper
        optimises s with the network's own optimizer. One that asks for more than the gradient (a
        line search, ``optax.polyak_sgd``) gets the task's term of this total, as a value and as a
        function of s.
      initial_log_variance: s before the first step, in the losses' own unit. The default, 0, is a
        variance of 1.
      form: ``"kendall"``, ``"half"`` or ``"revised"``.

    Returns:
      The weighting; its state holds ``log_variance`` as ``state.inner.parameter``.

    Raises:
      ValueError: if ``form`` is unknown or ``initial_log_variance`` is not within ±79.
      TypeError: if ``optimizer`` is not an optax optimizer, or cannot be applied to one number, or
        ``initial_log_variance`` is not a number.

    References:
      Kendall et al., `Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry
      and Semantics <https://arxiv.org/abs/1705.07115>`_, CVPR 2018

      Liebel and Körner, `Auxiliary Tasks in Multi-task Learning
      <https://arxiv.org/abs/1805.06334>`_, 2018 (``"revised"``)

    Example:
      >>> import optax
      >>> import mtl_jax
      >>> weighting = mtl_jax.uncertainty(optax.sgd(0.1))
      >>> state = weighting.init((0.5, 2.0))
      >>> for _ in range(200):
      ...     weights, state = weighting.update((0.5, 2.0), state)
      >>> [round(float(weight), 3) for weight in weights]  # 1 / L at the optimum
      [2.0, 0.5]
    """
    check_option(form, ("kendall", "half", "revised"), "uncertainty: `form`")
    check_learner(optimizer, "uncertainty")
    name = "uncertainty: `initial_log_variance`"
    initial_log_variance = read_number(initial_log_variance, name, "[-79, 79]")
    factor = 1.0 if form == "kendall" else 0.5

    def init(tasks, key):
        return LearnedState.create(tasks.full(initial_log_variance), optimizer)

    def objective(s, loss):
        regulariser = jax.nn.softplus(s) if form == "revised" else factor * s
        return factor * jnp.exp(-s) * loss + regulariser

    def update(losses, state, present, steps):
        weights = factor * jnp.exp(-state.parameter)
        return weights, learned_step(state, objective, losses, optimizer=optimizer)

    return vector_weighting(update, init, positive_losses=True)
