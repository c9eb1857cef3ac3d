"""CIFAR-100: the fine and the coarse class of one picture."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.networks.image import ResidualEncoder
from experiments.problems.classification import classification
from experiments.problems.prepared import hold_out, prepared_examples
from mtl_jax.compare.problem import Batch, Problem

MARGIN = 4
"""How far a training picture is shifted at most, in pixels."""


def cifar100(data_dir: str | None = None) -> Problem:
    """Build CIFAR-100 with its two labels a picture.

    A tenth of the training pictures is held out for validation. Training pictures are flipped and
    shifted at random.

    Args:
      data_dir: the folder that holds data sets prepared by tensorflow-datasets; ``None`` for its
        default.

    Returns:
      The problem, with the tasks ``fine`` (100 classes) and ``coarse`` (20 classes).

    Raises:
      FileNotFoundError: if the data set is not prepared and cannot be prepared here.
    """
    splits = prepared_examples("cifar100", data_dir)
    train, validation = hold_out(_read(splits["train"]))
    return classification(
        name="cifar100",
        description="A small picture; which of 100 classes, and which of the 20 groups of them?",
        classes={"fine": 100, "coarse": 20},
        splits={"train": train, "validation": validation, "test": _read(splits["test"])},
        inputs=_scaled,
        encoder=ResidualEncoder(channels=(16, 32, 64, 128)),
        augment=_flip_and_shift,
        learning_rate=3e-3,
        epochs=20,
        batch_size=64,
    )


def _read(examples: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    return {
        "image": np.stack([example["image"] for example in examples]),
        "fine": np.array([example["label"] for example in examples], np.int32),
        "coarse": np.array([example["coarse_label"] for example in examples], np.int32),
    }


def _scaled(batch: Batch) -> Float[Array, "batch 32 32 3"]:
    return jnp.asarray(batch["image"]).astype(jnp.float32) / 127.5 - 1


def _flip_and_shift(
    key: Array, pictures: Float[Array, "batch 32 32 3"]
) -> Float[Array, "batch 32 32 3"]:
    number = len(pictures)
    flip_key, shift_key = jax.random.split(key)
    flip = jax.random.bernoulli(flip_key, shape=(number, 1, 1, 1))
    pictures = jnp.where(flip, pictures[:, :, ::-1], pictures)
    padded = jnp.pad(pictures, ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)))
    corners = jax.random.randint(shift_key, (number, 2), 0, 2 * MARGIN + 1)

    def crop(picture: Array, corner: Array) -> Array:
        return jax.lax.dynamic_slice(picture, (*corner, 0), pictures.shape[1:])

    return jax.vmap(crop)(padded, corners)
