"""Losses in pieces: the numbers of the whole batch, in the memory of one piece."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from trees import assert_trees_close, assert_trees_equal

import mtl_jax
from mtl_jax import microbatched, microbatched_encoder

TASKS = ("always", "often", "one piece", "never")
NUMBER = 4
"""The pieces: piece i has the examples i, i + 4, i + 8, ..."""
SIZE = 24
EXAMPLE = np.arange(SIZE)
LABELLED = {
    "always": np.ones(SIZE, bool),
    "often": (EXAMPLE % 3 == 0) & (EXAMPLE % NUMBER != 2),
    "one piece": (EXAMPLE % NUMBER == 1) & (EXAMPLE > 5),
    "never": np.zeros(SIZE, bool),
}
MASK = {task: bool(labelled.any()) for task, labelled in LABELLED.items()}


def make_params(dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "encoder": {
            "kernel": rng.normal(size=(4, 5)).astype(dtype),
            "bias": rng.normal(size=(1, 5)).astype(dtype),
        },
        "heads": {task: rng.normal(size=5).astype(dtype) for task in TASKS},
    }


def make_batch(dtype=np.float64):
    rng = np.random.default_rng(10)
    return {
        "x": rng.normal(size=(SIZE, 4)).astype(dtype),
        "y": {task: rng.normal(size=SIZE).astype(dtype) for task in TASKS},
        "labelled": LABELLED,
    }


def encoder(params, batch):
    return {"z": jnp.tanh(batch["x"] @ params["encoder"]["kernel"] + params["encoder"]["bias"])}


def heads(params, zs, batch):
    return {
        task: mtl_jax.masked_mean(
            (zs[task]["z"] @ params["heads"][task] - batch["y"][task]) ** 2,
            batch["labelled"][task],
        )
        for task in TASKS
    }


def losses_fn(params, batch):
    return heads(params, dict.fromkeys(TASKS, encoder(params, batch)), batch)


def count(batch):
    return {task: jnp.sum(labelled) for task, labelled in batch["labelled"].items()}


IN_PIECES = microbatched(losses_fn, NUMBER, count)


def row_sums():
    """A weighting that shows the Gramian it was given: the sums of its rows."""

    def update(losses, state, present, steps, gramian):
        return jnp.sum(gramian, axis=1), state

    return mtl_jax.vector_weighting(update, needs=mtl_jax.Signal.GRAMIAN)


def whole(weighting, **options):
    return mtl_jax.value_and_grad(losses_fn, weighting, **options)


def in_pieces(weighting, **options):
    return mtl_jax.value_and_grad(IN_PIECES, weighting, **options)


def representation(weighting, **options):
    return mtl_jax.representation_value_and_grad(encoder, heads, weighting, tasks=TASKS, **options)


def representation_in_pieces(weighting, **options):
    return mtl_jax.representation_value_and_grad(
        microbatched_encoder(encoder, NUMBER),
        microbatched(heads, NUMBER, lambda zs, batch: count(batch)),
        weighting,
        tasks=TASKS,
        **options,
    )


def compare(weighting, forms, dtype, rtol, **options):
    params, batch = make_params(dtype), make_batch(dtype)

    @jax.jit
    def both(params, batch):
        gradient_fns = [form(weighting, **options) for form in forms]
        state = gradient_fns[0].init(params, batch)
        return [fn(params, state, batch, mask=MASK) for fn in gradient_fns]

    expected, actual = both(params, batch)
    assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(expected[1]))
    assert_trees_close(actual, expected, rtol=rtol, atol=rtol)


# The numbers of the whole batch


AT_PARAMETERS, AT_Z = (whole, in_pieces), (representation, representation_in_pieces)


@pytest.mark.parametrize(
    ("make", "forms", "options"),
    [
        (mtl_jax.adaptive, AT_PARAMETERS, {}),
        (row_sums, AT_PARAMETERS, {"rows": "map"}),
        (row_sums, AT_PARAMETERS, {"rows": "vmap"}),
        (row_sums, AT_PARAMETERS, {"rows": "low_memory"}),
        (mtl_jax.imtl_g, AT_PARAMETERS, {"rows": 3}),
        (lambda: mtl_jax.every(row_sums(), 2), AT_PARAMETERS, {}),
        (lambda: mtl_jax.trimmed_mean(1), AT_PARAMETERS, {"diagnostics": True}),
        (mtl_jax.excess_mtl, AT_PARAMETERS, {"rows": 2}),
        (row_sums, AT_Z, {}),
        (row_sums, AT_Z, {"gramian": "encoder", "rows": "vmap"}),
        (row_sums, AT_Z, {"gramian": "encoder", "rows": "low_memory"}),
    ],
)
def test_losses_weights_and_gradients_are_those_of_the_whole_batch(x64, make, forms, options):
    compare(make(), forms, np.float64, 1e-12, **options)


@pytest.mark.parametrize(
    ("make", "forms"), [(mtl_jax.adaptive, AT_PARAMETERS), (mtl_jax.imtl_g, AT_Z)]
)
def test_in_float32(make, forms):
    compare(make(), forms, np.float32, 1e-5)


def test_a_train_step_that_observes_donates_and_carries_a_state(x64):
    weighting, optimizer = mtl_jax.famo(), optax.adam(0.1)
    batch = make_batch()

    def with_context(params, model_state, key, batch):
        return losses_fn(params, batch), {"calls": model_state["calls"] + 1, "mean": jnp.ones(5)}

    def counted(model_state, key, batch):
        return count(batch)

    def run(losses_fn):
        gradient_fn = mtl_jax.value_and_grad(losses_fn, weighting, has_aux=True)
        step = mtl_jax.make_train_step(gradient_fn, optimizer)
        state = step.init(
            make_params(),
            batch,
            model_state={"calls": jnp.zeros((), jnp.int32), "mean": jnp.ones(5)},
            rng=jax.random.key(3),
        )
        for _ in range(3):
            state, value = step(state, batch, mask=MASK)
        assert (state.skipped, state.model_state["calls"]) == (0, 3)
        return state, value

    cut = microbatched(with_context, NUMBER, counted, batch_argnums=3, has_aux=True)
    assert_trees_close(run(cut), run(with_context), rtol=1e-10, atol=1e-12)


def test_an_encoder_with_auxiliary_output(x64):
    """And with an argument of which it is not split: as large as the batch, but not by example."""
    params, batch = make_params(), make_batch()
    context = jnp.arange(float(SIZE))

    def with_context(params, context, batch):
        z = jnp.sum(context) * encoder(params, batch)["z"]
        return z, {"mean": jnp.mean(context), "norms": jnp.sum(z**2, axis=1)}

    cut = microbatched_encoder(with_context, NUMBER, has_aux=True, batch_argnums=2)
    assert_trees_close(
        jax.jit(cut)(params, context, batch),
        with_context(params, context, batch),
        rtol=1e-12,
        atol=1e-12,
    )
    split = microbatched_encoder(with_context, NUMBER, has_aux=True)
    with pytest.raises(ValueError, match="'mean'"):  # that of each microbatch is another one
        split(params, context, batch)


def test_under_vmap(x64):
    weighting, batch = mtl_jax.adaptive(), make_batch()
    params = jax.tree.map(
        lambda *leaves: np.stack(leaves), *(make_params(seed=i) for i in range(3))
    )

    def of_all(gradient_fn):
        state = gradient_fn.init(make_params(), batch)
        return jax.vmap(lambda p: gradient_fn(p, state, batch, mask=MASK)[:2])

    @jax.jit
    def both(params):
        return [of_all(form(weighting))(params) for form in AT_PARAMETERS]

    expected, actual = both(params)
    assert_trees_close(actual, expected, rtol=1e-12, atol=1e-12)


# Labels that are missing


def test_a_mean_of_means_is_not_the_mean():
    params, batch = make_params(np.float32), make_batch(np.float32)
    expected, plain, by_count = jax.jit(
        lambda params, batch: [
            losses(params, batch)
            for losses in (losses_fn, microbatched(losses_fn, NUMBER), IN_PIECES)
        ]
    )(params, batch)
    np.testing.assert_allclose(plain["always"], expected["always"], rtol=1e-5)
    # Its labels are all in one of the four pieces.
    np.testing.assert_allclose(plain["one piece"], expected["one piece"] / NUMBER, rtol=1e-5)
    assert abs(plain["often"] / expected["often"] - 1) > 0.1
    assert_trees_close(by_count, expected, rtol=1e-5, atol=0)
    assert by_count["never"] == 0


def test_the_loss_of_a_piece_without_labels_may_be_anything():
    """Its own gradient must be finite, which that of 0/0 is not."""

    def losses(slope, x, labelled):
        mean = mtl_jax.masked_mean(slope * x, labelled)
        return {"a": mean + jnp.where(jnp.any(labelled), 0, jnp.nan)}

    x, labelled = np.arange(1, 5, dtype=np.float32), np.array([True, False, True, False])
    for n, expected in ((2, 2.0), (4, 2.0)):
        cut = microbatched(losses, n, lambda x, labelled: {"a": jnp.sum(labelled)})
        found = jax.jit(jax.value_and_grad(lambda s, seen, cut=cut: cut(s, x, seen)["a"]))
        assert found(3.0, labelled) == (3 * expected, expected)
        assert found(3.0, np.zeros(4, bool)) == (0, 0)


def test_a_count_may_be_a_sum_of_weights():
    x = np.array([1, 2, 3, 4], np.float32)
    weights = np.array([0.1, 0.2, 0, 0.3], np.float32)

    def losses(params, x, weights):
        return [params * jnp.sum(weights * x) / jnp.sum(weights)]

    cut = microbatched(losses, 2, lambda x, weights: [jnp.sum(weights)])
    found = jax.jit(cut)(1.0, x, weights)
    np.testing.assert_allclose(found, [np.sum(weights * x) / np.sum(weights)], rtol=1e-6)


def test_every_task_may_have_a_batch_of_its_own_size():
    def losses(params, batches):
        errors = {task: (params * x - 1) ** 2 for task, x in batches.items()}
        return jax.tree.map(jnp.mean, errors), errors

    batches = {"a": np.arange(12.0, dtype=np.float32), "b": np.ones((4, 2), np.float32)}
    with pytest.raises(ValueError, match="at 'a' has shape .* at 'b'"):
        microbatched(losses, 2, has_aux=True)(2.0, batches)
    for n in (2, 4):
        cut = microbatched(losses, n, has_aux=True, batch_argnums=1)
        found, expected = jax.jit(cut)(2.0, batches), jax.jit(losses)(2.0, batches)
        assert_trees_close(found, expected, rtol=1e-6, atol=0)


def test_large_losses_and_counts_do_not_overflow():
    x = np.full(4, 1e38, np.float32)
    cut = microbatched(lambda _, x: [jnp.mean(x)], 2, lambda x: [jnp.asarray(1000)])
    np.testing.assert_allclose(jax.jit(cut)(0.0, x)[0], 1e38, rtol=1e-6)


# What is not cut


def test_every_piece_has_random_numbers_of_its_own():
    def losses(params, key, x):
        draws = jax.random.uniform(key, x.shape)
        return [jnp.mean(params * x * draws)], (draws, jax.random.split(key)[0])

    keys, x = jax.random.split(jax.random.key(0)), np.ones(12, np.float32)
    for argnums in (None, 2):
        cut = jax.jit(microbatched(losses, 3, has_aux=True, batch_argnums=argnums))
        first, again, other = (cut(1.0, key, x) for key in (*keys[:1], *keys))
        (loss,), (draws, next_key) = first
        assert_trees_equal(again, first)
        assert len(np.unique([draws, other[1][0]])) == 24
        np.testing.assert_allclose(loss, np.mean(draws), rtol=1e-6)
        assert jnp.issubdtype(next_key.dtype, jax.dtypes.prng_key)
        assert next_key.shape == ()


def test_auxiliary_output_is_that_of_the_whole_batch():
    state = {"mean": jnp.arange(3.0), "calls": jnp.asarray(7)}

    def losses(params, state, batch, scale, name):
        assert name == "a name" or scale.ndim == 0
        aux = {
            "outputs": params * batch["x"] * scale,
            "norms": jnp.sum(batch["x"], axis=1),
            "state": state | {"calls": state["calls"] + 1},
            "none": {},
        }
        return {"a": jnp.mean(aux["outputs"])}, aux

    batch = {"x": np.arange(24.0, dtype=np.float32).reshape(12, 2)}
    arguments = (2.0, state, batch, jnp.asarray(0.5), "a name")
    expected = jax.jit(losses, static_argnums=4)(*arguments)
    for n in (1, 3, 6):
        cut = microbatched(losses, n, has_aux=True, batch_argnums=(2, 3))
        assert_trees_close(jax.jit(cut, static_argnums=4)(*arguments), expected, rtol=1e-6, atol=0)


def test_one_piece_is_the_function_itself():
    assert microbatched(losses_fn, 1, count) is losses_fn
    assert microbatched_encoder(encoder, 1) is encoder


# Precision


def test_gradients_of_bfloat16_parameters_are_added_up_in_float32():
    """Each of 2048 pieces adds 1/2048, which a gradient in bfloat16 of 0.25 does not notice."""
    x, params = jnp.ones((2048, 1), jnp.bfloat16), jnp.ones(1, jnp.bfloat16)
    cut = microbatched(lambda params, x: [jnp.mean((x @ params).astype(jnp.float32))], 2048)
    gradient = jax.jit(jax.grad(lambda params: cut(params, x)[0]))(params)
    assert gradient.dtype == jnp.bfloat16
    assert gradient == 1


def test_losses_of_bfloat16_are_averaged_in_float32():
    x = jnp.asarray([1.0, 1.0078125], jnp.bfloat16)
    (loss,) = microbatched(lambda params, x: [params * x[0]], 2)(jnp.ones((), jnp.bfloat16), x)
    assert loss.dtype == jnp.float32
    assert loss == 1.00390625


def test_strict_dtype_promotion():
    params, batch = make_params(jnp.bfloat16), make_batch(jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"):
        losses = jax.jit(IN_PIECES)(params, batch)
    assert_trees_close(losses, jax.jit(losses_fn)(params, batch), rtol=0.05, atol=0)


# Memory


def deep_encoder(params, x, y):
    for kernel in params["encoder"]:
        x = jnp.tanh(x @ kernel)
    return x @ params["neck"]


def deep_heads(params, zs, x, y):
    return {task: jnp.mean((z @ params["heads"][task] - y) ** 2) for task, z in zs.items()}


def deep_losses(params, x, y):
    return deep_heads(params, dict.fromkeys(("a", "b"), deep_encoder(params, x, y)), x, y)


def bytes_of(gradient_fn, size):
    """The temporary memory of a compiled step, and the size of what it returns: the gradient."""
    float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    params = {
        "encoder": [float32((64, 64))] * 8,
        "neck": float32((64, 4)),
        "heads": {"a": float32((4,)), "b": float32((4,))},
    }
    x, y = float32((size, 64)), float32((size,))
    state = jax.eval_shape(gradient_fn.init, params, x, y)
    lowered = jax.jit(gradient_fn.update).lower(params, state, x, y)
    memory = lowered.compile().memory_analysis()
    return memory.temp_size_in_bytes, memory.output_size_in_bytes


def test_memory_is_that_of_one_piece_and_the_gradient():
    size, n, weighting = 4096, 8, mtl_jax.adaptive()
    whole = mtl_jax.value_and_grad(deep_losses, weighting)
    cut = mtl_jax.value_and_grad(microbatched(deep_losses, n), weighting)
    everything, _ = bytes_of(whole, size)
    one_piece, gradient = bytes_of(whole, size // n)
    pieces, _ = bytes_of(cut, size)
    assert pieces < everything / 4
    assert pieces < one_piece + 2 * gradient


def test_memory_of_the_representation_form_is_that_of_one_piece_and_the_representation():
    size, n, weighting = 4096, 8, row_sums()
    tasks = ("a", "b")
    form = functools.partial(
        mtl_jax.representation_value_and_grad, weighting=weighting, tasks=tasks
    )
    whole = form(deep_encoder, deep_heads)
    everything, _ = bytes_of(whole, size)
    one_piece, gradient = bytes_of(whole, size // n)
    pieces, _ = bytes_of(form(microbatched_encoder(deep_encoder, n), deep_heads), size)
    at_z = size * 4 * 4
    assert pieces < everything / 3
    assert pieces < one_piece + 2 * gradient + 2 * len(tasks) * at_z


@pytest.mark.parametrize(
    ("make", "options", "forward"),
    [
        (mtl_jax.adaptive, {}, 1),
        (row_sums, {"rows": "map"}, 3),
        (row_sums, {"rows": "vmap"}, 1),
    ],
)
def test_a_backward_pass_costs_one_more_forward_pass(make, options, forward):
    """Several backward passes at once share it."""
    passes = collections.Counter()

    def counted(which, x):
        jax.debug.callback(lambda _: passes.update([which]), jnp.sum(x))
        return x

    @jax.custom_vjp
    def identity(x):
        return counted("forward", x)

    identity.defvjp(
        lambda x: (counted("forward", x), x), lambda x, g: (g + 0 * counted("back", x),)
    )

    def losses_fn(params, x):
        z = identity(params[0] * x)
        return [jnp.mean((z - target) ** 2) for target in params]

    gradient_fn = mtl_jax.value_and_grad(microbatched(losses_fn, NUMBER), make(), **options)
    params, x = np.arange(3, dtype=np.float32), np.arange(8, dtype=np.float32)
    state = gradient_fn.init(params, x)
    assert not passes  # the losses were traced
    outputs = jax.jit(gradient_fn.update)(params, state, x)
    jax.block_until_ready(outputs)
    jax.effects_barrier()
    assert passes["forward"] == (1 + forward) * NUMBER


# Many devices


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_the_pieces_of_a_sharded_batch_are_spread_over_all_devices(kind):
    def losses_fn(params, x, y):
        z = jnp.tanh(x @ params["encoder"])
        return {task: jnp.mean((z @ params[task] - y) ** 2) for task in ("a", "b")}

    weighting = mtl_jax.adaptive()
    params = {"encoder": jnp.ones((6, 7)) / 3, "a": jnp.ones(7), "b": -jnp.ones(7)}
    x = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)
    whole = mtl_jax.value_and_grad(losses_fn, weighting)
    state = whole.init(params, x, x[:, 0])
    expected = jax.jit(whole.update)(params, state, x, x[:, 0])

    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    batch = jax.device_put((x, x[:, 0]), NamedSharding(mesh, PartitionSpec("data")))
    replicated = jax.device_put((params, state), NamedSharding(mesh, PartitionSpec()))
    cut = mtl_jax.value_and_grad(microbatched(losses_fn, 4), weighting)
    compiled = jax.jit(cut.update).lower(*replicated, *batch).compile()
    assert_trees_close(compiled(*replicated, *batch), expected, rtol=1e-5, atol=1e-6)
    text = compiled.as_text()
    # Examples do not travel, and 2 of a piece's 16 are on each device.
    assert not re.search("all-gather|all-to-all|collective-permute", text), text
    assert "all-reduce" in text
    assert re.search(r"f32\[2,7\]", text), text
    assert not re.search(r"f32\[16,7\]", text), text
    if kind is AxisType.Explicit:
        with pytest.raises(ValueError, match="8 devices, over which a microbatch of 4"):
            jax.jit(microbatched(losses_fn, 16))(params, *batch)


# Beside optax.MultiSteps


def test_multi_steps_takes_the_pieces_as_steps_and_weighs_each_alone():
    """With equal weights it is the whole batch's step, and with others it is not."""
    x = np.random.default_rng(0).normal(size=(SIZE, 2)).astype(np.float32)

    def losses_fn(params, x):
        return {"a": jnp.mean((params - x) ** 2), "b": jnp.mean(jnp.abs(params + x))}

    def run(weighting, optimizer, losses_fn, batches):
        gradient_fn = mtl_jax.value_and_grad(losses_fn, weighting)
        step = mtl_jax.make_train_step(gradient_fn, optimizer)
        state = step.init(np.ones((1, 2), np.float32), batches[0])
        for batch in batches:
            state, _ = step(state, batch)
        assert (state.step, state.skipped) == (len(batches), 0)
        return state.params

    optimizer = optax.sgd(0.1)
    multi_steps = optax.MultiSteps(optimizer, NUMBER).gradient_transformation()
    pieces = [x[i::NUMBER] for i in range(NUMBER)]
    for weighting, equal in ((mtl_jax.equal(), True), (mtl_jax.adaptive(), False)):
        at_once = run(weighting, optimizer, microbatched(losses_fn, NUMBER), [x])
        as_steps = run(weighting, multi_steps, losses_fn, pieces)
        difference = np.max(np.abs(at_once - as_steps))
        assert difference < 1e-6 if equal else difference > 1e-3


