"""value_and_grad: the right gradient, from exactly one forward and one backward pass."""

import collections
import functools

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from methods import METHODS

import mtl_jax

KEY = jax.random.key(3)
TASKS = ("a", "b", "c")
X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), jnp.float32)
PARAMS = {
    "encoder": {"kernel": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3), "bias": jnp.zeros((1, 3))},
    "heads": [jnp.array([0.5, -1.0, 2.0]), jnp.array([1.0, 1.0, 0.0]), jnp.ones(3)],
}


def losses_fn(params, x):
    z = jnp.tanh(x @ params["encoder"]["kernel"] + params["encoder"]["bias"])
    return {
        task: (k + 1.0) * jnp.mean((z @ head - 1) ** 2)
        for k, (task, head) in enumerate(zip(TASKS, params["heads"], strict=True))
    }


def weighted_sum(params, weights, *args, losses_fn=losses_fn):
    losses = losses_fn(params, *args)
    return sum(weights[task] * losses[task] for task in losses)


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
    weighting = METHODS[name]()
    gradient_fn = jax.jit(mtl_jax.value_and_grad(losses_fn, weighting))
    state = weighting.init(jax.eval_shape(losses_fn, PARAMS, X), key=KEY)
    expected_state = state
    for step in range(4):
        x = X * (1 + step)
        value, gradient, state = gradient_fn(PARAMS, state, x)
        weights, expected_state = weighting.update(losses_fn(PARAMS, x), expected_state)
        assert_trees_close(value.losses, losses_fn(PARAMS, x))
        assert_trees_close(value.weights, weights)
        assert_trees_close(gradient, jax.grad(weighted_sum)(PARAMS, value.weights, x))
        assert value.aux is None


def test_no_gradient_flows_through_the_weights():
    """The derivative of the weights would change the gradient by much: sum_k w'_k L_k."""
    weighting = mtl_jax.adaptive()

    def leaking(params):
        losses = losses_fn(params, X)
        total = sum(losses.values())
        return sum(3 * loss / total * loss for loss in losses.values())

    state = weighting.init(losses_fn(PARAMS, X))
    _, gradient, _ = mtl_jax.value_and_grad(losses_fn, weighting)(PARAMS, state, X)
    leaked = jax.grad(leaking)(PARAMS)
    difference = jax.tree.map(lambda g, h: jnp.max(jnp.abs(g - h)), gradient, leaked)
    assert max(jax.tree.leaves(difference)) > 0.1


def test_a_total_that_is_known_is_differentiated():
    """The geometric mean's own gradient, and the uncertainty total's at fixed variances."""
    weighting = mtl_jax.geometric()
    state = weighting.init(losses_fn(PARAMS, X))
    _, gradient, _ = mtl_jax.value_and_grad(losses_fn, weighting)(PARAMS, state, X)

    def geometric_mean(params):
        losses = losses_fn(params, X)
        return (losses["a"] * losses["b"] * losses["c"]) ** (1 / 3)

    assert_trees_close(gradient, jax.grad(geometric_mean)(PARAMS))


def test_aux_is_returned_and_not_differentiated():
    def with_aux(params, x):
        losses = losses_fn(params, x)
        return losses, {"sum": sum(losses.values()), "batch": x}

    weighting = mtl_jax.adaptive()
    state = weighting.init(losses_fn(PARAMS, X))
    value, gradient, _ = jax.jit(mtl_jax.value_and_grad(with_aux, weighting, has_aux=True))(
        PARAMS, state, X
    )
    plain, expected, _ = mtl_jax.value_and_grad(losses_fn, weighting)(PARAMS, state, X)
    np.testing.assert_allclose(value.aux["sum"], sum(plain.losses.values()), rtol=1e-6)
    np.testing.assert_array_equal(value.aux["batch"], X)
    assert_trees_close(gradient, expected)


def test_the_mask_reaches_the_weighting():
    weighting = mtl_jax.adaptive()
    state = weighting.init(losses_fn(PARAMS, X))
    mask = {"a": True, "b": False, "c": True}
    value, gradient, new_state = jax.jit(mtl_jax.value_and_grad(losses_fn, weighting))(
        PARAMS, state, X, mask=mask
    )
    assert value.weights["b"] == 0
    np.testing.assert_allclose(value.weights["a"] + value.weights["c"], 2, rtol=1e-6)
    np.testing.assert_array_equal(new_state.steps, [1, 0, 1])
    assert_trees_close(gradient, jax.grad(weighted_sum)(PARAMS, value.weights, X))
    np.testing.assert_array_equal(gradient["heads"][1], 0)


