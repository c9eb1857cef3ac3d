"""What the comparison's training loop costs beside one by hand: ``python -m benchmarks.loops``.

Three problems: a convolutional network of plain ``nn.Conv``, a dense network with steps of less
than a millisecond, and a network whose examples Grain reads and transforms in worker processes. The
loop by hand is what a user writes: a jitted step of the sum of the losses, called with batch after
batch. Both train for the same number of steps, on one core; the CPU time is that of the process and
of its workers.
"""

import dataclasses
import json
import os
import pathlib
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tabulate
import tyro
from absl import flags

from benchmarks.speed.child import ONE_THREAD, one_core
from mtl_jax.compare import WEIGHTINGS, Problem, Task
from mtl_jax.compare.training import Setting, Trainer

TASKS = ("left", "right")
CLASSES = 10
WORKERS = 2


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure the loops and print a table.

    Attributes:
      rounds: How often each loop is timed; reported are the medians and the quartiles.
      steps: Steps of a timing of the convolutional network; the others make 50 and 5 times as many.
      out: File for the numbers.
    """

    rounds: int = 7
    steps: int = 40
    out: pathlib.Path = pathlib.Path("runs/loops.json")


class Convolutional(nn.Module):
    """Three stages, as a user writes them."""

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        """The logits of each task."""
        for features in (16, 32, 64):
            x = nn.relu(nn.Conv(features, (3, 3), strides=(2, 2))(x))
            x = nn.relu(nn.Conv(features, (3, 3))(x))
        x = x.mean(axis=(1, 2))
        return {task: nn.Dense(CLASSES, name=task)(x) for task in TASKS}


class Dense(nn.Module):
    """Two hidden layers."""

    width: int = 128

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        """The logits of each task."""
        x = x.reshape(len(x), -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(self.width)(x))
        return {task: nn.Dense(CLASSES, name=task)(x) for task in TASKS}


class Flip(grain.transforms.RandomMap):
    """Turns half of the pictures over."""

    def random_map(self, element: Any, rng: np.random.Generator) -> Any:
        """Another example."""
        x = element["x"][:, ::-1] if rng.random() < 0.5 else element["x"]
        return {**element, "x": np.ascontiguousarray(x)}


class Source:
    """Examples that are made when they are read."""

    def __init__(self, examples: Mapping[str, np.ndarray]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples["x"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {field: values[index] for field, values in self._examples.items()}


def examples(number: int, *shape: int) -> dict[str, np.ndarray]:
    """Random ones."""
    rng = np.random.default_rng(0)
    labels = {task: rng.integers(0, CLASSES, number).astype(np.int32) for task in TASKS}
    return {"x": rng.normal(size=(number, *shape)).astype(np.float32), **labels}


def losses_of(outputs: Mapping[str, jax.Array], batch: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The mean cross entropy of each task."""
    entropy = optax.softmax_cross_entropy_with_integer_labels
    return {task: jnp.mean(entropy(outputs[task], batch[task])) for task in TASKS}


def make_problem(network: nn.Module, train: Any, few: Any, batch: int, **options: Any) -> Problem:
    """A problem of the comparison."""

    def init(key: jax.Array) -> tuple[Any, Any]:
        return network.init(key, few["x"][:1]), {}

    def losses(params: Any, model_state: Any, key: jax.Array, batch: Any) -> tuple[Any, Any]:
        return losses_of(network.apply(params, batch["x"]), batch), model_state  # pyright: ignore

    return Problem(
        name="loop",
        tasks=dict.fromkeys(TASKS, Task()),
        train=train,
        validation=few,
        test=few,
        init=init,
        losses=losses,
        predict=lambda params, state, batch: network.apply(params, batch["x"]),  # pyright: ignore
        optimizer=lambda learning_rate, steps: optax.adam(learning_rate),
        learning_rate=1e-3,
        epochs=1,
        batch_size=batch,
        **options,
    )


