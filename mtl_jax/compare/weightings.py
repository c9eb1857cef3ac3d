"""The weightings that a comparison knows by name, and what tuning searches for each."""

import difflib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import optax

import mtl_jax
from mtl_jax._base import Aggregator, Weighting
from mtl_jax.compare.search_space import Choice, Range, Space, TaskWeights

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


MakeWeighting = Callable[..., Weighting | Aggregator]
"""``make(settings)`` with :class:`RunSettings`; what is tuned besides comes by keyword."""


def _plain(method: Callable[..., Any], **fixed: Any) -> MakeWeighting:
    return lambda settings, **own: method(**(fixed | own))


def _windowed(method: Callable[..., Any]) -> MakeWeighting:
    return lambda settings, **own: method(window=settings.steps_per_epoch, **own)


def _learned(method: Callable[..., Any]) -> MakeWeighting:
    return lambda settings, **own: method(settings.optimizer, **own)


def _constant(settings: RunSettings, weights: Mapping[str, float] | None = None) -> Weighting:
    return mtl_jax.equal() if weights is None else mtl_jax.constant(dict(weights))


def _stch(settings: RunSettings, **own: Any) -> Weighting:
    warmup_epochs = max(1, settings.epochs // 5)
    window = settings.steps_per_epoch
    return mtl_jax.stch(warmup=warmup_epochs * window, window=window, **own)


WEIGHTINGS: Mapping[str, MakeWeighting] = {
    "equal": _plain(mtl_jax.equal),
    "constant": _constant,
    "adaptive": _plain(mtl_jax.adaptive),
    "adaptive_initial": _plain(mtl_jax.adaptive, relative_to="initial"),
    "dwa": _windowed(mtl_jax.dwa),
    "uncertainty": _learned(mtl_jax.uncertainty),
    "random_weighting": _plain(mtl_jax.random_weighting),
    "geometric": _plain(mtl_jax.geometric),
    "dynamic_task_priority": _plain(mtl_jax.dynamic_task_priority, gamma=1.0),
    "cov_weighting": _plain(mtl_jax.cov_weighting),
    "softadapt": _windowed(mtl_jax.softadapt),
    "relobralo": _plain(mtl_jax.relobralo),
    "imtl_l": _learned(mtl_jax.imtl_l),
    "stch": _stch,
    "famo": _plain(mtl_jax.famo),
    # From here on they read the Gramian,
    "gradnorm": _learned(mtl_jax.gradnorm),
    "mgda": _plain(mtl_jax.mgda),
    "cagrad": _plain(mtl_jax.cagrad),
    "pcgrad": _plain(mtl_jax.pcgrad),
    "gradvac": _plain(mtl_jax.gradvac),
    "nash_mtl": _plain(mtl_jax.nash_mtl),
    "fair_grad": _plain(mtl_jax.fair_grad),
    "imtl_g": _plain(mtl_jax.imtl_g),
    "aligned_mtl": _plain(mtl_jax.aligned_mtl),
    "upgrad": _plain(mtl_jax.upgrad),
    "dual_proj": _plain(mtl_jax.dual_proj),
    "conflict_free": _plain(mtl_jax.conflict_free),
    "krum": _plain(mtl_jax.krum, byzantine=0),
    # and from here on the task gradients.
    "graddrop": _plain(mtl_jax.graddrop),
    "trimmed_mean": _plain(mtl_jax.trimmed_mean, trim=1),
    "moco": _plain(mtl_jax.moco),
    "excess_mtl": _plain(mtl_jax.excess_mtl),
    "db_mtl": _plain(mtl_jax.db_mtl),
}
"""Each weighting with its published defaults. Windows are one epoch; the weightings that learn
take the network's optimizer; ``stch`` warms up for a fifth of the epochs. ``krum`` and
``trimmed_mean``, which have no defaults, take the smallest numbers that do something: they need
three tasks. ``constant`` is equal weights until it is tuned."""

_EMPHASIS: Space = {"emphasis": Range(1.0, 0.1, 4.0, log=True), "decay": Choice(0.0, 0.9, 0.99)}

SPACES: Mapping[str, Space] = {
    "constant": {"weights": TaskWeights()},
    "adaptive": _EMPHASIS,
    "adaptive_initial": _EMPHASIS,
    "dwa": {"temperature": Range(2.0, 0.2, 20.0, log=True)},
    "uncertainty": {
        "initial_log_variance": Range(0.0, -3.0, 3.0),
        "form": Choice("kendall", "half", "revised"),
    },
    "random_weighting": {"distribution": Choice("normal", "dirichlet")},
    "dynamic_task_priority": {"gamma": Range(1.0, 0.0, 5.0), "decay": Choice(0.0, 0.9, 0.99)},
    "cov_weighting": {"decay": Choice(None, 0.9, 0.99)},
    "softadapt": {
        "beta": Range(0.1, 0.01, 10.0, log=True),
        "variant": Choice("original", "normalized", "loss_weighted"),
    },
    "relobralo": {
        "alpha": Choice(0.999, 0.99, 0.9),
        "temperature": Range(1.0, 0.01, 10.0, log=True),
        "rho": Choice(1.0, 0.999, 0.99, 0.9),
    },
    "stch": {"mu": Range(1.0, 0.1, 10.0, log=True)},
    "famo": {
        "learning_rate": Range(0.025, 0.001, 0.5, log=True),
        "weight_decay": Range(1e-3, 1e-5, 0.1, log=True),
    },
    "gradnorm": {"alpha": Range(1.5, 0.1, 3.0)},
    "mgda": {"normalization": Choice(None, "l2", "loss", "loss+")},
    "cagrad": {"c": Range(0.5, 0.1, 0.9)},
    "gradvac": {"beta": Range(0.5, 0.01, 1.0, log=True)},
    "nash_mtl": {"max_norm": Choice(None, 1.0)},
    "fair_grad": {"alpha": Range(1.0, 0.5, 10.0, log=True)},
    "aligned_mtl": {"scale": Choice("min", "median", "rmse")},
    "krum": {"selected": Choice(1, 2, 3)},
    "graddrop": {"leak": Range(0.0, 0.0, 0.9)},
    "moco": {
        "beta": Range(0.5, 0.05, 1.0, log=True),
        "gamma": Range(0.1, 0.01, 10.0, log=True),
    },
    "excess_mtl": {"step_size": Range(0.01, 0.001, 1.0, log=True)},
    "db_mtl": {"beta": Range(0.9, 0.0, 0.99), "beta_sigma": Choice(0.0, 0.5)},
}
"""What tuning searches besides the learning rate, for the weightings that have something to choose.
The ranges hold the published default and the values that publications chose from, and reach as far
beyond as may make sense."""


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
