"""Preferences among the tasks, as several methods take them."""

import jax.numpy as jnp

from mtl_jax._checks import check_numbers
from mtl_jax._tasks import Tasks
from mtl_jax._typing import Mask, PyTree, Vector


def check_preference(preference: PyTree | None, method: str) -> None:
    """Raise an error for a preference that is not of numbers of at least 0."""
    check_numbers(preference, f"{method}: a preference", "[0, inf)")


def preference_vector(preference: PyTree | None, tasks: Tasks, method: str) -> Vector:
    """The preference as a vector, 1 for each task if none is given: for the method's state."""
    return tasks.vector(1.0 if preference is None else preference, f"{method}: `preference`")


def among_present(vector: Vector, preference: PyTree | None, present: Mask) -> Vector:
    """The preference as given, or 1/K for each of the K present tasks; 0 for absent ones."""
    number = jnp.maximum(jnp.sum(present, dtype=vector.dtype), 1)
    return jnp.where(present, vector / (number if preference is None else 1), 0)
