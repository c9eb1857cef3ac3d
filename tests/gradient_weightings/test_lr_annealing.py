"""Learning rate annealing: its definition, the codes that deviate, and its special cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtl_jax
from mtl_jax import lr_annealing

TASKS = ("boundary", "equation", "initial")
K, STEPS = len(TASKS), 10
PARAMS = {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4), "scale": jnp.zeros(())}
made = functools.cache(lr_annealing)


def sequence():
    """Task gradients like the parameters, and who is present: all come and go, two are 0 once."""
    rng = np.random.default_rng(0)
    factors = 10 ** rng.uniform(-3, 3, (STEPS, K))
    factors[2, 0] = factors[6, 1] = 0
    rows = jax.tree.map(
        lambda leaf: np.einsum(
            "sk...,sk->sk...", rng.normal(size=(STEPS, K, *leaf.shape)), factors
        ),
        PARAMS,
    )
    present = rng.uniform(size=(STEPS, K)) < 0.7
    present[:2], present[4] = True, False
    present[2, 0] = present[6, 1] = True
    return rows, present


@functools.cache
def program(weighting):
    """All steps in one program: the weights at each."""

    @jax.jit
    def run(rows, present):
        def step(state, now):
            row, mask = now
            losses = dict.fromkeys(TASKS, jnp.zeros((), row["bias"].dtype))
            weights, state = weighting.update(
                losses, state, task_gradients=row, mask=dict(zip(TASKS, mask, strict=True))
            )
            return state, jnp.stack(list(weights.values()))

        dtype = rows["bias"].dtype
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), PARAMS)
        losses = dict.fromkeys(TASKS, jnp.zeros((), dtype))
        return jax.lax.scan(step, weighting.init(losses, params=params), (rows, present))[1]

    return run


def definition(rows, present, reference, alpha, statistic):
    flat = np.concatenate([leaf.reshape(STEPS, K, -1) for leaf in rows.values()], axis=2)
    weights, history = np.ones(K), []
    for row, here in zip(np.abs(flat), present, strict=True):
        size = getattr(np, statistic)(row[reference])
        for k in np.flatnonzero(here):
            if k != reference and here[reference] and size > 0 and row[k].any():
                weights[k] = (1 - alpha) * weights[k] + alpha * size / np.mean(row[k])
        history.append(np.where(here, weights, 0))
    return np.array(history)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("statistic", ["max", "mean"])
@pytest.mark.parametrize("reference", ["equation", None])
def test_definition(reference, statistic):
    rows, present = sequence()
    weights = program(made(reference, 0.1, statistic))(rows, present)
    position = 0 if reference is None else 1
    expected = definition(rows, present, position, 0.1, statistic)
    np.testing.assert_allclose(weights, expected, rtol=1e-9)
    np.testing.assert_array_equal(np.asarray(weights)[present[:, position], position], 1)


@pytest.mark.usefixtures("x64")
def test_the_losses_are_those_without_weights():
    """So a weight comes to rest at the ratio; in the authors' code, at its root."""
    rows, _ = sequence()
    steady = jax.tree.map(lambda leaf: np.broadcast_to(leaf[:1], leaf.shape), rows)
    everybody = np.ones((STEPS, K), bool)
    weights = np.asarray(program(made("equation", 0.9))(steady, everybody))
    flat = np.concatenate([np.abs(leaf[0]).reshape(K, -1) for leaf in rows.values()], axis=1)
    ratios = flat[1].max() / flat.mean(axis=1)
    np.testing.assert_allclose(weights[-1, [0, 2]], ratios[[0, 2]], rtol=1e-6)


def test_in_a_train_step_every_few_steps():
    """The gradients are those of the network; the weights are held in between."""

    def losses_fn(params, x):
        return {
            "data": jnp.mean((x @ params["w"] - 1) ** 2),
            "equation": 10 * jnp.mean(jnp.sin(x @ params["w"] + params["b"]) ** 2),
        }

    params = {"w": jnp.array([0.3, -0.7]), "b": jnp.array(0.1)}
    x = jax.random.normal(jax.random.key(0), (16, 2))
    weighting = mtl_jax.every(lr_annealing("equation", alpha=0.5), 2)
    gradient = mtl_jax.value_and_grad(losses_fn, weighting)
    update, state = jax.jit(gradient), gradient.init(params, x)
    expected = 1.0
    for step in range(4):
        J = jax.tree.map(np.abs, jax.jacrev(losses_fn)(params, x))
        mean = np.concatenate([np.ravel(leaf) for leaf in J["data"].values()]).mean()
        largest = max(leaf.max() for leaf in J["equation"].values())
        if step % 2 == 0:
            expected = 0.5 * expected + 0.5 * largest / mean
        value, found, state = update(params, state, x)
        assert value.finite
        np.testing.assert_allclose(value.weights["data"], expected, rtol=1e-5)
        assert value.weights["equation"] == 1
        params = jax.tree.map(lambda leaf, g: leaf - 0.1 * g, params, found)


def test_errors():
    for alpha in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"lr_annealing: `alpha` must be in \(0, 1\]"):
            lr_annealing("a", alpha)
    with pytest.raises(ValueError, match="`statistic` must be 'max' or 'mean'"):
        lr_annealing("a", statistic="median")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="`reference` must be a task's name"):
        lr_annealing(0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="`reference` must be one of a, b; got 'c'"):
        lr_annealing("c").init({"a": 1.0, "b": 1.0}, params=jnp.zeros(2))
