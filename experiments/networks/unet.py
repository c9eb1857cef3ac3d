"""A U-Net and heads on it, for predictions of every pixel."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

PATCH = 4
"""How much coarser than the picture the finest map of a :class:`UNet` is."""


class UNet(nn.Module):
    """Down to small maps and back, each map on the way back joined to its equal on the way down.

    The first convolution takes patches of 4 x 4 pixels; all else is at a quarter of the picture's
    height and width or coarser, where it is cheap. Two convolutions on each level, with group
    normalisation, so that the network has no state.

    The convolutions are Flax's, which are fast on CPU only outside of loops: take
    :class:`experiments.networks.convolution.Conv` for a network in the body of a ``scan``.

    Attributes:
      channels: the channels of each level, multiples of 8. Every level but the first halves the
        map, so that the picture's height and width must be multiples of
        ``2 * 2 ** len(channels)``.

    References:
      Ronneberger et al., `U-Net: Convolutional Networks for Biomedical Image Segmentation
      <https://arxiv.org/abs/1505.04597>`_, 2015
    """

    channels: Sequence[int] = (32, 64, 128)

    @nn.compact
    def __call__(
        self, pictures: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch quarter_height quarter_width features"]:
        """Encode pictures."""
        x, maps = pictures, []
        for level, features in enumerate(self.channels):
            x = _convolution(x, features, *((PATCH, PATCH) if level == 0 else (3, 2)))
            x = _convolution(x, features)
            maps.append(x)
        for features, own in zip(self.channels[-2::-1], maps[-2::-1], strict=True):
            x = jnp.concatenate([enlarged(x, 2, "nearest"), own], axis=-1)
            x = _convolution(_convolution(x, features), features)
        return x


def _convolution(x: Array, features: int, window: int = 3, stride: int = 1) -> Array:
    """A normalised convolution, in the module that calls."""
    x = nn.Conv(features, (window, window), strides=(stride, stride), use_bias=False)(x)
    return nn.relu(nn.GroupNorm(num_groups=8)(x))


class MapHead(nn.Module):
    """From the map of a :class:`UNet` to a prediction for every pixel of the picture.

    Two convolutions, the second of window 1; what they predict is enlarged bilinearly.

    Attributes:
      outputs: the number of output channels.
      bias_init: the initializer of the outputs' bias.
    """

    outputs: int
    bias_init: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch quarter_height quarter_width features"]
    ) -> Float[Array, "batch height width outputs"]:
        """Predict."""
        x = nn.relu(nn.Conv(x.shape[-1], (3, 3))(x))
        x = nn.Conv(self.outputs, (1, 1), bias_init=self.bias_init)(x)
        return enlarged(x, PATCH, "bilinear")


def enlarged(x: Float[Array, "batch height width channels"], factor: int, method: str) -> Array:
    """As ``jax.image.resize`` to so many times the height and the width, but faster on CPU.

    Along each axis it is a product with a small matrix, which needs no transposed copy of the map.
    """
    number, height, width, channels = x.shape
    rows, columns = (
        jax.image.resize(jnp.eye(size, dtype=x.dtype), (factor * size, size), method)
        for size in (height, width)
    )
    x = jnp.einsum("ij,bjx->bix", rows, x.reshape(number, height, width * channels))
    x = x.reshape(number, factor * height, width, channels)
    return jnp.einsum("ij,bxjc->bxic", columns, x)
