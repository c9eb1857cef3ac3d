"""IMTL-G, Aligned-MTL, ConFIG and Krum: closed forms of the Gramian, against exact values."""

import functools
import itertools
import json
import pathlib

import gramian_methods
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis.extra import numpy as hnp

from mtl_jax.gramian_weightings._spectral import spectrum
from mtl_jax.gramian_weightings.aligned_mtl import aligned_mtl
from mtl_jax.gramian_weightings.conflict_free import conflict_free
from mtl_jax.gramian_weightings.dual_proj import dual_proj
from mtl_jax.gramian_weightings.imtl_g import imtl_g
from mtl_jax.gramian_weightings.krum import krum

DATA = pathlib.Path(__file__).parents[1] / "data"
CASES = json.loads((DATA / "gradient_matrices.json").read_text())["cases"]
# The names of the exact values.
METHODS = {
    "aligned_min": aligned_mtl(),
    "aligned_median": aligned_mtl("median"),
    "aligned_rmse": aligned_mtl("rmse"),
    "imtl_g": imtl_g(),
    "config": conflict_free(),
}
# A Gramian holds the squares of the angles between these rows.
ILL_CONDITIONED = [("near_parallel_k3_p10", name) for name in METHODS if name != "config"]


PREFERRED = {
    "aligned_mtl": aligned_mtl(preference=(1.0,) * gramian_methods.SIZE),
    "conflict_free": conflict_free((1.0,) * gramian_methods.SIZE),
}


def weights_of(weighting, J, **arguments):
    """The weights for the rows of J, in its dtype; other tasks, up to ``size``, are absent."""
    weights, _ = gramian_methods.weights_of(weighting, J, **arguments)
    return weights.astype(np.float64)


def assert_direction(J, weights, exact, tolerance):
    """The direction is right, relative to its length, or to the longest row where it is zero."""
    J = np.asarray(J)
    direction = J.T @ weights
    expected = np.asarray(exact["g"]) if exact["status"] == "ok" else np.zeros(J.shape[1])
    length = np.linalg.norm(expected) or np.max(np.linalg.norm(J, axis=1))
    assert np.linalg.norm(direction - expected) <= tolerance * length


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_exact_values(case, name):
    tolerance = 1e-7 if (case["id"], name) in ILL_CONDITIONED else 1e-9
    for scale in (1, 1e-12, 1e12):
        weights = weights_of(METHODS[name], scale * np.array(case["J"]))
        assert_direction(case["J"], weights, case["exact"][name], tolerance)
        if scale == 1 and case["exact"][name].get("weights_unique"):
            np.testing.assert_allclose(
                weights, case["exact"][name]["weights"], rtol=1e-6, atol=1e-9 * max(abs(weights))
            )


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_exact_values_in_float32(case, name):
    for scale in (1, 1e-12, 1e12):
        J = np.array(scale * np.array(case["J"]), np.float32)
        weights = weights_of(METHODS[name], J)
        assert np.all(np.isfinite(weights))
        if (case["id"], name) not in ILL_CONDITIONED:
            assert_direction(case["J"], weights, case["exact"][name], 1e-4)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", PREFERRED)
def test_preferences(name):
    """The directions of TorchJD with a preference vector; here it stands in the state."""
    records = json.loads((DATA / "torchjd_averages_and_preferences.json").read_text())
    matrices = {case["id"]: np.array(case["J"]) for case in CASES}
    for record in records["preferences"]:
        J, expected = matrices[record["matrix"]], np.array(record[name])
        state = gramian_methods.initial(PREFERRED[name], np.float64)
        preference = np.full(gramian_methods.SIZE, 7.0)  # those of absent tasks do not count
        preference[: len(J)] = record["preference"]
        state = state._replace(inner=state.inner._replace(preference=preference))
        direction = J.T @ weights_of(PREFERRED[name], J, state=state)
        size = np.linalg.norm(expected) or np.linalg.norm(J)
        tolerance = 1e-7 if record["matrix"] == "near_parallel_k3_p10" else 1e-10
        assert np.linalg.norm(direction - expected) <= tolerance * size, record["matrix"]


