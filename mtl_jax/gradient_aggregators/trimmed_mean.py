"""Coordinate-wise trimmed mean."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtl_jax._base import Aggregator
from mtl_jax._checks import read_integer
from mtl_jax._lift import for_each_task, rows_aggregator, weighted_sum


def trimmed_mean(trim: int) -> Aggregator:
    r"""Trimmed mean: in every coordinate the largest and the smallest gradients are left out.

    .. math:: g_i = \frac{1}{K - 2b} \sum_{k = b + 1}^{K - b} g_{(k), i},

    where :math:`g_{(1), i} \le \dots \le g_{(K), i}` are the tasks' gradients in coordinate i,
    sorted, and b is ``trim``. A mean: its steps are about K times smaller than those of a sum.

    K counts the present tasks only. With 2 b of them or fewer, as many are left out as leave at
    least one: what remains is the median. The losses are not read: they may be 0 or negative.

    Args:
      trim: b, how many to leave out on either side, 0 (the plain mean) or more; in the paper,
        :math:`\beta K`. At most b outliers of either sign, however large, do no harm.

    Returns:
      The aggregator.

    Raises:
      ValueError: if ``trim`` is not an integer of at least 0; in ``init``, if there are 2 ``trim``
        tasks or fewer.

    References:
      Yin et al., `Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates
      <https://arxiv.org/abs/1803.01498>`_, ICML 2018

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_jax
      >>> aggregator = mtl_jax.trimmed_mean(1)
      >>> task_gradients = jnp.array([[1.0, -9.0], [2.0, 1.0], [3.0, 2.0], [90.0, 4.0]])
      >>> state = aggregator.init(task_gradients[0], losses=(0.0,) * 4)
      >>> gradient, state = aggregator.update(task_gradients, state)
      >>> gradient.tolist()
      [2.5, 1.5]
    """
    trim = read_integer(trim, "trimmed_mean: `trim`", 0)

    def init(params, tasks, key):
        if 2 * trim >= tasks.number:
            raise ValueError(
                f"trimmed_mean: leaving out {trim} gradients on either side leaves none of "
                f"{tasks.number} tasks; `trim` must be at most {(tasks.number - 1) // 2}."
            )
        return ()

    def update(rows, state, present, steps):
        number = jnp.sum(present)
        cut = jnp.minimum(trim, jnp.maximum(number - 1, 0) // 2)
        rank = jnp.arange(present.shape[0])
        kept = (rank >= cut) & (rank < number - cut)

        def mean(leaf):
            share = kept.astype(leaf.dtype) / jnp.maximum(number - 2 * cut, 1).astype(leaf.dtype)
            # Absent tasks are sorted last, where no rank is kept.
            last = jnp.where(for_each_task(present, leaf), leaf, jnp.finfo(leaf.dtype).max)
            return weighted_sum(share, _sorted(last))

        return jax.tree.map(mean, rows), state

    return rows_aggregator(update, init)


def _sorted(leaf: Float[Array, "tasks *shape"]) -> Float[Array, "tasks *shape"]:
    """Each coordinate's values in ascending order, by odd-even transposition.

    Every round compares neighbours in all coordinates at once. XLA's own sort takes the coordinates
    one by one: on CPU it was 5 times slower for 20 tasks, 20 times for 3.
    """
    number = leaf.shape[0]
    place = for_each_task(jnp.arange(number), leaf)

    def compare_neighbours(turn, leaf):
        lower = ((place - turn) % 2 == 0) & (place < number - 1)
        upper = ((place - turn) % 2 == 1) & (place > 0)
        least = jnp.minimum(leaf, jnp.roll(leaf, -1, axis=0))
        greatest = jnp.maximum(leaf, jnp.roll(leaf, 1, axis=0))
        return jnp.where(lower, least, jnp.where(upper, greatest, leaf))

    return jax.lax.fori_loop(0, number, compare_neighbours, leaf)
