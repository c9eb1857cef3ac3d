"""Multi-task loss weighting in JAX: how much each task's loss counts, at every training step.

Everything public is here, as ``mtl_jax.<name>``; the referee is ``mtl_jax.compare``.
"""

from mtl_jax.base import Signal, Weighting, vector_weighting
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
from mtl_jax.masking import masked_mean
from mtl_jax.tasks import Losses, Tasks, Weights
from mtl_jax.train import TrainState, TrainStep, make_train_step
from mtl_jax.transforms import GradientFn, MultiTaskValue, value_and_grad

__all__ = [
    "GradientFn",
    "Losses",
    "MultiTaskValue",
    "Signal",
    "Tasks",
    "TrainState",
    "TrainStep",
    "Weighting",
    "Weights",
    "adaptive",
    "constant",
    "cov_weighting",
    "dwa",
    "dynamic_task_priority",
    "equal",
    "famo",
    "geometric",
    "imtl_l",
    "make_train_step",
    "masked_mean",
    "random_weighting",
    "relobralo",
    "softadapt",
    "stch",
    "uncertainty",
    "value_and_grad",
    "vector_weighting",
]
