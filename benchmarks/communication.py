"""What each kind of weighting sends between devices: ``python -m benchmarks.communication``."""

import concurrent.futures
import dataclasses
import multiprocessing
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tabulate
import tyro
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import mtl_jax
from benchmarks.hlo import collectives, total_bytes

WIDTH, CLASSES, EXAMPLES = 256, 16, 128
"""Of the encoder's two dense layers, of each head, and the examples on each device."""

LAYOUTS = ("data parallel", "fsdp")

PLAIN = "the plain sum of the losses"

WAYS: Mapping[str, tuple[str, dict[str, Any]]] = {
    PLAIN: ("equal", {}),
    "losses: adaptive": ("adaptive", {}),
    "losses: uncertainty": ("uncertainty", {}),
    "losses: famo (1 more forward pass)": ("famo", {}),
    "Gramian at the representation: upgrad": ("upgrad", {"gramian": "representation"}),
    "the same with every(upgrad, 10)": ("every", {"gramian": "representation"}),
    "Gramian over the encoder: upgrad": ("upgrad", {"gramian": "encoder"}),
    "Gramian over the parameters: upgrad": ("upgrad", {"rows": "unrolled"}),
    'the same with rows="map"': ("upgrad", {"rows": "map"}),
    'the same with rows="vmap"': ("upgrad", {"rows": "vmap"}),
    'the same with rows="low_memory"': ("upgrad", {"rows": "low_memory"}),
    "task gradients: db_mtl": ("db_mtl", {}),
}
"""The steps that are compared: a weighting of each kind, and the options of the transform."""

