"""Checks of parameters that several methods share; each error names the method and the way out."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from mtl_jax.arguments import is_key, read_number
from mtl_jax.base import Aggregator, Weighting


def read_key(key: Array | None) -> Array | None:
    """The key as a new-style one; an error for what is no key."""
    if key is None:
        return None
    given = key
    if isinstance(key, jax.Array) and key.dtype == jnp.uint32:
        # The data of a key, as jax.random.PRNGKey returns it; or an array of another shape.
        with contextlib.suppress(TypeError, ValueError):
            key = jax.random.wrap_key_data(key)
    if not is_key(key) or key.shape:
        raise TypeError(f"`key` must be one jax.random.key, got {given!r}.")
    return key


def require_key(key: Array | None, method: str) -> Array:
    """The key, or an error that says where it is to be given."""
    if key is None:
        raise ValueError(
            f"{method} draws random numbers: call its `init` with key=jax.random.key(seed)."
        )
    return key


def positive_steps(value: int, name: str, method: str) -> int:
    """The number of steps, checked to be a positive integer."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise ValueError(
            f"{method}: `{name}` is a number of training steps, an integer of at least 1, "
            f"got {value!r}."
        )
    return int(value)


def check_decay(decay: float, method: str) -> None:
    """Raise an error for a decay outside [0, 1)."""
    if not 0 <= read_number(decay, f"{method}: `decay`") < 1:
        raise ValueError(f"{method}: `decay` must be in [0, 1), got {decay!r}.")


def check_positive(value: float, name: str, method: str) -> None:
    """Raise an error for a parameter that is not a positive, finite number."""
    if not 0 < read_number(value, f"{method}: `{name}`") < float("inf"):
        raise ValueError(f"{method}: `{name}` must be positive and finite, got {value!r}.")


def check_at_least_zero(value: float, name: str, method: str) -> None:
    """Raise an error for a parameter that is negative or not finite."""
    if not 0 <= read_number(value, f"{method}: `{name}`") < float("inf"):
        raise ValueError(f"{method}: `{name}` must be at least 0 and finite, got {value!r}.")


def check_optimizer(optimizer: Any, method: str) -> None:
    """Raise an error for what is not an optax optimizer."""
    if not isinstance(optimizer, optax.GradientTransformation):
        hint = " Did you mean to call it?" if callable(optimizer) else ""
        raise TypeError(
            f"{method}: `optimizer` must be an optax optimizer, such as optax.adam(1e-3), got "
            f"{optimizer!r}.{hint}"
        )


def check_weighting(weighting: Any) -> None:
    """Raise a ``TypeError`` for what is not a weighting."""
    if isinstance(weighting, Weighting):
        return
    if isinstance(weighting, Aggregator):
        raise TypeError(
            "Expected a Weighting, got an Aggregator: it combines the task gradients coordinate "
            "by coordinate and has no weights. mtl_jax.value_and_grad takes it."
        )
    hint = " Did you mean to call it?" if callable(weighting) else ""
    raise TypeError(f"Expected a Weighting, such as mtl_jax.equal(), got {weighting!r}.{hint}")
