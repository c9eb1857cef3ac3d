"""Flax NNX, where not every example has the labels of every task.

`nnx.split` gives the parameters and what else the model holds, `nnx.merge` puts the model together
inside the losses. `masked_mean` and `mask=` leave out the labels, and the tasks, that are missing.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import mtl_jax

Batch = dict[str, jax.Array]
TASKS = ("amplitude", "phase")


class Network(nnx.Module):
    """A shared trunk and a head for each task."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.trunk = nnx.Linear(32, 64, rngs=rngs)
        self.norm = nnx.BatchNorm(64, rngs=rngs)
        self.amplitude = nnx.Linear(64, 1, rngs=rngs)
        self.phase = nnx.Linear(64, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        """Return the amplitude, and the sine and cosine of the phase."""
        z = nnx.relu(self.norm(self.trunk(x)))
        return {"amplitude": self.amplitude(z), "phase": self.phase(z)}


def make_batch(key: jax.Array, size: int = 64) -> Batch:
    """Noisy sine waves; a tenth has its amplitude labelled, and half of the batches the phase."""
    keys = jax.random.split(key, 5)
    amplitude = jax.random.uniform(keys[0], (size, 1), minval=0.5, maxval=2.0)
    phase = jax.random.uniform(keys[1], (size, 1), maxval=2 * jnp.pi)
    time = jnp.linspace(0, 2 * jnp.pi, 32)[None, :]
    waves = amplitude * jnp.sin(time + phase) + 0.1 * jax.random.normal(keys[2], (size, 32))
    return {
        "x": waves,
        "amplitude": amplitude,
        "phase": jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=1),
        "has_amplitude": jax.random.bernoulli(keys[3], 0.1, (size,)),
        "has_phase": jnp.full((size,), jax.random.bernoulli(keys[4], 0.5)),
    }


def main(steps: int = 300) -> dict[str, Any]:
    """Train, and return the errors on new waves, and in how many steps each task was present."""
    network = Network(nnx.Rngs(0))
    graph, params, rest = nnx.split(network, nnx.Param, ...)

    def losses_fn(params: Any, rest: Any, batch: Batch) -> tuple[dict[str, jax.Array], Any]:
        model = nnx.merge(graph, params, rest, copy=True)
        outputs = model(batch["x"])
        losses: dict[str, jax.Array] = {}
        for task in TASKS:
            errors = jnp.sum((outputs[task] - batch[task]) ** 2, axis=1)
            losses[task] = mtl_jax.masked_mean(errors, batch[f"has_{task}"])
        return losses, nnx.state(model, nnx.Not(nnx.Param))  # with the new batch statistics

    gradient = mtl_jax.value_and_grad(losses_fn, mtl_jax.dwa(window=20), has_aux=True)
    step = mtl_jax.make_train_step(gradient, optax.adam(3e-3))
    test = make_batch(jax.random.key(2), 1000)
    state = step.init(params, test, model_state=rest)
    present = dict.fromkeys(TASKS, 0)
    for number, key in enumerate(jax.random.split(jax.random.key(1), steps)):
        batch = make_batch(key)
        mask = {task: jnp.any(batch[f"has_{task}"]) for task in TASKS}
        state, value = step(state, batch, mask=mask)
        present = {task: present[task] + int(mask[task]) for task in TASKS}
        if number % 50 == 0:
            print(f"step {number}: weights", {t: f"{w:.2f}" for t, w in value.weights.items()})

    trained = nnx.merge(graph, state.params, state.model_state)
    trained.eval()
    outputs = trained(test["x"])
    errors = {t: float(jnp.mean(jnp.abs(outputs[t] - test[t]))) for t in TASKS}
    for task in TASKS:
        print(f"{task}: {present[task]} of {steps} steps, mean error {errors[task]:.3f}")
    return {"errors": errors, "present": present}


if __name__ == "__main__":
    main()
