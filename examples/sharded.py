"""Many devices: the batch along one axis of a mesh, the network's width along the other.

Nothing is asked of mtl_jax: arrays are placed, and the same step runs on all devices. Run as
a program this simulates eight devices on a CPU; take out that line where there are real ones.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import mtl_jax

Params = dict[str, jax.Array]
TASKS = ("norm", "sign")
SHARDED = {"first": P(None, "model"), "second": P("model", None), "norm": P(), "sign": P()}


def init(key: jax.Array) -> Params:
    """Two layers, and a head for each task."""
    keys = jax.random.split(key, 4)
    shapes = {"first": (8, 64), "second": (64, 32), "norm": (32,), "sign": (32,)}
    return {
        name: jax.random.normal(key, shape) / shape[0] ** 0.5
        for (name, shape), key in zip(shapes.items(), keys, strict=True)
    }


def losses_fn(params: Params, x: jax.Array) -> dict[str, jax.Array]:
    """The loss of a regression and of a classification."""
    z = jnp.tanh(jax.nn.relu(x @ params["first"]) @ params["second"])
    norm, sign = z @ params["norm"], z @ params["sign"]
    positive = (x[:, 0] > 0).astype(x.dtype)
    return {
        "norm": jnp.mean((norm - jnp.linalg.norm(x, axis=1)) ** 2),
        "sign": jnp.mean(optax.sigmoid_binary_cross_entropy(sign, positive)),
    }


def train(mesh: jax.sharding.Mesh, steps: int) -> list[dict[str, float]]:
    """The losses of all steps, on the devices of a mesh."""
    gradient = mtl_jax.value_and_grad(losses_fn, mtl_jax.aligned_mtl())
    step = mtl_jax.make_train_step(gradient, optax.adam(1e-2))
    params = init(jax.random.key(0))
    params = {n: jax.device_put(p, NamedSharding(mesh, SHARDED[n])) for n, p in params.items()}
    batches = np.random.default_rng(0).normal(size=(steps, 64, 8)).astype(np.float32)
    state = step.init(params, batches[0])
    history: list[dict[str, float]] = []
    for batch in batches:
        x = jax.device_put(batch, NamedSharding(mesh, P("data", None)))
        state, value = step(state, x)
        history.append({task: float(loss) for task, loss in value.losses.items()})
    print(f"on {mesh.size} device(s), the first layer is {state.params['first'].sharding.spec}")
    return history


def main(steps: int = 100) -> dict[str, list[dict[str, float]]]:
    """Train on all devices and on one, and return both histories."""
    axes, types = ("data", "model"), (AxisType.Auto, AxisType.Auto)
    number = jax.device_count() // 2
    everywhere = train(jax.make_mesh((number, 2), axes, axis_types=types), steps)
    alone = train(jax.make_mesh((1, 1), axes, axis_types=types, devices=jax.devices()[:1]), steps)
    difference = max(
        abs(a[t] - b[t]) for a, b in zip(everywhere, alone, strict=True) for t in TASKS
    )
    print(f"losses {everywhere[0]} -> {everywhere[-1]}")
    print(f"the largest difference to one device in {steps} steps: {difference:.1e}")
    return {"everywhere": everywhere, "alone": alone}


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    main()
