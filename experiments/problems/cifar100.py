"""CIFAR-100: the fine and the coarse class of one picture."""

from typing import Any

import numpy as np

from experiments.networks.image import ResidualEncoder
from experiments.problems.classification import classification
from experiments.problems.pictures import flip_and_shift, scaled
from experiments.problems.prepared import hold_out, prepared_examples
from mtl_jax.compare.problem import Problem


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
    return classification(
        name="cifar100",
        description="A small picture; which of 100 classes, and which of the 20 groups of them?",
        classes={"fine": 100, "coarse": 20},
        splits=cifar100_splits(data_dir),
        inputs=scaled,
        encoder=ResidualEncoder(channels=(16, 32, 64, 128)),
        augment=flip_and_shift,
        learning_rate=3e-3,
        epochs=20,
        batch_size=64,
    )


def cifar100_splits(
    data_dir: str | None, held_out: float = 0.1
) -> dict[str, dict[str, np.ndarray]]:
    """The pictures and labels of CIFAR-100.

    Args:
      data_dir: the folder that holds data sets prepared by tensorflow-datasets; ``None`` for its
        default.
      held_out: the share of the training pictures that is held out for validation.

    Returns:
      For each split the fields ``image`` (uint8, 32 x 32 x 3), ``fine`` and ``coarse``.
    """
    splits = prepared_examples("cifar100", data_dir)
    train, validation = hold_out(_read(splits["train"]), held_out)
    return {"train": train, "validation": validation, "test": _read(splits["test"])}


def _read(examples: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    return {
        "image": np.stack([example["image"] for example in examples]),
        "fine": np.array([example["label"] for example in examples], np.int32),
        "coarse": np.array([example["coarse_label"] for example in examples], np.int32),
    }
