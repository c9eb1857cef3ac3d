"""What a parameter of a weighting is searched in: a range, some choices, weights of the tasks.

Each kind draws a value from an Optuna trial, and says under which names and with which numbers the
trial holds the default.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import optuna


@dataclasses.dataclass(frozen=True)
class Range:
    """A number.

    Attributes:
      default: where the search begins.
      low: the least.
      high: the largest.
      log: whether it is searched on a logarithmic scale.
    """

    default: float
    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not (0 if self.log else -np.inf) <= self.low <= self.default <= self.high < np.inf or (
            self.log and self.low == 0
        ):
            raise ValueError(
                "A range needs low <= default <= high, and 0 < low on a logarithmic scale; got "
                f"{self}."
            )

    def first(self, name: str, tasks: Sequence[str]) -> dict[str, Any]:
        """The default as a trial holds it."""
        return {name: self.default}

    def draw(self, trial: "optuna.Trial", name: str, tasks: Sequence[str]) -> float:
        """A number from the trial."""
        return trial.suggest_float(name, self.low, self.high, log=self.log)

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}" + (", logarithmic" if self.log else "")


@dataclasses.dataclass(frozen=True, init=False)
class Choice:
    """One of some values, each a number, a text, a boolean or ``None``; the default stands first.

    Attributes:
      values: the values.
    """

    values: tuple[Any, ...]

    def __init__(self, *values: Any) -> None:
        if not values:
            raise ValueError("A choice needs at least one value.")
        object.__setattr__(self, "values", values)

    def first(self, name: str, tasks: Sequence[str]) -> dict[str, Any]:
        """The default as a trial holds it."""
        return {name: self.values[0]}

    def draw(self, trial: "optuna.Trial", name: str, tasks: Sequence[str]) -> Any:
        """A value from the trial."""
        return trial.suggest_categorical(name, self.values)

    def __str__(self) -> str:
        return ", ".join(str(value) for value in self.values)


@dataclasses.dataclass(frozen=True)
class TaskWeights:
    r"""A weight for each task, by name; they sum to the number of tasks, and are 1 by default.

    The logarithms of K such weights lie, up to their sum, in K - 1 dimensions. They are searched
    along orthonormal directions there (isometric log-ratios), so that no task is a special one:
    :math:`w = K\,\mathrm{softmax}(H^\top z)` with the rows of Helmert's matrix H.

    Attributes:
      limit: the largest ``|z|``. The weights of two tasks differ by a factor of at most
        :math:`e^{\sqrt2 \cdot \text{limit}}`, 34 by default; those of more tasks by more.
    """

    limit: float = 2.5

    def first(self, name: str, tasks: Sequence[str]) -> dict[str, Any]:
        """The default as a trial holds it."""
        return {f"{name} {axis}": 0.0 for axis in range(1, len(tasks))}

    def draw(self, trial: "optuna.Trial", name: str, tasks: Sequence[str]) -> dict[str, float]:
        """Weights from the trial."""
        import scipy.linalg

        axes = [f"{name} {axis}" for axis in range(1, len(tasks))]
        z = np.array([trial.suggest_float(axis, -self.limit, self.limit) for axis in axes])
        powers = np.exp(z @ scipy.linalg.helmert(len(tasks))) if axes else np.ones(1)
        weights = len(tasks) * powers / np.sum(powers)
        return dict(zip(tasks, weights.tolist(), strict=True))

    def __str__(self) -> str:
        return "weights that sum to K"


Space = Mapping[str, Range | Choice | TaskWeights]
"""What is searched for each parameter of a weighting, by the parameter's name."""
