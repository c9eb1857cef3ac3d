"""Encoders of pictures."""

from collections.abc import Sequence

import flax.linen as nn
from jaxtyping import Array, Float

from experiments.networks.convolution import Conv


class ConvEncoder(nn.Module):
    """A few strided convolutions and a dense layer, in the manner of LeNet.

    Attributes:
      channels: the output channels of each convolution.
      width: the size of the representation.
    """

    channels: Sequence[int] = (8, 16, 32)
    width: int = 64

    @nn.compact
    def __call__(
        self, pictures: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch features"]:
        """Encode pictures."""
        x = pictures
        for features in self.channels:
            x = nn.relu(Conv(features, (3, 3), strides=(2, 2))(x))
        return nn.relu(nn.Dense(self.width)(x.reshape(x.shape[0], -1)))


class ResidualBlock(nn.Module):
    """Two normalised convolutions beside a shortcut, after normalisation (He et al., 2016).

    Attributes:
      features: the number of output channels.
      stride: the step of the first convolution.
    """

    features: int
    stride: int = 1

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch out_height out_width features"]:
        """Apply the block."""
        strides = (self.stride, self.stride)
        shortcut = x
        x = nn.relu(nn.GroupNorm(num_groups=8)(x))
        if shortcut.shape[-1] != self.features or self.stride != 1:
            shortcut = Conv(self.features, (1, 1), strides, use_bias=False)(x)
        x = Conv(self.features, (3, 3), strides, use_bias=False)(x)
        x = nn.relu(nn.GroupNorm(num_groups=8)(x))
        return shortcut + Conv(self.features, (3, 3), use_bias=False)(x)


class ResidualEncoder(nn.Module):
    """A small pre-activation residual network, pooled over the picture.

    Group normalisation, so that the network has no state and an example's output does not depend
    on the rest of the batch.

    Attributes:
      channels: the channels of the first convolution and of each block after it; every block
        halves the picture.

    References:
      He et al., `Identity Mappings in Deep Residual Networks
      <https://arxiv.org/abs/1603.05027>`_, 2016

      Wu and He, `Group Normalization <https://arxiv.org/abs/1803.08494>`_, 2018
    """

    channels: Sequence[int] = (16, 32, 64, 128)

    @nn.compact
    def __call__(
        self, pictures: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch features"]:
        """Encode pictures."""
        first, *blocks = self.channels
        x = Conv(first, (3, 3), use_bias=False)(pictures)
        for features in blocks:
            x = ResidualBlock(features, stride=2)(x)
        x = nn.relu(nn.GroupNorm(num_groups=8)(x))
        return x.mean(axis=(1, 2))
