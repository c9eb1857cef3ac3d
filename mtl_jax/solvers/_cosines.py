"""What the solvers share: a Gramian taken apart into lengths and cosines."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from mtl_jax._checks import is_traced, leaf_type, read_array


class Solution(NamedTuple):
    """What a solver found.

    Attributes:
      x: one weight for each task; 0 for an absent task.
      residual: by how much ``x`` violates the conditions of optimality, whatever the scale of the
        gradients: about the rounding error of the dtype where the problem is solved.
    """

    x: Float[Array, "tasks"]
    residual: Float[Array, ""]


class Rows(NamedTuple):
    """A Gramian taken apart into lengths and cosines, 0 where a task does not count."""

    present: Bool[Array, "tasks"]
    usable: Bool[Array, "tasks"]  # present, with a length
    zero: Bool[Array, "tasks"]  # present, without
    unit: Float[Array, ""]  # the largest length, in which the lengths are measured
    lengths: Float[Array, "tasks"]  # 1 where not usable
    cosines: Float[Array, "tasks tasks"]
    eps: float  # the rounding unit of the Gramian's entries


def read_gramian(
    gramian: Float[Array, "tasks tasks"], present: Bool[Array, "tasks"] | None, eps: float
) -> Rows:
    """Check the arguments of a solver and take the Gramian apart."""
    gramian = read_array(gramian, "The Gramian")
    if gramian.ndim != 2 or gramian.shape[0] != gramian.shape[1] or not gramian.size:
        raise ValueError(f"A Gramian is tasks x tasks, got an array of shape {gramian.shape}.")
    if not jnp.issubdtype(gramian.dtype, jnp.floating):
        raise TypeError(f"The Gramian must hold real floating-point numbers, got {gramian.dtype}.")
    K = gramian.shape[0]
    present = jnp.ones((K,), bool) if present is None else read_array(present, "`present`")
    if present.shape != (K,):
        raise ValueError(f"`present` must have shape ({K},) as the tasks, got {present.shape}.")
    if present.dtype != jnp.bool_:
        raise TypeError(f"`present` must be boolean, got {present.dtype}.")
    squares = jnp.where(present, jnp.diagonal(gramian), 0)
    usable = ~(squares <= 0)
    lengths = jnp.where(usable, jnp.sqrt(jnp.where(usable, squares, 1)), 1)
    cosines = gramian / lengths[:, None] / lengths[None, :]
    cosines = jnp.where(usable[:, None] & usable[None, :], cosines, 0)
    unit = jnp.max(jnp.where(usable, lengths, 0), initial=0)
    unit = jnp.where(unit > 0, unit, 1)
    lengths = jnp.where(usable, lengths / unit, 1)
    return Rows(present, usable, present & ~usable, unit, lengths, cosines, eps)


def read_vector(value: Float[Array, "tasks"], name: str, rows: Rows) -> Float[Array, "tasks"]:
    """The vector, checked, with 0 for absent tasks."""
    value = read_array(value, f"`{name}`")
    if value.shape != rows.lengths.shape:
        raise ValueError(
            f"`{name}` must have shape {rows.lengths.shape} as the tasks, got {value.shape}."
        )
    if not _is_real(value.dtype):
        raise TypeError(f"`{name}` must hold real numbers, got {value.dtype}.")
    return jnp.where(rows.present, value.astype(rows.lengths.dtype), 0)


def check_at_least_zero(
    value: float | Float[Array, ""], name: str, *, strictly: bool = False
) -> None:
    """Raise an error for a parameter that is no scalar, or a number out of its range."""
    shape, dtype = leaf_type(value, f"`{name}`")
    if shape:
        raise ValueError(f"`{name}` must be a scalar, got an array of shape {shape}.")
    if not _is_real(dtype):
        raise TypeError(f"`{name}` must be a real number, got {dtype}.")
    if is_traced(value):
        return
    if not (float(value) > 0 if strictly else float(value) >= 0):
        bound = "more than 0" if strictly else "at least 0"
        raise ValueError(f"`{name}` must be {bound}, got {value!r}.")


def _is_real(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def product(matrix: Float[Array, "m n"], vector: Float[Array, "n"]) -> Float[Array, "m"]:
    """Their product in full precision, which accelerators do not use by default."""
    return jnp.matmul(matrix, vector, precision=lax.Precision.HIGHEST)


def inverse_lengths(rows: Rows) -> Float[Array, "tasks"]:
    """The inverse lengths, the largest of them being 1; 0 where a task is not usable."""
    least = jnp.min(jnp.where(rows.usable, rows.lengths, jnp.inf), initial=jnp.inf)
    return jnp.where(rows.usable, least / rows.lengths, 0)


def mean_of(chosen: Bool[Array, "tasks"], dtype: DTypeLike) -> Float[Array, "tasks"]:
    """The weights of the mean over the chosen tasks; 0 if there are none."""
    return chosen.astype(dtype) / jnp.maximum(jnp.sum(chosen, dtype=dtype), 1)


def complementarity(y: Float[Array, "tasks"], z: Float[Array, "tasks"]) -> Float[Array, ""]:
    """By how much y >= 0, z >= 0, y'z = 0 are violated."""
    return jnp.max(jnp.abs(jnp.minimum(y, z)), initial=0)


def safe_divide(top: Array, bottom: Array, otherwise: float = 0) -> Array:
    """The quotient where the divisor is positive, else another value."""
    return jnp.where(bottom > 0, top / jnp.where(bottom > 0, bottom, 1), otherwise)


def root(square: Array) -> Array:
    """The square root of what only rounding can have made negative."""
    return jnp.sqrt(jnp.maximum(square, 0))
