"""Losses at the ends of float32 and outside a method's domain.

At every step a method gives either weights that are all finite and not negative, with a finite
state, or NaN for all tasks, with the state as it was; and whatever was seen, ordinary losses get
weights again: a state from which there is no way back would stop the training for good.
"""

import functools

import jax
import jax.numpy as jnp
import methods
import numpy as np
import pytest
from methods import TASKS
from trees import as_numpy

import mtl_jax
from mtl_jax._lift import all_finite, tree_where

KEY = jax.random.key(11)
RECOVERY = 12
METHODS = methods.METHODS | {
    "adaptive[softmax,initial]": functools.partial(
        mtl_jax.adaptive, rule="softmax", relative_to="initial"
    )
}

ONES = np.ones((5, 3))
SCENARIOS = {
    "all 1e-30": np.full((6, 3), 1e-30),
    "all 1e30": np.full((6, 3), 1e30),
    "all 1e38": np.full((3, 3), 1e38),
    "1e-30 beside 1e30": np.tile([1e-30, 1.0, 1e30], (6, 1)),
    "1e12 times another": np.tile([1.0, 1e12, 2.0], (6, 1)),
    "from 1e-30 to 1e30": np.repeat([[1e-30] * 3, [1e30] * 3], 3, axis=0),
    "from 1e30 to 1e-30": np.repeat([[1e30] * 3, [1e-30] * 3], 3, axis=0),
    "all 0": np.zeros((20, 3)),
    "one 0": np.tile([0.0, 1.0, 2.0], (20, 1)),
    "become 0": np.concatenate([ONES, np.zeros((20, 3))]),
    "all negative": np.full((6, 3), -1.0),
    "one negative": np.tile([-1.0, 1.0, 2.0], (6, 1)),
    "become negative": np.concatenate([ONES, np.tile([-1.0, 1.0, 1.0], (10, 1))]),
    "now and then negative": np.tile([[1.0, 1.0, 1.0], [-1.0, 1.0, 1.0]], (4, 1)),
}
NEGATIVE = {name for name in SCENARIOS if "negative" in name}
ZERO = {name for name in SCENARIOS if name.endswith(" 0")}

# Where a method gives NaN at some step, as its docstring says: outside its domain.
GIVES_NAN = {
    "adaptive": NEGATIVE,
    "adaptive[emphasis=2,decay=0.9]": NEGATIVE,
    "adaptive[initial]": NEGATIVE | {"all 0", "one 0"},  # no reference
    "adaptive[softmax,initial]": NEGATIVE | {"all 0", "one 0"},
    "geometric": NEGATIVE | ZERO,
    "stch": NEGATIVE | ZERO,
    "stch[mu=0.1,window=2]": NEGATIVE | ZERO,
    "dynamic_task_priority": NEGATIVE,
    "softadapt[loss_weighted]": NEGATIVE,
    "cov_weighting": NEGATIVE,
    "cov_weighting[decay=0.9]": NEGATIVE,
    "famo": NEGATIVE,
}


@functools.cache
def compiled(name):
    weighting = METHODS[name]()
    observe = None if weighting.observe is None else jax.jit(weighting.observe)
    return weighting.init, jax.jit(weighting.update), observe


def step(name, row, state):
    """One step, which keeps the promise; its weights, or None where they are NaN."""
    _, update, observe = compiled(name)
    losses = dict(zip(TASKS, row.astype(np.float32), strict=True))
    weights, after = update(losses, state)
    weights = np.array([weights[task] for task in TASKS])
    if np.all(np.isnan(weights)):
        for new, old in zip(as_numpy(after), as_numpy(state), strict=True):
            np.testing.assert_array_equal(new, old)
        return None, after
    assert np.all(np.isfinite(weights)), weights
    assert np.all(weights >= 0), weights
    if observe is not None:
        after = observe({task: 0.9 * loss for task, loss in losses.items()}, after)
    for leaf in as_numpy(after):
        assert np.all(np.isfinite(leaf))
    return weights, after


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("name", METHODS)
def test_finite_or_nan_with_the_state_as_it_was_and_a_way_back(name, scenario):
    state = compiled(name)[0](dict.fromkeys(TASKS, np.float32(0)), key=KEY)
    gave_nan = False
    for row in SCENARIOS[scenario]:
        weights, state = step(name, row, state)
        gave_nan |= weights is None
    allowed = GIVES_NAN.get(name, set())
    assert not gave_nan or scenario in allowed
    # Outside the domain it is said, at once or when the average leaves the domain.
    if scenario in allowed & (NEGATIVE | ZERO):
        assert gave_nan
    for number in range(RECOVERY):
        weights, state = step(name, np.array([1.0, 2.0, 3.0]) * 0.99**number, state)
    assert weights is not None


