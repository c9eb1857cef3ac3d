"""The devices of a comparison: one, or those of a mesh, which can be of several processes."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from mtl_jax._typing import PyTree


def all_devices() -> Mesh:
    """A mesh of all devices of all processes, along one axis."""
    return jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(AxisType.Auto,))


def number_of_devices(mesh: Mesh | None) -> int:
    """The number of devices that a batch is spread over."""
    return 1 if mesh is None else mesh.size


def replicated(mesh: Mesh | None) -> NamedSharding | None:
    """Every device holds all of an array; ``None`` without a mesh."""
    return None if mesh is None else NamedSharding(mesh, P())


def spread(mesh: Mesh | None) -> NamedSharding | None:
    """Every device holds its part of an array, along the leading axis; ``None`` without a mesh."""
    return None if mesh is None else NamedSharding(mesh, P(mesh.axis_names))


def place(tree: PyTree, sharding: NamedSharding | None) -> PyTree:
    """The arrays, which all processes have alike, placed so; as they are for ``None``."""
    if sharding is None:
        return tree

    def placed(leaf: Array) -> Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = placed(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        # Not `device_put`, which wants all devices to be of this process.
        values = np.asarray(leaf)
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    return jax.tree.map(placed, tree)


def is_first_process() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Go on when all processes have come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