def test_nobody_present_is_a_gradient_of_zero():
    weighting = mtl_jax.adaptive()
    state = weighting.init(losses_fn(PARAMS, X))
    nobody = dict.fromkeys(TASKS, False)
    _, gradient, new_state = mtl_jax.value_and_grad(losses_fn, weighting)(
        PARAMS, state, X, mask=nobody
    )
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0), gradient)
    assert_same_state(new_state, state)


@pytest.mark.parametrize("name", ["equal", "adaptive", "geometric", "famo"])
def test_an_absent_task_with_masked_mean_leaves_the_gradient_finite(name):
    def masked_losses(params, x, present):
        z = jnp.tanh(x @ params["encoder"]["kernel"])
        return {
            task: mtl_jax.masked_mean((z @ head - 1) ** 2, present[task])
            for task, head in zip(TASKS, params["heads"], strict=True)
        }

    weighting = METHODS[name]()
    present = {"a": jnp.ones(5, bool), "b": jnp.zeros(5, bool), "c": jnp.arange(5) < 2}
    mask = jax.tree.map(jnp.any, present)
    state = weighting.init(masked_losses(PARAMS, X, present))
    value, gradient, _ = mtl_jax.value_and_grad(masked_losses, weighting)(
        PARAMS, state, X, present, mask=mask
    )
    assert value.weights["b"] == 0
    assert value.weights["a"] > 0
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
    assert jnp.any(gradient["encoder"]["kernel"] != 0)


# The price: one forward and one backward pass


def mlp_losses(params, x, number):
    h = x
    for kernel in params["encoder"]:
        h = jax.nn.relu(h @ kernel)
    return {f"task{k}": jnp.mean((h @ params["heads"][k]) ** 2) for k in range(number)}


def mlp_params(number, width=96):
    keys = jax.random.split(KEY, 3 + number)
    encoder = [jax.random.normal(key, (width, width)) / width**0.5 for key in keys[:3]]
    return {"encoder": encoder, "heads": [jax.random.normal(key, (width, 8)) for key in keys[3:]]}


def flops(function, *args):
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("number", [2, 5, 20])
@pytest.mark.parametrize("method", ["adaptive", "uncertainty"])
def test_flops_are_those_of_plain_training(method, number):
    losses_fn = functools.partial(mlp_losses, number=number)
    params, x = mlp_params(number), jnp.ones((64, 96))
    weighting = METHODS[method]()
    state = weighting.init(jax.eval_shape(losses_fn, params, x))
    plain = flops(
        jax.value_and_grad(lambda params, x: sum(losses_fn(params, x).values())), params, x
    )
    ours = flops(mtl_jax.value_and_grad(losses_fn, weighting), params, state, x)
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
        h = identity(x @ params["encoder"][0])
        return [jnp.mean((h @ head) ** 2) for head in params["heads"]]

    weighting = mtl_jax.adaptive()
    params, x = mlp_params(number, width=6), jnp.ones((3, 6))
    state = weighting.init(jax.eval_shape(losses_fn, params, x))
    gradient_fn = mtl_jax.value_and_grad(losses_fn, weighting)
    jax.block_until_ready((jax.jit(gradient_fn) if jit else gradient_fn)(params, state, x))
    jax.effects_barrier()
    assert calls == {"forward": 1, "backward": 1}


# What is not finite


def test_a_loss_that_is_not_finite_leaves_the_state_as_it_was():
    weighting = mtl_jax.adaptive(decay=0.9)
    state = weighting.init(losses_fn(PARAMS, X))
    gradient_fn = jax.jit(mtl_jax.value_and_grad(losses_fn, weighting))
    _, _, state = gradient_fn(PARAMS, state, X)
    value, gradient, after = gradient_fn(PARAMS, state, X.at[0, 0].set(jnp.nan))
    assert_same_state(after, state)
    assert all(jnp.isnan(weight) for weight in value.weights.values())
    assert jnp.all(jnp.isnan(gradient["encoder"]["kernel"]))


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

    weighting = METHODS[name]()
    params = {"w": jnp.float32(1)}
    state = weighting.init(losses_fn(params, 1.0), key=KEY)
    gradient_fn = jax.jit(mtl_jax.value_and_grad(losses_fn, weighting))
    _, _, state = gradient_fn(params, state, 1.0)
    value, gradient, after = gradient_fn({"w": jnp.float32(0)}, state, 1.0)
    assert all(jnp.isfinite(loss) for loss in value.losses.values())
    assert all(jnp.isfinite(weight) for weight in value.weights.values())
    assert not jnp.isfinite(gradient["w"])
    assert_same_state(after, state)
    _, _, after = gradient_fn(params, state, 1.0)
    assert not np.array_equal(after.steps, state.steps)


