"""The ways to compute the task gradients and their Gramian, and which parameters enter it."""

import itertools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jaxtyping import Array, Float

from mtl_jax.pytree import PyTree
from mtl_jax.rows import weighted_sum
from mtl_jax.sharding import contracted, may_be_spread, sum_over_devices
from mtl_jax.tasks import Losses, arithmetic_dtype, at_least_float32, describe, leaf_name

RowsMode = Literal["auto", "unrolled", "map", "vmap", "low_memory"]
Shared = PyTree | Callable[[str], bool] | None
Rows = tuple[list[Array], ...] | list[Array]
"""Task gradients: for each task its leaves, or each leaf with the tasks as its leading axis."""

MOST_UNROLLED = 5
"""The most tasks for which "auto" unrolls the backward passes on CPU."""


def choose_rows(rows: RowsMode, number: int, params: PyTree = ()) -> RowsMode:
    """The way to compute the rows, "auto" decided by the backend and the number of tasks.

    On CPU backward passes one after the other are fastest (``experiments.speed`` measures it):
    unrolled for few tasks, for which XLA sees across them, and in a loop for many. Other backends
    have the parallelism that a batch of them needs. But where XLA decides how the parameters are
    spread over devices, it gathers the whole batch for that (``experiments.communication``).
    """
    if not isinstance(rows, str) or rows not in get_args(RowsMode):
        raise ValueError(f"`rows` must be one of {', '.join(get_args(RowsMode))}; got {rows!r}.")
    if rows != "auto":
        return rows
    by_xla = any(may_be_spread(leaf, AxisType.Auto) for leaf in jax.tree.leaves(params))
    if jax.default_backend() != "cpu" and not by_xla:
        return "vmap"
    return "unrolled" if number <= MOST_UNROLLED else "map"


