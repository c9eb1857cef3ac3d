"""Conflict-free momenta (M-ConFIG)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from mtl_jax._base import Aggregator
from mtl_jax._checks import read_number
from mtl_jax._jacobian import gramian_of
from mtl_jax._lift import for_each_task, rows_aggregator, weighted_sum, zero_rows
from mtl_jax._typing import PyTree
from mtl_jax.gramian_weightings.conflict_free import conflict_free_weights
from mtl_jax.loss_weightings._statistics import ema_rate


class ConflictFreeMomentumState(NamedTuple):
    """State of the method.

    Attributes:
      momenta: the averages of the gradients, like the parameters with the tasks as leading axis.
      total: the steps, whoever was present.
    """

    momenta: PyTree
    total: Int32[Array, ""]


def conflict_free_momentum(decay: float = 0.9) -> Aggregator:
    r"""M-ConFIG: one task's gradient a step, and the conflict-free direction of their averages.

    The tasks take turns. With the average of each task's gradients over its own steps,

    .. math::

       m_k = \frac{1 - \beta}{1 - \beta^{t_k}} \sum_{s \le t_k} \beta^{t_k - s}\, g_k(s), \qquad
       G_t = \mathrm{ConFIG}(m_1, \dots, m_K), \qquad
       g_t = G_{t-1} + \frac{1 - \beta^t}{1 - \beta}\, (G_t - G_{t-1}),

    ConFIG being :func:`mtl_jax.conflict_free`. :math:`g_t` is the paper's pseudo-gradient: the one
    whose own average is :math:`G_t`. So the optimizer is to be ``optax.adam(learning_rate,
    b1=decay)``: its first moment then is :math:`G_t`, its second that of the :math:`g_t`, and its
    step the paper's. ``optax.sgd`` takes the :math:`g_t` as they are.

    A step computes one forward and one backward pass, as plain training, whatever the number of
    tasks: :func:`mtl_jax.value_and_grad` takes the gradient of the present task that has had the
    fewest steps. The K averages are held, and read several times a step: with many tasks and small
    batches that takes longer than the passes. ``update`` itself takes the gradients of all tasks
    that ``mask`` has present. Parameters outside of ``shared`` have the gradient of the task whose
    turn it is.

    A task has a part in the direction from its first turn on, also in steps from which it is
    absent: by its average. (The authors' code does not move before all tasks have had a turn.)
    Where the averages leave no conflict-free direction, :math:`G_t` is 0. The losses are not read:
    they may be 0 or negative.

    Args:
      decay: :math:`\beta`, in [0, 1). The default is that of the authors' code, and of Adam.

    Returns:
      The aggregator.

    Raises:
      ValueError: if ``decay`` is not in [0, 1).
      TypeError: if it is not a number.

    References:
      Liu et al., `ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks
      <https://arxiv.org/abs/2408.11104>`_, ICLR 2025

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import mtl_jax
      >>> def losses_fn(params):
      ...     return {"a": jnp.sum((params - 1) ** 2), "b": jnp.sum(jnp.abs(params + 1))}
      >>> gradient = mtl_jax.value_and_grad(losses_fn, mtl_jax.conflict_free_momentum())
      >>> step = mtl_jax.make_train_step(gradient, optax.adam(0.1, b1=0.9))
      >>> state = step.init(jnp.zeros(2))
      >>> for _ in range(4):
      ...     state, value = step(state)
      ...     print({task: bool(turn) for task, turn in value.present.items()})
      {'a': True, 'b': False}
      {'a': False, 'b': True}
      {'a': True, 'b': False}
      {'a': False, 'b': True}
    """
    decay = read_number(decay, "conflict_free_momentum: `decay`", "[0, 1)")

    def init(params, tasks, key):
        return ConflictFreeMomentumState(zero_rows(params, tasks), jnp.zeros((), jnp.int32))

    def update(rows, state, present, steps):
        someone = jnp.any(present)

        def average(old, row):
            rate = jnp.where(present, ema_rate(decay, steps, row.dtype), 0)
            return old + for_each_task(rate, row) * (row - old)

        momenta = jax.tree.map(average, state.momenta, rows)
        before, after = _direction(state.momenta), _direction(momenta)

        def pseudo_gradient(old, new):
            (rate,) = ema_rate(decay, state.total[None], new.dtype)
            return jnp.where(someone, old + (new - old) / rate, 0)

        gradient = jax.tree.map(pseudo_gradient, before, after)
        return gradient, ConflictFreeMomentumState(momenta, state.total + someone.astype(jnp.int32))

    return rows_aggregator(update, init, one_at_a_time=True)


def _direction(rows: PyTree) -> PyTree:
    """The conflict-free direction; a row of 0 has no part in it."""
    gramian = gramian_of(jax.tree.leaves(rows))
    weights = conflict_free_weights(gramian, jnp.ones_like(gramian[0]))
    return weighted_sum(jnp.where(jnp.all(jnp.isfinite(gramian)), weights, jnp.nan), rows)
