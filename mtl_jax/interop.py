"""Gramian weightings for those who already hold task gradients."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mtl_jax.arguments import leaf_type
from mtl_jax.base import Weighting
from mtl_jax.checks import check_weighting, read_key
from mtl_jax.jacobian import gramian_of
from mtl_jax.pytree import PyTree
from mtl_jax.rows import leading_axis, weighted_sum
from mtl_jax.tasks import Losses, at_least_float32, leaf_name, read_tasks, stack_tasks

if TYPE_CHECKING:
    import optax.experimental


def as_aggregator(
    weighting: Weighting, num_tasks: int, *, key: Array | None = None
) -> "optax.experimental.aggregating.Aggregator":
    r"""A weighting as an ``optax.experimental.aggregating.Aggregator`` of stacked task gradients.

    .. math:: d = \sum_k w_k g_k, \qquad w = \text{weighting}(G), \qquad
              G_{ij} = \langle g_i, g_j \rangle

    Args:
      weighting: the weighting, one that reads the Gramian.
      num_tasks: K.
      key: a ``jax.random.key`` for a weighting that draws random numbers.

    Returns:
      The aggregator. ``init(params)`` is the weighting's state; ``update(task_gradients, state,
      params=None, *, losses=None, mask=None)`` combines gradients whose leaves have the tasks as
      their leading axis. ``losses``, a pytree of K scalars, need only be given for a weighting
      that reads them besides the Gramian (:func:`mtl_jax.gradnorm`, and :func:`mtl_jax.mgda`
      normalised by the losses): they are 1 by default. If something is not finite, the state is
      returned as it was and the update is NaN.

    Raises:
      ValueError: if ``num_tasks`` is not a positive integer; in ``update``, if there are gradients
        of another number of tasks.
      TypeError: if ``weighting`` is not a :class:`mtl_jax.Weighting`, or ``key`` not a key; in
        ``init`` and ``update``, if a parameter or its gradients are not floating-point.
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
    if not isinstance(num_tasks, int | np.integer) or isinstance(num_tasks, bool) or num_tasks < 1:
        raise ValueError(
            f"as_aggregator: `num_tasks` must be at least 1, an integer, got {num_tasks!r}."
        )
    key = read_key(key)

    def init(params: PyTree) -> PyTree:
        widest = at_least_float32(*_real_dtypes(params, "The parameter", abstract=True))
        return weighting.init((jax.ShapeDtypeStruct((), widest),) * num_tasks, key=key)

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
        if leading_axis(updates) != num_tasks:
            raise ValueError(
                f"as_aggregator was made for {num_tasks} tasks, but there are gradients of "
                f"{leading_axis(updates)}."
            )
        _real_dtypes(updates, "The gradient")
        updates = jax.tree.map(jnp.asarray, updates)
        gramian = gramian_of(jax.tree.leaves(updates))
        if losses is None:
            names = (True,) * num_tasks if mask is None else mask
            losses = jax.tree.map(lambda _: jnp.ones((), gramian.dtype), names)
        weights, state = weighting.update(losses, state, mask=mask, gramian=gramian)
        return weighted_sum(stack_tasks(weights, read_tasks(losses)), updates), state

    return aggregating.Aggregator(init, update)


def _real_dtypes(tree: PyTree, what: str, *, abstract: bool = False) -> list[Any]:
    """The dtypes of the leaves, for complex ones those of their parts; an error for others."""
    dtypes = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = f"{what} {leaf_name(path)!r}"
        _, dtype = leaf_type(leaf, name, abstract=abstract)
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(f"{name} has dtype {dtype}; it must be floating-point.")
        dtypes.append(jnp.finfo(dtype).dtype)
    return dtypes
