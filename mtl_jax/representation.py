"""The Gramian at a representation, for about the price of plain training."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtl_jax.arguments import check_flag, check_function, check_option, leaf_type
from mtl_jax.base import Weighting
from mtl_jax.checks import check_weighting
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
    leaf_name,
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
Heads = Callable[..., Any]


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
              G_{ij} = \Big\langle \frac{\partial L_i}{\partial z},
                       \frac{\partial L_j}{\partial z} \Big\rangle, \qquad
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
        loss is not a scalar, z or the parameters are empty, the tasks are not those of the state,
        ``mask`` has another structure than the losses, an option is unknown, or ``shared`` selects
        nothing; inside ``shard_map``, if ``axis_name`` is missing or not an axis of it, the losses
        differ along that axis, or ``check_vma`` is False.
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
    tasks = _read_names(tasks)
    check_option(head_gradient, ("weighted", "unweighted"), "`head_gradient`")
    check_option(gramian, ("representation", "encoder"), "`gramian`")
    choose_rows(rows, number=1)

    def fn(
        params: PyTree, state: PyTree, *args: Any, mask: PyTree | None = None
    ) -> tuple[MultiTaskValue, PyTree, PyTree]:
        def encode(params: PyTree) -> tuple[PyTree, Any]:
            output = encoder(params, *args)
            z, aux = split_aux(output, "`encoder`", "z") if has_aux else (output, None)
            _check_representation(z)
            return z, aux

        def decode(params: PyTree, zs: dict[str, PyTree]) -> tuple[Losses, Any]:
            losses, aux = read_output(heads(params, zs, *args), has_aux, "`heads`")
            _check_tasks(losses, tasks)
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


def check_heads(
    heads: Heads, params: PyTree, z: PyTree, *args: Any, tasks: Sequence[str], has_aux: bool = False
) -> None:
    """Check that each task's loss depends on its own copy of the representation only.

    For a test of one's own heads, on values at which no derivative happens to vanish.

    Args:
      heads: as for :func:`mtl_jax.representation_value_and_grad`.
      params: the parameters.
      z: a representation, as the encoder returns it.
      *args: the further arguments of ``heads``.
      tasks: the tasks' names.
      has_aux: whether ``heads`` returns auxiliary output.

    Raises:
      ValueError: if the loss of a task changes with another one's copy; the message names both.
        And as :func:`mtl_jax.representation_value_and_grad`, for ``heads``, ``z``, ``tasks`` and
        losses that it cannot take.
      TypeError: as :func:`mtl_jax.representation_value_and_grad`.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_jax
      >>> def heads(params, zs):
      ...     return {"a": jnp.sum(zs["a"] ** 2), "b": jnp.sum(zs["a"] * zs["b"])}
      >>> mtl_jax.check_heads(heads, {}, jnp.ones(3), tasks=("a", "b"))
      Traceback (most recent call last):
      ...
      ValueError: The loss of 'b' depends on the representation of 'a'; each task must use its own.
    """
    check_function(heads, "check_heads: `heads`")
    check_flag(has_aux, "check_heads: `has_aux`")
    tasks = _read_names(tasks)
    _check_representation(z)

    def losses_fn(zs: dict[str, PyTree]) -> Losses:
        return read_output(heads(params, zs, *args), has_aux, "`heads`")[0]

    losses, pullback = jax.vjp(losses_fn, dict.fromkeys(tasks, z))
    _check_tasks(losses, tasks)
    for task in tasks:
        unit = {name: jnp.full_like(loss, name == task) for name, loss in losses.items()}
        (gradients,) = pullback(unit)
        for other in tasks:
            changes = any(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(gradients[other]))
            if other != task and changes:
                raise ValueError(
                    f"The loss of {task!r} depends on the representation of {other!r}; each task "
                    "must use its own."
                )


def _read_names(tasks: Sequence[str]) -> tuple[str, ...]:
    """The tasks' names, checked."""
    array = hasattr(tasks, "dtype")  # whose iterator may refuse to iterate
    if isinstance(tasks, str) or not isinstance(tasks, Iterable) or array:
        raise TypeError(f"`tasks` must be a sequence of names, got {tasks!r}.")
    tasks = tuple(tasks)
    for name in tasks:
        if not isinstance(name, str):
            raise TypeError(f"`tasks` must hold names, strings; got {name!r}.")
    if not tasks or len(set(tasks)) != len(tasks):
        raise ValueError(f"`tasks` must name at least one task, and none twice; got {tasks}.")
    return tasks


def _check_representation(z: PyTree) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(z)
    if not leaves:
        raise ValueError("The representation is empty: expected a pytree with at least one array.")
    for path, leaf in leaves:
        name = f"The representation's leaf {leaf_name(path)!r}"
        _, dtype = leaf_type(leaf, name)
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"{name} has dtype {dtype}, by which nothing can be differentiated. Let the heads "
                "compute it from their own arguments."
            )


def _check_tasks(losses: Losses, tasks: tuple[str, ...]) -> None:
    if not isinstance(losses, dict) or set(losses) != set(tasks):
        got = sorted(losses, key=str) if isinstance(losses, dict) else type(losses).__name__
        raise ValueError(
            f"`heads` must return a dictionary with the losses of the tasks {sorted(tasks)}, got "
            f"{got}."
        )
