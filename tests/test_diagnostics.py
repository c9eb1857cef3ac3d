"""Diagnostics against their definitions, in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtl_jax

J = np.random.default_rng(0).normal(size=(5, 7)) * np.array([1, 10, 0.1, 3, 1e4])[:, None]


diagnostics = jax.jit(mtl_jax.diagnostics)


@pytest.mark.parametrize("absent", [None, 1])
def test_definitions(x64, absent):
    present = np.arange(5) != absent
    gramian = J @ J.T
    gramian[~present] = np.nan
    gramian[:, ~present] = np.nan
    found = diagnostics(gramian, present)
    conflicts, pairs = 0, 0
    for i in range(5):
        for j in range(5):
            a, b = J[i], J[j]
            if not (present[i] and present[j]):
                assert found.cosines[i, j] == 0
                assert found.magnitude_similarity[i, j] == 0
                continue
            cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            similarity = 2 * np.linalg.norm(a) * np.linalg.norm(b) / (a @ a + b @ b)
            np.testing.assert_allclose(found.cosines[i, j], cosine, rtol=1e-12)
            np.testing.assert_allclose(found.magnitude_similarity[i, j], similarity, rtol=1e-12)
            pairs += i < j
            conflicts += i < j and cosine < 0
    assert 0 < conflicts < pairs
    np.testing.assert_allclose(found.conflicting, conflicts / pairs, rtol=1e-12)
    np.testing.assert_allclose(found.norms, np.where(present, np.linalg.norm(J, axis=1), 0))


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scale_does_not_matter(scale):
    rows = J.astype(np.float32)
    found = mtl_jax.diagnostics(jnp.asarray(rows @ rows.T))
    scaled = mtl_jax.diagnostics(jnp.asarray((rows * scale) @ (rows * scale).T))
    np.testing.assert_allclose(scaled.cosines, found.cosines, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(scaled.magnitude_similarity, found.magnitude_similarity, rtol=1e-4)


def test_degenerate():
    found = mtl_jax.diagnostics(jnp.diag(jnp.array([1.0, 0.0])))
    np.testing.assert_array_equal(found.cosines, [[1, 0], [0, 0]])
    assert found.conflicting == 0
    assert mtl_jax.diagnostics(jnp.ones((1, 1))).conflicting == 0
    unmeasured = mtl_jax.diagnostics(jnp.full((2, 2), jnp.nan))
    assert jnp.isnan(unmeasured.conflicting)
    with pytest.raises(ValueError, match="A Gramian is a square matrix"):
        mtl_jax.diagnostics(jnp.ones((2, 3)))
