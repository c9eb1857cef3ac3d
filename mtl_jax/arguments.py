"""Reading of arguments: an error names the argument and says what it must be."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree


def read_number(value: Any, what: str) -> float:
    """A parameter that is one real number, known when a method is made.

    Raises:
      TypeError: if it is something else, ``what`` being its name in the message.
    """
    try:
        array = np.asarray(value)
        kinds = (jnp.floating, jnp.integer)
        if not array.ndim and any(jnp.issubdtype(array.dtype, kind) for kind in kinds):
            return float(array)
    except (TypeError, ValueError):  # no array at all, ragged lists, or traced by JAX
        pass
    raise TypeError(f"{what} must be a number, got {value!r}.")


def check_numbers(values: PyTree, what: str, valid: Callable[[float], bool], wording: str) -> None:
    """Raise an error for a leaf that is no number, or not a ``valid`` one, as ``wording`` says."""
    for leaf in jax.tree.leaves(values):
        if not valid(read_number(leaf, what)):
            raise ValueError(f"{what} must be {wording}, got {leaf!r}.")


def check_option(value: Any, options: Sequence[str | None], what: str) -> None:
    """Raise a ``ValueError`` for what is none of the options."""
    if (value is None or isinstance(value, str)) and value in options:
        return
    *some, last = map(repr, options)
    raise ValueError(f"{what} must be {', '.join(some)} or {last}, got {value!r}.")


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
        if isinstance(leaf, jax.ShapeDtypeStruct) and not abstract:
            raise TypeError
        return jnp.shape(leaf), jnp.result_type(leaf)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"{what} is {leaf!r}, which is neither an array nor a number.") from None


def is_key(value: Any) -> bool:
    """Whether a value is a new-style random key, or an array of such."""
    return isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
