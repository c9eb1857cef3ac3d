"""The weightings that a comparison knows by name, with the settings it runs them with."""

import difflib
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import optax

import mtl_jax
from mtl_jax.base import Weighting

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


MakeWeighting = Callable[[RunSettings], Weighting]


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
}
"""Each weighting with its published defaults. Windows are one epoch; the weightings that learn
take the network's optimizer; ``stch`` warms up for a fifth of the epochs."""


def named_weightings(names: list[str]) -> dict[str, MakeWeighting]:
    """Select weightings by name.

    Raises:
      ValueError: if a name is unknown; the message lists the known ones.
    """
    return {name: look_up(name, WEIGHTINGS, "weighting") for name in names}


def look_up(name: str, known: Mapping[str, T], what: str) -> T:
    """The entry of this name, or an error that lists the known ones and the nearest."""
    if name in known:
        return known[name]
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"There is no {what} {name!r}.{hint} Known: {', '.join(known)}.")