@pytest.mark.parametrize(("name", "default"), [("aligned_min", 1 / 4), ("config", 1)])
def test_the_default_preference(name, default):
    """1/K of the present tasks, and 1."""
    J = random_rows(0, K=5).astype(np.float32)
    present = np.array([True, False, True, True, True])
    weighting = PREFERRED[{"aligned_min": "aligned_mtl", "config": "conflict_free"}[name]]
    weights = weights_of(METHODS[name], J, present=present)
    preferred = default * weights_of(weighting, J, present=present)
    np.testing.assert_allclose(preferred, weights, rtol=1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("distance", ["squared", "plain"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_krum_exact_values(case, distance):
    key = {"squared": "squared_distance(paper)", "plain": "distance(torchjd)"}[distance]
    names = [name for name in case["exact"] if name.startswith("krum_")]
    assert bool(names) == (case["K"] >= 3)
    for name in names:
        exact = case["exact"][name][key]
        byzantine, selected = map(int, name.removeprefix("krum_").split("_"))
        weighting = krum_of(byzantine, selected, distance)
        for scale in (1, 1e-12, 1e12):
            weights = weights_of(weighting, scale * np.array(case["J"]))
            np.testing.assert_allclose(np.unique(weights[weights > 0]), 1 / selected)
            if exact["tie"]:
                scores = np.array(exact["scores"])
                chosen = np.sort(scores[weights > 0])
                atol = 1e-9 * np.max(scores)
                np.testing.assert_allclose(chosen, np.sort(scores)[:selected], atol=atol)
            else:
                np.testing.assert_array_equal(np.flatnonzero(weights), sorted(exact["selected"]))


krum_of = functools.cache(krum)


def random_rows(seed, K=5, P=9, spread=0.0):
    """Random task gradients, their norms spread over as many decades."""
    rng = np.random.default_rng(seed)
    scales = 10.0 ** rng.uniform(-spread / 2, spread / 2, size=(K, 1))
    return rng.normal(size=(K, P)) * scales


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-4), (np.float64, 1e-12)])
def test_small_eigenvalues_have_all_their_digits(dtype, tolerance, seed, request):
    if dtype == np.float64:
        request.getfixturevalue("x64")
    J = random_rows(seed, K=7, P=20, spread=12)
    gramian = jnp.asarray(J.astype(dtype) @ J.astype(dtype).T)
    found = jax.jit(lambda gramian: spectrum(gramian, float(np.finfo(dtype).eps)))(gramian)
    values = np.sort(np.array(found.values, np.float64)[np.array(found.kept)])
    values *= float(found.unit) ** 2
    norms = np.linalg.norm(J, axis=1)
    C = (J / norms[:, None]) @ (J / norms[:, None]).T
    assert len(values) == 7
    np.testing.assert_allclose(
        np.sum(1 / values), np.sum(np.diagonal(np.linalg.inv(C)) / norms**2), rtol=tolerance
    )
    np.testing.assert_allclose(
        np.sum(np.log(values)),
        np.linalg.slogdet(C)[1] + 2 * np.sum(np.log(norms)),
        atol=7 * tolerance,
    )
    vectors = np.array(found.vectors, np.float64)[np.array(found.kept)]
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(7), atol=tolerance / 10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spread", [0, 6])
def test_what_the_directions_are_for(seed, spread):
    J = random_rows(seed, spread=spread)
    unit = J / np.linalg.norm(J, axis=1, keepdims=True)

    # IMTL-G: equal projections on all task gradients.
    weights = weights_of(METHODS["imtl_g"], J)
    np.testing.assert_allclose(np.sum(weights), 1)
    projections = unit @ (J.T @ weights)
    np.testing.assert_allclose(projections, projections[0], rtol=1e-10)

    # ConFIG: equal projections, all positive, and the length is the sum of those of the gradients.
    direction = J.T @ weights_of(METHODS["config"], J)
    projections = unit @ direction
    assert projections[0] > 0
    np.testing.assert_allclose(projections, projections[0], rtol=1e-10)
    length = np.linalg.norm(direction)
    np.testing.assert_allclose(np.sum(J @ direction) / length, length)

    # Aligned-MTL: all directions of the system it averages are equally long.
    left, singular, right = np.linalg.svd(J, full_matrices=False)
    expected = np.sqrt(np.mean(singular**2)) * np.mean(left @ right, axis=0)
    direction = J.T @ weights_of(METHODS["aligned_rmse"], J)
    np.testing.assert_allclose(direction, expected, rtol=1e-8 * 10**spread)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("P", [9, 3])  # independent, dependent
@pytest.mark.parametrize("name", [*METHODS, "krum"])
def test_permuted_tasks_have_permuted_weights(name, P):
    weighting = METHODS.get(name, krum_of(1))
    J = random_rows(0, P=P, spread=2)
    permutation = np.random.default_rng(1).permutation(5)
    weights = weights_of(weighting, J)
    atol = 1e-12 * np.max(np.abs(weights))
    np.testing.assert_allclose(weights_of(weighting, J[permutation]), weights[permutation], 0, atol)


