"""Group distributionally robust optimization."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtl_jax._base import Weighting
from mtl_jax._checks import check_flags, check_numbers, is_traced, read_number
from mtl_jax._lift import vector_weighting
from mtl_jax._typing import PyTree
from mtl_jax.loss_weightings._statistics import among_themselves


class GroupDROState(NamedTuple):
    """State of the method.

    Attributes:
      log_shares: the logarithm of each task's share q; the shares sum to 1.
      reference: the reference loss of each task, 0 without one.
    """

    log_shares: Float[Array, "tasks"]
    reference: Float[Array, "tasks"]


def group_dro(
    step_size: float = 0.01,
    reference: PyTree | None = None,
    normalize: bool = False,
    smoothing: float = 0.0,
) -> Weighting:
    r"""Group DRO: weights that climb towards the worst task by exponentiated gradient steps.

    .. math:: q_k \leftarrow \frac{q_k e^{\eta s_k}}{\sum_j q_j e^{\eta s_j}}, \qquad w_k = K q_k,
              \qquad s_k = L_k.

    The shares q are 1/K at the start, and are moved before the weights of a step are decided. While
    the network descends on the weighted losses they ascend: together they minimise the loss of the
    worst task. The weights follow what the losses add up to over the steps, and so the losses'
    *scale*: a loss in other units is another problem, unless ``normalize`` is set.

    With ``reference`` it is the reweighting of DoReMi: :math:`s_k = \max(0, L_k - R_k)` is the
    excess over the losses R of a model that was trained before, and the shares are then mixed with
    equal ones, :math:`q \leftarrow (1 - c)\, q + c / K`. Its settings are ``step_size=1`` and
    ``smoothing=1e-4``. There the excess is taken of each token, with the reference model's loss on
    the same one, and an absent task is moved by its latest excess again.

    The weights sum to K, the number of present tasks. When tasks are absent, the present ones share
    their sum among themselves, and the others keep their shares; published code moves them by a
    loss of 0. The shares are kept as logarithms, and kept from underflowing, so that no task is
    lost for good.

    Args:
      step_size: the step size :math:`\eta`, at least 0. The default is that of the authors' code.
      reference: the reference losses, a pytree like the losses or one number for all; ``None`` for
        the losses as they are.
      normalize: whether :math:`s` is divided by its sum over the present tasks first, as the
        authors' code does on request. A negative loss is then outside the domain: the weights are
        NaN and the state stays as it was.
      smoothing: c in [0, 1].

    Returns:
      The weighting.

    Raises:
      ValueError: if ``step_size`` is negative, ``smoothing`` outside [0, 1], or a reference loss
        not finite; in ``init``, if ``reference`` has another structure than the losses.
      TypeError: if one of them is not a number, or ``normalize`` neither ``True`` nor ``False``.

    References:
      Sagawa et al., `Distributionally Robust Neural Networks for Group Shifts
      <https://arxiv.org/abs/1911.08731>`_, ICLR 2020

      Xie et al., `DoReMi: Optimizing Data Mixtures Speeds Up Language Model Pretraining
      <https://arxiv.org/abs/2305.10429>`_, NeurIPS 2023

    Example:
      >>> import mtl_jax
      >>> weighting = mtl_jax.group_dro(step_size=0.1)
      >>> state = weighting.init((1.0, 2.0))
      >>> for _ in range(20):
      ...     weights, state = weighting.update((1.0, 2.0), state)
      >>> [round(float(weight), 3) for weight in weights]
      [0.238, 1.762]
    """
    step_size = read_number(step_size, "group_dro: `step_size`", "[0, inf)")
    check_numbers(reference, "group_dro: a reference loss", "(-inf, inf)")
    check_flags("group_dro", normalize=normalize)
    smoothing = read_number(smoothing, "group_dro: `smoothing`", "[0, 1]")

    def init(tasks, key):
        values = 0.0 if reference is None else reference
        return GroupDROState(
            log_shares=tasks.full(-math.log(tasks.number)),
            reference=tasks.vector(values, "group_dro: `reference`"),
        )

    def update(losses, state, present, steps):
        number = jnp.maximum(jnp.sum(present, dtype=losses.dtype), 1)
        scores = losses
        if reference is not None:
            scores = jnp.maximum(losses - state.reference, 0)
        if normalize:
            scores = jnp.where(scores >= 0, scores, jnp.nan)
            largest = jnp.max(scores, where=present, initial=0)
            scores = scores / jnp.where(largest > 0, largest, 1)  # whose sum does not overflow
            total = jnp.sum(scores, where=present)
            scores = scores / jnp.where(total > 0, total, 1)
        finfo = jnp.finfo(losses.dtype)
        ascent = jnp.clip(step_size * scores, -finfo.max, finfo.max)
        log_shares = jax.nn.log_softmax(state.log_shares + ascent, where=present)
        if is_traced(smoothing) or smoothing:
            shares = (1 - smoothing) * jnp.exp(log_shares) + smoothing / number
            log_shares = jnp.log(shares)
        weights = number * jnp.exp(log_shares)
        log_shares = among_themselves(log_shares, state.log_shares, present)
        return weights, GroupDROState(log_shares, state.reference)

    return vector_weighting(update, init)
