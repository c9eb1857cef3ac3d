"""go4align against the published updates, with every clustering tried, in NumPy and float64."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from methods import run_vectors as run

import mtl_jax
from mtl_jax.loss_weightings.go4align import _centers


def best_centers(values, groups):
    """For each value the mean of its cluster, in the best of all clusterings."""
    best, found = np.inf, values
    for labels in itertools.product(range(groups), repeat=len(values)):
        labels = np.array(labels)
        means = np.array([values[labels == i].mean() if i in labels else 0 for i in range(groups)])
        spread = ((values - means[labels]) ** 2).sum()
        if spread < best:
            best, found = spread, means[labels]
    return found


def published(sequence, groups, step_size):
    """The authors' update: products of shares, and the centers of the clusters as weights."""
    q, weights = np.full(sequence.shape[1], 1 / sequence.shape[1]), []
    for losses in sequence:
        q = q * np.exp(-step_size * losses)
        q = q / q.sum()
        weights.append(best_centers(q * losses.sum() / losses, groups))
    return np.array(weights)


LOSSES = np.random.default_rng(0).uniform(0.2, 3, (20, 5))


@pytest.mark.parametrize("step_size", [0.0, 1e-4, 0.3])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_published(groups, step_size, x64):
    weights, state = run(mtl_jax.go4align(groups, step_size), LOSSES)
    np.testing.assert_allclose(weights, published(LOSSES, groups, step_size), rtol=1e-10)
    np.testing.assert_allclose(np.exp(state.inner.log_shares).sum(), 1, rtol=1e-12)


@pytest.mark.parametrize("groups", [5, 7])
def test_each_task_is_a_group(groups, x64):
    weights, _ = run(mtl_jax.go4align(groups, step_size=0.0), LOSSES)
    weighted = weights * LOSSES
    np.testing.assert_allclose(weighted, np.tile(LOSSES.mean(1), (5, 1)).T, rtol=1e-10)


def test_absent_tasks_keep_their_shares(x64):
    """The present ones share what they had together, and are clustered among themselves."""
    masks = np.random.default_rng(1).random(LOSSES.shape) < 0.6
    masks[7] = False
    weights, state = run(mtl_jax.go4align(2, 0.3), LOSSES, masks)
    q = np.full(5, 1 / 5)
    for losses, present, found in zip(LOSSES, masks, weights, strict=True):
        assert np.all(found[~present] == 0)
        if not present.any():
            continue
        lowered = q[present] * np.exp(-0.3 * losses[present])
        q[present] = q[present].sum() * lowered / lowered.sum()
        own = q[present] / q[present].sum() * losses[present].sum() / losses[present]
        np.testing.assert_allclose(found[present], best_centers(own, 2), rtol=1e-10)
    np.testing.assert_allclose(np.exp(state.inner.log_shares), q, rtol=1e-10)


def test_weights_do_not_depend_on_the_scale_but_for_the_shares():
    """Losses as far apart as float32 allows, and all of them far from 1."""
    weighting = mtl_jax.go4align(2, step_size=0.0)
    weights, _ = run(weighting, np.float32(LOSSES))
    for scale in (2.0**-110, 2.0**110):
        scaled, _ = run(weighting, np.float32(LOSSES * scale))
        np.testing.assert_allclose(scaled, weights, rtol=1e-5)
    each, _ = run(mtl_jax.go4align(3, step_size=0.0), np.float32([(1.0, 1e25, 1e30)]))
    np.testing.assert_allclose(each, [(1e30 / 3, 1e5 / 3, 1 / 3)], rtol=1e-5)
    far, _ = run(weighting, np.float32([(1e-15, 1e-15, 1e15)]))
    np.testing.assert_allclose(far, [(1e30 / 3, 1e30 / 3, 1 / 3)], rtol=1e-5)


def test_a_task_with_large_losses_for_long_comes_back():
    """Its share would underflow, and stay 0 as a product."""
    sequence = np.float32([(1.0, 0.1)] * 2000 + [(0.1, 1.0)] * 200)
    weights, _ = run(mtl_jax.go4align(2, step_size=1.0), sequence)
    assert weights[1999, 0] < 1e-30
    np.testing.assert_allclose(weights[-1], (11, 0), atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_clusters_are_the_best_ones(seed, x64):
    """Against all clusterings; with ties, values very close, and absent ones between them."""
    rng = np.random.default_rng(seed)
    values = np.concatenate([rng.uniform(0, 1, 4), np.repeat(rng.uniform(), 2), [0.5 + 1e-9]])
    values = rng.permutation(np.concatenate([values, rng.uniform(0, 1, 3)]))
    present = rng.permutation(np.arange(10) < 7)
    for groups in (1, 2, 3):
        found = _centers(jnp.asarray(values), jnp.asarray(present), groups)
        expected = best_centers(values[present], groups)
        np.testing.assert_allclose(found[present], expected, rtol=1e-12)


def test_close_values_are_told_apart_in_float32():
    """The sums are of squared differences: nothing large is taken from something large."""
    values = jnp.float32([1.0, 1.0 + 1e-6, 1.0 + 5e-6, 1.0 + 6e-6])
    found = _centers(values, jnp.ones(4, bool), 2)
    assert found[0] == found[1] < found[2] == found[3]
