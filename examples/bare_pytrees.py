"""Bare pytrees: no network library, and the Gramian at the representation.

A network with three heads. `upgrad` harms no task to first order. It reads the
inner products of the task gradients, which at the representation cost about as much as plain
training, however many tasks there are.
"""

import jax
import jax.numpy as jnp
import optax

import mtl_jax

Params = dict[str, jax.Array]
Batch = dict[str, jax.Array]
TASKS = ("sum", "product", "largest")


def init(key: jax.Array, inputs: int = 6, width: int = 32) -> Params:
    """An encoder of two layers, and a linear head for each task."""
    keys = jax.random.split(key, 6)
    shapes = {"first": (inputs, width), "bias": (1, width), "second": (width, width)}
    shapes |= dict.fromkeys(TASKS, (width, 1))
    return {
        name: jax.random.normal(key, shape) / shape[0] ** 0.5
        for (name, shape), key in zip(shapes.items(), keys, strict=True)
    }


def encoder(params: Params, batch: Batch) -> jax.Array:
    """The representation that the heads share."""
    z = jnp.tanh(batch["x"] @ params["first"] + params["bias"])
    return jnp.tanh(z @ params["second"])


def heads(params: Params, zs: dict[str, jax.Array], batch: Batch) -> dict[str, jax.Array]:
    """The loss of each task, from the task's own copy of the representation."""
    predictions = {task: (z @ params[task])[:, 0] for task, z in zs.items()}
    return {task: jnp.mean((predictions[task] - batch[task]) ** 2) for task in zs}


def make_batch(key: jax.Array, size: int = 128) -> Batch:
    """Random inputs, and what is asked about them."""
    x = jax.random.uniform(key, (size, 6), minval=-1.0)
    return {
        "x": x,
        "sum": jnp.sum(x, axis=1),
        "product": 5 * x[:, 0] * x[:, 1],
        "largest": jnp.max(x, axis=1),
    }


def main(steps: int = 400) -> dict[str, list[float]]:
    """Train, and return the losses on fresh batches by task: before and after."""
    params = init(jax.random.key(0))
    test = make_batch(jax.random.key(1), 1000)
    z = encoder(params, test)
    mtl_jax.check_heads(heads, params, z, test, tasks=TASKS)  # does each use its own copy?

    gradient = mtl_jax.representation_value_and_grad(
        encoder, heads, mtl_jax.upgrad(), tasks=TASKS, diagnostics=True
    )
    step = mtl_jax.make_train_step(gradient, optax.adam(3e-3))
    state = step.init(params, test)
    for number, key in enumerate(jax.random.split(jax.random.key(2), steps)):
        state, value = step(state, make_batch(key))
        if value.diagnostics is not None and number % 100 == 0:
            conflicts = value.diagnostics.conflicting
            weights = {task: round(float(weight), 2) for task, weight in value.weights.items()}
            print(f"step {number}: {conflicts:.0%} of the pairs conflict, weights {weights}")
    losses = jax.jit(gradient.losses)
    before, after = losses(params, test), losses(state.params, test)
    for task in TASKS:
        print(f"{task}: loss {before[task]:.3f} -> {after[task]:.3f}")
    return {task: [float(before[task]), float(after[task])] for task in TASKS}


if __name__ == "__main__":
    main()
