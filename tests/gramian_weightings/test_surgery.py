"""PCGrad and GradVac: against recorded runs and the definitions on gradients in NumPy."""

import functools
import json
import pathlib

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis.extra import numpy as hnp

from mtl_jax import Pairs
from mtl_jax.gramian_weightings.gradvac import GradVacState, gradvac
from mtl_jax.gramian_weightings.pcgrad import pcgrad

DATA = pathlib.Path(__file__).parents[1] / "data"
RECORDS = json.loads((DATA / "gradient_surgery.json").read_text())
MATRICES = {
    case["id"]: np.array(case["J"])
    for case in json.loads((DATA / "gradient_matrices.json").read_text())["cases"]
}


def whole_orders(orders, size):
    """The orders of the first tasks, made orders of ``size`` tasks."""
    return np.array(
        [[*row, *(j for j in range(size) if j not in row)] for row in orders]
        + [range(size)] * (size - len(orders))
    )


@functools.partial(jax.jit, static_argnames=("method",))
def weights_and_target(gramian, present, orders, target, method):
    """One step in given orders; the number of tasks padded with absent ones."""
    weighting = method(order=lambda key, number: orders)
    losses = (jnp.ones((), gramian.dtype),) * len(gramian)
    state = weighting.init(losses)
    remembers = isinstance(state.inner, GradVacState)
    if remembers:
        state = state._replace(inner=state.inner._replace(target=Pairs(target)))
    weights, state = weighting.update(
        losses, state, mask=tuple(jnp.unstack(present)), gramian=gramian
    )
    return jnp.stack(weights), state.inner.target.values if remembers else target


def step(method, J, orders, target=None, size=20, present=None):
    number, dtype = len(J), np.asarray(J).dtype
    size = max(size, number)
    present = np.ones(number, bool) if present is None else np.asarray(present)
    kept = np.zeros((size, size), dtype)
    kept[:number, :number] = 0 if target is None else target
    with jax.numpy_dtype_promotion("strict"):
        weights, kept = weights_and_target(
            jnp.asarray(np.pad(J @ J.T, (0, size - number))),
            jnp.asarray(np.pad(present, (0, size - number))),
            jnp.asarray(whole_orders(orders, size)),
            jnp.asarray(kept),
            method,
        )
    assert weights.dtype == dtype
    return np.array(weights)[:number], np.array(kept)[:number, :number]


def pcgrad_of_definition(J, orders):
    total = np.zeros(J.shape[1])
    for i, order in enumerate(orders):
        gradient = J[i].copy()
        for j in order:
            if j != i and gradient @ J[j] < 0:
                gradient -= (gradient @ J[j]) / (J[j] @ J[j]) * J[j]
        total += gradient
    return total


def gradvac_of_definition(J, orders, target, beta, eps=0.0):
    total, target = np.zeros(J.shape[1]), target.copy()
    for i, order in enumerate(orders):
        gradient = J[i].copy()
        for j in order:
            if j == i:
                continue
            length, other = np.linalg.norm(gradient), np.linalg.norm(J[j])
            rho, phi = gradient @ J[j] / (length * other + eps), target[i, j]
            if rho < phi:
                wanted = phi * np.sqrt(1 - rho**2) - rho * np.sqrt(1 - phi**2)
                gradient += length * wanted / (other * np.sqrt(1 - phi**2) + eps) * J[j]
            target[i, j] = (1 - beta) * phi + beta * rho
        total += gradient
    return total, target


def assert_close(actual, expected, tolerance):
    assert np.linalg.norm(actual - expected) <= tolerance * np.linalg.norm(expected)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("record", RECORDS["pcgrad"], ids=lambda record: record["id"])
def test_pcgrad_recorded(record):
    J = MATRICES[record["id"]]
    scale = np.max(np.linalg.norm(J, axis=1))
    for seed in (0, 1):
        published = record[f"torchjd.PCGrad[seed{seed}]"]
        for factor in (1, 1e-12, 1e12):
            weights, _ = step(pcgrad, J * factor, published["orders"])
            expected = np.array(published["weights"])
            error = np.linalg.norm(J.T @ (weights - expected))
            assert error <= 1e-9 * max(np.linalg.norm(J.T @ expected), 1e-3 * scale)
    if "conflictfree.PCGradOperator" in record:
        weights, _ = step(pcgrad, J, [range(len(J))] * len(J))
        expected = np.array(record["conflictfree.PCGradOperator"]["g"])
        error = np.linalg.norm(J.T @ weights - expected)
        assert error <= 1e-9 * max(np.linalg.norm(expected), 1e-3 * scale)


