"""Data as it really is, end to end: what is not finite, too large or small, or not there."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import as_numpy, assert_trees_equal

import mtl_jax

TASKS = ("a", "b", "c")
OPTIMIZER = optax.adam(0.05)


def make_params():
    random = np.random.default_rng(2)
    params = {
        "encoder": random.normal(size=(3, 4)),
        "heads": {task: random.normal(size=4) for task in TASKS},
    }
    return jax.tree.map(np.float32, params)


def make_batch(size=6, seed=0):
    """Inputs, and targets of every task for every example."""
    random = np.random.default_rng(seed)
    batch = {"x": random.normal(size=(size, 3))} | {t: random.normal(size=size) for t in TASKS}
    return jax.tree.map(np.float32, batch)


def encoder(params, batch):
    return jnp.tanh(batch["x"] @ params["encoder"])


def heads(params, zs, batch):
    return {t: jnp.mean((zs[t] @ params["heads"][t] - batch[t]) ** 2) for t in TASKS}


def losses_fn(params, batch):
    return heads(params, dict.fromkeys(TASKS, encoder(params, batch)), batch)


def labelled_losses(params, batch):
    """Missing labels are NaN, and left out."""
    z = encoder(params, batch)
    there = {task: jnp.isfinite(batch[task]) for task in TASKS}
    return {
        task: mtl_jax.masked_mean(
            (z @ params["heads"][task] - jnp.where(there[task], batch[task], 0)) ** 2, there[task]
        )
        for task in TASKS
    }


def inverse_norms():
    """A weighting of the Gramian that compiles quickly."""

    def update(losses, state, present, steps, gramian):
        return jnp.where(present, 1 / jnp.sqrt(jnp.diagonal(gramian)), 0), state

    return mtl_jax.vector_weighting(update, needs=mtl_jax.Signal.GRAMIAN)


def in_encoder(path):
    return path == "encoder"


FORMS = {
    "losses": (mtl_jax.famo, lambda w: mtl_jax.value_and_grad(losses_fn, w)),
    "gramian": (
        lambda: mtl_jax.gradnorm(optax.adam(0.1)),
        lambda w: mtl_jax.value_and_grad(losses_fn, w, shared=in_encoder),
    ),
    "representation": (
        lambda: mtl_jax.ema(mtl_jax.every(inverse_norms(), 2), 0.5),
        lambda w: mtl_jax.representation_value_and_grad(encoder, heads, w, tasks=TASKS),
    ),
    "aggregator": (
        mtl_jax.db_mtl,
        lambda w: mtl_jax.value_and_grad(losses_fn, w, shared=in_encoder),
    ),
    "task gradients": (
        mtl_jax.excess_mtl,
        lambda w: mtl_jax.value_and_grad(losses_fn, w, shared=in_encoder),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_one_bad_label_of_one_example_costs_one_step(form):
    make, gradient_of = FORMS[form]
    step = mtl_jax.make_train_step(gradient_of(make()), OPTIMIZER)
    state = step.init(make_params(), make_batch())
    good, bad = make_batch(), make_batch()
    for value in (np.nan, np.inf):
        state, _ = step(state, good)
        before = as_numpy(state._replace(step=0, skipped=0))
        bad["b"][3] = value
        state, _ = step(state, bad)
        for new, old in zip(as_numpy(state._replace(step=0, skipped=0)), before, strict=True):
            np.testing.assert_array_equal(new, old)
        state, _ = step(state, good)
        assert not np.array_equal(as_numpy(state.params)[0], before[0])
    assert (state.step, state.skipped) == (6, 2)
    assert all(np.all(np.isfinite(leaf)) for leaf in as_numpy(state))
    assert step.update._cache_size() == 1


def test_a_bad_label_that_is_masked_costs_nothing():
    gradient_fn = mtl_jax.value_and_grad(labelled_losses, mtl_jax.adaptive())
    params, batch = make_params(), make_batch()
    state = gradient_fn.init(params, batch)
    batch["b"][3] = np.nan
    value, gradient, _ = jax.jit(gradient_fn.update)(params, state, batch)
    others = np.array([0, 1, 2, 4, 5])
    expected = jax.jit(losses_fn)(params, jax.tree.map(lambda field: field[others], batch))
    np.testing.assert_allclose(value.losses["b"], expected["b"], rtol=1e-5)
    assert all(np.all(np.isfinite(leaf)) for leaf in as_numpy(gradient))


@pytest.mark.parametrize(
    "make",
    [mtl_jax.adaptive, mtl_jax.excess_mtl, lambda: mtl_jax.trimmed_mean(1)],
    ids=["losses", "rows", "aggregator"],
)
def test_a_batch_of_no_examples_leaves_everything_as_it_was(make):
    step = mtl_jax.make_train_step(mtl_jax.value_and_grad(labelled_losses, make()), optax.sgd(0.1))
    state = step.init(make_params(), make_batch(0))
    before = as_numpy(state._replace(step=0))
    state, value = step(state, make_batch(0), mask=dict.fromkeys(TASKS, False))
    assert (state.step, state.skipped) == (1, 0)
    assert value.losses == dict.fromkeys(TASKS, 0)
    for new, old in zip(as_numpy(state._replace(step=0)), before, strict=True):
        np.testing.assert_array_equal(new, old)


def test_a_plain_mean_of_no_examples_is_skipped():
    step = mtl_jax.make_train_step(mtl_jax.value_and_grad(losses_fn, mtl_jax.equal()), OPTIMIZER)
    state = step.init(make_params(), make_batch(0))
    state, _ = step(state, make_batch(0))
    assert state.skipped == 1
    assert_trees_equal(state.params, make_params())


def test_bfloat16_gradients_of_every_norm():
    """Orthogonal gradients, for which Nash's weights are the inverse norms."""
    weighting = mtl_jax.nash_mtl()

    def losses_fn(params, norms):
        return tuple(norm.astype(jnp.bfloat16) * p for norm, p in zip(norms, params, strict=True))

    gradient_fn = mtl_jax.value_and_grad(losses_fn, weighting)
    params = (np.ones((), jnp.bfloat16),) * 3
    state = gradient_fn.init(params, (np.float32(1),) * 3)
    update = jax.jit(gradient_fn.update)

    def run(exponents):
        return update(params, state, tuple(np.float32(2.0**e) for e in exponents))

    for exponents in ((-60, -60, -59), (60, 60, 59), (0, 40, -20), (-40, 0, 1), (-60, 0, 60)):
        value, gradient, _ = run(exponents)
        exact = 2.0 ** -np.array(exponents, np.float64)
        np.testing.assert_allclose(value.weights, exact, rtol=1e-5)
        np.testing.assert_allclose(np.stack(gradient).astype(np.float32), 1, rtol=1e-2)
    value, _, after = run((0, 80, 0))
    assert all(np.isnan(weight) for weight in value.weights)
    assert_trees_equal(after, state)
    value, _, after = run((0, -80, 0))  # a gradient whose square vanishes is one of 0
    np.testing.assert_allclose(value.weights, [1, 0, 1], rtol=1e-5)
    assert after.inner.residual < 1e-5
    theory = mtl_jax.value_and_grad(losses_fn, weighting, leave_out_zero=False)
    norms = tuple(np.float32(2.0**e) for e in (0, -80, 0))
    value, _, after = jax.jit(theory)(params, state, norms)  # nothing serves all
    assert all(np.isfinite(weight) for weight in value.weights)
    assert after.inner.residual > 0.5
