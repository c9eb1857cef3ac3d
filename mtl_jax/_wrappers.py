"""Wrappers: weightings that decide on a schedule, or whose weights are averaged or changed."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int32

from mtl_jax._base import Signal, VectorMethod, Weighting, check_weighting
from mtl_jax._checks import check_numbers, check_option, read_integer, read_number
from mtl_jax._lift import (
    WeightingState,
    accept,
    for_each_task,
    lift,
    mean_weight,
    tree_where,
    vector_weighting,
)
from mtl_jax._typing import Mask, PyTree, Vector
from mtl_jax.loss_weightings._statistics import ema_rate


class ScheduleState(NamedTuple):
    """The state of a wrapper that lets its weighting decide at some steps only, on a schedule.

    Attributes:
      inner: the state of the weighting inside.
      weights: the weights in between.
      decided: the tasks that they were decided for.
      total: the steps, whoever was present; skipped ones are not counted.
    """

    inner: WeightingState
    weights: Float[Array, "tasks"]
    decided: Bool[Array, "tasks"]
    total: Int32[Array, ""]


class AverageState(NamedTuple):
    """The state of an average of weights.

    Attributes:
      inner: the state of the weighting inside.
      weights: the average.
    """

    inner: WeightingState
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
      The weighting. A task that had no part in any decision, since it was absent or its gradient
      was zero, has the mean absolute weight of the others in between, or 1 if there are none.

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
      ...     print([round(float(weight), 3) for weight in weights])
      [0.5, 1.5]
      [0.5, 1.5]
      [1.5, 0.5]
    """
    check_weighting(weighting)
    steps = read_integer(steps, "every: `steps`")
    if weighting.due is not None:
        raise ValueError(
            "This weighting already says when its signal is due: put `every` innermost."
        )
    return _scheduled(weighting.method, lambda total: total % steps == 0, before=0, hold=True)


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
      ...     print([round(float(weight), 3) for weight in weights])
      [1.0, 1.0]
      [0.5, 1.5]
    """
    check_weighting(weighting)
    steps = read_integer(steps, "after_warmup: `steps`")
    return _scheduled(weighting.method, lambda total: total >= steps, before=1, hold=False)


def ema(
    weighting: Weighting, decay: float, initial: Literal["first"] | PyTree | None = None
) -> Weighting:
    r"""Average the weights over time.

    .. math:: \bar w_k(t) = \frac{1 - d}{1 - d^t} \sum_{s \le t} d^{t - s} w_k(s)

    Each task's steps count where it is present. With ``initial`` the average has a beginning
    instead, which is forgotten at the same rate:

    .. math:: \bar w_k(t) = d\, \bar w_k(t - 1) + (1 - d)\, w_k(t)

    Args:
      weighting: the weighting.
      decay: d, in [0, 1); 0 is no averaging.
      initial: :math:`\bar w(0)`: ``"first"`` for the first weights, as in published code of CR-MOGM
        (with d = 0.9), a pytree like the losses, or one number for all; ``None`` for the average
        that needs none.

    Returns:
      The weighting.

    Raises:
      ValueError: if ``decay`` is not in [0, 1), ``initial`` another text or a weight not finite;
        in ``init``, if ``initial`` has another structure than the losses.
      TypeError: if ``weighting`` is not a :class:`mtl_jax.Weighting`, or ``decay`` or a weight not
        a number.

    References:
      Zhou et al., `On the Convergence of Stochastic Multi-Objective Gradient Manipulation and
      Beyond <https://openreview.net/forum?id=ScwfQ7hdwyP>`_ (CR-MOGM), NeurIPS 2022; there with
      initial weights

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
    decay = read_number(decay, "ema: `decay`", "[0, 1)")
    if isinstance(initial, str):
        check_option(initial, ("first", None), "ema: `initial`")
    else:
        check_numbers(initial, "ema: an initial weight", "(-inf, inf)")
    inner = weighting.method

    def init(tasks, key, params=None):
        values = 0.0 if initial is None or isinstance(initial, str) else initial
        weights = tasks.vector(values, "ema: `initial`")
        return AverageState(inner.init(tasks, key, params), weights)

    def update(losses, state, present, steps, signal=None):
        weights, inner_state = inner.update(losses, state.inner, present, signal)
        rate = ema_rate(decay, steps, losses.dtype) if initial is None else 1 - decay
        before = state.weights
        if isinstance(initial, str):
            before = jnp.where(steps == 0, weights, before)
        average = before + rate * (weights - before)
        return average, AverageState(inner_state, average)

    return vector_weighting(update, init, **_passed_on(inner))


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
    least = read_number(low, "clipped: `low`")
    most = read_number(high, "clipped: `high`", "(-inf, inf]")
    if least > most:
        raise ValueError(f"clipped: the bounds must be in order, got {low!r}, {high!r}.")
    return _changed(
        weighting.method, lambda weights, state, present: jnp.clip(weights, least, most)
    )


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
        total = read_number(total, "normalized: `total`", "(0, inf)")

    def scale(weights, state, present):
        wanted = jnp.sum(present, dtype=weights.dtype) if total is None else total
        largest = jnp.max(jnp.abs(weights))
        relative = weights / jnp.where(largest > 0, largest, 1)  # neither overflows nor vanishes
        size = jnp.sum(jnp.abs(relative))
        return wanted * relative / jnp.where(size > 0, size, 1)

    return _changed(weighting.method, scale)


