"""value_and_grad: the right gradient, from exactly one forward and one backward pass."""

import collections
import functools
from typing import Any, NamedTuple

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mtl_jax

KEY = jax.random.key(3)
TASKS = ("a", "b", "c")
X = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
PARAMS = jax.tree.map(
    np.float32,
    {
        "encoder": {"kernel": np.linspace(-1, 1, 12).reshape(4, 3), "bias": np.zeros((1, 3))},
        "heads": [np.array([[0.5, -1, 2], [1, 1, 0], [1, 1, 1]])],
    },
)
EVERYBODY = dict.fromkeys(TASKS, True)
LOSSES = dict.fromkeys(TASKS, np.float32(0))


def losses_fn(params, x):
    """One row of `heads` for each task."""
    z = jnp.tanh(x @ params["encoder"]["kernel"] + params["encoder"]["bias"])
    losses = jnp.arange(1.0, 4) * jnp.mean((params["heads"][0] @ z.T - 1) ** 2, axis=1)
    return dict(zip(TASKS, jnp.unstack(losses.astype(z.dtype)), strict=True))


@functools.partial(jax.jit, static_argnames="losses_fn")
def weighted_gradient(params, weights, *args, losses_fn=losses_fn):
    """The gradient of the weighted sum of the losses."""

    def total(params):
        losses = losses_fn(params, *args)
        return sum(weights[task] * losses[task] for task in losses)

    return jax.grad(total)(params)


WEIGHTINGS = {
    "equal": mtl_jax.equal(),
    "constant": mtl_jax.constant({"a": 0.5, "b": 1.0, "c": 1.5}),
    "adaptive": mtl_jax.adaptive(),
    "adaptive[emphasis=2,decay=0.9]": mtl_jax.adaptive(2.0, decay=0.9),
    "dwa": mtl_jax.dwa(2),
    "uncertainty": mtl_jax.uncertainty(optax.adam(0.05)),
    "geometric": mtl_jax.geometric(),
    "stch": mtl_jax.stch(warmup=3),
    "relobralo": mtl_jax.relobralo(alpha=0.9),
    "random_weighting": mtl_jax.random_weighting(),
    "famo": mtl_jax.famo(),
}


@functools.cache
def program(name):
    """The compiled gradient of :func:`losses_fn`."""
    return jax.jit(mtl_jax.value_and_grad(losses_fn, WEIGHTINGS[name]).update)


def initial(name):
    return WEIGHTINGS[name].init(LOSSES, key=KEY)


plain_losses = jax.jit(losses_fn)


def assert_trees_close(actual, expected, rtol=1e-5, atol=1e-6):
    """Equal up to rounding, which goes with the largest entry of a leaf."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)

    def check(actual, expected):
        largest = np.max(np.abs(expected), initial=0)
        np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol + rtol * largest / 10)

    jax.tree.map(check, actual, expected)


def assert_same_state(actual, expected):
    def data(leaf):
        key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if key else leaf)

    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(data(a), data(b)), actual, expected)


# The gradient


@pytest.mark.parametrize(
    "name",
    [
        "equal",
        "constant",
        "adaptive",
        "uncertainty",
        "geometric",
        "stch",
        "relobralo",
        "random_weighting",
        "famo",
    ],
)
def test_the_gradient_is_that_of_the_sum_with_the_reported_weights(name):
    weighting = WEIGHTINGS[name]
    state = initial(name)
    expected_state = state
    for step in range(4):
        x = X * np.float32(1 + step)
        value, gradient, state = program(name)(PARAMS, state, x, mask=EVERYBODY)
        weights, expected_state = weighting.update(value.losses, expected_state)
        assert_trees_close(value.losses, plain_losses(PARAMS, x))
        assert_trees_close(value.weights, weights)
        assert_trees_close(gradient, weighted_gradient(PARAMS, value.weights, x))
        assert value.aux is None
        assert value.finite


def test_no_gradient_flows_through_the_weights():
    """The derivative of the weights would change the gradient by much: sum_k w'_k L_k."""

    @jax.jit
    @jax.grad
    def leaking(params):
        losses = losses_fn(params, X)
        total = sum(losses.values())
        return sum(3 * loss / total * loss for loss in losses.values())

    _, gradient, _ = program("adaptive")(PARAMS, initial("adaptive"), X, mask=EVERYBODY)
    leaked = leaking(PARAMS)
    difference = jax.tree.map(lambda g, h: np.max(np.abs(g - h)), gradient, leaked)
    assert max(jax.tree.leaves(difference)) > 0.1


