"""CIFAR-100 as 20 tasks: each superclass is a task of its own, to tell its five classes apart."""

from collections.abc import Mapping

import numpy as np

from experiments.networks.image import ResidualEncoder
from experiments.problems.cifar100 import cifar100_splits
from experiments.problems.classification import MISSING, classification
from experiments.problems.pictures import flip_and_shift, scaled
from mtl_jax.compare.data import Split
from mtl_jax.compare.problem import Problem

SUPERCLASSES = (
    "aquatic_mammals",
    "fish",
    "flowers",
    "food_containers",
    "fruit_and_vegetables",
    "household_electrical_devices",
    "household_furniture",
    "insects",
    "large_carnivores",
    "large_man-made_outdoor_things",
    "large_natural_outdoor_scenes",
    "large_omnivores_and_herbivores",
    "medium_mammals",
    "non-insect_invertebrates",
    "people",
    "reptiles",
    "small_mammals",
    "trees",
    "vehicles_1",
    "vehicles_2",
)
"""The superclasses in the order of the coarse labels."""


def cifar100_superclasses(data_dir: str | None = None) -> Problem:
    """Build CIFAR-100 with a task for each of its 20 superclasses.

    A picture has a label for the task of its own superclass and for no other, so a batch of 128
    holds about six examples of each task. A tenth of the training pictures is held out for
    validation. Training pictures are flipped and shifted at random.

    The tasks are those of Rosenbaum et al. and of later work. The network, its training and the
    validation split are our own, so accuracies cannot be compared with theirs.

    Args:
      data_dir: the folder that holds data sets prepared by tensorflow-datasets; ``None`` for its
        default.

    Returns:
      The problem, with a task of 5 classes for each of :data:`SUPERCLASSES`.

    Raises:
      FileNotFoundError: if the data set is not prepared and cannot be prepared here.

    References:
      Rosenbaum et al., `Routing Networks: Adaptive Selection of Non-Linear Functions for
      Multi-Task Learning <https://arxiv.org/abs/1711.01239>`_, 2017
    """
    return classification(
        name="cifar100_superclasses",
        description="A small picture of one of 20 groups; which of the 5 classes of its group?",
        classes=dict.fromkeys(SUPERCLASSES, 5),
        splits=one_task_a_superclass(cifar100_splits(data_dir)),
        inputs=scaled,
        encoder=ResidualEncoder(channels=(16, 32, 64, 128)),
        augment=flip_and_shift,
        learning_rate=3e-3,
        epochs=20,
        batch_size=128,
    )


def one_task_a_superclass(splits: Mapping[str, Split]) -> dict[str, dict[str, np.ndarray]]:
    """Turn the fine and coarse labels into a label for each task.

    Args:
      splits: the fields ``image``, ``fine`` and ``coarse`` of each split.

    Returns:
      For each split ``image`` and, for each superclass, the position of the picture's fine class
      among those of the superclass, or :data:`MISSING` if it is of another one.
    """
    fine, coarse = (
        np.concatenate([split[field] for split in splits.values()]) for field in ("fine", "coarse")
    )
    positions = np.full((len(SUPERCLASSES), 100), MISSING, np.int32)
    for number in range(len(SUPERCLASSES)):
        members = np.unique(fine[coarse == number])
        positions[number, members] = np.arange(len(members))
    return {
        part: {"image": split["image"]}
        | {task: positions[number, split["fine"]] for number, task in enumerate(SUPERCLASSES)}
        for part, split in splits.items()
    }
