"""The Jacobian of the task losses: its rows, its Gramian, combinations of its rows.

It is an operator: :class:`ParameterJacobian` by the parameters, :class:`RepresentationJacobian` by
a representation that the tasks share. Both run the network forward once and can then be asked for
``pull_back(weights)``, the gradient in one backward pass; ``measure()``, the Gramian; and
``combine(weights, rows)``, the gradient from the rows that were found on the way.

Arrays may be spread over devices. Under ``jit`` they are whole, and JAX finds out what has to
travel; only with explicit mesh axes it must be told where the result of a contraction shall lie.
Inside ``shard_map`` each device has its part of the arrays that vary along a mesh axis, and the sum
over the parts is ours.
"""

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from mtl_jax._checks import leaf_name, read_integer
from mtl_jax._lift import weighted_sum
from mtl_jax._tasks import (
    arithmetic_dtype,
    at_least_float32,
    describe,
    read_mask,
    read_tasks,
)
from mtl_jax._typing import Gramian, Losses, Mask, Products, PyTree, Vector

RowsMode = Literal["auto", "unrolled", "map", "vmap", "low_memory"] | int
_WAYS: tuple[Any, ...] = get_args(get_args(RowsMode)[0])
Shared = PyTree | Callable[[str], bool] | None
GroupsOf = PyTree | Callable[[str], str] | None
Rows = tuple[list[Array], ...] | list[Array]
"""Task gradients: for each task its leaves, or each leaf with the tasks as its leading axis."""

MOST_UNROLLED = 5
"""The most tasks for which "auto" unrolls the backward passes on CPU."""


def choose_rows(rows: RowsMode, number: int, params: PyTree = ()) -> RowsMode:
    """The way to compute the rows, "auto" decided by the backend and the number of tasks.

    On CPU backward passes one after the other are fastest (``benchmarks.speed`` measures it):
    unrolled for few tasks, for which XLA sees across them, and in a loop for many. Other backends
    have the parallelism that a batch of them needs. But where XLA decides how the parameters are
    spread over devices, it gathers the whole batch for that (``benchmarks.communication``).
    """
    if not isinstance(rows, str):
        what = f"`rows` must be one of {', '.join(_WAYS)}, or a number of tasks; a number"
        return read_integer(rows, what)
    if rows not in _WAYS:
        raise ValueError(
            f"`rows` must be one of {', '.join(_WAYS)}, or a number of tasks; got {rows!r}."
        )
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
        said = _said_of_each(params, (lambda path: True) if shared is None else shared, "shared")
        for path, flag in said:
            if not isinstance(flag, bool | np.bool_):
                raise TypeError(
                    f"`shared` must say True or False for every parameter; for {path!r} it says "
                    f"{flag!r}."
                )
        if said and not any(flag for _, flag in said):
            paths = ", ".join(path for path, _ in said)
            raise ValueError(f"`shared` selects none of the parameters: {paths}.")
        return cls(structure, tuple(bool(flag) for _, flag in said))

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


_KINDS = {"shared": ("a predicate on", "booleans"), "groups": ("a function of", "names")}


def _is_function(choice: Any) -> bool:
    """Whether it is a function, and not a module of parameters that can be called."""
    return callable(choice) and jax.tree_util.all_leaves([choice])


