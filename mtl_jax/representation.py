"""The Gramian at a representation, for about the price of plain training."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtl_jax.arguments import check_flag, check_function, check_option
from mtl_jax.base import Weighting
from mtl_jax.checks import check_weighting
from mtl_jax.heads import Heads, check_representation, check_tasks, read_names
from mtl_jax.jacobian import (
    Partition,
    RowsMode,
    Shared,
    choose_rows,
    combine,
    each_row,
    gramian_between,
    gramian_of,
    linearize,
    stacked,
    sum_of,
)
from mtl_jax.pytree import PyTree
from mtl_jax.sharding import AxisName, check_global, read_axis_name
from mtl_jax.tasks import (
    Losses,
    Weights,
    read_mask,
    read_tasks,
    stack_tasks,
    unstack_tasks,
)
from mtl_jax.weighing import (
    GradientFn,
    MultiTaskValue,
    check_params,
    cotangent,
    read_output,
    split_aux,
    weigh,
)

Encoder = Callable[..., Any]


def representation_value_and_grad(
    encoder: Encoder,
    heads: Heads,
    weighting: Weighting,
    *,
    tasks: Sequence[str],
    has_aux: bool = False,
    head_gradient: Literal["weighted", "unweighted"] = "weighted",
    gramian: Literal["representation", "encoder"] = "representation",
    shared: Shared = None,
    rows: RowsMode = "auto",
    diagnostics: bool = False,
    axis_name: AxisName = None,
) -> GradientFn:
    r"""Differentiate the weighted sum of the task losses, the Gramian taken at a representation.

    .. math:: z = \text{encoder}(\theta), \qquad L_k = \text{heads}_k(\theta, z), \qquad
              G_{ij} = \left\langle \frac{\partial L_i}{\partial z},
                       \frac{\partial L_j}{\partial z} \right\rangle, \qquad
              w = \text{weighting}(L, G).

    Each task is given *its own copy* of z. So one backward pass through the heads finds all K
    gradients at once, and one through the encoder takes their weighted sum: about the price of
    plain training, for any number of tasks. The gradient is that of :math:`\sum_k w_k L_k` by all
    parameters, exactly; but the weights are those of the Gramian at z, which is not the one over
    the parameters of the encoder. That one is taken with ``gramian="encoder"``, from the same K
    gradients at z, each pulled back through the encoder: K passes through the encoder, but still
    one through the heads.

    Args:
      encoder: ``encoder(params, *args) -> z``, a pytree of arrays; with ``has_aux`` it returns
        ``(z, aux)``.
      heads: ``heads(params, zs, *args) -> losses`` with ``zs = {task: z}`` and ``losses`` a
        dictionary with these tasks; with ``has_aux`` it returns ``(losses, aux)``. It gets the
        same whole ``params`` as the encoder. The loss of a task may depend on its own copy of z
        only: another one's gives wrong gradients without an error (:func:`check_heads` finds it).
      weighting: decides the weights. A weighting that reads the losses alone works, too.
      tasks: the tasks' names.
      has_aux: whether both functions return auxiliary output.
      head_gradient: the gradient of what only the heads use: ``"weighted"``, that of the weighted
        sum, or ``"unweighted"``, that of the plain sum, in which each head learns from its own
        task's loss as if it were alone.
      gramian: where the task gradients are compared: at the ``"representation"``, or over the
        parameters of the ``"encoder"``.
      shared: with ``gramian="encoder"``, the parameters that enter, as in
        :func:`mtl_jax.value_and_grad`; by default all, of which those that the encoder does not
        use have a gradient of 0. Naming them saves the memory of these zeros.
      rows: with ``gramian="encoder"``, how the K passes through the encoder are done, as in
        :func:`mtl_jax.value_and_grad`.
      diagnostics: whether to return the :class:`mtl_jax.Diagnostics` of the gradients at z; then
        the Gramian is measured whatever the weighting reads.
      axis_name: inside ``jax.shard_map``, the mesh axis along which the batch is spread, or a tuple
        of several: the inner products of the gradients at z are summed over it. ``heads`` must
        return the losses of the whole batch, as in :func:`mtl_jax.value_and_grad`.

    Returns:
      ``fn(params, state, *args, mask=None) -> (value, gradient, state)`` as of
      :func:`mtl_jax.value_and_grad`; ``value.aux`` is ``(encoder_aux, heads_aux)``.

    Raises:
      ValueError: if ``tasks`` is empty or names one twice, the losses are not of these tasks, a
        loss is not a scalar, z or the parameters are empty, the tasks are not as many as the
        state's, ``mask`` has another structure than the losses, an option is unknown, or
        ``shared`` selects nothing; inside ``shard_map``, if ``axis_name`` is missing or not an
        axis of it, the losses differ along that axis, or ``check_vma`` is False.
      TypeError: if ``encoder`` or ``heads`` is not a function, ``tasks`` not a sequence of strings,
        ``state`` not the weighting's state, a loss, a parameter or a part of z not floating-point,
        a leaf of ``mask`` not one boolean, or ``weighting`` not a :class:`Weighting`: an aggregator
        needs the gradients by the parameters.

    References:
      Sener and Koltun, `Multi-Task Learning as Multi-Objective Optimization
      <https://arxiv.org/abs/1810.04650>`_, NeurIPS 2018 (MGDA-UB)

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_jax
      >>> def encoder(params, x):
      ...     return jnp.tanh(x @ params["encoder"])
      >>> def heads(params, zs, x):
      ...     return {task: jnp.mean((z @ params[task]) ** 2) for task, z in zs.items()}
      >>> params = {"encoder": jnp.ones((3, 2)), "a": jnp.ones(2), "b": -jnp.ones(2)}
      >>> x = jnp.ones((5, 3))
      >>> weighting = mtl_jax.equal()
      >>> gradient_fn = mtl_jax.representation_value_and_grad(
      ...     encoder, heads, weighting, tasks=("a", "b"))
      >>> state = weighting.init({"a": 0.0, "b": 0.0})
      >>> value, gradient, state = gradient_fn(params, state, x)
      >>> gradient["encoder"].shape
      (3, 2)
    """
    check_function(encoder, "representation_value_and_grad: `encoder`")
    check_function(heads, "representation_value_and_grad: `heads`")
    check_flag(has_aux, "representation_value_and_grad: `has_aux`")
    check_flag(diagnostics, "representation_value_and_grad: `diagnostics`")
    check_weighting(weighting)
    tasks = read_names(tasks)
    check_option(head_gradient, ("weighted", "unweighted"), "`head_gradient`")
    check_option(gramian, ("representation", "encoder"), "`gramian`")
    choose_rows(rows, number=1)

    def fn(
        params: PyTree, state: PyTree, *args: Any, mask: PyTree | None = None
    ) -> tuple[MultiTaskValue, PyTree, PyTree]:
        def encode(params: PyTree) -> tuple[PyTree, Any]:
            output = encoder(params, *args)
            z, aux = split_aux(output, "`encoder`", "z") if has_aux else (output, None)
            check_representation(z)
            return z, aux

        def decode(params: PyTree, zs: dict[str, PyTree]) -> tuple[Losses, Any]:
            losses, aux = read_output(heads(params, zs, *args), has_aux, "`heads`")
            check_tasks(losses, tasks)
            return losses, aux

        axes = read_axis_name(axis_name)
        check_params(params)
        parts = Partition.of(params, shared)
        linear = None
        if gramian == "encoder" and rows == "low_memory":
            z, linear, encoder_pullback, encoder_aux = linearize(encode, params)
        else:
            z, encoder_pullback, encoder_aux = jax.vjp(encode, params, has_aux=True)
        losses, heads_pullback, heads_aux = jax.vjp(
            decode, params, dict.fromkeys(tasks, z), has_aux=True
        )
        check_global(losses, params, axes)
        names, at_z = read_tasks(losses), jax.tree.structure(z)
        ones = unstack_tasks(read_mask(mask, names).astype(names.dtype), names)

        def head_parameters(weights: Weights) -> PyTree:
            chosen = weights if head_gradient == "weighted" else ones
            return heads_pullback(cotangent(chosen, losses))[0]

        def rows_at_z(weights: Weights) -> tuple[list[Array], ...]:
            """The leaves of each task's gradient at z, weighted."""
            _, gradients = heads_pullback(cotangent(weights, losses))
            return tuple(jax.tree.leaves(gradients[task]) for task in losses)

        def through_encoder(leaves: list[Array]) -> PyTree:
            (gradient,) = encoder_pullback(jax.tree.unflatten(at_z, leaves))
            return gradient

        def with_heads(gradient: PyTree, weights: Weights) -> PyTree:
            return jax.tree.map(jnp.add, gradient, head_parameters(weights))

        def pull_back(weights: Weights) -> PyTree:
            sums = [
                sum_of(list(leaves)).astype(leaves[0].dtype)
                for leaves in zip(*rows_at_z(weights), strict=True)
            ]
            return with_heads(through_encoder(sums), weights)

        def measure() -> tuple[Array, Any]:
            found = rows_at_z(ones)
            if gramian == "representation":
                return gramian_of(found, axes), (found, None)
            if linear is not None:
                held = stacked(found)
                products = _low_memory_gramian(linear, through_encoder, parts, held, at_z, axes)
                return products, (found, None)
            way = choose_rows(rows, names.number, params)
            in_encoder = each_row(lambda row: parts.shared(through_encoder(row)), found, way)
            return gramian_of(in_encoder, axes), (found, in_encoder)

        def from_rows(weights: Weights, measured: Any) -> PyTree:
            found, in_encoder = measured
            vector = stack_tasks(weights, names)
            gradient = through_encoder(combine(vector, found))  # dropped where the rows are held
            if in_encoder is not None:
                gradient = parts.join(combine(vector, in_encoder), parts.rest(gradient))
            return with_heads(gradient, weights)

        return weigh(
            weighting,
            losses,
            (encoder_aux, heads_aux) if has_aux else None,
            state,
            mask,
            pull_back=pull_back,
            measure=measure,
            combine=from_rows,
            diagnose=diagnostics,
        )

    return fn


def _low_memory_gramian(
    linear: Callable[[PyTree], PyTree],
    through_encoder: Callable[[list[Array]], PyTree],
    parts: Partition,
    rows_at_z: list[Array],
    structure: Any,
    axes: tuple[str, ...],
) -> Float[Array, "tasks tasks"]:
    """The Gramian over the encoder's parameters, one task gradient held at a time."""

    def row(leaves: list[Array]) -> Float[Array, "tasks"]:
        gradient = parts.without_rest(through_encoder(leaves))
        changes = structure.flatten_up_to(linear(gradient))
        return gramian_between(rows_at_z, [change[None] for change in changes], axes)[:, 0]

    products = jax.lax.map(row, rows_at_z)
    return (products + products.T) / 2
