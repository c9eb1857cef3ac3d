"""What every loss-based weighting promises, checked on each of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees
from methods import EVERYBODY, KEY, METHODS, RANDOM, TASKS, TOTALS, loss_sequence, made, run
from trees import assert_trees_equal

import mtl_jax

each_method = pytest.mark.parametrize("name", METHODS)
# Those whose tasks are exchangeable: neither the draws nor constant weights nor an order are.
each_symmetric_method = pytest.mark.parametrize(
    "name", [name for name in METHODS if name not in (*RANDOM, "constant", "causal")]
)
OF_ONE = {
    "constant": lambda: mtl_jax.constant({"b": 1.0}),
    "causal": lambda: mtl_jax.causal(["b"]),
}
NOBODY = dict.fromkeys(TASKS, np.False_)
B_ABSENT = EVERYBODY | {"b": np.False_}


def assert_trees_close(actual, expected, rtol=1e-6, atol=1e-7):
    trees.assert_trees_close(actual, expected, rtol, atol)


@functools.cache
def jitted(name):
    """The update in a step of its own that donates the state, and a list of its traces."""
    traces = []

    @functools.partial(jax.jit, donate_argnums=1)
    def update(losses, state, mask=None):
        traces.append(name)
        return made(name).update(losses, state, mask=mask)

    return update, traces


def initial(name, key=KEY):
    return made(name).init(loss_sequence(1)[0], key=key)


@each_method
def test_weights_are_finite_and_named_as_the_losses(name):
    history, _ = run(made(name), loss_sequence())
    for weights in history:
        assert tuple(weights) == TASKS
        assert all(w.shape == () and w.dtype == jnp.float32 for w in weights.values())
        assert all(0 <= w < jnp.inf for w in weights.values())
        if TOTALS[name] is not None:
            np.testing.assert_allclose(sum(weights.values()), TOTALS[name], rtol=1e-5)


@each_method
def test_jit_equals_eager(name):
    sequence = loss_sequence(5)
    compiled = run(made(name), sequence, update=jitted(name)[0])
    assert_trees_close(compiled, run(made(name), sequence), rtol=1e-5, atol=1e-6)


@each_method
def test_vmap_over_seeds_equals_one_by_one(name):
    weighting = made(name)
    keys = jax.random.split(KEY, 3)
    sequences = [loss_sequence(4, seed=seed) for seed in range(3)]
    state = jax.vmap(lambda key: initial(name, key))(keys)
    update = jax.jit(jax.vmap(weighting.update))
    for step in range(4):
        losses = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(s[step] for s in sequences))
        weights, state = update(losses, state)
    for seed in range(3):
        one = initial(name, keys[seed])
        for losses in sequences[seed]:
            expected, one = weighting.update(losses, one, mask=EVERYBODY)
        got = jax.tree.map(lambda leaf, seed=seed: leaf[seed], (weights, state))
        assert_trees_close(got, (expected, one), rtol=1e-5, atol=1e-6)


@each_method
def test_state_survives_flattening_and_donation_and_the_second_call_does_not_compile(name):
    losses, mask = loss_sequence(1)[0], EVERYBODY
    expected, _ = made(name).update(losses, initial(name), mask=mask)
    update, traces = jitted(name)
    traced = []
    for _ in range(2):  # a second `init` after a donated step still works
        state = initial(name)
        buffers = [
            leaf.unsafe_buffer_pointer()
            for leaf in jax.tree.leaves(state)
            if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        ]
        assert len(set(buffers)) == len(buffers)
        leaves, structure = jax.tree.flatten(state)
        weights, new_state = update(losses, jax.tree.unflatten(structure, leaves), mask=mask)
        traced.append(len(traces))
        assert jax.tree.structure(new_state) == structure
        assert_trees_close(weights, expected)
        jax.block_until_ready(update(losses, new_state, mask=mask))
    assert len({*traced, len(traces)}) == 1
    jax.random.bits(KEY)  # the key that `init` was given is not donated with the state


@each_method
def test_init_reads_only_the_structure(name):
    losses = loss_sequence(1)[0]
    shapes = jax.eval_shape(lambda: losses)
    other = jax.tree.map(lambda loss: loss * 3, losses)
    for given in (shapes, other):
        assert_trees_equal(made(name).init(given, key=KEY), initial(name))


@each_method
@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((jnp.bfloat16,) * 3, jnp.float32),
        ((jnp.bfloat16, jnp.float32, jnp.float16), jnp.float32),
        ((jnp.float32, jnp.float64, jnp.bfloat16), jnp.float64),
        ((jnp.float64,) * 3, jnp.float64),
    ],
    ids=["bfloat16", "mixed", "mixed64", "float64"],
)
def test_dtypes(name, dtypes, expected, x64):
    weighting = made(name)
    exact = loss_sequence(3, jnp.float64)
    cast = [
        {task: loss[task].astype(dtype) for task, dtype in zip(TASKS, dtypes, strict=True)}
        for loss in exact
    ]
    state = weighting.init(cast[0], key=KEY)
    dtypes_before = [leaf.dtype for leaf in jax.tree.leaves(state)]
    for dtype in dtypes_before:
        assert not jnp.issubdtype(dtype, jnp.floating) or dtype == expected
        assert not jnp.issubdtype(dtype, jnp.integer) or dtype == jnp.int32
    # Operation by operation: those are compiled once for all methods.
    with jax.disable_jit():
        history, state = run(weighting, cast)
        assert [leaf.dtype for leaf in jax.tree.leaves(state)] == dtypes_before
        assert all(weight.dtype == expected for weight in history[-1].values())
        # The arithmetic is as wide as promised: equal to float64 on the rounded losses.
        rounded = [jax.tree.map(lambda leaf: leaf.astype(jnp.float64), loss) for loss in cast]
        if name not in RANDOM and set(dtypes) != {jnp.float64}:  # there it is the same run
            reference, _ = run(weighting, rounded)
            assert_trees_close(history, reference, rtol=1e-4, atol=1e-5)


@each_symmetric_method
def test_permuting_the_tasks_permutes_the_weights(name):
    order = (2, 0, 1)

    def permuted(tree):
        return {TASKS[k]: tree[TASKS[j]] for k, j in enumerate(order)}

    sequence, update = loss_sequence(6), made(name).update
    state = permuted_state = initial(name)
    for losses in sequence:
        weights, state = update(losses, state, mask=EVERYBODY)
        got, permuted_state = update(permuted(losses), permuted_state, mask=EVERYBODY)
        assert_trees_close(got, permuted(weights), rtol=1e-5)


@each_method
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_loss_that_is_not_finite_leaves_the_state_as_it_was(name, bad):
    weighting = made(name)
    sequence = loss_sequence(5)
    _, state = run(weighting, sequence)
    losses = sequence[0] | {"b": jnp.float32(bad)}
    weights, after = weighting.update(losses, state, mask=EVERYBODY)
    assert_trees_equal(after, state)
    assert all(jnp.isnan(weight) for weight in weights.values())
    if weighting.observe is not None:
        assert_trees_equal(weighting.observe(losses, state, mask=EVERYBODY), state)


@each_method
def test_an_absent_task_has_weight_zero_and_keeps_its_statistics(name):
    weighting = made(name)
    sequence = loss_sequence(5)
    _, state = run(weighting, sequence)
    # Whatever stands in the absent task's place is not looked at.
    results = []
    for garbage in (0.5, -3.0, jnp.nan):
        losses = sequence[0] | {"b": jnp.float32(garbage)}
        weights, after = weighting.update(losses, state, mask=B_ABSENT)
        if weighting.observe is not None:
            after = weighting.observe(losses, after, mask=B_ABSENT)
        results.append((weights, after))
        assert weights["b"] == 0
        assert all(jnp.isfinite(weight) for weight in weights.values())
        for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
            if new.ndim:
                np.testing.assert_array_equal(new[1], old[1])
    assert_trees_equal(results[1], results[0])
    assert_trees_equal(results[2], results[0])
    assert not np.array_equal(after.steps, state.steps)


@each_symmetric_method
def test_an_absent_task_counts_nowhere(name):
    """With one task absent from the start, the others get what they get without it."""
    weighting = made(name)
    sequence = loss_sequence(6)
    masked, _ = run(weighting, sequence, masks=[B_ABSENT] * 6)
    state = weighting.init({"a": 0.0, "c": 0.0})
    for step, losses in enumerate(sequence):
        weights, state = weighting.update({"a": losses["a"], "c": losses["c"]}, state)
        if weighting.observe is not None:
            after = {"a": losses["a"] * 0.9, "c": losses["c"] * (0.9 - 0.1 * 2)}
            state = weighting.observe(after, state)
        got = {"a": masked[step]["a"], "c": masked[step]["c"]}
        assert_trees_close(got, weights, rtol=1e-5)


@each_method
def test_all_absent(name):
    weighting, losses = made(name), loss_sequence(1)[0]
    weights, after = weighting.update(losses, initial(name), mask=NOBODY)
    assert all(weight == 0 for weight in weights.values())
    np.testing.assert_array_equal(after.steps, 0)
    weights, _ = weighting.update(losses, after, mask=EVERYBODY)
    assert all(jnp.isfinite(weight) for weight in weights.values())


@each_method
def test_one_task_alone_is_as_one_task(name):
    weighting = made(name)
    one = OF_ONE[name]() if name in OF_ONE else weighting
    mask = NOBODY | {"b": np.True_}
    state, state_of_one = initial(name), one.init({"b": 0.0}, key=KEY)
    for losses in loss_sequence(6):
        weights, state = weighting.update(losses, state, mask=mask)
        expected, state_of_one = one.update({"b": losses["b"]}, state_of_one)
        assert jnp.isfinite(expected["b"])
        np.testing.assert_allclose(weights["b"], expected["b"], rtol=1e-5)


# optax's optimizers do not pass strict promotion.
@pytest.mark.parametrize(
    "name", [name for name in METHODS if not name.startswith(("uncertainty", "imtl_l", "famo"))]
)
def test_strict_dtype_promotion(name):
    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(made(name).update, loss_sequence(1)[0], initial(name))


@each_method
def test_no_gradient_flows_through_the_weights(name):
    state = initial(name)

    def total(losses):
        weights, new_state = made(name).update(losses, state)
        floats = [leaf for leaf in jax.tree.leaves(new_state) if leaf.dtype == jnp.float32]
        return sum(weights.values()) + sum(jnp.sum(leaf) for leaf in floats)

    # Under jit nothing is left to compute where no gradient flows.
    assert all(gradient == 0 for gradient in jax.jit(jax.grad(total))(loss_sequence(1)[0]).values())