def _said_of_each(params: PyTree, choice: Any, name: str) -> list[tuple[str, Any]]:
    """The path of each parameter with what a function of it, or a pytree like them, says of it.

    Raises:
      ValueError: if it is neither.
    """
    structure = jax.tree.structure(params)
    paths = [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    if _is_function(choice):
        return [(path, choice(path)) for path in paths]
    if jax.tree.structure(choice) == structure:
        return list(zip(paths, jax.tree.leaves(choice), strict=True))
    function, leaves = _KINDS[name]
    raise ValueError(
        f"`{name}` must be {function} the path of a parameter, or a pytree of {leaves} with the "
        f"structure of the parameters, {describe(structure)}; got "
        f"{describe(jax.tree.structure(choice))}."
    )


class Groups(NamedTuple):
    """The shared parameters in groups, for each of which the weights are decided by themselves.

    Attributes:
      names: the names of the groups, in the order of the parameters.
      by_leaf: for each leaf of the shared parameters the name of its group.
    """

    names: tuple[str, ...]
    by_leaf: tuple[str, ...]

    @classmethod
    def of(cls, params: PyTree, shared: Shared, groups: GroupsOf) -> "Groups | None":
        """Read and check what ``groups`` says; ``None`` for ``None``.

        Raises:
          ValueError: if ``groups`` is neither a function nor a pytree like the parameters.
          TypeError: if the name of a group is not a string.
        """
        if groups is None:
            return None
        parts = Partition.of(params, shared)
        kept = parts.join(parts.shared(params), None)
        function = _is_function(groups)
        said = _said_of_each(kept if function else params, groups, "groups")
        if not function:
            said = [one for one, flag in zip(said, parts.flags, strict=True) if flag]
        for path, name in said:
            if not isinstance(name, str):
                raise TypeError(
                    f"`groups` must name a group, a string, for every parameter that enters the "
                    f"Gramian (`shared`); for {path!r} it says {name!r}."
                )
        by_leaf = tuple(name for _, name in said)
        return cls(tuple(dict.fromkeys(by_leaf)), by_leaf)

    def split(self, leaves: list[Any]) -> dict[str, list[Any]]:
        """The leaves of the shared parameters by group."""
        found: dict[str, list[Any]] = {name: [] for name in self.names}
        for name, leaf in zip(self.by_leaf, leaves, strict=True):
            found[name].append(leaf)
        return found

    def join(self, parts: dict[str, list[Any]]) -> list[Any]:
        """The leaves of the shared parameters; ``None`` for those of a group that is missing."""
        remaining = {name: iter(leaves) for name, leaves in parts.items()}
        return [next(remaining[name]) if name in remaining else None for name in self.by_leaf]


def each(groups: Groups | None, function: Callable[..., Any], *values: Any) -> Any:
    """A function of something, applied to that of every group, by name, where there are groups."""
    if groups is None:
        return function(*values)
    return {name: function(*(value[name] for value in values)) for name in groups.names}


def shared_parameters(params: PyTree, shared: Shared, groups: Groups | None = None) -> PyTree:
    """The parameters that all tasks share, ``None`` for the others; by group if there are any."""
    parts = Partition.of(params, shared)
    return _as_trees(parts, groups, parts.shared(params))


def _as_trees(parts: Partition, groups: Groups | None, leaves: list[Any]) -> PyTree:
    """Leaves of the shared parameters as a tree, ``None`` for the others; by group."""
    if groups is None:
        return parts.join(leaves, None)
    return {
        name: parts.join(groups.join({name: own}), None)
        for name, own in groups.split(leaves).items()
    }


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
    return stacked_cotangents(jnp.eye(read_tasks(losses).number, dtype=bool), losses)


def stacked_cotangents(vectors: Array, losses: Losses) -> list[Array]:
    """Vectors over the tasks as cotangents of the leaves of the losses, along a leading axis."""
    parts = zip(jax.vmap(read_tasks(losses).split)(vectors), jax.tree.leaves(losses), strict=True)
    return [part.astype(leaf.dtype) for part, leaf in parts]


def each_row(function: Callable[[list[Array]], list[Array]], rows: Rows, way: Any) -> Rows:
    """A function of the leaves of one task, applied to each task's.

    Args:
      function: the function.
      rows: the leaves of every task.
      way: ``"unrolled"``, ``"map"``, ``"vmap"``, or how many tasks at once.

    Returns:
      The results: for each task if unrolled, else with the tasks as a leading axis.
    """
    if way == "unrolled":
        if not isinstance(rows, tuple):
            rows = tuple(list(leaves) for leaves in zip(*map(jnp.unstack, rows), strict=True))
        return tuple(function(leaves) for leaves in rows)
    if way == "vmap":
        return jax.vmap(function)(stacked(rows))
    return jax.lax.map(function, stacked(rows), batch_size=None if way == "map" else way)


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


def nonzero_rows(leaves: list[Array]) -> Mask:
    """For each task whether anything in its row is not exactly zero; the leading axis is the task.

    For complex numbers and NaN, too.
    """
    by_leaf = [jnp.any(leaf != 0, axis=tuple(range(1, leaf.ndim))) for leaf in leaves]
    return functools.reduce(jnp.logical_or, by_leaf)


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
    # The Gramian is symmetric: only the blocks on and above the diagonal are computed.
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


# Arrays that are spread over devices


AxisName = str | tuple[str, ...] | None
"""The mesh axes of a ``shard_map`` along which the batch is spread."""


def may_be_spread(array: Array, *kinds: AxisType) -> bool:
    """Whether an array may be spread along mesh axes of these kinds, as far as its type tells.

    For explicit axes the type says how, for Auto axes only that there are several devices.
    """
    mesh = jax.typeof(array).sharding.mesh
    return any(
        size > 1 and kind in kinds
        for size, kind in zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    )


def contracted(*arrays: Array) -> NamedSharding | None:
    """The sharding of what is contracted over all axes of arrays that are explicitly sharded.

    Every device gets the result. ``None`` where nothing need be said.
    """
    for array in arrays:
        sharding = jax.typeof(array).sharding
        if any(axis is not None for axis in sharding.spec):
            return NamedSharding(sharding.mesh, PartitionSpec())
    return None


def varying_axes(tree: PyTree) -> frozenset[str]:
    """The axes of the surrounding ``shard_map`` along which some array of a tree differs."""
    axes = frozenset()
    for leaf in jax.tree.leaves(tree):
        kind = jax.typeof(leaf)
        # Its name in JAX 0.10; before that the axes themselves were called `vma`.
        kind = getattr(kind, "manual_axis_type", kind)
        axes |= getattr(kind, "varying", getattr(kind, "vma", frozenset()))
    return axes


def sum_over_devices(array: Array, axes: Iterable[str]) -> Array:
    """The sum of the devices' parts of an array over those of the axes along which it varies."""
    names = tuple(sorted(varying_axes(array).intersection(axes)))
    return jax.lax.psum(array, names) if names else array


_INSTEAD_OF_PMAP = (
    "Instead of jax.pmap, spread the batch over a mesh under jax.jit; or, if the devices train "
    "independent replicas, map over these with jax.vmap and spread them."
)


def read_axis_name(axis_name: AxisName) -> tuple[str, ...]:
    """The axes that are named, checked against the surrounding ``shard_map``.

    Raises:
      ValueError: if there is no such axis, or it is not tracked what varies along one, as in
        ``pmap``, or in ``shard_map`` with ``check_vma=False``.
    """
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ())
    manual = getattr(jax.sharding.get_abstract_mesh(), "manual_axes", ())
    for name in names:
        if name not in manual:
            raise ValueError(
                f"axis_name={name!r} is not an axis of a jax.shard_map around this call, whose "
                f"axes are {manual}. Under jit alone leave `axis_name` out, however the arrays are "
                f"sharded. {_INSTEAD_OF_PMAP}"
            )
    for name in manual:
        if name not in varying_axes(jax.lax.axis_index(name)):
            raise ValueError(
                f"Which arrays differ between the devices along {name!r} is not known in jax.pmap, "
                "nor in jax.shard_map with check_vma=False: the gradient of replicated parameters "
                f"would be wrong without an error. {_INSTEAD_OF_PMAP} In jax.shard_map leave "
                "check_vma at its default, True."
            )
    return names


