"""M-ConFIG: the authors' algorithm, the turns of the tasks, and what a step costs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_jax
from mtl_jax import conflict_free_momentum

K, P = 3, 6
TASKS = ("a", "b", "c")


def config(rows):
    """ConFIG, by the pseudoinverse."""
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    direction = np.linalg.pinv(units) @ np.ones(len(rows))
    direction /= np.linalg.norm(direction)
    return np.sum(rows @ direction) * direction


def authors_updates(steps, b1, b2):
    """The directions of the authors' code for ``[(indices, gradients), ...]``, in float64.

    conflictfree 0.1.8, `PseudoMomentumOperator`: its first step is here for all tasks, since it
    does not move before each has had a turn.
    """
    momenta, counts = np.zeros((K, P)), np.zeros(K)
    second, last, found = np.zeros(P), np.zeros(P), []
    for t, (indices, gradients) in enumerate(steps, start=1):
        for k, gradient in zip(indices, gradients, strict=True):
            counts[k] += 1
            momenta[k] = b1 * momenta[k] + (1 - b1) * gradient
        direction = config(momenta / (1 - b1**counts)[:, None])
        momentum = direction * (1 - b1**t)
        pseudo = (momentum - b1 * last) / (1 - b1)
        last = momentum
        second = b2 * second + (1 - b2) * pseudo**2
        found.append(direction / (np.sqrt(second / (1 - b2**t)) + 1e-8))
    return np.array(found)


@pytest.mark.usefixtures("x64")
def test_with_adam_it_is_the_authors_algorithm():
    rng, b1, b2 = np.random.default_rng(0), 0.9, 0.999
    steps = [(range(K), rng.normal(size=(K, P)))]
    steps += [([t % K], rng.normal(size=(1, P)) + 0.5) for t in range(1, 25)]
    aggregator, optimizer = conflict_free_momentum(b1), optax.adam(1.0, b1, b2, eps=1e-8)
    losses = dict.fromkeys(TASKS, 1.0)
    state, opt_state = aggregator.init(np.zeros(P), losses), optimizer.init(np.zeros(P))
    found = []
    for indices, gradients in steps:
        rows, present = np.full((K, P), np.nan), np.isin(np.arange(K), list(indices))
        rows[present] = gradients
        mask = dict(zip(TASKS, present, strict=True))
        pseudo, state = aggregator.update(rows, state, mask=mask)
        update, opt_state = optimizer.update(pseudo, opt_state)
        found.append(-update)
    np.testing.assert_allclose(found, authors_updates(steps, b1, b2), rtol=1e-8)


def test_the_scale_does_not_matter():
    """From 1e-12 to 1e12; a power of two rounds nothing."""
    rng, aggregator = np.random.default_rng(1), conflict_free_momentum()
    gradients = rng.normal(size=(4, K, P)).astype(np.float32)
    gradients[:, 1] *= 1e-3

    def run(scale):
        state, found = aggregator.init(np.zeros(P, np.float32), (1.0,) * K), []
        for rows in gradients:
            direction, state = aggregator.update(rows * np.float32(scale), state)
            found.append(direction)
        return np.array(found)

    expected = run(1.0)
    for exponent in (-40, 40):
        np.testing.assert_array_equal(run(2.0**exponent), expected * 2.0**exponent)


def losses_fn(params, scale):
    x, y = params["x"], params["y"]
    return {
        "a": scale * jnp.sum((x - 1) ** 2),
        "b": jnp.sum((x + y) ** 2),
        "c": jnp.sum(jnp.cosh(y)),
    }


PARAMS = {"x": jnp.array([0.3, -0.4]), "y": jnp.array([1.0, 0.2])}


def mask_of(*present):
    return {task: np.bool_(task in present) for task in TASKS}


@pytest.mark.parametrize("diagnostics", [False, True])
def test_present_tasks_take_turns(diagnostics):
    """Who has had fewer steps is next; the step is that task's alone, here with decay 0."""
    gradient = mtl_jax.value_and_grad(
        losses_fn, conflict_free_momentum(0.0), diagnostics=diagnostics
    )
    update, state = jax.jit(gradient), gradient.init(PARAMS, 1.0)
    jacobian, seen = jax.jacrev(losses_fn)(PARAMS, 1.0), []
    for mask in [mask_of(*TASKS)] * 4 + [mask_of("c"), mask_of("a", "b"), mask_of()]:
        value, found, state = update(PARAMS, state, 1.0, mask=mask)
        assert value.finite
        seen.append("".join(task for task in TASKS if value.present[task]))
        assert (value.diagnostics is not None) == diagnostics
        if len(seen) == 1:  # the first direction is the first gradient
            np.testing.assert_allclose(found["x"], jacobian["a"]["x"], rtol=1e-5)
    assert seen == ["a", "b", "c", "a", "c", "b", ""]
    np.testing.assert_array_equal(state.steps, [2, 2, 2])
    np.testing.assert_allclose(state.inner.momenta["y"][1], jacobian["b"]["y"], rtol=1e-5)


def test_a_task_without_a_gradient_has_its_turn():
    gradient = mtl_jax.value_and_grad(losses_fn, conflict_free_momentum())
    update, state = jax.jit(gradient), gradient.init(PARAMS, 0.0)
    for _ in range(3):
        value, _, state = update(PARAMS, state, 0.0)
        assert value.finite
    np.testing.assert_array_equal(state.steps, 1)


def test_a_step_takes_one_backward_pass():
    """Many layers, so that each backward pass shows in the program's operations."""

    def many(params, x):
        for _ in range(8):
            x = jnp.tanh(x @ params)
        return tuple(jnp.mean(x[:, k] ** 2) for k in range(8))

    params, x = jnp.eye(8) / 2, jnp.ones((64, 8))

    def operations(made):
        gradient = mtl_jax.value_and_grad(many, made, rows="map")
        state = jax.eval_shape(gradient.init, params, x)
        program = jax.make_jaxpr(lambda state: gradient(params, state, x))(state)
        return str(program).count("tanh"), str(program).count("scan")

    plain, in_turn = operations(mtl_jax.equal()), operations(conflict_free_momentum())
    assert in_turn[0] == plain[0]
    assert operations(mtl_jax.trimmed_mean(1))[1] > 0  # the loop over the K backward passes


def test_parameters_that_are_not_shared_have_the_gradient_of_the_turn():
    gradient = mtl_jax.value_and_grad(
        losses_fn, conflict_free_momentum(), shared=lambda path: path == "x"
    )
    update, state = jax.jit(gradient), gradient.init(PARAMS, 1.0)
    jacobian = jax.jacrev(losses_fn)(PARAMS, 1.0)
    for task in TASKS:
        _, found, state = update(PARAMS, state, 1.0)
        np.testing.assert_allclose(found["y"], jacobian[task]["y"], rtol=1e-6)
    assert jax.tree.map(jnp.shape, state.inner.momenta) == {"x": (3, 2), "y": None}


def test_errors():
    with pytest.raises(ValueError, match=r"conflict_free_momentum: `decay` must be in \[0, 1\)"):
        conflict_free_momentum(1.0)
    with pytest.raises(TypeError, match="one_at_a_time"):
        mtl_jax.rows_aggregator(lambda *_: None, one_at_a_time=1)  # pyright: ignore
    gradient = mtl_jax.value_and_grad(losses_fn, conflict_free_momentum())
    other = gradient.init(PARAMS, 1.0)._replace(
        tasks=conflict_free_momentum().init(PARAMS, (1.0, 1.0)).tasks
    )
    with pytest.raises(ValueError, match="initialised for 2 tasks"):
        gradient(PARAMS, other, 1.0)
