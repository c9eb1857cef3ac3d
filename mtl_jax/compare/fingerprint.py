"""What tells one run from another: digests of arrays, and the fingerprint of a configuration."""

import hashlib
import importlib.metadata
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax._typing import PyTree

Fingerprint = dict[str, Any]
"""By name what decides a run's numbers: settings, as JSON has them, and digests."""

_DIFFERENCES = {
    "data": "the data differ",
    "start": "the parameters or states that it starts from differ",
    "program": "the training program (network, losses, weighting, optimizer) differs",
    "metrics": "the metrics are computed differently",
}
"""What it means that the entries of two fingerprints that are digests are not the same."""


class OtherConfigurationError(ValueError):
    """The checkpoints are of a run with another configuration."""


def digest(tree: PyTree) -> str:
    """The SHA-256 digest of a pytree of arrays: of paths, dtypes, shapes and bytes.

    Args:
      tree: arrays and PRNG keys, which must be whole on this process.

    Returns:
      The digest, in hexadecimal digits.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_jax.compare import digest
      >>> state = {"params": jnp.ones(3), "step": jnp.int32(7)}
      >>> digest(state) == digest({"params": jnp.ones(3), "step": jnp.int32(7)})
      True
      >>> digest(state) == digest({"params": jnp.ones(3), "step": jnp.int32(8)})
      False
    """
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        kind = ""
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            kind, leaf = str(jax.random.key_impl(leaf)), jax.random.key_data(leaf)
        array = np.ascontiguousarray(leaf)
        name = jax.tree_util.keystr(path)
        found.update(f"{name} {kind} {array.dtype} {np.shape(leaf)}\n".encode())
        found.update(array.reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def text_digest(text: str) -> str:
    """The SHA-256 digest of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def where_it_runs() -> Fingerprint:
    """What decides a program's last bits besides the program."""
    return {
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "device": f"{jax.default_backend()} {jax.devices()[0].device_kind}",
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "").strip(),
    }


def difference(now: Mapping[str, Any], then: Mapping[str, Any]) -> str:
    """What differs between two fingerprints, in words; empty if nothing does."""
    names = [name for name in {**now, **then} if now.get(name) != then.get(name)]
    return "; ".join(
        _DIFFERENCES.get(name, f"{name} is {now.get(name)!r} and was {then.get(name)!r}")
        for name in names
    )
