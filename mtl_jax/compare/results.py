"""What tables and pictures need to know of a problem."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class MetricInfo:
    """The direction and the unit of a metric; ``"%"`` is for a share, shown times 100."""

    higher_is_better: bool
    unit: str = ""


@dataclasses.dataclass(frozen=True)
class ProblemInfo:
    """What tables and pictures need to know of a problem."""

    name: str
    description: str
    tasks: Mapping[str, Mapping[str, MetricInfo]]
    examples: Mapping[str, Mapping[str, int]]
    epochs: int
    steps_per_epoch: int
    batch_size: Mapping[str, int]
    learning_rate: float
    data: str
