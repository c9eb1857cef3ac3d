"""The batches of an epoch."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Int

from mtl_jax.compare.devices import number_of_devices
from mtl_jax.compare.problem import Batch, Problem
from mtl_jax.compare.sources import Source, by_source, joined


def steps_per_epoch(problem: Problem) -> int:
    """The number of training steps in an epoch of the problem, over the largest of its sources.

    Raises:
      ValueError: if the batch size or the epochs are not at least 1, or a batch is larger than
        the training data.
    """
    if problem.epochs < 1:
        raise ValueError(f"`epochs` must be at least 1, got {problem.epochs}.")
    batch_sizes = problem.batch_sizes()
    for source, size in problem.sizes("train").items():
        batch_size = batch_sizes[source]
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        if batch_size > size:
            of_source = "" if source is None else f", source {source!r}"
            raise ValueError(
                f"The batch size, {batch_size}, is larger than the training data of "
                f"{problem.name!r}{of_source}: {size} examples."
            )
    return max(size // batch_sizes[source] for source, size in problem.sizes("train").items())


def check_devices(problem: Problem, mesh: Mesh | None) -> None:
    """Whether the batches can be spread over the devices.

    Raises:
      ValueError: if not.
    """
    for batch_size in problem.batch_sizes().values():
        if batch_size % number_of_devices(mesh):
            raise ValueError(
                f"The batch size of {problem.name!r}, {batch_size}, must be a multiple of the "
                f"number of devices, {number_of_devices(mesh)}."
            )


def orders(problem: Problem, key: Array) -> dict[Source, Int[Array, "steps batch"]]:
    """The training examples of each source in each batch of an epoch.

    They are in a random order; a source that the epoch passes over several times is in another
    order each time.

    Args:
      problem: the problem.
      key: what the orders are drawn from.
    """
    found, steps, batch_sizes = {}, steps_per_epoch(problem), problem.batch_sizes()
    for number, (source, size) in enumerate(problem.sizes("train").items()):
        taken = steps * batch_sizes[source]
        passes = [
            jax.random.permutation(_fold_in(_fold_in(key, number), i), size)
            for i in range(math.ceil(taken / size))
        ]
        order = jnp.concatenate(passes)[:taken]
        found[source] = order.reshape(steps, batch_sizes[source])
    return found


def take(data: Batch, examples: Mapping[Source, Any]) -> Batch:
    """These examples of each source."""
    return joined(
        {
            source: {field: values[examples[source]] for field, values in fields.items()}
            for source, fields in by_source(data).items()
        }
    )


def _fold_in(key: Array, number: int) -> Array:
    """Another key for every number, the key itself for 0."""
    return jax.random.fold_in(key, number) if number else key
