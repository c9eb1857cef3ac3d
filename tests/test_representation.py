"""The Gramian at a representation."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict

import mtl_jax

TASKS = ("a", "b", "c")


def make_params(tasks=TASKS, dtype=np.float64):
    rng = np.random.default_rng(0)
    params = {
        "encoder": {"one": rng.normal(size=(4, 5)), "two": rng.normal(size=(4, 3))},
        "heads": rng.normal(size=(len(tasks), 8)),
        "temperature": np.float64(0.7),  # used by the encoder and by every head
    }
    return jax.tree.map(dtype, params)


def make_batch(tasks=TASKS, dtype=np.float64):
    rng = np.random.default_rng(1)
    batch = rng.normal(size=(6, 4)), rng.normal(size=(len(tasks), 6))
    return jax.tree.map(dtype, batch)


def encoder(params, x, y):
    """A representation with two leaves."""
    scale = params["temperature"]
    return {name: jnp.tanh(scale * (x @ kernel)) for name, kernel in params["encoder"].items()}


def heads(params, zs, x, y):
    def loss(k, z):
        z = jnp.concatenate([z["one"], z["two"]], axis=1)
        return jnp.mean((params["temperature"] * (z @ params["heads"][k]) - y[k]) ** 2)

    return {task: loss(k, zs[task]) for k, task in enumerate(sorted(zs))}


def names_of(params):
    return tuple("abcdefg"[: len(params["heads"])])


def losses_fn(params, x, y):
    z = encoder(params, x, y)
    return heads(params, dict.fromkeys(names_of(params), z), x, y)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def row_sums():
    """A weighting that shows the Gramian it was given: the sums of its rows, also its state."""

    def update(losses, state, present, steps, gramian):
        sums = jnp.sum(gramian, axis=1)
        return sums, sums

    return mtl_jax.vector_weighting(
        update, lambda tasks, key: tasks.full(0), needs=mtl_jax.Signal.GRAMIAN
    )


ROW_SUMS = row_sums()


def total(losses, weights):
    return sum(weights[task] * loss for task, loss in losses.items())


@jax.jit
def weighted_gradient(params, weights, *batch):
    """The gradient of the weighted sum of the losses."""
    return jax.grad(lambda params: total(losses_fn(params, *batch), weights))(params)


@jax.jit
def gradient_at_z(params, weights, *batch):
    def of_z(z):
        return total(heads(params, dict.fromkeys(names_of(params), z), *batch), weights)

    return jax.grad(of_z)(encoder(params, *batch))


@jax.jit
def gradient_through_encoder(params, weights, *batch):
    """Through the encoder alone: the heads' parameters are held."""

    def through_encoder(changed):
        z = encoder(changed, *batch)
        return total(heads(params, dict.fromkeys(names_of(params), z), *batch), weights)

    return jax.grad(through_encoder)(params)


def rows_of(gradient, params, batch):
    """The gradient of each task's loss alone."""
    tasks = names_of(params)
    return [gradient(params, {t: float(t == task) for t in tasks}, *batch) for task in tasks]


@pytest.mark.parametrize("tasks", [TASKS, tuple("abcdefg")])
def test_gramian_at_z_and_gradient_over_all_parameters(x64, tasks):
    params, batch = make_params(tasks), make_batch(tasks)
    gradient_fn = mtl_jax.representation_value_and_grad(encoder, heads, ROW_SUMS, tasks=tasks)
    state = gradient_fn.init(params, *batch)
    value, gradient, _ = jax.jit(gradient_fn.update)(params, state, *batch)
    J = np.stack([flat(row) for row in rows_of(gradient_at_z, params, batch)])
    np.testing.assert_allclose(value.gramian, J @ J.T, rtol=1e-12, atol=1e-14)
    expected = weighted_gradient(params, value.weights, *batch)
    np.testing.assert_allclose(flat(gradient), flat(expected), rtol=1e-12, atol=1e-14)
    losses = jax.jit(losses_fn)(params, *batch)
    np.testing.assert_allclose(flat(value.losses), flat(losses), rtol=1e-14)


def over_the_encoder(rows, shared):
    """A gradient with the Gramian over the parameters of the encoder."""
    return mtl_jax.representation_value_and_grad(
        encoder, heads, ROW_SUMS, tasks=TASKS_OF[rows], gramian="encoder", shared=shared, rows=rows
    )


TASKS_OF = dict.fromkeys(("auto", "unrolled", "map", "vmap", "low_memory"), TASKS)
TASKS_OF |= dict.fromkeys((2, 3), tuple("abcdefg"))


def only_one(path):
    return path == "encoder/one"


