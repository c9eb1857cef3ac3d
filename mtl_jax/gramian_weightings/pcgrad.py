"""Gradient surgery (PCGrad)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from mtl_jax._base import Signal, Weighting
from mtl_jax._checks import read_array, require_key
from mtl_jax._lift import vector_weighting
from mtl_jax.gramian_weightings._spectral import cosines, gradient_norms

Order = Callable[[Array | None, int], Int[Array, "tasks tasks"]]
"""``order(key, number)``: in row i, all tasks in the order in which task i meets them."""


class PCGradState(NamedTuple):
    """The key from which the next orders are drawn, or ``None`` where there is none."""

    key: Key[Array, ""] | None


def pcgrad(order: Order | None = None) -> Weighting:
    r"""PCGrad: each task gradient is projected away from the conflicts with the others.

    For each task i, start with :math:`a = g_i` and meet the other tasks j in random order:

    .. math:: a \leftarrow a - \frac{\min(0, \langle a, g_j \rangle)}{\lVert g_j \rVert^2}\, g_j;
              \qquad g = \sum_i a_i.

    The weights are the coefficients of this g in the task gradients, found from the Gramian alone.
    They are at least 1, and exactly 1 where no two tasks conflict. As in the paper the results
    are summed; some published code takes their mean, which is g / K. A task does not meet itself,
    as in the paper (many implementations let it), and each task has a fresh order of its own. The
    losses are not read: they may be 0 or negative.

    Args:
      order: ``order(key, number) -> int[number, number]``, a function whose row i holds the
        tasks, counted as the leaves of the losses, in the order in which task i meets them; i
        itself is passed over. By default every row is a random permutation. For the one fixed
        order of ConFIG's code: ``lambda key, number: jnp.tile(jnp.arange(number), (number, 1))``.

    Returns:
      The weighting. Its ``init`` needs ``key``, unless an ``order`` that needs none is given.

    Raises:
      ValueError: in ``init``, if the key is missing; in ``update``, if the order's shape is wrong.
      TypeError: if ``order`` is not a function; in ``update``, if it does not return integers.

    References:
      Yu et al., `Gradient Surgery for Multi-Task Learning <https://arxiv.org/abs/2001.06782>`_,
      NeurIPS 2020

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import mtl_jax
      >>> weighting = mtl_jax.pcgrad()
      >>> state = weighting.init((1.0, 1.0), key=jax.random.key(0))
      >>> gramian = jnp.array([[1.0, -1.0], [-1.0, 4.0]])
      >>> weights, state = weighting.update((1.0, 1.0), state, gramian=gramian)
      >>> [float(weight) for weight in weights]
      [2.0, 1.25]
    """
    check_order(order, "pcgrad")

    def init(tasks, key):
        return PCGradState(require_key(key, "pcgrad") if order is None else key)

    def update(losses, state, present, steps, gramian):
        number = gramian.shape[0]
        orders, next_key = draw_orders(order, state.key, number, "pcgrad")
        norms, products = gradient_norms(gramian), cosines(gramian)
        tasks = jnp.arange(number)

        def meet(mixtures, others):
            product = jnp.sum(mixtures * products[others], axis=1)
            conflict = (product < 0) & (others != tasks)
            return mixtures.at[tasks, others].add(jnp.where(conflict, -product, 0)), None

        mixtures, _ = jax.lax.scan(meet, jnp.eye(number, dtype=gramian.dtype), orders.T)
        return weights_of_mixtures(mixtures, norms), PCGradState(next_key)

    return vector_weighting(update, init, needs=Signal.GRAMIAN, reads_losses=False)


def weights_of_mixtures(
    mixtures: Float[Array, "tasks tasks"], norms: Float[Array, "tasks"]
) -> Float[Array, "tasks"]:
    r"""The weights of the sum over i of the gradients :math:`\lVert g_i \rVert \sum_k b_{ik} u_k`.

    Args:
      mixtures: b, the coefficients in the unit gradients u.
      norms: the norms of the gradients; one that is zero is mixed with no other.
    """
    divisor = jnp.where(norms > 0, norms, 1)
    sums = jnp.sum(mixtures * norms[:, None], axis=0) / divisor
    return jnp.where(norms > 0, sums, 1)


def random_orders(key: Array | None, number: int) -> Int[Array, "tasks tasks"]:
    """For each task, a random permutation of all tasks."""
    assert key is not None
    orders = jnp.tile(jnp.arange(number), (number, 1))
    return jax.random.permutation(key, orders, axis=1, independent=True)


def check_order(order: Order | None, method: str) -> None:
    """Raise an error for what cannot be an order."""
    if order is not None and not callable(order):
        raise TypeError(f"{method}: `order` must be a function order(key, number), got {order!r}.")


def draw_orders(
    order: Order | None, key: Array | None, number: int, method: str
) -> tuple[Int[Array, "tasks tasks"], Array | None]:
    """The orders of this step, checked, and the next key."""
    next_key, key = (None, None) if key is None else jax.random.split(key)
    orders = read_array((order or random_orders)(key, number), f"{method}: what `order` returned")
    if orders.shape != (number, number):
        raise ValueError(
            f"{method}: `order` must return an array of shape {(number, number)}, in each row the "
            f"order in which one task meets the others; got {orders.shape}."
        )
    if not jnp.issubdtype(orders.dtype, jnp.integer):
        raise TypeError(f"{method}: `order` must return integers, got {orders.dtype}.")
    return orders, next_key
