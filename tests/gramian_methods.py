"""The weightings of the Gramian with one set of parameters each, for the checks they share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mtl_jax

GRAMIAN_METHODS = {
    "gradnorm": functools.partial(mtl_jax.gradnorm, optax.sgd(0.01)),
    "mgda": mtl_jax.mgda,
    "mgda[l2]": functools.partial(mtl_jax.mgda, "l2"),
    "mgda[loss]": functools.partial(mtl_jax.mgda, "loss"),
    "mgda[loss+]": functools.partial(mtl_jax.mgda, "loss+"),
    "cagrad": mtl_jax.cagrad,
    "pcgrad": mtl_jax.pcgrad,
    "gradvac": mtl_jax.gradvac,
    "nash_mtl": mtl_jax.nash_mtl,
    "fair_grad": functools.partial(mtl_jax.fair_grad, 2.0),
    "imtl_g": mtl_jax.imtl_g,
    "aligned_mtl": mtl_jax.aligned_mtl,
    "aligned_mtl[rmse]": functools.partial(mtl_jax.aligned_mtl, "rmse"),
    "upgrad": mtl_jax.upgrad,
    "dual_proj": mtl_jax.dual_proj,
    "conflict_free": mtl_jax.conflict_free,
    "krum": functools.partial(mtl_jax.krum, 0),
}
RANDOM = ("pcgrad", "gradvac")
# The power of the gradients' scale by which the weights scale; gradnorm's optimizer has a scale.
DEGREES = dict.fromkeys(GRAMIAN_METHODS, 0) | {"nash_mtl": -1, "fair_grad": -4 / 3}
SIZE = 6
"""The tasks of every Gramian, for few compilations: absent tasks count nowhere."""
KEY = jax.random.key(5)


@functools.cache
def weighting(name):
    return GRAMIAN_METHODS[name]()


@functools.cache
def update(name):
    """The compiled update on vectors: ``(losses, gramian, present, state) -> (weights, state)``."""

    @jax.jit
    def update(losses, gramian, present, state):
        mask = tuple(jnp.unstack(present))
        weights, state = weighting(name).update(
            tuple(jnp.unstack(losses)), state, mask=mask, gramian=gramian
        )
        return jnp.stack(weights), state

    return update


@functools.cache
def initial(name, dtype, size=SIZE):
    return weighting(name).init((jax.ShapeDtypeStruct((), dtype),) * size, key=KEY)


def weights_of(name, J, *, losses=None, present=None, state=None, garbage=7.0, size=SIZE):
    """The weights for the rows of J, in its dtype, and the state."""
    J = np.asarray(J)
    number = len(J)
    gramian = np.full((size, size), garbage, J.dtype)
    gramian[:number, :number] = J @ J.T
    present = np.ones(number, bool) if present is None else np.asarray(present)
    vector = np.full(size, garbage, J.dtype)
    vector[:number] = 1 if losses is None else losses
    state = initial(name, J.dtype, size) if state is None else state
    weights, state = update(name)(vector, gramian, np.pad(present, (0, size - number)), state)
    assert np.all(np.asarray(weights)[number:] == 0)
    return np.asarray(weights)[:number], state
