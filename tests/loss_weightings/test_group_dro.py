"""group_dro against the published updates, written in NumPy and float64."""

import jax
import numpy as np
import pytest
from methods import run_vectors as run

import mtl_jax


def published(sequence, step_size, normalize=False):
    """The authors' update, without group adjustments: products, in the weights' own scale."""
    q, weights = np.full(sequence.shape[1], 1 / sequence.shape[1]), []
    for losses in sequence:
        scores = losses / losses.sum() if normalize else losses
        q = q * np.exp(step_size * scores)
        q = q / q.sum()
        weights.append(len(q) * q)
    return np.array(weights)


def doremi(sequence, reference, step_size=1.0, smoothing=1e-4):
    """The domain weights of DoReMi, from the clipped excess of each domain."""
    q, weights = np.full(sequence.shape[1], 1 / sequence.shape[1]), []
    for losses in sequence:
        scores = np.log(q) + step_size * np.clip(losses - reference, 0, None)
        q = np.exp(scores) / np.exp(scores).sum()
        q = (1 - smoothing) * q + smoothing / len(q)
        weights.append(len(q) * q)
    return np.array(weights)


LOSSES = np.random.default_rng(0).uniform(0.2, 3, (30, 4))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("step_size", [0.0, 0.01, 1.0])
def test_published(step_size, normalize, x64):
    weights, state = run(mtl_jax.group_dro(step_size, normalize=normalize), LOSSES)
    np.testing.assert_allclose(weights, published(LOSSES, step_size, normalize), rtol=1e-10)
    np.testing.assert_allclose(np.exp(state.inner.log_shares).sum(), 1, rtol=1e-12)


@pytest.mark.parametrize("smoothing", [1e-4, 0.3])
def test_doremi(smoothing, x64):
    reference = (1.0, 0.5, 2.0, 4.0)
    weighting = mtl_jax.group_dro(1.0, reference, smoothing=smoothing)
    weights, _ = run(weighting, LOSSES)
    expected = doremi(LOSSES, np.array(reference), smoothing=smoothing)
    np.testing.assert_allclose(weights, expected, rtol=1e-10)
    assert np.argmin(weights[-1]) == 3  # never behind its reference


def test_absent_tasks_keep_their_shares(x64):
    """The present ones share among themselves what they had together."""
    masks = np.random.default_rng(1).random(LOSSES.shape) < 0.6
    masks[7] = False
    weights, state = run(mtl_jax.group_dro(0.5), LOSSES, masks)
    q = np.full(4, 1 / 4)
    for losses, present, found in zip(LOSSES, masks, weights, strict=True):
        raised = q[present] * np.exp(0.5 * losses[present])
        q[present] = q[present].sum() * raised / raised.sum()
        expected = present.sum() * q[present] / q[present].sum()
        np.testing.assert_allclose(found[present], expected, rtol=1e-10)
        assert np.all(found[~present] == 0)
    np.testing.assert_allclose(np.exp(state.inner.log_shares), q, rtol=1e-10)


def test_smoothing_may_be_traced():
    @jax.jit
    def weights(smoothing):
        weighting = mtl_jax.group_dro(smoothing=smoothing)
        return weighting.update((1.0, 3.0), weighting.init((1.0, 3.0)))[0]

    for smoothing in (0.0, 0.3):
        plain = mtl_jax.group_dro(smoothing=smoothing)
        expected, _ = plain.update((1.0, 3.0), plain.init((1.0, 3.0)))
        np.testing.assert_allclose(weights(smoothing), expected, rtol=1e-6)


def test_a_task_that_was_easy_for_long_comes_back():
    """Its share would underflow, and stay 0 as a product."""
    sequence = np.float32([(1.0, 0.0)] * 2000 + [(0.0, 1.0)] * 200)
    weights, _ = run(mtl_jax.group_dro(1.0), sequence)
    assert weights[1999, 1] == 0
    np.testing.assert_allclose(weights[-1], (0, 2), atol=1e-6)


def test_normalized_scores_do_not_depend_on_the_scale():
    weighting = mtl_jax.group_dro(0.5, normalize=True)
    weights, _ = run(weighting, np.float32(LOSSES))
    for scale in (2.0**-100, 2.0**100):
        scaled, _ = run(weighting, np.float32(LOSSES * scale))
        np.testing.assert_allclose(scaled, weights, rtol=1e-6)
    nan, _ = run(weighting, np.float32([(-1.0, 2.0, 1.0, 1.0)]))
    assert np.all(np.isnan(nan))
    equal, _ = run(weighting, np.zeros((2, 4), np.float32))
    np.testing.assert_allclose(equal, 1, rtol=1e-6)
