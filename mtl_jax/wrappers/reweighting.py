"""Weightings whose weights are averaged, bounded or scaled."""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool

from mtl_jax.arguments import check_numbers, read_number
from mtl_jax.base import Weighting
from mtl_jax.checks import check_weighting, read_decay, read_positive
from mtl_jax.loss_weightings.statistics import ema_rate
from mtl_jax.pytree import PyTree
from mtl_jax.state import tree_where
from mtl_jax.tasks import Tasks, unstack_tasks
from mtl_jax.wrappers.state import (
    Mask,
    Vector,
    WrapperState,
    finish,
    initial,
    read,
    read_state,
)


def ema(weighting: Weighting, decay: float) -> Weighting:
    r"""Average the weights over time.

    .. math:: \bar w_k(t) = \frac{1 - d}{1 - d^t} \sum_{s \le t} d^{t - s} w_k(s)

    Each task's steps count where it is present.

    Args:
      weighting: the weighting.
      decay: d, in [0, 1); 0 is no averaging.

    Returns:
      The weighting.

    Raises:
      ValueError: if ``decay`` is not in [0, 1).
      TypeError: if ``weighting`` is not a :class:`mtl_jax.Weighting`, or ``decay`` not a number.

    References:
      Zhou et al., `On the Convergence of Stochastic Multi-Objective Gradient Manipulation and
      Beyond <https://openreview.net/forum?id=ScwfQ7hdwyP>`_ (CR-MOGM), NeurIPS 2022; there without
      the correction for the start

    Example:
      >>> import mtl_jax
      >>> weighting = mtl_jax.ema(mtl_jax.adaptive(), 0.5)
      >>> state = weighting.init((1.0, 3.0))
      >>> for losses in [(1.0, 3.0), (3.0, 1.0)]:
      ...     weights, state = weighting.update(losses, state)
      >>> [round(float(weight), 3) for weight in weights]
      [1.167, 0.833]
    """
    check_weighting(weighting)
    decay = read_decay(decay, "ema")

    def update(losses, state, *, mask=None, gramian=None):
        state = read_state(state, losses)
        weights, inner = weighting.update(losses, state.inner, mask=mask, gramian=gramian)
        tasks, present, vector = read(losses, weights, mask)
        rate = ema_rate(decay, state.steps, tasks.dtype)
        average = jnp.where(present, state.weights + rate * (vector - state.weights), state.weights)
        return finish(average, average, inner, state, tasks, present)

    return weighting._replace(
        init=initial(weighting, 0), update=update, observe=_observe(weighting), due=_due(weighting)
    )


def clipped(weighting: Weighting, low: float = 0.0, high: float = float("inf")) -> Weighting:
    """Keep each weight between two bounds.

    Args:
      weighting: the weighting.
      low: the least weight of a present task.
      high: the greatest.

    Returns:
      The weighting, with the state of the one inside.

    Raises:
      ValueError: if ``low`` is not finite or greater than ``high``.
      TypeError: if ``weighting`` is not a :class:`mtl_jax.Weighting`, or a bound not a number.

    Example:
      >>> import mtl_jax
      >>> weighting = mtl_jax.clipped(mtl_jax.adaptive(), 0.75, 1.25)
      >>> weights, _ = weighting.update((1.0, 3.0), weighting.init((1.0, 3.0)))
      >>> [float(weight) for weight in weights]
      [0.75, 1.25]
    """
    check_weighting(weighting)
    least, most = read_number(low, "clipped: `low`"), read_number(high, "clipped: `high`")
    if not (math.isfinite(least) and least <= most):
        raise ValueError(f"clipped: the bounds must be finite and in order, got {low!r}, {high!r}.")
    return _mapped(weighting, lambda vector, tasks, present: jnp.clip(vector, least, most))


