"""Group optimization for multi-task alignment."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtl_jax._base import Weighting
from mtl_jax._checks import read_integer, read_number
from mtl_jax._lift import vector_weighting
from mtl_jax._typing import Mask, Vector
from mtl_jax.loss_weightings._statistics import among_themselves


class GO4AlignState(NamedTuple):
    """State of the method.

    Attributes:
      log_shares: the logarithm of each task's share q; the shares sum to 1.
    """

    log_shares: Float[Array, "tasks"]


def go4align(groups: int = 2, step_size: float = 1e-4) -> Weighting:
    r"""GO4Align: weights that bring the losses to one scale, the same for all tasks of a group.

    .. math:: q_k \leftarrow \frac{q_k e^{-\eta L_k}}{\sum_j q_j e^{-\eta L_j}}, \qquad
              v_k = q_k \, \frac{\sum_j L_j}{L_k}, \qquad
              w_k = \frac{1}{|g|} \sum_{j \in g} v_j \quad \text{for } k \text{ in group } g.

    The shares q are 1/K at the start, and are moved before the weights of a step are decided: a
    task whose losses added up to less has more. At every step the numbers v are clustered into
    groups, by k-means. Where each task is a group, all weighted losses are alike but for the
    shares; where all tasks are one, all weights are equal.

    The authors' code starts k-means from random centres and ends where it stops. Here the clusters
    are the best ones: of numbers on a line they are neighbours, and dynamic programming goes
    through all of them. With fewer tasks than groups, each task is a group.

    A loss that is not positive is outside the domain: the weights are then NaN and the state stays
    as it was. The shares depend on the unit of the losses, and the step size with it. When tasks
    are absent, the present ones share their sum among themselves, and the others keep their shares.

    Args:
      groups: the number of groups, at least 1. The default is the paper's for NYUv2, with three
        tasks; for QM9, with eleven, it has 5. The authors' code has 1, where the weights are
        equal.
      step_size: the step size :math:`\eta`, at least 0. The default is that of the authors' code.

    Returns:
      The weighting.

    Raises:
      ValueError: if ``groups`` is not an integer of at least 1, or ``step_size`` negative.
      TypeError: if ``step_size`` is not a number.

    References:
      Shen et al., `GO4Align: Group Optimization for Multi-Task Alignment
      <https://arxiv.org/abs/2404.06486>`_, NeurIPS 2024

    Example:
      Two losses of one scale, and one of another:

      >>> import mtl_jax
      >>> losses = (1.0, 1.25, 10.0)
      >>> weighting = mtl_jax.go4align(groups=2)
      >>> weights, _ = weighting.update(losses, weighting.init(losses))
      >>> [round(float(weight), 2) for weight in weights]
      [3.68, 3.68, 0.41]
    """
    groups = read_integer(groups, "go4align: `groups`")
    step_size = read_number(step_size, "go4align: `step_size`", "[0, inf)")

    def init(tasks, key):
        return GO4AlignState(tasks.full(-math.log(tasks.number)))

    def update(losses, state, present, steps):
        log_losses = jnp.log(jnp.where(losses > 0, losses, jnp.nan))
        finfo = jnp.finfo(losses.dtype)
        descent = jnp.minimum(step_size * losses, finfo.max)
        log_shares = jax.nn.log_softmax(state.log_shares - descent, where=present)
        total = jax.nn.logsumexp(log_losses, where=present)
        weights = jnp.minimum(jnp.exp(log_shares + total - log_losses), finfo.max)
        largest = jnp.max(weights, where=present, initial=0)
        scaled = weights / jnp.where(largest > 0, largest, 1)  # whose squares do not overflow
        weights = largest * _centers(scaled, present, groups)
        return weights, GO4AlignState(among_themselves(log_shares, state.log_shares, present))

    return vector_weighting(update, init, positive_losses=True)


def _centers(values: Vector, present: Mask, groups: int) -> Vector:
    """For each value the mean of its cluster: the best k-means clusters of numbers on a line.

    In order of size a cluster is an interval. The spread of the interval i..j, the sum of its
    squared distances from their mean, is the sum of those of all its pairs, divided by its size.
    The least spread of 0..j in m clusters follows from that in m - 1 and where the last one begins.
    """
    number = len(values)
    order = jnp.argsort(jnp.where(present, values, jnp.inf))  # absent ones last, without a weight
    values, counted = values[order], present[order].astype(values.dtype)
    values = jnp.where(counted > 0, values, 0)

    def of_intervals(terms):  # the sums of terms[a, b] over i <= a, b <= j, for all i and j
        return jnp.cumsum(jnp.cumsum(terms[::-1], axis=0)[::-1], axis=1)

    distances = values[:, None] - values[None]
    pairs = jnp.triu(counted[:, None] * counted[None] * distances**2)
    sizes = of_intervals(jnp.diag(counted))
    spread = of_intervals(pairs) / jnp.maximum(sizes, 1)
    spread = jnp.where(jnp.tri(number).T > 0, spread, jnp.inf)  # only where i <= j

    def one_more(least, _):
        before = jnp.concatenate([jnp.zeros(1, least.dtype), least[:-1]])
        candidates = before[:, None] + spread
        # Of equal ones the last: each value is a cluster if it may be, even if squares underflow.
        begin = number - 1 - jnp.argmin(candidates[::-1], axis=0)
        return jnp.min(candidates, axis=0), begin

    _, begins = jax.lax.scan(one_more, spread[0], length=groups - 1)

    def last_cluster(end, begin):  # from the last cluster to the first
        start = jnp.where(end < 0, 0, begin[end])
        return start - 1, start

    end = jnp.sum(present, dtype=begins.dtype) - 1
    _, starts = jax.lax.scan(last_cluster, end, begins, reverse=True)
    cluster = jnp.sum(jnp.arange(number)[None] >= starts[:, None], axis=0)
    members = jnp.where(cluster[None] == jnp.arange(groups)[:, None], counted[None], 0)
    means = jnp.sum(members * values[None], axis=1) / jnp.maximum(jnp.sum(members, axis=1), 1)
    return jnp.zeros_like(values).at[order].set(means[cluster])
