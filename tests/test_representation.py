"""The Gramian at a representation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_jax

TASKS = ("a", "b", "c")


def make_params(tasks=TASKS, dtype=jnp.float64):
    keys = iter(jax.random.split(jax.random.key(0), 2 + len(tasks)))
    normal = functools.partial(jax.random.normal, dtype=dtype)
    return {
        "encoder": {"one": normal(next(keys), (4, 5)), "two": normal(next(keys), (4, 3))},
        "heads": {task: normal(next(keys), (8,)) for task in tasks},
        "temperature": jnp.asarray(0.7, dtype),  # used by the encoder and by every head
    }


def make_batch(tasks=TASKS, dtype=jnp.float64):
    x, *ys = jax.random.split(jax.random.key(1), 1 + len(tasks))
    return (
        jax.random.normal(x, (6, 4), dtype),
        {task: jax.random.normal(y, (6,), dtype) for task, y in zip(tasks, ys, strict=True)},
    )


def encoder(params, x, y):
    """A representation with two leaves."""
    scale = params["temperature"]
    return {name: jnp.tanh(scale * (x @ kernel)) for name, kernel in params["encoder"].items()}


def heads(params, zs, x, y):
    def loss(task):
        z = jnp.concatenate([zs[task]["one"], zs[task]["two"]], axis=1)
        return jnp.mean((params["temperature"] * (z @ params["heads"][task]) - y[task]) ** 2)

    return {task: loss(task) for task in params["heads"]}


def losses_fn(params, x, y):
    z = encoder(params, x, y)
    return heads(params, dict.fromkeys(params["heads"], z), x, y)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def row_sums():
    """A weighting that shows the Gramian it was given: the sums of its rows."""

    def update(losses, state, present, steps, gramian):
        return jnp.sum(gramian, axis=1), state

    return mtl_jax.vector_weighting(update, needs=mtl_jax.Signal.GRAMIAN)


def rows_at_z(params, batch):
    z = encoder(params, *batch)
    return np.stack(
        [
            flat(jax.grad(lambda z, t=t: heads(params, dict.fromkeys(TASKS, z), *batch)[t])(z))
            for t in heads(params, dict.fromkeys(TASKS, z), *batch)
        ]
    )


@pytest.mark.parametrize("tasks", [TASKS, tuple("abcdefg")])
def test_gramian_at_z_and_gradient_over_all_parameters(x64, tasks):
    params, batch = make_params(tasks), make_batch(tasks)
    weighting = row_sums()
    gradient_fn = jax.jit(
        mtl_jax.representation_value_and_grad(encoder, heads, weighting, tasks=tasks)
    )
    losses = losses_fn(params, *batch)
    value, gradient, _ = gradient_fn(params, weighting.init(losses), *batch)
    z = encoder(params, *batch)
    J = np.stack(
        [
            flat(jax.grad(lambda z, t=t: heads(params, dict.fromkeys(tasks, z), *batch)[t])(z))
            for t in tasks
        ]
    )
    np.testing.assert_allclose(value.gramian, J @ J.T, rtol=1e-12, atol=1e-14)
    expected = jax.grad(
        lambda p: sum(value.weights[task] * loss for task, loss in losses_fn(p, *batch).items())
    )(params)
    np.testing.assert_allclose(flat(gradient), flat(expected), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(flat(value.losses), flat(losses), rtol=1e-14)


@pytest.mark.parametrize("rows", ["auto", "unrolled", "map", "vmap", "low_memory"])
@pytest.mark.parametrize("shared", [None, lambda path: path == "encoder/one"])
def test_gramian_over_the_parameters_of_the_encoder(x64, rows, shared):
    params, batch = make_params(), make_batch()
    weighting = row_sums()
    gradient_fn = jax.jit(
        mtl_jax.representation_value_and_grad(
            encoder, heads, weighting, tasks=TASKS, gramian="encoder", shared=shared, rows=rows
        )
    )
    losses = losses_fn(params, *batch)
    value, gradient, _ = gradient_fn(params, weighting.init(losses), *batch)

    def through_encoder(changed, task):
        z = encoder(changed, *batch)
        return heads(params, dict.fromkeys(TASKS, z), *batch)[task]

    gradients = [jax.grad(through_encoder)(params, task) for task in TASKS]
    J = np.stack([flat(g if shared is None else g["encoder"]["one"]) for g in gradients])
    np.testing.assert_allclose(value.gramian, J @ J.T, rtol=1e-12, atol=1e-14)
    expected = jax.grad(
        lambda p: sum(value.weights[task] * loss for task, loss in losses_fn(p, *batch).items())
    )(params)
    np.testing.assert_allclose(flat(gradient), flat(expected), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("make", [mtl_jax.equal, mtl_jax.adaptive])
def test_a_weighting_of_the_losses_gives_what_value_and_grad_gives(x64, make):
    params, batch = make_params(), make_batch()
    weighting = make()
    state = weighting.init(losses_fn(params, *batch))
    there = mtl_jax.representation_value_and_grad(encoder, heads, weighting, tasks=TASKS)
    value, gradient, _ = there(params, state, *batch)
    expected_value, expected, _ = mtl_jax.value_and_grad(losses_fn, weighting)(
        params, state, *batch
    )
    np.testing.assert_allclose(flat(gradient), flat(expected), rtol=1e-12)
    np.testing.assert_allclose(flat(value.weights), flat(expected_value.weights))
    assert value.gramian is None


def test_unweighted_heads(x64):
    params, batch = make_params(), make_batch()
    weighting = mtl_jax.constant({"a": 2.0, "b": 0.5, "c": 3.0})
    state = weighting.init(losses_fn(params, *batch))
    gradient_fn = mtl_jax.representation_value_and_grad(
        encoder, heads, weighting, tasks=TASKS, head_gradient="unweighted"
    )
    mask = {"a": jnp.array(True), "b": jnp.array(True), "c": jnp.array(False)}
    _, gradient, _ = gradient_fn(params, state, *batch, mask=mask)
    plain = jax.grad(lambda p: losses_fn(p, *batch)["a"] + losses_fn(p, *batch)["b"])(params)
    weighted = jax.grad(
        lambda p: 2.0 * losses_fn(p, *batch)["a"] + 0.5 * losses_fn(p, *batch)["b"]
    )(params)
    np.testing.assert_allclose(flat(gradient["heads"]), flat(plain["heads"]), rtol=1e-12)
    np.testing.assert_allclose(flat(gradient["encoder"]), flat(weighted["encoder"]), rtol=1e-12)
    np.testing.assert_array_equal(gradient["heads"]["c"], 0)


def test_an_absent_task_counts_nowhere(x64):
    params, batch = make_params(), make_batch()
    weighting = mtl_jax.mgda()
    state = weighting.init(losses_fn(params, *batch))
    gradient_fn = mtl_jax.representation_value_and_grad(
        encoder, heads, weighting, tasks=TASKS, diagnostics=True
    )
    mask = {"a": jnp.array(True), "b": jnp.array(False), "c": jnp.array(True)}
    value, gradient, _ = gradient_fn(params, state, *batch, mask=mask)
    J = rows_at_z(params, batch)[[0, 2]]
    two = (jnp.float64(1), jnp.float64(1))
    expected, _ = mtl_jax.mgda().update(two, mtl_jax.mgda().init(two), gramian=J @ J.T)
    np.testing.assert_allclose([value.weights[t] for t in "ac"], expected, rtol=1e-10)
    assert value.weights["b"] == 0
    np.testing.assert_array_equal(gradient["heads"]["b"], 0)
    np.testing.assert_allclose(value.diagnostics.norms[::2], np.linalg.norm(J, axis=1))


class Counter:
    def __init__(self):
        self.calls = {}

    def identity(self, name):
        """An identity that counts its forward and its backward passes."""

        def count(what):
            key = f"{name} {what}"
            jax.debug.callback(lambda: self.calls.update({key: self.calls.get(key, 0) + 1}))

        def forward(x):
            count("forward")
            return x, None

        def backward(_, cotangent):
            count("backward")
            return (cotangent,)

        identity = jax.custom_vjp(lambda x: x)
        identity.defvjp(forward, backward)
        return identity

    def since(self):
        jax.effects_barrier()
        calls, self.calls = self.calls, {}
        return calls


@pytest.mark.parametrize("k", [1, 3])
def test_one_pass_through_the_encoder_and_k_steps_between_gramians(k):
    counter = Counter()
    params, batch = make_params(dtype=jnp.float32), make_batch(dtype=jnp.float32)
    at_z, at_losses = counter.identity("encoder"), counter.identity("heads")

    def counted_encoder(params, *batch):
        z = encoder(params, *batch)
        return z | {"two": at_z(z["two"])}

    def counted_heads(params, zs, *batch):
        losses = heads(params, zs, *batch)
        return losses | {"b": at_losses(losses["b"])}

    weighting = row_sums() if k == 1 else mtl_jax.every(row_sums(), k)
    gradient_fn = jax.jit(
        mtl_jax.representation_value_and_grad(
            counted_encoder, counted_heads, weighting, tasks=TASKS
        )
    )
    state = weighting.init(losses_fn(params, *batch))
    calls = []
    for _ in range(4):
        value, gradient, state = gradient_fn(params, state, *batch)
        calls.append(counter.since())
        expected = jax.grad(
            lambda p, w=value.weights: sum(
                w[task] * loss for task, loss in losses_fn(p, *batch).items()
            )
        )(params)
        np.testing.assert_allclose(flat(gradient), flat(expected), rtol=1e-4, atol=1e-6)
    for call in calls:
        assert call["encoder forward"] == call["encoder backward"] == call["heads forward"] == 1
    backward = [call["heads backward"] for call in calls]
    # Once for the gradients at z, once for the heads' own; or weighted ones at once.
    assert all(1 <= count <= 3 for count in backward)
    if k == 3:
        assert backward[1] == backward[2] < backward[0] == backward[3]


def test_aux_and_the_train_step():
    """A model state that the encoder renews, and an aux output of the heads."""
    params, batch = make_params(dtype=jnp.float32), make_batch(dtype=jnp.float32)
    weighting, optimizer = mtl_jax.every(row_sums(), 2), optax.sgd(1e-3)

    def stateful_encoder(params, model_state, *batch):
        return encoder(params, *batch), model_state + 1

    def stateful_heads(params, zs, model_state, *batch):
        losses = heads(params, zs, *batch)
        return losses, model_state * 10

    gradient_fn = mtl_jax.representation_value_and_grad(
        stateful_encoder, stateful_heads, weighting, tasks=TASKS, has_aux=True
    )
    train_step = mtl_jax.make_train_step(
        gradient_fn, optimizer, weighting, new_model_state=lambda aux: aux[0]
    )
    state = mtl_jax.TrainState.create(
        params, optimizer, weighting, losses_fn(params, *batch), model_state=jnp.array(0)
    )
    first = None
    for _ in range(5):
        state, value = train_step(state, *batch)
        first = first or sum(value.losses.values())
    assert state.model_state == 5
    assert value.aux == (5, 40)
    assert sum(value.losses.values()) < first


def test_a_state_is_kept_if_the_gradient_is_not_finite():
    weighting = mtl_jax.ema(row_sums(), 0.5)

    def fragile(params, x):
        return jnp.sqrt(params) * x

    def heads(params, zs, x):
        return {task: jnp.sum(z**2 + z) for task, z in zs.items()}

    gradient_fn = mtl_jax.representation_value_and_grad(fragile, heads, weighting, tasks=("a",))
    state = weighting.init({"a": 0.0})
    _, _, after = gradient_fn(jnp.array([1.0, 0.0]), state, jnp.ones(2))
    jax.tree.map(np.testing.assert_array_equal, after, state)


def test_check_heads():
    params, batch = make_params(dtype=jnp.float32), make_batch(dtype=jnp.float32)
    z = encoder(params, *batch)
    mtl_jax.check_heads(heads, params, z, *batch, tasks=TASKS)

    def crossed(params, zs, *batch):
        losses = heads(params, zs, *batch)
        return losses | {"c": losses["c"] + losses["a"] * 0.1}, "aux"

    with pytest.raises(ValueError, match="loss of 'c' depends on the representation of 'a'"):
        mtl_jax.check_heads(crossed, params, z, *batch, tasks=TASKS, has_aux=True)


def test_errors():
    params, batch = make_params(dtype=jnp.float32), make_batch(dtype=jnp.float32)
    weighting = mtl_jax.mgda()

    def make(**options):
        options = {"tasks": TASKS} | options
        return mtl_jax.representation_value_and_grad(encoder, heads, weighting, **options)

    for tasks in ((), ("a", "a")):
        with pytest.raises(ValueError, match="must name at least one task, and none twice"):
            make(tasks=tasks)
    with pytest.raises(ValueError, match="`head_gradient` must be 'weighted' or 'unweighted'"):
        make(head_gradient="both")
    with pytest.raises(ValueError, match="`gramian` must be 'representation' or 'encoder'"):
        make(gramian="parameters")
    with pytest.raises(ValueError, match="`rows` must be one of"):
        make(rows="none")
    with pytest.raises(TypeError, match="got an Aggregator"):
        mtl_jax.representation_value_and_grad(encoder, heads, mtl_jax.graddrop(), tasks=TASKS)
    state = weighting.init(losses_fn(params, *batch))
    with pytest.raises(ValueError, match=r"losses of the tasks \['a', 'b'\], got \['a', 'b', 'c'"):
        mtl_jax.representation_value_and_grad(
            encoder,
            lambda params, zs, *batch: {t: jnp.sum(zs["a"]["one"]) for t in TASKS},
            weighting,
            tasks=("a", "b"),
        )(params, state, *batch)
    with pytest.raises(TypeError, match=r"`encoder` must return a pair \(z, aux\), got dict"):
        make(has_aux=True)(params, state, *batch)
