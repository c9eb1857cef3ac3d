"""The weightings that a comparison knows by name, and what tuning searches for each.

Both are made from :data:`mtl_jax.methods.METHODS`; those that need what each task reaches alone,
which a comparison knows, are made here.
"""

import difflib
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import jax.numpy as jnp
from jaxtyping import Array

from mtl_jax._base import Aggregator, Weighting
from mtl_jax._search_space import Choice, Space
from mtl_jax.methods import (
    MAKES,
    METHODS,
    RunSettings,
    SingleTask,
    achievement,
    adaptive,
    constant,
    equal,
)

T = TypeVar("T")

MakeWeighting = Callable[..., Weighting | Aggregator]
"""``make(settings)`` with :class:`mtl_jax.RunSettings`; what is tuned besides comes by keyword."""


def _constant(settings: RunSettings, weights: Mapping[str, float] | None = None) -> Weighting:
    return equal() if weights is None else constant(dict(weights))


def _adaptive_alone(
    settings: RunSettings, reference: Literal["end", "curve"] = "end", **parameters: Any
) -> Weighting:
    """Weights that grow with how far a task is behind the loss that it reaches alone.

    At the ``"end"`` of its own training, or at the same point of it (``"curve"``).
    """
    curves = _single_task(settings, "adaptive_alone").losses
    curves = {task: jnp.asarray(curve) for task, curve in curves.items()}
    if reference == "end":
        ends = {task: curve[-1] for task, curve in curves.items()}
        return adaptive(relative_to=ends, **parameters)

    def at(step: Array) -> dict[str, Array]:
        epoch = jnp.minimum(step // settings.steps_per_epoch, settings.epochs - 1)
        return {task: curve[epoch] for task, curve in curves.items()}

    return adaptive(relative_to=at, **parameters)


def _achievement(settings: RunSettings, **parameters: Any) -> Weighting:
    alone = _single_task(settings, "achievement")
    if without := set(alone.losses) - set(alone.metrics):
        raise ValueError(
            f"achievement needs a metric of every task; {', '.join(sorted(without))}: none."
        )
    return achievement(
        single_task=alone.metrics, higher_is_better=alone.higher_is_better, **parameters
    )


def _single_task(settings: RunSettings, name: str) -> SingleTask:
    if settings.single_task is None:
        raise ValueError(
            f"{name} needs what each task reaches alone: leave `alone` (--alone, also the "
            "problem's) at its default."
        )
    return settings.single_task


_MADE_HERE: dict[str, MakeWeighting] = {
    "constant": _constant,
    "achievement": _achievement,
    "adaptive_alone": _adaptive_alone,
}


def _all_spaces() -> dict[str, Space]:
    found = (item for method in METHODS.values() for item in method.spaces.items())
    alone = {"reference": Choice("end", "curve"), **METHODS["adaptive"].search}
    return {name: space for name, space in found if space} | {"adaptive_alone": alone}


WEIGHTINGS: Mapping[str, MakeWeighting] = {**MAKES, **_MADE_HERE}
"""The ``make`` of each method's record in :data:`mtl_jax.methods.METHODS`, and of its variants, by
name. ``constant`` is equal weights until it is tuned. ``adaptive_alone`` is ``adaptive`` relative
to the loss that each task reaches alone, and ``achievement`` knows the metric that each reaches
alone; so both need these runs."""

SPACES: Mapping[str, Space] = _all_spaces()
"""What tuning searches besides the learning rate, the ``spaces`` of each record, for the weightings
that have something to choose."""


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
