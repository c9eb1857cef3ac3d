"""The weightings that solve a problem, against exact optima."""

import functools
import json
import pathlib

import gramian_methods
import numpy as np
import pytest
from gramian_methods import SIZE

import mtl_jax

CASES = json.loads(
    (pathlib.Path(__file__).parents[1] / "data" / "gradient_matrices.json").read_text()
)["cases"]
mgda = functools.cache(mtl_jax.mgda)  # each weighting is made once, and compiled once
# Each exact value with its weighting and the power of the gradients' scale in its weights.
METHODS = {
    "mgda": (mgda(), 0),
    "upgrad": (mtl_jax.upgrad(), 0),
    "dualproj": (mtl_jax.dual_proj(), 0),
    "cagrad_c0.2": (mtl_jax.cagrad(0.2), 0),
    "cagrad_c0.5": (mtl_jax.cagrad(), 0),
    "cagrad_c0.9": (mtl_jax.cagrad(0.9), 0),
    "nash": (mtl_jax.nash_mtl(), -1),
    "fairgrad_alpha2": (mtl_jax.fair_grad(2.0), -4 / 3),
    "fairgrad_alpha0.5": (mtl_jax.fair_grad(0.5), -2 / 3),
}
ROUNDED = "rankdef_opposite_rows_k3_p6"  # projections there are ill-posed once J is rounded


def weights_of(weighting, J, losses=None):
    weights, state = gramian_methods.weights_of(weighting, J, losses=losses)
    return weights.astype(np.float64), float(state.inner.residual)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-9), (np.float32, 1e-4)])
@pytest.mark.parametrize("name", METHODS)
def test_exact(name, dtype, tolerance, request):
    if dtype == np.float64:
        request.getfixturevalue("x64")
    weighting, power = METHODS[name]
    for case in CASES:
        expected = case["exact"][name]
        for exponent in (-12, -5, 0, 5, 12):
            J = np.array(case["J"]).astype(dtype) * dtype(10.0**exponent)
            if case["id"] == ROUNDED and (exponent or dtype == np.float32):
                continue
            weights, residual = weights_of(weighting, J)
            assert np.all(np.isfinite(weights))
            exact = J.astype(np.float64) / 10.0**exponent
            lengths = np.linalg.norm(exact, axis=1)
            direction = (weights * 10.0 ** (-exponent * power)) @ exact
            status = expected.get("status", "ok")
            if status == "no_solution_zero_in_hull":
                assert residual > 0.5
                direction = weights @ exact
                assert np.linalg.norm(direction) <= tolerance * lengths.max()
                continue
            if status != "ok":  # CAGrad has no unique direction
                assert name.startswith("cagrad")
                assert (exact @ direction).min() >= -tolerance * lengths.max() ** 2
                continue
            g = np.array(expected["g"])
            stationary = case["zero_in_convex_hull"] and not name.startswith("cagrad")
            size = lengths.max() if stationary else np.linalg.norm(g)
            error = np.linalg.norm(direction - g) / size
            assert error <= tolerance, (case["id"], exponent, error)
            assert residual <= 1e-3 if dtype == np.float32 else residual <= 1e-10


@pytest.mark.parametrize("normalization", ["l2", "loss", "loss+"])
@pytest.mark.usefixtures("x64")
def test_mgda_normalised(normalization):
    """The weights of the plain method on the normalised gradients."""
    losses = np.array([0.3, 2.0, 1.1, 5.0, 0.7])
    plain, normalised = mgda(), mgda(normalization)
    for case in CASES:
        J = np.array(case["J"])[:5]
        lengths = np.linalg.norm(J, axis=1)
        L = losses[: len(J)]
        divisor = {"l2": lengths, "loss": L, "loss+": L * lengths}[normalization]
        rows = J / np.where(lengths > 0, divisor, 1)[:, None]
        weights, _ = weights_of(normalised, J, L)
        expected, _ = weights_of(plain, rows)
        np.testing.assert_allclose(weights @ rows, expected @ rows, atol=1e-8)
        exact = case["exact"].get("mgda_l2")  # not defined with a zero gradient
        if normalization == "l2" and exact is not None and len(case["J"]) <= 5:
            np.testing.assert_allclose(weights @ rows, exact["g"], atol=1e-9)


@pytest.mark.parametrize("normalization", ["loss", "loss+"])
def test_mgda_outside_its_domain(normalization):
    J = np.eye(3, dtype=np.float32)
    weighting = mgda(normalization)
    for bad in (0.0, -1.0):
        weights, _ = weights_of(weighting, J, [1.0, bad, 2.0])
        assert np.all(np.isnan(weights))
    weights, _ = weights_of(mgda("l2"), J, [1.0, -1.0, 2.0])
    np.testing.assert_allclose(weights, 1 / 3, rtol=1e-6)
    # A task that is solved, of loss and gradient 0, is Pareto stationary, not an error.
    J[1] = 0
    weights, _ = weights_of(weighting, J, [1.0, 0.0, 2.0])
    np.testing.assert_allclose(weights, [0, 1, 0], atol=1e-6)


