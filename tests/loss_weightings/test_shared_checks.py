"""What every loss-based weighting promises, checked on each of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trees
from methods import METHODS, RANDOM, SUMS_TO_ONE, SUMS_TO_TASKS, TASKS, loss_sequence, run
from trees import assert_trees_equal

import mtl_jax

each_method = pytest.mark.parametrize("name", METHODS)
# Those whose tasks are exchangeable: neither the draws nor constant weights are.
each_symmetric_method = pytest.mark.parametrize(
    "name", [name for name in METHODS if name not in (*RANDOM, "constant")]
)
KEY = jax.random.key(7)


def assert_trees_close(actual, expected, rtol=1e-6, atol=1e-7):
    trees.assert_trees_close(actual, expected, rtol, atol)


@each_method
def test_weights_are_finite_and_named_as_the_losses(name):
    history, _ = run(METHODS[name](), loss_sequence(), key=KEY)
    for weights in history:
        assert tuple(weights) == TASKS
        assert all(w.shape == () and w.dtype == jnp.float32 for w in weights.values())
        assert all(0 <= w < jnp.inf for w in weights.values())
    if name in SUMS_TO_TASKS + SUMS_TO_ONE:
        total = len(TASKS) if name in SUMS_TO_TASKS else 1
        for weights in history:
            np.testing.assert_allclose(sum(weights.values()), total, rtol=1e-5)


@each_method
def test_jit_equals_eager(name):
    sequence = loss_sequence(5)
    compiled = run(METHODS[name](), sequence, key=KEY)
    eager = run(METHODS[name](), sequence, key=KEY, jit=False)
    assert_trees_close(compiled, eager, rtol=1e-5, atol=1e-6)


@each_method
def test_vmap_over_seeds_equals_one_by_one(name):
    weighting = METHODS[name]()
    keys = jax.random.split(KEY, 3)
    sequences = [loss_sequence(4, seed=seed) for seed in range(3)]
    state = jax.vmap(lambda key: weighting.init(sequences[0][0], key=key))(keys)
    update = jax.jit(jax.vmap(weighting.update))
    for step in range(4):
        losses = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(s[step] for s in sequences))
        weights, state = update(losses, state)
    for seed in range(3):
        one = weighting.init(sequences[seed][0], key=keys[seed])
        for losses in sequences[seed]:
            expected, one = weighting.update(losses, one)
        got = jax.tree.map(lambda leaf, seed=seed: leaf[seed], (weights, state))
        assert_trees_close(got, (expected, one), rtol=1e-5, atol=1e-6)


@each_method
def test_second_call_does_not_compile(name):
    weighting = METHODS[name]()
    traces = 0

    @jax.jit
    def update(losses, state):
        nonlocal traces
        traces += 1
        return weighting.update(losses, state)

    sequence = loss_sequence(3)
    state = weighting.init(sequence[0], key=KEY)
    for losses in sequence:
        _, state = update(losses, state)
    assert traces == 1


@each_method
def test_state_survives_flattening_and_donation(name):
    weighting = METHODS[name]()
    losses = loss_sequence(1)[0]
    expected, _ = weighting.update(losses, weighting.init(losses, key=KEY))
    update = jax.jit(weighting.update, donate_argnums=1)
    for _ in range(2):  # a second `init` after a donated step still works
        state = weighting.init(losses, key=KEY)
        buffers = [
            leaf.unsafe_buffer_pointer()
            for leaf in jax.tree.leaves(state)
            if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        ]
        assert len(set(buffers)) == len(buffers)
        leaves, structure = jax.tree.flatten(state)
        weights, new_state = update(losses, jax.tree.unflatten(structure, leaves))
        assert jax.tree.structure(new_state) == structure
        assert_trees_close(weights, expected)
        jax.block_until_ready(update(losses, new_state))
    jax.random.bits(KEY)  # the key that `init` was given is not donated with the state


@each_method
def test_init_reads_only_the_structure(name):
    losses = loss_sequence(1)[0]
    shapes = jax.eval_shape(lambda: losses)
    assert_trees_equal(METHODS[name]().init(shapes, key=KEY), METHODS[name]().init(losses, key=KEY))
    other = jax.tree.map(lambda loss: loss * 3, losses)
    assert_trees_equal(METHODS[name]().init(other, key=KEY), METHODS[name]().init(losses, key=KEY))


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
    weighting = METHODS[name]()
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
    history, state = run(weighting, cast, key=KEY)
    assert [leaf.dtype for leaf in jax.tree.leaves(state)] == dtypes_before
    assert all(weight.dtype == expected for weight in history[-1].values())
    # The arithmetic is as wide as promised: equal to float64 on the rounded losses.
    rounded = [jax.tree.map(lambda leaf: leaf.astype(jnp.float64), loss) for loss in cast]
    if name not in RANDOM:
        reference, _ = run(weighting, rounded, key=KEY)
        assert_trees_close(history, reference, rtol=1e-4, atol=1e-5)


@each_symmetric_method
def test_permuting_the_tasks_permutes_the_weights(name):
    sequence = [tuple(losses.values()) for losses in loss_sequence(6)]
    order = (2, 0, 1)
    weighting = METHODS[name]()
    update = jax.jit(weighting.update)
    state = weighting.init(sequence[0])
    permuted_state = weighting.init(sequence[0])
    for losses in sequence:
        weights, state = update(losses, state)
        permuted, permuted_state = update(tuple(losses[k] for k in order), permuted_state)
        assert_trees_close(permuted, tuple(weights[k] for k in order), rtol=1e-5)


@each_method
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_loss_that_is_not_finite_leaves_the_state_as_it_was(name, bad):
    weighting = METHODS[name]()
    sequence = loss_sequence(5)
    _, state = run(weighting, sequence, key=KEY)
    weights, after = jax.jit(weighting.update)(sequence[0] | {"b": jnp.float32(bad)}, state)
    assert_trees_equal(after, state)
    assert all(jnp.isnan(weight) for weight in weights.values())
    if weighting.observe is not None:
        assert_trees_equal(weighting.observe(sequence[0] | {"b": jnp.float32(bad)}, state), state)


@each_method
def test_an_absent_task_has_weight_zero_and_keeps_its_statistics(name):
    weighting = METHODS[name]()
    sequence = loss_sequence(5)
    mask = {"a": jnp.array(True), "b": jnp.array(False), "c": jnp.array(True)}
    _, state = run(weighting, sequence, key=KEY)
    # Whatever stands in the absent task's place is not looked at.
    results = []
    for garbage in (0.5, -3.0, jnp.nan):
        losses = sequence[0] | {"b": jnp.float32(garbage)}
        weights, after = weighting.update(losses, state, mask=mask)
        if weighting.observe is not None:
            after = weighting.observe(losses, after, mask=mask)
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
    weighting = METHODS[name]()
    mask = {"a": jnp.array(True), "b": jnp.array(False), "c": jnp.array(True)}
    sequence = loss_sequence(6)
    masked, _ = run(weighting, sequence, masks=[mask] * 6)
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
    weighting = METHODS[name]()
    losses = loss_sequence(1)[0]
    nobody = {task: jnp.array(False) for task in TASKS}
    state = weighting.init(losses, key=KEY)
    weights, after = jax.jit(weighting.update)(losses, state, mask=nobody)
    assert all(weight == 0 for weight in weights.values())
    np.testing.assert_array_equal(after.steps, 0)
    weights, _ = weighting.update(losses, after)
    assert all(jnp.isfinite(weight) for weight in weights.values())


@each_method
def test_one_task_alone_is_as_one_task(name):
    if name == "constant":
        weighting, one = METHODS[name](), mtl_jax.constant({"b": 1.0})
    else:
        weighting, one = METHODS[name](), METHODS[name]()
    mask = {"a": jnp.array(False), "b": jnp.array(True), "c": jnp.array(False)}
    sequence = loss_sequence(6)
    state, state_of_one = weighting.init(sequence[0], key=KEY), one.init({"b": 0.0}, key=KEY)
    for losses in sequence:
        weights, state = weighting.update(losses, state, mask=mask)
        expected, state_of_one = one.update({"b": losses["b"]}, state_of_one)
        np.testing.assert_allclose(weights["b"], expected["b"], rtol=1e-5)


# optax's optimizers do not pass strict promotion.
@pytest.mark.parametrize(
    "name", [name for name in METHODS if not name.startswith(("uncertainty", "imtl_l", "famo"))]
)
def test_strict_dtype_promotion(name):
    weighting = METHODS[name]()
    losses = loss_sequence(1)[0]
    state = weighting.init(losses, key=KEY)
    with jax.numpy_dtype_promotion("strict"):
        jax.jit(weighting.update).lower(losses, state)


@each_method
def test_no_gradient_flows_through_the_weights(name):
    weighting = METHODS[name]()
    losses = loss_sequence(1)[0]
    state = weighting.init(losses, key=KEY)

    def total(losses):
        weights, new_state = weighting.update(losses, state)
        floats = [leaf for leaf in jax.tree.leaves(new_state) if leaf.dtype == jnp.float32]
        return sum(weights.values()) + sum(jnp.sum(leaf) for leaf in floats)

    assert all(gradient == 0 for gradient in jax.grad(total)(losses).values())


@each_method
def test_one_task(name):
    weighting = mtl_jax.constant((1.0,)) if name == "constant" else METHODS[name]()
    losses = (jnp.float32(0.5),)
    (weight,), _ = weighting.update(losses, weighting.init(losses, key=KEY))
    assert jnp.isfinite(weight)
