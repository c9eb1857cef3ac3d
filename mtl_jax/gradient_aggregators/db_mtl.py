"""Dual balancing."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax._base import Aggregator
from mtl_jax._checks import read_number
from mtl_jax._lift import for_each_task, rows_aggregator, squared_norms, weighted_sum, zero_rows
from mtl_jax._typing import PyTree


class DBMTLState(NamedTuple):
    """The smoothed gradients, like the parameters with the tasks as leading axis."""

    smoothed: PyTree


def db_mtl(beta: float = 0.9, beta_sigma: float = 0.0, eps: float = 1e-8) -> Aggregator:
    r"""DB-MTL: gradients of the logarithms of the losses, all brought to the length of the longest.

    .. math::

       b_k \leftarrow \beta_t\, b_k + (1 - \beta_t)\, \nabla \log(L_k + \epsilon), \quad
       \beta_t = \frac{\beta}{t^{\sigma}}, \qquad
       d = \sum_k \frac{\max_j \|b_j\|}{\|b_k\| + \epsilon}\, b_k,

    from b = 0, t being a task's number of steps, the present one included. There is no correction
    for the start at 0, so the first gradients are short, :math:`1 - \beta` times their length. The
    direction is up to K times as long as the longest :math:`b_k`, as in the paper.

    The task gradients given to ``update`` are those of the losses; the logarithm is taken here. A
    negative loss, and without :math:`\epsilon` one of 0 that has a gradient, is outside the domain:
    the gradient is then NaN and the state stays as it was. The same holds for a norm that overflows
    (in float32, beyond 1.8e19, the gradients being divided by the losses).

    Args:
      beta: the decay of the moving average, in [0, 1); 0 does not smooth. The default is that of
        the authors' code, and so are the others.
      beta_sigma: :math:`\sigma`, how fast ``beta`` decays over the steps, at least 0.
      eps: added to the losses and to the norms, at least 0. With 0 the method does not depend on
        the scale of the losses or of the gradients; gradients far below it almost vanish.

    Returns:
      The aggregator. Its ``update`` reads the losses.

    Raises:
      ValueError: if a parameter is outside its range; in ``update``, if the losses are missing.
      TypeError: if a parameter is not a number.

    References:
      Lin et al., `Dual-Balancing for Multi-Task Learning <https://arxiv.org/abs/2308.12029>`_, 2023

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_jax
      >>> aggregator = mtl_jax.db_mtl(beta=0.0)
      >>> losses, task_gradients = (1.0, 2.0), jnp.array([[0.1, 0.0], [0.0, 10.0]])
      >>> state = aggregator.init(task_gradients[0], losses)
      >>> gradient, state = aggregator.update(task_gradients, state, losses=losses)
      >>> [round(float(entry), 3) for entry in gradient]
      [5.0, 5.0]
    """
    beta = read_number(beta, "db_mtl: `beta`", "[0, 1)")
    beta_sigma = read_number(beta_sigma, "db_mtl: `beta_sigma`", "[0, inf)")
    eps = read_number(eps, "db_mtl: `eps`", "[0, inf)")

    def init(params, tasks, key):
        return DBMTLState(zero_rows(params, tasks))

    def update(rows, state, present, steps, losses):
        step = (steps + 1).astype(losses.dtype)
        slope = 1 / (jnp.where(losses >= 0, losses, jnp.nan) + eps)
        decay = beta * step**-beta_sigma

        def smooth(old, row):
            # A gradient of 0 stays so, even where without eps a loss of 0 has no logarithm.
            new = jnp.where(row == 0, 0, for_each_task(slope, row).astype(row.dtype) * row)
            return new + for_each_task(decay, row).astype(row.dtype) * (old - new)

        smoothed = jax.tree.map(smooth, state.smoothed, rows)
        norms = jnp.sqrt(squared_norms(smoothed))
        longest = jnp.max(norms, where=present, initial=0)
        weights = jnp.where(present, longest / jnp.where(norms == 0, 1, norms + eps), 0)
        return weighted_sum(weights, smoothed), DBMTLState(smoothed)

    return rows_aggregator(update, init, reads_losses=True)