def test_a_total_that_is_known_is_differentiated():
    """The geometric mean's own gradient."""

    @jax.jit
    @jax.grad
    def geometric_mean(params):
        losses = losses_fn(params, X)
        return (losses["a"] * losses["b"] * losses["c"]) ** (1 / 3)

    _, gradient, _ = program("geometric")(PARAMS, initial("geometric"), X, mask=EVERYBODY)
    assert_trees_close(gradient, geometric_mean(PARAMS))


def test_aux_is_returned_and_not_differentiated():
    def with_aux(params, x):
        losses = losses_fn(params, x)
        return losses, {"sum": sum(losses.values()), "batch": x}

    gradient_fn = mtl_jax.value_and_grad(with_aux, WEIGHTINGS["adaptive"], has_aux=True)
    state = gradient_fn.init(PARAMS, X)
    value, gradient, _ = jax.jit(gradient_fn.update)(PARAMS, state, X)
    plain, expected, _ = program("adaptive")(PARAMS, state, X, mask=EVERYBODY)
    np.testing.assert_allclose(value.aux["sum"], sum(plain.losses.values()), rtol=1e-6)
    np.testing.assert_array_equal(value.aux["batch"], X)
    assert_trees_close(gradient, expected)
    assert_trees_close(jax.jit(gradient_fn.losses)(PARAMS, X), plain.losses)


def test_the_mask_reaches_the_weighting():
    mask = {"a": True, "b": False, "c": True}
    value, gradient, new_state = program("adaptive")(PARAMS, initial("adaptive"), X, mask=mask)
    assert value.weights["b"] == 0
    np.testing.assert_allclose(value.weights["a"] + value.weights["c"], 2, rtol=1e-6)
    np.testing.assert_array_equal(new_state.steps, [1, 0, 1])
    assert_trees_close(gradient, weighted_gradient(PARAMS, value.weights, X))
    np.testing.assert_array_equal(gradient["heads"][0][1], 0)


def test_nobody_present_is_a_gradient_of_zero():
    nobody, state = dict.fromkeys(TASKS, False), initial("adaptive")
    _, gradient, new_state = program("adaptive")(PARAMS, state, X, mask=nobody)
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0), gradient)
    assert_same_state(new_state, state)


@pytest.mark.parametrize("name", ["equal", "adaptive", "geometric", "famo"])
def test_an_absent_task_with_masked_mean_leaves_the_gradient_finite(name):
    def masked_losses(params, x, present):
        z = jnp.tanh(x @ params["encoder"]["kernel"])
        return {
            task: mtl_jax.masked_mean((z @ head - 1) ** 2, present[task])
            for task, head in zip(TASKS, params["heads"][0], strict=True)
        }

    present = {"a": np.ones(5, bool), "b": np.zeros(5, bool), "c": np.arange(5) < 2}
    mask = jax.tree.map(np.any, present)
    gradient_fn = mtl_jax.value_and_grad(masked_losses, WEIGHTINGS[name])
    state = gradient_fn.init(PARAMS, X, present)
    value, gradient, _ = jax.jit(gradient_fn.update)(PARAMS, state, X, present, mask=mask)
    assert value.weights["b"] == 0
    assert value.weights["a"] > 0
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
    assert np.any(gradient["encoder"]["kernel"] != 0)


# The price: one forward and one backward pass


def mlp_losses(params, x, number):
    h = x
    for kernel in params["encoder"]:
        h = jax.nn.relu(h @ kernel)
    outputs = jnp.reshape(h @ params["heads"], (len(x), number, 8))
    losses = jnp.unstack(jnp.mean(outputs**2, axis=(0, 2)))
    return {f"task{k:02}": loss for k, loss in enumerate(losses)}


def mlp_shapes(number, width=96):
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    return {"encoder": [shape((width, width))] * 3, "heads": shape((width, 8 * number))}


def flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


@functools.cache
def plain_flops(number):
    def total(params, x):
        return sum(mlp_losses(params, x, number).values())

    x = jax.ShapeDtypeStruct((64, 96), jnp.float32)
    return flops(jax.value_and_grad(total), mlp_shapes(number), x)


