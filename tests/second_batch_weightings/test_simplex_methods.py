"""MoDo and SDMGrad against published implementations (data/second_batches.json) and definitions."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import modo, sdmgrad
from mtl_jax.second_batch_weightings._simplex import nearest_shares

SEQUENCES = json.loads(
    (pathlib.Path(__file__).parents[1] / "data" / "second_batches.json").read_text()
)["sequences"]
each_sequence = pytest.mark.parametrize("case", SEQUENCES, ids=lambda case: case["id"])
MOST = 4  # tasks of every program: further ones are absent
modo_of, sdmgrad_of = functools.cache(modo), functools.cache(sdmgrad)


def start(weighting, dtype=np.float32):
    return weighting.init((dtype(0),) * MOST)


def update(weighting, first, second, state, present=None):
    """The weights and the next state, for the task gradients on two batches."""
    first, second = np.asarray(first), np.asarray(second)
    number = len(first)
    present = np.ones(number, bool) if present is None else np.array(present)
    present = np.pad(present, (0, MOST - number))
    combinations, step = weighting.method.directions(state, jnp.asarray(present))
    assert step is None
    second = np.pad(second, [(0, MOST - number), (0, 0)])
    products = np.pad(first, [(0, MOST - number), (0, 0)]) @ (np.asarray(combinations) @ second).T
    weights, state = weighting.update(
        (first.dtype.type(1),) * MOST, state, mask=tuple(present), products=products
    )
    weights = np.array(weights)
    assert np.all(weights[number:] == 0)
    return weights[:number], state


@pytest.mark.usefixtures("x64")
@each_sequence
@pytest.mark.parametrize("gamma", [0.1, 0.001])
def test_modo(case, gamma):
    suffix = "" if gamma == 0.1 else "[gamma=0.001]"
    weighting, state = modo_of(gamma), None
    state = start(weighting, np.float64)
    peers = [case["peers"][f"{peer}.MoDo{suffix}"]["steps"] for peer in ("torchjd", "libmtl")]
    for first, second, *steps in zip(case["J1"], case["J2"], *peers, strict=True):
        weights, state = update(weighting, first, second, state)
        for step in steps:
            np.testing.assert_allclose(weights, step["weights"], rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("x64")
@each_sequence
@pytest.mark.parametrize(
    ("suffix", "rate", "tolerance"),
    # The published step sizes do not converge, and amplify rounding errors.
    [("[lr=0.1]", 0.1, 1e-9), ("[lr=5]", 5.0, 1e-6), ("", 10.0, 1e-6)],
)
def test_sdmgrad(case, suffix, rate, tolerance):
    weighting = sdmgrad_of(learning_rate=rate)
    state = start(weighting, np.float64)
    steps = case["peers"][f"torchjd.SDMGrad{suffix}"]["steps"]
    for first, second, step in zip(case["J1"], case["J2"], steps, strict=True):
        weights, state = update(weighting, first, second, state)
        np.testing.assert_allclose(weights, step["weights"], rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("x64")
@each_sequence
def test_sdmgrad_of_libmtl(case):
    """Its first batch trains the network; the other two decide the weights."""
    weighting = sdmgrad_of(learning_rate=5.0)
    state = start(weighting, np.float64)
    steps = case["peers"]["libmtl.SDMGrad"]["steps"]
    for *batches, step in zip(case["J2"], case["J3"], case["J1"], steps, strict=True):
        first, second, third = batches
        weights, state = update(weighting, first, second, state)
        found = np.asarray(state.inner.shares)[: case["K"]]  # absent tasks keep theirs
        np.testing.assert_allclose(found / found.sum(), step["w"], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(weights @ np.array(third), step["g"], rtol=1e-6, atol=1e-6)


def test_sdmgrad_converges_to_the_shortest_direction_near_the_preferred_one():
    """With one batch in the place of both; the minimum is found on a grid."""
    rows = np.array([[3.0, 1.0], [-1.0, 2.0]], np.float32)
    grid = np.linspace(0, 1, 10001)
    for preference, normal in ((None, np.array([0.5, 0.5])), ((2.0, 0.0, 0.0, 0.0), [2.0, 0.0])):
        for strength in (0.0, 0.3, 3.0):
            weighting = sdmgrad(strength, 0.1, 0.5, 400, preference)
            weights, _ = update(weighting, rows, rows, start(weighting))
            points = np.stack([grid, 1 - grid], axis=1) + strength * np.array(normal)
            best = points[np.argmin(np.sum((points @ rows) ** 2, axis=1))] / (1 + strength)
            np.testing.assert_allclose(weights, best, atol=1e-3)


def test_sdmgrad_without_epsilon_does_not_depend_on_the_scale():
    rows = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    weighting = sdmgrad_of(learning_rate=0.1, eps=0.0)
    plain, _ = update(weighting, *rows, start(weighting))
    for scale in (2.0**-60, 2.0**60):
        scaled, _ = update(weighting, *(rows * np.float32(scale)), start(weighting))
        np.testing.assert_allclose(scaled, plain, rtol=1e-5)
    weights, state = update(weighting, rows[0], -rows[0], start(weighting))
    assert np.isnan(weights).all()
    assert state.steps.tolist() == [0] * MOST


def test_modo_goes_to_the_task_that_pulls_least():
    """Two orthogonal gradients: the shortest direction has weights inverse to squared lengths."""
    weighting, rows = modo_of(0.05, 0.0), np.diag([1.0, 2.0]).astype(np.float32)
    state = start(weighting)
    for _ in range(100):
        weights, state = update(weighting, rows, rows, state)
    np.testing.assert_allclose(weights, [0.8, 0.2], rtol=1e-4)
    _, held = update(modo_of(0.0), rows, rows, start(modo_of(0.0)))
    np.testing.assert_allclose(held.inner.weights, 1 / MOST)


@pytest.mark.parametrize("weighting", [modo_of(0.1), sdmgrad_of(learning_rate=0.1)])
def test_absent_tasks_keep_their_shares(weighting):
    """The present ones move as if the others were not there, and share what they had together."""
    rows = np.random.default_rng(1).normal(size=(2, 4, 6)).astype(np.float32)
    _, state = update(weighting, *rows, start(weighting))
    before = np.asarray(state.inner[0])
    present = [True, False, True, False]
    weights, after = update(weighting, *rows, state, present)
    shares = np.asarray(after.inner[0])
    np.testing.assert_array_equal(shares[[1, 3]], before[[1, 3]])
    np.testing.assert_allclose(shares.sum(), 1, rtol=1e-5)
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-5)
    own = state._replace(
        inner=state.inner._replace(
            **{state.inner._fields[0]: before * np.float32([1, 0, 1, 0]) / before[[0, 2]].sum()}
        )
    )
    expected, _ = update(weighting, *(rows * np.float32([1, 0, 1, 0])[:, None]), own, present)
    np.testing.assert_allclose(weights, expected, rtol=1e-4, atol=1e-6)
    # Tasks that had no share at all begin with equal ones.
    none = own._replace(inner=own.inner._replace(**{own.inner._fields[0]: np.zeros(4, np.float32)}))
    weights, _ = update(weighting, 0 * rows[0], rows[1], none, present)
    np.testing.assert_allclose(weights, [0.5, 0, 0.5, 0], rtol=1e-6)


nearest = jax.jit(nearest_shares)


def test_the_projection_is_the_nearest_point():
    """What remains above 0 has lost the same amount, and what does not would have lost more."""
    rng = np.random.default_rng(0)
    for scale in (1e-3, 1.0, 1e30):
        for _ in range(20):
            point = (rng.normal(size=MOST) * scale).astype(np.float32)
            present = rng.uniform(size=MOST) < 0.8
            present[0] = True
            shares = np.asarray(nearest(point, present))
            assert np.all(shares[~present] == 0)
            assert np.all(shares >= 0)
            np.testing.assert_allclose(shares.sum(), 1, rtol=1e-6)
            lost, positive = point.astype(float) - shares, present & (shares > 0)
            threshold = lost[positive].max()
            np.testing.assert_allclose(lost[positive], threshold, rtol=1e-6, atol=1e-6)
            assert np.all(point[present & ~positive] <= threshold + 1e-6 * scale)
    np.testing.assert_array_equal(nearest(np.ones(MOST, np.float32), np.zeros(MOST, bool)), 0)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: modo(-1.0), ValueError, r"modo: `gamma` must be in \[0, inf\)"),
        (lambda: modo(rho="x"), TypeError, "modo: `rho` must be a number"),
        (lambda: sdmgrad(-0.1), ValueError, r"sdmgrad: `regularization` must be in \[0, inf\)"),
        (lambda: sdmgrad(learning_rate=0), ValueError, r"`learning_rate` must be in \(0, inf\)"),
        (lambda: sdmgrad(momentum=1.0), ValueError, r"`momentum` must be in \[0, 1\)"),
        (lambda: sdmgrad(iterations=0), ValueError, "`iterations` must be an integer of at least"),
        (lambda: sdmgrad(preference={"a": -1.0}), ValueError, r"a preference must be in \[0, inf"),
    ],
)
def test_parameters_outside_their_range(make, error, message):
    with pytest.raises(error, match=message):
        make()