def with_preference(weighting: Weighting, preference: PyTree) -> Weighting:
    """Multiply the weights with a preference among the tasks.

    Args:
      weighting: the weighting.
      preference: the factor of each task: a pytree like the losses, or one number for all.

    Returns:
      The weighting, with the state of the one inside.

    Raises:
      ValueError: if a factor is negative or not finite; in ``update``, if ``preference`` has
        another structure than the losses.
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
    check_numbers(preference, "with_preference: a factor", "[0, inf)")

    def multiply(weights, state, present):
        return state.tasks.vector(preference, "with_preference: `preference`") * weights

    return _changed(weighting.method, multiply)


def log_losses(
    weighting: Weighting, decide_on: Literal["logarithms", "losses"] = "logarithms"
) -> Weighting:
    r"""Train the logarithms of the losses.

    .. math:: \sum_k w_k \nabla \log L_k = \sum_k \frac{w_k}{L_k} \nabla L_k

    The weights that are returned, :math:`w_k / L_k`, are those of the losses themselves, so that
    nothing else changes: ``losses_fn`` returns the losses. A loss's scale then counts no more, as
    with :func:`mtl_jax.geometric`, whose direction is that of ``log_losses(equal())``.

    The weighting inside reads what it would read if ``losses_fn`` returned the logarithms: also
    the inner products :math:`G_{ij} / (L_i L_j)`, the task gradients divided by their losses, and
    the logarithms of the losses after the step. Logarithms can be negative, which is outside the
    domain of many weightings of the losses; ``decide_on="losses"`` gives them the losses.

    A loss that is not positive is outside the domain: the weights are then NaN and the state stays
    as it was. So it is where :math:`w_k / L_k` overflows. :func:`mtl_jax.value_and_grad` leaves a
    task out of a step in which its loss is exactly 0 (``leave_out_zero``).

    IGBv1, K softmax(L / B) on the logarithms with the mean losses B of an early epoch, is
    ``log_losses(adaptive(rule="softmax", relative_to="initial", window=n), "losses")``, n being the
    steps of an epoch. Published code takes the second epoch, and weights of 1 until it is over:
    :func:`mtl_jax.after_warmup`, around ``adaptive``, leaves out the first.

    Args:
      weighting: the weighting.
      decide_on: whether it reads the ``"logarithms"`` of the losses, or the ``"losses"``.

    Returns:
      The weighting, with the state of the one inside.

    Raises:
      ValueError: if ``decide_on`` is unknown, or the weighting reads a second batch.
      TypeError: if ``weighting`` is not a :class:`mtl_jax.Weighting`.

    References:
      Dai et al., `Improvable Gap Balancing for Multi-Task Learning
      <https://arxiv.org/abs/2307.15429>`_ (IGBv1), UAI 2023

    Example:
      >>> import mtl_jax
      >>> weighting = mtl_jax.log_losses(mtl_jax.equal())
      >>> weights, _ = weighting.update((0.5, 4.0), weighting.init((0.5, 4.0)))
      >>> [float(weight) for weight in weights]
      [2.0, 0.25]
    """
    check_weighting(weighting)
    check_option(decide_on, ("logarithms", "losses"), "log_losses: `decide_on`")
    inner = weighting.method
    if inner.needs is Signal.SECOND_BATCH:
        raise ValueError(
            "log_losses: this weighting reads gradients of the losses of a second batch, whose "
            "logarithms it cannot be given. Return the logarithms from `losses_fn`."
        )

    def read(losses: Vector, present: Mask) -> Vector:
        losses = jnp.where(losses > 0, losses, jnp.nan)
        if decide_on == "losses":
            return losses
        return jnp.where(present, jnp.log(losses), 1)  # as the loss of an absent task is

    def scaled(signal: PyTree, losses: Vector) -> PyTree:
        if signal is not None and inner.needs is Signal.GRAMIAN:
            signal = signal / losses[:, None]
            return signal / losses[None, :]  # the product of two losses may overflow
        return jax.tree.map(lambda rows: rows / for_each_task(losses, rows), signal)

    def update(losses, state, present, signal):
        weights, new_state = inner.update(
            read(losses, present), state, present, scaled(signal, losses)
        )
        return accept(weights / losses, new_state, state, present)

    def observe(losses, state, present):
        assert inner.observe is not None
        return inner.observe(read(losses, present), state, present)

    return lift(
        inner._replace(
            update=update,
            observe=observe if inner.observe else None,
            reads_losses=True,
            positive_losses=True,
        )
    )


def _scheduled(
    inner: VectorMethod, active: Callable[[Array], Array], *, before: float, hold: bool
) -> Weighting:
    """The weighting at the steps at which ``active``; at others its last weights, or ``before``."""

    def init(tasks, key, params=None):
        state, weights = inner.init(tasks, key, params), tasks.full(before)
        decided = jnp.full(weights.shape, not hold)
        return ScheduleState(state, weights, decided, jnp.zeros((), jnp.int32))

    def due(state: ScheduleState) -> Bool[Array, ""]:
        now = active(state.total)
        return now if inner.due is None else now & inner.due(state.inner)

    def update(losses, state, present, steps, signal=None):
        now, inner_state = active(state.total), state.inner
        between = jnp.where(state.decided, state.weights, mean_weight(state.weights, state.decided))
        if signal is None and inner.needs is not Signal.LOSSES and inner.due is None:
            # Not measured, so the weighting must not be due; if it is, that is an error.
            weights = jnp.where(now, jnp.nan, between)
        else:
            decided, decided_state = inner.update(losses, state.inner, present, signal)
            weights = jnp.where(now & present, decided, between)
            inner_state = tree_where(now, decided_state, state.inner)
        held = jnp.where(now & hold, weights, state.weights)
        total = jnp.asarray(optax.safe_increment(state.total))
        state = ScheduleState(inner_state, held, state.decided | (now & present), total)
        return weights, state

    def observe(losses, state, present):
        assert inner.observe is not None
        # The step has been counted already.
        now = active(state.total - 1)
        observed = inner.observe(losses, state.inner, present)
        return state._replace(inner=tree_where(now, observed, state.inner))

    return vector_weighting(
        update,
        init,
        observe=observe if inner.observe else None,
        needs=inner.needs,
        due=due,
        reads_losses=inner.reads_losses,
        positive_losses=inner.positive_losses,
        directions=_inner_directions(inner),
    )


def _inner_directions(inner: VectorMethod) -> Callable[[Any, Mask], Any] | None:
    """What the weighting inside asks of a second batch, as a function of the wrapper's state."""
    directions = inner.directions
    return None if directions is None else lambda state, present: directions(state.inner, present)


def _changed(
    inner: VectorMethod, change: Callable[[Vector, WeightingState, Mask], Vector]
) -> Weighting:
    """The weighting with its weights changed; it has no state of its own."""

    def update(losses, state, present, signal):
        weights, new_state = inner.update(losses, state, present, signal)
        changed = jnp.where(jnp.isfinite(weights), change(weights, state, present), jnp.nan)
        return accept(changed, new_state, state, present)

    return lift(inner._replace(update=update))


def _passed_on(inner: VectorMethod) -> dict[str, Any]:
    """What a wrapper with a state hands on: what the weighting inside asks for."""

    def observe(losses, state, present):
        assert inner.observe is not None
        return state._replace(inner=inner.observe(losses, state.inner, present))

    def due(state):
        assert inner.due is not None
        return inner.due(state.inner)

    return {
        "observe": observe if inner.observe else None,
        "due": due if inner.due else None,
        "needs": inner.needs,
        "reads_losses": inner.reads_losses,
        "positive_losses": inner.positive_losses,
        "directions": _inner_directions(inner),
    }