@pytest.mark.parametrize("number", [2, 5, 20])
@pytest.mark.parametrize("method", ["adaptive", "uncertainty"])
def test_flops_are_those_of_plain_training(method, number):
    gradient_fn = mtl_jax.value_and_grad(
        functools.partial(mlp_losses, number=number), WEIGHTINGS[method]
    )
    args = mlp_shapes(number), jax.ShapeDtypeStruct((64, 96), jnp.float32)
    state = jax.eval_shape(gradient_fn.init, *args)
    plain = plain_flops(number)
    ours = flops(gradient_fn.update, args[0], state, args[1])
    assert plain > 6 * 64 * 96 * 96 * 2  # the passes are in the count
    assert 0.99 < ours / plain < 1.01


def counted_identity(calls):
    """The identity, which counts the passes at run time; by a callback, in this test only."""

    def count(which):
        jax.debug.callback(lambda: calls.update([which]))

    @jax.custom_vjp
    def identity(x):
        count("primal")
        return x

    def forward(x):
        count("forward")
        return x, None

    def backward(_, cotangent):
        count("backward")
        return (cotangent,)

    identity.defvjp(forward, backward)
    return identity


@pytest.mark.parametrize("number", [1, 2, 5, 20])
@pytest.mark.parametrize("jit", [True, False])
def test_one_forward_and_one_backward_pass_are_run(number, jit):
    calls = collections.Counter()
    identity = counted_identity(calls)

    def losses_fn(params, x):
        h = identity(x @ params["encoder"])
        return list(jnp.unstack(jnp.mean((h @ params["heads"]) ** 2, axis=0)))

    params = {"encoder": np.ones((6, 6), np.float32), "heads": np.ones((6, number), np.float32)}
    x = np.ones((3, 6), np.float32)
    gradient_fn = mtl_jax.value_and_grad(losses_fn, WEIGHTINGS["adaptive" if jit else "equal"])
    state = gradient_fn.init(params, x)
    update = jax.jit(gradient_fn.update) if jit else gradient_fn.update
    calls.clear()  # the losses were traced
    jax.block_until_ready(update(params, state, x))
    jax.effects_barrier()
    assert calls == {"forward": 1, "backward": 1}


# What is not finite


def test_a_loss_that_is_not_finite_leaves_the_state_as_it_was():
    name = "adaptive[emphasis=2,decay=0.9]"
    gradient_fn = program(name)
    _, _, state = gradient_fn(PARAMS, initial(name), X, mask=EVERYBODY)
    bad = X.copy()
    bad[0, 0] = np.nan
    value, gradient, after = gradient_fn(PARAMS, state, bad, mask=EVERYBODY)
    assert_same_state(after, state)
    assert all(np.isnan(weight) for weight in value.weights.values())
    assert np.all(np.isnan(gradient["encoder"]["kernel"]))
    assert not value.finite


@pytest.mark.parametrize(
    "name", ["equal", "adaptive[emphasis=2,decay=0.9]", "dwa", "uncertainty", "random_weighting"]
)
def test_a_gradient_that_is_not_finite_leaves_the_state_as_it_was(name):
    """The losses are finite: sqrt at 0."""

    def losses_fn(params, offset):
        return {
            "a": jnp.sqrt(params["w"] * offset) + 1,
            "b": params["w"] ** 2 + 1,
            "c": params["w"] + 2,
        }

    params = {"w": np.float32(1)}
    gradient_fn = jax.jit(mtl_jax.value_and_grad(losses_fn, WEIGHTINGS[name]).update)
    _, _, state = gradient_fn(params, initial(name), 1.0)
    value, gradient, after = gradient_fn({"w": np.float32(0)}, state, 1.0)
    assert all(np.isfinite(loss) for loss in value.losses.values())
    assert all(np.isfinite(weight) for weight in value.weights.values())
    assert not np.isfinite(gradient["w"])
    assert not value.finite
    assert_same_state(after, state)
    _, _, after = gradient_fn(params, state, 1.0)
    assert not np.array_equal(after.steps, state.steps)


# Dtypes


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), PARAMS)
    x, state = X.astype(dtype), initial("adaptive")
    value, gradient, state = program("adaptive")(params, state, x, mask=EVERYBODY)
    assert all(loss.dtype == dtype for loss in jax.tree.leaves(value.losses))
    assert all(weight.dtype == jnp.float32 for weight in jax.tree.leaves(value.weights))
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(gradient))
    exact = weighted_gradient(PARAMS, value.weights, X)
    size = max(float(np.max(np.abs(leaf))) for leaf in jax.tree.leaves(exact))
    wide = jax.tree.map(np.float32, gradient)
    assert_trees_close(wide, exact, rtol=0, atol=8 * float(jnp.finfo(dtype).eps) * size)


