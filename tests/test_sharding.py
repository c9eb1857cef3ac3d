"""Several devices: the numbers of one device, from arrays spread over a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from trees import assert_trees_close

import mtl_jax

TASKS = ("a", "b", "c")
DEVICES = 8


def make_params():
    keys = iter(jax.random.split(jax.random.key(0), 3 + len(TASKS)))
    return {
        "encoder": {
            "kernel": jax.random.normal(next(keys), (8, 16)) / 3,
            "bias": jax.random.normal(next(keys), (16,)) / 3,
            "mix": jax.random.normal(next(keys), (2, 16, 8)) / 4,
        },
        "heads": {task: jax.random.normal(next(keys), (8,)) for task in TASKS},
    }


def make_batch():
    x, y, seen = jax.random.split(jax.random.key(1), 3)
    y, seen = jax.random.normal(y, (3, 16)), jax.random.bernoulli(seen, 0.6, (3, 16))
    batch = {"x": jax.random.normal(x, (16, 8))}
    return batch | {task: (y[k], seen[k]) for k, task in enumerate(TASKS)}


def encoder(params, batch):
    z = jnp.tanh(batch["x"] @ params["encoder"]["kernel"] + params["encoder"]["bias"][None])
    one, two = jnp.unstack(params["encoder"]["mix"])
    return {"one": jnp.tanh(z @ one), "two": z @ two}


def heads(params, zs, batch):
    def loss(task):
        label, seen = batch[task]
        z = zs[task]["one"] + zs[task]["two"]
        return mtl_jax.masked_mean((z @ params["heads"][task] - label) ** 2, seen)

    return {task: loss(task) for task in TASKS}


def losses_fn(params, batch):
    return heads(params, dict.fromkeys(TASKS, encoder(params, batch)), batch)
