"""Comparison of pytrees that may hold keys."""

import jax
import jax.numpy as jnp
import numpy as np


def assert_trees_close(actual, expected, rtol, atol):
    def check(actual, expected):
        if jnp.issubdtype(jnp.asarray(actual).dtype, jax.dtypes.prng_key):
            actual, expected = jax.random.key_data(actual), jax.random.key_data(expected)
        np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)

    jax.tree.map(check, actual, expected)


def assert_trees_equal(actual, expected):
    assert_trees_close(actual, expected, rtol=0, atol=0)
