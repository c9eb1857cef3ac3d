"""The tasks of a pytree of losses: their names, which are present, and vectors over them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax._checks import leaf_name, leaf_types, read_array
from mtl_jax._typing import Losses, Mask, PyTree, Vector


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class Tasks:
    """What a method may know of its tasks before the first step.

    A state holds it, as a part that is not an array, so that it knows whose state it is.

    Attributes:
      structure: the structure of the losses.
      names: the path of each loss, such as ``"depth"`` or ``"heads/0"``.
      dtype: the dtype of the method's arithmetic and state: the widest of the losses' dtypes, and
        at least float32.
    """

    structure: Any
    names: tuple[str, ...]
    dtype: Any

    # JAX compares and hashes it at every call of a compiled step, so both are quick. The dtype does
    # not count: it follows from the losses.

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.structure, self.names)))

    def __hash__(self) -> int:
        return self._hash  # pyright: ignore[reportAttributeAccessIssue]

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Tasks):
            return NotImplemented
        return self.names == other.names and self.structure == other.structure

    @property
    def number(self) -> int:
        """The number of tasks, K."""
        return len(self.names)

    def full(self, value: float) -> Vector:
        """The vector whose every entry is ``value``."""
        return jnp.full((self.number,), value, self.dtype)

    def vector(self, values: PyTree, what: str) -> Vector:
        """The vector of a parameter given for every task: one number, or a pytree like the losses.

        Raises:
          ValueError: if ``values`` is neither a number nor of the losses' structure.
        """
        structure = jax.tree.structure(values)
        if structure == jax.tree.structure(0):
            return self.full(values)
        self.check_structure(structure, what)
        return jnp.stack([jnp.asarray(leaf, self.dtype) for leaf in jax.tree.leaves(values)])

    def numbers(self, values: PyTree, what: str) -> Vector:
        """The vector of a pytree like the losses, of real numbers that may be traced.

        Raises:
          ValueError: if it has another structure than the losses.
          TypeError: if a leaf is not one real number.
        """
        self.check_structure(jax.tree.structure(values), what)
        for name, (shape, dtype) in zip(self.names, leaf_types(values, what), strict=True):
            if shape or not any(
                jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer)
            ):
                raise TypeError(
                    f"{what}: {name!r} has shape {shape} and dtype {dtype}; it must be one number."
                )
        return jnp.stack([jnp.asarray(leaf).astype(self.dtype) for leaf in jax.tree.leaves(values)])

    def check_structure(self, structure: Any, what: str) -> None:
        """Raise a ``ValueError`` for another structure than that of the losses."""
        if structure != self.structure:
            raise ValueError(
                f"{what} must have the structure of the losses, {describe(self.structure)}; got "
                f"{describe(structure)}."
            )

    def stack(self, values: PyTree) -> Vector:
        """A pytree like the losses as a vector, in the dtype of the method's arithmetic."""
        named = zip(self.names, jax.tree.leaves(values), strict=True)
        return jnp.stack(
            [read_array(leaf, f"The loss {name!r}").astype(self.dtype) for name, leaf in named]
        )

    def unstack(self, vector: Vector) -> PyTree:
        """A vector as a pytree like the losses."""
        return jax.tree.unflatten(self.structure, jnp.unstack(vector))


def read_tasks(losses: Losses) -> Tasks:
    """Read and check the tasks of a pytree of losses.

    Raises:
      ValueError: if there are none, or one is not a scalar.
      TypeError: if one is not a real floating-point number.
    """
    types = leaf_types(
        losses,
        "The loss",
        jnp.floating,
        "; a task's loss is a real floating-point number.",
        abstract=True,
    )
    if not types:
        raise ValueError("There are no losses: expected a pytree with one scalar for each task.")
    names = tuple(leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(losses))
    for name, (shape, _) in zip(names, types, strict=True):
        if shape:
            raise ValueError(
                f"The loss {name!r} has shape {shape}; a task's loss is a scalar. "
                "Reduce it over the batch first, for example with `mtl_jax.masked_mean`."
            )
    return Tasks(
        structure=jax.tree.structure(losses),
        names=names,
        dtype=at_least_float32(*(dtype for _, dtype in types)),
    )


def read_mask(mask: PyTree | None, tasks: Tasks) -> Mask:
    """Read and check the mask: which tasks are present; all of them without a mask."""
    if mask is None:
        return jnp.ones((tasks.number,), bool)
    tasks.check_structure(jax.tree.structure(mask), "The mask")
    for name, (shape, dtype) in zip(tasks.names, leaf_types(mask, "The mask's leaf"), strict=True):
        if shape or dtype != jnp.bool_:
            raise TypeError(
                f"The mask's leaf {name!r} has shape {shape} and dtype {dtype}; it must be one "
                "boolean, whether the task has labels in this batch."
            )
    return jnp.stack([jnp.asarray(leaf) for leaf in jax.tree.leaves(mask)])


def at_least_float32(*dtypes: Any) -> Any:
    """The widest of real dtypes, float32 being the narrowest; under strict promotion, too."""
    return jnp.dtype("float64" if jnp.dtype("float64") in dtypes else "float32")


def arithmetic_dtype(dtype: Any, *others: Any) -> Any:
    """The dtype to compute in with an array of ``dtype``: at least float32, complex if that is."""
    real = at_least_float32(jnp.finfo(dtype).dtype, *others)
    if not jnp.issubdtype(dtype, jnp.complexfloating):
        return real
    return jnp.dtype("complex64" if real == jnp.float32 else "complex128")


def describe(structure: Any) -> str:
    """The structure, for an error message: ``{'a': *, 'b': *}``."""
    return str(structure).removeprefix("PyTreeDef(").removesuffix(")")
