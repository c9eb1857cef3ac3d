"""CIFAR-10: three tasks that are all derived from the one label."""

from typing import Any

import numpy as np

from experiments.networks.image import ResidualEncoder
from experiments.problems.classification import classification
from experiments.problems.pictures import flip_and_shift, scaled
from experiments.problems.prepared import hold_out, prepared_examples
from mtl_jax.compare.problem import Problem

ANIMALS = (2, 3, 4, 5, 6, 7)
"""Bird, cat, deer, dog, frog and horse; the others are vehicles."""


def cifar10_groups(data_dir: str | None = None) -> Problem:
    """Build CIFAR-10 with its label and two groupings of it.

    The tasks are related by construction, and of different difficulty: whoever knows the class
    knows the rest, an animal is easily told from a vehicle, and a label above 5 (frog, horse, ship
    or truck) groups what does not look alike. A tenth of the training pictures is held out for
    validation. Training pictures are flipped and shifted at random.

    Args:
      data_dir: the folder that holds data sets prepared by tensorflow-datasets; ``None`` for its
        default.

    Returns:
      The problem, with the tasks ``class`` (10 classes), ``animal`` and ``above_5`` (2 each).

    Raises:
      FileNotFoundError: if the data set is not prepared and cannot be prepared here.
    """
    splits = prepared_examples("cifar10", data_dir)
    train, validation = hold_out(_read(splits["train"]))
    return classification(
        name="cifar10_groups",
        description="A small picture; which of 10 classes, is it an animal, and is its label "
        "above 5?",
        classes={"class": 10, "animal": 2, "above_5": 2},
        splits={"train": train, "validation": validation, "test": _read(splits["test"])},
        inputs=scaled,
        encoder=ResidualEncoder(channels=(16, 32, 64, 128)),
        augment=flip_and_shift,
        learning_rate=3e-3,
        epochs=20,
        batch_size=64,
    )


def _read(examples: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    labels = np.array([example["label"] for example in examples], np.int32)
    return {
        "image": np.stack([example["image"] for example in examples]),
        "class": labels,
        "animal": np.isin(labels, ANIMALS).astype(np.int32),
        "above_5": (labels > 5).astype(np.int32),
    }
