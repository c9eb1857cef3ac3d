"""ExcessMTL: against published implementations, its definition and its special cases."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtl_jax
from mtl_jax import excess_mtl

TOLERANCE = 1e-9
SEQUENCES = json.loads(
    (pathlib.Path(__file__).parents[1] / "data" / "gradient_sequences.json").read_text()
)["sequences"]
each_sequence = pytest.mark.parametrize("case", SEQUENCES, ids=lambda case: case["id"])
MOST, SIZE = 4, 9  # tasks and parameters of every program: further ones are absent, or 0
made = functools.cache(excess_mtl)


def assert_close(actual, expected, tolerance=TOLERANCE):
    """The error is measured against the largest entry: coordinates cancel between the tasks."""
    np.testing.assert_allclose(
        actual, expected, rtol=tolerance, atol=tolerance * np.max(np.abs(expected))
    )


def start(weighting, dtype=np.float32):
    return weighting.init((dtype(0),) * MOST, params=np.zeros(SIZE, dtype))


def update(weighting, rows, state, present=None):
    """The gradient, the weights and the next state."""
    rows = np.asarray(rows)
    K, P = rows.shape
    present = np.ones(K, bool) if present is None else np.array(present)
    weights, state = weighting.update(
        (rows.dtype.type(1),) * MOST,
        state,
        mask=tuple(np.pad(present, (0, MOST - K))),
        task_gradients=np.pad(rows, [(0, MOST - K), (0, SIZE - P)]),
    )
    weights = np.array(weights)
    assert np.all(weights[K:] == 0)
    return weights[:K] @ rows, weights[:K], state


@pytest.mark.usefixtures("x64")
@each_sequence
@pytest.mark.parametrize(
    ("peer", "step_size"), [("libmtl.ExcessMTL", 0.01), ("libmtl.ExcessMTL[step=1]", 1.0)]
)
def test_excess_mtl(case, peer, step_size):
    weighting, K = made(step_size), case["K"]
    state, used = start(weighting, np.float64), np.ones(K)
    for rows, step in zip(case["J1"], case["peers"][peer]["steps"], strict=True):
        gradient, used, state = update(weighting, rows, state)
        assert_close(gradient, step["g"])
        # Relative to each weight: they range down to 1e-30.
        np.testing.assert_allclose(used, step["weights"], rtol=TOLERANCE)
        weights = K * jax.nn.softmax(state.inner.log_weights[:K])
        np.testing.assert_allclose(weights, step["weights"], rtol=TOLERANCE)


@pytest.mark.usefixtures("x64")
@each_sequence
def test_excess_mtl_from_the_other_start(case):
    """TorchJD's first step moves the weights by the risk; from there on, the two are the same.

    But for 1e-7 that TorchJD adds to the first risk, to which the weights are as sensitive as the
    exponents are large.
    """
    weighting, K, rows = made(1.0), case["K"], case["J1"]
    steps = case["peers"]["torchjd.ExcessMTL"]["steps"]
    _, _, state = update(weighting, rows[0], start(weighting, np.float64))
    log_weights = jax.nn.log_softmax(state.inner.initial_risk[:K])
    np.testing.assert_allclose(jnp.exp(log_weights), steps[0]["weights"], rtol=TOLERANCE)
    log_weights = jnp.pad(log_weights, (0, MOST - K))
    state = state._replace(inner=state.inner._replace(log_weights=log_weights))
    for row, step in zip(rows[1:], steps[1:], strict=True):
        gradient, _, state = update(weighting, row, state)
        assert_close(gradient / K, step["g"], 2e-5)


def test_the_first_step_only_sets_the_baseline():
    rows = np.diag([1e-3, 1e3]).astype(np.float32)
    weighting = made(1.0)
    gradient, weights, state = update(weighting, rows, start(weighting))
    np.testing.assert_allclose(gradient, rows.sum(0), rtol=1e-6)
    np.testing.assert_allclose(weights, 1, rtol=1e-6)
    np.testing.assert_allclose(state.inner.log_weights, 0, atol=1e-6)


def test_it_bears_a_first_gradient_of_0():
    """LibMTL: one weight is NaN at step 2 and all are from step 3."""
    weighting = made(0.5)
    rows = np.array([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], np.float32)
    _, _, state = update(weighting, rows, start(weighting))
    first = rows.copy()
    first[0, 0] = 2.0
    gradient, _, state = update(weighting, first, state)
    # The first gradient of the first task sets its baseline, with a ratio of 1; the others' second
    # squares are half of the accumulated ones.
    gains = np.exp(0.5 * np.array([1, 0.5**0.5, 0.5**0.5]))
    expected = 3 * gains / gains.sum() * (2, 1, 1)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)
    for _ in range(5):
        gradient, _, state = update(weighting, rows, state)
        assert np.all(np.isfinite(gradient))


def test_a_returning_task_keeps_its_share():
    weighting = made(1.0)
    rows, state = np.random.default_rng(0).normal(size=(3, SIZE)).astype(np.float32), None
    state = start(weighting)
    for factors in ([1, 2, 5], [1, 2, 0.1]):
        _, _, state = update(weighting, np.float32(factors)[:, None] * rows, state)
    shares = jax.nn.softmax(state.inner.log_weights[:3])
    for _ in range(3):
        _, _, state = update(weighting, rows, state, [True, False, True])
    after = jax.nn.softmax(state.inner.log_weights[:3])
    np.testing.assert_allclose(after[1], shares[1], rtol=1e-5)
    assert abs(after[0] - shares[0]) > 1e-4


def test_wrappers_work_on_it():
    weighting = mtl_jax.clipped(mtl_jax.normalized(made(1.0), 6.0), 0.0, 4.0)
    assert weighting.needs is mtl_jax.Signal.TASK_GRADIENTS
    rows = np.eye(3, SIZE, dtype=np.float32)
    _, plain, state = update(made(1.0), rows, start(made(1.0)))
    rows[0] *= 0.1
    _, plain, _ = update(made(1.0), rows, state)
    _, weights, _ = update(weighting, rows, state)
    np.testing.assert_allclose(weights, np.minimum(2 * plain, 4), rtol=1e-5)


def test_what_is_missing_is_said():
    with pytest.raises(TypeError, match="The parameter"):
        made(1.0).init((1.0, 1.0), params={"w": np.ones(2, int)})
    state = made(1.0).init((1.0, 1.0), params=np.zeros(2))
    with pytest.raises(ValueError, match="reads the task gradients.*pass `task_gradients`"):
        made(1.0).update((1.0, 1.0), state)
    with pytest.raises(ValueError, match="gradients of 3 tasks, but 2 losses"):
        made(1.0).update((1.0, 1.0), state, task_gradients=np.ones((3, 2)))
    with pytest.raises(ValueError, match="The weighting's state"):
        made(1.0).update((1.0, 1.0), state, task_gradients=np.ones((2, 5)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: excess_mtl(0.0), r"excess_mtl: `step_size` must be in \(0, inf\)"),
        (lambda: excess_mtl(eps=-1.0), r"excess_mtl: `eps` must be in \[0, inf\)"),
    ],
)
def test_parameters_outside_their_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
