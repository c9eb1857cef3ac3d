"""Gradient sign dropout."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from mtl_jax._base import Aggregator
from mtl_jax._checks import check_numbers, require_key
from mtl_jax._lift import rows_aggregator
from mtl_jax._typing import PyTree


class GradDropState(NamedTuple):
    """State of the method.

    Attributes:
      leak: how much of each task's gradient passes whatever its sign.
      key: the key from which the next signs are drawn.
    """

    leak: Float[Array, "tasks"]
    key: Key[Array, ""]


def graddrop(leak: PyTree = 0.0) -> Aggregator:
    r"""GradDrop: in every coordinate one sign is drawn, and the gradients of the other are dropped.

    .. math:: g = \sum_k \big(\ell_k + (1 - \ell_k) M_k\big) \odot g_k, \qquad
              M_k = \begin{cases} \mathbf 1[g_k > 0] & \text{where } U < P \\
                                  \mathbf 1[g_k < 0] & \text{elsewhere} \end{cases}, \qquad
              P = \frac12 \Big(1 + \frac{\sum_k g_k}{\sum_k |g_k|}\Big),

    with :math:`U` drawn from the uniform distribution on [0, 1) for every coordinate. Where all
    tasks agree on a sign nothing is dropped; where all gradients are 0, so is the result. It is a
    sum over the tasks, as in the paper, and does not depend on the gradients' scale.

    The paper drops signs at a layer's output, after multiplying by the sign of the input; here, as
    in TorchJD, it is the gradient of the parameters that is combined. The losses are not read: they
    may be 0 or negative.

    Args:
      leak: :math:`\ell`, in [0, 1]: one number, or a pytree like the losses. 0, the default, is the
        method without leak; at 1 a task's gradient passes whole.

    Returns:
      The aggregator. Its ``init`` needs ``key``.

    Raises:
      ValueError: if ``leak`` is not in [0, 1]; in ``init``, if the key is missing, or ``leak`` has
        not the structure of the losses.
      TypeError: if ``leak`` is not a number or numbers; in ``init``, if ``key`` is not a key.

    References:
      Chen et al., `Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout
      <https://arxiv.org/abs/2010.06808>`_, NeurIPS 2020

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import mtl_jax
      >>> aggregator = mtl_jax.graddrop()
      >>> task_gradients = jnp.array([[1.0, 3.0, -1.0], [2.0, -1.0, -2.0]])
      >>> state = aggregator.init(task_gradients[0], (0.0, 0.0), key=jax.random.key(0))
      >>> gradient, state = aggregator.update(task_gradients, state)
      >>> gradient.tolist()  # the tasks disagree only on the second: 3 is drawn, or -1
      [3.0, 3.0, -3.0]
    """
    check_numbers(leak, "graddrop: `leak`", "[0, 1]")

    def init(params, tasks, key):
        return GradDropState(
            leak=tasks.vector(leak, "graddrop: `leak`"), key=require_key(key, "graddrop")
        )

    def update(rows, state, present, steps):
        next_key, key = jax.random.split(state.key)
        leaves, structure = jax.tree.flatten(rows)
        combined = [
            drop_signs(leaf, state.leak, jax.random.uniform(key, leaf.shape[1:], leaf.dtype))
            for leaf, key in zip(leaves, jax.random.split(key, len(leaves)), strict=True)
        ]
        return jax.tree.unflatten(structure, combined), GradDropState(state.leak, next_key)

    return rows_aggregator(update, init)


def drop_signs(
    rows: Float[Array, "tasks ..."], leak: Float[Array, "tasks"], uniform: Float[Array, "..."]
) -> Float[Array, "..."]:
    """The combination of the rows for given draws from the uniform distribution on [0, 1).

    The tasks are taken one by one: on CPU a reduction over the leading axis is 10 times slower.
    """

    def add_sizes(sums, row):
        positive, size = sums
        return (positive + jnp.maximum(row, 0), size + jnp.abs(row)), None

    def add_kept(total, task):
        row, leak = task
        return total + jnp.where((row > 0) == keep_positive, row, leak * row), None

    zeros = jnp.zeros_like(rows[0])
    (positive, size), _ = jax.lax.scan(add_sizes, (zeros, zeros), rows)
    # P as the positive part's share: exactly 1 or 0 where all tasks agree, so nothing is dropped.
    probability = jnp.where(size > 0, positive / jnp.where(size > 0, size, 1), 0.5)
    keep_positive = uniform < probability
    return jax.lax.scan(add_kept, zeros, (rows, leak.astype(rows.dtype)))[0]
