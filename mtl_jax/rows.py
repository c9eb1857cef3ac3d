"""Constructor of aggregators: what methods on the rows of task gradients share, held once."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtl_jax.arguments import check_flag, check_function, leaf_type
from mtl_jax.base import Aggregator
from mtl_jax.checks import read_key
from mtl_jax.pytree import PyTree
from mtl_jax.state import (
    WeightingState,
    all_finite,
    check_like,
    check_state,
    initial_state,
    keep_absent,
    next_state,
    read_result,
    shapes_of_state,
    tree_where,
)
from mtl_jax.tasks import (
    Losses,
    Tasks,
    arithmetic_dtype,
    at_least_float32,
    leaf_name,
    read_mask,
    read_tasks,
    stack_tasks,
)

RowsInit = Callable[[PyTree, Tasks, Array | None], PyTree]
RowsUpdate = Callable[..., tuple[PyTree, PyTree]]


def rows_aggregator(
    update: RowsUpdate,
    init: RowsInit = lambda params, tasks, key: (),
    *,
    reads_losses: bool = False,
) -> Aggregator:
    """Make an :class:`mtl_jax.Aggregator` of functions written on the rows of task gradients.

    The functions see rows of at least float32, cut from the gradient, 0 for absent tasks.

    Args:
      update: ``update(rows, state, present, steps) -> (gradient, state)``. ``rows`` is a pytree
        like the parameters, each leaf with the tasks as its leading axis; ``present`` and
        ``steps`` as in :func:`mtl_jax.vector_weighting`. With ``reads_losses`` it is called as
        ``update(rows, state, present, steps, losses)``, ``losses: float[K]`` being 1 for absent
        tasks.
      init: ``init(params, tasks, key) -> state``, for parameters (arrays or
        ``jax.ShapeDtypeStruct``). In the state, arrays of one or more dimensions have the tasks as
        their leading axis: the rows of absent tasks are kept as they were.
      reads_losses: whether ``update`` reads the losses.

    Returns:
      The aggregator.

    Raises:
      ValueError: in ``update``, if the function of that name returns something unlike the
        parameters, or a state unlike that of ``init``.
      TypeError: if a function is none; in ``init``, if an array of the state has not the tasks as
        its leading axis; in ``update``, if the function of that name does not return a pair.

    Example:
      The mean of the present tasks, every gradient cut at 1 in each coordinate:

      >>> import jax
      >>> import jax.numpy as jnp
      >>> import mtl_jax
      >>> def update(rows, state, present, steps):
      ...     number = jnp.maximum(jnp.sum(present, dtype=jnp.float32), 1)
      ...     mean = lambda leaf: jnp.sum(jnp.clip(leaf, -1, 1), axis=0) / number
      ...     return jax.tree.map(mean, rows), state
      >>> aggregator = mtl_jax.rows_aggregator(update)
      >>> task_gradients = jnp.array([[0.5, -9.0], [1.5, 1.0]])
      >>> state = aggregator.init(task_gradients[0], losses=(0.0, 0.0))
      >>> gradient, _ = aggregator.update(task_gradients, state)
      >>> gradient.tolist()
      [0.75, 0.0]
    """
    for name, function in (("update", update), ("init", init)):
        check_function(function, f"rows_aggregator: `{name}`")
    check_flag(reads_losses, "rows_aggregator: `reads_losses`")

    @functools.cache
    def expected(structure: Any, types: tuple[Any, ...], tasks: Tasks, keyed: bool) -> Any:
        params = [jax.ShapeDtypeStruct(*each) for each in types]
        params = jax.tree.unflatten(structure, params)
        return shapes_of_state(functools.partial(init, params, tasks), tasks, keyed)

    def init_fn(params: PyTree, losses: Losses, *, key: Array | None = None) -> WeightingState:
        tasks = read_tasks(losses)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            _check_real(leaf, f"The parameter {leaf_name(path)!r}", abstract=True)
        return initial_state(init(params, tasks, read_key(key)), tasks)

    def update_fn(
        task_gradients: PyTree,
        state: WeightingState,
        *,
        losses: Losses | None = None,
        mask: PyTree | None = None,
    ) -> tuple[PyTree, WeightingState]:
        named = losses is not None or mask is not None
        if losses is None:
            if reads_losses:
                raise ValueError("This aggregator reads the losses: pass `losses` to `update`.")
            number = leading_axis(task_gradients)
            losses = (0.0,) * number if mask is None else jax.tree.map(lambda _: 0.0, mask)
        tasks = read_tasks(losses)
        if leading_axis(task_gradients) != tasks.number:
            raise ValueError(
                f"There are gradients of {leading_axis(task_gradients)} tasks, but {tasks.number} "
                f"losses: {', '.join(tasks.names)}."
            )
        leaves = jax.tree_util.tree_leaves_with_path(task_gradients)
        types = [_check_real(leaf, f"The gradient {leaf_name(path)!r}") for path, leaf in leaves]
        one = tuple((shape[1:], dtype) for shape, dtype in types)
        structure = jax.tree.structure(task_gradients)
        # Without their names, parameters by task cannot be read, nor the state they make be known.
        known = functools.partial(expected, structure, one, tasks) if named else None
        check_state(state, tasks, known)
        task_gradients, state = jax.tree.map(jnp.asarray, (task_gradients, state))
        present = read_mask(mask, tasks)
        rows = jax.tree.map(lambda leaf: _read_row(leaf, present), task_gradients)
        vector = jax.lax.stop_gradient(stack_tasks(losses, tasks))
        vector = jnp.where(present, vector, 1)
        extra = (vector,) if reads_losses else ()
        output = update(rows, state.inner, present, state.steps, *extra)
        gradient, inner = read_result(output, state.inner, "gradient")
        like = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*each) for each in one])
        hint = "It must be like the parameters."
        check_like(gradient, like, "The gradient that `update` returned", hint)
        gradient, inner = jax.lax.stop_gradient((gradient, inner))
        inner = keep_absent(inner, state.inner, present)
        valid = all_finite((rows, vector, gradient, inner))
        gradient = jax.tree.map(
            lambda leaf, row: jnp.where(valid, leaf, jnp.nan).astype(row.dtype),
            gradient,
            task_gradients,
        )
        return gradient, tree_where(valid, next_state(inner, state, present), state)

    return Aggregator(init_fn, update_fn)


def zero_rows(params: PyTree, tasks: Tasks) -> PyTree:
    """Zeros for every task: the parameters with a leading axis, in at least float32."""

    def zeros(leaf: Array) -> Array:
        # From the leaf, to be spread over devices as it is.
        one = jnp.zeros_like(leaf, at_least_float32(jnp.result_type(leaf)))
        return jnp.broadcast_to(one[None], (tasks.number, *jnp.shape(leaf)))

    return jax.tree.map(zeros, params)


def for_each_task(values: Array, leaf: Array) -> Array:
    """A vector over the tasks, shaped to be broadcast against rows: ``[K, 1, ..., 1]``."""
    return jnp.reshape(values, (-1,) + (1,) * (leaf.ndim - 1))


def weighted_sum(weights: Float[Array, "tasks"], rows: PyTree) -> PyTree:
    r"""The sum :math:`\sum_k w_k g_k` of the rows, in the rows' dtypes.

    A contraction, computed in at least float32: a broadcast product and its sum was 200 times
    slower.
    """

    def contract(leaf: Array) -> Array:
        dtype = arithmetic_dtype(leaf.dtype, weights.dtype)
        total = jnp.tensordot(
            weights.astype(dtype), leaf.astype(dtype), 1, precision=jax.lax.Precision.HIGHEST
        )
        return total.astype(leaf.dtype)

    return jax.tree.map(contract, rows)


def squared_norms(rows: PyTree) -> Float[Array, "tasks"]:
    """The squared norm of every task's gradient."""
    by_leaf = [
        jnp.sum(jnp.square(leaf), axis=tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(rows)
    ]
    return functools.reduce(jnp.add, by_leaf)


def leading_axis(task_gradients: PyTree) -> int:
    """The number of tasks, from the leading axes; an error if they differ."""
    shapes = {
        leaf_name(path): leaf_type(leaf, f"The gradient {leaf_name(path)!r}")[0]
        for path, leaf in jax.tree_util.tree_leaves_with_path(task_gradients)
    }
    sizes = {shape[:1] for shape in shapes.values()}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            "Task gradients need the tasks as the leading axis of every leaf, the same number in "
            f"each, got the shapes {shapes}."
        )
    return sizes.pop()[0]


def _check_real(leaf: Any, what: str, *, abstract: bool = False) -> tuple[tuple[int, ...], Any]:
    """The shape and dtype of a parameter or its gradients; an error for what is not real."""
    shape, dtype = leaf_type(leaf, what, abstract=abstract)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{what} has dtype {dtype}; an aggregator combines real floating-point numbers."
        )
    return shape, dtype


def _read_row(leaf: Array, present: Bool[Array, "tasks"]) -> Array:
    leaf = jax.lax.stop_gradient(jnp.asarray(leaf))
    leaf = leaf.astype(at_least_float32(leaf.dtype))
    return jnp.where(for_each_task(present, leaf), leaf, 0)
