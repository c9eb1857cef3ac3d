"""The comparison: trains one network with each of several weightings and shows what came of it.

Needs the extra ``compare``. :class:`Problem` describes a multi-task problem, :func:`compare` runs
the weightings on it and leaves records, tables and pictures in a folder, which
:func:`load_results` reads. Nothing else in mtl_jax imports it.
"""

from mtl_jax._search_space import Choice, Range, Space, TaskWeights
from mtl_jax.compare.checkpoints import OtherSettingsError, SettingsError, digest
from mtl_jax.compare.comparison import compare
from mtl_jax.compare.metrics import (
    Metric,
    accuracy,
    average_precision,
    correlation,
    entity_f1,
    f1,
    mean_absolute_error,
    mean_iou,
    mean_of,
    r2,
    relative_error,
    relative_l2,
    roc_auc,
    root_mean_squared_error,
)
from mtl_jax.compare.problem import Problem, Task, load_problem
from mtl_jax.compare.report import write_report
from mtl_jax.compare.results import (
    DamagedFileError,
    MetricInfo,
    ProblemInfo,
    Results,
    Run,
    Trial,
    Tuning,
    load_curves,
    load_results,
)
from mtl_jax.compare.tuning import TuningError, tune
from mtl_jax.compare.weightings import SPACES, WEIGHTINGS, look_up, named_weightings
from mtl_jax.methods import RunSettings

__all__ = [
    "SPACES",
    "WEIGHTINGS",
    "Choice",
    "DamagedFileError",
    "Metric",
    "MetricInfo",
    "OtherSettingsError",
    "Problem",
    "ProblemInfo",
    "Range",
    "Results",
    "Run",
    "RunSettings",
    "SettingsError",
    "Space",
    "Task",
    "TaskWeights",
    "Trial",
    "Tuning",
    "TuningError",
    "accuracy",
    "average_precision",
    "compare",
    "correlation",
    "digest",
    "entity_f1",
    "f1",
    "load_curves",
    "load_problem",
    "load_results",
    "look_up",
    "mean_absolute_error",
    "mean_iou",
    "mean_of",
    "named_weightings",
    "r2",
    "relative_error",
    "relative_l2",
    "roc_auc",
    "root_mean_squared_error",
    "tune",
    "write_report",
]


def __dir__() -> list[str]:
    """The public names, for completion."""
    return __all__
