"""Achievement-based weights."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtl_jax._base import Weighting
from mtl_jax._checks import check_flags, check_numbers, check_option, read_number
from mtl_jax._lift import vector_weighting
from mtl_jax._metrics import MetricsState
from mtl_jax._typing import PyTree


class AchievementState(NamedTuple):
    """State of the method.

    Attributes:
      metrics: the moving average of each task's metric.
      single_task: the metric that each task reaches alone.
      higher: 1 where a higher metric is better, 0 where a lower one is.
    """

    metrics: MetricsState
    single_task: Float[Array, "tasks"]
    higher: Float[Array, "tasks"]


def achievement(
    single_task: PyTree = 1.0,
    gamma: float = 0.5,
    margin: float = 0.15,
    decay: float = 0.9,
    higher_is_better: PyTree = True,
    form: Literal["geometric", "arithmetic"] = "geometric",
) -> Weighting:
    r"""Achievement-based weights: the further a task is behind its single-task metric, the higher.

    With the moving average :math:`\bar\kappa_k` of a task's validation metric, and the metric
    :math:`\kappa_k^{\text{alone}}` that it reaches when it is trained alone, its share is

    .. math:: v_k = \frac{e^{s_k}}{\sum_j e^{s_j}}, \qquad
              s_k = \max\Big(0,\, 1 - \frac{a_k}{1 + m}\Big)^\gamma, \qquad
              a_k = \frac{\bar\kappa_k}{\kappa_k^{\text{alone}}}.

    The achievement :math:`a_k` is the other way round for a metric of which less is better, such as
    an error. The margin m keeps a task that reaches its single-task metric from dropping out. The
    weights minimise a weighted geometric mean of the losses,

    .. math:: M = \prod_k L_k^{v_k}, \qquad w_k = \frac{\partial M}{\partial L_k}
              = \frac{v_k M}{L_k},

    or their arithmetic mean, with the weights :math:`w_k = v_k`.

    The metrics are set by :func:`mtl_jax.with_metrics`, usually once an epoch. Until each present
    task has one, the shares are equal: that is :func:`mtl_jax.geometric`. Their moving average
    starts at the first one and goes on with each that is set. Where a task exceeds the margin
    published code takes a root of a negative number; here its score is 0. In the geometric form a
    loss that is not positive is outside the domain: the weights are then NaN and the state stays
    as it was.

    Args:
      single_task: the metric that each task reaches alone, positive: a pytree like the losses. With
        1, the default, the metrics that are set are achievements already.
      gamma: the focusing factor, at least 0. The default, as those that follow, is that of the
        authors' program; settings that they published have 2 with the margin 0.05.
      margin: m, at least 0.
      decay: the decay in [0, 1) of the moving average of the metrics; 0 does not average.
      higher_is_better: whether a higher metric is better: ``True``, ``False``, or a pytree of these
        like the losses.
      form: ``"geometric"`` or ``"arithmetic"``.

    Returns:
      The weighting.

    Raises:
      ValueError: if ``gamma`` or ``margin`` is negative, ``decay`` outside [0, 1), ``form`` unknown
        or a single-task metric not positive; in ``init``, if a pytree has another structure than
        the losses.
      TypeError: if one of them is not a number, or ``higher_is_better`` holds something else than
        ``True`` and ``False``.

    References:
      Yun and Cho, `Achievement-Based Training Progress Balancing for Multi-Task Learning
      <https://openaccess.thecvf.com/content/ICCV2023/html/Yun_Achievement-Based_Training_Progress_Balancing_for_Multi-Task_Learning_ICCV_2023_paper.html>`_,
      ICCV 2023

    Example:
      >>> import mtl_jax
      >>> losses = {"depth": 1.0, "normals": 1.0}
      >>> weighting = mtl_jax.achievement(
      ...     single_task={"depth": 0.4, "normals": 0.8},  # an error, and an accuracy
      ...     higher_is_better={"depth": False, "normals": True})
      >>> state = weighting.init(losses)
      >>> state = mtl_jax.with_metrics(state, {"depth": 0.4, "normals": 0.2})
      >>> weights, state = weighting.update(losses, state)
      >>> {task: round(float(weight), 3) for task, weight in weights.items()}
      {'depth': 0.372, 'normals': 0.628}
    """
    check_numbers(single_task, "achievement: a single-task metric", "(0, inf)")
    gamma = read_number(gamma, "achievement: `gamma`", "[0, inf)")
    margin = read_number(margin, "achievement: `margin`", "[0, inf)")
    decay = read_number(decay, "achievement: `decay`", "[0, 1)")
    for leaf in jax.tree.leaves(higher_is_better):
        check_flags("achievement", higher_is_better=leaf)
    check_option(form, ("geometric", "arithmetic"), "achievement: `form`")

    def init(tasks, key):
        return AchievementState(
            metrics=MetricsState.create(tasks),
            single_task=tasks.vector(single_task, "achievement: `single_task`"),
            higher=tasks.vector(higher_is_better, "achievement: `higher_is_better`"),
        )

    def update(losses, state, present, steps):
        metrics = state.metrics.taken_in(decay)
        ratio = metrics.average / state.single_task
        achieved = jnp.where(state.higher > 0, ratio, 1 / ratio)
        scores = jnp.maximum(1 - achieved / (1 + margin), 0) ** gamma
        known = jnp.all(metrics.updates > 0, where=present)
        shares = jax.nn.softmax(jnp.where(known, scores, 0), where=present)
        if form == "geometric":
            logs = jnp.log(losses)
            mean = jnp.sum(shares * logs, where=present)
            shares = shares * jnp.exp(mean - logs)
        return shares, state._replace(metrics=metrics)

    reads_losses = form == "geometric"
    return vector_weighting(update, init, reads_losses=reads_losses, positive_losses=reads_losses)