@pytest.mark.parametrize("name", ["equal", "adaptive", "dwa", "softadapt", "relobralo", "famo"])
def test_constant_zero_losses_get_equal_weights(name):
    state = compiled(name)[0](dict.fromkeys(TASKS, np.float32(0)), key=KEY)
    for _ in range(20):
        weights, state = step(name, np.zeros(3), state)
        np.testing.assert_allclose(weights, weights[0], rtol=1e-6)


# Up to 128 tasks, which come and go

MOST = 128
STEPS = 40


@functools.cache
def many_steps(name):
    """Steps on vectors, the first loss in bfloat16: weights, and what became of the state."""
    weighting = mtl_jax.constant((1.0,) * MOST) if name == "constant" else METHODS[name]()

    def same(after, before):
        def data(leaf):
            key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            return jax.random.key_data(leaf) if key else leaf

        pairs = zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True)
        return jnp.all(jnp.stack([jnp.all(data(a) == data(b)) for a, b in pairs]))

    def step(state, inputs):
        first, *rest = jnp.unstack(inputs[0])
        losses, mask = (first.astype(jnp.bfloat16), *rest), tuple(jnp.unstack(inputs[1]))
        weights, after = weighting.update(losses, state, mask=mask)
        weights = jnp.stack(weights)
        if weighting.observe is not None:
            lower = tuple(jnp.unstack(0.9 * inputs[0]))
            observed = weighting.observe(lower, after, mask=mask)
            after = tree_where(jnp.all(jnp.isfinite(weights)), observed, after)
        return after, (weights, same(after, state), all_finite(after))

    state = weighting.init((np.float32(0),) * MOST, key=KEY)
    return jax.jit(lambda *inputs: jax.lax.scan(step, state, inputs)[1])


@pytest.mark.parametrize("name", METHODS)
def test_up_to_128_tasks_that_come_and_go(name):
    rng = np.random.default_rng(0)
    for domain in ("positive", "any"):
        losses = 10 ** rng.uniform(-30, 30, (STEPS, MOST))
        losses[:8] = np.array([1e-30, 1e30] * 4)[:, None]
        losses[8:16] = 1
        losses[8:16, 5] = 1e12
        present = rng.random((STEPS, MOST)) < rng.choice([0.02, 0.5, 1], (STEPS, 1))
        present[[9, 20]] = False
        present[[10, 21]] = np.arange(MOST) == 0
        if domain == "any":
            odd = rng.random((STEPS, MOST)) < 0.01
            losses = np.where(odd, rng.choice([0.0, -1.0, np.nan, np.inf], odd.shape), losses)
        losses[-RECOVERY:], present[-RECOVERY:] = rng.uniform(1, 2, (RECOVERY, MOST)), True
        weights, kept, finite = map(np.array, many_steps(name)(losses.astype(np.float32), present))
        nan = np.isnan(weights).any(axis=1)
        np.testing.assert_array_equal(np.isnan(weights), nan[:, None] & present)
        np.testing.assert_array_equal(weights[~present], 0)
        assert np.all(kept[nan])
        assert np.all(finite)
        valid = weights[~nan]
        assert np.all(np.isfinite(valid)), valid
        assert np.all(valid >= 0)
        assert not nan[-1]
        if domain == "positive" and name != "geometric":  # whose weights can overflow
            assert not np.any(nan)
        bad = present & ~np.isfinite(losses)
        assert np.all(nan[bad.any(axis=1)])
