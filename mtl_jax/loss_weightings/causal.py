"""Causal weights: what comes first is learned first."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int32

from mtl_jax._base import Weighting
from mtl_jax._checks import read_number
from mtl_jax._lift import vector_weighting
from mtl_jax._tasks import Tasks


class CausalState(NamedTuple):
    """State of the method.

    Attributes:
      place: the place of each task in the order.
    """

    place: Int32[Array, "tasks"]


def causal(order: Sequence[str] | None, tolerance: float = 1.0) -> Weighting:
    r"""Causal weights: a task counts once the losses of those before it are small.

    With the tasks in their order,

    .. math:: w_i = \exp\Big(-\varepsilon \sum_{j < i} L_j\Big).

    For losses that belong to successive stretches of time, as the residuals of a physics-informed
    network do: a later one is not learned before the solution is right up to it. The first weight
    is 1, all others are at most that; when they are near 1, too, the whole is learned. The paper
    divides the weighted sum by K. An absent task adds nothing to the sums. A negative loss is
    outside the domain: the weights are then NaN and the state stays as it was.

    Args:
      order: the names of all tasks, the first one first. A name is the path of the loss, such as
        ``"early"`` or ``"residuals/0"``. ``None`` is the order of the leaves of the losses: that of
        a tuple or list; but a dictionary has its keys sorted.
      tolerance: the tolerance parameter :math:`\varepsilon > 0`: the higher, the smaller the
        losses before must be. The default is that of the authors' code, whose runs raise it from
        0.01 to 100 in the course of training.

    Returns:
      The weighting.

    Raises:
      ValueError: if ``tolerance`` is not positive; in ``init``, if ``order`` does not name all
        tasks, each once.
      TypeError: if ``tolerance`` is not a number, or ``order`` not a sequence of texts.

    References:
      Wang, Sankaran and Perdikaris, `Respecting causality is all you need for training
      physics-informed neural networks <https://arxiv.org/abs/2203.07404>`_, 2022

    Example:
      >>> import mtl_jax
      >>> weighting = mtl_jax.causal(("early", "middle", "late"))
      >>> losses = {"early": 0.5, "middle": 1.0, "late": 2.0}
      >>> weights, _ = weighting.update(losses, weighting.init(losses))
      >>> {task: round(float(weight), 3) for task, weight in weights.items()}
      {'early': 1.0, 'late': 0.223, 'middle': 0.607}
    """
    names = _read_order(order)
    tolerance = read_number(tolerance, "causal: `tolerance`", "(0, inf)")

    def init(tasks, key):
        return CausalState(_places(names, tasks))

    def update(losses, state, present, steps):
        losses = jnp.where(present, jnp.where(losses >= 0, losses, jnp.nan), 0)
        before = state.place[None, :] < state.place[:, None]
        return jnp.exp(-tolerance * jnp.sum(jnp.where(before, losses[None, :], 0), axis=1)), state

    return vector_weighting(update, init)


def _read_order(order: Sequence[str] | None) -> tuple[str, ...] | None:
    """The names, checked to be texts."""
    if order is None:
        return None
    sequence = isinstance(order, Sequence) and not isinstance(order, str | bytes)
    if not sequence or not all(isinstance(name, str) for name in order):
        raise TypeError(f"causal: `order` must be a sequence of the tasks' names, got {order!r}.")
    return tuple(order)


def _places(names: tuple[str, ...] | None, tasks: Tasks) -> Int32[Array, "tasks"]:
    """The place of each task in the order."""
    if names is None:
        return jnp.arange(tasks.number, dtype=jnp.int32)
    if sorted(names) != sorted(tasks.names):
        raise ValueError(
            f"causal: `order` must name each of the tasks {', '.join(tasks.names)} once; got "
            f"{', '.join(names)}."
        )
    return jnp.array([names.index(name) for name in tasks.names], jnp.int32)
