"""A function of a batch, run on one piece of the batch after the other."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mtl_jax.pytree import PyTree
from mtl_jax.tasks import leaf_name

Argnums = int | Sequence[int] | None


class Pieces(NamedTuple):
    """The arguments of a function, but the first, cut into pieces.

    Attributes:
      structure: the structure of all arguments, ``None`` standing for the first.
      leaves: their leaves, those of the batch with the shape ``[size, number, ...]``: so an axis
        that is spread over devices stays so, in every piece, where it is.
      axes: for each leaf the axis along which the pieces lie; ``None`` if it is not cut.
      number: the number of pieces.
      sizes: the numbers of examples in a piece: one, or several where tasks have batches of their
        own.
    """

    structure: Any
    leaves: list[Any]
    axes: list[int | None]
    number: int
    sizes: set[int]

    @classmethod
    def of(cls, args: tuple[Any, ...], number: int, argnums: Argnums) -> "Pieces":
        """Cut the arguments.

        Raises:
          ValueError: if there is nothing to cut, or the batch cannot be cut into equal pieces.
        """
        chosen = _read_argnums(argnums, len(args))
        # With the first argument in front, a path begins with the number of the argument.
        flat, structure = jax.tree_util.tree_flatten_with_path((None, *args))
        leaves, axes, batch = [], [], {}
        for path, leaf in flat:
            scalar, axis = not getattr(leaf, "ndim", 0), None
            if scalar and is_key(leaf):
                leaf, axis = jax.random.split(leaf, number), 0
            elif not scalar and path[0].idx in chosen:
                batch[f"argument {path[0].idx}{where(path[1:])}"], axis = leaf, 1
            leaves.append(leaf)
            axes.append(axis)
        if argnums is None:
            _check_same_size(batch)
        sizes = _piece_sizes(batch, number)
        leaves = [
            jnp.reshape(leaf, (leaf.shape[0] // number, number, *leaf.shape[1:]))
            if axis == 1
            else leaf
            for leaf, axis in zip(leaves, axes, strict=True)
        ]
        return cls(structure, leaves, axes, number, sizes)

    def arguments(self, index: Array) -> list[Any]:
        """The arguments of one piece."""
        leaves = [
            leaf if axis is None else jax.lax.dynamic_index_in_dim(leaf, index, axis, False)
            for leaf, axis in zip(self.leaves, self.axes, strict=True)
        ]
        return list(jax.tree.unflatten(self.structure, leaves)[1:])

    def together(self, leaf: Array) -> Array:
        """An array by piece and example, as one in the order of the batch."""
        shape = (leaf.shape[0] * leaf.shape[1], *leaf.shape[2:])
        return jnp.reshape(jnp.swapaxes(leaf, 0, 1), shape)

    def run(
        self, function: Callable[[PyTree, list[Any]], tuple[PyTree, Any]], params: PyTree
    ) -> tuple[PyTree, Any]:
        """Run a function on every piece, what its backward pass needs being computed in it anew.

        Args:
          function: ``function(params, arguments) -> (output, aux)``.
          params: the first argument.

        Returns:
          The output, stacked over the pieces, and ``aux`` of the whole batch.
        """
        dtypes = jax.tree.map(jnp.result_type, params)
        # The gradients of the pieces are added up in the dtype that the parameters have here.
        params = jax.tree.map(widened, params)

        def piece(params: PyTree, index: Array) -> tuple[PyTree, Any]:
            # The batch is cut in here, so that no piece of it is stored for the backward pass.
            return function(jax.tree.map(_cast, params, dtypes), self.arguments(index))

        structure, varies = _varying_aux(piece, params, self.sizes)

        def outputs(index: Array) -> tuple[PyTree, list[Array]]:
            output, aux = jax.checkpoint(piece, prevent_cse=False)(params, index)
            leaves = jax.tree.leaves(aux)
            return output, [leaf for leaf, flag in zip(leaves, varies, strict=True) if flag]

        output, stacked = jax.lax.map(outputs, jnp.arange(self.number))
        # What is the same for all pieces is taken from the first, not stacked for all of them.
        same = [] if all(varies) else jax.tree.leaves(piece(params, jnp.asarray(0))[1])
        rows = iter(stacked)
        leaves = [
            self.together(next(rows)) if flag else same[position]
            for position, flag in enumerate(varies)
        ]
        return output, jax.tree.unflatten(structure, leaves)


def _varying_aux(
    piece: Callable[[PyTree, Array], tuple[PyTree, Any]], params: PyTree, sizes: set[int]
) -> tuple[Any, list[bool]]:
    """The structure of the auxiliary output and which of its leaves there are by example.

    Raises:
      ValueError: for a leaf that differs between the pieces otherwise.
    """
    closed, (_, aux) = jax.make_jaxpr(piece, return_shape=True)(params, jnp.asarray(0))
    leaves, structure = jax.tree_util.tree_flatten_with_path(aux)
    varying = {id(closed.jaxpr.invars[-1])}
    for equation in closed.jaxpr.eqns:
        if any(id(variable) in varying for variable in equation.invars):
            varying.update(id(variable) for variable in equation.outvars)
    outputs = closed.jaxpr.outvars[len(closed.jaxpr.outvars) - len(leaves) :]
    flags = []
    for (path, leaf), variable in zip(leaves, outputs, strict=True):
        flags.append(id(variable) in varying and not (is_key(leaf) and leaf.ndim == 0))
        if flags[-1] and not by_example(leaf.shape, sizes):
            raise ValueError(
                f"microbatched: the auxiliary output{where(path)} of shape {leaf.shape} differs "
                f"between pieces of {listed(sizes)} examples and is not by example, so it has no "
                "value for the whole batch. Batch statistics cannot be had in pieces: normalise by "
                "group or layer, use stored statistics, or take the pieces as steps, with "
                "optax.MultiSteps. Return a metric by example and take its mean afterwards."
            )
    return structure, flags


def by_example(shape: tuple[int, ...], sizes: set[int]) -> bool:
    """Whether an array of a piece has one row for each example."""
    return bool(shape) and shape[0] in sizes


def listed(sizes: set[int]) -> str:
    """The sizes of a piece, for an error message."""
    return " or ".join(map(str, sorted(sizes)))


def is_key(leaf: Any) -> bool:
    """Whether a leaf is a ``jax.random.key``, or an array of them."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def widened(leaf: Any) -> Any:
    """The leaf, in float32 if it is of narrower floating-point numbers."""
    dtype = jnp.result_type(leaf)
    narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    return _cast(leaf, jnp.dtype("float32")) if narrow else leaf


