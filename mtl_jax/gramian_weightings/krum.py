"""Krum and multi-Krum."""

from typing import Literal

import jax.numpy as jnp

from mtl_jax._base import Signal, Weighting
from mtl_jax._checks import check_option, read_integer
from mtl_jax._lift import vector_weighting


def krum(
    byzantine: int, selected: int = 1, distance: Literal["squared", "plain"] = "squared"
) -> Weighting:
    r"""Krum: train on the task gradient that lies nearest to its neighbours, or on some of them.

    .. math:: s_k = \sum_{j \in N_k} \lVert g_k - g_j \rVert^2, \qquad
              w_k = \frac{1}{m} \text{ for the } m \text{ lowest } s_k, \text{ else } 0,

    where :math:`N_k` are the K - f - 2 other tasks whose gradients are nearest to that of task k,
    so that f gradients may be arbitrarily wrong. m = 1 is Krum, a higher one multi-Krum. The
    weights sum to 1. Of equal scores, the task that comes first among the leaves of the losses
    wins.

    With a mask, K is the number of present tasks. Where that leaves fewer than one neighbour, each
    task keeps one; where fewer than m tasks are present, all of them share the weight. The losses
    are not read: they may be 0 or negative.

    Args:
      byzantine: f, how many gradients may be wrong, at least 0; needs f + 3 tasks or more.
      selected: m, the number of gradients to average.
      distance: ``"squared"`` distances, as in the paper, or ``"plain"`` ones, as in TorchJD; they
        can select other tasks.

    Returns:
      The weighting.

    Raises:
      ValueError: if a parameter is not one of these; in ``init``, if there are too few tasks.

    References:
      Blanchard et al., `Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent
      <https://arxiv.org/abs/1703.02757>`_, NeurIPS 2017

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_jax
      >>> weighting = mtl_jax.krum(byzantine=1, selected=2)
      >>> state = weighting.init((1.0, 1.0, 1.0, 1.0))
      >>> gradients = jnp.array([[1.0], [1.1], [1.3], [-50.0]])
      >>> weights, state = weighting.update(
      ...     (1.0, 1.0, 1.0, 1.0), state, gramian=gradients @ gradients.T
      ... )
      >>> [float(weight) for weight in weights]
      [0.5, 0.5, 0.0, 0.0]
    """
    byzantine = read_integer(byzantine, "krum: `byzantine`", 0)
    selected = read_integer(selected, "krum: `selected`")
    check_option(distance, ("squared", "plain"), "krum: `distance`")

    def init(tasks, key):
        if tasks.number < max(byzantine + 3, selected):
            raise ValueError(
                f"krum with byzantine={byzantine} and selected={selected} needs at least "
                f"{max(byzantine + 3, selected)} tasks, but there are {tasks.number}: "
                f"{', '.join(tasks.names)}."
            )
        return ()

    def update(losses, state, present, steps, gramian):
        number = jnp.sum(present)
        largest = jnp.max(jnp.diagonal(gramian))
        gramian = gramian / jnp.where(largest > 0, largest, 1)  # sums of squares would overflow
        squares = jnp.diagonal(gramian)
        distances = jnp.maximum(squares[:, None] + squares[None, :] - 2 * gramian, 0)
        if distance == "plain":
            distances = jnp.sqrt(distances)
        others = present[None, :] & ~jnp.eye(gramian.shape[0], dtype=bool)
        nearest = jnp.sort(jnp.where(others, distances, jnp.inf), axis=1)
        neighbours = jnp.clip(number - byzantine - 2, jnp.minimum(1, number - 1))
        counted = jnp.arange(gramian.shape[0]) < neighbours
        scores = jnp.sum(nearest, axis=1, where=counted[None, :])
        ranks = jnp.argsort(jnp.argsort(jnp.where(present, scores, jnp.inf)))
        count = jnp.clip(number, 1, selected)
        return (ranks < count).astype(gramian.dtype) / count.astype(gramian.dtype), state

    return vector_weighting(update, init, needs=Signal.GRAMIAN, reads_losses=False)
