"""Weightings made of weightings: each takes one and returns one, and they compose."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int32, PyTree

from mtl_jax.base import Signal, Weighting
from mtl_jax.checks import check_decay, check_positive, check_weighting, positive_steps
from mtl_jax.loss_weightings.statistics import ema_rate
from mtl_jax.state import all_finite, tree_where
from mtl_jax.tasks import (
    Losses,
    Tasks,
    Weights,
    read_mask,
    read_tasks,
    stack_tasks,
    unstack_tasks,
)

Vector = Float[Array, "tasks"]
Mask = Bool[Array, "tasks"]


class WrapperState(NamedTuple):
    """The state of a wrapper that has one.

    Attributes:
      inner: the state of the weighting inside.
      steps: for each task, the steps it was present in; skipped ones are not counted.
      total: the steps, whoever was present; skipped ones are not counted.
      weights: the weights that the wrapper keeps: the held ones, or their average.
    """

    inner: PyTree
    steps: Int32[Array, "tasks"]
    total: Int32[Array, ""]
    weights: Float[Array, "tasks"]


def every(weighting: Weighting, steps: int) -> Weighting:
    """Decide the weights at every k-th step only, and hold them in between.

    For a weighting that reads the Gramian the K backward passes are really left out in between:
    the transforms ask ``due``. Such steps cost as much as plain training. A weighting that reads
    the losses only sees those of the steps at which it decides.

    Args:
      weighting: the weighting. ``every`` goes innermost: it may have no ``due`` of its own.
      steps: k, in steps; the first step is one of those at which the weights are decided.

    Returns:
      The weighting. A task that was absent whenever the weights were decided has weight 0.

    Raises:
      ValueError: if ``steps`` is not a positive integer or ``weighting`` has ``due`` already.
      TypeError: if ``weighting`` is not a :class:`mtl_jax.Weighting`.

    References:
      Navon et al., `Multi-Task Learning as a Bargaining Game <https://arxiv.org/abs/2202.01017>`_,
      ICML 2022, who decide the weights of Nash-MTL every few steps

    Example:
      >>> import mtl_jax
      >>> weighting = mtl_jax.every(mtl_jax.adaptive(), 2)
      >>> state = weighting.init((1.0, 3.0))
      >>> for losses in [(1.0, 3.0), (3.0, 1.0), (3.0, 1.0)]:
      ...     weights, state = weighting.update(losses, state)
      ...     print([float(weight) for weight in weights])
      [0.5, 1.5]
      [0.5, 1.5]
      [1.5, 0.5]
    """
    check_weighting(weighting)
    positive_steps(steps, "steps", "every")
    if weighting.due is not None:
        raise ValueError(
            "This weighting already says when its signal is due: put `every` innermost."
        )
    return _in_turns(weighting, lambda total: total % steps == 0, before=0, hold=True)


def after_warmup(weighting: Weighting, steps: int) -> Weighting:
    """Equal weights, 1 for each task, for the first steps; then those of the weighting.

    In the warm-up the weighting sees nothing and its signal is not measured. It starts with the
    first step after.

    Args:
      weighting: the weighting.
      steps: the length of the warm-up, in steps.

    Returns:
      The weighting.

    Raises:
      ValueError: if ``steps`` is not a positive integer.
      TypeError: if ``weighting`` is not a :class:`mtl_jax.Weighting`.

    Example:
      >>> import mtl_jax
      >>> weighting = mtl_jax.after_warmup(mtl_jax.adaptive(), 1)
      >>> state = weighting.init((1.0, 3.0))
      >>> for _ in range(2):
      ...     weights, state = weighting.update((1.0, 3.0), state)
      ...     print([float(weight) for weight in weights])
      [1.0, 1.0]
      [0.5, 1.5]
    """
    check_weighting(weighting)
    positive_steps(steps, "steps", "after_warmup")
    return _in_turns(weighting, lambda total: total >= steps, before=1, hold=False)


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
      TypeError: if ``weighting`` is not a :class:`mtl_jax.Weighting`.

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
    check_decay(decay, "ema")

    def update(losses, state, *, mask=None, gramian=None):
        weights, inner = weighting.update(losses, state.inner, mask=mask, gramian=gramian)
        tasks, present, vector = _read(losses, weights, mask)
        rate = ema_rate(decay, state.steps, tasks.dtype)
        average = jnp.where(present, state.weights + rate * (vector - state.weights), state.weights)
        return _finish(average, average, inner, state, tasks, present)

    return weighting._replace(
        init=_init(weighting, 0), update=update, observe=_observe(weighting), due=_due(weighting)
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
      TypeError: if ``weighting`` is not a :class:`mtl_jax.Weighting`.

    Example:
      >>> import mtl_jax
      >>> weighting = mtl_jax.clipped(mtl_jax.adaptive(), 0.75, 1.25)
      >>> weights, _ = weighting.update((1.0, 3.0), weighting.init((1.0, 3.0)))
      >>> [float(weight) for weight in weights]
      [0.75, 1.25]
    """
    check_weighting(weighting)
    if not (np.isfinite(low) and low <= high):
        raise ValueError(f"clipped: the bounds must be finite and in order, got {low!r}, {high!r}.")
    return _mapped(weighting, lambda vector, tasks, present: jnp.clip(vector, low, high))


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
      TypeError: if ``weighting`` is not a :class:`mtl_jax.Weighting`.

    Example:
      >>> import mtl_jax
      >>> weighting = mtl_jax.normalized(mtl_jax.constant((1.0, 4.0)))
      >>> weights, _ = weighting.update((1.0, 3.0), weighting.init((1.0, 3.0)))
      >>> [round(float(weight), 3) for weight in weights]
      [0.4, 1.6]
    """
    check_weighting(weighting)
    if total is not None:
        check_positive(total, "total", "normalized")

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
      TypeError: if ``weighting`` is not a :class:`mtl_jax.Weighting`.

    Example:
      >>> import mtl_jax
      >>> weighting = mtl_jax.with_preference(mtl_jax.equal(), {"depth": 2.0, "normals": 1.0})
      >>> losses = {"depth": 1.0, "normals": 3.0}
      >>> weights, _ = weighting.update(losses, weighting.init(losses))
      >>> {task: float(weight) for task, weight in weights.items()}
      {'depth': 2.0, 'normals': 1.0}
    """
    check_weighting(weighting)
    for leaf in jax.tree.leaves(prior):
        if not 0 <= leaf < float("inf"):
            raise ValueError(f"with_preference: a factor must be finite and >= 0, got {leaf!r}.")

    def multiply(vector, tasks, present):
        return tasks.vector(prior, "with_preference: `prior`") * vector

    return _mapped(weighting, multiply)


