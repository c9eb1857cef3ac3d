"""The settings that tuning tried for each weighting, and the one that it chose."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

TUNING_SEED = 1000
"""The seed of tuning, which no reported run may have."""

PRUNED = "pruned"
"""The reason of a trial that was ended early since others were better."""


class TuningError(ValueError):
    """There is nothing that trials can be measured against."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One setting, and what came of training with it.

    Attributes:
      learning_rate: the network's learning rate.
      parameters: the weighting's own parameters; those that are not here have their defaults.
      validation: for each task the metric on the validation split after every epoch.
      score: the mean relative change of the last epoch's validation metrics against equal weights
        at the learning rate that the problem is shipped with, higher being better; ``None`` if the
        trial was not trained to its end.
      failure: why it was not: pruned, or what the run failed of.
      seconds: how long it took, compiling included.
    """

    learning_rate: float
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    validation: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)
    score: float | None = None
    failure: str | None = None
    seconds: float = 0.0

    @property
    def epochs(self) -> int:
        """The epochs that were trained."""
        return max((len(values) for values in self.validation.values()), default=0)


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The trials of every weighting, and of every task alone, the same number for each.

    Attributes:
      seed: the seed of the search, and of all its training runs.
      trials: the trials by the name of the runs, in the order in which they were made. The first is
        the setting that the problem and the weighting are shipped with.
    """

    seed: int
    trials: Mapping[str, Sequence[Trial]]

    def chosen(self, name: str) -> Trial:
        """The trial with the best score: the first one of several, and if all failed.

        Raises:
          ValueError: if nothing of this name was tuned.
        """
        if name not in self.trials:
            raise ValueError(f"{name!r} was not tuned; tuned: {', '.join(self.trials)}.")
        scored = [trial for trial in self.trials[name] if trial.score is not None]
        return max(scored, key=_score, default=self.trials[name][0])


def _score(trial: Trial) -> float:
    assert trial.score is not None
    return trial.score
