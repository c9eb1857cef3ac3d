"""The devices of a comparison: one, or those of a mesh, which can be of several processes."""

from typing import TypeVar

import jax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

T = TypeVar("T")


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


def place(tree: T, sharding: NamedSharding | None) -> T:
    """The arrays, which all processes have alike, placed so; as they are for ``None``."""
    return tree if sharding is None else jax.device_put(tree, sharding)


def is_first_process() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Go on when all processes have come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
