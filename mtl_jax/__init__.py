"""Multi-task loss weighting in JAX: how much each task's loss counts, at every training step.

Everything public is here, as ``mtl_jax.<name>``; the referee is ``mtl_jax.compare``.
"""

from mtl_jax._base import Aggregator, MultiTaskGradient, MultiTaskValue, Signal, Weighting
from mtl_jax._diagnostics import Diagnostics, diagnostics
from mtl_jax._interop import as_aggregator
from mtl_jax._lift import WeightingState, rows_aggregator, vector_weighting
from mtl_jax._masking import masked_mean
from mtl_jax._microbatching import microbatched, microbatched_encoder
from mtl_jax._tasks import Tasks
from mtl_jax._train import TrainState, TrainStep, make_train_step
from mtl_jax._transforms import check_heads, representation_value_and_grad, value_and_grad
from mtl_jax._typing import Losses, Weights
from mtl_jax._wrappers import after_warmup, clipped, ema, every, normalized, with_preference
from mtl_jax.gradient_aggregators.db_mtl import db_mtl
from mtl_jax.gradient_aggregators.graddrop import graddrop
from mtl_jax.gradient_aggregators.moco import moco
from mtl_jax.gradient_aggregators.trimmed_mean import trimmed_mean
from mtl_jax.gradient_weightings.excess_mtl import excess_mtl
from mtl_jax.gramian_weightings.aligned_mtl import aligned_mtl
from mtl_jax.gramian_weightings.cagrad import cagrad
from mtl_jax.gramian_weightings.conflict_free import conflict_free
from mtl_jax.gramian_weightings.dual_proj import dual_proj
from mtl_jax.gramian_weightings.fair_grad import fair_grad
from mtl_jax.gramian_weightings.gradnorm import gradnorm
from mtl_jax.gramian_weightings.gradvac import gradvac
from mtl_jax.gramian_weightings.imtl_g import imtl_g
from mtl_jax.gramian_weightings.krum import krum
from mtl_jax.gramian_weightings.mgda import mgda
from mtl_jax.gramian_weightings.nash_mtl import nash_mtl
from mtl_jax.gramian_weightings.pcgrad import pcgrad
from mtl_jax.gramian_weightings.upgrad import upgrad
from mtl_jax.loss_weightings.adaptive import adaptive
from mtl_jax.loss_weightings.constant import constant
from mtl_jax.loss_weightings.cov_weighting import cov_weighting
from mtl_jax.loss_weightings.dwa import dwa
from mtl_jax.loss_weightings.dynamic_task_priority import dynamic_task_priority
from mtl_jax.loss_weightings.equal import equal
from mtl_jax.loss_weightings.famo import famo
from mtl_jax.loss_weightings.geometric import geometric
from mtl_jax.loss_weightings.imtl_l import imtl_l
from mtl_jax.loss_weightings.random_weighting import random_weighting
from mtl_jax.loss_weightings.relobralo import relobralo
from mtl_jax.loss_weightings.softadapt import softadapt
from mtl_jax.loss_weightings.stch import stch
from mtl_jax.loss_weightings.uncertainty import uncertainty

__version__ = "0.1.0"

__all__ = [
    "Aggregator",
    "Diagnostics",
    "Losses",
    "MultiTaskGradient",
    "MultiTaskValue",
    "Signal",
    "Tasks",
    "TrainState",
    "TrainStep",
    "Weighting",
    "WeightingState",
    "Weights",
    "adaptive",
    "after_warmup",
    "aligned_mtl",
    "as_aggregator",
    "cagrad",
    "check_heads",
    "clipped",
    "conflict_free",
    "constant",
    "cov_weighting",
    "db_mtl",
    "diagnostics",
    "dual_proj",
    "dwa",
    "dynamic_task_priority",
    "ema",
    "equal",
    "every",
    "excess_mtl",
    "fair_grad",
    "famo",
    "geometric",
    "graddrop",
    "gradnorm",
    "gradvac",
    "imtl_g",
    "imtl_l",
    "krum",
    "make_train_step",
    "masked_mean",
    "mgda",
    "microbatched",
    "microbatched_encoder",
    "moco",
    "nash_mtl",
    "normalized",
    "pcgrad",
    "random_weighting",
    "relobralo",
    "representation_value_and_grad",
    "rows_aggregator",
    "softadapt",
    "stch",
    "trimmed_mean",
    "uncertainty",
    "upgrad",
    "value_and_grad",
    "vector_weighting",
    "with_preference",
]


def __dir__() -> list[str]:
    """The public names, for help and completion: the modules behind them are none."""
    packages = {"compare", "evaluation"} & globals().keys()  # where they were imported
    special = {name for name in globals() if name.startswith("__")}
    return sorted({*__all__, *packages, *special})
