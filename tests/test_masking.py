"""masked_mean against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mtl_jax

RNG = np.random.default_rng(0)
masked_mean = jax.jit(mtl_jax.masked_mean)
gradient_of_mean = jax.jit(jax.grad(mtl_jax.masked_mean))


@given(st.lists(st.tuples(st.floats(-1e6, 1e6, width=32), st.booleans()), min_size=12, max_size=12))
@settings(deadline=None, max_examples=50)
def test_against_numpy(rows):
    values = np.array([value for value, _ in rows], np.float32)
    present = np.array([mask for _, mask in rows])
    expected = values[present].astype(np.float64).mean() if present.any() else 0.0
    scale = np.abs(values).max()
    np.testing.assert_allclose(
        masked_mean(values, present), expected, rtol=0, atol=12 * 6e-8 * scale
    )


@pytest.mark.parametrize("shape", [(6,), (6, 4), (6, 4, 5)])
def test_a_mask_of_the_leading_axes(shape):
    values = RNG.normal(size=shape).astype(np.float32)
    for axes in range(1, len(shape) + 1):
        present = RNG.random(shape[:axes]) < 0.5
        present.flat[0] = True
        expected = values[present].astype(np.float64).mean()
        np.testing.assert_allclose(masked_mean(values, present), expected, rtol=1e-5, atol=1e-7)


def test_gradient_is_one_over_the_number_present():
    values = RNG.normal(size=(4, 3)).astype(np.float32)
    present = np.array([True, False, True, True])
    gradient = gradient_of_mean(values, present)
    expected = np.where(present[:, None], 1 / 9, 0) * np.ones((4, 3))
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_all_absent_is_zero_with_zero_gradient():
    values, present = np.array([1, np.nan, np.inf], np.float32), np.zeros(3, bool)
    assert masked_mean(values, present) == 0
    np.testing.assert_array_equal(gradient_of_mean(values, present), 0)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_what_is_not_finite_where_absent_is_harmless(bad):
    present, values = np.array([True, False, True]), np.array([1, bad, 3], np.float32)
    assert masked_mean(np.float32(2) * values, present) == 4
    np.testing.assert_array_equal(gradient_of_mean(values, present), [0.5, 0, 0.5])


def test_what_is_not_finite_where_present_is_not_hidden():
    assert np.isnan(masked_mean(np.array([1, np.nan], np.float32), np.array([True, True])))


def test_bfloat16_is_summed_in_float32():
    # Summed in bfloat16, 4096 ones stay at 256.
    values = np.full((4096,), 1.0078125, jnp.bfloat16)
    mean = masked_mean(values, np.ones(4096, bool))
    assert mean.dtype == jnp.float32
    assert mean == 1.0078125
    gradient = gradient_of_mean(values, np.ones(4096, bool))
    assert gradient.dtype == jnp.bfloat16


def test_float16_does_not_overflow():
    values = np.full((16,), 6e4, jnp.float16)
    np.testing.assert_allclose(masked_mean(values, np.ones(16, bool)), 6e4, rtol=1e-3)


def test_float64_stays_float64(x64):
    values = RNG.normal(size=(1000,))
    present = RNG.random(1000) < 0.5
    mean = masked_mean(values, present)
    assert mean.dtype == jnp.float64
    np.testing.assert_allclose(mean, values[present].mean(), rtol=1e-13)


def test_integers_have_a_mean():
    mean = masked_mean(np.array([1, 2, 7]), np.array([True, True, False]))
    assert mean == 1.5


def test_jit_and_vmap():
    values = RNG.normal(size=(5, 8)).astype(np.float32)
    present = RNG.random((5, 8)) < 0.5
    many = jax.jit(jax.vmap(masked_mean))(values, present)
    one_by_one = [mtl_jax.masked_mean(v, p) for v, p in zip(values, present, strict=True)]
    np.testing.assert_allclose(many, one_by_one, rtol=1e-6)


def test_strict_dtype_promotion():
    with jax.numpy_dtype_promotion("strict"):
        masked_mean(np.ones((2, 3), jnp.bfloat16), np.ones(2, bool))


@pytest.mark.parametrize("shape", [(3,), (4, 4), (4, 3, 1)])
def test_shapes_that_do_not_fit(shape):
    with pytest.raises(ValueError, match=r"leading axes.*\(4, 3\)"):
        mtl_jax.masked_mean(np.ones((4, 3)), np.ones(shape, bool))


def test_one_boolean_for_the_whole_batch():
    assert masked_mean(np.ones((4, 3)), np.array(True)) == 1
    assert masked_mean(np.ones((4, 3)), np.array(False)) == 0


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float32])
def test_present_is_boolean(dtype):
    with pytest.raises(TypeError, match=f"boolean, got {np.dtype(dtype).name}"):
        mtl_jax.masked_mean(np.ones(3), np.ones(3, dtype))