def normalized(weighting: Weighting, total: float | None = None) -> Weighting:
    r"""Scale the weights so that their absolute values have a given sum.

    .. math:: w_k \leftarrow T \frac{w_k}{\sum_j |w_j|}

    Args:
      weighting: the weighting.
      total: T; by default the number of present tasks, as with :func:`mtl_jax.equal`, so that a
        learning rate carries over.

    Returns:
      The weighting, with the state of the one inside. Weights that are all 0 remain so.

    Raises:
      ValueError: if ``total`` is not positive.
      TypeError: if ``weighting`` is not a :class:`mtl_jax.Weighting`, or ``total`` not a number.

    Example:
      >>> import mtl_jax
      >>> weighting = mtl_jax.normalized(mtl_jax.constant((1.0, 4.0)))
      >>> weights, _ = weighting.update((1.0, 3.0), weighting.init((1.0, 3.0)))
      >>> [round(float(weight), 3) for weight in weights]
      [0.4, 1.6]
    """
    check_weighting(weighting)
    if total is not None:
        total = read_positive(total, "total", "normalized")

    def scale(vector, tasks, present):
        wanted = jnp.sum(present, dtype=tasks.dtype) if total is None else total
        largest = jnp.max(jnp.abs(vector))
        relative = vector / jnp.where(largest > 0, largest, 1)  # neither overflows nor vanishes
        size = jnp.sum(jnp.abs(relative))
        return wanted * relative / jnp.where(size > 0, size, 1)

    return _mapped(weighting, scale)


def with_preference(weighting: Weighting, prior: PyTree) -> Weighting:
    """Multiply the weights with a preference among the tasks.

    Args:
      weighting: the weighting.
      prior: the factor of each task: a pytree like the losses, or one number for all.

    Returns:
      The weighting, with the state of the one inside.

    Raises:
      ValueError: if a factor is negative or not finite; in ``update``, if ``prior`` has another
        structure than the losses.
      TypeError: if ``weighting`` is not a :class:`mtl_jax.Weighting`, or a factor not a number.

    Example:
      >>> import mtl_jax
      >>> weighting = mtl_jax.with_preference(mtl_jax.equal(), {"depth": 2.0, "normals": 1.0})
      >>> losses = {"depth": 1.0, "normals": 3.0}
      >>> weights, _ = weighting.update(losses, weighting.init(losses))
      >>> {task: float(weight) for task, weight in weights.items()}
      {'depth': 2.0, 'normals': 1.0}
    """
    check_weighting(weighting)
    name = "with_preference: a factor"
    check_numbers(prior, name, lambda factor: 0 <= factor < float("inf"), "finite and >= 0")

    def multiply(vector, tasks, present):
        return tasks.vector(prior, "with_preference: `prior`") * vector

    return _mapped(weighting, multiply)


def _mapped(weighting: Weighting, change: Callable[[Vector, Tasks, Mask], Vector]) -> Weighting:
    """The weighting with its weights changed; it has no state of its own."""

    def update(losses, state, *, mask=None, gramian=None):
        weights, new_state = weighting.update(losses, state, mask=mask, gramian=gramian)
        tasks, present, vector = read(losses, weights, mask)
        changed = jnp.where(jnp.isfinite(vector), change(vector, tasks, present), jnp.nan)
        changed = jnp.where(present, changed, 0)
        valid = jnp.all(jnp.isfinite(changed))
        changed = jnp.where(present & ~valid, jnp.nan, changed)
        return unstack_tasks(changed, tasks), tree_where(valid, new_state, state)

    return weighting._replace(update=update)


def _observe(weighting: Weighting) -> Callable[..., WrapperState] | None:
    observe = weighting.observe
    if observe is None:
        return None
    return lambda losses, state, *, mask=None: state._replace(
        inner=observe(losses, read_state(state).inner, mask=mask)
    )


def _due(weighting: Weighting) -> Callable[[WrapperState], Bool[Array, ""]] | None:
    due = weighting.due
    return None if due is None else lambda state: due(read_state(state).inner)
