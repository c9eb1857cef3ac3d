"""Float32 Gramians on which float32 arithmetic fails: thousands of each kind, against float64.

The inner products of integer matrices are exact in float32, so nothing is lost before a solver
begins. With more tasks than parameters and rows that sum to 0 the problems are degenerate: which
task enters next hangs on the last digits.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtl_jax
from mtl_jax import solvers

NUMBER = 2000


def integers(tasks, parameters, seed):
    """Rows of small integers, the first of which sum to 0 up to a random one."""
    rng = np.random.default_rng(seed)
    J = rng.integers(-3, 4, size=(NUMBER, tasks, parameters)).astype(float)
    for rows, last in zip(J, rng.integers(1, tasks - 1, size=NUMBER), strict=True):
        rows[last] = -rows[:last].sum(axis=0)
    return J


def low_rank(tasks, parameters, rank, seed):
    rng = np.random.default_rng(seed)
    left = rng.integers(-2, 3, size=(NUMBER, tasks, rank))
    return (left @ rng.integers(-2, 3, size=(NUMBER, rank, parameters))).astype(float)


def nearly_parallel(tasks, apart, seed):
    """A common row, and as much of a row of its own for each task."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(200, 1, 64))
    return (common + apart * rng.normal(size=(200, tasks, 64))).astype(np.float32).astype(float)


DEGENERATE = {
    "10 tasks, 5 parameters": functools.partial(integers, 10, 5, 0),
    "6 tasks, 4 parameters": functools.partial(integers, 6, 4, 1),
    "rank 3 of 6": functools.partial(low_rank, 6, 8, 3, 2),
}


def upgrad(gramian):
    number = gramian.shape[0]
    targets = jnp.eye(number, dtype=gramian.dtype) / number
    each = jax.vmap(lambda target: solvers.dual_cone_projection(gramian, target))(targets)
    return solvers.Solution(jnp.sum(each.x, axis=0), jnp.max(each.residual))


# Each with what its direction may be off by, relative to the longest gradient. A hull that is
# nearer to 0 than the rounding of float32 entries can tell is taken to hold it: the shortest
# direction is then off by its own length, at most the root of that rounding.
SOLVERS = {
    "minimum_norm_point": (solvers.minimum_norm_point, 1e-3),
    "dual_cone_projection": (
        lambda gramian: solvers.dual_cone_projection(
            gramian, jnp.full(gramian.shape[:1], 1 / gramian.shape[0], gramian.dtype)
        ),
        1e-5,
    ),
    "upgrad": (upgrad, 1e-5),
    "maximin_in_ball 0.5": (lambda gramian: solvers.maximin_in_ball(gramian, 0.5), 1e-5),
    "maximin_in_ball 0.9": (lambda gramian: solvers.maximin_in_ball(gramian, 0.9), 1e-5),
    "maximin_in_ball 3": (lambda gramian: solvers.maximin_in_ball(gramian, 3.0), 1e-5),
}


def in_both_precisions(function, J):
    """What a function of a Gramian returns for each, from float32 and from float64 Gramians."""
    gramians = J @ J.transpose(0, 2, 1)
    program = jax.jit(jax.vmap(function))
    single = jax.tree.map(np.asarray, program(jnp.asarray(gramians, jnp.float32)))
    jax.config.update("jax_enable_x64", True)
    try:
        double = jax.tree.map(np.asarray, program(jnp.asarray(gramians)))
    finally:
        jax.config.update("jax_enable_x64", False)
    return single, double


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("kind", DEGENERATE)
def test_degenerate_problems_are_solved_as_in_float64(kind, name):
    function, tolerance = SOLVERS[name]
    J = DEGENERATE[kind]()
    single, double = in_both_precisions(function, J)
    assert single.x.dtype == np.float32
    assert double.x.dtype == np.float64
    # One projection in 20,000 stops 2e-4 short, whatever the precision; its residual says so.
    for found in (single, double):
        assert np.sum(found.residual > 1e-4) <= (name in ("upgrad", "minimum_norm_point"))
        assert np.max(found.residual) < 1e-3
    lengths = np.linalg.norm(J, axis=2).max(axis=1)
    directions = [np.einsum("nk,nkp->np", found.x.astype(float), J) for found in (single, double)]
    errors = np.linalg.norm(directions[0] - directions[1], axis=1) / lengths
    assert np.max(errors) <= tolerance, np.argmax(errors)


@pytest.mark.parametrize(
    ("rows", "radius", "exact"),
    [
        (
            [[0, -1, 0, 0], [2, -1, -3, 0], [1, -1, -1, 0], [0, -3, 1, 0], [-3, 6, 3, 0],
             [2, 0, -3, 3]],
            0.9,
            [0, 0, 0, 0.5],
        ),
        ([[0, -1e-8], [2, 2], [-1, 0]], 0.5, [0, 0.5]),
        ([[0, -1e-12], [2, 2], [-1, 0]], 0.5, [0, 0.5]),
        ([[0, -1e-15], [2, 2], [-1, 0]], 0.5, [0, 0.5]),
    ],
)  # fmt: skip
def test_known_directions_of_cagrad(rows, radius, exact):
    J = np.array(rows, np.float32)
    x, residual = solvers.maximin_in_ball(jnp.asarray(J @ J.T), radius)
    np.testing.assert_allclose(x @ J, exact, atol=1e-5)
    assert residual < 1e-6


def weights_of(weighting):
    def weights(gramian):
        number = gramian.shape[0]
        losses = (jnp.ones((), gramian.dtype),) * number
        found, _ = weighting.update(losses, weighting.init(losses), gramian=gramian)
        return jnp.stack(found)

    return weights


@pytest.mark.parametrize("apart", [1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 1e-4, 1e-5, 1e-6])
@pytest.mark.parametrize("name", ["imtl_g", "conflict_free"])
def test_tasks_that_agree_do_not_stand_still(name, apart):
    """Gradients that differ by so much have a direction near what they have in common."""
    J = nearly_parallel(5, apart, seed=3)
    single, double = in_both_precisions(weights_of(getattr(mtl_jax, name)()), J)
    directions = [np.einsum("nk,nkp->np", found.astype(float), J) for found in (single, double)]
    sizes = np.linalg.norm(directions[1], axis=1)
    errors = np.linalg.norm(directions[0] - directions[1], axis=1) / sizes
    # Below 2e-3 the Gramian's rounding leaves no angles: the tasks count as parallel.
    assert np.max(errors) < max(3 * apart if apart < 2e-3 else 0, 2e-3)
    assert np.all(np.any(single != 0, axis=1))
