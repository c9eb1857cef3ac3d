"""The tasks of a pytree of losses: their names, which are present, and vectors over them."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mtl_jax._checks import leaf_name, leaf_types, read_array
from mtl_jax._typing import Losses, Mask, PyTree, Vector


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class Tasks:
    """What a method may know of its tasks before the first step.

    A state holds it, as a part that is not an array, so that it knows whose state it is.

    Attributes:
      structure: the structure of the losses.
      shapes: the shape of each of its leaves: () for one task, (n,) for n.
      names: the path of each loss, such as ``"depth"`` or ``"heads/0"``.
      dtype: the dtype of the method's arithmetic and state: the widest of the losses' dtypes, and
        at least float32.
    """

    structure: Any
    shapes: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]
    dtype: Any

    # JAX compares and hashes it at every call of a compiled step, so both are quick. The dtype does
    # not count: it follows from the losses.

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.structure, self.names)))

    def __reduce__(self) -> tuple[Any, ...]:
        # Made anew where it is sent: another process hashes strings in another way.
        return Tasks, tuple(getattr(self, field.name) for field in dataclasses.fields(self))

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

    def position(self, name: str, what: str) -> int:
        """The position of the task of a name in the order of the leaves.

        Raises:
          ValueError: if there is none.
        """
        if name not in self.names:
            raise ValueError(f"{what} must be one of {', '.join(self.names)}; got {name!r}.")
        return self.names.index(name)

    def vector(self, values: PyTree, what: str) -> Vector:
        """The vector of a parameter given for every task: one number, or a pytree like the losses.

        For a leaf of several tasks one number will do, too.

        Raises:
          ValueError: if ``values`` is neither a number nor of the losses' structure, or a leaf has
            another shape than that of the losses.
        """
        if jax.tree.structure(values) == jax.tree.structure(0) and not jnp.shape(values):
            return self.full(values)
        self.check_structure(jax.tree.structure(values), what)
        parts = []
        for (path, leaf), shape in zip(
            jax.tree_util.tree_leaves_with_path(values), self.shapes, strict=True
        ):
            if jnp.shape(leaf) not in ((), shape):
                raise ValueError(
                    f"{what}: the leaf {leaf_name(path)!r} has shape {jnp.shape(leaf)} instead of "
                    f"{shape}, that of the losses."
                )
            parts.append(jnp.broadcast_to(jnp.asarray(leaf, self.dtype), shape))
        return _join(parts)

    def numbers(self, values: PyTree, what: str) -> Vector:
        """The vector of a pytree like the losses, of real numbers that may be traced.

        Raises:
          ValueError: if it has another structure than the losses.
          TypeError: if a leaf is not of real numbers, or of another shape than that of the losses.
        """
        self.check_structure(jax.tree.structure(values), what)
        leaves = jax.tree_util.tree_leaves_with_path(values)
        types = leaf_types(values, what)
        for (path, _), (shape, dtype), wanted in zip(leaves, types, self.shapes, strict=True):
            real = any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer))
            if shape != wanted or not real:
                must = f"numbers of shape {wanted}" if wanted else "one number"
                raise TypeError(
                    f"{what}: {leaf_name(path)!r} has shape {shape} and dtype {dtype}; it must be "
                    f"{must}."
                )
        return _join([jnp.asarray(leaf).astype(self.dtype) for _, leaf in leaves])

    def check_structure(self, structure: Any, what: str) -> None:
        """Raise a ``ValueError`` for another structure than that of the losses."""
        if structure != self.structure:
            raise ValueError(
                f"{what} must have the structure of the losses, {describe(self.structure)}; got "
                f"{describe(structure)}."
            )

    def stack(self, values: PyTree) -> Vector:
        """A pytree like the losses as a vector, in the dtype of the method's arithmetic."""
        return _join(
            [
                read_array(leaf, f"The loss {leaf_name(path)!r}").astype(self.dtype)
                for path, leaf in jax.tree_util.tree_leaves_with_path(values)
            ]
        )

    def unstack(self, vector: Vector) -> PyTree:
        """A vector as a pytree like the losses."""
        return jax.tree.unflatten(self.structure, self.split(vector))

    def split(self, vector: Vector) -> list[Array]:
        """A vector as the leaves of the losses."""
        if not any(self.shapes):
            return list(jnp.unstack(vector))
        if len(self.shapes) == 1:
            return [vector]
        ends = list(itertools.accumulate(shape[0] if shape else 1 for shape in self.shapes))
        parts = zip([0, *ends], ends, self.shapes, strict=False)
        return [vector[start:end].reshape(shape) for start, end, shape in parts]