@pytest.mark.parametrize("record", RECORDS["pcgrad"], ids=lambda record: record["id"])
def test_pcgrad_recorded_in_float32(record):
    J = MATRICES[record["id"]]
    published = record["torchjd.PCGrad[seed0]"]
    expected = J.T @ np.array(published["weights"])
    for factor in (1, 1e-12, 1e12):
        weights, _ = step(pcgrad, (J * factor).astype(np.float32), published["orders"])
        error = np.linalg.norm(J.T @ weights - expected)
        assert error <= 1e-4 * max(np.linalg.norm(expected), np.max(np.linalg.norm(J, axis=1)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["torchjd.GradVac", "torchjd.GradVac[beta=0.1]", "libmtl.GradVac"])
@pytest.mark.parametrize("record", RECORDS["gradvac"], ids=lambda record: record["id"])
def test_gradvac_recorded(record, name):
    params = record[name]["params"]
    beta = params.get("beta", params.get("GradVac_beta"))
    target = theirs = exact = np.zeros((record["K"], record["K"]))
    for rows, published in zip(record["J"], record[name]["steps"], strict=True):
        J = np.array(rows)
        others = [[j for j in range(len(J)) if j != i] for i in range(len(J))]
        orders = [np.array(o)[draw] for o, draw in zip(others, published["draws"], strict=True)]
        weights, target = step(method_with(beta), J, orders, target)
        gradient, exact = gradvac_of_definition(J, orders, exact, beta)
        assert_close(J.T @ weights, gradient, 1e-9)
        assert_close(target, exact, 1e-9)
        # The published code adds 1e-8 to lengths, and agrees with the definition that does so.
        gradient, theirs = gradvac_of_definition(J, orders, theirs, beta, eps=1e-8)
        assert_close(gradient, published["g"], 1e-11)
        assert_close(J.T @ weights, np.array(published["g"]), 1e-6)
        assert_close(target, np.array(published["target"]), 1e-6)


@functools.cache
def method_with(beta):
    return functools.partial(gradvac, beta)


def conflicting_rows(seed, K=4, P=3):
    """Random rows whose mean is zero: they conflict, and where i met itself too it would show."""
    J = np.random.default_rng(seed).normal(size=(K, P))
    return J - np.mean(J, axis=0)


@pytest.mark.usefixtures("x64")
def test_the_definitions_on_conflicting_rows():
    rng = np.random.default_rng(0)
    for seed in range(30):
        J = conflicting_rows(seed)
        orders = np.array([rng.permutation(4) for _ in range(4)])
        weights, _ = step(pcgrad, J, orders)
        atol = 1e-12 * np.linalg.norm(J)
        np.testing.assert_allclose(J.T @ weights, pcgrad_of_definition(J, orders), 0, atol)
        assert np.all(weights >= 1)

        target = np.triu(rng.uniform(-0.9, 0.9, size=(4, 4)), 1)
        weights, new = step(method_with(0.5), J, orders, target)
        gradient, exact = gradvac_of_definition(J, orders, target, 0.5)
        np.testing.assert_allclose(J.T @ weights, gradient, rtol=1e-9, atol=atol)
        np.testing.assert_allclose(new, exact, rtol=1e-9, atol=1e-12)
        assert np.all(weights >= 1)

        # With all targets 0, GradVac is PCGrad.
        weights, _ = step(method_with(0.5), J, orders)
        np.testing.assert_allclose(J.T @ weights, pcgrad_of_definition(J, orders), 0, atol)


@pytest.mark.usefixtures("x64")
def test_two_tasks_no_longer_conflict():
    J = np.array([[1.0, 0.0, 2.0], [-4.0, 1.0, 0.5]])
    gradient = J.T @ step(pcgrad, J, [[0, 1], [0, 1]])[0]
    assert np.all(J @ gradient > 0)
    compatible = np.abs(J)
    np.testing.assert_array_equal(step(pcgrad, compatible, [[0, 1], [0, 1]])[0], 1)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", [pcgrad, method_with(0.5)])
def test_permuted_tasks_have_permuted_weights(method):
    J, rng = conflicting_rows(0, K=5), np.random.default_rng(0)
    orders = np.array([rng.permutation(5) for _ in range(5)])
    target = rng.uniform(-0.5, 0.5, size=(5, 5))
    order = rng.permutation(5)
    place = np.argsort(order)  # task k of the old is task place[k] of the new
    weights, new = step(method, J, orders, target)
    permuted, permuted_new = step(method, J[order], place[orders[order]], target[order][:, order])
    np.testing.assert_allclose(permuted, weights[order], rtol=1e-12)
    np.testing.assert_allclose(permuted_new, new[order][:, order], rtol=1e-12)


@pytest.mark.parametrize("method", [pcgrad, method_with(0.5)])
def test_absent_tasks_count_nowhere(method):
    J, rng = conflicting_rows(0, K=5).astype(np.float32), np.random.default_rng(0)
    orders = np.array([rng.permutation(5) for _ in range(5)])
    target = rng.uniform(-0.5, 0.5, size=(5, 5)).astype(np.float32)
    present = np.array([True, False, True, True, False])
    chosen = np.flatnonzero(present)
    place = np.full(5, -1)
    place[chosen] = range(3)
    inner = [[place[j] for j in row if present[j]] for row in orders[chosen]]
    weights, new = step(method, J, orders, target, present=present)
    expected, inner = step(method, J[chosen], inner, target[np.ix_(chosen, chosen)], size=3)
    np.testing.assert_allclose(weights[chosen], expected, rtol=1e-5)
    np.testing.assert_array_equal(weights[~present], 0)
    np.testing.assert_allclose(new[np.ix_(chosen, chosen)], inner, rtol=1e-5)
    both = present[:, None] & present[None, :]
    np.testing.assert_array_equal(new[~both], target[~both])  # the columns of absent tasks, too


EDGES = st.sampled_from([0.0, 1.0, -1.0, 1e12, -1e-12, 3e-3])
ENTRIES = st.one_of(EDGES, st.builds(np.ldexp, st.floats(-1, 1), st.integers(-40, 40)))


@pytest.mark.parametrize("method", [pcgrad, method_with(0.5)])
@hypothesis.settings(max_examples=30, deadline=None, derandomize=True, database=None)
@hypothesis.given(J=hnp.arrays(np.float64, (4, 3), elements=ENTRIES))
@hypothesis.example(J=np.zeros((4, 3)))
@hypothesis.example(J=np.ones((4, 3)))
@hypothesis.example(J=np.outer([1, -1, 2, -2], [1, 0.3, 0]))
def test_every_matrix_has_finite_weights(method, J):
    target = None
    for _ in range(3):
        weights, target = step(method, J.astype(np.float32), [range(4)] * 4, target)
        assert np.all(np.isfinite(weights))
        assert np.all(np.abs(target) <= 1)
        J = -J[[0, 2, 1, 3]]


def test_gradvac_of_opposite_and_equal_gradients():
    for seed in range(20):
        row = np.random.default_rng(seed).normal(size=50).astype(np.float32)
        target = np.ones((2, 2)) if seed % 2 else None
        for J in (np.stack([row, row]), np.stack([row, -row]), np.stack([row, -3 * row])):
            for _ in range(5):
                weights, target = step(method_with(0.5), J, [[0, 1], [0, 1]], target)
                assert np.all(np.isfinite(weights))
                assert np.all(np.abs(target) <= 1)
        # Each is projected away entirely: nothing is left of opposite gradients.
        J = np.stack([row, -3 * row])
        weights, _ = step(method_with(0.5), J, [[0, 1], [0, 1]])
        np.testing.assert_allclose(J.T @ weights, 0, atol=1e-4)


@pytest.mark.parametrize("method", [pcgrad, method_with(0.5)])
def test_many_tasks(method):
    rng = np.random.default_rng(0)
    J = rng.normal(size=(128, 10)).astype(np.float32)
    orders = np.array([rng.permutation(128) for _ in range(128)])
    target = np.zeros((128, 128))
    weights, target = step(method, J, orders, target.astype(np.float32))
    # The order of events follows the signs of products that are rounded: not the same in float64.
    assert np.all(np.isfinite(weights))
    assert np.all(weights > 0.999)
    expected = pcgrad_of_definition(J.astype(np.float64), orders)
    assert np.linalg.norm(J.T @ weights - expected) < 0.01 * np.linalg.norm(expected)


@pytest.mark.parametrize("make", [pcgrad, gradvac])
def test_orders_are_drawn_afresh(make):
    weighting, losses = make(), (1.0, 1.0, 1.0)
    J = conflicting_rows(0, K=3, P=5).astype(np.float32)
    gramian = jnp.asarray(J @ J.T)
    update = jax.jit(weighting.update)

    def run(seed):
        state, history = weighting.init(losses, key=jax.random.key(seed)), []
        for _ in range(12):
            weights, state = update(losses, state, gramian=gramian)
            history.append(np.array(weights))
        return np.array(history)

    first = run(0)
    np.testing.assert_array_equal(first, run(0))
    assert len(np.unique(first, axis=0)) > 1
    assert np.any(first != run(1))
    if make is pcgrad:  # every pair of orders of two others, for each of three tasks: 8 outcomes
        possible = [
            step(pcgrad, J, [[1, 2][::a], [0, 2][::b], [0, 1][::c]])[0]
            for a in (1, -1)
            for b in (1, -1)
            for c in (1, -1)
        ]
        for weights in first:
            assert np.min(np.max(np.abs(possible - weights), axis=1)) < 1e-5


@pytest.mark.parametrize("make", [pcgrad, gradvac])
def test_errors(make):
    losses, gramian = (1.0, 1.0), jnp.eye(2)
    with pytest.raises(ValueError, match=f"{make.__name__} draws random numbers"):
        make().init(losses)
    with pytest.raises(TypeError, match=f"{make.__name__}: `order` must be a function"):
        make(order=[0, 1])
    one_row = make(order=lambda key, number: jnp.arange(number))
    with pytest.raises(ValueError, match=r"of shape \(2, 2\), .* got \(2,\)"):
        one_row.update(losses, one_row.init(losses), gramian=gramian)
    no_integers = make(order=lambda key, number: jnp.eye(number))
    with pytest.raises(TypeError, match="must return integers, got float32"):
        no_integers.update(losses, no_integers.init(losses), gramian=gramian)
    if make is gradvac:
        with pytest.raises(ValueError, match=r"`beta` must be in \[0, 1\], got 2"):
            gradvac(beta=2)
