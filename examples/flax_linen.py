"""Flax Linen, with batch statistics and dropout: the train state carries both.

Two tasks on the same inputs, a regression and a classification. Their losses are of different
sizes and kinds; `uncertainty` learns how much each counts.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import mtl_jax

Batch = dict[str, jax.Array]


class Network(nn.Module):
    """A shared trunk and a head for each task."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> dict[str, jax.Array]:
        """Return what each head says."""
        z = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(64)(x)))
        z = nn.Dropout(0.1, deterministic=not train)(z)
        return {"radius": nn.Dense(1)(z)[:, 0], "quadrant": nn.Dense(4)(z)}


def make_batch(key: jax.Array, size: int) -> Batch:
    """Points of the plane, how far from the origin they lie, and in which quadrant."""
    x = jax.random.normal(key, (size, 2))
    quadrant = 2 * (x[:, 0] > 0) + (x[:, 1] > 0)
    return {"x": x, "radius": 10 * jnp.linalg.norm(x, axis=1), "quadrant": quadrant}


network = Network()


def losses_fn(
    params: Any, batch_stats: Any, key: jax.Array, batch: Batch
) -> tuple[dict[str, jax.Array], Any]:
    """The losses, and the new batch statistics."""
    outputs, updated = network.apply(
        {"params": params, "batch_stats": batch_stats},
        batch["x"],
        train=True,
        rngs={"dropout": key},
        mutable=["batch_stats"],
    )
    classes = optax.softmax_cross_entropy_with_integer_labels(
        outputs["quadrant"], batch["quadrant"]
    )
    losses = {
        "radius": jnp.mean((outputs["radius"] - batch["radius"]) ** 2),
        "quadrant": jnp.mean(classes),
    }
    return losses, updated["batch_stats"]


def main(steps: int = 300) -> dict[str, float]:
    """Train, and return how well each task does on new points."""
    weighting = mtl_jax.uncertainty(optax.adam(1e-2))
    gradient = mtl_jax.value_and_grad(losses_fn, weighting, has_aux=True)
    step = mtl_jax.make_train_step(gradient, optax.adam(1e-2))

    keys = jax.random.split(jax.random.key(0), steps + 3)
    test = make_batch(keys[2], 1000)
    variables = network.init(keys[0], test["x"], train=False)
    state = step.init(variables["params"], test, model_state=variables["batch_stats"], rng=keys[1])
    for number, key in enumerate(keys[3:]):
        state, value = step(state, make_batch(key, 128))
        if number % 100 == 0 or number == steps - 1:
            losses, weights = rounded(value.losses), rounded(value.weights)
            print(f"step {number}: losses {losses}, weights {weights}")

    variables = {"params": state.params, "batch_stats": state.model_state}
    outputs: Any = network.apply(variables, test["x"], train=False)
    error = jnp.mean(jnp.abs(outputs["radius"] - test["radius"]))
    accuracy = jnp.mean(jnp.argmax(outputs["quadrant"], axis=1) == test["quadrant"])
    print(f"test: radius off by {error:.2f} on average, quadrant right for {accuracy:.1%}")
    return {"error": float(error), "accuracy": float(accuracy)}


def rounded(values: dict[str, jax.Array]) -> dict[str, float]:
    """The values with three digits."""
    return {name: float(f"{value:.3g}") for name, value in values.items()}


if __name__ == "__main__":
    main()
