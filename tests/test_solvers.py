"""The solvers against exact optima, the conditions of optimality, and what must not matter."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_jax import solvers

CASES = {
    case["id"]: case
    for case in json.loads(
        (pathlib.Path(__file__).parent / "data" / "gradient_matrices.json").read_text()
    )["cases"]
}
ILL_POSED = "rankdef_opposite_rows_k3_p6"  # for projections of a rounded J


def upgrad(gramian, present):
    targets = jnp.diag(present.astype(gramian.dtype)) / jnp.sum(present)
    project = jax.vmap(solvers.dual_cone_projection, in_axes=(None, 0, None))
    weights, residuals = project(gramian, targets, present)
    return solvers.Solution(jnp.sum(weights, axis=0), jnp.max(residuals))


def dualproj(gramian, present):
    target = jnp.full(present.size, 1 / jnp.sum(present), gramian.dtype)
    return solvers.dual_cone_projection(gramian, target, present)


mgda = jax.jit(solvers.minimum_norm_point)
upgrad, dualproj = jax.jit(upgrad), jax.jit(dualproj)
project = jax.jit(solvers.dual_cone_projection)
maximin, fair = jax.jit(solvers.maximin_in_ball), jax.jit(solvers.fair_point)
# Each with the power of the gradients' scale by which its weights scale.
METHODS = {
    "mgda": (mgda, 0),
    "mgda_l2": (mgda, 0),
    "upgrad": (upgrad, 0),
    "dualproj": (dualproj, 0),
    "cagrad_c0.2": (lambda gramian, present: maximin(gramian, 0.2, present), 0),
    "cagrad_c0.4": (lambda gramian, present: maximin(gramian, 0.4, present), 0),
    "cagrad_c0.5": (lambda gramian, present: maximin(gramian, 0.5, present), 0),
    "cagrad_c0.9": (lambda gramian, present: maximin(gramian, 0.9, present), 0),
    "nash": (lambda gramian, present: fair(gramian, 1.0, present), -1),
    "fairgrad_alpha2": (lambda gramian, present: fair(gramian, 2.0, present), -4 / 3),
    "fairgrad_alpha0.5": (lambda gramian, present: fair(gramian, 0.5, present), -2 / 3),
}
SOLVERS = ("mgda", "upgrad", "dualproj", "cagrad_c0.5", "nash")
PROGRAMS = {
    "mgda": mgda,
    "upgrad": upgrad,
    "dualproj": dualproj,
    "cagrad_c0.5": maximin,
    "nash": fair,
}
PADDED = 20


def matrix(case, name, dtype, exponent=0):
    J = np.array(case["J"])
    if name == "mgda_l2":
        lengths = np.linalg.norm(J, axis=1, keepdims=True)
        J = J / np.where(lengths > 0, lengths, 1)
    return J.astype(dtype) * dtype(10.0) ** exponent


def solve(name, J, present=None):
    """The weights and the residual; with absent tasks added, so that one shape is compiled."""
    K = len(J)
    size = max(K, PADDED)
    gramian = np.full((size, size), np.nan, J.dtype)
    gramian[:K, :K] = J @ J.T
    present = np.arange(size) < K if present is None else np.pad(present, (0, size - K))
    x, residual = METHODS[name][0](jnp.asarray(gramian), jnp.asarray(present))
    assert x.dtype == J.dtype
    assert residual.shape == ()
    np.testing.assert_array_equal(x[~present], 0)
    return np.asarray(x, float)[:K], float(residual)


def check_golden(name, dtype, tolerance, exponent=0):
    for case in CASES.values():
        expected = case["exact"].get(name)
        if expected is None or expected.get("status", "ok") != "ok":
            continue
        rounded = dtype == np.float32 or exponent != 0
        if case["id"] == ILL_POSED and name in ("upgrad", "dualproj") and rounded:
            continue
        J = matrix(case, name, dtype, exponent)
        x, residual = solve(name, J)
        g, scale = np.array(expected["g"]), 10.0 ** (-exponent * METHODS[name][1])
        error = np.linalg.norm((J / 10.0**exponent).T @ (x * scale) - g)
        stationary = case["zero_in_convex_hull"] and not name.startswith("cagrad")
        size = np.linalg.norm(J / 10.0**exponent, axis=1).max() if stationary else 0
        size = size or np.linalg.norm(g)
        assert error <= tolerance * size, (case["id"], error / size)
        # In float32 rounding alone is up to 5e-5 in the case of six tasks all in conflict.
        assert 0 <= residual <= 0.1 * tolerance + 500 * np.finfo(dtype).eps, case["id"]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.usefixtures("x64")
def test_golden(name):
    check_golden(name, np.float64, 1e-11)
    # Scaling in decimals rounds J, which moves the optimum by that much times its condition.
    for exponent in (-12, 7, 12):
        check_golden(name, np.float64, 1e-11, exponent)


@pytest.mark.parametrize("name", METHODS)
def test_golden_in_float32(name):
    for exponent in (-12, 0, 12):
        check_golden(name, np.float32, 2e-4 if name == "mgda_l2" else 3e-5, exponent)


@pytest.mark.usefixtures("x64")
def test_every_scale():
    J = np.array(CASES["conflict_k3_p7_mutual"]["J"])
    for name, (_, power) in METHODS.items():
        x, _ = solve(name, J)
        for exponent in range(-45, 46, 15):  # by powers of two nothing is rounded
            scaled, _ = solve(name, J * 2.0**exponent)
            np.testing.assert_allclose(scaled, x * 2.0 ** (exponent * power), rtol=1e-11)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_fair_point_where_zero_is_in_the_hull(dtype, request):
    if dtype == np.float64:
        request.getfixturevalue("x64")
    stationary = [case for case in CASES.values() if case["zero_in_convex_hull"]]
    assert len(stationary) == 4
    for case in stationary:
        for name in ("nash", "fairgrad_alpha2", "fairgrad_alpha0.5"):
            assert case["exact"][name]["status"] != "ok"
            J = matrix(case, name, dtype)
            x, residual = solve(name, J)
            direction = np.linalg.norm(J.T @ x) / np.linalg.norm(J, axis=1).max()
            assert direction < 10 * np.finfo(dtype).eps
            assert residual == 1
            np.testing.assert_allclose(x.sum(), 1, rtol=1e-6)


@st.composite
def gradients(draw):
    """Matrices of every rank, with ties, equal, opposite, parallel and zero rows."""
    K, P = draw(st.integers(1, 7)), draw(st.integers(1, 8))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    J = rng.standard_normal((K, P))
    if draw(st.booleans()):
        J = np.round(J)
    if draw(st.booleans()):
        J = J[rng.integers(0, K, K)] * rng.choice([1.0, 2.0, 0.5], (K, 1))
    if draw(st.booleans()):
        J = J * 10.0 ** rng.integers(-3, 4, (K, 1))
    # Padded with absent tasks, so that one shape is compiled.
    present = rng.permutation(np.arange(PADDED) < K)
    padded = 1e3 * rng.standard_normal((PADDED, 8))
    padded[present] = np.pad(J, ((0, 0), (0, 8 - P)))
    return padded, present


def nonnegative_least_squares(A, b):
    """argmin ||A x - b|| over x >= 0."""
    return scipy.optimize.nnls(A, b, maxiter=1000)[0]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(gradients())
@pytest.mark.usefixtures("x64")
def test_minimum_norm_point_against_least_squares(drawn):
    padded, present = drawn
    J = padded[present]
    x, residual = solve("mgda", padded, present)
    np.testing.assert_array_equal(x[~present], 0)
    w = x[present]
    assert w.min() >= 0
    np.testing.assert_allclose(w.sum(), 1, rtol=1e-12)
    assert residual < 1e-11
    # min ||J'w||^2 + (1'w - 1)^2 over w >= 0 has the direction of the minimum-norm point. All in
    # units of the shortest gradient, which bounds the norm of the solution.
    lengths = np.linalg.norm(J, axis=1)
    unit = lengths.min() or lengths.max() or 1
    y = nonnegative_least_squares(
        np.vstack([J.T / unit, np.ones(len(J))]), np.append(np.zeros(8), 1)
    )
    expected = J.T @ y / y.sum()
    if lengths.min() == 0:
        expected = np.zeros(8)
    np.testing.assert_allclose(J.T @ w, expected, rtol=0, atol=1e-7 * unit)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(gradients())
@pytest.mark.usefixtures("x64")
def test_dual_cone_projection_against_least_squares(drawn):
    padded, present = drawn
    J = padded[present]
    target = np.random.default_rng(0).standard_normal(PADDED)
    x, residual = project(jnp.asarray(padded @ padded.T), jnp.asarray(target), present)
    np.testing.assert_array_equal(x[~present], 0)
    v, t = np.asarray(x)[present], target[present]
    assert np.all(v >= t)
    assert residual < 1e-7
    lengths = np.linalg.norm(J, axis=1)
    lengths[lengths == 0] = 1
    g0 = J.T @ t
    d = g0 + J.T @ (nonnegative_least_squares((J / lengths[:, None]).T, -g0) / lengths)
    size = np.abs(t * lengths).max()
    np.testing.assert_allclose(J.T @ v, d, rtol=0, atol=1e-7 * size)
    assert np.all(J @ (J.T @ v) / lengths >= -1e-7 * size)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(gradients(), st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0, 1.5, 3.0, 10.0]))
@pytest.mark.usefixtures("x64")
def test_maximin_in_ball_is_certified_by_duality(drawn, radius):
    padded, present = drawn
    J = padded[present]
    x, residual = maximin(jnp.asarray(padded @ padded.T), radius, present)
    np.testing.assert_array_equal(x[~present], 0)
    g0 = J.mean(axis=0)
    d = J.T @ np.asarray(x)[present]
    u = np.asarray(x)[present] - 1 / len(J)
    size, rho = np.linalg.norm(g0), radius * np.linalg.norm(g0)
    lengths = np.linalg.norm(J, axis=1)
    unit = lengths.max() or 1
    if size < 1e-12 * unit:
        return
    assert np.linalg.norm(d - g0) <= rho + 1e-7 * unit
    assert residual * size <= 1e-7 * unit
    # For every w on the simplex, <g0, J'w> + rho ||J'w|| bounds the worst-served task's gain.
    candidates = [*np.eye(len(J)), solve("mgda", padded, present)[0][present]]
    if u.max() * unit > 1e-9 * size:
        candidates.append(np.maximum(u, 0) / np.maximum(u, 0).sum())
    bounds = [g0 @ J.T @ w + rho * np.linalg.norm(J.T @ w) for w in candidates]
    assert (J @ d).min() >= min(bounds) - 1e-7 * unit * unit
    assert (J @ d).min() <= min(bounds) + 1e-7 * unit * unit


def nearest_of_gain(J, gain):
    """The d nearest to the mean with J d >= gain, as a least distance problem; None without one."""
    mean, lengths = J.mean(axis=0), np.linalg.norm(J, axis=1)
    rows = J / np.where(lengths > 0, lengths, 1)[:, None]
    missing = gain / np.where(lengths > 0, lengths, 1) - rows @ mean
    unit = missing.max()
    if unit <= 0:
        return mean
    # Lawson and Hanson, Solving Least Squares Problems, chapter 23.
    A, b = np.vstack([rows.T, missing / unit]), np.append(np.zeros(J.shape[1]), 1)
    left = A @ nonnegative_least_squares(A, b) - b
    return mean - unit * left[:-1] / left[-1] if np.linalg.norm(left) > 1e-9 else None


def best_in_ball(J, radius):
    """The maximin direction by bisection of the gain; the nearest to the mean if it can be 0."""
    mean, lengths = J.mean(axis=0), np.linalg.norm(J, axis=1)
    most = radius * np.linalg.norm(mean)
    weights = nonnegative_least_squares(
        np.vstack([J.T, np.ones(len(J))]), np.eye(J.shape[1] + 1)[-1]
    )
    stationary = np.linalg.norm(J.T @ weights) < 1e-9 * weights.sum() * lengths.max()
    best = mean
    low, high = (J @ mean).min(), (1 + radius) * lengths.max() * np.linalg.norm(mean)
    for gain in [0.0] if stationary else []:
        found, high = nearest_of_gain(J, gain), 0.0
        if found is not None and np.linalg.norm(found - mean) <= most * (1 + 1e-9):
            return found
    for _ in range(45):
        found = nearest_of_gain(J, (low + high) / 2)
        if found is not None and np.linalg.norm(found - mean) <= most:
            best, low = found, (low + high) / 2
        else:
            high = (low + high) / 2
    return best


def degenerate_matrices(number, tasks, parameters, rng):
    """Of integers, whose inner products are exact in float32, but for the shorter rows."""
    shape = (number, tasks, parameters)
    integers, dependent, short, equal = rng.integers(-3, 4, size=(4, *shape)).astype(float)
    dependent[:, -1] = -dependent[:, :2].sum(axis=1)
    left = rng.integers(-2, 3, size=(2, number, tasks, 2))
    flat = np.stack([left[0], np.abs(left[1])]) @ rng.integers(-2, 3, size=(number, 2, parameters))
    short[:, 0] /= 1024
    equal[:, 1] = equal[:, 0]
    return np.concatenate([integers, dependent, *flat, short, equal])


@pytest.mark.parametrize("parameters", [3, 7])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_maximin_in_a_ball_of_any_radius(dtype, parameters, request):
    """Also one that holds 0, against a slow definition."""
    if dtype == np.float64:
        request.getfixturevalue("x64")
    rng = np.random.default_rng(parameters)
    degenerate = degenerate_matrices(25, 5, parameters, rng)
    random = rng.normal(size=(150, 5, parameters)).astype(np.float32)
    J = np.concatenate([degenerate, random, random[:, :1] + 0.1 * random]).astype(float)
    exact = (dtype == np.float64) | (np.arange(len(J)) < len(degenerate))
    kept = np.linalg.norm(J.mean(axis=1), axis=1) > 1e-6
    J, exact = J[kept], exact[kept]
    radii = rng.permutation(np.resize([0.5, 1.0, 1.5, 3.0, 10.0], len(J)))
    gramians = jnp.asarray(J @ J.transpose(0, 2, 1), dtype)
    found = jax.jit(jax.vmap(solvers.maximin_in_ball))(gramians, jnp.asarray(radii, dtype))
    assert np.max(found.residual) < 1e-3
    tolerance = 1e-7 if dtype == np.float64 else 1e-5
    # A hull that is nearer to 0 than the rounding of float32 entries can tell is taken to hold it:
    # then its distance, at most the root of that rounding, times the radius may be lost.
    for rows, radius, x, sure in zip(J, radii, np.asarray(found.x, float), exact, strict=True):
        unit, mean = np.linalg.norm(rows, axis=1).max(), rows.mean(axis=0)
        expected, direction = best_in_ball(rows, radius), rows.T @ x
        error = max(1, radius) * (tolerance if sure else 4e-4)
        if sure:
            np.testing.assert_allclose(direction, expected, rtol=0, atol=error * unit)
        assert np.linalg.norm(direction - mean) < radius * np.linalg.norm(mean) + error * unit
        gain, most = (rows @ direction).min(), (rows @ expected).min()
        assert abs(gain - most) < error * unit**2
        assert radius < 1 or gain > -tolerance * unit**2


@settings(max_examples=40, deadline=None, derandomize=True)
@given(gradients(), st.sampled_from([0.5, 1.0, 3.0]))
@pytest.mark.usefixtures("x64")
def test_fair_point_solves_its_equation_or_says_so(drawn, alpha):
    padded, present = drawn
    J = padded[present]
    x, residual = fair(jnp.asarray(padded @ padded.T), alpha, present)
    np.testing.assert_array_equal(x[~present], 0)
    x = np.asarray(x)[present]
    lengths = np.linalg.norm(J, axis=1)
    shortest = np.linalg.norm(J.T @ solve("mgda", padded, present)[0][present])
    if residual == 1:
        assert shortest < 1e-6 * lengths.max() or lengths.min() == 0
        np.testing.assert_allclose(x.sum(), 1, rtol=1e-12)
    else:
        assert np.all(x > 0)
        assert residual < 1e-7
        np.testing.assert_allclose(J @ (J.T @ x) * x ** (1 / alpha), 1, rtol=1e-5)


@pytest.mark.parametrize("name", SOLVERS)
def test_absent_tasks_count_nowhere(name):
    """The weights of the present tasks are those of the problem without the others."""
    rng = np.random.default_rng(1)
    J = rng.standard_normal((6, 12)).astype(np.float32)
    present = np.array([True, False, True, True, False, True])
    expected, _ = solve(name, J[present])
    for absent in (0.0, 1e12, np.nan):
        J[~present] = absent
        x, residual = solve(name, J, present)
        np.testing.assert_array_equal(x[~present], 0)
        np.testing.assert_allclose(x[present], expected, rtol=2e-5)
        assert residual < 1e-5


@pytest.mark.parametrize("name", SOLVERS)
def test_no_task_and_one_task(name):
    J = np.array([[3.0, 4.0], [1.0, 0.0]], np.float32)
    x, _ = solve(name, J, np.array([False, False]))
    np.testing.assert_array_equal(x, 0)
    x, residual = solve(name, J, np.array([True, False]))
    alone, _ = solve(name, J[:1])
    expected = {"mgda": 1, "upgrad": 1, "dualproj": 1, "cagrad_c0.5": 1.5, "nash": 0.2}[name]
    np.testing.assert_allclose(alone, [expected], rtol=1e-6)
    np.testing.assert_allclose(x, [expected, 0], rtol=1e-6)
    assert residual < 1e-6


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize(
    "rows",
    [
        [[1, 2], [1, 2], [1, 2]],
        [[1, 2], [2, 4], [-0.5, -1]],
        [[1, 0], [-1, 0], [0, 1]],
        [[0, 0], [1, 1], [1, -1]],
        [[0, 0], [0, 0], [0, 0]],
        [[1, 0], [-1, 1e-6], [0, 1e-20]],
    ],
)
def test_degenerate_gradients_give_finite_answers(name, rows):
    J = np.array(rows, np.float32)
    x, residual = solve(name, J)
    assert np.all(np.isfinite(x))
    assert np.all(x >= 0)
    assert 0 <= residual < 1e-6 or (name == "nash" and residual == 1)


def test_zero_gradients_are_chosen():
    J = np.array([[0, 0], [1, 1], [0, 0]], np.float32)
    for name in ("mgda", "nash"):
        x, _ = solve(name, J)
        np.testing.assert_allclose(x, [0.5, 0, 0.5])


@pytest.mark.parametrize("parameters", [10, 50, 60])
def test_many_more_tasks_than_parameters(parameters):
    rng = np.random.default_rng(0)
    spread = rng.standard_normal((128, parameters))
    # In the first the hull of the gradients holds 0, or comes near it.
    for J in (spread, spread + rng.standard_normal(parameters)):
        J = J.astype(np.float32)
        lengths = np.linalg.norm(J, axis=1)
        for name in ("mgda", "dualproj"):
            x, residual = solve(name, J)
            assert np.all(np.isfinite(x))
            assert np.all(x >= 0)
            rows = J.astype(np.float64)
            gains = rows @ (rows.T @ x) / lengths
            if name == "dualproj":
                assert residual < 5e-3
                assert gains.min() > -1e-2 * np.linalg.norm(J.mean(axis=0))
            if name == "mgda":
                square = np.sum((rows.T @ x) ** 2)
                violation = np.minimum(x * lengths, gains - square / lengths) / lengths.min()
                assert abs(np.abs(violation).max() - residual) < 1e-4
                assert residual < 1e-4
                shortest, _ = scipy.optimize.nnls(  # in float64, the sum of 1 as a heavy equation
                    np.vstack([rows.T, np.full(128, 1e3)]), np.append(np.zeros(parameters), 1e3)
                )
                exact = np.linalg.norm(rows.T @ shortest) / np.sum(shortest)
                assert np.sqrt(square) <= exact + 1e-4 * lengths.max()


def test_one_compilation_and_batches():
    rng = np.random.default_rng(0)
    J = rng.standard_normal((5, PADDED, 6)).astype(np.float32)
    gramians = jnp.asarray(J @ J.transpose(0, 2, 1))
    present = jnp.asarray((rng.random((5, PADDED)) < 0.7) & (np.arange(PADDED) < 4))
    for name in SOLVERS:
        solver, program = METHODS[name][0], PROGRAMS[name]
        solver(gramians[0], present[0])
        compiled = program._cache_size()
        single = [solver(*arguments) for arguments in zip(gramians, present, strict=True)]
        assert program._cache_size() == compiled
        batch = jax.jit(jax.vmap(solver))(gramians, present)
        np.testing.assert_allclose(batch.x, [one.x for one in single], rtol=1e-4, atol=1e-6)


def test_strict_promotion_and_low_precision():
    J = np.array(CASES["torchjd_doc_k2_p3"]["J"], np.float32)
    gramian, ones = jnp.asarray(J @ J.T), jnp.ones(2)
    for solver, padded in (
        (solvers.minimum_norm_point, mgda),
        (
            lambda gramian: solvers.dual_cone_projection(gramian, ones),
            lambda gramian, present: project(gramian, jnp.ones(PADDED), present),
        ),
        (lambda gramian: solvers.maximin_in_ball(gramian, 0.5), METHODS["cagrad_c0.5"][0]),
        (solvers.fair_point, METHODS["nash"][0]),
    ):
        x, _ = padded(jnp.pad(gramian, (0, PADDED - 2)), jnp.arange(PADDED) < 2)
        with jax.numpy_dtype_promotion("strict"):
            assert jax.eval_shape(solver, gramian).x.dtype == jnp.float32
            half, _ = solver(gramian.astype(jnp.bfloat16))
        assert half.dtype == jnp.float32
        np.testing.assert_allclose(half, x[:2], rtol=0.05)


def test_errors():
    gramian, weights = jnp.eye(2), jnp.ones(2)
    with pytest.raises(ValueError, match=r"tasks x tasks, got an array of shape \(2, 3\)"):
        solvers.minimum_norm_point(jnp.ones((2, 3)))
    with pytest.raises(TypeError, match="floating-point numbers, got int32"):
        solvers.fair_point(jnp.eye(2, dtype=jnp.int32))
    with pytest.raises(ValueError, match=r"`target` must have shape \(2,\)"):
        solvers.dual_cone_projection(gramian, jnp.ones(3))
    with pytest.raises(ValueError, match=r"`present` must have shape \(2,\)"):
        solvers.dual_cone_projection(gramian, weights, jnp.ones(3, bool))
    with pytest.raises(TypeError, match="`present` must be boolean"):
        solvers.minimum_norm_point(gramian, weights)
    with pytest.raises(ValueError, match="`radius` must be at least 0"):
        solvers.maximin_in_ball(gramian, -0.5)
    with pytest.raises(ValueError, match="`alpha` must be more than 0"):
        solvers.fair_point(gramian, 0.0)
    with pytest.raises(ValueError, match="`alpha` must be a scalar"):
        solvers.fair_point(gramian, weights)