class Partition(NamedTuple):
    """The parameters in two parts: those that all tasks share, and the rest.

    Attributes:
      structure: the structure of the parameters.
      flags: for each leaf, whether it is shared.
    """

    structure: Any
    flags: tuple[bool, ...]

    @classmethod
    def of(cls, params: PyTree, shared: Shared) -> "Partition":
        """Read and check what ``shared`` selects: by default everything.

        Raises:
          ValueError: if ``shared`` selects nothing, or is a pytree of another structure.
          TypeError: if it selects by something else than booleans.
        """
        structure = jax.tree.structure(params)
        paths = [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        if shared is None:
            flags = [True] * len(paths)
        elif callable(shared):
            flags = [shared(path) for path in paths]
        elif jax.tree.structure(shared) == structure:
            flags = jax.tree.leaves(shared)
        else:
            raise ValueError(
                "`shared` must be a predicate on the path of a parameter, or a pytree of booleans "
                f"with the structure of the parameters, {describe(structure)}; got "
                f"{describe(jax.tree.structure(shared))}."
            )
        for path, flag in zip(paths, flags, strict=True):
            if not isinstance(flag, bool | np.bool_):
                raise TypeError(
                    f"`shared` must say True or False for every parameter; for {path!r} it says "
                    f"{flag!r}."
                )
        if paths and not any(flags):
            raise ValueError(f"`shared` selects none of the parameters: {', '.join(paths)}.")
        return cls(structure, tuple(map(bool, flags)))

    @property
    def has_rest(self) -> bool:
        """Whether some parameter is not shared."""
        return not all(self.flags)

    def shared(self, tree: PyTree) -> list[Array]:
        """The leaves of the shared part."""
        leaves = self.structure.flatten_up_to(tree)
        return [leaf for leaf, flag in zip(leaves, self.flags, strict=True) if flag]

    def rest(self, tree: PyTree) -> list[Array]:
        """The leaves of the rest."""
        leaves = self.structure.flatten_up_to(tree)
        return [leaf for leaf, flag in zip(leaves, self.flags, strict=True) if not flag]

    def join(self, shared: list[Array], rest: list[Array] | None) -> PyTree:
        """The tree with these leaves; ``None`` in place of the rest if that is ``None``."""
        remaining = iter(shared), iter([None] * len(self.flags) if rest is None else rest)
        leaves = [next(remaining[0] if flag else remaining[1]) for flag in self.flags]
        return jax.tree.unflatten(self.structure, leaves)

    def without_rest(self, tree: PyTree) -> PyTree:
        """The tree with zeros in place of the rest."""
        return self.join(self.shared(tree), [jnp.zeros_like(leaf) for leaf in self.rest(tree)])


def shared_parameters(params: PyTree, shared: Shared) -> PyTree:
    """The parameters that all tasks share, ``None`` standing for the others."""
    parts = Partition.of(params, shared)
    return parts.join(parts.shared(params), None)


def linearize(
    function: Callable[[PyTree], tuple[PyTree, Any]], params: PyTree
) -> tuple[PyTree, Callable[[PyTree], PyTree], Callable[[PyTree], tuple[PyTree]], Any]:
    """The value, its derivative as a linear function, the transpose of that, and the aux output.

    Raises:
      TypeError: if the function has no derivative in forward mode.
    """
    value, linear, aux = jax.linearize(function, params, has_aux=True)
    # What stands for the backward pass of a `custom_vjp` in the derivative: it can be transposed,
    # but not evaluated, which JAX finds out only when it compiles.
    if "custom_lin[" in str(jax.make_jaxpr(linear)(params)):
        raise TypeError(
            "rows='low_memory' needs the forward derivative of what it differentiates, in which "
            "there is a function that defines its backward pass alone (jax.custom_vjp). Compute "
            "the rows in another way, such as rows='map'."
        )
    return value, linear, jax.linear_transpose(linear, params), aux


def stacked(rows: Rows) -> list[Array]:
    """The task gradients with the tasks as the leading axis of every leaf."""
    if isinstance(rows, tuple):
        return [jnp.stack(leaves) for leaves in zip(*rows, strict=True)]
    return rows


def unit_cotangents(losses: Losses) -> list[Array]:
    """The K unit vectors as cotangents of the leaves of the losses, along a leading axis."""
    leaves = jax.tree.leaves(losses)
    identity = jnp.eye(len(leaves), dtype=bool)
    return [identity[k].astype(leaf.dtype) for k, leaf in enumerate(leaves)]


def each_row(function: Callable[[list[Array]], list[Array]], rows: Rows, way: RowsMode) -> Rows:
    """A function of the leaves of one task, applied to each task's.

    Args:
      function: the function.
      rows: the leaves of every task.
      way: ``"unrolled"``, ``"map"`` or ``"vmap"``.

    Returns:
      The results: for each task if unrolled, else with the tasks as a leading axis.
    """
    if way == "unrolled":
        if not isinstance(rows, tuple):
            rows = tuple(list(leaves) for leaves in zip(*map(jnp.unstack, rows), strict=True))
        return tuple(function(leaves) for leaves in rows)
    if way == "map":
        return jax.lax.map(function, stacked(rows))
    return jax.vmap(function)(stacked(rows))


def combine(weights: Float[Array, "tasks"], rows: Rows) -> list[Array]:
    """The leaves of the weighted sum of the task gradients, in their dtypes."""
    if not isinstance(rows, tuple):
        return weighted_sum(weights, rows)

    def add(*leaves: Array) -> Array:
        dtype = arithmetic_dtype(leaves[0].dtype, weights.dtype)
        terms = [
            weight.astype(dtype) * leaf.astype(dtype)
            for weight, leaf in zip(jnp.unstack(weights), leaves, strict=True)
        ]
        return sum_of(terms).astype(leaves[0].dtype)

    return [add(*leaves) for leaves in zip(*rows, strict=True)]


def gramian_of(rows: Rows, axes: tuple[str, ...] = ()) -> Float[Array, "tasks tasks"]:
    r"""The Gramian :math:`G_{ij} = \langle g_i, g_j \rangle` of the task gradients.

    Contracted leaf by leaf, in at least float32 and at the highest precision: leaves that are
    ravelled together would be gathered if they are spread over devices.

    Args:
      rows: the task gradients.
      axes: the axes of a ``shard_map`` along which each device may have its part of them.
    """
    if not isinstance(rows, tuple):
        return gramian_between(rows, rows, axes)
    # Gradients that are separate arrays are stacked in a few groups, each pair of groups being
    # multiplied once: on CPU twice as fast for 20 tasks as one stack. The barrier keeps XLA from
    # stacking a group anew in each product.
    size = -(-len(rows) // MOST_UNROLLED)
    groups = [stacked(rows[start : start + size]) for start in range(0, len(rows), size)]
    if size > 1:
        groups = jax.lax.optimization_barrier(groups)
    blocks = [[jnp.zeros(())] * len(groups) for _ in groups]
    for i, j in itertools.combinations_with_replacement(range(len(groups)), 2):
        blocks[i][j] = gramian_between(groups[i], groups[j], axes)
        blocks[j][i] = blocks[i][j].T
    return jnp.block(blocks)


def gramian_between(
    some: list[Array], others: list[Array], axes: tuple[str, ...] = ()
) -> Float[Array, "some others"]:
    """The inner products of stacked gradients with others; ``axes`` as for the Gramian."""
    pairs = zip(some, others, strict=True)
    return sum_of([sum_over_devices(_products(a, b), axes) for a, b in pairs])


def sum_of(arrays: list[Array]) -> Array:
    """The sum of arrays of one shape, in the widest of their dtypes."""
    dtype = arithmetic_dtype(*(array.dtype for array in arrays))
    total = arrays[0].astype(dtype)
    for array in arrays[1:]:
        total += array.astype(dtype)
    return total


def _products(a: Array, b: Array) -> Float[Array, "rows columns"]:
    """The inner products of the rows of one leaf with those of another."""
    if jnp.issubdtype(a.dtype, jnp.complexfloating):
        return _products(a.real, b.real) + _products(a.imag, b.imag)
    if not any(may_be_spread(x, AxisType.Auto, AxisType.Explicit) for x in (a, b)):
        # As matrices: a contraction of several axes would copy a transpose on CPU. An array that
        # is spread over devices along one of them would be gathered for it.
        a, b = a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)
    axes = tuple(range(1, a.ndim))
    return jax.lax.dot_general(
        a,
        b,
        ((axes, axes), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=at_least_float32(a.dtype),
        out_sharding=contracted(a, b),
    )


def low_memory_gramian(
    linear: Callable[[PyTree], Losses],
    gradient: Callable[[list[Array]], PyTree],
    losses: Losses,
) -> Float[Array, "tasks tasks"]:
    r"""The Gramian with one task gradient held at a time.

    Row k of :math:`G = J J^\top` is J applied to the gradient of task k: one backward pass gives
    the gradient, one forward derivative the row.

    Args:
      linear: the linearised losses, from a change of the parameters to a change of the losses.
      gradient: from the leaves of a cotangent of the losses to the gradient, 0 for parameters that
        do not enter.
      losses: the losses, for their structure and dtypes.
    """

    def row(unit: list[Array]) -> Float[Array, "tasks"]:
        products = jax.tree.leaves(linear(gradient(unit)))
        dtype = at_least_float32(*(product.dtype for product in products))
        return jnp.stack([product.astype(dtype) for product in products])

    gramian = jax.lax.map(row, unit_cotangents(losses))
    return (gramian + gramian.T) / 2
