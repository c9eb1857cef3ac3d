"""The devices of a comparison: one, or those of a mesh, which can be of several processes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from mtl_jax._typing import PyTree


@dataclasses.dataclass(frozen=True)
class Devices:
    """Where arrays are put.

    Attributes:
      mesh: the devices that each batch is spread over, the parameters being on all of them;
        ``None`` for one device.
    """

    mesh: Mesh | None = None

    @property
    def number(self) -> int:
        """The number of devices that a batch is spread over."""
        return 1 if self.mesh is None else self.mesh.size

    @property
    def whole(self) -> NamedSharding | None:
        """Every device holds all of an array; ``None`` without a mesh."""
        return None if self.mesh is None else NamedSharding(self.mesh, P())

    @property
    def spread(self) -> NamedSharding | None:
        """Every device holds its part of an array, along the leading axis."""
        return None if self.mesh is None else NamedSharding(self.mesh, P(self.mesh.axis_names))

    def replicate(self, tree: PyTree) -> PyTree:
        """Arrays that all processes have alike, on every device; as they are without a mesh."""
        return _place(tree, self.whole)

    def spread_whole(self, tree: PyTree) -> PyTree:
        """Arrays that all processes have alike, spread along the leading axis."""
        return _place(tree, self.spread)

    def spread_parts(self, tree: PyTree) -> PyTree:
        """Arrays of which each process has its part, spread along the leading axis."""
        sharding = self.spread
        if sharding is None:
            return tree
        return jax.tree.map(
            lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), tree
        )

    def constrain(self, batch: PyTree) -> PyTree:
        """A batch, spread; traced."""
        sharding = self.spread
        return batch if sharding is None else jax.lax.with_sharding_constraint(batch, sharding)


def all_devices() -> Mesh:
    """A mesh of all devices of all processes, along one axis."""
    return jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(AxisType.Auto,))


def is_first_process() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Go on when all processes have come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def as_the_first(value: bool) -> bool:
    """What the first process says; all must ask."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(value)))


def _place(tree: PyTree, sharding: NamedSharding | None) -> PyTree:
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
