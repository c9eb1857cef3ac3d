"""Means over the labelled part of a batch."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtl_jax._checks import read_array
from mtl_jax._tasks import at_least_float32


def masked_mean(values: Float[Array, "..."], present: Bool[Array, "..."]) -> Float[Array, ""]:
    r"""Mean of the values of present examples; 0, with a zero gradient, where there are none.

    .. math:: \frac{\sum_i m_i v_i}{\max(1, \sum_i m_i)}

    Take it for every loss with missing labels. A plain quotient is 0/0 for a task without labels,
    and its gradient NaN, which no weight of 0 can undo. The value of an absent example may be
    anything, NaN included; only where it comes from must have a finite derivative.

    Args:
      values: one loss for each example, with any further axes, which are averaged over too.
      present: whether each example has a label; its shape is that of the leading axes of
        ``values``.

    Returns:
      The mean, in the dtype of the values but at least float32.

    Raises:
      ValueError: if the shape of ``present`` is not that of the leading axes of ``values``.
      TypeError: if ``present`` is not boolean, or ``values`` not of real numbers.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_jax
      >>> values = jnp.array([1.0, 3.0, jnp.nan])
      >>> float(mtl_jax.masked_mean(values, jnp.array([True, True, False])))
      2.0
      >>> float(mtl_jax.masked_mean(values, jnp.array([False, False, False])))
      0.0
    """
    values, present = read_array(values, "`values`"), read_array(present, "`present`")
    kinds = (jnp.floating, jnp.integer, jnp.bool_)
    if not any(jnp.issubdtype(values.dtype, kind) for kind in kinds):
        raise TypeError(f"`values` must be real numbers, got {values.dtype}.")
    if present.dtype != jnp.bool_:
        raise TypeError(f"`present` must be boolean, got {present.dtype}.")
    if present.shape != values.shape[: present.ndim]:
        raise ValueError(
            f"`present` has shape {present.shape}, which is not that of the leading axes of the "
            f"values, {values.shape}."
        )
    present = jnp.reshape(present, present.shape + (1,) * (values.ndim - present.ndim))
    present = jnp.broadcast_to(present, values.shape)
    dtype = at_least_float32(values.dtype)
    total = jnp.sum(jnp.where(present, values.astype(dtype), 0))
    count = jnp.sum(present, dtype=dtype)
    return total / jnp.maximum(count, 1)
