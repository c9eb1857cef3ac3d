"""mtl_jax around optax, and inside it.

Around: a weighting decides the gradient, and any chain of optax makes an update of it: clipping, a
schedule, weight decay. Inside: where the task gradients are at hand, they go through a pipeline of
optax: each is clipped, a weighting combines them (`as_aggregator`), and the same chain follows.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.experimental import aggregating

import mtl_jax

Params = dict[str, jax.Array]
TASKS = ("even", "odd")


def init(key: jax.Array) -> Params:
    """A hidden layer, and a head for each task."""
    keys = jax.random.split(key, 3)
    return {
        "hidden": jax.random.normal(keys[0], (2, 32)),
        "bias": jnp.zeros((32,)),
        "even": 0.1 * jax.random.normal(keys[1], (32,)),
        "odd": 0.1 * jax.random.normal(keys[2], (32,)),
    }


def losses_fn(params: Params, x: jax.Array) -> dict[str, jax.Array]:
    """The errors in an even and an odd function of a point of the plane."""
    z = jnp.tanh(x @ params["hidden"] + params["bias"][None, :])
    targets = {"even": jnp.cos(3 * x[:, 0]), "odd": 3 * x[:, 0] * x[:, 1] ** 2}
    return {task: jnp.mean((z @ params[task] - targets[task]) ** 2) for task in TASKS}


def chain(steps: int) -> optax.GradientTransformation:
    """Clip, and then AdamW with warm-up and cosine decay; no decay of biases."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-2, steps // 10, steps)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            schedule, weight_decay=1e-3, mask=lambda params: jax.tree.map(is_matrix, params)
        ),
    )


def is_matrix(leaf: jax.Array) -> bool:
    """Whether a parameter decays."""
    return leaf.ndim > 1


def batches(steps: int) -> jax.Array:
    """Random points for every step."""
    return jax.random.uniform(jax.random.key(1), (steps, 64, 2), minval=-1.0)


def around(steps: int) -> Params:
    """The usual way: the weighting before the chain."""
    gradient = mtl_jax.value_and_grad(losses_fn, mtl_jax.conflict_free())
    step = mtl_jax.make_train_step(gradient, chain(steps))
    xs = batches(steps)
    state = step.init(init(jax.random.key(0)), xs[0])
    for x in xs:
        state, _ = step(state, x)
    return state.params


def inside(steps: int) -> Params:
    """The same weighting as a part of an optimizer that takes the task gradients."""

    def clip(grads: Any) -> Any:
        return optax.projections.projection_l2_ball(grads, 1.0)

    def clip_each(task_gradients: Any, _: Any) -> Any:
        return jax.vmap(clip)(task_gradients)

    optimizer = aggregating.process(
        optax.stateless(clip_each),
        mtl_jax.as_aggregator(mtl_jax.conflict_free(), num_tasks=len(TASKS)),
        chain(steps),
    )

    @jax.jit
    def step(params: Params, opt_state: Any, x: jax.Array) -> tuple[Params, Any]:
        by_task = jax.jacrev(losses_fn)(params, x)  # {task: its gradient}
        task_gradients = jax.tree.map(lambda *g: jnp.stack(g), *by_task.values())
        updates, opt_state = optimizer.update(task_gradients, opt_state, params)
        updated: Any = optax.apply_updates(params, updates)
        return updated, opt_state

    params = init(jax.random.key(0))
    opt_state = optimizer.init(params)
    for x in batches(steps):
        params, opt_state = step(params, opt_state, x)
    return params


def main(steps: int = 400) -> dict[str, dict[str, float]]:
    """Train both ways, and return the losses on new points."""
    test = jax.random.uniform(jax.random.key(2), (1000, 2), minval=-1.0)
    trained = {"start": init(jax.random.key(0)), "around": around(steps), "inside": inside(steps)}
    found: dict[str, dict[str, float]] = {}
    for name, params in trained.items():
        found[name] = {task: float(loss) for task, loss in losses_fn(params, test).items()}
        print(f"{name}:", {task: f"{loss:.4f}" for task, loss in found[name].items()})
    return found


if __name__ == "__main__":
    main()