def _cast(leaf: Any, dtype: Any) -> Any:
    return leaf if jnp.result_type(leaf) == dtype else jnp.asarray(leaf).astype(dtype)


def where(path: Any) -> str:
    """The place of a leaf, for an error message: nothing for a tree that is a leaf."""
    return f" at {leaf_name(path)!r}" if path else ""


def _read_argnums(argnums: Argnums, number: int) -> set[int]:
    """The numbers of the arguments that hold the batch, the parameters being number 0."""
    others = set(range(1, number + 1))
    if argnums is None:
        return others
    chosen = {argnums} if isinstance(argnums, int | np.integer) else set(argnums)
    if not chosen <= others:
        raise ValueError(
            f"`batch_argnums` is {argnums!r}, but the arguments after the parameters, number 0, "
            f"have the numbers {sorted(others)}."
        )
    return chosen


def _check_same_size(batch: dict[str, Any]) -> None:
    """Raise an error for arrays that differ in the leading axis."""
    for (first, leaf), (name, other) in itertools.pairwise(batch.items()):
        if other.shape[0] != leaf.shape[0]:
            raw = any(array.shape == (2,) and array.dtype == np.uint32 for array in (leaf, other))
            raise ValueError(
                f"microbatched: {first} has shape {leaf.shape} and {name} {other.shape}. All "
                "arrays are split along the leading axis, the examples of the batch: name the "
                "arguments that hold the batch in `batch_argnums`; the others go to every piece "
                "as they are." + " A raw key must be made a key by jax.random.wrap_key_data." * raw
            )


def _piece_sizes(batch: dict[str, Any], number: int) -> set[int]:
    """The numbers of examples in a piece, from the arrays of the batch by their names."""
    if not batch:
        raise ValueError(
            "microbatched: there is no array with a leading axis to split; see `batch_argnums`."
        )
    sizes = set()
    for name, leaf in batch.items():
        size, rest = divmod(leaf.shape[0], number)
        if rest:
            raise ValueError(
                f"microbatched: {name} has shape {leaf.shape}, of which the leading axis cannot be "
                f"split into n={number} equal pieces. Choose an n that divides it, or pad the "
                "batch with examples that have no labels and pass `count`."
            )
        if size % (devices := _devices(leaf)):
            raise ValueError(
                f"microbatched: {name} has shape {leaf.shape} and is sharded over {devices} "
                f"devices, over which a piece of {size} examples cannot be. Choose a smaller n: "
                "devices times n must divide the batch."
            )
        sizes.add(size)
    return sizes


def _devices(leaf: Any) -> int:
    """The devices over which the leading axis is sharded, where JAX's types tell (Explicit)."""
    sharding = jax.typeof(leaf).sharding
    names = sharding.spec[0] if len(sharding.spec) else None
    return math.prod(sharding.mesh.shape[name] for name in np.atleast_1d(names or []))