def _join(leaves: list[Array]) -> Vector:
    """The vector of the numbers in all leaves."""
    if not any(leaf.ndim for leaf in leaves):
        return jnp.stack(leaves)
    if len(leaves) == 1:
        return leaves[0]
    return jnp.concatenate([jnp.atleast_1d(leaf) for leaf in leaves])


def read_tasks(losses: Losses) -> Tasks:
    """Read and check the tasks of a pytree of losses.

    Raises:
      ValueError: if there are none, or a leaf is neither a scalar nor a vector.
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
    names: list[str] = []
    for (path, _), (shape, _) in zip(
        jax.tree_util.tree_leaves_with_path(losses), types, strict=True
    ):
        name = leaf_name(path)
        if len(shape) > 1 or 0 in shape:
            raise ValueError(
                f"The loss {name!r} has shape {shape}; a task's loss is a scalar, and a vector "
                "holds those of several tasks. Reduce it over the batch first, for example with "
                "`mtl_jax.masked_mean`."
            )
        prefix = f"{name}/" if name else ""
        names += [f"{prefix}{k}" for k in range(shape[0])] if shape else [name]
    return Tasks(
        structure=jax.tree.structure(losses),
        shapes=tuple(shape for shape, _ in types),
        names=tuple(names),
        dtype=at_least_float32(*(dtype for _, dtype in types)),
    )


def read_mask(mask: PyTree | None, tasks: Tasks) -> Mask:
    """Read and check the mask: which tasks are present; all of them without a mask."""
    if mask is None:
        return jnp.ones((tasks.number,), bool)
    tasks.check_structure(jax.tree.structure(mask), "The mask")
    leaves = jax.tree_util.tree_leaves_with_path(mask)
    types = leaf_types(mask, "The mask's leaf")
    for (path, _), (shape, dtype), wanted in zip(leaves, types, tasks.shapes, strict=True):
        if shape != wanted or dtype != jnp.bool_:
            booleans = f"booleans of shape {wanted}" if wanted else "one boolean"
            raise TypeError(
                f"The mask's leaf {leaf_name(path)!r} has shape {shape} and dtype {dtype}; it must "
                f"be {booleans}, whether the task has labels in this batch."
            )
    return _join([jnp.asarray(leaf) for _, leaf in leaves])


def at_least_float32(*dtypes: Any) -> Any:
    """The widest of real dtypes, float32 being the narrowest; under strict promotion, too."""
    return jnp.dtype("float64" if jnp.dtype("float64") in dtypes else "float32")


def arithmetic_dtype(dtype: Any, *others: Any) -> Any:
    """The dtype to compute in with an array of ``dtype``: at least float32, complex if that is."""
    real = at_least_float32(jnp.finfo(dtype).dtype, *others)
    if not jnp.issubdtype(dtype, jnp.complexfloating):
        return real
    return jnp.dtype("complex64" if real == jnp.float32 else "complex128")


def square_limit(dtype: Any) -> float:
    """A number whose square, and the sum of many such, is finite."""
    return 1e-4 * float(jnp.finfo(dtype).max) ** 0.5


def describe(structure: Any) -> str:
    """The structure, for an error message: ``{'a': *, 'b': *}``."""
    return str(structure).removeprefix("PyTreeDef(").removesuffix(")")
