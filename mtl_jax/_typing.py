"""Names for the types that all modules share."""

from typing import TYPE_CHECKING, Any, TypeAlias

from jaxtyping import Array, Bool, Float

if TYPE_CHECKING:
    PyTree: TypeAlias = Any  # strict type checkers call jaxtyping's unknown
else:
    from jaxtyping import PyTree

Losses = PyTree
"""A pytree of scalars, one for each task, such as ``{"depth": ..., "normals": ...}``.

A leaf of shape [n] is n tasks, so that many need not be as many leaves."""

Weights = PyTree
"""A pytree with the structure and the shapes of the losses."""

Vector = Float[Array, "tasks"]
"""One number for each task, in the order of the leaves of the losses."""

Mask = Bool[Array, "tasks"]
"""Which tasks are present, in that order."""

Gramian = Float[Array, "tasks tasks"]
"""The inner products of the task gradients, in that order."""

Products = Float[Array, "tasks directions"]
"""The inner products of the task gradients, in that order, with gradients on a second batch."""

__all__ = ["Gramian", "Losses", "Mask", "Products", "PyTree", "Vector", "Weights"]