@pytest.mark.parametrize(
    ("rows", "shared"),
    [
        *(
            (rows, shared)
            for rows in TASKS_OF
            if isinstance(rows, str)
            for shared in (None, only_one)
        ),
        (2, None),
        (3, only_one),
    ],
)
def test_gramian_over_the_parameters_of_the_encoder(x64, rows, shared):
    params, batch = make_params(TASKS_OF[rows]), make_batch(TASKS_OF[rows])
    gradient_fn = over_the_encoder(rows, shared)
    state = gradient_fn.init(params, *batch)
    if rows == "auto":  # the same program
        texts = [
            str(jax.make_jaxpr(over_the_encoder(rows, shared).update)(params, state, *batch))
            for rows in ("auto", "unrolled", "map")
        ]
        assert texts[0] == texts[1] != texts[2]
        return
    value, gradient, _ = jax.jit(gradient_fn.update)(params, state, *batch)
    gradients = rows_of(gradient_through_encoder, params, batch)
    J = np.stack([flat(g if shared is None else g["encoder"]["one"]) for g in gradients])
    np.testing.assert_allclose(value.gramian, J @ J.T, rtol=1e-12, atol=1e-14)
    expected = weighted_gradient(params, value.weights, *batch)
    np.testing.assert_allclose(flat(gradient), flat(expected), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("make", [mtl_jax.equal, mtl_jax.adaptive])
def test_a_weighting_of_the_losses_gives_what_value_and_grad_gives(x64, make):
    params, batch, weighting = make_params(), make_batch(), make()
    there = mtl_jax.representation_value_and_grad(encoder, heads, weighting, tasks=TASKS)
    here = mtl_jax.value_and_grad(losses_fn, weighting)
    state = there.init(params, *batch)
    value, gradient, _ = jax.jit(there.update)(params, state, *batch)
    expected_value, expected, _ = jax.jit(here.update)(params, here.init(params, *batch), *batch)
    np.testing.assert_allclose(flat(gradient), flat(expected), rtol=1e-12)
    np.testing.assert_allclose(flat(value.weights), flat(expected_value.weights))
    assert value.gramian is None


def test_unweighted_heads(x64):
    params, batch = make_params(), make_batch()
    weighting = mtl_jax.constant({"a": 2.0, "b": 0.5, "c": 3.0})
    gradient_fn = mtl_jax.representation_value_and_grad(
        encoder, heads, weighting, tasks=TASKS, head_gradient="unweighted"
    )
    state = gradient_fn.init(params, *batch)
    mask = {"a": True, "b": True, "c": False}
    _, gradient, _ = jax.jit(gradient_fn.update)(params, state, *batch, mask=mask)
    plain = weighted_gradient(params, {"a": 1.0, "b": 1.0, "c": 0.0}, *batch)
    weighted = weighted_gradient(params, {"a": 2.0, "b": 0.5, "c": 0.0}, *batch)
    np.testing.assert_allclose(flat(gradient["heads"]), flat(plain["heads"]), rtol=1e-12)
    np.testing.assert_allclose(flat(gradient["encoder"]), flat(weighted["encoder"]), rtol=1e-12)
    np.testing.assert_array_equal(gradient["heads"][2], 0)


def test_an_absent_task_counts_nowhere(x64):
    params, batch = make_params(), make_batch()
    weighting = mtl_jax.imtl_g()
    gradient_fn = mtl_jax.representation_value_and_grad(
        encoder, heads, weighting, tasks=TASKS, diagnostics=True
    )
    state = gradient_fn.init(params, *batch)
    mask = {"a": True, "b": False, "c": True}
    value, gradient, _ = jax.jit(gradient_fn.update)(params, state, *batch, mask=mask)
    J = np.stack([flat(row) for row in rows_of(gradient_at_z, params, batch)])[[0, 2]]
    two = (np.float64(1), np.float64(1))
    expected, _ = weighting.update(two, weighting.init(two), gramian=J @ J.T)
    np.testing.assert_allclose([value.weights[t] for t in "ac"], expected, rtol=1e-10)
    assert value.weights["b"] == 0
    np.testing.assert_array_equal(gradient["heads"][1], 0)
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
    params, batch = make_params(dtype=np.float32), make_batch(dtype=np.float32)
    at_z, at_losses = counter.identity("encoder"), counter.identity("heads")

    def counted_encoder(params, *batch):
        z = encoder(params, *batch)
        return z | {"two": at_z(z["two"])}

    def counted_heads(params, zs, *batch):
        losses = heads(params, zs, *batch)
        return losses | {"b": at_losses(losses["b"])}

    weighting = ROW_SUMS if k == 1 else mtl_jax.every(ROW_SUMS, k)
    gradient_fn = mtl_jax.representation_value_and_grad(
        counted_encoder, counted_heads, weighting, tasks=TASKS
    )
    state = gradient_fn.init(params, *batch)
    assert counter.since() == {}  # the losses were traced, not computed
    update = jax.jit(gradient_fn.update)
    calls = []
    for step in range(4):
        value, gradient, state = update(params, state, *batch)
        calls.append(counter.since())
        assert value.measured == (step % k == 0)
        expected = weighted_gradient(params, value.weights, *batch)
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
    params, batch = make_params(dtype=np.float32), make_batch(dtype=np.float32)

    def stateful_encoder(params, model_state, *batch):
        return encoder(params, *batch), model_state + 1

    def stateful_heads(params, zs, model_state, *batch):
        losses = heads(params, zs, *batch)
        return losses, model_state * 10

    gradient_fn = mtl_jax.representation_value_and_grad(
        stateful_encoder, stateful_heads, mtl_jax.every(ROW_SUMS, 2), tasks=TASKS, has_aux=True
    )
    train_step = mtl_jax.make_train_step(
        gradient_fn, optax.sgd(1e-3), new_model_state=lambda aux: aux[0]
    )
    state = train_step.init(params, *batch, model_state=jnp.array(0))
    first = None
    for _ in range(5):
        state, value = train_step(state, *batch)
        first = first or sum(value.losses.values())
    assert state.model_state == 5
    assert value.aux == (5, 40)
    assert sum(value.losses.values()) < first


def test_a_state_is_kept_if_the_gradient_is_not_finite():
    weighting = mtl_jax.ema(ROW_SUMS, 0.5)

    def fragile(params, x):
        return jnp.sqrt(params) * x

    def heads(params, zs, x):
        return {task: jnp.sum(z**2 + z) for task, z in zs.items()}

    gradient_fn = mtl_jax.representation_value_and_grad(fragile, heads, weighting, tasks=("a",))
    params, x = np.array([1.0, 0.0], np.float32), np.ones(2, np.float32)
    state = gradient_fn.init(params, x)
    value, _, after = jax.jit(gradient_fn.update)(params, state, x)
    jax.tree.map(np.testing.assert_array_equal, after, state)
    assert not value.finite


def test_check_heads():
    params, batch = make_params(dtype=np.float32), make_batch(dtype=np.float32)
    z = jax.jit(encoder)(params, *batch)
    mtl_jax.check_heads(heads, params, z, *batch, tasks=TASKS)

    def crossed(params, zs, *batch):
        losses = heads(params, zs, *batch)
        return losses | {"c": losses["c"] + losses["a"] * 0.1}, "aux"

    with pytest.raises(ValueError, match="loss of 'c' depends on the representation of 'a'"):
        mtl_jax.check_heads(crossed, params, z, *batch, tasks=TASKS, has_aux=True)


# Kinds of dictionaries: each orders its entries in its own way.
DICTIONARIES = {
    "OrderedDict": lambda losses: collections.OrderedDict(reversed(losses.items())),
    "defaultdict": lambda losses: collections.defaultdict(float, reversed(losses.items())),
    "FrozenDict": lambda losses: FrozenDict(dict(reversed(losses.items()))),
}


@pytest.mark.parametrize("kind", DICTIONARIES)
def test_losses_in_any_kind_of_dictionary(kind):
    """They are returned in it, and checked as those in a plain one."""
    params, batch = make_params(dtype=np.float32), make_batch(dtype=np.float32)
    wrap = DICTIONARIES[kind]
    found = {}
    for name, fn in (("plain", heads), (kind, lambda *args: wrap(heads(*args)))):
        gradient = mtl_jax.representation_value_and_grad(
            encoder, fn, ROW_SUMS, tasks=("c", "a", "b")
        )
        state = gradient.init(params, *batch)
        found[name] = jax.jit(gradient.update)(params, state, *batch)
    (plain, expected, _), (value, grads, _) = found["plain"], found[kind]
    assert isinstance(value.weights, type(wrap({})))
    for task in TASKS:
        np.testing.assert_allclose(value.weights[task], plain.weights[task], rtol=1e-5)
    np.testing.assert_allclose(flat(grads), flat(expected), rtol=1e-5, atol=1e-6)

    z = jax.jit(encoder)(params, *batch)
    mtl_jax.check_heads(lambda *args: wrap(heads(*args)), params, z, *batch, tasks=("c", "a", "b"))

    def crossed(params, zs, *batch):
        losses = heads(params, zs, *batch)
        return wrap(losses | {"c": losses["c"] + losses["a"] * 0.1})

    with pytest.raises(ValueError, match="loss of 'c' depends on the representation of 'a'"):
        mtl_jax.check_heads(crossed, params, z, *batch, tasks=TASKS)
    with pytest.raises(ValueError, match=r"losses of the tasks \['a', 'b', 'c'\], got \['x'\]"):
        mtl_jax.check_heads(lambda *_: wrap({"x": 1.0}), params, z, *batch, tasks=TASKS)


def test_errors():
    params, batch = make_params(dtype=np.float32), make_batch(dtype=np.float32)
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
    with pytest.raises(TypeError, match="reads the task gradients by the parameters"):
        mtl_jax.representation_value_and_grad(encoder, heads, mtl_jax.excess_mtl(), tasks=TASKS)
    state = make().init(params, *batch)
    with pytest.raises(ValueError, match=r"losses of the tasks \['a', 'b'\], got \['a', 'b', 'c'"):
        mtl_jax.representation_value_and_grad(
            encoder,
            lambda params, zs, *batch: {t: jnp.sum(zs["a"]["one"]) for t in TASKS},
            weighting,
            tasks=("a", "b"),
        )(params, state, *batch)
    with pytest.raises(TypeError, match=r"`encoder` must return a pair \(z, aux\), got dict"):
        make(has_aux=True)(params, state, *batch)
