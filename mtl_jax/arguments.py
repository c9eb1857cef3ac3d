"""Reading of arguments: an error names the argument and says what it must be."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mtl_jax.pytree import PyTree


def read_number(
    value: Any, what: str, valid: Callable[[float], bool] = lambda number: True, wording: str = ""
) -> float:
    """A parameter that is one real number, known when a method is made.

    Args:
      value: the parameter.
      what: its name in the error messages.
      valid: whether a number will do.
      wording: what the number must be.

    Raises:
      TypeError: if it is something else.
      ValueError: if it is not valid.
    """
    try:
        array = np.asarray(value)
        real = any(jnp.issubdtype(array.dtype, kind) for kind in (jnp.floating, jnp.integer))
        number = float(array) if real and not array.ndim else None
    except (TypeError, ValueError):  # no array at all, ragged lists, or traced by JAX
        number = None
    if number is None:
        raise TypeError(f"{what} must be a number, got {value!r}.")
    if not valid(number):
        raise ValueError(f"{what} must be {wording}, got {value!r}.")
    return number


def check_numbers(values: PyTree, what: str, valid: Callable[[float], bool], wording: str) -> None:
    """Raise an error for a leaf that is no number, or not a valid one (:func:`read_number`)."""
    for leaf in jax.tree.leaves(values):
        read_number(leaf, what, valid, wording)


def check_option(value: Any, options: Sequence[str | None], what: str) -> None:
    """Raise a ``ValueError`` for what is none of the options."""
    if (value is None or isinstance(value, str)) and value in options:
        return
    *some, last = map(repr, options)
    raise ValueError(f"{what} must be {', '.join(some)} or {last}, got {value!r}.")


def check_flag(value: Any, what: str) -> None:
    """Raise a ``TypeError`` for what is neither ``True`` nor ``False``."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{what} must be True or False, got {value!r}.")


def check_function(value: Any, what: str) -> None:
    """Raise a ``TypeError`` for what cannot be called."""
    if not callable(value):
        raise TypeError(f"{what} must be a function, got {value!r}.")


def read_array(value: Any, what: str) -> Array:
    """An argument that is an array, or becomes one.

    Raises:
      TypeError: if it does not, ``what`` being its name in the message.
    """
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"{what} must be an array, got {value!r}.") from None


def leaf_type(leaf: Any, what: str, *, abstract: bool = False) -> tuple[tuple[int, ...], Any]:
    """The shape and the dtype of a leaf of a pytree.

    Args:
      leaf: the leaf.
      what: its name in the error message.
      abstract: whether a ``jax.ShapeDtypeStruct`` will do.

    Raises:
      TypeError: if it is neither an array nor a number.
    """
    try:
        shapes_alone = isinstance(leaf, jax.ShapeDtypeStruct)
        if jax.tree_util.all_leaves([leaf]) and (abstract or not shapes_alone):
            dtype = jnp.result_type(leaf)  # which complains where `shape` may not
            return jnp.shape(leaf), dtype
    except (TypeError, ValueError, OverflowError):
        pass
    raise TypeError(f"{what} is {leaf!r}, which is neither an array nor a number.")


def is_key(value: Any) -> bool:
    """Whether a value is a new-style random key, or an array of such."""
    return isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
