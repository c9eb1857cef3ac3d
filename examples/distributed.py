"""Train on the devices of several processes: start it in each, with the process's number."""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import mtl_jax

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--coordinator", help="HOST:PORT of process 0; found under Slurm, MPI, on TPU")
parser.add_argument("--processes", type=int, help="number of processes; found there, too")
parser.add_argument("--process", type=int, help="number of this process; found there, too")
parser.add_argument("--timeout", type=int, default=100, help="seconds; then a peer is given up")
parser.add_argument("--steps", type=int, default=100)
options = parser.parse_args()
jax.distributed.initialize(
    options.coordinator,
    options.processes,
    options.process,
    initialization_timeout=options.timeout,
    heartbeat_timeout_seconds=options.timeout,
    shutdown_timeout_seconds=options.timeout,
)


def losses_fn(params: dict[str, jax.Array], x: jax.Array) -> dict[str, jax.Array]:
    """Two errors, of the sum of x and of a product."""
    z = jnp.tanh(x @ params["encoder"])
    targets = {"sum": jnp.sum(x, axis=1), "product": x[:, 0] * x[:, 1]}
    return {task: jnp.mean((z @ params[task] - target) ** 2) for task, target in targets.items()}


def initial() -> mtl_jax.TrainState:
    """The state before the first step, the same in all processes."""
    normal = functools.partial(jax.random.normal, jax.random.key(0))
    params = {"encoder": normal((4, 16)), "sum": normal((16,)), "product": normal((16,))}
    return step.init(params, mine)  # whose losses are traced, not computed


gradient = mtl_jax.value_and_grad(losses_fn, mtl_jax.upgrad())
step = mtl_jax.make_train_step(gradient, optax.adam(0.01))
mesh = jax.make_mesh((jax.device_count(),), ("data",))
jax.set_mesh(mesh)
everything = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
mine = np.split(everything, jax.process_count())[jax.process_index()]  # read only these
x = jax.make_array_from_process_local_data(NamedSharding(mesh, P("data")), mine)
state = jax.jit(initial, out_shardings=NamedSharding(mesh, P()))()
for number in range(1, options.steps + 1):
    state, value = step(state, x)
    if jax.process_index() == 0 and number % 20 == 0:
        print("step", number, {t: float(loss) for t, loss in value.losses.items()}, flush=True)
