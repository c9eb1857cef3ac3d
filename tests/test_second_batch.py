"""A second batch: what is asked of it is found exactly, in every way; and the train step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from second_batches import TASKS, losses_fn, vector
from trees import assert_trees_close

import mtl_jax
from mtl_jax import Signal

PARAMS = {"w": np.float32([[0.5, -1.0], [0.3, 0.8]]), "v": np.float32([1.0, -0.7])}
FIRST = np.float32([[0.2, -0.4], [1.0, 0.3]])
SECOND = np.float32([[0.9, 0.1], [-0.5, 0.6]])
COMBINATIONS = np.float32([[1.0, 0.0, 2.0], [0.5, -1.0, 0.0]])
STEP = np.float32([0.1, 0.2, 0.3])


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@jax.jit
def rows_of(params, x):
    rows = jax.jacrev(losses_fn)(params, x)
    return jnp.stack(
        [jnp.concatenate(list(map(jnp.ravel, jax.tree.leaves(rows[t])))) for t in TASKS]
    )


def showing(step, **settings):
    """Weights that are the products with two gradients on the second batch, added up."""

    def directions(state, present):
        return jnp.asarray(COMBINATIONS), None if step is None else jnp.asarray(step)

    def update(losses, state, present, steps, products):
        assert products.shape == (3, 2)
        return jnp.sum(products, axis=1), state

    return mtl_jax.vector_weighting(
        update, needs=Signal.SECOND_BATCH, directions=directions, **settings
    )


@functools.cache
def gradient_of(step=True, rows="auto", shared=None, **settings):
    weighting = showing(STEP if step else None)
    return mtl_jax.value_and_grad(losses_fn, weighting, rows=rows, shared=shared, **settings)


def call(gradient, *args, **settings):
    return jax.jit(gradient.update)(*args, **settings)


def products(step, part=slice(None), present=(1, 1, 1)):
    """By the definition."""
    present = np.float32(present)
    first, start = rows_of(PARAMS, FIRST), PARAMS
    if step is not None:
        move = (step * present) @ first
        start = {"v": PARAMS["v"] - move[:2], "w": PARAMS["w"] - move[2:].reshape(2, 2)}
    directions = (COMBINATIONS * present) @ rows_of(start, SECOND)
    return (
        np.asarray(first) @ directions.T if part is None else first[:, part] @ directions[:, part].T
    )


@pytest.mark.parametrize("rows", ["auto", "low_memory", "map", "vmap", "unrolled", 2])
@pytest.mark.parametrize("step", [True, False])
def test_products_in_every_way(rows, step):
    gradient = gradient_of(step, rows)
    value, found, _ = call(gradient, PARAMS, gradient.init(PARAMS, FIRST), FIRST, second=(SECOND,))
    weights = products(STEP if step else None).sum(axis=1)
    np.testing.assert_allclose(vector(value.weights), weights, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(flat(found), weights @ rows_of(PARAMS, FIRST), rtol=1e-4)
    assert value.finite
    assert value.gramian is None


def test_what_is_shared_enters_the_products_and_the_step_moves_everything():
    gradient = gradient_of(shared=lambda path: path == "v", diagnostics=True)
    value, found, _ = call(gradient, PARAMS, gradient.init(PARAMS, FIRST), FIRST, second=(SECOND,))
    weights = products(STEP, slice(0, 2)).sum(axis=1)
    np.testing.assert_allclose(vector(value.weights), weights, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(flat(found), weights @ rows_of(PARAMS, FIRST), rtol=1e-4)
    rows = rows_of(PARAMS, FIRST)[:, :2]
    np.testing.assert_allclose(value.gramian, rows @ rows.T, rtol=1e-4, atol=1e-6)
    assert value.measured
    assert value.diagnostics.norms.shape == (3,)


def test_a_mask_is_for_both_batches():
    gradient = gradient_of()
    mask = {"a": jnp.asarray(True), "b": jnp.asarray(True), "c": jnp.asarray(False)}
    value, _, state = call(
        gradient, PARAMS, gradient.init(PARAMS, FIRST), FIRST, second=(SECOND,), mask=mask
    )
    weights = products(STEP, present=(1, 1, 0)).sum(axis=1)[:2]
    np.testing.assert_allclose(vector(value.weights), [*weights, 0], rtol=1e-4, atol=1e-6)
    assert state.steps.tolist() == [1, 1, 0]


def test_a_backward_pass_of_ones_own_needs_rows():
    @jax.custom_vjp
    def square(x):
        return x**2

    square.defvjp(lambda x: (x**2, x), lambda x, g: (2 * x * g,))

    def custom_fn(params, x):
        return {"a": jnp.sum(square(params * x)), "b": jnp.sum(jnp.cosh(params - x))}

    params, first, second = jnp.array([1.0, 2.0]), jnp.array([0.5, -1.0]), jnp.array([0.3, 0.2])
    weighting = mtl_jax.modo(0.1)
    gradient = mtl_jax.value_and_grad(custom_fn, weighting)
    state = gradient.init(params, first)
    value, _, _ = gradient(params, state, first, second=(second,))
    in_low_memory = mtl_jax.value_and_grad(custom_fn, weighting, rows="low_memory")
    with pytest.raises(TypeError, match="rows='low_memory' needs.*such as rows='map'"):
        in_low_memory(params, state, first, second=(second,))
    rows = [jax.jacrev(custom_fn)(params, x) for x in (first, second)]
    one, other = (np.stack([row["a"], row["b"]]) for row in rows)
    point = np.full(2, 0.5) - 0.1 * (one @ (other.T @ np.full(2, 0.5)) + 0.05)
    np.testing.assert_allclose(
        value.weights["a"] - value.weights["b"],
        np.clip(point[0] - point[1], -1, 1),
        rtol=1e-4,
    )


def test_wrappers_pass_it_on_and_a_step_that_is_not_due_does_not_read_it():
    plain = gradient_of()
    value, _, _ = call(plain, PARAMS, plain.init(PARAMS, FIRST), FIRST, second=(SECOND,))
    weights, inside = vector(value.weights), showing(STEP)
    changed = mtl_jax.clipped(mtl_jax.ema(mtl_jax.after_warmup(inside, 1), 0.0), -1e9)
    for wrapped, before in ((mtl_jax.every(inside, 2), None), (changed, np.ones(3))):
        gradient = mtl_jax.value_and_grad(losses_fn, wrapped)
        program, state = jax.jit(gradient.update), gradient.init(PARAMS, FIRST)
        if before is not None:  # the warm-up, in which nothing is read
            bad = np.full_like(SECOND, np.nan)
            value, _, state = program(PARAMS, state, FIRST, second=(bad,))
            assert value.finite
            np.testing.assert_array_equal(vector(value.weights), before)
        value, _, state = program(PARAMS, state, FIRST, second=(SECOND,))
        np.testing.assert_allclose(vector(value.weights), weights, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="log_losses: this weighting reads gradients"):
        mtl_jax.log_losses(inside)


def test_a_second_batch_that_is_not_finite_skips_the_step():
    step = mtl_jax.make_train_step(
        mtl_jax.value_and_grad(losses_fn, mtl_jax.sdmgrad()), optax.sgd(0.1), donate=False
    )
    state = step.init(PARAMS, FIRST)
    after, value = step(state, FIRST, second=(SECOND,))
    assert value.finite
    assert after.weighting_state.steps.tolist() == [1, 1, 1]
    assert float(jnp.abs(after.params["v"] - state.params["v"]).max()) > 0
    skipped, value = step(after, FIRST, second=(SECOND * np.float32(np.nan),))
    assert not value.finite
    assert skipped.skipped == 1
    assert_trees_close(skipped.params, after.params, rtol=0, atol=0)
    assert_trees_close(skipped.weighting_state, after.weighting_state, rtol=0, atol=0)


def test_a_task_without_loss_and_without_products_is_left_out():
    """One whose gradient is orthogonal to the second batch's has no products, and takes part."""

    def separate_fn(params, x):
        return {
            "a": jnp.sum((params["a"] - x) ** 2),
            "apart": 1 + jnp.sum(params["apart"] ** 2),
            "holds": jnp.sum(jax.nn.relu(-params["a"] - 9) ** 2),
        }

    params = {"a": jnp.array([1.0, 2.0]), "apart": jnp.array([3.0])}
    primary = {"a": True, "apart": False, "holds": False}
    weighting = mtl_jax.auto_lambda(optax.sgd(0.1), 0.1, primary)
    gradient = mtl_jax.value_and_grad(separate_fn, weighting)
    state = gradient.init(params, jnp.zeros(2))
    value, found, _ = call(gradient, params, state, jnp.zeros(2), second=(jnp.ones(2),))
    assert value.weights["apart"] == np.float32(0.1)
    assert value.weights["a"] > 0.1
    assert (value.weights["holds"], bool(value.present["holds"])) == (0, False)
    np.testing.assert_allclose(found["apart"], 0.6, rtol=1e-5)
    theory = mtl_jax.value_and_grad(separate_fn, weighting, leave_out_zero=False)
    value, _, _ = call(theory, params, state, jnp.zeros(2), second=(jnp.ones(2),))
    assert value.present["holds"]


