"""Multi-task loss weighting in JAX: how much each task's loss counts, at every training step.

Everything public is here, as ``mtl_jax.<name>``; the comparison is ``mtl_jax.compare``.
"""

from mtl_jax import methods
from mtl_jax._base import Aggregator, MultiTaskGradient, MultiTaskValue, Signal, Weighting
from mtl_jax._diagnostics import Diagnostics, diagnostics
from mtl_jax._interop import as_aggregator
from mtl_jax._lift import Pairs, WeightingState, carry_over, rows_aggregator, vector_weighting
from mtl_jax._masking import masked_mean
from mtl_jax._metrics import MetricsState, with_metrics
from mtl_jax._microbatching import microbatched, microbatched_encoder
from mtl_jax._tasks import Tasks
from mtl_jax._train import TrainState, TrainStep, make_train_step
from mtl_jax._transforms import check_heads, representation_value_and_grad, value_and_grad
from mtl_jax._typing import Losses, Weights
from mtl_jax._wrappers import (
    after_warmup,
    clipped,
    ema,
    every,
    log_losses,
    normalized,
    with_preference,
)
from mtl_jax.methods import *  # noqa: F403  (all factories: its `__all__`)

__version__ = "0.1.0"

__all__ = [
    "Aggregator",
    "Diagnostics",
    "Losses",
    "MetricsState",
    "MultiTaskGradient",
    "MultiTaskValue",
    "Pairs",
    "Signal",
    "Tasks",
    "TrainState",
    "TrainStep",
    "Weighting",
    "WeightingState",
    "Weights",
    "after_warmup",
    "as_aggregator",
    "carry_over",
    "check_heads",
    "clipped",
    "diagnostics",
    "ema",
    "every",
    "log_losses",
    "make_train_step",
    "masked_mean",
    "microbatched",
    "microbatched_encoder",
    "normalized",
    "representation_value_and_grad",
    "rows_aggregator",
    "value_and_grad",
    "vector_weighting",
    "with_metrics",
    "with_preference",
]
__all__ += methods.__all__


def __dir__() -> list[str]:
    """The public names, for help and completion: the modules behind them are none."""
    packages = {"compare", "evaluation"} & globals().keys()  # where they were imported
    special = {name for name in globals() if name.startswith("__")}
    return sorted({*__all__, *packages, *special})
