"""Pytrees that may hold keys: their values, and comparisons."""

import jax
import jax.numpy as jnp
import numpy as np


def as_numpy(tree):
    """The leaves in NumPy, keys as their data."""

    def value(leaf):
        key = jnp.issubdtype(jnp.asarray(leaf).dtype, jax.dtypes.prng_key)
        return np.array(jax.random.key_data(leaf) if key else leaf)

    return [value(leaf) for leaf in jax.tree.leaves(tree)]


def assert_trees_close(actual, expected, rtol, atol):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(as_numpy(actual), as_numpy(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=atol)


def assert_trees_equal(actual, expected):
    assert_trees_close(actual, expected, rtol=0, atol=0)
