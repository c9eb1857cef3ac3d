"""What holds for every weighting of a second batch."""

import functools

import jax
import jax.numpy as jnp
import methods
import numpy as np
import pytest
from methods import EVERYBODY, TASKS

NAMES = {"modo": 1, "sdmgrad": 3, "auto_lambda": 1}
"""The methods, and for how many directions they ask."""
each_method = pytest.mark.parametrize("name", NAMES)
PRODUCTS = np.random.default_rng(2).normal(size=(3, 3)) + 2 * np.eye(3)


def losses(dtype=np.float32, value=1.0):
    return {task: dtype(value + k) for k, task in enumerate(TASKS)}


def products(name, dtype=np.float32, scale=1.0):
    return (PRODUCTS * scale).astype(dtype)[:, : NAMES[name]]


def run(name, steps=3, dtype=np.float32, scale=1.0, mask=EVERYBODY, update=None):
    """The weights of every step and the last state."""
    made = methods.made(name)
    state, found = made.init(losses(dtype)), []
    for _ in range(steps):
        weights, state = (update or made.update)(
            losses(dtype), state, mask=mask, products=products(name, dtype, scale)
        )
        found.append(np.array([weights[task] for task in TASKS]))
    return found, state


@each_method
def test_dtypes(name):
    weights, state = run(name)
    assert all(one.dtype == np.float32 for one in weights)
    half, other = run(name, dtype=jnp.bfloat16)
    assert all(one.dtype == np.float32 for one in half)
    assert jax.tree.map(jnp.result_type, other) == jax.tree.map(jnp.result_type, state)
    np.testing.assert_allclose(half, weights, rtol=0.05, atol=0.05)


@pytest.mark.usefixtures("x64")
@each_method
def test_float64(name):
    weights, state = run(name, dtype=np.float64)
    assert all(one.dtype == np.float64 for one in weights)
    assert all(leaf.dtype != np.float32 for leaf in jax.tree.leaves(state))


@each_method
def test_jit_vmap_and_no_second_compilation(name):
    made, (weights, _) = methods.made(name), run(name)
    jitted = jax.jit(made.update)
    found, _ = run(name, update=jitted)
    np.testing.assert_allclose(found, weights, rtol=1e-5, atol=1e-6)
    assert jitted._cache_size() == 1
    state = made.init(losses())
    states = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state)
    both = jnp.stack([products(name), 2 * products(name)])
    update = functools.partial(made.update, losses())
    mapped, _ = jax.vmap(lambda state, own: update(state, products=own))(states, both)
    for place, scale in enumerate((1.0, 2.0)):
        expected, _ = run(name, 1, scale=scale)
        row = np.array([mapped[task][place] for task in TASKS])
        np.testing.assert_allclose(row, expected[0], rtol=1e-5, atol=1e-6)


@each_method
def test_absent_tasks_and_nobody(name):
    mask = EVERYBODY | {"b": np.False_}
    weights, state = run(name, mask=mask)
    assert all(one[1] == 0 for one in weights)
    assert state.steps.tolist() == [3, 0, 3]
    fresh = methods.made(name).init(losses())
    for leaf, first in zip(jax.tree.leaves(state), jax.tree.leaves(fresh), strict=True):
        if leaf.ndim:
            np.testing.assert_array_equal(leaf[1], first[1])
    weights, state = run(name, 1, mask=dict.fromkeys(TASKS, np.False_))
    np.testing.assert_array_equal(weights[0], 0)


@each_method
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_changes_nothing(name, bad):
    made = methods.made(name)
    _, state = run(name, 1)
    wrong = products(name).copy()
    wrong[0, 0] = bad
    weights, after = made.update(losses(), state, mask=EVERYBODY, products=wrong)
    assert all(np.isnan(weight) for weight in weights.values())
    for one, other in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(one, other)


@each_method
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_extremes(name, scale):
    weights, _ = run(name, scale=scale)
    assert np.isfinite(weights).all()
    if name != "auto_lambda":
        np.testing.assert_allclose(np.sum(weights, axis=1), 1, rtol=1e-5)