def any_due(due: Bool[Array, ""]) -> Bool[Array, ""]:
    """The identity; under ``vmap`` whether any of the batch is due, as one boolean.

    A ``cond`` on it remains a branch under ``vmap``, where one on a batched boolean would become a
    ``select`` that computes both sides.
    """

    @jax.custom_batching.custom_vmap
    def identity(due):
        return due

    @identity.def_vmap
    def any_of_batch(axis_size, in_batched, due):
        return jnp.any(due), False

    return identity(due)


def _in_turns(
    weighting: Weighting, active: Callable[[Array], Array], *, before: float, hold: bool
) -> Weighting:
    """The weighting at the steps at which ``active``; at others its last weights, or ``before``."""

    def due(state: WrapperState) -> Bool[Array, ""]:
        now = active(state.total)
        return now if weighting.due is None else now & weighting.due(state.inner)

    def update(losses, state, *, mask=None, gramian=None):
        now = active(state.total)
        if weighting.needs is Signal.GRAMIAN and weighting.due is None and gramian is None:
            # Not measured, so it must not be the weighting's turn; if it is, that is an error.
            tasks, present, vector = _read(losses, losses, mask)
            kept, inner = jnp.where(now, jnp.nan, state.weights), state.inner
        else:
            weights, inner = weighting.update(losses, state.inner, mask=mask, gramian=gramian)
            tasks, present, vector = _read(losses, weights, mask)
            kept = jnp.where(now, jnp.where(present, vector, state.weights), state.weights)
            inner = tree_where(now, inner, state.inner)
        finite = all_finite([jnp.where(present, stack_tasks(losses, tasks), 0)])
        kept = jnp.where(finite, kept, jnp.nan)
        return _finish(kept, kept if hold else state.weights, inner, state, tasks, present)

    def observe(losses, state, *, mask=None):
        assert weighting.observe is not None
        inner = weighting.observe(losses, state.inner, mask=mask)
        # The step has been counted already.
        return state._replace(inner=tree_where(active(state.total - 1), inner, state.inner))

    return weighting._replace(
        init=_init(weighting, before),
        update=update,
        observe=observe if weighting.observe is not None else None,
        due=due,
    )


def _mapped(weighting: Weighting, change: Callable[[Vector, Tasks, Mask], Vector]) -> Weighting:
    """The weighting with its weights changed; it has no state of its own."""

    def update(losses, state, *, mask=None, gramian=None):
        weights, new_state = weighting.update(losses, state, mask=mask, gramian=gramian)
        tasks, present, vector = _read(losses, weights, mask)
        changed = jnp.where(jnp.isfinite(vector), change(vector, tasks, present), jnp.nan)
        changed = jnp.where(present, changed, 0)
        valid = jnp.all(jnp.isfinite(changed))
        changed = jnp.where(present & ~valid, jnp.nan, changed)
        return unstack_tasks(changed, tasks), tree_where(valid, new_state, state)

    return weighting._replace(update=update)


def _init(weighting: Weighting, value: float) -> Callable[..., WrapperState]:
    def init(losses, *, key=None):
        tasks = read_tasks(losses)
        return WrapperState(
            inner=weighting.init(losses, key=key),
            steps=jnp.zeros((tasks.number,), jnp.int32),
            total=jnp.zeros((), jnp.int32),
            weights=tasks.full(value),
        )

    return init


def _read(losses: Losses, weights: Weights, mask: PyTree | None) -> tuple[Tasks, Mask, Vector]:
    tasks = read_tasks(losses)
    return tasks, read_mask(mask, tasks), jax.lax.stop_gradient(stack_tasks(weights, tasks))


def _finish(
    weights: Vector, kept: Vector, inner: PyTree, state: WrapperState, tasks: Tasks, present: Mask
) -> tuple[Weights, WrapperState]:
    """The weights and the next state; or NaN and the old state, if a weight is not finite."""
    weights = jnp.where(present, weights, 0)
    valid = jnp.all(jnp.isfinite(weights))
    weights = jnp.where(present & ~valid, jnp.nan, weights)
    next_state = WrapperState(
        inner,
        jnp.where(present, optax.safe_increment(state.steps), state.steps),
        jnp.asarray(optax.safe_increment(state.total)),
        kept,
    )
    return unstack_tasks(weights, tasks), tree_where(valid, next_state, state)


def _observe(weighting: Weighting) -> Callable[..., WrapperState] | None:
    observe = weighting.observe
    if observe is None:
        return None
    return lambda losses, state, *, mask=None: state._replace(
        inner=observe(losses, state.inner, mask=mask)
    )


def _due(weighting: Weighting) -> Callable[[WrapperState], Bool[Array, ""]] | None:
    due = weighting.due
    return None if due is None else lambda state: due(state.inner)
