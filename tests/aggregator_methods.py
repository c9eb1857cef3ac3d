"""The table of all aggregators that the shared checks run through."""

import functools

from mtl_jax.gradient_aggregators.db_mtl import db_mtl
from mtl_jax.gradient_aggregators.excess_mtl import excess_mtl
from mtl_jax.gradient_aggregators.graddrop import graddrop
from mtl_jax.gradient_aggregators.moco import moco
from mtl_jax.gradient_aggregators.trimmed_mean import trimmed_mean

METHODS = {
    "graddrop": functools.partial(graddrop, 0.3),
    "trimmed_mean": functools.partial(trimmed_mean, 1),
    "moco": functools.partial(moco, rho=0.1),
    "excess_mtl": functools.partial(excess_mtl, 0.5),
    "db_mtl": db_mtl,
}
# Those that add an epsilon, without it.
WITHOUT_EPS = {
    "moco[eps=0]": functools.partial(moco, eps=0.0),
    "excess_mtl[eps=0]": functools.partial(excess_mtl, 0.5, eps=0.0),
    "db_mtl[eps=0]": functools.partial(db_mtl, 0.5, 0.5, eps=0.0),
}
READS_LOSSES = ("moco", "db_mtl")
