"""Gramians at the ends of float32, of 1 to 128 tasks, some of them absent, and odd losses.

Norms from 1e-18 to 1e18 have squares in float32. Beyond, a square that overflows is flagged, and
one that underflows is that of a gradient of zero.
"""

import gramian_methods
import numpy as np
import pytest
from gramian_methods import DEGREES, GRAMIAN_METHODS, SIZE
from trees import as_numpy

MOST = 128
each_method = pytest.mark.parametrize("name", GRAMIAN_METHODS)
# Those that harm no task; the last three only where a direction exists that serves all.
HARMLESS = ("mgda", "upgrad", "dual_proj", "nash_mtl", "fair_grad", "conflict_free")
READS_LOSSES = ("gradnorm", "norm_balance[root_loss]", "mgda[loss]", "mgda[loss+]")


def most(name):
    """The most tasks of a method, less where it takes long, or twice the same."""
    return SIZE if name in ("upgrad", "aligned_mtl[rmse]") else MOST


def weights_of(name, J, **arguments):
    """The weights and the state, with a program of few tasks or of the most."""
    return gramian_methods.weights_of(name, J, size=max(SIZE, len(J)), **arguments)


def gradients(number, parameters, seed=0):
    """Gradients of norm 1."""
    J = np.random.default_rng(seed).normal(size=(number, parameters))
    return (J / np.linalg.norm(J, axis=1, keepdims=True)).astype(np.float32)


def direction(weights, J):
    return weights.astype(np.float64) @ J.astype(np.float64)


def check_non_conflicting(name, weights, J, state):
    """No gain is negative beyond the rounding of what is added up in it."""
    lengths = np.linalg.norm(J.astype(np.float64), axis=1)
    if name in ("nash_mtl", "fair_grad") and state.inner.residual > 0.5:
        return
    if name == "conflict_free" and np.linalg.matrix_rank(J / lengths[:, None]) < len(J):
        return
    gains = J.astype(np.float64) @ direction(weights, J) / lengths
    assert np.all(gains >= -1e-5 * np.sum(np.abs(weights) * lengths)), gains.min()


def degree(name, state):
    """That of the scaling, which is 0 for the weights that stand in for a missing solution."""
    missing = name in ("nash_mtl", "fair_grad") and state.inner.residual > 0.5
    return 0 if missing else DEGREES[name]


@each_method
def test_from_1_to_128_tasks_at_every_scale(name):
    for number, parameters in ((1, 3), (2, 3), (20, 200), (most(name), 10)):
        J = gradients(number, parameters)
        expected, state = weights_of(name, J)
        assert np.all(np.isfinite(expected)), number
        exponent = -50 if parameters == 10 else 50  # about 1e-15 and 1e15: rounds nothing
        scaled, _ = weights_of(name, J * np.float32(2.0**exponent))
        scaled = scaled * 2.0 ** (-exponent * degree(name, state))
        np.testing.assert_allclose(scaled, expected, rtol=1e-5, atol=1e-7)
        for scale in (1e-18, 1e18):
            weights, after = weights_of(name, J * np.float32(scale), state=state)
            assert np.all(np.isfinite(weights)), (number, scale)
            assert all(np.all(np.isfinite(leaf)) for leaf in as_numpy(after))


def test_128_tasks_of_upgrad():
    J = gradients(MOST, 10)
    weights, state = gramian_methods.weights_of("upgrad", J, size=MOST)
    assert np.all(np.isfinite(weights))
    check_non_conflicting("upgrad", weights, J, state)


@each_method
def test_one_task_1e12_times_another(name):
    for number, parameters in ((2, 3), (3, 2), (20, 200)):
        for factor in (1e12, 1e-12):
            J = gradients(number, parameters)
            J[number // 2] *= np.float32(factor)
            rows = J * np.float32(factor**-0.5)
            weights, state = weights_of(name, rows)
            assert np.all(np.isfinite(weights)), (number, factor)
            if name in HARMLESS:
                check_non_conflicting(name, weights, rows, state)


@each_method
def test_a_norm_whose_square_underflows_is_zero_and_one_that_overflows_is_flagged(name):
    J = gradients(5, 8)
    _, state = weights_of(name, J)
    tiny, zero, huge = J.copy(), J.copy(), J.copy()
    tiny[2] *= np.float32(1e-25)
    zero[2] = 0
    huge[2] *= np.float32(1e25)
    np.testing.assert_array_equal(weights_of(name, tiny)[0], weights_of(name, zero)[0])
    with np.errstate(over="ignore"):
        weights, after = weights_of(name, huge, state=state)
    assert np.all(np.isnan(weights))
    for new, old in zip(as_numpy(after), as_numpy(state), strict=True):
        np.testing.assert_array_equal(new, old)


@each_method
def test_tasks_that_come_and_go(name):
    rng, state, number = np.random.default_rng(1), None, most(name)
    for step in range(8):
        J = gradients(number, 30, seed=step) * np.float32(10.0 ** rng.uniform(-15, 15))
        present = rng.random(number) < rng.choice([0.02, 0.5, 1.0])
        if step in (2, 3):
            present[:] = step == 3 and np.arange(number) == 7  # nobody, and one alone
        broken = step == 5
        if broken:
            J[:, 0], present[3] = np.nan, True
        weights, after = weights_of(name, J, present=present, state=state)
        np.testing.assert_array_equal(weights[~present], 0)
        if broken:
            assert np.all(np.isnan(weights[present]))
            for new, old in zip(as_numpy(after), as_numpy(state), strict=True):
                np.testing.assert_array_equal(new, old)
        else:
            assert np.all(np.isfinite(weights)), step
            assert all(np.all(np.isfinite(leaf)) for leaf in as_numpy(after)), step
        state = after


@each_method
def test_losses_of_any_size_and_sign(name):
    """They are not looked at but by some methods, whose domain is what their docstrings say."""
    J = gradients(6, 4)
    expected, state = weights_of(name, J)
    for losses in (np.logspace(-30, 30, 6), np.logspace(30, -30, 6), np.full(6, 1e30)):
        after = state if name not in READS_LOSSES else None
        for _ in range(2):
            weights, after = weights_of(name, J, losses=losses, state=after)
            assert np.all(np.isfinite(weights))
            losses = losses[::-1]
    for odd in (-1.0, 0.0):
        losses = np.array([1.0, odd, 1.0, 2.0, 1.0, 1.0])
        weights, after = weights_of(name, J, losses=losses)
        if name in READS_LOSSES:
            assert np.all(np.isnan(weights))
            np.testing.assert_array_equal(after.steps, 0)
        else:
            np.testing.assert_array_equal(weights, expected)
    # A task that is done: no loss, no gradient.
    J[1] = 0
    weights, _ = weights_of(name, J, losses=[1.0, 0.0, 1.0, 2.0, 1.0, 1.0], state=state)
    assert np.all(np.isfinite(weights))


@pytest.mark.parametrize("name", ["mgda[loss]", "mgda[loss+]"])
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_mgda_of_losses_far_apart(name, scale):
    """Orthogonal gradients of norm 1, divided by the losses: the weights go with their squares."""
    losses = np.array([1e-5, 1.0, 2.0]) * scale
    weights, _ = weights_of(name, np.eye(3, dtype=np.float32), losses=losses)
    np.testing.assert_allclose(weights, [2e-11, 0.2, 0.8], rtol=1e-5)