def check_global(losses: Losses, params: PyTree, axes: tuple[str, ...]) -> None:
    """Raise an error for losses that differ between devices where they must not.

    That is along the axes that are named, and along those where the devices share the parameters.
    """
    own = varying_axes(params).difference(axes)
    for path, loss in jax.tree_util.tree_leaves_with_path(losses):
        for axis in sorted(varying_axes(loss) - own):
            raise ValueError(
                f"The loss {leaf_name(path)!r} differs between the devices along {axis!r}: inside "
                "shard_map the losses must be those of the whole batch. Take jax.lax.pmean(loss, "
                f"{axis!r}), or, where labels are missing, divide jax.lax.psum of the devices' "
                "sums by that of their counts."
            )


def check_whole(measured: PyTree, losses: Losses, what: str, way_out: str) -> None:
    """Raise an error for what is still in parts on the devices that share the losses."""
    for axis in sorted(varying_axes(measured) - varying_axes(losses)):
        raise ValueError(
            f"{what} differs between the devices along {axis!r}, and the losses do not. {way_out}"
        )


def squared_norm(leaf: Array, axes: Iterable[str] = ()) -> Float[Array, ""]:
    """The squared norm of a leaf, not finite where the leaf is not, or where it overflows.

    A contraction of the leaf with itself: on CPU some five times faster than a sum of squares.
    """
    leaf = leaf.astype(arithmetic_dtype(leaf.dtype))
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        return squared_norm(leaf.real, axes) + squared_norm(leaf.imag, axes)
    return sum_over_devices(_products(leaf[None], leaf[None])[0, 0], axes)


