"""Checks of parameters that several methods share; each error names the method and the way out."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from mtl_jax.arguments import check_function, is_key, read_number
from mtl_jax.base import Aggregator, Weighting


def read_key(key: Array | None) -> Array | None:
    """The key as a new-style one; an error for what is no key."""
    if key is None:
        return None
    found = key
    if isinstance(key, jax.Array) and key.dtype == jnp.uint32:
        # The data of a key, as jax.random.PRNGKey returns it; or an array of another shape.
        with contextlib.suppress(TypeError, ValueError):
            found = jax.random.wrap_key_data(key)
    if not is_key(found) or found.shape:
        raise TypeError(f"`key` must be one jax.random.key, got {key!r}.")
    return found


def require_key(key: Array | None, method: str) -> Array:
    """The key, or an error that says where it is to be given."""
    if key is None:
        raise ValueError(
            f"{method} draws random numbers: call its `init` with key=jax.random.key(seed)."
        )
    return key


def positive_steps(value: int, name: str, method: str) -> int:
    """The number of steps, checked to be a positive integer."""
    integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not integer or not 1 <= value < 2**31:
        raise ValueError(
            f"{method}: `{name}` is a number of training steps, an integer of at least 1 and below "
            f"2**31, got {value!r}."
        )
    return int(value)


def read_decay(decay: float, method: str) -> float:
    """The decay, checked to be in [0, 1)."""
    return read_number(decay, f"{method}: `decay`", lambda d: 0 <= d < 1, "in [0, 1)")


def read_positive(value: float, name: str, method: str) -> float:
    """The parameter, checked to be positive and finite."""
    return read_number(
        value, f"{method}: `{name}`", lambda x: 0 < x < float("inf"), "positive and finite"
    )


def read_at_least_zero(value: float, name: str, method: str) -> float:
    """The parameter, checked to be at least 0 and finite."""
    return read_number(
        value, f"{method}: `{name}`", lambda x: 0 <= x < float("inf"), "at least 0 and finite"
    )


def check_optimizer(optimizer: Any, method: str) -> None:
    """Raise an error for what is not an optax optimizer."""
    if not isinstance(optimizer, optax.GradientTransformation) or not all(map(callable, optimizer)):
        hint = " Did you mean to call it?" if callable(optimizer) else ""
        raise TypeError(
            f"{method}: `optimizer` must be an optax optimizer, such as optax.adam(1e-3), got "
            f"{optimizer!r}.{hint}"
        )


def check_aggregator(aggregator: Aggregator) -> None:
    """Raise a ``TypeError`` for an aggregator whose parts are no functions."""
    for name in Aggregator._fields:
        check_function(getattr(aggregator, name), f"The aggregator's `{name}`")


def check_weighting(weighting: Any) -> None:
    """Raise a ``TypeError`` for what is not a weighting."""
    if isinstance(weighting, Weighting):
        for name in ("init", "update", "observe", "due"):
            function = getattr(weighting, name)
            if function is not None or name in ("init", "update"):
                check_function(function, f"The weighting's `{name}`")
        return
    if isinstance(weighting, Aggregator):
        raise TypeError(
            "Expected a Weighting, got an Aggregator: it combines the task gradients coordinate "
            "by coordinate and has no weights. mtl_jax.value_and_grad takes it."
        )
    hint = " Did you mean to call it?" if callable(weighting) else ""
    raise TypeError(f"Expected a Weighting, such as mtl_jax.equal(), got {weighting!r}.{hint}")
