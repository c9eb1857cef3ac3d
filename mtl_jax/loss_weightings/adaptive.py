"""Harder tasks get more weight: the scheme that this library comes from."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from mtl_jax._base import Weighting
from mtl_jax._checks import check_numbers, check_option, read_integer, read_number
from mtl_jax._lift import vector_weighting
from mtl_jax._tasks import Tasks
from mtl_jax._typing import PyTree
from mtl_jax.loss_weightings._statistics import ema_rate


class AdaptiveState(NamedTuple):
    """Statistics of the losses.

    Attributes:
      average: the moving average of each loss.
      reference: what each loss is divided by: 1, the mean of the task's first losses, or the
        reference loss.
    """

    average: Float[Array, "tasks"]
    reference: Float[Array, "tasks"]


def adaptive(
    emphasis: float = 1.0,
    rule: Literal["proportional", "softmax"] = "proportional",
    relative_to: Literal["initial"] | PyTree | Callable[[Int32[Array, ""]], PyTree] | None = None,
    decay: float = 0.0,
    window: int = 1,
) -> Weighting:
    r"""Adaptive weights: the higher a task's loss, the higher its weight.

    With K present tasks, losses :math:`L` and emphasis :math:`p`,

    .. math::

       w_k = K \frac{L_k^p}{\sum_j L_j^p} \quad \text{(proportional)}, \qquad
       w_k = K \frac{e^{p L_k}}{\sum_j e^{p L_j}} \quad \text{(softmax)}.

    The weights sum to the number of present tasks. They are decided on the current losses, and no
    gradient flows through them. ``emphasis=0`` is equal weights, 1 the plainest form.

    This is the scheme of the project's origin: *harder tasks get more weight*. The published
    summary states that principle and prints no formula. Its authors' published package holds equal,
    Dirichlet-random, uncertainty (two forms) and dynamic average weights; it names a softmax of the
    losses, too, without publishing it. So ``rule="softmax"`` with emphasis 1 is the likeliest
    original. The proportional rule is the default, since it does not depend on the losses' unit.

    The softmax rule has two equals. Its weights are K times the derivative by the losses of a
    tilted objective, :math:`\frac1p \log \frac1K \sum_k e^{p L_k}` (`TERM
    <https://arxiv.org/abs/2007.01162>`_, with tilt p). And TorchJD's smooth Tchebycheff
    scalarization, with the reference point 0 and parameter :math:`\mu`, has the weights of
    :math:`p = 1 / (K \mu)` divided by :math:`K^2`.

    A loss is high because its task is hard, or because it is measured on a larger scale (a
    cross-entropy over 100 classes beside one over 2). The proportional rule does not tell the two
    apart. ``relative_to`` does: each loss is then divided by a reference, its first value, so that
    what counts is how little of it has been learned, or what the task reaches when it is trained
    alone, so that what counts is how far it is behind that. With the first losses, the softmax rule
    and a ``window`` this is IGBv1, if the logarithms of the losses are trained (see
    :func:`mtl_jax.log_losses`).

    The proportional rule is computed in logarithms, so that neither losses of 1e30 nor high powers
    overflow. Where all losses are 0 the weights are equal. A negative loss is outside the domain of
    the proportional rule and of ``relative_to``, and so is a reference that is not positive, such
    as a first loss of 0: the weights are then NaN and the state stays as it was. For
    ``relative_to="initial"`` :func:`mtl_jax.value_and_grad` leaves a task out of a step in which
    its loss is exactly 0 (``leave_out_zero``), so that its first loss is a positive one.

    Args:
      emphasis: the power p, at least 0.
      rule: ``"proportional"`` or ``"softmax"``. The softmax depends on the losses' differences,
        not their ratios, and takes losses of any sign.
      relative_to: what each loss is divided by. ``None``: nothing. ``"initial"``: the first loss
        of its task, or the mean of the first ones. A pytree like the losses: reference losses. A
        schedule, a function from a step to such a pytree that JAX can trace: reference losses that
        change, such as the curve of each task trained alone. It is called with each task's own
        step, the number of earlier updates in which the task was present, so that a task that is
        often absent is compared with the same point of its own training.
      decay: the decay d, in [0, 1), of an exponential moving average that smooths the losses over
        the steps first: :math:`m_t = (1 - d) \sum_{s \le t} d^{\,t - s} L_s / (1 - d^t)`, which
        starts at the first loss. 0 does not smooth.
      window: for ``relative_to="initial"``, the number of first steps of a task over which its
        loss is averaged; until they are complete, the mean so far is taken.

    Returns:
      The weighting.

    Raises:
      ValueError: if a parameter is not one of these, a reference loss is not positive, or
        ``window`` is given without ``relative_to="initial"``; in ``init``, if the reference losses
        have another structure than the losses.
      TypeError: if ``emphasis``, ``decay`` or a reference loss is not a number.

    Example:
      >>> import mtl_jax
      >>> weighting = mtl_jax.adaptive()
      >>> losses = {"easy": 0.5, "hard": 1.5}
      >>> weights, state = weighting.update(losses, weighting.init(losses))
      >>> round(float(weights["easy"]), 3), round(float(weights["hard"]), 3)
      (0.5, 1.5)

      Relative to what each task reaches alone, the other one is the harder:

      >>> weighting = mtl_jax.adaptive(relative_to={"easy": 0.1, "hard": 1.5})
      >>> weights, state = weighting.update(losses, weighting.init(losses))
      >>> round(float(weights["easy"]), 3), round(float(weights["hard"]), 3)
      (1.667, 0.333)
    """
    emphasis = read_number(emphasis, "adaptive: `emphasis`", "[0, inf)")
    check_option(rule, ("proportional", "softmax"), "adaptive: `rule`")
    if relative_to is None or isinstance(relative_to, str):
        check_option(relative_to, (None, "initial"), "adaptive: `relative_to`")
    elif not callable(relative_to):
        check_numbers(relative_to, "adaptive: a reference loss", "(0, inf)")
    decay = read_number(decay, "adaptive: `decay`", "[0, 1)")
    window = read_integer(window, "adaptive: `window`")
    if window > 1 and not _is_initial(relative_to):
        raise ValueError("adaptive: `window` is for relative_to='initial'.")

    def init(tasks, key):
        reference = tasks.full(1)
        if callable(relative_to):
            _check_schedule(relative_to, tasks)
        elif not (relative_to is None or _is_initial(relative_to)):
            reference = tasks.vector(relative_to, "adaptive: `relative_to`")
        return AdaptiveState(average=tasks.full(0), reference=reference)

    def update(losses, state, present, steps):
        if rule == "proportional" or relative_to is not None:
            losses = jnp.where(losses >= 0, losses, jnp.nan)
        rate = ema_rate(decay, steps, losses.dtype)
        average = (1 - rate) * state.average + rate * losses
        reference = state.reference
        if _is_initial(relative_to):
            mean = reference + (losses - reference) / (steps + 1).astype(losses.dtype)
            reference = jnp.where(steps < window, mean, reference)
            reference = jnp.where(steps == 0, losses, reference)
        elif callable(relative_to):
            reference = _at_own_steps(relative_to, steps, losses.dtype)
        reference = jnp.where(reference > 0, reference, jnp.nan)
        if rule == "softmax":
            difficulty = jnp.minimum(average / reference, jnp.finfo(losses.dtype).max)
            scores = emphasis * (difficulty - jnp.max(difficulty, where=present, initial=-jnp.inf))
        else:
            # Equal weights without emphasis, or if all losses are 0: not 0 times infinity.
            alike = (emphasis == 0) | jnp.all(average == 0, where=present)
            scores = emphasis * jnp.where(alike, 0 * reference, _log_ratio(average, reference))
        shares = jax.nn.softmax(scores, where=present)
        weights = jnp.sum(present, dtype=losses.dtype) * shares
        return weights, AdaptiveState(average, reference)

    return vector_weighting(update, init, positive_losses=_is_initial(relative_to))


def _is_initial(relative_to: Any) -> bool:
    return isinstance(relative_to, str)  # which was checked to be "initial"


def _check_schedule(schedule: Callable[[Int32[Array, ""]], PyTree], tasks: Tasks) -> None:
    """Raise an error for a schedule that does not return one number for each task."""

    def check(step: Int32[Array, ""]) -> Array:
        return tasks.numbers(schedule(step), "adaptive: what `relative_to` returned")

    jax.eval_shape(check, jax.ShapeDtypeStruct((), jnp.int32))


def _at_own_steps(
    schedule: Callable[[Int32[Array, ""]], PyTree], steps: Int32[Array, "tasks"], dtype: Any
) -> Float[Array, "tasks"]:
    """The reference loss of each task at its own step."""

    def losses(step: Int32[Array, ""]) -> Array:
        leaves = jax.tree.leaves(schedule(step))
        return jnp.concatenate([jnp.atleast_1d(jnp.asarray(leaf).astype(dtype)) for leaf in leaves])

    return jnp.diagonal(jax.vmap(losses)(steps))


def _log_ratio(
    numerator: Float[Array, "tasks"], denominator: Float[Array, "tasks"]
) -> Float[Array, "tasks"]:
    """The logarithm of a ratio that may itself be too large or too small for its dtype."""
    (top, top_exponent), (bottom, bottom_exponent) = jnp.frexp(numerator), jnp.frexp(denominator)
    exponent = (top_exponent - bottom_exponent).astype(numerator.dtype)
    return jnp.log(top / bottom) + math.log(2) * exponent