def has_finite_norm(gradient: PyTree, losses: Losses) -> Array:
    """Whether the squared norm of a gradient is finite.

    The squared norm, since an optimizer squares the gradient too: where that overflows (in float32
    at a norm of 1.8e19), its state is lost although the gradient itself is finite. Devices of a
    ``shard_map`` that share the losses agree on it.
    """
    axes = varying_axes(gradient) - varying_axes(losses)
    norms = [squared_norm(leaf, axes) for leaf in jax.tree.leaves(gradient)]
    return jnp.isfinite(sum_of(norms)) if norms else jnp.asarray(True)


# The operators


class ParameterJacobian:
    """The Jacobian of the task losses by the parameters.

    Args:
      losses_fn: from the parameters to the losses and the auxiliary output.
      params: the parameters.
      mask: which tasks have labels, or ``None``.
      shared: the parameters that enter the rows, the others being pulled back for.
      groups: the groups of these, if each has a Gramian, and weights, of its own. What is said
        below of weights, Gramian and parameters is then so for each: a dictionary by group.
      rows: how the rows are computed.
      axes: the mesh axes of a ``shard_map`` along which the batch is spread.
      forward: whether the forward derivative is wanted, too, where there is one and ``rows`` leaves
        the choice.

    Attributes:
      losses: the losses.
      aux: the auxiliary output.
      tasks: the tasks.
      present: which of them are.
      shared: the parameters that enter the rows, ``None`` standing for the others.
      groups: their groups, or ``None``.
      whole: whether all parameters enter them.
    """

    def __init__(
        self,
        losses_fn: Callable[[PyTree], tuple[Losses, Any]],
        params: PyTree,
        mask: PyTree | None,
        *,
        shared: Shared,
        groups: GroupsOf,
        rows: RowsMode,
        axes: tuple[str, ...],
        forward: bool = False,
    ) -> None:
        self._params: PyTree = params
        self._rows_mode: RowsMode = rows
        self._parts = Partition.of(params, shared)
        self._axes, self._linear = axes, None
        self.groups = Groups.of(params, shared, groups)
        self.shared = shared_parameters(params, shared, self.groups)
        self.whole = not self._parts.has_rest
        # The one forward pass. Low memory needs the derivative in both directions.
        both = rows == "low_memory" or (forward and rows == "auto")
        if both:
            try:
                found = linearize(losses_fn, params)
                self.losses, self._linear, self._transpose, self.aux = found
            except TypeError:
                if rows == "low_memory":
                    raise
                both = False
        if not both:
            self.losses, self._transpose, self.aux = jax.vjp(losses_fn, params, has_aux=True)
        check_global(self.losses, params, axes)
        self.tasks = read_tasks(self.losses)
        self.present: Mask = read_mask(mask, self.tasks)
        self._way = choose_rows(rows, self.tasks.number, params)

    def pull_back(self, weights: Any) -> PyTree:
        """The gradient of the weighted sum of the losses, in one backward pass.

        With groups in as many as there are of them, or of tasks if these are fewer.
        """
        if self.groups is None:
            return self._weighted(weights)
        names = self.groups.names
        if len(names) >= self.tasks.number:
            return self.combine(weights, self.task_gradients())
        vectors = jnp.stack([weights[name] for name in names])
        rows = self._rows(stacked_cotangents(vectors, self.losses))
        shared = {}
        for place, name in enumerate(names):
            row = rows[place] if isinstance(rows, tuple) else [leaf[place] for leaf in rows]
            shared[name] = self.groups.split(row)[name]
        return self.with_rest(shared, weights)

    def task_gradients(self) -> Rows:
        """The rows: for each task the gradient by the shared parameters."""
        return self._rows(unit_cotangents(self.losses))

    def one_task_gradient(self, chosen: Mask) -> list[Array]:
        """The rows, zero but for that of the one task that is chosen: one backward pass."""
        gradient = self._parts.shared(self._weighted(chosen.astype(self.tasks.dtype)))
        return [
            jnp.where(chosen.reshape(-1, *[1] * leaf.ndim), leaf[None], jnp.zeros_like(leaf)[None])
            for leaf in gradient
        ]

    def measure(self) -> tuple[Any, Rows | None]:
        """The Gramian, and the rows where they were held for it."""
        if self._linear is not None:
            return self._low_memory_gramian(self._linear), None
        rows = self.task_gradients()
        return self.gramian_of(rows), rows

    def gramian_of(self, rows: Rows) -> Any:
        """The Gramian of the rows."""
        return each(self.groups, lambda own: gramian_of(own, self._axes), self.by_group(rows))

    def products(
        self, second: "Callable[[PyTree], TaskJacobian]", combinations: Array, step: Any
    ) -> tuple[Products, Rows | None]:
        """The inner products of the task gradients with gradients on a second batch.

        Args:
          second: from parameters to the Jacobian of the second batch's losses.
          combinations: for each of these gradients the weights of that batch's losses.
          step: the weights of a gradient step on this batch, after which they are taken; or
            ``None``.

        Returns:
          The inner products, and the rows of this batch where they were held for them.
        """
        start = self._params
        if step is not None:
            descent = _conjugate(self.pull_back(step))
            start = jax.tree.map(jnp.subtract, start, descent)
        there, linear = second(start), self._linear
        assert isinstance(there, ParameterJacobian)

        def direction(cotangents: list[Array]) -> list[Array]:
            found = there._gradient_of(cotangents)
            if linear is None:
                return self._parts.shared(found)
            return [self.tasks.stack(linear(_conjugate(self._parts.without_rest(found))))]

        way = choose_rows(self._rows_mode, len(combinations), self._params)
        way = "map" if way == "low_memory" else way
        cotangents = stacked_cotangents(combinations, there.losses)
        found = stacked(each_row(direction, cotangents, way))
        if linear is not None:
            return found[0].T, None
        rows = self.task_gradients()
        return gramian_between(stacked(rows), found, self._axes), rows

    def combine(self, weights: Any, rows: Rows | None) -> PyTree:
        """The gradient of the weighted sum of the losses, from the rows."""
        if rows is None:
            return self.pull_back(weights)
        return self.with_rest(each(self.groups, combine, weights, self.by_group(rows)), weights)

    def with_rest(self, shared: Any, weights: Any) -> PyTree:
        """A gradient of the shared parameters, with that of the weighted sum for the others.

        With groups, whose weights differ, that is the plain sum.
        """
        if self.groups is not None:
            shared, weights = self.groups.join(shared), self.present.astype(self.tasks.dtype)
        rest = self._parts.rest(self._weighted(weights)) if self._parts.has_rest else []
        return self._parts.join(shared, rest)

    def as_tree(self, rows: Rows) -> PyTree:
        """The rows as a pytree like the parameters, ``None`` for those that are not shared."""
        return _as_trees(self._parts, self.groups, stacked(rows))

    def by_group(self, rows: Rows) -> Any:
        """The rows, those of each group by themselves."""
        if self.groups is None:
            return rows
        if not isinstance(rows, tuple):
            return self.groups.split(rows)
        by_task = [self.groups.split(leaves) for leaves in rows]
        return {name: tuple(one[name] for one in by_task) for name in self.groups.names}

    def _rows(self, cotangents: list[Array]) -> Rows:
        """For each of several cotangents the gradient by the shared parameters."""
        return each_row(
            lambda one: self._parts.shared(self._gradient_of(one)), cotangents, self._way
        )

    def _weighted(self, weights: Vector) -> PyTree:
        """The gradient of the weighted sum of the losses."""
        (gradient,) = self._transpose(cotangent(weights, self.losses))
        return gradient

    def _gradient_of(self, unit: list[Array]) -> PyTree:
        (gradient,) = self._transpose(jax.tree.unflatten(self.tasks.structure, unit))
        return gradient

    def _low_memory_gramian(self, linear: Callable[[PyTree], Losses]) -> Gramian:
        r"""The Gramian with one task gradient held at a time.

        Row k of :math:`G = J J^\top` is J applied to the gradient of task k: one backward pass
        gives the gradient, one forward derivative the row.
        """

        def row(unit: list[Array]) -> Vector:
            gradient = self._parts.without_rest(self._gradient_of(unit))
            return self.tasks.stack(linear(_conjugate(gradient)))

        gramian = jax.lax.map(row, unit_cotangents(self.losses))
        return (gramian + gramian.T) / 2


