"""Causal weights: what comes first is learned first."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from mtl_jax._base import Weighting
from mtl_jax._checks import read_number
from mtl_jax._lift import Pairs, vector_weighting
from mtl_jax._tasks import Tasks


class CausalState(NamedTuple):
    """State of the method.

    Attributes:
      before: 1 where the second task of a pair comes before the first in the order that was given;
        ``None`` for the order of the losses.
    """

    before: Pairs | None


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
        return CausalState(None if names is None else _before(names, tasks))

    def update(losses, state, present, steps):
        losses = jnp.where(present, jnp.where(losses >= 0, losses, jnp.nan), 0)
        before = jnp.tri(losses.size, k=-1) if state.before is None else state.before.values
        earlier = jnp.where(before > 0, losses[None, :], 0)
        return jnp.exp(-tolerance * jnp.sum(earlier, axis=1)), state

    return vector_weighting(update, init)


def _read_order(order: Sequence[str] | None) -> tuple[str, ...] | None:
    """The names, checked to be texts."""
    if order is None:
        return None
    sequence = isinstance(order, Sequence) and not isinstance(order, str | bytes)
    if not sequence or not all(isinstance(name, str) for name in order):
        raise TypeError(f"causal: `order` must be a sequence of the tasks' names, got {order!r}.")
    return tuple(order)


def _before(names: tuple[str, ...], tasks: Tasks) -> Pairs:
    """Which task comes before which."""
    if sorted(names) != sorted(tasks.names):
        raise ValueError(
            f"causal: `order` must name each of the tasks {', '.join(tasks.names)} once; got "
            f"{', '.join(names)}."
        )
    place = np.array([names.index(name) for name in tasks.names])
    return Pairs(jnp.asarray(place[None, :] < place[:, None], tasks.dtype))
