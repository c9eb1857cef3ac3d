"""Gramian weightings for those who already hold task gradients."""

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mtl_jax._base import Signal, Weighting, check_weighting
from mtl_jax._checks import leaf_types, read_integer, read_key
from mtl_jax._jacobian import gramian_of, nonzero_rows
from mtl_jax._lift import all_finite, for_each_task, leading_axis, tree_where, weighted_sum
from mtl_jax._tasks import at_least_float32, read_mask, read_tasks
from mtl_jax._typing import Losses, Mask, PyTree, Vector

if TYPE_CHECKING:
    import optax.experimental


def as_aggregator(
    weighting: Weighting,
    num_tasks: int,
    *,
    leave_out_zero: bool = True,
    key: Array | None = None,
) -> "optax.experimental.aggregating.Aggregator":
    r"""A weighting as an ``optax.experimental.aggregating.Aggregator`` of stacked task gradients.

    .. math:: d = \sum_k w_k g_k, \qquad w = \text{weighting}(G), \qquad
              G_{ij} = \langle g_i, g_j \rangle

    Args:
      weighting: the weighting, one that reads the losses, the Gramian or the task gradients.
      num_tasks: K.
      leave_out_zero: whether a task whose gradient is exactly zero, or whose loss is, for a
        weighting that needs positive losses, is left out of the decision, as in
        :func:`mtl_jax.value_and_grad`.
      key: a ``jax.random.key`` for a weighting that draws random numbers.

    Returns:
      The aggregator. ``init(params)`` is the weighting's state; ``update(task_gradients, state,
      params=None, *, losses=None, mask=None)`` combines gradients whose leaves have the tasks as
      their leading axis. ``losses``, a pytree of K losses, must be given for a weighting that
      reads them: most of those that read no gradients, :func:`mtl_jax.gradnorm`,
      :func:`mtl_jax.mgda` and :func:`mtl_jax.norm_balance` where a setting asks for them, and
      your own, unless made with ``reads_losses=False``. If something is not finite, the state is
      returned as it was and the update is NaN. Gradients without arrays are returned as they are.

    Raises:
      ValueError: if ``num_tasks`` is not a positive integer; in ``update``, if there are gradients
        of another number of tasks.
      TypeError: if ``weighting`` is not a :class:`mtl_jax.Weighting`, or reads a second batch or
        the losses after the step (:func:`mtl_jax.famo`), or ``key`` is not a key; in ``init`` and
        ``update``, if a parameter or its gradients are not floating-point; in ``update``, if the
        weighting needs ``losses`` and there are none.
      ImportError: with an optax older than 0.2.7.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import mtl_jax
      >>> aggregator = mtl_jax.as_aggregator(mtl_jax.upgrad(), num_tasks=2)
      >>> task_gradients = {"w": jnp.array([[1.0, 1.0], [-1.0, 0.0]])}
      >>> state = aggregator.init({"w": jnp.zeros(2)})
      >>> update, state = aggregator.update(task_gradients, state)
      >>> print(jnp.round(update["w"], 4))
      [-0.25  0.75]
    """
    from optax.experimental import aggregating

    check_weighting(weighting)
    method = weighting.method
    if method.needs is Signal.SECOND_BATCH:
        raise TypeError(
            "as_aggregator: the weighting reads a second batch, which optax does not hand on. "
            "mtl_jax.value_and_grad takes it: `second=`."
        )
    if weighting.observe is not None:
        raise TypeError(
            "as_aggregator: the weighting reads the losses after the step, which optax does not "
            "hand on. mtl_jax.make_train_step does."
        )
    read_integer(num_tasks, "as_aggregator: `num_tasks`")
    key = read_key(key)

    def init(params: PyTree) -> PyTree:
        widest = at_least_float32(*_real_dtypes(params, "The parameter", abstract=True))
        losses = (jax.ShapeDtypeStruct((), widest),) * num_tasks
        return weighting.init(losses, key=key, params=params)

    @functools.partial(jax.jit, inline=True)
    def combined(
        updates: PyTree, state: PyTree, losses: Vector | None, mask: Mask | None
    ) -> tuple[PyTree, PyTree]:
        rows = jax.tree.leaves(updates)
        gramian = gramian_of(rows)
        losses = jnp.ones((num_tasks,), gramian.dtype) if losses is None else losses
        present = jnp.ones((num_tasks,), bool) if mask is None else mask
        if leave_out_zero:
            present = present & nonzero_rows(rows)
            present = present & (losses != 0) if method.positive_losses else present
        weights, new_state = weighting.update(
            tuple(jnp.unstack(losses)),
            state,
            mask=tuple(jnp.unstack(present)),
            gramian=gramian,
            task_gradients=updates,
        )
        if mask is not None:  # what is not finite in an absent task's gradient is not read
            updates = jax.tree.map(
                lambda leaf: jnp.where(for_each_task(present, leaf), leaf, 0), updates
            )
        update = weighted_sum(jnp.stack(weights), updates)
        valid = all_finite(update)
        update = jax.tree.map(lambda leaf: jnp.where(valid, leaf, jnp.nan), update)
        return update, tree_where(valid, new_state, state)

    def update(
        updates: PyTree,
        state: PyTree,
        params: PyTree = None,
        *,
        losses: Losses | None = None,
        mask: PyTree | None = None,
        **extra: object,
    ) -> tuple[PyTree, PyTree]:
        del params, extra
        if not jax.tree.leaves(updates):  # a part of `optax.partition` that no parameter is in
            return updates, state
        if leading_axis(updates) != num_tasks:
            raise ValueError(
                f"as_aggregator was made for {num_tasks} tasks, but there are gradients of "
                f"{leading_axis(updates)}."
            )
        if losses is None and method.reads_losses:
            raise TypeError(
                "as_aggregator: the weighting reads the losses; hand them to `update` as `losses=`."
            )
        _real_dtypes(updates, "The gradient")
        leaf_types(state, "The state's leaf")
        return combined(updates, state, *_read_by_task(losses, mask, num_tasks))

    return aggregating.Aggregator(init, update)


def _read_by_task(
    losses: Losses | None, mask: PyTree | None, number: int
) -> tuple[Vector | None, Mask | None]:
    """The losses and the mask as vectors, where they are given."""
    if losses is None and mask is None:
        return None, None
    leaf_types(mask, "In `mask`, the leaf")
    like = jax.tree.map(lambda leaf: np.ones(np.shape(leaf), np.float32), mask)
    tasks = read_tasks(like if losses is None else losses)
    if tasks.number != number:
        what = "mask" if losses is None else "losses"
        raise ValueError(
            f"as_aggregator was made for {number} tasks, but `{what}` has {tasks.number}."
        )
    vector = None if losses is None else tasks.stack(losses)
    return vector, None if mask is None else read_mask(mask, tasks)


def _real_dtypes(tree: PyTree, what: str, *, abstract: bool = False) -> list[Any]:
    """The dtypes of the leaves, for complex ones those of their parts; an error for others."""
    types = leaf_types(tree, what, jnp.inexact, "; it must be floating-point.", abstract=abstract)
    return [jnp.finfo(dtype).dtype for _, dtype in types]