def test_mixed_dtypes_of_losses(x64):
    def losses_fn(params):
        return (jnp.sum(params**2).astype(jnp.bfloat16), jnp.sum(params.astype(jnp.float64) ** 2))

    gradient_fn = mtl_jax.value_and_grad(losses_fn, WEIGHTINGS["equal"])
    params = np.array([1.0, 2.0], np.float32)
    value, gradient, _ = jax.jit(gradient_fn.update)(params, gradient_fn.init(params))
    assert [weight.dtype for weight in value.weights] == [jnp.float64] * 2
    np.testing.assert_array_equal(gradient, [4.0, 8.0])
    assert gradient.dtype == jnp.float32


def test_a_loss_that_is_a_python_number():
    """A task switched off by hand, as `0.0`, is a floating-point scalar like any other."""
    gradient_fn = mtl_jax.value_and_grad(
        lambda params: {"a": jnp.sum(params), "b": 0.5}, WEIGHTINGS["equal"]
    )
    params = np.ones(2, np.float32)
    value, gradient, _ = jax.jit(gradient_fn.update)(params, gradient_fn.init(params))
    np.testing.assert_array_equal(gradient, 1)
    assert value.losses["b"] == 0.5


# Under other transformations, and in other libraries


def test_vmap_over_seeds_equals_one_by_one():
    params = {"w": np.random.default_rng(3).normal(size=(3, 4)).astype(np.float32)}

    def losses_fn(params, x):
        return {"a": jnp.mean((x @ params["w"]) ** 2), "b": jnp.mean(jnp.abs(x @ params["w"] - 1))}

    gradient_fn = mtl_jax.value_and_grad(losses_fn, WEIGHTINGS["uncertainty"])
    alone = [{"w": w} for w in params["w"]]
    first = gradient_fn.init(alone[0], X)
    state = jax.vmap(lambda params: gradient_fn.init(params, X))(params)
    many = jax.jit(jax.vmap(gradient_fn.update, in_axes=(0, 0, None)))
    _, _, state = many(params, state, X)
    got = many(params, state, X)
    one = jax.jit(gradient_fn.update)
    for seed, params_of_one in enumerate(alone):
        _, _, state_of_one = one(params_of_one, first, X)
        expected = one(params_of_one, state_of_one, X)
        assert_trees_close(jax.tree.map(lambda leaf, seed=seed: leaf[seed], got), expected)


def test_scan_equals_a_loop():
    gradient_fn = mtl_jax.value_and_grad(losses_fn, WEIGHTINGS["dwa"])

    def step(carry, x):
        params, state = carry
        value, gradient, state = gradient_fn(params, state, x)
        params = jax.tree.map(lambda p, g: p - 0.05 * g, params, gradient)
        return (params, state), value.weights

    batches = X[None] * np.linspace(0.5, 1.5, 6, dtype=np.float32).reshape(6, 1, 1)
    carry = jax.tree.map(jnp.asarray, PARAMS), initial("dwa")
    scanned, weights = jax.jit(lambda carry: jax.lax.scan(step, carry, batches))(carry)
    one = jax.jit(step)
    for k, x in enumerate(batches):
        carry, expected = one(carry, x)
        assert_trees_close({task: weight[k] for task, weight in weights.items()}, expected)
    assert_trees_close(scanned, carry)
    assert weights["a"][5] != weights["a"][0]


def test_flax_linen():
    class Network(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x):
            z = flax.linen.tanh(flax.linen.Dense(3)(x))
            return {task: flax.linen.Dense(1, name=task)(z) for task in TASKS}

    network = Network()
    variables = jax.jit(network.init)(KEY, X)

    def losses_fn(params, x):
        return jax.tree.map(lambda out: jnp.mean((out - 1) ** 2), network.apply(params, x))

    gradient_fn = mtl_jax.value_and_grad(losses_fn, WEIGHTINGS["adaptive"])
    state = gradient_fn.init(variables, X)
    value, gradient, _ = jax.jit(gradient_fn.update)(variables, state, X)
    expected = weighted_gradient(variables, value.weights, X, losses_fn=losses_fn)
    assert_trees_close(gradient, expected)


