"""Gradient normalization (GradNorm)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mtl_jax._base import Signal, Weighting
from mtl_jax._checks import read_number
from mtl_jax._learned import check_learner, per_task, step_per_task
from mtl_jax._lift import vector_weighting
from mtl_jax._typing import PyTree
from mtl_jax.gramian_weightings._spectral import gradient_norms


class GradNormState(NamedTuple):
    """State of the method.

    Attributes:
      weights: the weights of the next step.
      initial: the first loss of each task.
      opt_state: the optimizer's state, each leaf with the task as its leading axis.
    """

    weights: Float[Array, "tasks"]
    initial: Float[Array, "tasks"]
    opt_state: PyTree


def gradnorm(optimizer: optax.GradientTransformation, alpha: float = 1.5) -> Weighting:
    r"""GradNorm: learned weights that make tasks train at similar rates.

    The weighted gradient norms :math:`w_k \lVert g_k \rVert` are to be their mean, larger for the
    tasks whose loss has fallen less: the weights minimise

    .. math:: \sum_k \left\lvert\, w_k \lVert g_k \rVert - \bar G\, r_k^\alpha \right\rvert, \qquad
              \bar G = \frac{1}{K} \sum_j w_j \lVert g_j \rVert, \quad
              r_k = \frac{L_k / L_k(0)}{\frac1K \sum_j L_j / L_j(0)},

    with the target :math:`\bar G\, r_k^\alpha` held constant. ``optimizer`` takes one step on
    the gradient, :math:`\pm \lVert g_k \rVert`, after the weights of a step are decided; then
    they are rescaled to sum to K. They are 1 at the start. Between updates in which not all tasks
    are present, the present ones are rescaled among themselves, to sum to their number in use and
    to keep their sum in the state, so that the ratios to the absent ones are not lost.

    The paper does not say what keeps the weights positive. Here they are kept, before they are
    rescaled, at 0.001 or more and at K or less, which matters only where a step is too large:
    :math:`\pm \lVert g_k \rVert` has the scale of the gradients, so plain gradient descent needs a
    learning rate that suits it, and Adam does not. The gradient norms are those of the Gramian: at
    the representation, or over the parameters of ``shared``; the paper takes the last shared layer.
    (Physics-informed codes call "grad norm" what nothing is learned in, weights inverse to the
    norms: that is :func:`mtl_jax.norm_balance`.)
    :math:`L_k(0)` is the loss of the task's first step, the paper's choice for a known one aside. A
    first loss that is not positive, or a later one that is negative, is outside the domain: the
    weights are then NaN and the state stays as it was. Where all losses are 0, r is 1.
    :func:`mtl_jax.value_and_grad` leaves a task out of a step in which its loss, or its gradient,
    is exactly 0 (``leave_out_zero``).

    Args:
      optimizer: the optax optimizer of the weights; it is applied to each task's weight on its own.
        The paper uses the network's own optimizer and learning rate. One that asks for more than
        the gradient (a line search, ``optax.polyak_sgd``) gets the task's term of this sum, as a
        value and as a function of the weight.
      alpha: how strongly to pull the tasks to a common rate, at least 0. The default is the paper's
        choice for NYUv2.

    Returns:
      The weighting; its state holds the weights of the next step as ``state.inner.weights``.

    Raises:
      ValueError: if ``alpha`` is negative or not finite.
      TypeError: if ``optimizer`` is not an optax optimizer, or cannot be applied to one number, or
        ``alpha`` is not a number.

    References:
      Chen et al., `GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask
      Networks <https://arxiv.org/abs/1711.02257>`_, ICML 2018

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import mtl_jax
      >>> weighting = mtl_jax.gradnorm(optax.adam(0.01))
      >>> state = weighting.init((1.0, 1.0))
      >>> gramian = jnp.diag(jnp.array([1.0, 9.0]))  # two orthogonal gradients, of norms 1 and 3
      >>> for _ in range(200):
      ...     weights, state = weighting.update((1.0, 1.0), state, gramian=gramian)
      >>> [round(float(weight), 1) for weight in weights]
      [1.5, 0.5]
    """
    check_learner(optimizer, "gradnorm")
    alpha = read_number(alpha, "gradnorm: `alpha`", "[0, inf)")

    def init(tasks, key):
        return GradNormState(tasks.full(1), tasks.full(1), per_task(optimizer).init(tasks.full(1)))

    def objective(weight, norm, target):
        return jnp.abs(weight * norm - target)

    def update(losses, state, present, steps, gramian):
        number = jnp.maximum(jnp.sum(present, dtype=losses.dtype), 1)
        initial = jnp.where(steps == 0, losses, state.initial)
        initial = jnp.where(initial > 0, initial, jnp.nan)
        losses = jnp.where(losses >= 0, losses, jnp.nan)
        share = jnp.sum(state.weights, where=present) / number
        weights = state.weights / jnp.where(share > 0, share, 1)

        norms = gradient_norms(gramian)
        mean = jnp.sum(weights * norms, where=present) / number
        # The mean of r is 1. In logarithms, so that no ratio overflows.
        logs = jnp.log(losses) - jnp.log(initial)
        logs = jnp.where(jnp.all(losses == 0, where=present), 0 * initial, logs)
        rate = number * jax.nn.softmax(logs, where=present)

        learned, opt_state = step_per_task(
            optimizer, objective, weights, state.opt_state, norms, mean * rate**alpha
        )
        learned = jnp.clip(learned, 1e-3, number)
        learned = learned / jnp.sum(learned, where=present) * (share * number)
        return weights, GradNormState(learned, initial, opt_state)

    return vector_weighting(update, init, needs=Signal.GRAMIAN, positive_losses=True)
