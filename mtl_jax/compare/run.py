"""What came of one training run."""

import dataclasses
import urllib.parse
from typing import Literal

import numpy as np

Place = Literal["representation", "parameters"]
"""Where the task gradients are measured."""


def folder_name(name: str) -> str:
    """The name of a problem or a run as that of a folder; ``urllib.parse.unquote`` reads it."""
    return urllib.parse.quote(name, safe=" ")


@dataclasses.dataclass
class Run:
    """What came of one run. Lists over epochs start after the first epoch.

    Attributes:
      weighting: the weighting's name.
      seed: the seed of initial parameters, batches and random numbers.
      failure: why the run ended early, or ``None``.
      skipped: the steps that were left out because their update was not finite.
      train_losses: for each task the mean training loss of every epoch.
      validation: for each task the metric on the validation split after every epoch.
      test: for each task the metric on the test split after every epoch.
      weights: for each task its weight at every step; empty for an aggregator, which has none.
      measured_at: where the task gradients were measured: at the representation, or over the
        parameters that the tasks share; ``None`` if they were not.
      conflict: how the task gradients lie to each other at every step: ``"share"``, the share of
        the pairs of tasks with a negative cosine, and ``"cosine"``, the mean cosine of the pairs.
        NaN at a step that did not measure them, or had labels of one task only. Empty if they were
        not measured.
      epoch_seconds: the wall time of every epoch's training.
      compile_seconds: the time that compiling the training took, if this run did.
      memory_bytes: the memory that the compiled training of an epoch takes: the training data, the
        state and all that is temporary; ``None`` where the backend does not say.
    """

    weighting: str
    seed: int
    failure: str | None = None
    skipped: int = 0
    train_losses: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    validation: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    test: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    weights: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    measured_at: Place | None = None
    conflict: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    epoch_seconds: list[float] = dataclasses.field(default_factory=list)
    compile_seconds: float = 0.0
    memory_bytes: int | None = None

    @property
    def epochs(self) -> int:
        """The epochs that were trained so far."""
        return len(self.epoch_seconds)
