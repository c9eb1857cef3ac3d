"""Balanced gradient norms: the definition, and the codes that it is published in."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtl_jax
from mtl_jax import conflict_free, norm_balance

TASKS = ("a", "b", "c", "d")
K, P, STEPS = len(TASKS), 5, 12
made = functools.cache(norm_balance)


def sequence():
    """Task gradients, losses, and who is present: all come and go, two gradients are once 0."""
    rng = np.random.default_rng(0)
    J = rng.normal(size=(STEPS, K, P)) * 10 ** rng.uniform(-3, 3, (STEPS, K, 1))
    J[3, 1] = J[7, 2] = 0
    present = rng.uniform(size=(STEPS, K)) < 0.7
    present[:2], present[5] = True, False
    present[3, 1] = present[7, 2] = True
    return J, rng.uniform(0.1, 3, (STEPS, K)), present


@functools.cache
def program(weighting, number=K):
    """All steps in one program: the weights at each."""

    @jax.jit
    def run(gramians, losses, present):
        def step(state, now):
            gramian, loss, mask = now
            weights, state = weighting.update(
                dict(zip(TASKS, loss, strict=False)),
                state,
                gramian=gramian,
                mask=dict(zip(TASKS, mask, strict=False)),
            )
            return state, jnp.stack([weights[task] for task in TASKS[:number]])

        state = weighting.init(dict.fromkeys(TASKS[:number], losses[0, 0]))
        return jax.lax.scan(step, state, (gramians, losses, present))[1]

    return run


def run(weighting, J, losses, present):
    gramians = J @ np.swapaxes(J, 1, 2)
    return np.asarray(program(weighting, losses.shape[1])(gramians, losses, present))


def definition(J, losses, present, momentum, norm_of, reference, due=lambda step: True):
    weights, history = np.ones(losses.shape[1]), []
    for step, (rows, loss, here) in enumerate(zip(J, losses, present, strict=True)):
        norms = np.linalg.norm(rows, axis=1)
        if norm_of == "root_loss":
            norms = norms / (2 * np.sqrt(loss))
        if reference is None:
            level = norms[here].mean() if here.any() else 0
        else:
            level = norms[reference] if here[reference] else 0
        for k in np.flatnonzero(here & (norms > 0)):
            if level > 0 and due(step):
                weights[k] = momentum * weights[k] + (1 - momentum) * level / norms[k]
        history.append(np.where(here, weights, 0))
    return np.array(history)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("norm_of", ["loss", "root_loss"])
@pytest.mark.parametrize("reference", [None, "c"])
def test_definition(momentum, norm_of, reference):
    """Over steps in which tasks are absent or have no gradient, and one with nobody."""
    J, losses, present = sequence()
    position = None if reference is None else TASKS.index(reference)
    weights = run(made(momentum, norm_of, reference), J, losses, present)
    expected = definition(J, losses, present, momentum, norm_of, position)
    np.testing.assert_allclose(weights, expected, rtol=1e-9)
    if reference and momentum == 0:
        np.testing.assert_allclose(weights[present[:, 2], 2], 1)


@pytest.mark.usefixtures("x64")
def test_the_average_is_that_of_the_measurements():
    J, losses, _ = sequence()
    everybody = np.ones((STEPS, K), bool)
    weights = run(mtl_jax.every(norm_balance(), 4), J, losses, everybody)
    expected = definition(J, losses, everybody, 0.9, "loss", None, lambda step: step % 4 == 0)
    np.testing.assert_allclose(weights, expected, rtol=1e-9)
    assert np.ptp(weights[4:8], axis=0).max() == 0
    assert np.all(weights[4] != weights[3])


@pytest.mark.usefixtures("x64")
def test_two_tasks_have_the_direction_of_conflict_free():
    J, losses, _ = sequence()
    J, losses, everybody = J[:, ::3], losses[:, ::3], np.ones((STEPS, 2), bool)  # none is 0
    directions = []
    for weighting in (made(0.0), conflict_free()):
        weights = run(weighting, J, losses, everybody)
        found = np.einsum("sk,skp->sp", weights, J)
        directions.append(found / np.linalg.norm(found, axis=1, keepdims=True))
    np.testing.assert_allclose(*directions, atol=1e-9)


def test_vqgan():
    """The adversarial weight is ||grad L_rec|| / ||grad L_adv|| in the last layer, at most 1e4."""

    def losses_fn(params, x):
        z = jnp.tanh(x @ params["codebook"])
        image = z @ params["last"]
        codebook = jnp.mean((z - 0.5) ** 2)
        return {
            "reconstruction": jnp.mean(jnp.abs(image - x)) + codebook,
            "adversarial": -params["scale"] * jnp.mean(image),
        }

    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "codebook": jax.random.normal(keys[0], (3, 4)),
        "last": jax.random.normal(keys[1], (4, 3)),
        "scale": jnp.float32(0.01),
    }
    x = jax.random.normal(keys[2], (8, 3))
    weighting = mtl_jax.clipped(norm_balance(0.0, reference="reconstruction"), 0.0, 1e4)
    gradient = mtl_jax.value_and_grad(losses_fn, weighting, shared=lambda path: path == "last")
    update = jax.jit(gradient)
    jacobian = jax.jit(jax.jacrev(losses_fn))
    for scale in (0.01, 1e-7):
        params["scale"] = jnp.float32(scale)
        value, found, _ = update(params, gradient.init(params, x), x)
        rows = jacobian(params, x)
        norms = {task: jnp.linalg.norm(row["last"]) for task, row in rows.items()}
        weight = min(float(norms["reconstruction"] / norms["adversarial"]), 1e4)
        assert float(value.weights["reconstruction"]) == 1
        np.testing.assert_allclose(value.weights["adversarial"], weight, rtol=1e-5)
        # The whole network has the gradient of the weighted sum.
        both = (rows[task]["codebook"] for task in ("reconstruction", "adversarial"))
        expected = next(both) + weight * next(both)
        np.testing.assert_allclose(found["codebook"], expected, rtol=1e-4, atol=1e-6)
    assert weight == 1e4


def test_losses_outside_the_domain():
    """The root has no gradient at 0; a task without a gradient has no need of one."""
    weighting = made(0.9, "root_loss")
    assert weighting.method.positive_losses
    assert not made().method.positive_losses
    update = jax.jit(weighting.update)
    state = weighting.init((1.0, 1.0))
    for loss in (0.0, -1.0):
        weights, after = update((loss, 1.0), state, gramian=jnp.eye(2))
        assert np.all(np.isnan(weights))
        np.testing.assert_array_equal(after.steps, 0)
        weights, _ = update((loss, 1.0), state, gramian=jnp.diag(jnp.array([0.0, 4.0])))
        np.testing.assert_allclose(weights, [1, 0.9 + 0.1 * 0.5])


def test_a_reference_that_returns_in_another_place():
    """carry_over tells tasks by their names, the reference too."""
    weighting = norm_balance(0.5, reference="b")
    state = weighting.init({"b": 1.0, "c": 1.0})
    _, state = weighting.update({"b": 1.0, "c": 1.0}, state, gramian=jnp.diag(jnp.array([4.0, 1])))
    losses = {"a": 1.0, "b": 1.0, "c": 1.0}
    state = mtl_jax.carry_over(state, weighting.init(losses))
    np.testing.assert_allclose(state.inner.weights, [1, 1, 1.5])
    weights, _ = weighting.update(losses, state, gramian=jnp.diag(jnp.array([1.0, 9.0, 1.0])))
    np.testing.assert_allclose(list(weights.values()), [2, 1, 2.25], rtol=1e-6)


def test_vectors_of_losses():
    weighting = norm_balance(0.0, reference="residuals/1")
    losses = {"data": np.float32(1), "residuals": np.ones(2, np.float32)}
    state = weighting.init(losses)
    weights, _ = weighting.update(losses, state, gramian=jnp.diag(jnp.array([1.0, 4.0, 9.0])))
    np.testing.assert_allclose(weights["data"], 3)
    np.testing.assert_allclose(weights["residuals"], [1.5, 1])


def test_errors():
    for momentum in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"`momentum` must be in \[0, 1\)"):
            norm_balance(momentum)
    with pytest.raises(ValueError, match="`norm_of` must be 'loss' or 'root_loss'"):
        norm_balance(norm_of="square")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="`reference` must be a task's name"):
        norm_balance(reference=0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="`reference` must be one of a, b; got 'c'"):
        norm_balance(reference="c").init({"a": 1.0, "b": 1.0})
