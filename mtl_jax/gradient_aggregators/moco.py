"""Multi-objective gradient correction."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtl_jax._base import Aggregator
from mtl_jax._checks import read_number
from mtl_jax._lift import for_each_task, rows_aggregator, squared_norms, weighted_sum, zero_rows
from mtl_jax._typing import PyTree


class MoCoState(NamedTuple):
    r"""State of the method.

    Attributes:
      tracked: the tracking variables y, like the parameters with the tasks as leading axis.
      logits: the logits of the weights: :math:`\lambda` is their softmax.
    """

    tracked: PyTree
    logits: Float[Array, "tasks"]


def moco(
    beta: float = 0.5,
    beta_sigma: float = 0.5,
    gamma: float = 0.1,
    gamma_sigma: float = 0.5,
    rho: float = 0.0,
    eps: float = 1e-8,
) -> Aggregator:
    r"""MoCo: a minimum-norm direction from gradients tracked over the steps, so less biased.

    .. math::

       y_k &\leftarrow y_k - \frac{\beta}{t^{\sigma_\beta}}
           \Big(y_k - \frac{L_k}{\|g_k\| + \epsilon}\, g_k\Big), \\
       \lambda &\leftarrow \mathrm{softmax}\Big(\lambda - \frac{\gamma}{t^{\sigma_\gamma}}
           (Y Y^\top + \rho I) \lambda\Big), \qquad
       d = \sum_k \lambda_k y_k,

    from y = 0 and equal :math:`\lambda`, t being a task's number of steps, the present one
    included. The weights sum to 1. As in the authors' code, gradients are brought to the length of
    their task's loss, and a softmax takes the place of the paper's projection onto the simplex. It
    is taken of weights in [0, 1], so small step sizes keep them close to equal.

    A negative loss, which would turn its gradient around, is outside the domain: the gradient is
    then NaN and the state stays as it was. The same holds where the square of a gradient's norm, or
    of the loss, whose length it is given, overflows (in float32, beyond 1.8e19).

    Args:
      beta: the step size of the tracking variables, in (0, 1].
      beta_sigma: how fast it decays, at least 0.
      gamma: the step size of the weights, at least 0; 0 keeps them equal.
      gamma_sigma: how fast it decays, at least 0.
      rho: the regularisation of the weights, at least 0.
      eps: added to the norms, at least 0. With 0 the method does not depend on the gradients'
        scale. The defaults, this one included, are those of the authors' LibMTL port.

    Returns:
      The aggregator. Its ``update`` reads the losses.

    Raises:
      ValueError: if a parameter is outside its range; in ``update``, if the losses are missing.
      TypeError: if a parameter is not a number.

    References:
      Fernando et al., `Mitigating Gradient Bias in Multi-objective Learning: A Provably Convergent
      Approach <https://openreview.net/forum?id=dLAYGdKTi2>`_, ICLR 2023

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_jax
      >>> aggregator = mtl_jax.moco()
      >>> losses, task_gradients = (1.0, 2.0), jnp.array([[0.1, 0.0], [0.0, 10.0]])
      >>> state = aggregator.init(task_gradients[0], losses)
      >>> for _ in range(20):
      ...     gradient, state = aggregator.update(task_gradients, state, losses=losses)
      >>> [round(float(entry), 3) for entry in gradient]
      [0.509, 0.956]
    """
    beta = read_number(beta, "moco: `beta`", "(0, 1]")
    beta_sigma = read_number(beta_sigma, "moco: `beta_sigma`", "[0, inf)")
    gamma = read_number(gamma, "moco: `gamma`", "[0, inf)")
    gamma_sigma = read_number(gamma_sigma, "moco: `gamma_sigma`", "[0, inf)")
    rho = read_number(rho, "moco: `rho`", "[0, inf)")
    eps = read_number(eps, "moco: `eps`", "[0, inf)")

    def init(params, tasks, key):
        return MoCoState(tracked=zero_rows(params, tasks), logits=tasks.full(0))

    def update(rows, state, present, steps, losses):
        step = (steps + 1).astype(losses.dtype)
        losses = jnp.where(losses >= 0, losses, jnp.nan)
        norms = jnp.sqrt(squared_norms(rows))
        norms = jnp.where(jnp.isfinite(norms), norms, jnp.nan)  # not a gradient of 0
        scale = losses / jnp.where(norms == 0, 1, norms + eps)
        rate = beta * step**-beta_sigma

        def track(old, row):
            new = for_each_task(scale, row).astype(row.dtype) * row
            return old - for_each_task(rate, row).astype(row.dtype) * (old - new)

        tracked = jax.tree.map(track, state.tracked, rows)
        weights = jax.nn.softmax(state.logits, where=present)
        slope = _inner_products(tracked, weighted_sum(weights, tracked)) + rho * weights
        logits = weights - gamma * step**-gamma_sigma * slope
        weights = jax.nn.softmax(logits, where=present)
        return weighted_sum(weights, tracked), MoCoState(tracked, logits)

    return rows_aggregator(update, init, reads_losses=True)


def _inner_products(rows: PyTree, row: PyTree) -> Float[Array, "tasks"]:
    """The inner product of every row with one."""
    by_leaf = jax.tree.map(
        lambda leaf, other: jnp.sum(leaf * other[None], axis=tuple(range(1, leaf.ndim))), rows, row
    )
    return functools.reduce(jnp.add, jax.tree.leaves(by_leaf))