@pytest.mark.usefixtures("x64")
def test_preferences():
    preference = np.linspace(2, 0, SIZE)
    upgrad = mtl_jax.upgrad(tuple(preference))  # each compiled once
    dual_proj = mtl_jax.dual_proj(tuple(preference))
    for case in CASES:
        J, K = np.array(case["J"]), case["K"]
        # The exact weights of each projection are given for the gradients divided by K.
        each = np.array(case["exact"]["upgrad"]["per_task_weights"]) * K
        expected = preference[:K] @ each @ J
        weights, _ = weights_of(upgrad, J)
        size = np.linalg.norm(J, axis=1).max()
        np.testing.assert_allclose(weights @ J, expected, atol=1e-9 * size)
        # Scaling a row and its preference inversely leaves the projected direction.
        weights, _ = weights_of(dual_proj, J)
        scales = np.where(preference[:K] > 0, preference[:K], 1)
        g = (preference[:K] * K) @ J / K
        residual = weights @ J - g
        assert (J @ (weights @ J)).min() >= -1e-9 * size**2
        assert abs(residual @ (weights @ J)) <= 1e-8 * size**2
        assert scales.all()


@pytest.mark.usefixtures("x64")
def test_variants_of_scale():
    J = np.array(next(case["J"] for case in CASES if case["id"] == "rand_k3_p10_a"))
    plain, _ = weights_of(mtl_jax.cagrad(0.4), J)
    for rescale, factor in (("1+c", 1 / 1.4), ("1+c^2", 1 / 1.16)):
        weights, _ = weights_of(mtl_jax.cagrad(0.4, rescale), J)
        np.testing.assert_allclose(weights, factor * plain, rtol=1e-12)
    nash, _ = weights_of(METHODS["nash"][0], J)
    np.testing.assert_allclose(np.linalg.norm(nash @ J), np.sqrt(3), rtol=1e-12)
    clipped, _ = weights_of(mtl_jax.nash_mtl(max_norm=1.0), J)
    np.testing.assert_allclose(clipped, nash / np.sqrt(3), rtol=1e-12)
    np.testing.assert_allclose(weights_of(mtl_jax.nash_mtl(max_norm=2.0), J)[0], nash, rtol=1e-12)
    np.testing.assert_allclose(weights_of(mtl_jax.fair_grad(), J)[0], nash, rtol=1e-10)
    np.testing.assert_allclose(weights_of(mtl_jax.cagrad(0.0), J)[0], 1 / 3, rtol=1e-12)


@pytest.mark.parametrize("c", [1.0, 3.0])
def test_cagrad_in_a_ball_that_holds_0_harms_no_task(c):
    weighting = mtl_jax.cagrad(c)
    for case in CASES:
        weights, residual = weights_of(weighting, np.array(case["J"], np.float32))
        assert residual < 1e-3
        J = np.array(case["J"], np.float32).astype(float)
        direction, mean, size = weights @ J, J.mean(axis=0), np.linalg.norm(J, axis=1).max()
        assert (J @ direction).min() > -1e-4 * size**2
        assert np.linalg.norm(direction - mean) < (c + 1e-4) * np.linalg.norm(mean) + 1e-6 * size


@pytest.mark.usefixtures("x64")
def test_a_wide_ball_of_cagrad_leads_to_mgda():
    J = np.array(next(case["J"] for case in CASES if case["id"] == "rand_k3_p10_a"))
    directions = [weights_of(one, J)[0] @ J for one in (mtl_jax.cagrad(1e4), mgda())]
    cosine = directions[0] @ directions[1] / np.prod(np.linalg.norm(directions, axis=1))
    np.testing.assert_allclose(cosine, 1, rtol=1e-7)


@pytest.mark.usefixtures("x64")
def test_fair_grad_of_alpha_0_is_the_sum():
    """And that is where small ones lead to, if no task loses by it."""
    weighting = mtl_jax.fair_grad(0.0)
    for case in CASES:
        weights, residual = weights_of(weighting, np.array(case["J"]))
        np.testing.assert_array_equal(weights, 1)
        assert residual == 0
    J = np.array([[1.0, 2.0, 0.0], [0.5, -0.1, 1.0], [1.0, 0.0, 1.0]])
    small, residual = weights_of(mtl_jax.fair_grad(0.02), J)
    np.testing.assert_allclose(small, (J @ J.sum(axis=0)) ** -0.02, rtol=1e-3)
    assert residual < 1e-10
    weights, _ = gramian_methods.weights_of(weighting, J, present=[True, False, True])
    np.testing.assert_array_equal(weights, [1, 0, 1])


def test_errors():
    for call, message in (
        (lambda: mtl_jax.mgda("l1"), "mgda: `normalization`"),
        (lambda: mtl_jax.cagrad(-0.1), r"cagrad: `c` must be in \[0, inf\)"),
        (lambda: mtl_jax.cagrad(float("inf")), r"cagrad: `c` must be in \[0, inf\)"),
        (lambda: mtl_jax.cagrad(rescale="2"), "cagrad: `rescale`"),
        (lambda: mtl_jax.nash_mtl(0.0), "nash_mtl: `max_norm`"),
        (lambda: mtl_jax.fair_grad(-1.0), "fair_grad: `alpha`"),
        (lambda: mtl_jax.upgrad((1.0, -1.0)), "upgrad: a preference"),
        (lambda: mtl_jax.dual_proj((1.0, 1.0)).init({"a": 1.0}), "dual_proj: `preference` must"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
