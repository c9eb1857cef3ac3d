"""What every aggregator promises, checked on each of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees
from aggregator_methods import METHODS, READS_LOSSES, WITHOUT_EPS, made
from methods import KEY
from trees import assert_trees_equal

import mtl_jax

TASKS = ("a", "b", "c", "d")
PARAMS = {"layer": {"kernel": jnp.zeros((3, 2)), "bias": None}, "scale": jnp.zeros(())}
each_method = pytest.mark.parametrize("name", METHODS)


@functools.cache
def jitted(name):
    """The update in a step of its own that donates the state, and a list of its traces."""
    traces = []

    @functools.partial(jax.jit, donate_argnums=1)
    def update(rows, state, losses, mask):
        traces.append(name)
        return made(name).update(rows, state, losses=losses, mask=mask)

    return update, traces


def losses_at(step, dtype=jnp.float32):
    return {task: jnp.asarray(1.0 + k + 0.3 * step, dtype) for k, task in enumerate(TASKS)}


def gradients_at(step, dtype=jnp.float32):
    """Gradients of every task, like the parameters with the tasks as leading axis."""
    random = np.random.default_rng(step)
    return jax.tree.map(
        lambda leaf: jnp.asarray(random.normal(size=(len(TASKS), *leaf.shape)), dtype), PARAMS
    )


def scaled(rows, factor):
    """The rows, each multiplied by its factor."""
    return jax.tree.map(
        lambda leaf: leaf * np.reshape(factor, (-1,) + (1,) * (leaf.ndim - 1)), rows
    )


def only(rows, *tasks):
    return jax.tree.map(lambda leaf: leaf[jnp.array(tasks)], rows)


def mask_of(*present):
    return {task: np.bool_(task in present) for task in TASKS}


EVERYBODY = mask_of(*TASKS)


def run(name, steps, *, mask=EVERYBODY, update=None):
    """The gradients of the first steps and the state after them; there is always a mask."""
    aggregator = made(name)
    update = update or aggregator.update
    state, history = aggregator.init(PARAMS, losses_at(0), key=KEY), []
    for step in range(steps):
        gradient, state = update(gradients_at(step), state, losses=losses_at(step), mask=mask)
        history.append(gradient)
    return history, state


def assert_trees_close(actual, expected, rtol=1e-5, atol=1e-6):
    trees.assert_trees_close(actual, expected, rtol, atol)


def is_finite(tree):
    return all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(tree))


def is_nan(tree):
    return all(np.all(np.isnan(leaf)) for leaf in jax.tree.leaves(tree))


@each_method
def test_the_gradient_is_like_the_parameters(name):
    history, _ = run(name, 3)
    for gradient in history:
        assert jax.tree.map(jnp.shape, gradient) == jax.tree.map(jnp.shape, PARAMS)
        assert is_finite(gradient)


@each_method
def test_jit_equals_eager(name):
    update, _ = jitted(name)
    assert_trees_close(run(name, 1, update=functools.partial(call, update)), run(name, 1))


def call(update, rows, state, *, losses, mask):
    return update(rows, state, losses, mask)


@each_method
def test_vmap_over_seeds_equals_one_by_one(name):
    aggregator, update = made(name), made(name).update
    keys = jax.random.split(KEY, 3)
    rows = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(gradients_at(s) for s in range(3)))
    losses = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(losses_at(s) for s in range(3)))
    update_all = jax.jit(jax.vmap(functools.partial(aggregator.update, mask=EVERYBODY)))
    states = jax.vmap(lambda key: aggregator.init(PARAMS, losses_at(0), key=key))(keys)
    for _ in range(2):
        together, states = update_all(rows, states, losses=losses)
    for seed in range(3):
        state = aggregator.init(PARAMS, losses_at(0), key=keys[seed])
        for _ in range(2):
            one, state = update(gradients_at(seed), state, losses=losses_at(seed), mask=EVERYBODY)
        got = jax.tree.map(lambda leaf, seed=seed: leaf[seed], (together, states))
        assert_trees_close(got, (one, state))


@each_method
def test_the_state_can_be_donated_and_the_second_call_does_not_compile(name):
    aggregator, (update, traces) = made(name), jitted(name)
    traced = []
    for _ in range(2):  # a second `init` after a donated step still works
        state = aggregator.init(PARAMS, losses_at(0), key=KEY)
        buffers = [
            leaf.unsafe_buffer_pointer()
            for leaf in jax.tree.leaves(state)
            if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        ]
        assert len(set(buffers)) == len(buffers)
        structure = jax.tree.structure(state)
        for step in range(3):
            _, state = update(gradients_at(step), state, losses_at(step), EVERYBODY)
            traced.append(len(traces))
        assert jax.tree.structure(state) == structure
    assert len({*traced, len(traces)}) == 1
    jax.random.bits(KEY)  # the key that `init` was given is not donated with the state


@each_method
def test_init_reads_only_shapes(name):
    aggregator = made(name)
    shapes = jax.eval_shape(lambda: (PARAMS, losses_at(0)))
    expected = aggregator.init(PARAMS, losses_at(3), key=KEY)
    assert_trees_equal(aggregator.init(*shapes, key=KEY), expected)


@each_method
def test_bfloat16(name):
    """Rows of bfloat16 are combined, and the statistics kept, in float32."""
    aggregator, update = made(name), made(name).update
    rows, losses = gradients_at(0, jnp.bfloat16), losses_at(0, jnp.bfloat16)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    state = before = aggregator.init(params, losses, key=KEY)
    wide_state = aggregator.init(PARAMS, losses_at(0), key=KEY)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (rows, losses))
    for _ in range(2):
        gradient, state = update(rows, state, losses=losses, mask=EVERYBODY)
        expected, wide_state = update(wide[0], wide_state, losses=wide[1], mask=EVERYBODY)
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(state)]
    assert dtypes == [leaf.dtype for leaf in jax.tree.leaves(before)]
    assert dtypes == [leaf.dtype for leaf in jax.tree.leaves(wide_state)]
    assert_trees_close(state, wide_state)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(gradient))
    in_float32 = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gradient)
    assert_trees_close(in_float32, expected, rtol=2.0**-8)


@each_method
def test_strict_dtype_promotion(name):
    aggregator = made(name)
    state = aggregator.init(PARAMS, losses_at(0), key=KEY)
    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(
            lambda rows, state: aggregator.update(rows, state, losses=losses_at(0)),
            gradients_at(0),
            state,
        )


@each_method
def test_no_gradient_flows_through(name):
    aggregator = made(name)
    state = aggregator.init(PARAMS, losses_at(0), key=KEY)

    def total(rows, losses):
        gradient, _ = aggregator.update(rows, state, losses=losses)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(gradient))

    gradients = jax.jit(jax.grad(total, argnums=(0, 1)))(gradients_at(0), losses_at(0))
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradients))


@each_method
@pytest.mark.parametrize("place", ["gradient", "loss"])
def test_what_is_not_finite_leaves_the_state_as_it_was(name, place):
    update = made(name).update
    _, state = run(name, 3)
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        rows, losses = gradients_at(3), losses_at(3)
        if place == "gradient":
            rows = rows | {"scale": rows["scale"].at[1].set(bad)}
        else:
            losses = losses | {"b": jnp.float32(bad)}
        gradient, after = update(rows, state, losses=losses, mask=EVERYBODY)
        assert_trees_equal(after, state)
        assert is_nan(gradient)


@each_method
def test_an_absent_task_is_not_looked_at_and_keeps_its_statistics(name):
    update = made(name).update
    _, state = run(name, 3)
    results = []
    for garbage in (0.5, -3.0, jnp.nan):
        rows = jax.tree.map(lambda leaf, value=garbage: leaf.at[1].set(value), gradients_at(3))
        losses = losses_at(3) | {"b": jnp.float32(garbage)}
        gradient, after = update(rows, state, losses=losses, mask=mask_of("a", "c", "d"))
        assert is_finite(gradient)
        results.append((gradient, after))
        for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
            if new.ndim:
                np.testing.assert_array_equal(new[1], old[1])
    assert_trees_equal(results[1], results[0])
    assert_trees_equal(results[2], results[0])
    assert not np.array_equal(after.steps, state.steps)


@each_method
@pytest.mark.parametrize("present", [(0, 2, 3), (1,)], ids=["three", "one"])
def test_an_absent_task_counts_nowhere(name, present):
    """With tasks absent from the start, the result is what it is without them."""
    masked, _ = run(name, 4, mask=mask_of(*(TASKS[k] for k in present)))
    aggregator = made(name)
    if name == "trimmed_mean" and len(present) == 1:
        aggregator = mtl_jax.trimmed_mean(0)

    def losses_of(step):
        return {TASKS[k]: losses_at(step)[TASKS[k]] for k in present}

    state = aggregator.init(PARAMS, losses_of(0), key=KEY)
    for step, expected in enumerate(masked):
        rows = only(gradients_at(step), *present)
        gradient, state = aggregator.update(rows, state, losses=losses_of(step))
        assert_trees_close(gradient, expected)
        if len(present) == 1 and name not in READS_LOSSES:
            assert_trees_close(gradient, jax.tree.map(lambda leaf: leaf[0], rows))


@each_method
def test_all_absent(name):
    update = made(name).update
    _, state = run(name, 2)
    gradient, after = update(gradients_at(2), state, losses=losses_at(2), mask=mask_of())
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradient))
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        if new.ndim:  # a shared scalar, the key, may move on
            np.testing.assert_array_equal(new, old)
    gradient, _ = update(gradients_at(2), after, losses=losses_at(2), mask=mask_of("b"))
    assert is_finite(gradient)


# lr_annealing measures all against the first.
@pytest.mark.parametrize("name", [name for name in METHODS if name != "lr_annealing"])
def test_permuting_the_tasks_changes_nothing(name):
    aggregator, update = made(name), made(name).update
    order = (2, 0, 3, 1)
    state = permuted_state = aggregator.init(PARAMS, losses_at(0), key=KEY)
    for step in range(4):
        rows, losses = gradients_at(step), losses_at(step)
        permuted_losses = {TASKS[k]: losses[TASKS[j]] for k, j in enumerate(order)}
        gradient, state = update(rows, state, losses=losses, mask=EVERYBODY)
        permuted, permuted_state = update(
            only(rows, *order), permuted_state, losses=permuted_losses, mask=EVERYBODY
        )
        assert_trees_close(permuted, gradient)


@pytest.mark.parametrize("name", [*METHODS, *WITHOUT_EPS])
@pytest.mark.parametrize("one_task", [False, True], ids=["all", "one_task"])
@pytest.mark.parametrize("with_losses", [False, True], ids=["gradients", "losses_too"])
def test_any_scale(name, one_task, with_losses):
    """Nothing is NaN whatever the scale, and though it changes from step to step."""
    aggregator, update = made(name), made(name).update
    state = aggregator.init(PARAMS, losses_at(0), key=KEY)
    for step, scale in enumerate((1e-12, 1e12, 1.0, 0.0, 1e-12, 1e12)):
        factor = np.array([scale] + [1 if one_task else scale] * 3, np.float32)
        losses = losses_at(step)
        if with_losses:
            losses = {task: losses[task] * factor[k] for k, task in enumerate(TASKS)}
        rows = scaled(gradients_at(step), factor)
        gradient, state = update(rows, state, losses=losses, mask=EVERYBODY)
        assert is_finite(gradient), scale
    np.testing.assert_array_equal(state.steps, 6)


@each_method
def test_an_overflow_is_flagged(name):
    """Gradients whose squares overflow float32 give NaN where they are squared, never a 0."""
    aggregator, update = made(name), made(name).update
    state = aggregator.init(PARAMS, losses_at(0), key=KEY)
    rows = scaled(gradients_at(0), np.full(4, 1e25, np.float32))
    gradient, after = update(rows, state, losses=losses_at(0), mask=EVERYBODY)
    if name in ("graddrop", "trimmed_mean", "lr_annealing"):
        assert is_finite(gradient)
    else:
        assert is_nan(gradient)
        assert_trees_equal(after, state)


@pytest.mark.parametrize("name", ["graddrop", "trimmed_mean", "lr_annealing", *WITHOUT_EPS])
def test_the_scale_does_not_matter(name):
    """Gradients (and what DB-MTL takes the logarithm of) that are 2^-40 times as large."""
    aggregator, update = made(name), made(name).update
    small = np.full(4, 2.0**-40, np.float32)
    state = small_state = aggregator.init(PARAMS, losses_at(0), key=KEY)
    for step in range(3):
        rows, losses = gradients_at(step), losses_at(step)
        expected, state = update(rows, state, losses=losses, mask=EVERYBODY)
        if name.startswith("db_mtl"):
            losses = jax.tree.map(lambda leaf: small[0] * leaf, losses)
        rows = scaled(rows, small)
        gradient, small_state = update(rows, small_state, losses=losses, mask=EVERYBODY)
        if not name.startswith(("moco", "db_mtl")):
            gradient = jax.tree.map(lambda leaf: leaf / small[0], gradient)
        assert_trees_close(gradient, expected)


@each_method
def test_losses_must_be_given_where_they_are_read(name):
    aggregator = made(name)
    state = aggregator.init(PARAMS, losses_at(0), key=KEY)
    if name in READS_LOSSES:
        with pytest.raises(ValueError, match="pass `losses`"):
            aggregator.update(gradients_at(0), state)
    else:
        gradient, _ = jax.eval_shape(aggregator.update, gradients_at(0), state)
        assert jax.tree.structure(gradient) == jax.tree.structure(PARAMS)


@each_method
def test_another_number_of_tasks_is_an_error(name):
    aggregator = made(name)
    state = aggregator.init(PARAMS, losses_at(0), key=KEY)
    rows = gradients_at(0)
    with pytest.raises(ValueError, match="gradients of 3 tasks, but 4 losses"):
        aggregator.update(only(rows, 0, 1, 2), state, losses=losses_at(0))
    with pytest.raises(ValueError, match="initialised for 4 tasks"):
        aggregator.update(only(rows, 0, 1), state, losses=(1.0, 2.0))
