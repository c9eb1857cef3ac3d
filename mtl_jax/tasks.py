"""Reading the tasks of a pytree of losses: names, dtype, mask, and the errors they can have."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtl_jax.arguments import leaf_type, read_array
from mtl_jax.pytree import PyTree

Losses = PyTree
"""A pytree of scalars, one for each task, such as ``{"depth": ..., "normals": ...}``."""

Weights = PyTree
"""A pytree of scalars with the structure of the losses."""


class Tasks(NamedTuple):
    """What a method may know of its tasks before the first step.

    Attributes:
      structure: the structure of the losses.
      names: the path of each loss, such as ``"depth"`` or ``"heads/0"``.
      dtype: the dtype of the method's arithmetic and state: the widest of the losses' dtypes, and
        at least float32.
    """

    structure: Any
    names: tuple[str, ...]
    dtype: Any

    @property
    def number(self) -> int:
        """The number of tasks, K."""
        return len(self.names)

    def full(self, value: float) -> Float[Array, "tasks"]:
        """The vector whose every entry is ``value``."""
        return jnp.full((self.number,), value, self.dtype)

    def vector(self, values: PyTree, what: str) -> Float[Array, "tasks"]:
        """The vector of a parameter given for every task: one number, or a pytree like the losses.

        Raises:
          ValueError: if ``values`` is neither a number nor of the losses' structure.
        """
        structure = jax.tree.structure(values)
        if structure == jax.tree.structure(0):
            return self.full(values)
        if structure != self.structure:
            raise ValueError(
                f"{what} must have the structure of the losses, {describe(self.structure)}; got "
                f"{describe(structure)}."
            )
        return jnp.stack([jnp.asarray(leaf, self.dtype) for leaf in jax.tree.leaves(values)])


def at_least_float32(*dtypes: Any) -> Any:
    """The widest of real dtypes, float32 being the narrowest; under strict promotion, too."""
    return jnp.dtype("float64" if jnp.dtype("float64") in dtypes else "float32")


def arithmetic_dtype(dtype: Any, *others: Any) -> Any:
    """The dtype to compute in with an array of ``dtype``: at least float32, complex if that is."""
    real = at_least_float32(jnp.finfo(dtype).dtype, *others)
    if not jnp.issubdtype(dtype, jnp.complexfloating):
        return real
    return jnp.dtype("complex64" if real == jnp.float32 else "complex128")


def leaf_name(path: Any) -> str:
    """The path of a leaf, such as ``heads/0``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def describe(structure: Any) -> str:
    """The structure, for an error message: ``{'a': *, 'b': *}``."""
    return str(structure).removeprefix("PyTreeDef(").removesuffix(")")


def read_tasks(losses: Losses) -> Tasks:
    """Read and check the tasks of a pytree of losses."""
    leaves = jax.tree_util.tree_leaves_with_path(losses)
    if not leaves:
        raise ValueError("There are no losses: expected a pytree with one scalar for each task.")
    for path, leaf in leaves:
        shape, dtype = leaf_type(leaf, f"The loss {leaf_name(path)!r}", abstract=True)
        if shape:
            raise ValueError(
                f"The loss {leaf_name(path)!r} has shape {shape}; a task's loss is a scalar. "
                "Reduce it over the batch first, for example with `mtl_jax.masked_mean`."
            )
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"The loss {leaf_name(path)!r} has dtype {dtype}; a task's loss is a real "
                "floating-point number."
            )
    return Tasks(
        structure=jax.tree.structure(losses),
        names=tuple(leaf_name(path) for path, _ in leaves),
        dtype=at_least_float32(*(jnp.result_type(leaf) for _, leaf in leaves)),
    )


def read_mask(mask: PyTree | None, tasks: Tasks) -> Bool[Array, "tasks"]:
    """Read and check the mask: which tasks are present; all of them without a mask."""
    if mask is None:
        return jnp.ones((tasks.number,), bool)
    structure = jax.tree.structure(mask)
    if structure != tasks.structure:
        raise ValueError(
            f"The mask must have the structure of the losses, {describe(tasks.structure)}; got "
            f"{describe(structure)}."
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(mask):
        shape, dtype = leaf_type(leaf, f"The mask's leaf {leaf_name(path)!r}")
        if shape or dtype != jnp.bool_:
            raise TypeError(
                f"The mask's leaf {leaf_name(path)!r} has shape {shape} and dtype {dtype}; it must "
                "be one boolean, whether the task has labels in this batch."
            )
    return jnp.stack([jnp.asarray(leaf) for leaf in jax.tree.leaves(mask)])


def stack_tasks(values: PyTree, tasks: Tasks) -> Float[Array, "tasks"]:
    """The losses or weights as a vector, in the dtype of the method's arithmetic."""
    named = zip(tasks.names, jax.tree.leaves(values), strict=True)
    return jnp.stack(
        [read_array(leaf, f"The loss {name!r}").astype(tasks.dtype) for name, leaf in named]
    )


def unstack_tasks(vector: Float[Array, "tasks"], tasks: Tasks) -> PyTree:
    """The vector as a pytree like the losses."""
    return jax.tree.unflatten(tasks.structure, jnp.unstack(vector))