def array_batches(problem: Problem, steps: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches of arrays in memory, as by hand."""
    order = np.random.default_rng(1).permutation(len(problem.train["x"]))
    size = problem.batch_sizes[""]
    for step in range(steps):
        rows = order[step * size : (step + 1) * size]
        yield {field: values[rows] for field, values in problem.train.items()}


def grain_batches(problem: Problem, steps: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches that Grain makes in worker processes, as by hand."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads a flag of its own before it starts workers
    data = grain.MapDataset.source(problem.train).seed(1).shuffle().random_map(Flip())
    batches = data.batch(problem.batch_sizes[""]).to_iter_dataset()
    options = grain.multiprocessing.MultiprocessingOptions(num_workers=WORKERS)
    iterator = iter(batches.mp_prefetch(options))
    try:
        for _ in range(steps):
            yield next(iterator)
    finally:
        iterator.close()


def loop_by_hand(
    problem: Problem, batches: Callable[[Problem, int], Iterator[Any]]
) -> Callable[[], None]:
    """Train for an epoch with a jitted step."""
    optimizer = optax.adam(1e-3)

    @jax.jit
    def step(params: Any, opt_state: Any, key: jax.Array, batch: Any) -> Any:
        def total(params: Any) -> tuple[jax.Array, Any]:
            losses, _ = problem.losses(params, {}, key, batch)
            return losses["left"] + losses["right"], losses

        gradient, losses = jax.grad(total, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, losses

    def train() -> None:
        params, _ = problem.init(jax.random.key(0))
        opt_state, key, found = optimizer.init(params), jax.random.key(1), []
        for batch in batches(problem, problem.steps_per_epoch):
            params, opt_state, losses = step(params, opt_state, key, batch)
            found.append(losses)
        jax.block_until_ready(found)

    return train


def loop_of_the_comparison(problem: Problem) -> tuple[Callable[[], None], Trainer]:
    """Train for an epoch with equal weights, as the comparison does."""
    trainer = Trainer(problem)

    def train() -> None:
        (run,) = trainer.run(Setting("equal", WEIGHTINGS["equal"], 1e-3), 0, splits=())
        assert run.failure is None

    return train, trainer


def problems(steps: int) -> dict[str, tuple[Problem, Callable[..., Iterator[Any]]]]:
    """Each with the batches of the loop by hand."""
    batch = 64
    pictures = examples(batch * steps, 32, 32, 3)
    rows = examples(batch * 50 * steps, 32)
    read = examples(batch * 5 * steps, 16, 16, 3)

    def few(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {field: array[:batch] for field, array in values.items()}

    return {
        "nn.Conv": (make_problem(Convolutional(), pictures, few(pictures), batch), array_batches),
        "dense": (make_problem(Dense(), rows, few(rows), batch), array_batches),
        "Grain": (
            make_problem(
                Dense(256),
                Source(read),
                few(read),
                batch,
                transformations=[Flip()],
                workers=WORKERS,
            ),
            grain_batches,
        ),
    }


def cpu_seconds() -> float:
    """Of this process and of its workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def measure(config: Config) -> dict[str, dict[str, Any]]:
    """The CPU milliseconds a step of both loops on each problem, in every round."""
    found: dict[str, dict[str, Any]] = {}
    for name, (problem, batches) in problems(config.steps).items():
        ours, trainer = loop_of_the_comparison(problem)
        loops = {"by hand": loop_by_hand(problem, batches), "comparison": ours}
        for loop in loops.values():
            loop()  # compiles
        times: dict[str, list[float]] = {loop: [] for loop in loops}
        for number in range(config.rounds):
            # In turn, so that a slow moment of the machine falls on both alike.
            for loop in list(loops)[:: 1 if number % 2 else -1]:
                start = cpu_seconds()
                loops[loop]()
                spent = cpu_seconds() - start
                times[loop].append(1000 * spent / problem.steps_per_epoch)
        found[name] = {**times, "steps_per_call": trainer.steps_per_call}
    return found


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each problem, as Markdown."""
    rows = []
    for name, times in found.items():
        ratios = np.divide(times["comparison"], times["by hand"])
        low, median, high = np.quantile(ratios, (0.25, 0.5, 0.75))
        hand, ours = (np.median(times[loop]) for loop in ("by hand", "comparison"))
        calls = times["steps_per_call"]
        rows.append(
            [name, f"{hand:.3g}", f"{ours:.3g}", f"{median:.2f} [{low:.2f}, {high:.2f}]", calls]
        )
    headers = ["problem", "by hand, ms", "comparison, ms", "ratio", "steps a call"]
    return tabulate.tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line, in a process of its own on one core."""
    config = tyro.cli(Config, prog="python -m benchmarks.loops", args=arguments)
    if "MTL_JAX_LOOPS" not in os.environ:
        flags = f"{os.environ.get('XLA_FLAGS', '')} {ONE_THREAD['XLA_FLAGS']}".strip()
        own = {"XLA_FLAGS": flags, "MTL_JAX_LOOPS": "1"}
        words = sys.argv[1:] if arguments is None else arguments
        command = [sys.executable, "-m", "benchmarks.loops", *words]
        with one_core():
            sys.exit(subprocess.run(command, env=os.environ | ONE_THREAD | own).returncode)
    found = measure(config)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
