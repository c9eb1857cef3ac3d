import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_jax
from mtl_jax._jacobian import shared_parameters


@pytest.fixture
def check_problem():
    return _check_problem


def _check_problem(problem, steps=12, learning_rate=None):
    """The problem keeps its contract, and a few steps on one batch lower every task's loss."""
    key = jax.random.key(0)
    params, model_state = jax.jit(problem.init)(key)
    assert set(params) == {"encoder", "heads"}
    batch = {field: values[: problem.batch_size] for field, values in problem.train.items()}
    losses, _ = jax.jit(problem.losses)(params, model_state, key, batch)
    assert set(losses) == set(problem.tasks)
    z, _ = jax.jit(problem.encoder)(params, model_state, key, batch)
    mtl_jax.check_heads(problem.heads, params, z, batch, tasks=list(problem.tasks))
    shared = jax.tree.leaves(shared_parameters(params, problem.shared))
    assert len(shared) == len(jax.tree.leaves(params["encoder"]))
    total_of_z = jax.grad(lambda p: jnp.sum(problem.encoder(p, model_state, key, batch)[0]))
    chosen = jax.jit(total_of_z)(params)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(chosen["heads"]))
    optimizer = optax.adam(learning_rate or problem.learning_rate)

    def total(params, key):
        losses, _ = problem.losses(params, model_state, key, batch)
        return sum(losses.values()), losses

    def step(carry, key):
        params, state = carry
        gradient, losses = jax.grad(total, has_aux=True)(params, key)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), losses

    keys = jax.random.split(key, steps)
    carry = (params, optimizer.init(params))
    (trained, _), history = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))(carry)
    for task, values in history.items():
        assert np.isfinite(values).all()
        assert values[-1] < 0.9 * values[0], task

    outputs = jax.jit(problem.predict)(trained, model_state, problem.test)
    assert set(outputs) == set(problem.tasks)
    for name, task in problem.tasks.items():
        (metric,) = task.metrics
        answers, labels = np.argmax(outputs[name], axis=-1), problem.labels(problem.test)[name]
        counted = problem.counted(problem.test, {"": np.full(len(labels), True)})[name]
        statistics = metric.statistics(outputs[name], labels, counted)
        expected = np.mean((answers == labels)[np.asarray(counted)])
        np.testing.assert_allclose(metric.over([(statistics, counted)]), expected, rtol=1e-6)

    few = {field: values[:4] for field, values in batch.items()}
    seeds = jax.random.split(key, 2)
    several = jax.jit(jax.vmap(lambda key: problem.losses(*problem.init(key), key, few)[0]))(seeds)
    assert all(values.shape == (2,) for values in several.values())
