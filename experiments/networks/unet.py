"""A U-Net: a map of features as fine as half the picture."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class UNet(nn.Module):
    """Down to small maps and back, each map on the way back joined to its equal on the way down.

    Plain convolutions of Flax, two on each level, with group normalisation, so that the network
    has no state. They are fast on CPU only outside of loops: take
    :class:`experiments.networks.convolution.Conv` for a network in the body of a ``scan``.

    Attributes:
      channels: the channels of each level. Every level halves the map, the first one the picture,
        whose height and width must be multiples of ``2 ** len(channels)``. Multiples of 8.

    References:
      Ronneberger et al., `U-Net: Convolutional Networks for Biomedical Image Segmentation
      <https://arxiv.org/abs/1505.04597>`_, 2015
    """

    channels: Sequence[int] = (16, 32, 64, 128)

    @nn.compact
    def __call__(
        self, pictures: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch half_height half_width features"]:
        """Encode pictures."""
        x, maps = pictures, []
        for features in self.channels:
            x = _Level(features, stride=2)(x)
            maps.append(x)
        for features, own in zip(self.channels[-2::-1], maps[-2::-1], strict=True):
            x = _Level(features)(jnp.concatenate([repeated(x), own], axis=-1))
        return x


class _Level(nn.Module):
    """Two normalised convolutions."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch out_height out_width features"]:
        for stride in (self.stride, 1):
            x = nn.Conv(self.features, (3, 3), strides=(stride, stride), use_bias=False)(x)
            x = nn.relu(nn.GroupNorm(num_groups=8)(x))
        return x


class MapHead(nn.Module):
    """From a map of features to a prediction for every pixel of the picture.

    Two convolutions, the second of window 1, then twice the height and width.

    Attributes:
      outputs: the number of output channels.
      width: the channels between the convolutions.
      bias_init: the initializer of the outputs' bias.
    """

    outputs: int
    width: int = 16
    bias_init: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch half_height half_width features"]
    ) -> Float[Array, "batch height width outputs"]:
        """Predict."""
        x = nn.relu(nn.Conv(self.width, (3, 3))(x))
        return doubled(nn.Conv(self.outputs, (1, 1), bias_init=self.bias_init)(x))


def repeated(x: Float[Array, "batch height width channels"]) -> Array:
    """Twice the height and width, by repetition."""
    number, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (number, height, 2, width, 2, channels))
    return x.reshape(number, 2 * height, 2 * width, channels)


def doubled(x: Float[Array, "batch height width channels"]) -> Array:
    """Twice the height and width, bilinearly: as ``jax.image.resize``, but faster on CPU.

    Along each axis it is a product with a small matrix, which needs no transposed copy of the map.
    """
    number, height, width, channels = x.shape
    rows, columns = (
        jax.image.resize(jnp.eye(size, dtype=x.dtype), (2 * size, size), "bilinear")
        for size in (height, width)
    )
    x = jnp.einsum("ij,bjx->bix", rows, x.reshape(number, height, width * channels))
    return jnp.einsum("ij,bxjc->bxic", columns, x.reshape(number, 2 * height, width, channels))
