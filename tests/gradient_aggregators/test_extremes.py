"""Gradients and losses at the ends of float32, of 1 to 128 tasks, some of them absent.

Every method runs as one program, on parameters of bfloat16 and of float32. A step gives a gradient
that is finite and a state that is, or NaN and the state as it was.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aggregator_methods import METHODS, READS_LOSSES, WITHOUT_EPS, made
from methods import KEY
from trees import as_numpy

MOST = 128
PARAMS = {"narrow": jnp.zeros((2, 3), jnp.bfloat16), "wide": jnp.zeros(4)}
# conflict_free_momentum has its own, with fewer tasks: conflict_free of 128 takes long.
each_method = pytest.mark.parametrize(
    "name", [name for name in (*METHODS, *WITHOUT_EPS) if name != "conflict_free_momentum"]
)
SIZE = 10  # numbers in PARAMS


@functools.cache
def compiled(name):
    """The state before the first step, and an update on arrays."""
    aggregator = made(name)

    @jax.jit
    def update(rows, losses, present, state):
        narrow, wide = jnp.split(rows, [6], axis=1)
        return aggregator.update(
            {"narrow": narrow.reshape(MOST, 2, 3).astype(jnp.bfloat16), "wide": wide},
            state,
            losses=tuple(jnp.unstack(losses)),
            mask=tuple(jnp.unstack(present)),
        )

    return aggregator.init(PARAMS, (0.0,) * MOST, key=KEY), update


def step(name, rows, state, *, losses=1.0, present=True):
    """One step, which keeps the promise; whether it gave a gradient, the gradient, the state."""
    shape = (MOST,)
    arrays = (np.broadcast_to(each, shape) for each in (np.float32(losses), present))
    gradient, after = compiled(name)[1](rows.astype(np.float32), *arrays, state)
    flat = np.concatenate([np.ravel(leaf).astype(np.float32) for leaf in gradient.values()])
    if np.all(np.isnan(flat)):
        for new, old in zip(as_numpy(after), as_numpy(state), strict=True):
            np.testing.assert_array_equal(new, old)
        return False, flat, after
    assert np.all(np.isfinite(flat))
    assert all(np.all(np.isfinite(leaf.astype(np.float32))) for leaf in as_numpy(after))
    return True, flat, after


def gradients(seed=0):
    """Gradients of norm 1."""
    rows = np.random.default_rng(seed).normal(size=(MOST, SIZE))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@each_method
def test_norms_from_1e_18_to_1e18(name):
    for scales in ((1e-18, 1e18, 1.0, 1e-18), (1e18, 1e-18, 1e18, 1.0)):
        state = compiled(name)[0]
        for seed, scale in enumerate(scales):
            given, _, state = step(name, scale * gradients(seed), state)
            assert given, scale
        factors = np.where(np.arange(MOST) == 3, 1e12, 1)[:, None]
        for scale in (1e-6, 1.0, 1e-12):
            given, _, state = step(name, scale * factors * gradients(9), state)
            assert given


@each_method
def test_losses_from_1e_30_to_1e30(name):
    """MoCo brings gradients to the length of the loss, and DB-MTL divides by it."""
    spread = np.logspace(-30, 30, MOST)
    for losses in (1e-30, 1e-9, 1e9, 1e30, spread):
        state = compiled(name)[0]
        for seed in range(2):
            given, _, state = step(name, gradients(seed), state, losses=losses)
            too_long = {"moco": np.max(losses) > 1e19, "db_mtl[eps=0]": np.min(losses) < 1e-19}
            kind = name if name == "db_mtl[eps=0]" else name.removesuffix("[eps=0]")
            assert given != too_long.get(kind, False), losses


@each_method
def test_zero_and_negative_losses(name):
    one = np.where(np.arange(MOST) == 5, 0.0, 1.0)
    expected, gradient, _ = step(name, gradients(), compiled(name)[0])
    assert expected
    for losses in (0.0, one):
        given, _, _ = step(name, gradients(), compiled(name)[0], losses=losses)
        assert given == (name != "db_mtl[eps=0]")  # which has no logarithm there
    given, got, _ = step(name, gradients(), compiled(name)[0], losses=np.where(one == 0, -1, one))
    assert given == (name.removesuffix("[eps=0]") not in READS_LOSSES)
    if given:
        np.testing.assert_array_equal(got, gradient)


@each_method
def test_gradients_of_zero(name):
    state, rows = compiled(name)[0], gradients()
    for zeros in (slice(None), slice(3, 4), slice(None)):
        rows = gradients()
        rows[zeros] = 0
        given, gradient, state = step(name, rows, state, losses=0.5)
        assert given
        if zeros == slice(None) and name.removesuffix("[eps=0]") not in READS_LOSSES:
            np.testing.assert_array_equal(gradient, 0)  # the others remember


@each_method
def test_tasks_that_come_and_go(name):
    rng, state = np.random.default_rng(1), compiled(name)[0]
    for number in range(20):
        rows = gradients(number) * 10.0 ** rng.uniform(-9, 9)
        losses = 10.0 ** rng.uniform(-6, 6, MOST)
        present = rng.random(MOST) < rng.choice([0.02, 0.5, 1.0])
        if number in (4, 5):
            present[:] = number == 5 and np.arange(MOST) == 7  # nobody, and one alone
        rows[~present], losses[~present] = np.nan, np.nan
        broken = number in (8, 9)
        if broken:
            present[3] = True
            (rows if number == 8 else losses)[3] = np.nan
        given, gradient, after = step(name, rows, state, losses=losses, present=present)
        assert given != broken
        if not present.any():
            np.testing.assert_array_equal(gradient, 0)
        for new, old in zip(as_numpy(after), as_numpy(state), strict=True):
            if new.shape[:1] == (MOST,):
                np.testing.assert_array_equal(new[~present], old[~present])
        state = after
