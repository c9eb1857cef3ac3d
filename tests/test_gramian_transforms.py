"""The transforms where the task gradients are measured: rows, Gramian, shared parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_jax

ROWS = ("unrolled", "map", "vmap", "low_memory")
HELD = ("unrolled", "map", "vmap")
each_way = pytest.mark.parametrize("rows", [*ROWS, "auto"])


def names(number):
    return tuple(f"task{k}" for k in range(number))


def make_params(number, dtype=jnp.float64, width=5, seed=0):
    keys = iter(jax.random.split(jax.random.key(seed), 2 + number))
    normal = functools.partial(jax.random.normal, dtype=dtype)
    return {
        "encoder": {"kernel": normal(next(keys), (4, width)), "bias": normal(next(keys), (width,))},
        "heads": {task: normal(next(keys), (width,)) for task in names(number)},
    }


def make_batch(number, dtype=jnp.float64, size=6):
    x, y = jax.random.split(jax.random.key(1))
    return (
        jax.random.normal(x, (size, 4), dtype),
        jax.random.normal(y, (number, size), dtype),
    )


def encode(params, x):
    return jnp.tanh(x @ params["encoder"]["kernel"] + params["encoder"]["bias"][None, :])


def losses_fn(params, x, y):
    z = encode(params, x)
    return {
        task: jnp.mean((z @ head - y[k]) ** 2)
        for k, (task, head) in enumerate(params["heads"].items())
    }


def in_encoder(path):
    return path.startswith("encoder/")


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def jacobian(fn, params):
    """The rows of the Jacobian, from one `grad` for each task."""
    return np.stack(
        [flat(jax.grad(lambda params, t=task: fn(params)[t])(params)) for task in fn(params)]
    )


def row_sums():
    """A weighting that shows the Gramian it was given: the sums of its rows."""

    def update(losses, state, present, steps, gramian):
        return jnp.sum(gramian, axis=1), state

    return mtl_jax.vector_weighting(update, needs=mtl_jax.Signal.GRAMIAN)


@each_way
@pytest.mark.parametrize("number", [1, 2, 7])
def test_gramian_and_gradient_over_all_parameters(x64, rows, number):
    params, batch = make_params(number), make_batch(number)
    weighting = row_sums()
    gradient_fn = jax.jit(mtl_jax.value_and_grad(losses_fn, weighting, rows=rows))
    state = weighting.init(losses_fn(params, *batch))
    value, gradient, _ = gradient_fn(params, state, *batch)
    J = jacobian(lambda params: losses_fn(params, *batch), params)
    np.testing.assert_allclose(value.gramian, J @ J.T, rtol=1e-12, atol=1e-13)
    weights = np.array([value.weights[task] for task in names(number)])
    np.testing.assert_allclose(weights, (J @ J.T).sum(axis=1), rtol=1e-12)
    np.testing.assert_allclose(flat(gradient), weights @ J, rtol=1e-11, atol=1e-12)
    assert jax.tree.structure(gradient) == jax.tree.structure(params)


@each_way
@pytest.mark.parametrize("form", ["predicate", "mask"])
def test_shared_parameters_alone_enter_the_gramian(x64, rows, form):
    params, batch = make_params(3), make_batch(3)
    shared = in_encoder
    if form == "mask":
        shared = {
            "encoder": {"kernel": True, "bias": True},
            "heads": dict.fromkeys(names(3), False),
        }
    weighting = row_sums()
    gradient_fn = jax.jit(mtl_jax.value_and_grad(losses_fn, weighting, rows=rows, shared=shared))
    state = weighting.init(losses_fn(params, *batch))
    value, gradient, _ = gradient_fn(params, state, *batch)

    def with_encoder(encoder):
        return losses_fn(params | {"encoder": encoder}, *batch)

    J = jacobian(with_encoder, params["encoder"])
    np.testing.assert_allclose(value.gramian, J @ J.T, rtol=1e-12)
    # All parameters, heads too, get the gradient of the weighted sum.
    expected = jax.grad(
        lambda params: sum(
            value.weights[task] * loss for task, loss in losses_fn(params, *batch).items()
        )
    )(params)
    np.testing.assert_allclose(flat(gradient), flat(expected), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("rows", HELD)
def test_an_aggregator_gets_the_rows_of_the_shared_parameters(x64, rows):
    params, batch = make_params(3), make_batch(3)
    losses = losses_fn(params, *batch)
    aggregator = mtl_jax.moco()
    gradient_fn = jax.jit(
        mtl_jax.value_and_grad(
            losses_fn, aggregator, rows=rows, shared=in_encoder, diagnostics=True
        )
    )
    state = mtl_jax.TrainState.create(
        params, optax.sgd(0.1), aggregator, losses, shared=in_encoder
    ).weighting_state
    value, gradient, new_state = gradient_fn(params, state, *batch)

    def with_encoder(encoder):
        return losses_fn(params | {"encoder": encoder}, *batch)

    J = jacobian(with_encoder, params["encoder"])
    direct = mtl_jax.moco()
    expected, expected_state = direct.update(J, direct.init(J[0], losses), losses=losses)
    np.testing.assert_allclose(flat(gradient["encoder"]), expected, rtol=1e-9)
    np.testing.assert_allclose(new_state.steps, expected_state.steps)
    assert not np.array_equal(new_state.steps, state.steps)
    # The heads get the gradient of the plain sum, which is that of their own task's loss.
    plain = jax.grad(lambda params: sum(losses_fn(params, *batch).values()))(params)
    np.testing.assert_allclose(flat(gradient["heads"]), flat(plain["heads"]), rtol=1e-10)
    assert value.weights is None
    np.testing.assert_allclose(value.gramian, J @ J.T, rtol=1e-12)


def test_an_aggregator_does_not_look_at_an_absent_task(x64):
    params, batch = make_params(3), make_batch(3)
    aggregator = mtl_jax.trimmed_mean(0)
    mask = {task: jnp.asarray(task != "task1") for task in names(3)}
    gradient_fn = mtl_jax.value_and_grad(losses_fn, aggregator, shared=in_encoder)
    state = aggregator.init(params["encoder"], losses_fn(params, *batch))
    _, gradient, _ = gradient_fn(params, state, *batch, mask=mask)
    J = jacobian(lambda e: losses_fn(params | {"encoder": e}, *batch), params["encoder"])
    np.testing.assert_allclose(flat(gradient["encoder"]), J[[0, 2]].mean(axis=0), rtol=1e-10)
    np.testing.assert_array_equal(gradient["heads"]["task1"], 0)
    assert np.all(gradient["heads"]["task0"] != 0)


@each_way
def test_an_absent_task_counts_nowhere(x64, rows):
    params, batch = make_params(3), make_batch(3)
    mask = {task: jnp.asarray(task != "task1") for task in names(3)}
    weighting = mtl_jax.upgrad()
    gradient_fn = mtl_jax.value_and_grad(losses_fn, weighting, rows=rows, diagnostics=True)
    state = weighting.init(losses_fn(params, *batch))
    value, gradient, _ = gradient_fn(params, state, *batch, mask=mask)

    def two(params, *batch):
        losses = losses_fn(params, *batch)
        return {task: losses[task] for task in ("task0", "task2")}

    weighting = mtl_jax.upgrad()
    gradient_fn = mtl_jax.value_and_grad(two, weighting, rows=rows, diagnostics=True)
    expected, two_gradient, _ = gradient_fn(params, weighting.init(two(params, *batch)), *batch)
    np.testing.assert_allclose(flat(gradient), flat(two_gradient), rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(value.diagnostics.conflicting, expected.diagnostics.conflicting)
    assert value.weights["task1"] == 0
    assert value.diagnostics.norms[1] == 0


@each_way
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_gramian_is_at_least_float32(rows, dtype):
    params, batch = make_params(3, dtype), make_batch(3, dtype)
    weighting = mtl_jax.mgda()
    gradient_fn = jax.jit(mtl_jax.value_and_grad(losses_fn, weighting, rows=rows))
    state = weighting.init(losses_fn(params, *batch))
    value, gradient, _ = gradient_fn(params, state, *batch)
    assert value.gramian.dtype == jnp.float32
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(gradient))
    J = jacobian(lambda params: losses_fn(params, *batch), params).astype(np.float64)
    # Low memory multiplies in the network's own dtype.
    tolerance = 0.05 if dtype == jnp.bfloat16 and rows == "low_memory" else 1e-2
    tolerance = 1e-5 if dtype == jnp.float32 else tolerance
    np.testing.assert_allclose(value.gramian, J @ J.T, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rows", HELD)
def test_complex_parameters(x64, rows):
    params = {"a": jnp.array([1.0 + 2j, -0.5j]), "b": jnp.array(0.3)}

    def losses_fn(params):
        size = jnp.abs(params["a"]) ** 2
        return (jnp.sum(size) * params["b"], jnp.sum(jnp.real(params["a"]) + 2 * size))

    weighting = row_sums()
    gradient_fn = jax.jit(mtl_jax.value_and_grad(losses_fn, weighting, rows=rows))
    value, gradient, _ = gradient_fn(params, weighting.init((0.0, 0.0)))
    rows_ = [jax.grad(lambda params, k=k: losses_fn(params)[k])(params) for k in range(2)]
    J = np.array([np.concatenate([[row["b"]], row["a"].real, row["a"].imag]) for row in rows_])
    np.testing.assert_allclose(value.gramian, J @ J.T, rtol=1e-12)
    weights = np.array(value.weights)
    expected = sum(w * np.asarray(row["a"]) for w, row in zip(weights, rows_, strict=True))
    np.testing.assert_allclose(gradient["a"], expected, rtol=1e-12)


class Counter:
    """Counts how often a backward pass runs through an identity."""

    def __init__(self):
        self.calls = 0

        @jax.custom_vjp
        def identity(x):
            return x

        def backward(_, cotangent):
            jax.debug.callback(self.count)
            return (cotangent,)

        identity.defvjp(lambda x: (x, None), backward)
        self.identity = identity

    def count(self):
        self.calls += 1

    def since(self):
        jax.effects_barrier()
        calls, self.calls = self.calls, 0
        return calls


@pytest.mark.parametrize("rows", HELD)
def test_every_leaves_the_backward_passes_out_in_between(rows):
    counter = Counter()
    params, batch = make_params(3, jnp.float32), make_batch(3, jnp.float32)
    weighting = mtl_jax.every(mtl_jax.nash_mtl(), 4)

    def counted(params, *batch):
        return losses_fn(
            jax.tree.map(lambda x: x, params)
            | {
                "encoder": params["encoder"] | {"bias": counter.identity(params["encoder"]["bias"])}
            },
            *batch,
        )

    gradient_fn = jax.jit(mtl_jax.value_and_grad(counted, weighting, rows=rows))
    state = weighting.init(losses_fn(params, *batch))
    calls, weights, measured = [], [], []
    for step in range(9):
        moved = jax.tree.map(lambda leaf, s=step: leaf * (1 - 0.05 * s), params)
        value, gradient, state = gradient_fn(moved, state, *batch)
        calls.append(counter.since())
        weights.append(tuple(map(float, value.weights.values())))
        measured.append(bool(jnp.all(jnp.isfinite(value.gramian))))
        expected = jax.grad(
            lambda params, w=value.weights: sum(
                w[task] * loss for task, loss in losses_fn(params, *batch).items()
            )
        )(moved)
        np.testing.assert_allclose(flat(gradient), flat(expected), rtol=1e-4, atol=1e-5)
    once = 2 if rows == "vmap" else 4  # all rows in one pass, and the weighted one
    assert calls[0] in (4, once)
    assert calls[1:4] == [1, 1, 1]
    assert calls[4] == calls[8] == calls[0]
    assert measured == [step % 4 == 0 for step in range(9)]
    assert len(set(weights)) == 3
    assert [len(set(group)) for group in (weights[:4], weights[4:8], weights[8:])] == [1, 1, 1]


def test_every_leaves_them_out_under_vmap_over_seeds_too():
    seeds, counter = 2, Counter()
    batch = make_batch(3, jnp.float32)
    params = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *(make_params(3, jnp.float32, seed=s) for s in range(2))
    )
    weighting = mtl_jax.every(mtl_jax.nash_mtl(), 3)

    def counted(params, *batch):
        bias = counter.identity(params["encoder"]["bias"])
        return losses_fn(params | {"encoder": params["encoder"] | {"bias": bias}}, *batch)

    gradient_fn = mtl_jax.value_and_grad(counted, weighting, rows="unrolled")
    step = jax.jit(jax.vmap(lambda params, state: gradient_fn(params, state, *batch)))
    one = jax.tree.map(lambda leaf: leaf[0], params)
    state = jax.vmap(lambda _: weighting.init(losses_fn(one, *batch)))(jnp.arange(seeds))
    calls, history = [], []
    for _ in range(5):
        value, _, state = step(params, state)
        calls.append(counter.since())
        history.append(value.weights["task0"])
    assert [count / calls[1] for count in calls] == [4, 1, 1, 4, 1]
    # And each seed gets what it gets alone.
    for seed in range(seeds):
        alone = jax.tree.map(lambda leaf, seed=seed: leaf[seed], params)
        value, _, _ = gradient_fn(alone, weighting.init(losses_fn(alone, *batch)), *batch)
        np.testing.assert_allclose(history[0][seed], value.weights["task0"], rtol=1e-4)


def test_seeds_that_are_due_at_different_steps():
    """Where one seed of a batch is due, the others keep their weights."""
    params, batch = make_params(3, jnp.float32), make_batch(3, jnp.float32)
    weighting = mtl_jax.every(mtl_jax.nash_mtl(), 2)
    gradient_fn = mtl_jax.value_and_grad(losses_fn, weighting)
    first = weighting.init(losses_fn(params, *batch))
    _, _, second = gradient_fn(params, first, *batch)
    second = second._replace(weights=jnp.array([1.0, 2.0, 3.0]))
    state = jax.tree.map(lambda *leaves: jnp.stack(leaves), first, second)
    value, _, state = jax.vmap(lambda state: gradient_fn(params, state, *batch))(state)
    np.testing.assert_array_equal([value.weights[t][1] for t in names(3)], [1, 2, 3])
    expected, _, _ = gradient_fn(params, first, *batch)
    got = [value.weights[task][0] for task in names(3)]
    np.testing.assert_allclose(got, list(expected.weights.values()), rtol=1e-5)


def test_low_memory_never_holds_the_rows():
    number = 20
    params, batch = make_params(number, jnp.float32, width=64), make_batch(number, jnp.float32)
    weighting = mtl_jax.mgda()
    state = weighting.init(losses_fn(params, *batch))

    def largest(rows):
        """The most numbers in an array that has the tasks and all of a parameter in it."""
        gradient_fn = mtl_jax.value_and_grad(losses_fn, weighting, rows=rows, shared=in_encoder)
        jaxpr = jax.make_jaxpr(gradient_fn)(params, state, *batch)
        text = str(jaxpr)
        return f"f32[{number},4,64]" in text

    assert largest("map")
    assert largest("vmap")
    assert not largest("low_memory")


def flops(fn, *args):
    return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("number", [2, 5])
def test_a_step_costs_one_forward_and_k_backward_passes(number):
    """Compiled FLOPs against the floor; the heads' share of the encoder's is below 2 %."""
    width, size = 256, 64
    params = make_params(number, jnp.float32, width)
    params["encoder"]["kernel"] = jnp.ones((width, width)) / width
    x, y = jnp.ones((size, width)), jnp.ones((number, size))
    weighting = mtl_jax.upgrad()
    state = weighting.init(losses_fn(params, x, y))
    forward = flops(losses_fn, params, x, y)
    plain = flops(jax.grad(lambda *args: sum(losses_fn(*args).values())), params, x, y)
    floor = forward + number * (plain - forward)
    for shared in (None, in_encoder):
        gradient_fn = mtl_jax.value_and_grad(losses_fn, weighting, rows="unrolled", shared=shared)
        measured = flops(gradient_fn, params, state, x, y)
        assert measured < 1.05 * floor + 2 * number**2 * width**2


def test_low_memory_needs_a_forward_derivative():
    counter = Counter()
    weighting = mtl_jax.mgda()
    gradient_fn = mtl_jax.value_and_grad(
        lambda x: (counter.identity(x), x**2), weighting, rows="low_memory"
    )
    with pytest.raises(TypeError, match="rows='low_memory' needs the forward derivative"):
        gradient_fn(jnp.array(1.0), weighting.init((0.0, 0.0)))


def test_errors_of_shared_and_rows():
    params, batch = make_params(2, jnp.float32), make_batch(2, jnp.float32)
    weighting = mtl_jax.mgda()
    state = weighting.init(losses_fn(params, *batch))

    def call(**options):
        mtl_jax.value_and_grad(losses_fn, weighting, **options)(params, state, *batch)

    with pytest.raises(ValueError, match="selects none.*encoder/bias, encoder/kernel, heads/task0"):
        call(shared=lambda path: "encodr" in path)
    with pytest.raises(ValueError, match="with the structure of the parameters"):
        call(shared={"encoder": True})
    with pytest.raises(TypeError, match="for 'encoder/bias' it says 1"):
        call(shared=jax.tree.map(lambda _: 1, params))
    with pytest.raises(ValueError, match="`rows` must be one of auto, unrolled"):
        call(rows="all")
    with pytest.raises(ValueError, match="reads all task gradients"):
        mtl_jax.value_and_grad(losses_fn, mtl_jax.graddrop(), rows="low_memory")
    with pytest.raises(ValueError, match="reads the Gramian of the task gradients"):
        weighting.update({"task0": 1.0, "task1": 1.0}, state)
    with pytest.raises(ValueError, match=r"shape \(2, 2\), got float32\[3, 3\]"):
        weighting.update({"task0": 1.0, "task1": 1.0}, state, gramian=jnp.eye(3))


def test_diagnostics_of_a_weighting_that_reads_the_losses(x64):
    params, batch = make_params(3), make_batch(3)
    weighting = mtl_jax.adaptive()
    state = weighting.init(losses_fn(params, *batch))
    plain = mtl_jax.value_and_grad(losses_fn, weighting)(params, state, *batch)
    diagnosed = mtl_jax.value_and_grad(losses_fn, weighting, diagnostics=True)(
        params, state, *batch
    )
    np.testing.assert_allclose(flat(diagnosed[1]), flat(plain[1]), rtol=1e-12)
    assert plain[0].gramian is None
    assert plain[0].diagnostics is None
    J = jacobian(lambda params: losses_fn(params, *batch), params)
    unit = J / np.linalg.norm(J, axis=1)[:, None]
    np.testing.assert_allclose(diagnosed[0].diagnostics.cosines, unit @ unit.T, rtol=1e-10)


@each_way
def test_a_gradient_that_is_not_finite_keeps_the_state(rows):
    weighting = mtl_jax.ema(mtl_jax.mgda(), 0.9)

    def fn(params):
        return (jnp.sum(params**2), jnp.sum(jnp.sqrt(params)))

    gradient_fn = jax.jit(mtl_jax.value_and_grad(fn, weighting, rows=rows))
    _, _, state = gradient_fn(jnp.array([1.0, 4.0]), weighting.init((0.0, 0.0)))
    value, _, after = gradient_fn(jnp.array([1.0, 0.0]), state)
    jax.tree.map(np.testing.assert_array_equal, after, state)
    assert all(jnp.isnan(weight) for weight in value.weights)


@pytest.mark.parametrize(
    "make",
    [mtl_jax.nash_mtl, lambda: mtl_jax.every(mtl_jax.upgrad(), 3), mtl_jax.graddrop],
    ids=["nash_mtl", "every", "graddrop"],
)
def test_train_steps_in_a_scan(make):
    params, batch = make_params(3, jnp.float32), make_batch(3, jnp.float32)
    weighting, optimizer = make(), optax.adam(1e-2)
    gradient_fn = mtl_jax.value_and_grad(losses_fn, weighting, shared=in_encoder)
    train_step = mtl_jax.make_train_step(gradient_fn, optimizer, weighting)
    state = mtl_jax.TrainState.create(
        params,
        optimizer,
        weighting,
        losses_fn(params, *batch),
        weighting_key=jax.random.key(0),
        shared=in_encoder,
    )
    state, losses = jax.jit(
        lambda state: jax.lax.scan(
            lambda state, _: (lambda out: (out[0], out[1].losses))(train_step(state, *batch)),
            state,
            length=100,
        )
    )(state)
    assert state.step == 100
    assert state.skipped == 0
    total = sum(losses.values())
    assert total[-1] < 0.7 * total[0]