# What cannot be


@pytest.mark.parametrize("n", [0, -1, 2.0, True, "4"])
def test_the_number_of_pieces_is_a_positive_integer(n):
    for cut in (microbatched, microbatched_encoder):
        with pytest.raises(ValueError, match="number of microbatches"):
            cut(losses_fn, n)


def cut_with(function, *args, n=4, **options):
    return lambda: microbatched(function, n, **options)(1.0, *args)


def mean_of(params, x, *others):
    return {"a": jnp.mean(params * x)}


def with_aux(params, x):
    return mean_of(params, x), {"batch_stats": [jnp.mean(x)]}


X = jnp.ones((6, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (cut_with(mean_of, X), r"argument 1 has shape \(6, 2\).*n=4 equal microbatches.*pad"),
        (cut_with(mean_of, {"x": {"y": X}}), r"argument 1 at 'x/y' has shape \(6, 2\)"),
        (
            cut_with(mean_of, X, {"s": jnp.ones(5)}),
            r"argument 1 has shape \(6, 2\) and argument 2 at 's' \(5,\).*batch_argnums",
        ),
        (cut_with(mean_of, X, np.zeros(2, np.uint32)), "wrap_key_data"),
        (cut_with(mean_of, 1.0), "no array with a leading axis"),
        (cut_with(mean_of, X, batch_argnums=0), r"`batch_argnums` is 0.*numbers \[1\]"),
        (cut_with(mean_of, X, batch_argnums=(1, 2)), r"numbers \[1\]"),
        (cut_with(with_aux, X, n=2, has_aux=True), "at 'batch_stats/0' of shape.*MultiSteps"),
        (
            cut_with(mean_of, X, n=2, count=lambda x: {"b": 1}),
            r"structure of the losses, \{'a': \*\}; got \{'b': \*\}",
        ),
        (
            lambda: microbatched_encoder(lambda params, x: {"z": jnp.sum(x, 0)}, 2)(1.0, X),
            r"at 'z' has shape \(2,\) for a microbatch of 3 examples",
        ),
    ],
)
def test_errors_say_what_and_where_and_the_way_out(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("count", [lambda x: {"a": x[:, 0]}, lambda x: {"a": jnp.any(x > 0)}])
def test_a_count_is_one_number(count):
    with pytest.raises(TypeError, match="The count at 'a'.*must be one number for each loss"):
        cut_with(mean_of, X, n=2, count=count)()


def test_the_errors_of_losses_are_those_of_value_and_grad():
    with pytest.raises(ValueError, match="a task's loss is a scalar"):
        cut_with(lambda params, x: {"a": x[:, :, None]}, X, n=2)()
    with pytest.raises(TypeError, match=r"must return a pair \(losses, aux\)"):
        cut_with(mean_of, X, n=2, has_aux=True)()
