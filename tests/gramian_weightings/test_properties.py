"""What the weightings of the Gramian promise, checked on each of them."""

import functools

import gramian_methods
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gramian_methods import (
    DEGREES,
    GRAMIAN_METHODS,
    KEY,
    RANDOM,
    SIZE,
    initial,
    promotion,
    weights_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import assert_trees_equal

each_method = pytest.mark.parametrize("name", GRAMIAN_METHODS)
# Neither random draws nor the first of equal scores are indifferent to the order of the tasks.
each_symmetric_method = pytest.mark.parametrize(
    "name", [name for name in GRAMIAN_METHODS if name not in (*RANDOM, "krum")]
)
NON_CONFLICTING = ("mgda", "nash_mtl", "fair_grad", "upgrad", "dual_proj", "conflict_free")
# These leave all weights 0, where no direction serves all tasks.
STOPS = ("imtl_g", "conflict_free")


@st.composite
def matrices(draw, least=1, most=5, wide=False):
    """Task gradients of tame condition, some rows scaled by up to 1e3 either way."""
    number = draw(st.integers(least, most))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    J = rng.normal(size=(number, number + 3 if wide else draw(st.integers(1, 8))))
    if draw(st.booleans()):
        J *= 10.0 ** rng.uniform(-3, 3, size=(number, 1))
    if draw(st.booleans()):
        J += rng.normal(size=J.shape[1])  # fewer conflicts
    return J


some = settings(max_examples=15, deadline=None, derandomize=True)
SPECIAL = {
    "one": [[1.0, 2.0]],
    "equal": [[1.0, 2.0], [1.0, 2.0], [3.0, -1.0]],
    "all equal": [[1.0, 2.0]] * 4,
    "opposite": [[1.0, 2.0], [-1.0, -2.0]],
    "opposite and another": [[1.0, 2.0], [-1.0, -2.0], [2.0, -1.0]],
    "zero": [[1.0, 2.0], [0.0, 0.0], [2.0, 1.0]],
    "all zero": [[0.0, 0.0]] * 3,
    "parallel": [[1.0, 2.0], [2.0, 4.0], [0.5, 1.0]],
    "antiparallel": [[1.0, 2.0], [2.0, 4.0], [-0.5, -1.0]],
    "more tasks than parameters": [[1.0], [2.0], [3.0], [-1.0], [0.5]],
    "a simplex around 0": [[1.0, 0.0], [-0.5, 0.8], [-0.5, -0.8]],
    "imbalanced": [[1e-3, 2e-3], [1e3, -2e2]],
}


@pytest.fixture(params=[np.float32, np.float64])
def dtype(request):
    """Both, each as it is used: one program for the float32 of all tests."""
    if request.param == np.float64:
        request.getfixturevalue("x64")
    return request.param


@each_method
def test_finite_at_special_gradients_of_every_scale(name, dtype):
    for case, rows in SPECIAL.items():
        if name == "krum" and len(rows) < 3:
            continue
        for scale in (1e-12, 1.0, 1e12):
            weights, _ = weights_of(name, np.array(rows, dtype) * dtype(scale))
            assert np.all(np.isfinite(weights)), (case, scale, weights)


@each_method
def test_one_task(name):
    """The direction is the task's gradient, of the length of its kind; krum needs three tasks."""
    weights, _ = weights_of(name, np.array([[3.0, 4.0]], np.float32))
    expected = {
        "nash_mtl": 1 / 5,  # 25 w = 1 / w
        "fair_grad": 5 ** (-4 / 3),  # 25 w = w^(-1/2)
        "cagrad": 1.5,  # to the edge of the ball
    }
    np.testing.assert_allclose(weights, [expected.get(name, 1)], rtol=1e-5)


@each_symmetric_method
def test_permuting_the_tasks_permutes_the_weights(name, x64):
    @some
    @given(matrices(least=3, wide=True), st.randoms())
    def check(J, random):
        order = random.sample(range(len(J)), len(J))
        losses = np.linspace(0.5, 2, len(J))
        weights, _ = weights_of(name, J, losses=losses)
        permuted, _ = weights_of(name, J[order], losses=losses[order])
        np.testing.assert_allclose(
            permuted.T @ J[order], weights @ J, rtol=1e-7, atol=1e-7 * np.linalg.norm(weights @ J)
        )

    check()


@each_method
def test_the_weights_scale_with_the_gradients(name, x64):
    if name == "gradnorm":
        after = [weights_of(name, np.eye(3) * s * [1, 2, 3])[0] for s in (1.0, 1e6)]
        np.testing.assert_array_equal(after[0], after[1])  # the first step's are 1 for all
        return

    @some
    @given(matrices(least=3, wide=True), st.integers(-40, 40))
    def check(J, exponent):
        weights, _ = weights_of(name, J)
        scaled, _ = weights_of(name, J * 2.0**exponent)  # which rounds nothing
        np.testing.assert_allclose(
            scaled, weights * 2.0 ** (exponent * DEGREES[name]), rtol=1e-9, atol=1e-14
        )

    check()


@each_method
def test_rotations_of_the_parameters_do_not_matter(name, x64):
    @some
    @given(matrices(least=3, wide=True), st.integers(0, 1000))
    def check(J, seed):
        Q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(J.shape[1],) * 2))
        weights, _ = weights_of(name, J)
        rotated, _ = weights_of(name, J @ Q)
        np.testing.assert_allclose(
            rotated @ J, weights @ J, rtol=1e-7, atol=1e-7 * np.linalg.norm(weights @ J)
        )

    check()


