"""Dynamic task prioritization."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from mtl_jax._base import Weighting
from mtl_jax._checks import check_functions, check_numbers, read_array, read_number
from mtl_jax._lift import vector_weighting
from mtl_jax._metrics import MetricsState
from mtl_jax._typing import PyTree


class DynamicTaskPrioritizationState(NamedTuple):
    """State of the method.

    Attributes:
      performance: the moving average of each task's performance indicator.
      gamma: the focusing parameter of each task.
      metrics: the indicators that are set between steps; ``None`` where they are not.
    """

    performance: Float[Array, "tasks"]
    gamma: Float[Array, "tasks"]
    metrics: MetricsState | None


def dynamic_task_prioritization(
    gamma: PyTree,
    performance: Callable[[Float[Array, "tasks"]], Float[Array, "tasks"]]
    | Literal["metrics"] = lambda losses: jnp.exp(-losses),
    decay: float = 0.0,
) -> Weighting:
    r"""Dynamic task prioritization (DTP): a focal weight on tasks that perform badly.

    .. math:: w_k = -(1 - \bar\kappa_k)^{\gamma_k} \log \bar\kappa_k, \qquad
              \bar\kappa_k \leftarrow d\,\bar\kappa_k + (1 - d)\,\kappa_k,

    where :math:`\kappa_k \in (0, 1]` is the task's performance indicator, such as its accuracy,
    and :math:`\bar\kappa_k` its moving average, which starts at the first value. The weights keep
    this scale and do not sum to K.

    With ``performance="metrics"`` the indicator is what :func:`mtl_jax.with_metrics` sets between
    steps, such as the accuracy on validation data after every epoch, and the average moves only
    then. Until its first one a task has the weight 1.

    Else the indicator is a function of the loss. The default, :math:`e^{-L}`, is the geometric mean
    of the probability given to the right class where the loss is a mean cross-entropy.

    The indicator is bounded below by the smallest positive number, where the weight is about 87 in
    float32. One above 1 (a negative loss) is outside the domain: the weights are then NaN and the
    state stays as it was. The paper's focal loss on the single examples is part of the losses, not
    of the weighting.

    Args:
      gamma: the focusing parameter, at least 0: one number, or a pytree like the losses. At 0 the
        weight is :math:`-\log\bar\kappa`.
      performance: the indicator, from the vector of losses to one of the same shape; or
        ``"metrics"``.
      decay: the decay d in [0, 1) of the moving average, 1 - alpha of the paper. No default was
        published; 0 does not smooth.

    Returns:
      The weighting.

    Raises:
      ValueError: if ``gamma`` is negative or not finite, or ``decay`` outside [0, 1); in
        ``init``, if ``gamma`` has another structure than the losses; in ``update``, if
        ``performance`` returns an array of another shape.
      TypeError: if ``gamma`` or ``decay`` is not a number, or ``performance`` neither a function
        nor ``"metrics"``.

    References:
      Guo et al., `Dynamic Task Prioritization for Multitask Learning
      <https://openaccess.thecvf.com/content_ECCV_2018/html/Michelle_Guo_Focus_on_the_ECCV_2018_paper.html>`_,
      ECCV 2018

    Example:
      >>> import mtl_jax
      >>> weighting = mtl_jax.dynamic_task_prioritization(gamma=1.0)
      >>> weights, _ = weighting.update((0.1, 2.0), weighting.init((0.1, 2.0)))
      >>> [round(float(weight), 3) for weight in weights]
      [0.01, 1.729]
    """
    name = "dynamic_task_prioritization: `gamma`"
    check_numbers(gamma, name, "[0, inf)")
    if not (isinstance(performance, str) and performance == "metrics"):
        check_functions("dynamic_task_prioritization", performance=performance)
    decay = read_number(decay, "dynamic_task_prioritization: `decay`", "[0, 1)")

    def init(tasks, key):
        return DynamicTaskPrioritizationState(
            performance=tasks.full(1),
            gamma=tasks.vector(gamma, name),
            metrics=None if callable(performance) else MetricsState.create(tasks),
        )

    def update(losses, state, present, steps):
        def in_domain(indicator):
            indicator = jnp.where(indicator <= 1, indicator, jnp.nan)
            return jnp.maximum(indicator, jnp.finfo(losses.dtype).tiny)

        metrics, known = state.metrics, jnp.asarray(True)
        if callable(performance):
            current = read_array(performance(losses), "What `performance` returned")
            if current.shape != losses.shape:
                raise ValueError(
                    "dynamic_task_prioritization: `performance` must return one indicator for each "
                    f"task, of shape {losses.shape}; got {current.shape}."
                )
            current = in_domain(current)
            smoothed = decay * state.performance + (1 - decay) * current
            average = jnp.where(steps == 0, current, jnp.minimum(smoothed, 1))
        else:
            metrics = metrics.taken_in(decay)
            known = metrics.updates > 0
            # Behind an average of 1 and less, too, an indicator above 1 is outside the domain.
            average = in_domain(jnp.where(metrics.latest <= 1, metrics.average, jnp.nan))
        weights = jnp.where(known, -((1 - average) ** state.gamma) * jnp.log(average), 1)
        return weights, DynamicTaskPrioritizationState(average, state.gamma, metrics)

    return vector_weighting(update, init, reads_losses=callable(performance))
