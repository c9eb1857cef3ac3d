"""Small colour pictures: their scale, and how training changes them at random."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mtl_jax.compare.data import Batch

MARGIN = 4
"""How far a training picture is shifted at most, in pixels."""


def scaled(batch: Batch) -> Float[Array, "batch height width 3"]:
    """The pictures of a batch, between -1 and 1."""
    return jnp.asarray(batch["image"]).astype(jnp.float32) / 127.5 - 1


class Standardised:
    """The pictures of a batch, by the mean and the deviation of each channel.

    Attributes:
      black: what a black pixel becomes.
    """

    def __init__(self, mean: tuple[float, ...], deviation: tuple[float, ...]) -> None:
        self._mean = np.array(mean, np.float32).reshape(1, 1, 1, -1)
        self._deviation = np.array(deviation, np.float32).reshape(1, 1, 1, -1)
        self.black = -self._mean / self._deviation

    def __call__(self, batch: Batch) -> Float[Array, "batch height width 3"]:
        """Standardise the pictures, whose channels are bytes."""
        return (jnp.asarray(batch["image"]).astype(jnp.float32) / 255 - self._mean) / (
            self._deviation
        )


def flip_and_shift(
    key: Array,
    pictures: Float[Array, "batch height width channels"],
    border: float | Float[np.ndarray, "1 1 1 channels"] = 0.0,
) -> Float[Array, "batch height width channels"]:
    """Flip half of the pictures, and shift each by up to :data:`MARGIN` pixels.

    Args:
      key: the key of what is drawn.
      pictures: the pictures.
      border: what is shifted in from outside, for each channel.

    Returns:
      The pictures, each changed in its own way.
    """
    number = len(pictures)
    flip_key, shift_key = jax.random.split(key)
    flip = jax.random.bernoulli(flip_key, shape=(number, 1, 1, 1))
    pictures = jnp.where(flip, pictures[:, :, ::-1], pictures)
    margins = ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0))
    padded = jnp.pad(pictures - border, margins) + border
    corners = jax.random.randint(shift_key, (number, 2), 0, 2 * MARGIN + 1)

    def crop(picture: Array, corner: Array) -> Array:
        return jax.lax.dynamic_slice(picture, (*corner, 0), pictures.shape[1:])

    return jax.vmap(crop)(padded, corners)
