"""Equinox: the arrays of a module are its parameters, and a path names those that tasks share.

The Gramian is taken over the trunk alone (`shared=`), at every fifth step (`every`); in between the
weights are held, and a step costs as much as plain training.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import mtl_jax

Batch = dict[str, jax.Array]


class Network(eqx.Module):
    """A shared trunk and a head for each task."""

    trunk: eqx.nn.MLP
    heads: dict[str, eqx.nn.Linear]

    def __init__(self, tasks: tuple[str, ...], *, key: jax.Array) -> None:
        trunk_key, *head_keys = jax.random.split(key, 1 + len(tasks))
        self.trunk = eqx.nn.MLP(2, 32, 64, 1, final_activation=jnp.tanh, key=trunk_key)
        self.heads = {
            task: eqx.nn.Linear(32, 1, key=head_key)
            for task, head_key in zip(tasks, head_keys, strict=True)
        }

    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        """Return each head's number for one input."""
        z = self.trunk(x)
        return {task: head(z)[0] for task, head in self.heads.items()}


def make_batch(key: jax.Array, size: int = 128) -> Batch:
    """Points of a square, and three functions of them on quite different scales."""
    x = jax.random.uniform(key, (size, 2), minval=-1.0)
    return {
        "x": x,
        "slope": 10 * (x[:, 0] - x[:, 1]),
        "bowl": jnp.sum(x**2, axis=1),
        "waves": 0.3 * jnp.sin(4 * x[:, 0]),
    }


def train(weighting: mtl_jax.Weighting, steps: int) -> dict[str, float]:
    """The share of each task's variance that is left unexplained after training."""
    network = Network(("slope", "bowl", "waves"), key=jax.random.key(0))
    params, static = eqx.partition(network, eqx.is_inexact_array)

    def losses_fn(params: Network, batch: Batch) -> dict[str, jax.Array]:
        outputs = jax.vmap(eqx.combine(params, static))(batch["x"])
        return {task: jnp.mean((outputs[task] - batch[task]) ** 2) for task in outputs}

    gradient = mtl_jax.value_and_grad(
        losses_fn, weighting, shared=lambda path: path.startswith("trunk/")
    )
    step = mtl_jax.make_train_step(gradient, optax.adam(3e-3))
    test = make_batch(jax.random.key(1), 1000)
    state = step.init(params, test)
    for key in jax.random.split(jax.random.key(2), steps):
        state, _ = step(state, make_batch(key))
    losses = losses_fn(state.params, test)
    return {task: float(loss / jnp.var(test[task])) for task, loss in losses.items()}


def main(steps: int = 500) -> dict[str, dict[str, float]]:
    """Compare equal weights with a method that does not see the scale of a task."""
    weightings = {
        "equal": mtl_jax.equal(),
        "nash_mtl": mtl_jax.every(mtl_jax.nash_mtl(), 5),
    }
    unexplained = {name: train(weighting, steps) for name, weighting in weightings.items()}
    for name, shares in unexplained.items():
        print(f"{name}: unexplained", {task: f"{share:.2%}" for task, share in shares.items()})
    return unexplained


if __name__ == "__main__":
    main()