class RepresentationJacobian:
    """The Jacobian of the task losses by a representation, or by the encoder's parameters.

    Args:
      encode: from the parameters to the representation z and its auxiliary output.
      decode: from the parameters and ``{task: z}`` to the losses and their auxiliary output.
      params: the parameters.
      mask: which tasks have labels, or ``None``.
      names: the tasks' names.
      head_gradient: the gradient of what only the heads use.
      over_encoder: whether the rows are taken over the parameters of the encoder, not at z.
      shared: the encoder's parameters that enter the rows then.
      rows: how these are computed.
      axes: the mesh axes of a ``shard_map`` along which the batch is spread.

    Attributes:
      losses: the losses.
      aux: the auxiliary outputs of both.
      tasks: the tasks.
      present: which of them are.
    """

    shared = groups = None
    whole = False  # the heads have parameters of their own

    def __init__(
        self,
        encode: Callable[[PyTree], tuple[PyTree, Any]],
        decode: Callable[[PyTree, dict[str, PyTree]], tuple[Losses, Any]],
        params: PyTree,
        mask: PyTree | None,
        *,
        names: tuple[str, ...],
        head_gradient: Literal["weighted", "unweighted"],
        over_encoder: bool,
        shared: Shared,
        rows: RowsMode,
        axes: tuple[str, ...],
    ) -> None:
        self._parts = Partition.of(params, shared)
        self._axes, self._linear = axes, None
        self._over_encoder, self._head_gradient = over_encoder, head_gradient
        if over_encoder and rows == "low_memory":
            z, self._linear, self._encoder_pullback, encoder_aux = linearize(encode, params)
        else:
            z, self._encoder_pullback, encoder_aux = jax.vjp(encode, params, has_aux=True)
        # Each task is given its own copy of z: one pass back through the heads then finds the
        # gradients of all tasks at once, each at its copy.
        self.losses, self._heads_pullback, heads_aux = jax.vjp(
            decode, params, dict.fromkeys(names, z), has_aux=True
        )
        self.aux: Any = (encoder_aux, heads_aux)
        check_global(self.losses, params, axes)
        self.tasks, self._at_z = read_tasks(self.losses), jax.tree.structure(z)
        self.present: Mask = read_mask(mask, self.tasks)
        self._way = choose_rows(rows, self.tasks.number, params)

    def pull_back(self, weights: Vector) -> PyTree:
        """The gradient, in one backward pass through the heads and one through the encoder."""
        sums = [
            sum_of(list(leaves)).astype(leaves[0].dtype)
            for leaves in zip(*self._rows_at_z(weights), strict=True)
        ]
        return self._with_heads(self._through_encoder(sums), weights)

    def measure(self) -> tuple[Gramian, Any]:
        """The Gramian; the rows at z, and those by the encoder's parameters where they are held."""
        rows = self._rows_at_z(self._ones)
        if not self._over_encoder:
            return gramian_of(rows, self._axes), (rows, None)
        if self._linear is not None:
            return self._low_memory_gramian(self._linear, stacked(rows)), (rows, None)
        in_encoder = each_row(
            lambda row: self._parts.shared(self._through_encoder(row)), rows, self._way
        )
        return gramian_of(in_encoder, self._axes), (rows, in_encoder)

    def combine(self, weights: Vector, rows: Any) -> PyTree:
        """The gradient from the rows, and one more backward pass through the heads."""
        at_z, in_encoder = rows
        gradient = self._through_encoder(combine(weights, at_z))  # dropped where the rows are held
        if in_encoder is not None:
            shared, rest = combine(weights, in_encoder), self._parts.rest(gradient)
            gradient = self._parts.join(shared, rest)
        return self._with_heads(gradient, weights)

    @property
    def _ones(self) -> Vector:
        return self.present.astype(self.tasks.dtype)

    def _rows_at_z(self, weights: Vector) -> tuple[list[Array], ...]:
        """The leaves of each task's gradient at z, weighted."""
        _, gradients = self._heads_pullback(cotangent(weights, self.losses))
        return tuple(jax.tree.leaves(gradients[task]) for task in self.losses)

    def _through_encoder(self, leaves: list[Array]) -> PyTree:
        (gradient,) = self._encoder_pullback(jax.tree.unflatten(self._at_z, leaves))
        return gradient

    def _with_heads(self, gradient: PyTree, weights: Vector) -> PyTree:
        # Of this pass XLA keeps what the heads' parameters need; the rest is computed once.
        chosen = weights if self._head_gradient == "weighted" else self._ones
        of_heads, _ = self._heads_pullback(cotangent(chosen, self.losses))
        return jax.tree.map(jnp.add, gradient, of_heads)

    def _low_memory_gramian(self, linear: Callable[[PyTree], PyTree], rows: list[Array]) -> Gramian:
        """The Gramian over the encoder's parameters, one task gradient held at a time."""

        def row(leaves: list[Array]) -> Vector:
            gradient = self._parts.without_rest(self._through_encoder(leaves))
            changes = _conjugate(self._at_z.flatten_up_to(linear(_conjugate(gradient))))
            between = gramian_between(rows, [change[None] for change in changes], self._axes)
            return between[:, 0]

        products = jax.lax.map(row, rows)
        return (products + products.T) / 2


TaskJacobian = ParameterJacobian | RepresentationJacobian


def _conjugate(gradient: PyTree) -> PyTree:
    """The direction of steepest ascent: for complex numbers JAX has its conjugate as gradient."""
    return jax.tree.map(jnp.conj, gradient)


def cotangent(weights: Vector, losses: Losses) -> Losses:
    """The weights as a cotangent of the losses, in their dtypes."""
    tasks, leaves = read_tasks(losses), jax.tree.leaves(losses)
    parts = zip(tasks.split(weights), leaves, strict=True)
    return jax.tree.unflatten(
        tasks.structure, [weight.astype(leaf.dtype) for weight, leaf in parts]
    )
