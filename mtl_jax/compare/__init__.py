"""The comparison: trains one network with each of several weightings and shows what came of it.

Needs the extra ``compare``. :class:`Problem` describes a multi-task problem, :func:`compare` runs
the weightings on it and leaves records, tables and pictures in a folder, which
:func:`load_results` reads. Nothing else in mtl_jax imports it.
"""

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

__all__ = [
    "DamagedFileError",
    "MetricInfo",
    "ProblemInfo",
    "Results",
    "Run",
    "Trial",
    "Tuning",
    "load_curves",
    "load_results",
]


def __dir__() -> list[str]:
    """The public names, for completion."""
    return __all__
