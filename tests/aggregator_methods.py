"""The methods that read the task gradients, as what they have in common: they combine rows."""

import functools

import jax
import jax.numpy as jnp
import methods

import mtl_jax

METHODS = tuple(methods.ROW_METHODS)
WITHOUT_EPS = tuple(methods.WITHOUT_EPS)
READS_LOSSES = tuple(
    name for name in METHODS if methods.record(name).domain != "any"
)  # which is so of those alone that read them


def combined(weighting):
    """A weighting of the task gradients as an aggregator: their weighted sum."""

    def init(params, losses, *, key=None):
        return weighting.init(losses, key=key, params=params)

    @jax.jit
    def update(task_gradients, state, *, losses=None, mask=None):
        if losses is None:
            losses = jax.tree.unflatten(state.tasks.structure, [1.0] * state.tasks.number)
        weights, state = weighting.update(losses, state, mask=mask, task_gradients=task_gradients)
        vector = jnp.stack(jax.tree.leaves(weights))

        def add(leaf):  # as an aggregator, it is no function that a gradient flows through
            wide = jax.lax.stop_gradient(leaf).astype(jnp.promote_types(leaf.dtype, vector.dtype))
            there = vector.reshape(-1, *[1] * (leaf.ndim - 1))
            return jnp.sum(jnp.where(there == 0, 0, there * wide), axis=0).astype(leaf.dtype)

        return jax.tree.map(add, task_gradients), state

    return mtl_jax.Aggregator(init, update)


@functools.cache
def made(name):
    """The aggregator of a name, made once."""
    found = methods.made(name)
    return combined(found) if isinstance(found, mtl_jax.Weighting) else found
