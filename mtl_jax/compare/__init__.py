"""The comparison: trains one network with each of several weightings and shows what came of it.

Needs the extra ``compare``. :class:`Problem` describes a multi-task problem, :func:`compare` runs
the weightings on it, :func:`compare_and_report` prints tables and leaves tables, pictures and
numbers in a folder. Nothing else in mtl_jax imports it.
"""

from mtl_jax._search_space import Choice, Range, Space, TaskWeights
from mtl_jax.compare.checkpoints import Checkpoints
from mtl_jax.compare.fingerprint import OtherConfigurationError, digest
from mtl_jax.compare.loading import load_problem
from mtl_jax.compare.problem import Problem, Task
from mtl_jax.compare.referee import Comparison, compare
from mtl_jax.compare.report import compare_and_report
from mtl_jax.compare.run import Run
from mtl_jax.compare.settings import Trial, Tuning, TuningError
from mtl_jax.compare.tuning import tune
from mtl_jax.compare.weightings import (
    SPACES,
    WEIGHTINGS,
    look_up,
    named_weightings,
)
from mtl_jax.methods import RunSettings

__all__ = [
    "SPACES",
    "WEIGHTINGS",
    "Checkpoints",
    "Choice",
    "Comparison",
    "OtherConfigurationError",
    "Problem",
    "Range",
    "Run",
    "RunSettings",
    "Space",
    "Task",
    "TaskWeights",
    "Trial",
    "Tuning",
    "TuningError",
    "compare",
    "compare_and_report",
    "digest",
    "load_problem",
    "look_up",
    "named_weightings",
    "tune",
]


def __dir__() -> list[str]:
    """The public names, for completion."""
    return __all__