_WEIGHTINGS = {
    "adaptive": mtl_jax.adaptive,
    "uncertainty": lambda: mtl_jax.uncertainty(optax.sgd(0.01)),
    "famo": mtl_jax.famo,
    "upgrad": mtl_jax.upgrad,
    "every": lambda: mtl_jax.every(mtl_jax.upgrad(), 10),
    "db_mtl": mtl_jax.db_mtl,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Count the bytes of the collectives in compiled train steps, for simulated devices.

    Nothing is run: the numbers are read off the compiled programs.
    """

    devices: tuple[int, ...] = (8, 256)
    """Numbers of devices."""
    tasks: int = 5
    """Number of tasks K."""


def encoder(params: Any, batch: Any) -> jax.Array:
    """The representation."""
    z = batch["x"]
    for layer in params["encoder"]:
        z = jnp.tanh(z @ layer["kernel"] + layer["bias"][None])
    return z


def heads(params: Any, zs: Any, batch: Any) -> dict[str, jax.Array]:
    """The losses, each from its own copy of the representation."""
    return {
        task: jnp.mean((zs[task] @ head - batch[task]) ** 2)
        for task, head in params["heads"].items()
    }


def losses_fn(params: Any, batch: Any) -> dict[str, jax.Array]:
    """The losses."""
    z = encoder(params, batch)
    return heads(params, dict.fromkeys(params["heads"], z), batch)


def make_problem(tasks: int) -> tuple[Any, Any]:
    """The shapes of the parameters and of a batch on all devices."""

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    names, examples = [f"task{k}" for k in range(tasks)], EXAMPLES * jax.device_count()
    layers = [{"kernel": array(WIDTH, WIDTH), "bias": array(WIDTH)} for _ in range(2)]
    params = {"encoder": layers, "heads": {name: array(WIDTH, CLASSES) for name in names}}
    batch = {name: array(examples, CLASSES) for name in names}
    return params, batch | {"x": array(examples, WIDTH)}


def placed(tree: Any, mesh: Mesh, *, spread: bool) -> Any:
    """Shapes laid on the devices: whole on each, or spread along the longest axis they divide."""

    def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        divided = [size if size % mesh.size == 0 else 0 for size in leaf.shape]
        axes: list[str | None] = [None] * len(divided)
        if spread and any(divided):
            axes[divided.index(max(divided))] = "data"
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, tree)


def compiled_step(way: str, layout: str, tasks: int, axis_type: AxisType = AxisType.Auto) -> str:
    """The HLO text of a train step on all devices.

    Args:
      way: the step, from ``WAYS``.
      layout: one of ``LAYOUTS``: the parameters whole on each device, or spread over them.
      tasks: the number of tasks.
      axis_type: the type of the mesh's axis.
    """
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(axis_type,))
    params, batch = make_problem(tasks)
    name, options = WAYS[way]
    optimizer = optax.sgd(0.1)
    weighting = _WEIGHTINGS.get(name, mtl_jax.equal)()
    if "gramian" in options:
        gradient = mtl_jax.representation_value_and_grad(
            encoder, heads, weighting, tasks=tuple(params["heads"]), shared=_in_encoder, **options
        )
    else:
        gradient = mtl_jax.value_and_grad(losses_fn, weighting, **options)
    step = mtl_jax.make_train_step(gradient, optimizer)
    state = jax.eval_shape(step.init, params, batch)
    state = placed(state, mesh, spread=layout == "fsdp")
    if way == PLAIN:
        step = _plain_step(optimizer)
    batch = placed(batch, mesh, spread=True)
    with jax.set_mesh(mesh):
        text = jax.jit(step, donate_argnums=0).lower(state, batch).compile().as_text()
    assert text is not None
    return text


def _in_encoder(path: str) -> bool:
    return path.startswith("encoder/")


def _plain_step(optimizer: optax.GradientTransformation) -> Any:
    def step(state: mtl_jax.TrainState, batch: Any) -> tuple[mtl_jax.TrainState, Any]:
        def total(params: Any) -> tuple[jax.Array, Any]:
            losses = losses_fn(params, batch)
            return sum(losses.values(), jnp.zeros(())), losses

        gradient, losses = jax.grad(total, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return state._replace(params=params, opt_state=opt_state), losses

    return step


def sent_bytes(way: str, layout: str, tasks: int, axis_type: AxisType = AxisType.Auto) -> int:
    """The bytes that a step sends; arguments as for :func:`compiled_step`."""
    return total_bytes(collectives(compiled_step(way, layout, tasks, axis_type)))


def measure(devices: int, tasks: int, ways: Sequence[str]) -> dict[str, list[int]]:
    """The bytes that each step sends, in each layout, in a process with that many devices."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as process:
        return process.submit(_measure, devices, tasks, ways).result()


def _measure(devices: int, tasks: int, ways: Sequence[str]) -> dict[str, list[int]]:
    jax.config.update("jax_num_cpu_devices", devices)
    return {way: [sent_bytes(way, layout, tasks) for layout in LAYOUTS] for way in ways}


def markdown_table(measured: Mapping[int, Mapping[str, Sequence[int]]]) -> str:
    """The table: the plain step's bytes, and how many more the other steps send.

    Args:
      measured: for each number of devices and each step the bytes in each layout.
    """
    headers = ["step"]
    headers += [f"{layout}, {devices} devices" for devices in measured for layout in LAYOUTS]
    rows = []
    for way in WAYS:
        row = [way]
        for table in measured.values():
            for size, plain in zip(table[way], table[PLAIN], strict=True):
                row.append(f"{size:,}" if way == PLAIN else f"{size - plain:+,}")
        rows.append(row)
    align = ("left", *["right"] * (len(headers) - 1))
    return tabulate.tabulate(
        rows, headers, tablefmt="github", disable_numparse=True, colalign=align
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exits with status 2 after a message if the configuration is wrong."""
    config = tyro.cli(Config, prog="python -m benchmarks.communication", args=arguments)
    for name, value in (("--devices", min(config.devices, default=0)), ("--tasks", config.tasks)):
        if value < 2:
            print(f"error: {name} must be at least 2, got {value}.", file=sys.stderr)
            sys.exit(2)
    measured = {devices: measure(devices, config.tasks, tuple(WAYS)) for devices in config.devices}
    given = sys.argv[1:] if arguments is None else arguments
    print(markdown_table(measured))
    print(f"\nMade by `{shlex.join(['python', '-m', 'benchmarks.communication', *given])}`")


if __name__ == "__main__":
    main()