# Dtypes


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(dtype):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), PARAMS)
    weighting = mtl_jax.adaptive()
    losses = losses_fn(params, X.astype(dtype))
    state = weighting.init(losses)
    value, gradient, state = jax.jit(mtl_jax.value_and_grad(losses_fn, weighting))(
        params, state, X.astype(dtype)
    )
    assert all(loss.dtype == dtype for loss in jax.tree.leaves(value.losses))
    assert all(weight.dtype == jnp.float32 for weight in jax.tree.leaves(value.weights))
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(gradient))
    exact = jax.grad(weighted_sum)(PARAMS, value.weights, X)
    size = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(exact))
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gradient)
    assert_trees_close(wide, exact, rtol=0, atol=8 * float(jnp.finfo(dtype).eps) * size)


def test_mixed_dtypes_of_losses(x64):
    def losses_fn(params):
        return (jnp.sum(params**2).astype(jnp.bfloat16), jnp.sum(params.astype(jnp.float64) ** 2))

    weighting = mtl_jax.equal()
    params = jnp.array([1.0, 2.0], jnp.float32)
    value, gradient, _ = mtl_jax.value_and_grad(losses_fn, weighting)(
        params, weighting.init(losses_fn(params))
    )
    assert [weight.dtype for weight in value.weights] == [jnp.float64] * 2
    np.testing.assert_array_equal(gradient, [4.0, 8.0])
    assert gradient.dtype == jnp.float32


def test_a_loss_that_is_a_python_number():
    """A task switched off by hand, as `0.0`, is a floating-point scalar like any other."""
    weighting = mtl_jax.equal()
    value, gradient, _ = mtl_jax.value_and_grad(
        lambda params: {"a": jnp.sum(params), "b": 0.5}, weighting
    )(jnp.ones(2), weighting.init({"a": 1.0, "b": 1.0}))
    np.testing.assert_array_equal(gradient, 1)
    assert value.losses["b"] == 0.5


# Under other transformations, and in other libraries


def test_vmap_over_seeds_equals_one_by_one():
    weighting = mtl_jax.uncertainty(optax.adam(0.1))
    params = jax.vmap(lambda key: {"w": jax.random.normal(key, (4,))})(jax.random.split(KEY, 3))

    def losses_fn(params, x):
        return {"a": jnp.mean((x @ params["w"]) ** 2), "b": jnp.mean(jnp.abs(x @ params["w"] - 1))}

    shapes = {"a": 1.0, "b": 1.0}
    gradient_fn = mtl_jax.value_and_grad(losses_fn, weighting)
    state = jax.vmap(lambda _: weighting.init(shapes))(jnp.arange(3))
    many = jax.jit(jax.vmap(gradient_fn, in_axes=(0, 0, None)))
    _, _, state = many(params, state, X)
    got = many(params, state, X)
    for seed in range(3):
        one = jax.tree.map(lambda leaf, seed=seed: leaf[seed], params)
        _, _, state_of_one = gradient_fn(one, weighting.init(shapes), X)
        expected = gradient_fn(one, state_of_one, X)
        assert_trees_close(jax.tree.map(lambda leaf, seed=seed: leaf[seed], got), expected)


def test_scan_equals_a_loop():
    weighting = mtl_jax.dwa(2)
    gradient_fn = mtl_jax.value_and_grad(losses_fn, weighting)
    state = weighting.init(losses_fn(PARAMS, X))

    def step(carry, x):
        params, state = carry
        value, gradient, state = gradient_fn(params, state, x)
        params = jax.tree.map(lambda p, g: p - 0.05 * g, params, gradient)
        return (params, state), value.weights

    batches = X[None] * jnp.linspace(0.5, 1.5, 6).reshape(6, 1, 1)
    scanned, weights = jax.jit(lambda *carry: jax.lax.scan(step, carry, batches))(PARAMS, state)
    carry = (PARAMS, state)
    for k, x in enumerate(batches):
        carry, expected = jax.jit(step)(carry, x)
        assert_trees_close(jax.tree.map(lambda leaf, k=k: leaf[k], weights), expected)
    assert_trees_close(scanned, carry)
    assert weights["a"][5] != weights["a"][0]


