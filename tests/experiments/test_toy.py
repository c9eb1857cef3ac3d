"""The landscape, its Pareto set, and which weightings reach it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_jax
from experiments.toy import STARTS, distance_to_front, landscape, main, pareto_set, paths


@pytest.mark.parametrize("x", [*STARTS, (-4.0, 3.0), (0.1, 0.2)])
def test_the_formula_in_float64(x):
    x1, x2 = np.array(x)
    f1 = np.log(max(abs(0.5 * (-x1 - 7) - np.tanh(-x2)), 5e-6)) + 6
    f2 = np.log(max(abs(0.5 * (-x1 + 3) + np.tanh(-x2) + 2), 5e-6)) + 6
    g1 = ((-x1 + 7) ** 2 + 0.1 * (-x2 - 8) ** 2) / 10 - 20
    g2 = ((-x1 - 7) ** 2 + 0.1 * (-x2 - 8) ** 2) / 10 - 20
    c1, c2 = max(np.tanh(0.5 * x2), 0), max(np.tanh(-0.5 * x2), 0)
    losses = landscape(jnp.array(x), first_scale=0.1)
    np.testing.assert_allclose(losses["first"], 0.1 * (c1 * f1 + c2 * g1), rtol=1e-5)
    np.testing.assert_allclose(losses["second"], c1 * f2 + c2 * g2, rtol=1e-5)


def test_nothing_dominates_the_pareto_set():
    points = pareto_set(101)
    side = np.linspace(-12, 12, 241)
    grid = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    on_front, elsewhere = (
        np.stack(list(jax.vmap(landscape)(jnp.array(x)).values()), axis=1) for x in (points, grid)
    )
    assert not (elsewhere[:, None] < on_front - 1e-4).all(axis=-1).any()
    off = points - np.array([0.0, 0.5])  # dominated
    off_losses = np.stack(list(jax.vmap(landscape)(jnp.array(off)).values()), axis=1)
    assert (on_front < off_losses).all()
    np.testing.assert_allclose(points[[0, 50, -1], 0], [-7, 0, 7])
    # The star in the pictures of Liu et al.
    np.testing.assert_allclose(points[50, 1], -8.3552, atol=1e-3)