@pytest.mark.parametrize("name", NON_CONFLICTING)
def test_no_task_is_harmed(name, x64):
    # conflict_free promises it for independent gradients, nash_mtl and fair_grad where a common
    # descent direction exists: the others always.
    @some
    @given(matrices(wide=name in ("conflict_free", "nash_mtl", "fair_grad")))
    def check(J):
        weights, _ = weights_of(name, J)
        direction = weights @ J
        lengths = np.linalg.norm(J, axis=1)
        gains = J @ direction / lengths
        assert gains.min() >= -1e-8 * lengths.max() * np.abs(weights).max()
        if name in ("conflict_free", "nash_mtl", "fair_grad"):
            assert gains.min() > 0
        if name == "conflict_free":
            np.testing.assert_allclose(gains, gains[0], rtol=1e-6)

    check()


@pytest.mark.parametrize(
    "name", ["mgda", "nash_mtl", "fair_grad", "upgrad", "dual_proj", "conflict_free"]
)
def test_stationary_points(name, dtype):
    """Where 0 is a positive combination of the gradients and they span all, nothing is done."""
    J = np.array(SPECIAL["a simplex around 0"], dtype)
    for scale in (1e-12, 1.0, 1e12):
        weights, state = weights_of(name, J * dtype(scale))
        direction = weights.astype(np.float64) @ (J * dtype(scale)).astype(np.float64)
        size = np.linalg.norm(J.astype(np.float64) * scale, axis=1).max()
        assert np.linalg.norm(direction) <= 50 * np.finfo(dtype).eps * size
        if name in ("nash_mtl", "fair_grad"):
            assert state.inner.residual > 0.5
            np.testing.assert_allclose(weights.sum(), 1, rtol=1e-5)
        elif name not in STOPS:
            assert state.inner.residual < 1e-4


@each_method
def test_what_is_not_finite_leaves_the_state_as_it_was(name):
    J = np.array(SPECIAL["imbalanced"] + [[1.0, 1.0]], np.float32)
    _, state = weights_of(name, J)
    for bad in ("loss", "gramian", "overflow"):
        losses = np.array([1.0, np.nan, 1.0], np.float32) if bad == "loss" else None
        rows = J.copy()
        if bad != "loss":
            rows[1] = np.inf if bad == "gramian" else 1e20
        with np.errstate(all="ignore"):
            weights, after = weights_of(name, rows, losses=losses, state=state)
        assert np.all(np.isnan(weights))
        assert_trees_equal(after, state)


@each_symmetric_method
def test_an_absent_task_counts_nowhere(name):
    J = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    losses, present = np.array([0.5, 2.0, 1.0, 0.7]), [True, False, True, True]
    results = []
    for garbage in (5.0, np.nan):
        rows, values = J.copy(), losses.copy()
        rows[1], values[1] = garbage, garbage
        results.append(weights_of(name, rows, losses=values, present=present, garbage=garbage))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert results[0][0][1] == 0
    expected, _ = weights_of(name, J[[0, 2, 3]], losses=losses[[0, 2, 3]])
    np.testing.assert_allclose(results[0][0][[0, 2, 3]], expected, rtol=2e-5)
    nobody, state = weights_of(name, J, present=[False] * 4)
    np.testing.assert_array_equal(nobody, 0)
    np.testing.assert_array_equal(state.steps, 0)


