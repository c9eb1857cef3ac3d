"""A loop of your own: all steps in one `lax.scan`, and several seeds at once with `vmap`.

For small networks most of a step's time is spent on starting it; a scan starts once. The gradient
is a pure function and its state a pytree of arrays, so they go through `jit`, `scan` and `vmap` as
they are. (A step of `make_train_step` goes through them, too: see physics_informed.)
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

import mtl_jax

Params = dict[str, jax.Array]
TASKS = ("easy", "hard")


def init(key: jax.Array) -> Params:
    """A hidden layer, and a head for each task."""
    keys = jax.random.split(key, 3)
    return {
        "hidden": 2 * jax.random.normal(keys[0], (1, 64)),
        "bias": jax.random.normal(keys[1], (64,)),
        "heads": 0.1 * jax.random.normal(keys[2], (64, 2)),
    }


def losses_fn(params: Params, x: jax.Array) -> dict[str, jax.Array]:
    """The errors in a slow and in a fast wave."""
    z = jnp.tanh(x[:, None] @ params["hidden"] + params["bias"][None, :])
    targets = jnp.stack([jnp.sin(2 * x), jnp.sin(6 * x)], axis=1)
    errors = jnp.mean((z @ params["heads"] - targets) ** 2, axis=0)
    return dict(zip(TASKS, errors, strict=True))


def train(key: jax.Array, weighting: mtl_jax.Weighting, steps: int) -> dict[str, jax.Array]:
    """Train from one seed; the losses of every step by task."""
    optimizer = optax.adam(1e-2)
    gradient = mtl_jax.value_and_grad(losses_fn, weighting)
    init_key, weighting_key, data_key = jax.random.split(key, 3)
    params = init(init_key)
    weighting_state = gradient.init(params, jnp.zeros((64,)), key=weighting_key)
    states = params, optimizer.init(params), weighting_state

    def step(states: Any, key: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        params, opt_state, weighting_state = states
        x = jax.random.uniform(key, (64,), minval=-1.0)
        value, grads, weighting_state = gradient(params, weighting_state, x)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, weighting_state), value.losses

    _, losses = jax.lax.scan(step, states, jax.random.split(data_key, steps))
    return losses


def main(steps: int = 500, seeds: int = 8) -> dict[str, dict[str, float]]:
    """Compare two weightings over seeds, and return the mean losses of the last steps."""
    weightings = {"equal": mtl_jax.equal(), "adaptive": mtl_jax.adaptive()}
    found: dict[str, dict[str, float]] = {}
    for name, weighting in weightings.items():
        run = jax.jit(jax.vmap(functools.partial(train, weighting=weighting, steps=steps)))
        losses = run(jax.random.split(jax.random.key(0), seeds))  # float[seeds, steps] by task
        last = {task: losses[task][:, -steps // 10 :].mean(axis=1) for task in TASKS}
        found[name] = {task: float(last[task].mean()) for task in TASKS}
        for task in TASKS:
            print(
                f"{name}, {task}: {last[task].mean():.4f} ± {last[task].std():.4f} over the seeds"
            )
    return found


if __name__ == "__main__":
    main()
