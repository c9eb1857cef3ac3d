"""Networks in bfloat16: losses, Gramian, solvers and sums stay in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtl_jax
from mtl_jax._jacobian import combine, gramian_of

TASKS = ("a", "b", "c")
BF16 = "bfloat16"
BATCH = tuple(
    np.random.default_rng(1).normal(size=shape).astype(np.float32) for shape in [(64, 16), (3, 64)]
)


def make_params():
    rng = np.random.default_rng(0)
    return {
        "encoder": rng.normal(size=(16, 32)).astype(np.float32) / 4,
        "heads": (rng.normal(size=(3, 32)) / 6 * [[1], [2], [4]]).astype(np.float32),
    }


def encoder(params, x, y, dtype):
    return jnp.tanh(x.astype(dtype) @ params["encoder"].astype(dtype))


def heads(params, zs, x, y, dtype):
    losses = {}
    for k, task in enumerate(TASKS):
        output = zs[task] @ params["heads"][k].astype(dtype)
        losses[task] = jnp.mean((output.astype(jnp.float32) - y[k]) ** 2)
    return losses


def losses_fn(params, x, y, dtype):
    z = encoder(params, x, y, dtype)
    return heads(params, dict.fromkeys(TASKS, z), x, y, dtype)


def of_losses(weighting, dtype, **options):
    return mtl_jax.value_and_grad(functools.partial(losses_fn, dtype=dtype), weighting, **options)


def in_parts(weighting, dtype, **options):
    return mtl_jax.representation_value_and_grad(
        functools.partial(encoder, dtype=dtype),
        functools.partial(heads, dtype=dtype),
        weighting,
        tasks=TASKS,
        **options,
    )


def inverse_norms():
    """A weighting of the Gramian that compiles quickly."""

    def update(losses, state, present, steps, gramian):
        return jnp.where(present, 1 / jnp.sqrt(jnp.diagonal(gramian)), 0), state

    return mtl_jax.vector_weighting(update, needs=mtl_jax.Signal.GRAMIAN)


def run(form, weighting, **options):
    """In float32; in bfloat16 with parameters in float32; with these, too, in bfloat16."""

    @jax.jit
    def three(params):
        narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        results = []
        for cast, dtype in ((params, "float32"), (params, BF16), (narrow, BF16)):
            gradient_fn = form(weighting, dtype, **options)
            state = gradient_fn.init(cast, *BATCH)
            results.append(gradient_fn(cast, state, *BATCH))
        return results

    return three(make_params())


def assert_leaves_have(tree, dtype):
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(dtype)}


def direction(tree):
    flat = np.concatenate([np.ravel(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(tree)])
    return flat / np.linalg.norm(flat)


@pytest.mark.parametrize(
    ("form", "make", "options"),
    [
        (of_losses, lambda: mtl_jax.adaptive(2.0), {}),
        (of_losses, mtl_jax.cagrad, {}),
        (of_losses, inverse_norms, {"rows": 2}),
        (of_losses, inverse_norms, {"rows": "low_memory"}),
        (in_parts, inverse_norms, {}),
        (in_parts, mtl_jax.aligned_mtl, {"gramian": "encoder"}),
        (in_parts, inverse_norms, {"gramian": "encoder", "rows": "low_memory"}),
    ],
)
def test_weights_agree_with_those_of_float32(form, make, options):
    (exact, exact_gradient, _), *others = run(form, make(), **options)
    expected = np.array(list(exact.weights.values()))
    assert np.ptp(expected) > 0.1 * np.max(expected)  # the weights tell the tasks apart
    for (value, gradient, state), params_dtype in zip(others, ("float32", BF16), strict=True):
        weights = np.array(list(value.weights.values()))
        np.testing.assert_allclose(weights, expected, rtol=0, atol=1e-2 * np.max(expected))
        assert value.losses != exact.losses  # they were rounded on the way
        assert value.finite
        assert_leaves_have((value.losses, value.weights, value.gramian), "float32")
        assert_leaves_have(gradient, params_dtype)
        assert jnp.dtype(BF16) not in {leaf.dtype for leaf in jax.tree.leaves(state)}
        assert direction(gradient) @ direction(exact_gradient) > 0.999


@pytest.mark.parametrize("make", [mtl_jax.moco, lambda: mtl_jax.trimmed_mean(1)])
def test_aggregators_work_in_float32_and_return_the_dtype_of_the_parameters(make):
    (_, exact, _), *others = run(of_losses, make())
    for (_, gradient, state), params_dtype in zip(others, ("float32", BF16), strict=True):
        assert_leaves_have(gradient, params_dtype)
        assert jnp.dtype(BF16) not in {leaf.dtype for leaf in jax.tree.leaves(state)}
        assert direction(gradient) @ direction(exact) > 0.999


def test_the_gramian_of_bfloat16_rows_is_contracted_in_float32():
    """In bfloat16 a sum of 10,000 products stops at 256, and its error is of the order of 1."""
    rows = np.random.default_rng(2).normal(0.5, size=(7, 10_000)).astype(jnp.bfloat16)
    expected = np.asarray(rows, np.float64) @ np.asarray(rows, np.float64).T
    gramian = jax.jit(gramian_of)
    for found in (gramian([rows]), gramian(tuple([row] for row in rows))):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_weighted_sum_of_bfloat16_rows_is_rounded_once():
    rows = np.random.default_rng(2).normal(size=(7, 1000)).astype(jnp.bfloat16)
    weights = np.linspace(0.1, 1.3, 7, dtype=np.float32)
    expected = np.asarray(weights, np.float64) @ np.asarray(rows, np.float64)
    program = jax.jit(combine)
    for (found,) in (program(weights, [rows]), program(weights, tuple([row] for row in rows))):
        assert found.dtype == jnp.bfloat16
        # Half a unit in the last of 8 binary digits, and the rounding of float32 before.
        error = np.abs(np.asarray(found, np.float64) - expected)
        assert np.all(error <= np.abs(expected) * 2.0**-8 + 1e-5)
