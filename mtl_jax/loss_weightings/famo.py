"""Fast adaptive multitask optimization."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from mtl_jax._base import Weighting
from mtl_jax._checks import check_numbers, is_traced, read_number
from mtl_jax._learned import per_task
from mtl_jax._lift import vector_weighting
from mtl_jax._typing import PyTree


class FamoState(NamedTuple):
    """State of the method.

    Attributes:
      logits: the logits of the tasks' shares.
      opt_state: the state of the logits' optimizer, each leaf with the task as its leading axis.
      log_losses: the logarithms of the losses above their minimum, before the step.
      min_losses: the least value that each loss can have.
    """

    logits: Float[Array, "tasks"]
    opt_state: PyTree
    log_losses: Float[Array, "tasks"]
    min_losses: Float[Array, "tasks"]


def famo(
    learning_rate: float = 0.025, weight_decay: float = 1e-3, min_losses: PyTree = 0.0
) -> Weighting:
    r"""FAMO: all losses decrease at about the same rate, at the price of one more forward pass.

    With :math:`z = \mathrm{softmax}(\xi)` over the present tasks and
    :math:`D_k = L_k - L_k^{\min} + 10^{-8}`,

    .. math:: w_k = \frac{z_k / D_k}{\sum_j z_j / D_j}.

    After the step ``observe`` reads the losses of the same batch again, :math:`D'`, and moves
    :math:`\xi` by one step of Adam (β 0.9 and 0.999) on

    .. math:: J_{\mathrm{softmax}}(\xi)^\top (\log D - \log D') + \gamma\,\xi,

    so that a task whose loss fell less gains. The weights sum to 1, as in the paper. A loss below
    its minimum is outside the domain: the weights are then NaN and the state stays as it was, and
    ``observe`` must not be called after such an update.
    Losses far below 1e-8 above their minimum all steps as 1e-8, as in the published code: a loss at
    its minimum takes nearly all the weight. If the minimum of all is 0,
    :func:`mtl_jax.value_and_grad` leaves a task out of a step in which its loss is exactly 0
    (``leave_out_zero``).

    Args:
      learning_rate: of :math:`\xi`; the default is the paper's.
      weight_decay: :math:`\gamma`, added to the gradient, not decoupled. The default is that of the
        authors' LibMTL port; their own code has 0.01 and 1e-5.
      min_losses: the least value that each loss can have: one number, or a pytree like the losses.

    Returns:
      The weighting. A custom train loop must call its ``observe`` after each step;
      :func:`mtl_jax.make_train_step` does.

    Raises:
      ValueError: if ``learning_rate`` is not positive, ``weight_decay`` is negative, or a
        parameter is not finite; in ``init``, if ``min_losses`` has another structure than the
        losses.
      TypeError: if a parameter is not a number.

    References:
      Liu et al., `FAMO: Fast Adaptive Multitask Optimization <https://arxiv.org/abs/2306.03792>`_,
      NeurIPS 2023

    Example:
      >>> import mtl_jax
      >>> weighting = mtl_jax.famo()
      >>> state = weighting.init((1.0, 1.0))
      >>> weights, state = weighting.update((1.0, 1.0), state)
      >>> state = weighting.observe((0.9, 0.5), state)  # the second fell faster
      >>> weights, state = weighting.update((0.9, 0.9), state)
      >>> [round(float(weight), 4) for weight in weights]
      [0.5125, 0.4875]
    """
    learning_rate = read_number(learning_rate, "famo: `learning_rate`", "(0, inf)")
    weight_decay = read_number(weight_decay, "famo: `weight_decay`", "[0, inf)")
    check_numbers(min_losses, "famo: `min_losses`", "(-inf, inf)")
    optimizer = per_task(
        optax.chain(optax.add_decayed_weights(weight_decay), optax.adam(learning_rate))
    )

    def init(tasks, key):
        logits = tasks.full(0)
        return FamoState(
            logits=logits,
            opt_state=optimizer.init(logits),
            log_losses=tasks.full(0),
            min_losses=tasks.vector(min_losses, "famo: `min_losses`"),
        )

    def above_minimum(losses, state):
        excess = losses - state.min_losses
        return jnp.where(excess >= 0, excess, jnp.nan) + 1e-8

    def update(losses, state, present, steps):
        excess = above_minimum(losses, state)
        shares = jax.nn.softmax(state.logits - jnp.log(excess), where=present)
        return shares, state._replace(log_losses=jnp.log(excess))

    def observe(losses, state, present):
        progress = state.log_losses - jnp.log(above_minimum(losses, state))
        progress = jnp.where(present, progress, 0)
        logits = state.logits.astype(progress.dtype)  # a state may have been cast
        _, pullback = jax.vjp(lambda logits: jax.nn.softmax(logits, where=present), logits)
        (gradient,) = pullback(progress)
        updates, opt_state = optimizer.update(gradient, state.opt_state, logits)
        logits = optax.apply_updates(logits, updates)
        return state._replace(logits=logits, opt_state=opt_state)

    at_zero = not any(is_traced(leaf) or np.any(leaf) for leaf in jax.tree.leaves(min_losses))
    return vector_weighting(update, init, observe=observe, positive_losses=at_zero)
