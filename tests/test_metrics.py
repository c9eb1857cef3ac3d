"""Numbers that are set between steps: they reach the weighting through whatever holds its state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import assert_trees_equal

import mtl_jax

ACCURACIES = {"a": 0.5, "b": 0.25}
ONES = {"a": 1.0, "b": 1.0}


def as_told():
    """A weighting whose weights are the averages of what it was told."""

    def update(losses, state, present, steps):
        metrics = state.taken_in(0.5)
        return jnp.where(metrics.updates > 0, metrics.average, 7.0), metrics

    return mtl_jax.vector_weighting(update, lambda tasks, key: mtl_jax.MetricsState.create(tasks))


WEIGHTING = as_told()


def weights_of(state, losses=ONES, mask=None):
    mask = dict.fromkeys("ab", True) if mask is None else mask
    weights, state = WEIGHTING.update(losses, state, mask=mask)
    return [float(weights[task]) for task in "ab"], state


def test_numbers_are_taken_in_once_and_averaged():
    weights, state = weights_of(WEIGHTING.init(ONES))
    assert weights == [7, 7]
    state = mtl_jax.with_metrics(state, {"a": 9.0, "b": 9.0})  # replaced before any step
    state = mtl_jax.with_metrics(state, ACCURACIES)
    for _ in range(2):
        weights, state = weights_of(state)
        assert weights == [0.5, 0.25]
    state = mtl_jax.with_metrics(state, {"a": 1.0, "b": np.nan})  # b was not measured
    for _ in range(2):
        weights, state = weights_of(state)
        assert weights == [0.75, 0.25]
    np.testing.assert_array_equal(state.inner.updates, [2, 1])


def test_an_absent_task_and_a_skipped_step_take_nothing_in():
    state = mtl_jax.with_metrics(WEIGHTING.init(ONES), ACCURACIES)
    weights, state = weights_of(state, mask={"a": True, "b": False})
    assert weights == [0.5, 0]
    np.testing.assert_array_equal(state.inner.fresh, [False, True])
    weights, after = weights_of(state, losses={"a": 1.0, "b": np.inf})
    assert np.all(np.isnan(weights))
    assert_trees_equal(after, state)
    weights, state = weights_of(state)
    assert weights == [0.5, 0.25]


def test_pure_under_jit_and_in_a_scan():
    state = WEIGHTING.init(ONES)
    before = jax.tree.map(np.array, state)
    tell = jax.jit(mtl_jax.with_metrics)
    told = tell(state, ACCURACIES)
    assert_trees_equal(state, before)
    assert_trees_equal(told, mtl_jax.with_metrics(state, ACCURACIES))
    tell(told, {"a": 0.1, "b": 0.2})
    assert tell._cache_size() == 1

    def epoch(state, accuracy):
        state = mtl_jax.with_metrics(state, {"a": accuracy, "b": 2 * accuracy})
        weights, state = WEIGHTING.update(ONES, state)
        return state, weights["b"]

    _, found = jax.lax.scan(epoch, state, jnp.array([0.5, 0.25, 0.25]))
    np.testing.assert_allclose(found, [1, 0.75, 0.625])


def test_through_wrappers_and_a_train_step():
    def losses_fn(params, x):
        return {"a": jnp.mean((params - x) ** 2), "b": jnp.mean((params + x) ** 2)}

    weighting = mtl_jax.clipped(mtl_jax.ema(mtl_jax.every(as_told(), 2), 0.0), 0.0, 10.0)
    step = mtl_jax.make_train_step(mtl_jax.value_and_grad(losses_fn, weighting), optax.sgd(0.1))
    x = jnp.ones(3)
    state, found = step.init(jnp.ones(3), x), []
    for number in range(4):
        if number == 1:
            state = mtl_jax.with_metrics(state, ACCURACIES)
            # As a checkpoint keeps it: its arrays, and the structure of a fresh state.
            structure = jax.tree.structure(step.init(jnp.ones(3), x))
            leaves = [np.array(leaf) for leaf in jax.tree.leaves(state)]
            state = jax.tree.unflatten(structure, map(jnp.asarray, leaves))
        state, value = step(state, x)
        found.append([float(value.weights[task]) for task in "ab"])
    assert found == [[7, 7], [7, 7], [0.5, 0.25], [0.5, 0.25]]
    assert step.update._cache_size() == 1


@pytest.mark.parametrize(
    ("metrics", "error", "says"),
    [
        ({"a": 1.0}, ValueError, "the metrics must have the structure of the losses"),
        ({"a": 1.0, "b": jnp.ones(2)}, TypeError, r"the metrics: 'b' has shape \(2,\)"),
        (
            {"a": 1.0, "b": True},
            TypeError,
            "'b' has shape .* and dtype bool; it must be one number",
        ),
        ({"a": 1.0, "b": 1j}, TypeError, "'b'.*complex"),
    ],
)
def test_errors_of_metrics(metrics, error, says):
    with pytest.raises(error, match=f"with_metrics: .*{says}"):
        mtl_jax.with_metrics(WEIGHTING.init(ONES), metrics)


def test_a_weighting_that_reads_no_metrics():
    state = mtl_jax.ema(mtl_jax.adaptive(), 0.5).init(ONES)
    with pytest.raises(ValueError, match="no weighting in this state reads metrics"):
        mtl_jax.with_metrics(state, ACCURACIES)
