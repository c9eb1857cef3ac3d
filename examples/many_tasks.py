"""Fifty tasks: policies for fifty contextual bandits, learned by REINFORCE, with one trunk.

Five bandits pay a hundred times as much as the others, and for other features of the context, so
with equal weights the trunk learns what these five need. The loss of a policy gradient is of any
sign and size, and methods that compare losses have nothing to go by. Those that compare gradients
do; at the representation fifty gradients cost about as much as plain training.
"""

import jax
import jax.numpy as jnp
import optax

import mtl_jax

Params = dict[str, jax.Array]
NUMBER, RICH, ACTIONS = 50, 5, 5
CONTEXT, WIDTH, LATENT = 8, 64, 16
TASKS = tuple(f"bandit_{number:02}" for number in range(NUMBER))


def rewards(context: jax.Array) -> jax.Array:
    """What each bandit pays for each action: float[tasks, batch, actions]."""
    mix, own = jax.random.split(jax.random.key(0))
    features = jnp.sin(context @ jax.random.normal(mix, (CONTEXT, 2 * CONTEXT)) / 2)
    weights = jax.random.normal(own, (NUMBER, 2 * CONTEXT, ACTIONS))
    rich = jnp.arange(NUMBER)[:, None, None] < RICH
    used = rich == (jnp.arange(2 * CONTEXT)[None, :, None] < CONTEXT)
    return jnp.where(rich, 100, 1) * jnp.einsum("bf,kfa->kba", features, weights * used)


def init(key: jax.Array) -> Params:
    """A trunk, and the fifty heads in one array."""
    first, second, third = jax.random.split(key, 3)
    return {
        "first": jax.random.normal(first, (CONTEXT, WIDTH)) / CONTEXT**0.5,
        "second": jax.random.normal(second, (WIDTH, LATENT)) / WIDTH**0.5,
        "heads": 0.1 * jax.random.normal(third, (NUMBER, LATENT, ACTIONS)),
    }


def trunk(params: Params, key: jax.Array, context: jax.Array) -> jax.Array:
    """The representation that the policies share."""
    return jnp.tanh(jnp.tanh(context @ params["first"]) @ params["second"])


def policies(
    params: Params, zs: dict[str, jax.Array], key: jax.Array, context: jax.Array
) -> dict[str, jax.Array]:
    """REINFORCE: each policy draws an action, and learns from the reward above the average."""
    z = jnp.stack([zs[task] for task in TASKS])  # each task's own copy
    logits = jnp.einsum("kbw,kwa->kba", z, params["heads"])
    action = jax.random.categorical(key, logits)[:, :, None]
    reward = jnp.take_along_axis(rewards(context), action, axis=2)
    advantage = reward - reward.mean(axis=1, keepdims=True)
    log_policy = jnp.take_along_axis(jax.nn.log_softmax(logits), action, axis=2)
    losses = -jnp.mean(advantage * log_policy, axis=(1, 2))
    return dict(zip(TASKS, losses, strict=True))


def share_of_best(params: Params) -> jax.Array:
    """What each policy earns on new contexts, 1 being the best there is and 0 chance."""
    context = jax.random.normal(jax.random.key(1), (500, CONTEXT))
    z = trunk(params, jax.random.key(0), context)
    policy = jax.nn.softmax(jnp.einsum("bw,kwa->kba", z, params["heads"]))
    table = rewards(context)
    chance, best = table.mean(axis=(1, 2)), table.max(axis=2).mean(axis=1)
    return (jnp.sum(policy * table, axis=2).mean(axis=1) - chance) / (best - chance)


def train(weighting: mtl_jax.Weighting, steps: int) -> jax.Array:
    """The share that each policy earns after training."""
    gradient = mtl_jax.representation_value_and_grad(trunk, policies, weighting, tasks=TASKS)
    step = mtl_jax.make_train_step(gradient, optax.adam(3e-3))
    contexts = jax.random.normal(jax.random.key(4), (steps, 64, CONTEXT))
    state = step.init(init(jax.random.key(2)), contexts[0], rng=jax.random.key(3))
    for context in contexts:
        state, _ = step(state, context)  # with a fresh key from the state
    return share_of_best(state.params)


def main(steps: int = 400) -> dict[str, dict[str, float]]:
    """Compare weightings, and return the mean shares of the rich bandits and of the poor."""
    weightings = {"equal": mtl_jax.equal(), "conflict_free": mtl_jax.conflict_free()}
    found: dict[str, dict[str, float]] = {}
    for name, weighting in weightings.items():
        shares = train(weighting, steps)
        groups = {"rich": shares[:RICH], "poor": shares[RICH:], "all": shares}
        found[name] = {group: float(share.mean()) for group, share in groups.items()}
        print(f"{name}:", {group: f"{share:.0%}" for group, share in found[name].items()})
    return found


if __name__ == "__main__":
    main()
