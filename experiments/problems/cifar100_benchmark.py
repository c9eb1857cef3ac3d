"""CIFAR-100 with the networks and the recipe of the literature."""

import functools

import flax.linen as nn

from experiments.networks.cifar import VGG, ResNet
from experiments.problems.cifar100 import cifar100_splits
from experiments.problems.classification import classification, sgd_cosine
from experiments.problems.pictures import Standardised, flip_and_shift
from mtl_jax.compare.problem import Problem

STANDARDISED = Standardised(mean=(0.5071, 0.4867, 0.4408), deviation=(0.2675, 0.2565, 0.2761))
"""By the mean and the deviation of the training pictures."""


def cifar100_benchmark(
    name: str, network: str, encoder: nn.Module, data_dir: str | None, held_out: float
) -> Problem:
    """Build CIFAR-100 with its two labels a picture, for a network with batch normalisation.

    The recipe: SGD at 0.1 with momentum 0.9 and weight decay 5e-4, the learning rate falling to 0
    along a half cosine; 200 epochs, batches of 128; pictures standardised, padded by 4 black
    pixels, cropped and flipped at random.

    Args:
      name: the problem's name.
      network: the network's name, for the reader of the tables.
      encoder: the network without its last layer.
      data_dir: the folder that holds data sets prepared by tensorflow-datasets; ``None`` for its
        default.
      held_out: the share of the training pictures that is held out for validation.

    Returns:
      The problem, with the tasks ``fine`` (100 classes) and ``coarse`` (20 classes).

    Raises:
      FileNotFoundError: if the data set is not prepared and cannot be prepared here.
    """
    return classification(
        name=name,
        description=f"CIFAR-100 with {network}: which of 100 classes, and which of the 20 groups?",
        classes={"fine": 100, "coarse": 20},
        splits=cifar100_splits(data_dir, held_out),
        inputs=STANDARDISED,
        encoder=encoder,
        augment=functools.partial(flip_and_shift, border=STANDARDISED.black),
        optimizer=sgd_cosine,
        learning_rate=0.1,
        epochs=200,
        batch_size=128,
    )


def cifar100_resnet20(data_dir: str | None = None, *, held_out: float = 0.1) -> Problem:
    """Build CIFAR-100 for ResNet-20: :func:`cifar100_benchmark`, meant for a GPU."""
    return cifar100_benchmark("cifar100_resnet20", "ResNet-20", ResNet(), data_dir, held_out)


def cifar100_vgg16(data_dir: str | None = None, *, held_out: float = 0.1) -> Problem:
    """Build CIFAR-100 for VGG-16-BN: :func:`cifar100_benchmark`, meant for a GPU."""
    return cifar100_benchmark("cifar100_vgg16", "VGG-16-BN", VGG(), data_dir, held_out)
