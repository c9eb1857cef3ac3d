"""The networks of the CIFAR literature, with batch normalisation.

Their ``batch_stats``, the running mean and variance of each layer, are updated with ``train=True``
and read without.
"""

from collections.abc import Sequence

import flax.linen as nn
from jaxtyping import Array, Float

from experiments.networks.convolution import Conv

_HE_NORMAL = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class NormalisedConv(nn.Module):
    """A convolution and batch normalisation, padded alike on both sides as PyTorch pads.

    Attributes:
      features: the number of output channels.
      window: the window's size along each space axis, odd.
      stride: the window's step.
      use_bias: whether the convolution has a bias, which the normalisation takes out again.
    """

    features: int
    window: int = 3
    stride: int = 1
    use_bias: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool
    ) -> Float[Array, "batch out_height out_width features"]:
        """Apply the layer."""
        margin = self.window // 2
        x = Conv(
            self.features,
            (self.window, self.window),
            (self.stride, self.stride),
            padding=((margin, margin), (margin, margin)),
            use_bias=self.use_bias,
            kernel_init=_HE_NORMAL,
        )(x)
        return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)


class ResNet(nn.Module):
    """The residual network for CIFAR, of ``6 * blocks + 2`` layers, pooled over the picture.

    Where the shape changes, the shortcut is a convolution of window 1 (option B of the paper);
    elsewhere it is the identity.

    Attributes:
      blocks: the number of blocks, of two convolutions each, in a stage; 3 for ResNet-20.
      channels: the channels of each stage; every stage but the first halves the picture.

    References:
      He et al., `Deep Residual Learning for Image Recognition
      <https://arxiv.org/abs/1512.03385>`_, 2015
    """

    blocks: int = 3
    channels: Sequence[int] = (16, 32, 64)

    @nn.compact
    def __call__(
        self, pictures: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch features"]:
        """Encode pictures."""
        x = nn.relu(NormalisedConv(self.channels[0])(pictures, train))
        for stage, features in enumerate(self.channels):
            for block in range(self.blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                shortcut = x
                x = nn.relu(NormalisedConv(features, stride=stride)(x, train))
                x = NormalisedConv(features)(x, train)
                if shortcut.shape != x.shape:
                    shortcut = NormalisedConv(features, window=1, stride=stride)(shortcut, train)
                x = nn.relu(x + shortcut)
        return x.mean(axis=(1, 2))


class VGG(nn.Module):
    """VGG with batch normalisation, without its hidden dense layers, pooled over the picture.

    Attributes:
      stages: the channels of each convolution in each stage; every stage halves the picture. By
        default the 13 convolutions of VGG-16.

    References:
      Simonyan and Zisserman, `Very Deep Convolutional Networks for Large-Scale Image Recognition
      <https://arxiv.org/abs/1409.1556>`_, 2014
    """

    stages: Sequence[Sequence[int]] = (
        (64, 64),
        (128, 128),
        (256, 256, 256),
        (512, 512, 512),
        (512, 512, 512),
    )

    @nn.compact
    def __call__(
        self, pictures: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch features"]:
        """Encode pictures."""
        x = pictures
        for stage in self.stages:
            for features in stage:
                x = nn.relu(NormalisedConv(features, use_bias=True)(x, train))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        return x.mean(axis=(1, 2))
