"""Arrays that are spread over devices: what JAX must be told of sums over them.

Under ``jit`` the arrays are whole, and JAX finds out what has to travel; only with explicit mesh
axes it must be told where the result of a contraction shall lie. Inside ``shard_map`` each device
has its part of the arrays that vary along a mesh axis, and the sum over the parts is ours.
"""

from collections.abc import Iterable

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array

from mtl_jax.pytree import PyTree
from mtl_jax.tasks import Losses, leaf_name

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


def read_axis_name(axis_name: AxisName) -> tuple[str, ...]:
    """The axes that are named, checked against the surrounding ``shard_map``.

    Raises:
      ValueError: if there is no such axis, or ``shard_map`` does not track what varies along it.
    """
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ())
    manual = getattr(jax.sharding.get_abstract_mesh(), "manual_axes", ())
    for name in names:
        if name not in manual:
            raise ValueError(
                f"axis_name={name!r} is not an axis of a jax.shard_map around this call, whose "
                f"axes are {manual}. Under jit alone leave `axis_name` out, however the arrays are "
                "sharded."
            )
    for name in manual:
        if name not in varying_axes(jax.lax.axis_index(name)):
            raise ValueError(
                "jax.shard_map with check_vma=False does not know which arrays differ between the "
                f"devices along {name!r}: the gradient of replicated parameters would be wrong "
                "without an error. Leave check_vma at its default, True."
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
