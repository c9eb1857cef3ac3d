"""From the losses of several tasks to one gradient: the weights are the cotangent."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

from mtl_jax.arguments import check_flag, check_function
from mtl_jax.base import Aggregator, Weighting
from mtl_jax.checks import check_aggregator, check_weighting
from mtl_jax.jacobian import (
    Partition,
    Rows,
    RowsMode,
    Shared,
    choose_rows,
    combine,
    each_row,
    gramian_of,
    linearize,
    low_memory_gramian,
    stacked,
    unit_cotangents,
)
from mtl_jax.pytree import PyTree
from mtl_jax.sharding import AxisName, check_global, check_whole, read_axis_name
from mtl_jax.state import tree_where
from mtl_jax.tasks import Losses, Weights, read_mask, read_tasks, stack_tasks, unstack_tasks
from mtl_jax.weighing import (
    GradientFn,
    MultiTaskValue,
    check_params,
    cotangent,
    read_output,
    usable,
    weigh,
    with_diagnostics,
)

_WHOLE_FOR_AGGREGATORS = (
    "An aggregator needs whole gradients: replicate the parameters in shard_map, or shard them "
    "under jit."
)


def value_and_grad(
    losses_fn: Callable[..., Any],
    weighting: Weighting | Aggregator,
    *,
    has_aux: bool = False,
    shared: Shared = None,
    rows: RowsMode = "auto",
    diagnostics: bool = False,
    axis_name: AxisName = None,
) -> GradientFn:
    r"""Differentiate the weighted sum of the task losses, the weights decided on the way.

    .. math:: g = \sum_k w_k \nabla_\theta L_k(\theta), \qquad w = \text{weighting}(L(\theta), G),
              \qquad G_{ij} = \langle \nabla L_i, \nabla L_j \rangle

    The losses are one vector-valued function of the parameters, evaluated once; the weights are
    the cotangent that is pulled back through it, and no gradient flows through them. The price of
    a step is that of what the weighting reads: one forward and one backward pass for the losses;
    one forward and K backward passes for the Gramian G, or for an aggregator. Where the network
    has an encoder and heads, :func:`mtl_jax.representation_value_and_grad` has a Gramian for about
    the price of plain training.

    Args:
      losses_fn: ``losses_fn(params, *args)`` returns the losses, a pytree of scalars, or
        ``(losses, aux)`` with ``has_aux``.
      weighting: decides the weights; or an :class:`mtl_jax.Aggregator`, which combines the task
        gradients itself.
      has_aux: whether ``losses_fn`` returns auxiliary output.
      shared: the parameters whose gradients enter the Gramian, or the aggregator: a predicate on
        the path of a parameter, such as ``lambda path: path.startswith("encoder/")``, or a pytree
        of booleans like the parameters; all of them by default. The other parameters, the tasks'
        heads, get the gradient of the weighted sum of the losses, and with an aggregator that of
        the plain sum.
      rows: how the K task gradients are computed. ``"unrolled"``: one backward pass after the
        other, which XLA can see across. ``"map"``: in a loop. ``"vmap"``: all at once, with the
        memory for it. ``"low_memory"``: in a loop that holds one of them, never all, for one
        forward derivative more each; not for aggregators. ``"auto"``: on CPU ``"unrolled"`` for up
        to 5 tasks and ``"map"`` for more, and so on several devices with Auto mesh axes; on other
        backends ``"vmap"``. On CPU the gradient of a convolution is slow inside a loop, so
        ``"unrolled"`` may be better there.
      diagnostics: whether to return the :class:`mtl_jax.Diagnostics` of the task gradients; then
        the Gramian is measured whatever the weighting reads.
      axis_name: inside ``jax.shard_map``, the mesh axis along which the batch is spread, or a tuple
        of several. ``losses_fn`` must return the losses of the whole batch there: it sums over the
        devices itself, since it knows how many labels each has. Under ``jit`` alone nothing need be
        said, however the arrays are sharded.

    Returns:
      ``fn(params, state, *args, mask=None) -> (value, gradient, state)``: a
      :class:`MultiTaskValue`, the gradient (a pytree like ``params``) and the weighting's new
      state. ``mask`` tells which tasks have labels in this batch (see :class:`Weighting`). If a
      loss or the squared norm of the gradient is not finite, the state is returned as it was.

    Raises:
      ValueError: if there are no losses or no parameters, a loss is not a scalar, the tasks are not
        as many as the state's, ``mask`` has another structure than the losses, ``shared`` selects
        nothing, ``rows`` is unknown, or is ``"low_memory"`` with an aggregator; inside
        ``shard_map``, if ``axis_name`` is not an axis of it, the losses differ along that axis, an
        aggregator's parameters are spread over devices, or ``check_vma`` is False.
      TypeError: if ``losses_fn`` is not a function, ``weighting`` neither a :class:`Weighting` nor
        an aggregator, ``state`` not its state, a loss or a parameter not floating-point, a leaf of
        ``mask`` not one boolean, or ``losses_fn`` has no forward derivative and ``rows`` is
        ``"low_memory"``.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_jax
      >>> def losses_fn(params, x):
      ...     return {"a": jnp.mean((params - x) ** 2), "b": jnp.mean(jnp.abs(params + x))}
      >>> weighting = mtl_jax.equal()
      >>> gradient_fn = mtl_jax.value_and_grad(losses_fn, weighting)
      >>> params, x = jnp.array(3.0), jnp.array([1.0, 2.0])
      >>> state = weighting.init(losses_fn(params, x))
      >>> value, gradient, state = gradient_fn(params, state, x)
      >>> float(gradient)
      4.0
    """
    check_function(losses_fn, "value_and_grad: `losses_fn`")
    check_flag(has_aux, "value_and_grad: `has_aux`")
    check_flag(diagnostics, "value_and_grad: `diagnostics`")
    choose_rows(rows, number=1)
    if not isinstance(weighting, Aggregator):
        check_weighting(weighting)
    else:
        check_aggregator(weighting)
        if rows == "low_memory":
            raise ValueError("An aggregator reads all task gradients: rows='low_memory' holds one.")

    def fn(
        params: PyTree, state: PyTree, *args: Any, mask: PyTree | None = None
    ) -> tuple[MultiTaskValue, PyTree, PyTree]:
        def with_aux(params: PyTree) -> tuple[Losses, Any]:
            return read_output(losses_fn(params, *args), has_aux, "`losses_fn`")

        axes = read_axis_name(axis_name)
        check_params(params)
        parts = Partition.of(params, shared)
        if rows == "low_memory":
            losses, linear, transpose, aux = linearize(with_aux, params)
        else:
            losses, transpose, aux = jax.vjp(with_aux, params, has_aux=True)
            linear = None
        check_global(losses, params, axes)
        tasks = read_tasks(losses)

        def pull_back(weights: Weights) -> PyTree:
            (gradient,) = transpose(cotangent(weights, losses))
            return gradient

        def gradient_of(unit: list[Array]) -> PyTree:
            (gradient,) = transpose(jax.tree.unflatten(tasks.structure, unit))
            return gradient

        def with_rest(together: list[Array], weights: Weights) -> PyTree:
            return parts.join(together, parts.rest(pull_back(weights)) if parts.has_rest else [])

        def task_rows() -> Rows:
            units, way = unit_cotangents(losses), choose_rows(rows, tasks.number, params)
            return each_row(lambda unit: parts.shared(gradient_of(unit)), units, way)

        if isinstance(weighting, Aggregator):
            gradients = stacked(task_rows())
            check_whole(gradients, losses, "A parameter", _WHOLE_FOR_AGGREGATORS)
            together, new_state = weighting.update(
                parts.join(gradients, None), state, losses=losses, mask=mask
            )
            present = read_mask(mask, tasks).astype(tasks.dtype)
            gradient = with_rest(parts.shared(together), unstack_tasks(present, tasks))
            new_state = tree_where(usable(gradient, (), losses), new_state, state)
            value = MultiTaskValue(losses, None, aux)
            if diagnostics:
                value = with_diagnostics(value._replace(gramian=gramian_of(gradients)), mask)
            return value, gradient, new_state

        def measure() -> tuple[Array, Any]:
            if linear is not None:

                def shared_alone(unit: list[Array]) -> PyTree:
                    return parts.without_rest(gradient_of(unit))

                return low_memory_gramian(linear, shared_alone, losses), None
            gradients = task_rows()
            return gramian_of(gradients, axes), gradients

        def from_rows(weights: Weights, gradients: Any) -> PyTree:
            if gradients is None:
                return pull_back(weights)
            return with_rest(combine(stack_tasks(weights, tasks), gradients), weights)

        return weigh(
            weighting,
            losses,
            aux,
            state,
            mask,
            pull_back=pull_back,
            measure=measure,
            combine=from_rows,
            diagnose=diagnostics,
        )

    return fn
