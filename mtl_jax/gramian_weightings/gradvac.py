"""Gradient vaccine (GradVac)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from mtl_jax._base import Signal, Weighting
from mtl_jax._checks import read_number, require_key
from mtl_jax._lift import Pairs, vector_weighting
from mtl_jax.gramian_weightings._spectral import cosines, gradient_norms, rounding
from mtl_jax.gramian_weightings.pcgrad import Order, check_order, draw_orders, weights_of_mixtures


class GradVacState(NamedTuple):
    """State of the method.

    Attributes:
      target: the moving average of the cosine that each task has found with each other.
      key: the key from which the next orders are drawn, or ``None`` where there is none.
    """

    target: Pairs
    key: Key[Array, ""] | None


def gradvac(beta: float = 0.5, order: Order | None = None) -> Weighting:
    r"""GradVac: each task gradient is turned towards the others, as far as they are used to.

    For each task i, start with :math:`a = g_i` and meet the other tasks j in random order. Where
    the cosine :math:`\rho` between a and :math:`g_j` is below its target :math:`\phi_{ij}`,

    .. math:: a \leftarrow a + \frac{\lVert a \rVert \big(\phi_{ij} \sqrt{1 - \rho^2}
              - \rho \sqrt{1 - \phi_{ij}^2}\big)}{\lVert g_j \rVert \sqrt{1 - \phi_{ij}^2}}\, g_j,

    after which the cosine is :math:`\phi_{ij}`; and in any case
    :math:`\phi_{ij} \leftarrow (1 - \beta)\, \phi_{ij} + \beta \rho`, from 0 at the start. The
    gradient is the sum of the a of all tasks, and the weights are its coefficients in the task
    gradients, found from the Gramian alone. They are at least 1. With the targets held at 0 it
    is :func:`mtl_jax.pcgrad`. The paper keeps targets for the whole model, for encoder and decoder,
    for each layer or for each matrix: ``groups`` of :func:`mtl_jax.value_and_grad`.

    :math:`1 - \phi^2` is kept at one rounding unit or more, where the published implementations
    add 1e-8 to lengths. A gradient that is zero, or becomes so when it is projected away from its
    opposite, has no cosine: it is left as it is, and so are its targets. The losses are not read:
    they may be 0 or negative.

    Args:
      beta: the rate of the moving average, in [0, 1]. The default is that of LibMTL and TorchJD.
      order: the order in which each task meets the others, as in :func:`mtl_jax.pcgrad`.

    Returns:
      The weighting. Its ``init`` needs ``key``, unless an ``order`` that needs none is given.

    Raises:
      ValueError: if ``beta`` is not in [0, 1]; in ``init``, if the key is missing; in ``update``,
        if the order's shape is wrong.
      TypeError: if ``beta`` is not a number or ``order`` not a function; in ``update``, if it does
        not return integers.

    References:
      Wang et al., `Gradient Vaccine: Investigating and Improving Multi-task Optimization in
      Massively Multilingual Models <https://arxiv.org/abs/2010.05874>`_, ICLR 2021

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import mtl_jax
      >>> weighting = mtl_jax.gradvac()
      >>> state = weighting.init((1.0, 1.0), key=jax.random.key(0))
      >>> for cosine in (0.8, 0.0):
      ...     gramian = jnp.array([[1.0, cosine], [cosine, 1.0]])
      ...     weights, state = weighting.update((1.0, 1.0), state, gramian=gramian)
      >>> [round(float(weight), 3) for weight in weights]  # turned to a cosine of 0.4
      [1.436, 1.436]
    """
    beta = read_number(beta, "gradvac: `beta`", "[0, 1]")
    check_order(order, "gradvac")

    def init(tasks, key):
        key = require_key(key, "gradvac") if order is None else key
        return GradVacState(Pairs(jnp.zeros((tasks.number, tasks.number), tasks.dtype)), key)

    def update(losses, state, present, steps, gramian):
        number = gramian.shape[0]
        orders, next_key = draw_orders(order, state.key, number, "gradvac")
        norms, products = gradient_norms(gramian), cosines(gramian)
        tasks, eps = jnp.arange(number), float(jnp.finfo(gramian.dtype).eps)

        def meet(carry, others):
            mixtures, squares, target = carry
            met = (others != tasks) & (norms[others] > 0) & (squares > 0)
            product = jnp.sum(mixtures * products[others], axis=1)
            length = jnp.sqrt(jnp.where(met, squares, 1))
            cosine = jnp.clip(product / length, -1, 1)
            aim = target[tasks, others]
            tangent = aim / jnp.sqrt(jnp.maximum((1 - aim) * (1 + aim), eps))
            step = length * (tangent * jnp.sqrt((1 - cosine) * (1 + cosine)) - cosine)
            step = jnp.where(met & (cosine < aim), step, 0)
            moved = jnp.where(met, beta * (cosine - aim), 0)
            # |a + step u|^2, and 0 where the terms cancel.
            new = squares + 2 * step * product + step**2
            size = squares + 2 * jnp.abs(step * product) + step**2
            squares = jnp.where(new > rounding(gramian) * size, new, 0)
            mixtures = mixtures.at[tasks, others].add(step)
            return (mixtures, squares, target.at[tasks, others].add(moved)), None

        squares = (norms > 0).astype(gramian.dtype)
        start = (jnp.eye(number, dtype=gramian.dtype), squares, state.target.values)
        (mixtures, _, target), _ = jax.lax.scan(meet, start, orders.T)
        return weights_of_mixtures(mixtures, norms), GradVacState(Pairs(target), next_key)

    return vector_weighting(update, init, needs=Signal.GRAMIAN, reads_losses=False)
