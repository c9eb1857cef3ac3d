"""Smooth Tchebycheff scalarization."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtl_jax._base import Weighting
from mtl_jax._checks import read_integer, read_number
from mtl_jax._lift import vector_weighting


class StchState(NamedTuple):
    """The nadir: each task's mean loss over the end of the warm-up."""

    nadir: Float[Array, "tasks"]


def stch(warmup: int, mu: float = 1.0, window: int | None = None) -> Weighting:
    r"""Smooth Tchebycheff scalarization (STCH): minimise a smooth maximum of the losses.

    In the first ``warmup`` steps the sum of the logarithms is minimised; then the smooth maximum
    of the losses relative to the nadir :math:`n`, their means at the end of the warm-up:

    .. math::

       \sum_k \log L_k, \quad w_k = \frac{1}{L_k}; \qquad
       K \mu \log \sum_k e^{\log(L_k / n_k) / \mu}, \quad
       w_k = \frac{K}{L_k} \,\mathrm{softmax}_k\Big(\frac{\log(L_k / n_k)}{\mu}\Big).

    This is the form of the paper's multi-task experiments and published code, with uniform
    preferences. The weights keep this scale and do not sum to K. A loss that is not positive is
    outside the domain: the weights are then NaN and the state stays as it was. Each task counts
    its warm-up in the steps in which it is present; it ends when it has ended for all present.
    :func:`mtl_jax.value_and_grad` leaves a task out of a step in which its loss is exactly 0
    (``leave_out_zero``).

    Args:
      warmup: the number of training steps of the warm-up; the published code takes the first
        epochs (5 with its default of 4, counted from 0).
      mu: the smoothing μ > 0; towards 0 only the worst task counts. The default is the published
        code's.
      window: the nadir is the mean over the last ``window`` steps of the warm-up: in the published
        code, one epoch's. All of the warm-up by default.

    Returns:
      The weighting.

    Raises:
      ValueError: if ``warmup`` or ``window`` is not a positive integer, ``window`` is longer than
        ``warmup``, or ``mu`` is not positive.
      TypeError: if ``mu`` is not a number.

    References:
      Lin et al., `Smooth Tchebycheff Scalarization for Multi-Objective Optimization
      <https://arxiv.org/abs/2402.19078>`_, ICML 2024

    Example:
      >>> import mtl_jax
      >>> weighting = mtl_jax.stch(warmup=1)
      >>> state = weighting.init((1.0, 2.0))
      >>> for losses in [(1.0, 2.0), (0.5, 2.0)]:
      ...     weights, state = weighting.update(losses, state)
      >>> [round(float(weight), 3) for weight in weights]
      [1.333, 0.667]
    """
    read_integer(warmup, "stch: `warmup`")
    mu = read_number(mu, "stch: `mu`", "(0, inf)")
    window = warmup if window is None else read_integer(window, "stch: `window`")
    if window > warmup:
        raise ValueError(f"stch: `window` ({window}) is longer than `warmup` ({warmup}).")

    def init(tasks, key):
        return StchState(nadir=tasks.full(0))

    def update(losses, state, present, steps):
        losses = jnp.where(losses > 0, losses, jnp.nan)
        log_losses = jnp.log(losses)
        measured = (steps >= warmup - window) & (steps < warmup)
        nadir = state.nadir + jnp.where(measured, losses / window, 0)

        warm = jnp.all(steps >= warmup, where=present)
        scores = (log_losses - jnp.log(jnp.where(warm, state.nadir, 1))) / mu
        shares = jnp.sum(present, dtype=losses.dtype) * jax.nn.softmax(scores, where=present)
        return jnp.where(warm, shares, 1) / losses, StchState(nadir)

    return vector_weighting(update, init, positive_losses=True)