def test_flax_linen():
    class Network(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x):
            z = flax.linen.tanh(flax.linen.Dense(3)(x))
            return {task: flax.linen.Dense(1, name=task)(z) for task in TASKS}

    network = Network()
    variables = network.init(KEY, X)

    def losses_fn(params, x):
        return jax.tree.map(lambda out: jnp.mean((out - 1) ** 2), network.apply(params, x))

    weighting = mtl_jax.adaptive()
    state = weighting.init(jax.eval_shape(losses_fn, variables, X))
    value, gradient, _ = jax.jit(mtl_jax.value_and_grad(losses_fn, weighting))(variables, state, X)
    expected = jax.grad(functools.partial(weighted_sum, losses_fn=losses_fn))(
        variables, value.weights, X
    )
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

    weighting = mtl_jax.adaptive()
    state = weighting.init(jax.eval_shape(losses_fn, params, X))
    value, gradient, _ = jax.jit(mtl_jax.value_and_grad(losses_fn, weighting))(params, state, X)
    expected = jax.grad(functools.partial(weighted_sum, losses_fn=losses_fn))(
        params, value.weights, X
    )
    assert_trees_close(gradient, expected)
    assert any(jnp.any(leaf != 0) for leaf in jax.tree.leaves(gradient))


def test_the_gradient_goes_into_optax():
    weighting, optimizer = mtl_jax.adaptive(), optax.adam(0.05)
    gradient_fn = mtl_jax.value_and_grad(losses_fn, weighting)
    state = weighting.init(losses_fn(PARAMS, X))

    @jax.jit
    def step(params, opt_state, state):
        value, gradient, state = gradient_fn(params, state, X)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, state, value

    params, opt_state = PARAMS, optimizer.init(PARAMS)
    for _ in range(50):
        params, opt_state, state, _ = step(params, opt_state, state)
    before, after = losses_fn(PARAMS, X), losses_fn(params, X)
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
    ],
    ids=["equal", "dwa", "string", "optax", "none"],
)
def test_something_that_is_no_weighting(weighting, says):
    with pytest.raises(TypeError, match=says):
        mtl_jax.value_and_grad(losses_fn, weighting)


def test_losses_that_are_not_scalars_are_named():
    weighting = mtl_jax.equal()
    gradient_fn = mtl_jax.value_and_grad(lambda params: {"a": params}, weighting)
    with pytest.raises(ValueError, match=r"'a' has shape \(3,\)"):
        gradient_fn(jnp.ones(3), weighting.init({"a": 1.0}))
    gradient_fn = mtl_jax.value_and_grad(lambda params: {"a": jnp.int32(1)}, weighting)
    with pytest.raises(TypeError, match="'a' has dtype int32"):
        gradient_fn(jnp.ones(3), weighting.init({"a": 1.0}))


@pytest.mark.parametrize(
    "output", [{"a": 1.0}, (1.0, 2.0, 3.0), [1.0, 2.0], 1.0], ids=["dict", "triple", "list", "one"]
)
def test_has_aux_without_a_pair(output):
    gradient_fn = mtl_jax.value_and_grad(
        lambda params: jax.tree.map(lambda c: c * jnp.sum(params), output),
        mtl_jax.equal(),
        has_aux=True,
    )
    with pytest.raises(TypeError, match=r"must return a pair \(losses, aux\), got"):
        gradient_fn(jnp.ones(3), mtl_jax.equal().init({"a": 1.0}))


def test_a_forgotten_has_aux():
    """The pair is read as losses: an error, which names the place."""
    weighting = mtl_jax.equal()
    gradient_fn = mtl_jax.value_and_grad(
        lambda params: ({"a": jnp.sum(params)}, {"features": params}), weighting
    )
    with pytest.raises(ValueError, match=r"'1/features' has shape \(3,\)"):
        gradient_fn(jnp.ones(3), weighting.init({"a": 1.0}))


def test_a_state_of_another_number_of_tasks():
    weighting = mtl_jax.equal()
    with pytest.raises(ValueError, match="initialised for 2 tasks.*for 3: a, b, c"):
        mtl_jax.value_and_grad(losses_fn, weighting)(PARAMS, weighting.init((1.0, 1.0)), X)


def test_a_parameter_that_is_an_integer_is_named():
    weighting = mtl_jax.equal()
    gradient_fn = mtl_jax.value_and_grad(lambda params: {"a": params["w"] * 1.0}, weighting)
    params = {"w": jnp.ones(()), "table": jnp.arange(3)}
    with pytest.raises(TypeError, match="parameter 'table' has dtype int32"):
        gradient_fn(params, weighting.init({"a": 1.0}))
