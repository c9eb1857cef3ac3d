import numpy as np
import pytest

import mtl_jax


@pytest.mark.parametrize("temperature", [0.5, 1.0, 20.0])
def test_definition(temperature, x64):
    losses = np.random.default_rng(0).uniform(0.1, 5, 6)
    weighting = mtl_jax.uw_so(temperature)
    weights, _ = weighting.update(tuple(losses), weighting.init(tuple(losses)))
    scores = np.exp(1 / (temperature * losses))
    np.testing.assert_allclose(weights, scores / scores.sum(), rtol=1e-12)


def test_a_loss_near_0_takes_all_without_overflow():
    weighting = mtl_jax.uw_so(0.1)
    weights, _ = weighting.update((1.2e-38, 1.0), weighting.init((1.0, 1.0)))
    np.testing.assert_array_equal(weights, (1, 0))