def test_flax_nnx():
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.encoder = nnx.Linear(4, 3, rngs=rngs)
            self.heads = nnx.Linear(3, len(TASKS), rngs=rngs)

        def __call__(self, x):
            z = jnp.tanh(self.encoder(x))
            return dict(zip(TASKS, jnp.unstack(self.heads(z), axis=1), strict=True))

    graph, params = nnx.split(Network(nnx.Rngs(0)), nnx.Param)

    def losses_fn(params, x):
        outputs = nnx.merge(graph, params, copy=True)(x)
        return {task: jnp.mean((out - 1) ** 2) for task, out in outputs.items()}

    gradient_fn = mtl_jax.value_and_grad(losses_fn, WEIGHTINGS["adaptive"])
    state = gradient_fn.init(params, X)
    value, gradient, _ = jax.jit(gradient_fn.update)(params, state, X)
    expected = weighted_gradient(params, value.weights, X, losses_fn=losses_fn)
    assert_trees_close(gradient, expected)
    assert any(jnp.any(leaf != 0) for leaf in jax.tree.leaves(gradient))


class Normed(nnx.Module):
    def __init__(self, rngs):
        self.encoder = nnx.Linear(4, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)


@pytest.mark.parametrize(
    ("params_of", "name"),
    [
        (lambda model: model, "norm/mean"),
        (nnx.state, "norm/mean"),
        (lambda model: {"inside": [nnx.state(model)]}, "inside/0/norm/mean"),
        (lambda model: {"params": {"w": X}, "batch_stats": {"mean": X}}, "batch_stats"),
    ],
    ids=["the module", "all of its state", "inside", "variables of Linen"],
)
def test_batch_statistics_do_not_become_parameters(params_of, name):
    params = params_of(Normed(nnx.Rngs(0)))

    def losses_fn(params):
        return {"a": sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))}

    gradient = mtl_jax.value_and_grad(losses_fn, WEIGHTINGS["equal"])
    says = f"'{name}' is none of the parameters, but a state.*nnx.split.*variables"
    for call in (gradient.init, lambda params: gradient(params, ())):
        with pytest.raises(TypeError, match=says):
            call(params)
    state = gradient.init(nnx.state(Normed(nnx.Rngs(0)), nnx.Param))
    assert state.tasks.names == ("a",)


def test_the_gradient_goes_into_optax():
    optimizer = optax.adam(0.05)
    gradient_fn = mtl_jax.value_and_grad(losses_fn, WEIGHTINGS["adaptive"])

    @jax.jit
    def train(params):
        def step(carry, _):
            params, opt_state, state = carry
            value, gradient, state = gradient_fn(params, state, X)
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state, state), value.losses

        carry = params, optimizer.init(params), gradient_fn.init(params, X)
        return jax.lax.scan(step, carry, length=50)

    (params, _, _), _ = train(jax.tree.map(jnp.asarray, PARAMS))
    before, after = plain_losses(PARAMS, X), plain_losses(params, X)
    assert all(after[task] < before[task] / 2 for task in TASKS)


# Errors


@pytest.mark.parametrize(
    ("weighting", "says"),
    [
        (mtl_jax.equal, "Expected a Weighting.*mean to call it"),
        (mtl_jax.dwa, "Expected a Weighting.*mean to call it"),
        ("adaptive", "Expected a Weighting.*'adaptive'"),
        (optax.adam(0.1), "Expected a Weighting"),
        (None, "Expected a Weighting"),
        (mtl_jax.equal()._replace(update=mtl_jax.dwa(10).update), "replaced, which would not be"),
    ],
    ids=["equal", "dwa", "string", "optax", "none", "replaced"],
)
def test_something_that_is_no_weighting(weighting, says):
    with pytest.raises(TypeError, match=says):
        mtl_jax.value_and_grad(losses_fn, weighting)


def test_losses_that_are_not_scalars_are_named():
    weighting = WEIGHTINGS["equal"]
    for loss, error, says in (
        (lambda params: params[:, None], ValueError, r"'a' has shape \(3, 1\)"),
        (lambda params: jnp.int32(1), TypeError, "'a' has dtype int32"),
    ):
        gradient_fn = mtl_jax.value_and_grad(
            lambda params, loss=loss: {"a": loss(params)}, weighting
        )
        with pytest.raises(error, match=says):
            gradient_fn(jnp.ones(3), weighting.init({"a": 1.0}))
        with pytest.raises(error, match=says):
            gradient_fn.init(jnp.ones(3))


@pytest.mark.parametrize(
    "output", [{"a": 1.0}, (1.0, 2.0, 3.0), [1.0, 2.0], 1.0], ids=["dict", "triple", "list", "one"]
)
def test_has_aux_without_a_pair(output):
    gradient_fn = mtl_jax.value_and_grad(
        lambda params: jax.tree.map(lambda c: c * jnp.sum(params), output),
        WEIGHTINGS["equal"],
        has_aux=True,
    )
    with pytest.raises(TypeError, match=r"must return a pair \(losses, aux\), got"):
        gradient_fn(jnp.ones(3), WEIGHTINGS["equal"].init({"a": 1.0}))


