"""What the metrics of a comparison say: better than the baseline, worse, or undecided."""

from mtl_jax.evaluation._intervals import mean_interval
from mtl_jax.evaluation._paired import PairedComparison, Verdict, compare_to_baseline
from mtl_jax.evaluation._pareto import hypervolume, pareto_front
from mtl_jax.evaluation._ranks import mean_rank
from mtl_jax.evaluation._relative import delta_m
from mtl_jax.evaluation._table import compare_table, holm

__all__ = [
    "PairedComparison",
    "Verdict",
    "compare_table",
    "compare_to_baseline",
    "delta_m",
    "holm",
    "hypervolume",
    "mean_interval",
    "mean_rank",
    "pareto_front",
]


def __dir__() -> list[str]:
    """The public names, for completion."""
    return __all__
