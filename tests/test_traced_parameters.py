"""The numbers that tuning searches may be traced: one program serves all their values."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_jax
from mtl_jax import METHODS, RunSettings, Signal
from mtl_jax._search_space import Choice, Range

KEY = jax.random.key(3)
ROWS = np.array([[1.0, 0.5, 0.0], [-0.25, 1.0, 0.5], [0.5, -0.25, 2.0]], np.float32)
LOSSES = np.array([[1.0, 2.0, 3.0], [0.9, 2.1, 1.5], [0.5, 1.9, 0.1], [0.4, 1.0, 0.2]], np.float32)

AFTER = np.array([0.9, 0.8, 0.95], np.float32)  # of the losses is left after the step


def values_of(dimension):
    """The numbers of a dimension that are floats: its ends and its default, or its choices."""
    if isinstance(dimension, Range):
        return [dimension.low, dimension.high, dimension.default]
    if isinstance(dimension, Choice):
        return [value for value in dimension.values if isinstance(value, float)]
    return []


SEARCHED = {
    name: found
    for name, method in METHODS.items()
    if (found := {key: values_of(one) for key, one in method.search.items() if values_of(one)})
}
assert len(SEARCHED) > 15


def steps(name, learning_rate, own):
    """The weights, or an aggregator's gradient, at every step."""
    made = METHODS[name].make(RunSettings(1, 5, optax.adam(learning_rate)), **own)
    shapes, found = (np.float32(0),) * 3, []
    if isinstance(made, mtl_jax.Aggregator):
        state = made.init(ROWS[0], shapes, key=KEY)
    else:
        state = made.init(shapes, key=KEY, params=ROWS[0])
    for losses in LOSSES:
        if isinstance(made, mtl_jax.Aggregator):
            result, state = made.update(jnp.asarray(ROWS), state, losses=tuple(losses))
        else:
            signals = {
                "gramian": jnp.asarray(ROWS @ ROWS.T),
                "task_gradients": jnp.asarray(ROWS),
            }
            if made.needs is Signal.SECOND_BATCH:
                assert made.method.directions is not None
                combinations, _ = made.method.directions(state, jnp.ones(3, bool))
                signals["products"] = jnp.asarray(ROWS @ ROWS.T)[:, : len(combinations)]
            result, state = made.update(tuple(losses), state, **signals)
            if made.observe is not None:
                state = made.observe(tuple(losses * AFTER), state)
            result = jnp.stack(result)
        found.append(result)
    return jnp.stack(found)


@pytest.mark.parametrize("name", SEARCHED)
def test_one_program_gives_what_python_numbers_give(name):
    program = jax.jit(lambda rate, own: steps(name, rate, own))
    for index in range(max(map(len, SEARCHED[name].values()))):
        own = {key: values[index % len(values)] for key, values in SEARCHED[name].items()}
        traced = program(0.1 / (1 + index), own)
        assert np.isfinite(traced).all()
        expected = steps(name, 0.1 / (1 + index), own)
        np.testing.assert_allclose(traced, expected, rtol=2e-5, atol=1e-6)
    assert program._cache_size() == 1


def test_what_is_no_number_is_refused_traced_or_not():
    for wrong in (np.ones(2), np.int32(1)):
        with pytest.raises(TypeError, match="dwa: `temperature` must be a number"):
            jax.jit(lambda value: mtl_jax.dwa(3, value) and 0)(wrong)