@pytest.mark.parametrize(
    "name", ["mgda", "cagrad", "nash_mtl", "upgrad", "imtl_g", "gradvac", "gradnorm"]
)
def test_vmap_over_seeds_equals_one_by_one(name):
    rng = np.random.default_rng(1)
    J = rng.normal(size=(3, SIZE, 8)).astype(np.float32)
    gramians = jnp.asarray(J @ J.transpose(0, 2, 1))
    losses = jnp.asarray(rng.uniform(0.5, 2, size=(3, SIZE)).astype(np.float32))
    present = jnp.broadcast_to(jnp.arange(SIZE) < 6, (3, SIZE))
    keys = jax.random.split(KEY, 3)
    shapes = (jax.ShapeDtypeStruct((), jnp.float32),) * SIZE
    init = functools.partial(gramian_methods.weighting_of(name).init, shapes)
    states = jax.vmap(lambda key: init(key=key))(keys)
    update = gramian_methods.update(name)
    batched, _ = jax.jit(jax.vmap(update))(losses, gramians, present, states)
    for seed in range(3):
        with jax.numpy_dtype_promotion(promotion(name)):  # the program of the other tests
            one, _ = update(losses[seed], gramians[seed], present[seed], init(key=keys[seed]))
        np.testing.assert_allclose(batched[seed], one, rtol=2e-4, atol=1e-5)


@each_method
def test_states_are_fresh_and_keep_their_types(name):
    state = initial(name, np.float32)
    pointers = [
        leaf.unsafe_buffer_pointer()
        for leaf in jax.tree.leaves(state)
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    ]
    assert len(set(pointers)) == len(pointers)
    J = np.random.default_rng(2).normal(size=(4, 5)).astype(np.float32)
    for _ in range(2):
        _, new = weights_of(name, J, state=state)
        assert jax.tree.structure(new) == jax.tree.structure(state)
        types = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)]
        assert types == [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(new)]
        traced = gramian_methods.update(name)._cache_size()
        state = new
    assert gramian_methods.update(name)._cache_size() == traced


@each_method
@pytest.mark.parametrize("losses_dtype", [jnp.bfloat16, jnp.float16, jnp.float64])
def test_dtypes(name, losses_dtype, x64):
    weighting = gramian_methods.weighting_of(name)
    losses = (jax.ShapeDtypeStruct((), losses_dtype),) * 3
    expected = jnp.float64 if losses_dtype == jnp.float64 else jnp.float32
    state = weighting.init(losses, key=KEY)
    weights, after = jax.eval_shape(
        lambda *args: weighting.update(*args, gramian=jnp.eye(3, dtype=jnp.float32)), losses, state
    )
    assert all(weight.dtype == expected for weight in weights)
    for leaf, old in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        assert leaf.dtype == old.dtype
        assert not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.dtype == expected


@pytest.mark.parametrize("name", [name for name in GRAMIAN_METHODS if name != "gradnorm"])
def test_strict_dtype_promotion(name):
    weighting = gramian_methods.weighting_of(name)
    state = weighting.init((jnp.float32(1),) * 3, key=KEY)
    with jax.numpy_dtype_promotion("strict"):
        losses = (jnp.float32(1),) * 3
        jax.eval_shape(functools.partial(weighting.update, gramian=jnp.eye(3)), losses, state)


@each_method
def test_no_gradient_flows_through_the_weights(name):
    state = initial(name, np.float32)

    def total(losses, gramian):
        return jnp.sum(
            gramian_methods.update(name)(losses, gramian, jnp.ones(SIZE, bool), state)[0]
        )

    # An iteration that cannot be differentiated would raise if a gradient flowed through it.
    # Under jit nothing is left to compute where no gradient flows.
    by_losses, by_gramian = jax.jit(jax.grad(total, (0, 1)))(jnp.ones(SIZE), jnp.eye(SIZE))
    np.testing.assert_array_equal(by_losses, 0)
    np.testing.assert_array_equal(by_gramian, 0)


# Which direction does not depend on the losses' scale, as docs/choosing.md says.
@pytest.mark.parametrize("name", ["nash_mtl", "conflict_free"])
def test_the_unit_of_a_loss_does_not_turn_the_direction(name):
    rng = np.random.default_rng(0)
    for _ in range(10):
        J = rng.normal(size=(3, 6)).astype(np.float32) + 0.5
        scaled = J * np.array([[1.0], [100.0], [0.05]], np.float32)
        ours, theirs = (weights_of(name, rows)[0] @ rows for rows in (J, scaled))
        cosine = ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs)
        assert cosine > 1 - 1e-4
