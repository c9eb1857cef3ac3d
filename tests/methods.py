"""The table of all loss-based weightings that the shared checks run through."""

import functools

import jax
import jax.numpy as jnp
import optax

import mtl_jax

TASKS = ("a", "b", "c")

METHODS = {
    "equal": mtl_jax.equal,
    "constant": functools.partial(mtl_jax.constant, {"a": 0.5, "b": 1.0, "c": 1.5}),
    "adaptive": mtl_jax.adaptive,
    "adaptive[emphasis=2,decay=0.9]": functools.partial(mtl_jax.adaptive, 2.0, decay=0.9),
    "adaptive[softmax]": functools.partial(mtl_jax.adaptive, rule="softmax"),
    "adaptive[initial]": functools.partial(mtl_jax.adaptive, relative_to="initial"),
    "dwa": functools.partial(mtl_jax.dwa, window=2),
    "uncertainty": functools.partial(mtl_jax.uncertainty, optax.adam(0.05)),
    "uncertainty[half]": functools.partial(mtl_jax.uncertainty, optax.sgd(0.05), form="half"),
    "uncertainty[revised]": functools.partial(mtl_jax.uncertainty, optax.sgd(0.05), 0.5, "revised"),
    "random_weighting": mtl_jax.random_weighting,
    "random_weighting[dirichlet]": functools.partial(mtl_jax.random_weighting, "dirichlet"),
    "geometric": mtl_jax.geometric,
    "dynamic_task_priority": functools.partial(mtl_jax.dynamic_task_priority, 1.0, decay=0.5),
    "cov_weighting": mtl_jax.cov_weighting,
    "cov_weighting[decay=0.9]": functools.partial(mtl_jax.cov_weighting, 0.9),
    "softadapt": functools.partial(mtl_jax.softadapt, window=2, beta=1.0),
    "softadapt[normalized]": functools.partial(mtl_jax.softadapt, 2, variant="normalized"),
    "softadapt[loss_weighted]": functools.partial(
        mtl_jax.softadapt, 1, order=3, variant="loss_weighted"
    ),
    "relobralo": functools.partial(mtl_jax.relobralo, alpha=0.9),
    "relobralo[rho=0.5]": functools.partial(mtl_jax.relobralo, alpha=0.9, rho=0.5),
    "imtl_l": functools.partial(mtl_jax.imtl_l, optax.adam(0.05)),
    "stch": functools.partial(mtl_jax.stch, warmup=3),
    "stch[mu=0.1,window=2]": functools.partial(mtl_jax.stch, warmup=3, mu=0.1, window=2),
    "famo": mtl_jax.famo,
}
RANDOM = ("random_weighting", "random_weighting[dirichlet]", "relobralo[rho=0.5]")
SUMS_TO_TASKS = ("equal", "constant", "adaptive", "dwa", "relobralo")
SUMS_TO_ONE = ("random_weighting", "cov_weighting", "softadapt", "famo")


def losses_like(dtype=jnp.float32):
    return {task: jax.ShapeDtypeStruct((), dtype) for task in TASKS}


def loss_sequence(steps=8, dtype=jnp.float32, seed=0):
    """Losses that fall at different rates, with noise: one pytree for each step."""
    keys = jax.random.split(jax.random.key(seed), steps)
    rates = (0.3, 0.1, 0.02)
    return [
        {
            task: jnp.asarray((2.0 + k) * jnp.exp(-rate * step) * (0.8 + 0.4 * noise), dtype)
            for k, (task, rate, noise) in enumerate(
                zip(TASKS, rates, jax.random.uniform(key, (3,)), strict=True)
            )
        }
        for step, key in enumerate(keys)
    ]


def run(weighting, sequence, *, masks=None, key=None, jit=True):
    """Run a weighting over a sequence of losses, observing 0.9 of each after the step."""
    update = jax.jit(weighting.update) if jit else weighting.update
    state = weighting.init(sequence[0], key=key)
    history = []
    for step, losses in enumerate(sequence):
        mask = None if masks is None else masks[step]
        weights, state = update(losses, state, mask=mask)
        if weighting.observe is not None:
            after = {
                task: loss.astype(jnp.result_type(loss, jnp.float32)) * (0.9 - 0.1 * k)
                for k, (task, loss) in enumerate(losses.items())
            }
            state = weighting.observe(after, state, mask=mask)
        history.append(weights)
    return history, state