@pytest.mark.parametrize("P", [9, 3])
@pytest.mark.parametrize("name", [*METHODS, "krum"])
def test_the_scale_of_the_gradients_does_not_count(name, P):
    weighting = METHODS.get(name, krum_of(1))
    J = random_rows(0, P=P).astype(np.float32)
    G = J @ J.T
    weights = weights_of(weighting, J, gramian=G)
    for exponent in (-60, 60):  # a power of 4, so that no rounding differs
        scaled = weights_of(weighting, J, gramian=G * np.float32(2.0**exponent))
        np.testing.assert_allclose(scaled, weights, rtol=1e-6)


@pytest.mark.parametrize("P", [9, 3])
@pytest.mark.parametrize("name", ["aligned_min", "imtl_g", "config", "krum"])
def test_absent_tasks_count_nowhere(name, P):
    weighting = METHODS.get(name, krum_of(0))
    J = random_rows(0, P=P).astype(np.float32)
    present = np.array([True, False, True, True, False])
    weights = weights_of(weighting, J, present=present)
    expected = weights_of(weighting, J[present], size=0)
    np.testing.assert_allclose(weights[present], expected, rtol=1e-4, atol=1e-6)
    assert np.all(weights[~present] == 0)
    assert np.all(weights_of(weighting, J, present=np.zeros(5, bool)) == 0)


@pytest.mark.parametrize("name", ["aligned_min", "imtl_g", "config"])
def test_one_task(name):
    for norm in (1e-12, 3.0, 1e12):
        weights = weights_of(METHODS[name], np.full((1, 1), norm, np.float32), size=0)
        np.testing.assert_allclose(weights, [1], rtol=1e-6)
    zero = np.zeros((1, 1), np.float32)
    np.testing.assert_array_equal(weights_of(METHODS[name], zero, size=0), 0)


def test_where_there_is_no_direction_the_step_stands_still():
    row = np.random.default_rng(0).normal(size=(1, 50)).astype(np.float32)
    for name in ("imtl_g", "config"):
        for J in (np.concatenate([row, -row]), np.zeros((2, 3), np.float32)):
            np.testing.assert_array_equal(weights_of(METHODS[name], J), 0)
    # The angles of opposite gradients are opposite at any length: for ConFIG only the angles count.
    unequal = np.concatenate([row, -3 * row])
    np.testing.assert_array_equal(weights_of(METHODS["config"], unequal), 0)


EDGES = st.sampled_from([0.0, 1.0, -1.0, 1e12, -1e-12, 3e-3])
ENTRIES = st.one_of(EDGES, st.builds(np.ldexp, st.floats(-1, 1), st.integers(-40, 40)))


@pytest.mark.parametrize("name", [*METHODS, "krum"])
@hypothesis.settings(max_examples=30, deadline=None, derandomize=True, database=None)
@hypothesis.given(J=hnp.arrays(np.float64, (4, 3), elements=ENTRIES))
@hypothesis.example(J=np.zeros((4, 3)))
@hypothesis.example(J=np.ones((4, 3)))
@hypothesis.example(J=np.outer([1, -1, 2, -2], [1, 0.3, 0]))
@hypothesis.example(J=np.diag([1e-12, 1e12, 0]).repeat(2, axis=0)[:4])
def test_every_matrix_has_finite_weights(name, J):
    weights = weights_of(METHODS.get(name, krum_of(1)), J.astype(np.float32))
    assert np.all(np.isfinite(weights))


@pytest.mark.parametrize("name", ["aligned_min", "imtl_g", "krum"])
def test_many_tasks_in_few_dimensions(name):
    J = random_rows(0, K=128, P=10).astype(np.float32)
    weights = weights_of(METHODS.get(name, krum_of(1)), J)
    assert np.all(np.isfinite(weights))
    if name == "aligned_min":
        left, singular, right = np.linalg.svd(J.astype(np.float64), full_matrices=False)
        expected = singular[-1] * np.mean(left @ right, axis=0)
        error = np.linalg.norm(J.T @ weights - expected)
        assert error < 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", METHODS)
def test_a_gramian_that_rounding_made_indefinite(name):
    J = random_rows(0, K=6, P=2).astype(np.float32)
    noise = 1e-7 * random_rows(1, K=6, P=6)
    G = (J @ J.T + noise + noise.T).astype(np.float32)
    assert np.min(np.linalg.eigvalsh(G)) < 0
    direction = J.T @ weights_of(METHODS[name], J, gramian=G)
    expected = J.T @ weights_of(METHODS[name], J)
    np.testing.assert_allclose(direction, expected, atol=1e-4 * np.linalg.norm(expected))