class Pair(NamedTuple):
    one: Any
    two: Any


@pytest.mark.parametrize(
    "aux",
    [
        lambda params: jnp.sum(params),
        lambda params: {"accuracy": jnp.sum(params)},
        lambda params: {"features": params},
        lambda params: params,
        lambda params: None,
        lambda params: (),
    ],
    ids=["scalar", "dict", "dict of arrays", "array", "nothing", "empty"],
)
@pytest.mark.parametrize("losses", [dict, list, lambda losses: jnp.stack([losses["a"]])])
def test_a_forgotten_has_aux(losses, aux):
    """A scalar in it would become a task: what is no pair of two scalars is refused."""

    def fn(params, x):
        return losses({"a": jnp.sum(params)}), aux(params)

    for one in (fn, mtl_jax.microbatched(fn, 2)):
        gradient_fn = mtl_jax.value_and_grad(one, WEIGHTINGS["equal"])
        with pytest.raises(TypeError, match="Was has_aux=True forgotten, for.*list or a dict"):
            gradient_fn.init(jnp.ones(3), jnp.ones((2, 3)))


def test_losses_that_are_no_forgotten_aux():
    two = {"a": 1.0}, {"b": 2.0}
    for losses in ((1.0, 2.0), [*two], (*two, {"c": 3.0}), Pair(*two), {"x": two}, ({"a": 1.0},)):
        gradient_fn = mtl_jax.value_and_grad(
            lambda params, losses=losses: jax.tree.map(lambda c: c * jnp.sum(params), losses),
            WEIGHTINGS["equal"],
        )
        state = gradient_fn.init(jnp.ones(3))
        assert state.tasks.structure == jax.tree.structure(losses)


def test_a_state_of_another_number_of_tasks():
    weighting = WEIGHTINGS["equal"]
    with pytest.raises(ValueError, match="initialised for 2 tasks.*for 3: a, b, c"):
        mtl_jax.value_and_grad(losses_fn, weighting)(PARAMS, weighting.init((1.0, 1.0)), X)


def test_an_own_state_that_is_drawn_at_the_start():
    """The key need not be kept; and a number of Python in it is compiled once."""

    def init(tasks, key):
        return {"share": jax.random.uniform(key, (tasks.number,)), "count": 0.0}

    def update(losses, state, present, steps):
        return state["share"], state | {"count": state["count"] + 1}

    gradient_fn = mtl_jax.value_and_grad(losses_fn, mtl_jax.vector_weighting(update, init))
    state = gradient_fn.init(PARAMS, X, key=KEY)
    step = jax.jit(gradient_fn)
    for _ in range(3):
        value, _, state = step(PARAMS, state, X)
    share = jax.random.uniform(KEY, (3,))
    np.testing.assert_array_equal([value.weights[task] for task in TASKS], share)
    assert state.inner["count"] == 3
    assert step._cache_size() == 1


def test_a_parameter_that_is_an_integer_is_named():
    weighting = WEIGHTINGS["equal"]
    gradient_fn = mtl_jax.value_and_grad(lambda params: {"a": params["w"] * 1.0}, weighting)
    params = {"w": jnp.ones(()), "table": jnp.arange(3)}
    with pytest.raises(TypeError, match="parameter 'table' has dtype int32"):
        gradient_fn(params, weighting.init({"a": 1.0}))
    with pytest.raises(TypeError, match="parameter 'table' has dtype int32"):
        gradient_fn.init(params)


def test_a_state_of_other_tasks():
    weighting = WEIGHTINGS["equal"]
    with pytest.raises(ValueError, match=r"The state is for \{'x': \*, 'y': \*, 'z': \*\}"):
        mtl_jax.value_and_grad(losses_fn, weighting)(
            PARAMS, weighting.init(dict.fromkeys("xyz", 1.0)), X
        )


def test_the_state_begins_the_same_from_shapes():
    gradient_fn = mtl_jax.value_and_grad(losses_fn, WEIGHTINGS["random_weighting"])
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (PARAMS, X))
    for args in ((PARAMS, X), shapes):
        assert_same_state(gradient_fn.init(*args, key=KEY), initial("random_weighting"))
    with pytest.raises(ValueError, match="random_weighting draws.*key="):
        gradient_fn.init(PARAMS, X)