def test_a_train_step_gives_the_model_state_and_a_key_of_its_own_to_the_second_batch():
    seen = []

    def random_fn(params, model_state, key, x):
        noise = jax.random.normal(key, (2,))
        jax.debug.callback(lambda *one: seen.append(one), x[0], noise[0], model_state)
        return {
            "a": jnp.sum((params - x) ** 2),
            "b": jnp.sum(jnp.cosh(params + noise)),
        }, model_state + 1

    gradient = mtl_jax.value_and_grad(random_fn, mtl_jax.modo(0.01), has_aux=True)
    step = mtl_jax.make_train_step(gradient, optax.sgd(0.01))
    key, x = jax.random.key(0), jnp.array([1.0, 2.0])
    state = step.init(jnp.ones(2), x, model_state=jnp.zeros(()), rng=key)
    for _ in range(2):
        state, value = step(state, x, second=(x + 10,))
        assert value.finite
    jax.effects_barrier()
    assert state.model_state == 2
    calls = {tuple(float(part) for part in one) for one in seen}
    assert {(where, model) for where, _, model in calls} == {(1, 0), (11, 0), (1, 1), (11, 1)}
    assert len({noise for _, noise, _ in calls}) == 4


def test_errors_say_what_to_pass():
    gradient = gradient_of()
    state = gradient.init(PARAMS, FIRST)
    with pytest.raises(ValueError, match=r"reads a second batch: pass .* second=\(batch,\)"):
        gradient(PARAMS, state, FIRST)
    with pytest.raises(TypeError, match=r"the tuple of the further arguments.*got ndarray"):
        gradient(PARAMS, state, FIRST, second=SECOND)
    for other in (mtl_jax.equal(), mtl_jax.graddrop()):
        unread = mtl_jax.value_and_grad(losses_fn, other)
        own = unread.init(PARAMS, FIRST, key=jax.random.key(0))
        with pytest.raises(ValueError, match="`second` is a second batch, which this weighting"):
            unread(PARAMS, own, FIRST, second=(SECOND,))
    with pytest.raises(TypeError, match="by the parameters: use it through"):
        mtl_jax.representation_value_and_grad(len, len, mtl_jax.modo(), tasks=("a",))
    with pytest.raises(ValueError, match="not for a weighting that reads a second batch"):
        mtl_jax.value_and_grad(losses_fn, mtl_jax.modo(), groups=lambda path: path)
    with pytest.raises(ValueError, match="`directions` says which"):
        mtl_jax.vector_weighting(lambda *_: None, needs=Signal.SECOND_BATCH)
    with pytest.raises(ValueError, match="`directions` says which"):
        mtl_jax.vector_weighting(lambda *_: None, directions=lambda *_: None)


def test_errors_of_products():
    losses = dict.fromkeys(TASKS, np.float32(1))
    weighting = mtl_jax.modo()
    state = weighting.init(losses)
    with pytest.raises(ValueError, match="reads the products.*pass `products`"):
        weighting.update(losses, state)
    with pytest.raises(ValueError, match=r"have the tasks \(3\) as the first of two axes"):
        weighting.update(losses, state, products=np.ones(3, np.float32))
    with pytest.raises(ValueError, match="asks for 1 gradients.*products are with 3"):
        weighting.update(losses, state, products=np.ones((3, 3), np.float32))
