"""The weightings that a comparison knows by name, with the settings it runs them with."""

import difflib
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import optax

import mtl_jax
from mtl_jax.base import Aggregator, Weighting

T = TypeVar("T")


class RunSettings(NamedTuple):
    """What a weighting's parameters may depend on.

    Attributes:
      steps_per_epoch: training steps in an epoch.
      epochs: epochs of a run.
      optimizer: the network's optimizer, which also trains a weighting's own parameters.
    """

    steps_per_epoch: int
    epochs: int
    optimizer: optax.GradientTransformation


MakeWeighting = Callable[[RunSettings], Weighting | Aggregator]


def _stch(settings: RunSettings) -> Weighting:
    warmup_epochs = max(1, settings.epochs // 5)
    window = settings.steps_per_epoch
    return mtl_jax.stch(warmup=warmup_epochs * window, window=window)


WEIGHTINGS: Mapping[str, MakeWeighting] = {
    "equal": lambda settings: mtl_jax.equal(),
    "adaptive": lambda settings: mtl_jax.adaptive(),
    "adaptive_initial": lambda settings: mtl_jax.adaptive(relative_to="initial"),
    "dwa": lambda settings: mtl_jax.dwa(window=settings.steps_per_epoch),
    "uncertainty": lambda settings: mtl_jax.uncertainty(settings.optimizer),
    "random_weighting": lambda settings: mtl_jax.random_weighting(),
    "geometric": lambda settings: mtl_jax.geometric(),
    "dynamic_task_priority": lambda settings: mtl_jax.dynamic_task_priority(gamma=1.0),
    "cov_weighting": lambda settings: mtl_jax.cov_weighting(),
    "softadapt": lambda settings: mtl_jax.softadapt(window=settings.steps_per_epoch),
    "relobralo": lambda settings: mtl_jax.relobralo(),
    "imtl_l": lambda settings: mtl_jax.imtl_l(settings.optimizer),
    "stch": _stch,
    "famo": lambda settings: mtl_jax.famo(),
    # From here on they read the Gramian,
    "gradnorm": lambda settings: mtl_jax.gradnorm(settings.optimizer),
    "mgda": lambda settings: mtl_jax.mgda(),
    "cagrad": lambda settings: mtl_jax.cagrad(),
    "pcgrad": lambda settings: mtl_jax.pcgrad(),
    "gradvac": lambda settings: mtl_jax.gradvac(),
    "nash_mtl": lambda settings: mtl_jax.nash_mtl(),
    "fair_grad": lambda settings: mtl_jax.fair_grad(),
    "imtl_g": lambda settings: mtl_jax.imtl_g(),
    "aligned_mtl": lambda settings: mtl_jax.aligned_mtl(),
    "upgrad": lambda settings: mtl_jax.upgrad(),
    "dual_proj": lambda settings: mtl_jax.dual_proj(),
    "conflict_free": lambda settings: mtl_jax.conflict_free(),
    "krum": lambda settings: mtl_jax.krum(byzantine=0),
    # and from here on the task gradients.
    "graddrop": lambda settings: mtl_jax.graddrop(),
    "trimmed_mean": lambda settings: mtl_jax.trimmed_mean(trim=1),
    "moco": lambda settings: mtl_jax.moco(),
    "excess_mtl": lambda settings: mtl_jax.excess_mtl(),
    "db_mtl": lambda settings: mtl_jax.db_mtl(),
}
"""Each weighting with its published defaults. Windows are one epoch; the weightings that learn
take the network's optimizer; ``stch`` warms up for a fifth of the epochs. ``krum`` and
``trimmed_mean``, which have no defaults, take the smallest numbers that do something: they need
three tasks."""


def named_weightings(names: list[str]) -> dict[str, MakeWeighting]:
    """Select weightings by name.

    Args:
      names: names, each one of ``WEIGHTINGS``.

    Returns:
      What makes them, by name, in the given order.

    Raises:
      ValueError: if a name is unknown; the message lists the known ones.

    Example:
      >>> from mtl_jax.compare import named_weightings
      >>> sorted(named_weightings(["equal", "adaptive"]))
      ['adaptive', 'equal']
    """
    return {name: look_up(name, WEIGHTINGS, "weighting") for name in names}


def look_up(name: str, known: Mapping[str, T], what: str) -> T:
    """The entry of this name, or an error that lists the known ones and the nearest.

    Args:
      name: the name.
      known: all there are, by name.
      what: what they are, for the error.

    Returns:
      The entry.

    Raises:
      ValueError: if there is none of this name.

    Example:
      >>> from mtl_jax.compare import look_up
      >>> look_up("adam", {"adam": 1, "sgd": 2}, "optimizer")
      1
    """
    if name in known:
        return known[name]
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"There is no {what} {name!r}.{hint} Known: {', '.join(known)}.")
