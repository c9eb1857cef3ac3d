"""The weightings of the Gramian on the rows of task gradients, each with one program of a dtype."""

import functools

import jax
import jax.numpy as jnp
import methods
import numpy as np
from methods import GRAMIAN_METHODS, KEY

RANDOM = tuple(name for name in methods.RANDOM if name in GRAMIAN_METHODS)
# The power of the gradients' scale by which the weights scale; gradnorm's optimizer has a scale.
DEGREES = {name: methods.record(name).degree or 0 for name in GRAMIAN_METHODS}
DEGREES["fair_grad"] = -4 / 3  # of the alpha that the tests run it with
SIZE = 20
"""The tasks of every Gramian, for few compilations: absent tasks count nowhere."""


def weighting_of(name):
    """A weighting itself, or that of a name."""
    return methods.made(name) if isinstance(name, str) else name


@functools.cache
def _program(weighting):
    @jax.jit
    def update(losses, gramian, present, state):
        mask = tuple(jnp.unstack(present))
        weights, state = weighting.update(
            tuple(jnp.unstack(losses)), state, mask=mask, gramian=gramian
        )
        return jnp.stack(weights), state

    return update


def update(name):
    """The compiled update on vectors: ``(losses, gramian, present, state) -> (weights, state)``."""
    return _program(weighting_of(name))


@functools.cache
def _initial(weighting, dtype, size, x64):
    return weighting.init((jax.ShapeDtypeStruct((), dtype),) * size, key=KEY)


def initial(name, dtype, size=SIZE):
    """The state before the first step."""
    return _initial(weighting_of(name), np.dtype(dtype), size, jax.config.jax_enable_x64)


def weights_of(
    name, J, *, gramian=None, losses=None, present=None, state=None, garbage=7.0, size=SIZE
):
    """The weights for the rows of J, in its dtype, and the state; further tasks are absent.

    Args:
      name: a weighting, or its name in the table.
      J: the task gradients.
      gramian: their Gramian, where it is not to be computed.
      losses: 1 by default.
      present: which of the rows are.
      state: that before the first step by default.
      garbage: what stands in the place of absent tasks.
      size: the number of tasks with the absent ones.
    """
    J = np.asarray(J)
    number, dtype = len(J), J.dtype
    size = max(size, number)
    G = np.full((size, size), garbage, dtype)
    G[:number, :number] = J @ J.T if gramian is None else gramian
    present = np.ones(number, bool) if present is None else np.asarray(present)
    vector = np.full(size, garbage, dtype)
    vector[:number] = 1 if losses is None else losses
    state = initial(name, dtype, size) if state is None else state
    with jax.numpy_dtype_promotion(promotion(name)):
        weights, state = update(name)(vector, G, np.pad(present, (0, size - number)), state)
    assert weights.dtype == dtype
    assert np.all(np.asarray(weights)[number:] == 0)
    return np.asarray(weights)[:number], state


def promotion(name):
    """How dtypes may mix: not at all, but in optax's optimizers."""
    return "standard" if name == "gradnorm" else "strict"
