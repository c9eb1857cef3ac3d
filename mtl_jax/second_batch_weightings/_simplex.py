"""Weights on the simplex: they are not negative and sum to 1."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from mtl_jax._typing import Mask, Vector


def shares(weights: Vector, present: Mask) -> tuple[Vector, Float[Array, ""]]:
    """The weights of the present tasks as shares that sum to 1, and what they sum to.

    The shares are equal where the weights of all present tasks are 0.
    """
    number = jnp.maximum(jnp.sum(present, dtype=weights.dtype), 1)
    total = jnp.sum(weights, where=present)
    scaled = jnp.where(total > 0, weights / jnp.where(total > 0, total, 1), 1 / number)
    return jnp.where(present, scaled, 0), total


def nearest_shares(point: Vector, present: Mask) -> Vector:
    r"""The point of the simplex of the present tasks that is nearest to a point.

    It is :math:`\max(0, x_k - \theta)` with the :math:`\theta` for which it sums to 1, found
    exactly by sorting.
    """
    # Relative to the greatest entry, which changes nothing, so that no digits are lost.
    point = point - jnp.max(point, where=present, initial=-jnp.inf)
    descending = -jnp.sort(-jnp.where(present, point, -jnp.inf))
    number = jnp.arange(1, point.size + 1, dtype=point.dtype)
    # The threshold if so many of the greatest entries remain above it.
    thresholds = (jnp.cumsum(jnp.where(jnp.isfinite(descending), descending, 0)) - 1) / number
    remain = jnp.sum(descending > thresholds)
    threshold = thresholds[jnp.maximum(remain - 1, 0)]
    return jnp.where(present, jnp.maximum(point - threshold, 0), 0)
