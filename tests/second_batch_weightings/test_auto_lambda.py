"""Auto-Lambda: the weights descend on what the next step does to the primary tasks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from second_batches import TASKS, losses_fn, vector

import mtl_jax
from mtl_jax import auto_lambda

PRIMARY = {"a": True, "b": False, "c": True}
RATE = 0.1
PARAMS = {"w": np.array([[0.5, -1.0], [0.3, 0.8]]), "v": np.array([1.0, -0.7])}
FIRST, SECOND = np.array([[0.2, -0.4], [1.0, 0.3]]), np.array([[0.9, 0.1], [-0.5, 0.6]])


def effect(weights, params, primary, rate):
    """The primary losses on the second batch after a step with these weights on the first."""

    def weighted(params):
        losses = losses_fn(params, FIRST)
        return sum(weight * losses[task] for weight, task in zip(weights, TASKS, strict=True))

    after = jax.tree.map(lambda p, g: p - rate * g, params, jax.grad(weighted)(params))
    losses = losses_fn(after, SECOND)
    return sum(losses[task] for task in TASKS if primary[task])


@functools.cache
def programs(rows="auto"):
    weighting = auto_lambda(optax.sgd(1.0), lambda step: RATE / (1.0 + step), PRIMARY, 0.4)
    gradient = mtl_jax.value_and_grad(losses_fn, weighting, rows=rows)
    return gradient, jax.jit(gradient)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("rows", ["auto", "low_memory", "map"])
def test_the_gradient_of_the_weights_is_that_through_the_step(rows):
    """JAX differentiates the whole of it: second derivatives, which the method does not need."""
    gradient, call = programs(rows)
    state, weights, params = gradient.init(PARAMS, FIRST), np.full(3, 0.4), PARAMS
    for step in range(2):
        slope = jax.grad(effect)(weights, params, PRIMARY, RATE / (1 + step))
        value, found, state = call(params, state, FIRST, second=(SECOND,))
        weights = weights - np.array(slope)
        np.testing.assert_allclose(vector(value.weights), weights, rtol=1e-10)
        rows_of = jax.jacrev(losses_fn)(params, FIRST)
        for name, leaf in found.items():
            stacked = np.stack([rows_of[task][name] for task in TASKS])
            np.testing.assert_allclose(leaf, np.tensordot(weights, stacked, 1), rtol=1e-10)
        params = jax.tree.map(lambda p, g: p - 0.3 * g, params, found)
    assert np.abs(np.array(slope)).min() > 1e-4
    np.testing.assert_allclose(state.inner.weights, weights, rtol=1e-10)


def test_all_tasks_are_primary_by_default_and_the_step_size_may_be_a_number():
    everyone = dict.fromkeys(TASKS, True)
    found = []
    for primary in (None, everyone, dict.fromkeys(TASKS, 1.0)):
        weighting = auto_lambda(optax.sgd(1.0), RATE, primary)
        gradient = mtl_jax.value_and_grad(losses_fn, weighting)
        state = gradient.init(PARAMS, FIRST)
        params = jax.tree.map(jnp.float32, PARAMS)
        args = params, state, FIRST.astype(np.float32)
        value, _, _ = gradient(*args, second=(SECOND.astype(np.float32),))
        found.append(vector(value.weights))
    np.testing.assert_array_equal(found[1:], found[:-1])
    slope = jax.grad(effect)(np.full(3, 0.1, np.float32), params, everyone, RATE)
    np.testing.assert_allclose(found[0], 0.1 - np.array(slope), rtol=1e-4)


def test_an_absent_task_keeps_its_weight_and_its_optimizer():
    weighting = auto_lambda(optax.adam(0.01), RATE)
    losses = (np.float32(1),) * 2
    state = weighting.init(losses)
    products = np.float32([[1.0], [1.0]])
    mask = (np.True_, np.False_)
    weights, state = weighting.update(losses, state, mask=mask, products=products)
    np.testing.assert_allclose(weights, [0.11, 0], rtol=1e-5)
    weights, state = weighting.update(losses, state, mask=(np.True_, np.True_), products=products)
    np.testing.assert_allclose(weights, [0.12, 0.11], rtol=1e-5)
    assert state.inner.total == 2
    # The virtual step is taken with the weights of present tasks only, as are the directions.
    combinations, step = weighting.method.directions(state, jnp.array([False, True]))
    np.testing.assert_array_equal(combinations, [[0, 1]])
    np.testing.assert_allclose(step, [0, RATE * 0.11], rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: auto_lambda(0.1, 0.1), TypeError, "`optimizer` must be an optax optimizer"),
        (lambda: auto_lambda(optax.sgd(1), -1.0), ValueError, r"`learning_rate` must be in \[0"),
        (lambda: auto_lambda(optax.sgd(1), "x"), TypeError, "`learning_rate` must be a number"),
        (
            lambda: auto_lambda(optax.sgd(1), 0.1, {"a": -1.0}),
            ValueError,
            r"`primary` must be in \[0, inf\)",
        ),
        (lambda: auto_lambda(optax.sgd(1), 0.1, initial="x"), TypeError, "an initial weight"),
        (
            lambda: auto_lambda(optax.sgd(1), 0.1, {"a": True}).init((1.0, 1.0)),
            ValueError,
            "`primary` must have the structure of the losses",
        ),
    ],
)
def test_parameters_outside_their_range(make, error, message):
    with pytest.raises(error, match=message):
        make()