def test_vmap_over_gramians():
    J = np.stack([random_rows(seed, K=3, P=4) for seed in range(2)]).astype(np.float32)
    losses = (jnp.ones(()),) * 3
    weighting = METHODS["imtl_g"]

    def update(gramian):
        return weighting.update(losses, weighting.init(losses), gramian=gramian)[0]

    batch = np.stack(jax.jit(jax.vmap(update))(jnp.asarray(J @ J.transpose(0, 2, 1))), axis=1)
    for rows, weights in zip(J, batch, strict=True):
        np.testing.assert_allclose(weights, weights_of(weighting, rows), rtol=1e-5)


def test_of_two_tasks_they_are_dual_cone_gradient_descent(x64):
    """Its centre and its projection (Hwang and Lim 2024), as docs/physics.md says.

    Of the sum g of the two gradients: the part along their bisector; and g itself or, where it is
    in conflict with one of the two, the part orthogonal to that one.
    """
    projected = dual_proj(preference=1.0)
    conflicts = 0
    for cosine, length in itertools.product([-0.99, -0.6, 0.0, 0.9], [0.01, 1.0, 30.0]):
        a = np.array([1.0, 0.0, 0.0])
        b = length * np.array([cosine, np.sqrt(1 - cosine**2), 0.0])
        J, g = np.stack([a, b]), a + b
        bisector = a + b / length
        centre = (g @ bisector) / (bisector @ bisector) * bisector
        against = next((x for x in (b, a) if g @ x < 0), None)
        conflicts += against is not None
        projection = g if against is None else g - (g @ against) / (against @ against) * against
        for weighting, expected in ((METHODS["config"], centre), (projected, projection)):
            found = weights_of(weighting, J) @ J
            np.testing.assert_allclose(found, expected, atol=1e-9 * np.linalg.norm(g))
    assert conflicts == 4


def test_krum_leaves_the_wrong_gradient_out():
    J = np.concatenate([np.eye(4) + 3, [[-100, 50, 3, 4]]]).astype(np.float32)
    for selected in (1, 3, 4):
        weights = weights_of(krum_of(1, selected), J)
        assert weights[4] == 0
        assert np.count_nonzero(weights) == selected


def test_krum_with_few_present_tasks():
    J = np.array([[1.0], [1.5], [9.0], [7.0], [7.9]], np.float32)
    weighting = krum_of(1, 3)
    for present, expected in [
        ([True, True, False, True, True], [1 / 3, 1 / 3, 0, 1 / 3, 0]),
        ([True, True, True, False, False], [1 / 3, 1 / 3, 1 / 3, 0, 0]),
        ([False, False, True, True, False], [0, 0, 0.5, 0.5, 0]),
        ([False, True, False, False, False], [0, 1, 0, 0, 0]),
    ]:
        weights = weights_of(weighting, J, present=present)
        np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_krum_ties_go_to_the_first():
    J = np.array([[0.0], [1.0], [1.0], [0.0]], np.float32)
    np.testing.assert_array_equal(weights_of(krum_of(0), J), [1, 0, 0, 0])


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: aligned_mtl("mean"), ValueError, "'rmse', got 'mean'"),
        (lambda: aligned_mtl(preference=-1.0), ValueError, "aligned_mtl: a preference must be in"),
        (lambda: conflict_free({"a": -1.0}), ValueError, "conflict_free: a preference must be in"),
        (lambda: aligned_mtl(preference=(1.0,)).init((1.0, 1.0)), ValueError, "have the structure"),
        (lambda: conflict_free((1.0,)).init((1.0, 1.0)), ValueError, "have the structure"),
        (lambda: krum(-1), ValueError, "`byzantine` must be an integer of at least 0, got -1"),
        (lambda: krum(1.5), ValueError, "`byzantine`"),
        (lambda: krum(1, 0), ValueError, "`selected` must be an integer of at least 1"),
        (lambda: krum(1, distance="l1"), ValueError, "'squared' or 'plain'"),
        (lambda: krum(1).init((0.0, 0.0, 0.0)), ValueError, "at least 4 tasks, but there are 3"),
        (lambda: krum(0, 9).init((0.0,) * 8), ValueError, "selected=9 needs at least 9 tasks"),
    ],
)
def test_errors(make, error, words):
    with pytest.raises(error, match=words):
        make()
