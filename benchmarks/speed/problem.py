"""The problems that are timed: a network, random parameters, a random batch."""

import dataclasses
from collections.abc import Callable
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from benchmarks.speed.records import Network
from experiments.networks.convolution import Conv
from experiments.networks.heads import Heads
from mtl_jax._tasks import Losses


class Encoder(nn.Module):
    """Convolutions, if any, then dense layers, each with a rectifier.

    Attributes:
      network: its sizes.
    """

    network: Network

    @nn.compact
    def __call__(self, x: Float[Array, "batch *inputs"]) -> Float[Array, "batch features"]:
        """Encode examples."""
        for channels in self.network.channels:
            x = nn.relu(Conv(channels, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))(x))
        x = x.reshape(x.shape[0], -1)
        for width in self.network.widths:
            x = nn.relu(nn.Dense(width)(x))
        return x


@dataclasses.dataclass(frozen=True)
class Problem:
    """A network's functions, with a batch and parameters to start from.

    Attributes:
      network: the network.
      encoder: ``encoder(params, batch) -> z``.
      heads: ``heads(params, zs, batch) -> losses``.
      batch: the examples and labels of all steps.
      params: the parameters, those that the tasks share under "encoder".
    """

    network: Network
    encoder: Callable[[PyTree, PyTree], Array]
    heads: Callable[[PyTree, dict[str, Array], PyTree], Losses]
    batch: PyTree
    params: PyTree

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names."""
        return tuple(self.batch["labels"])

    def losses_fn(self, params: PyTree, batch: PyTree) -> Losses:
        """The task losses."""
        z = self.encoder(params, batch)
        return self.heads(params, dict.fromkeys(self.tasks, z), batch)

    def total(self, params: PyTree, batch: PyTree) -> tuple[Float[Array, ""], Losses]:
        """The sum of the losses: what plain training differentiates."""
        losses = self.losses_fn(params, batch)
        return jnp.sum(jnp.stack(list(losses.values()))), losses


def make_problem(network: Network) -> Problem:
    """The network with a random batch and random parameters."""
    tasks = tuple(f"task_{k:02d}" for k in range(network.tasks))
    encoder, heads = Encoder(network), Heads(dict.fromkeys(tasks, network.classes))
    draw = np.random.default_rng(0)
    size = network.batch_size
    batch = {
        "inputs": draw.standard_normal((size, *network.inputs), np.float32),
        "labels": {
            task: draw.integers(network.classes, size=size, dtype=np.int32) for task in tasks
        },
    }
    batch = jax.device_put(batch)

    def encode(params: PyTree, batch: PyTree) -> Array:
        return cast(Array, encoder.apply(params["encoder"], batch["inputs"]))

    def head_losses(params: PyTree, zs: dict[str, Array], batch: PyTree) -> Losses:
        logits = cast(dict[str, Array], heads.apply(params["heads"], zs))
        return {
            task: jnp.mean(
                optax.softmax_cross_entropy_with_integer_labels(logits[task], batch["labels"][task])
            )
            for task in tasks
        }

    encoder_key, heads_key = jax.random.split(jax.random.key(0))
    z = jnp.zeros((size, network.widths[-1]))
    params = {
        "encoder": encoder.init(encoder_key, batch["inputs"]),
        "heads": heads.init(heads_key, dict.fromkeys(tasks, z)),
    }
    return Problem(network, encode, head_losses, batch, params)
