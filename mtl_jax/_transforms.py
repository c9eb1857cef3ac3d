"""From the losses of several tasks to one gradient: the weights are the cotangent."""

import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from mtl_jax._base import (
    Aggregator,
    MultiTaskGradient,
    MultiTaskValue,
    Signal,
    Weighting,
    check_weighting,
    reads_second_batch,
)
from mtl_jax._checks import (
    check_flags,
    check_functions,
    check_no_statistics,
    check_option,
    leaf_name,
    leaf_types,
    read_array,
    read_key,
)
from mtl_jax._diagnostics import diagnostics as diagnostics_of
from mtl_jax._jacobian import (
    AxisName,
    Groups,
    GroupsOf,
    ParameterJacobian,
    RepresentationJacobian,
    RowsMode,
    Shared,
    TaskJacobian,
    check_whole,
    choose_rows,
    each,
    has_finite_norm,
    nonzero_rows,
    read_axis_name,
    shared_parameters,
    stacked,
)
from mtl_jax._lift import (
    all_finite,
    mean_weight,
    next_in_turn,
    read_losses,
    read_signal,
    read_state,
    tree_where,
)
from mtl_jax._tasks import read_tasks
from mtl_jax._typing import Losses, Mask, PyTree, Vector

Encoder = Callable[..., Any]
Heads = Callable[..., Any]


def value_and_grad(
    losses_fn: Callable[..., Any],
    weighting: Weighting | Aggregator,
    *,
    has_aux: bool = False,
    shared: Shared = None,
    groups: GroupsOf = None,
    rows: RowsMode = "auto",
    leave_out_zero: bool = True,
    diagnostics: bool = False,
    axis_name: AxisName = None,
) -> MultiTaskGradient:
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
        ``(losses, aux)`` with ``has_aux``. A leaf of shape [n] is n tasks; mask, weights and what
        a method is given for each task then have this form, too.
      weighting: decides the weights; or an :class:`mtl_jax.Aggregator`, which combines the task
        gradients itself.
      has_aux: whether ``losses_fn`` returns auxiliary output.
      shared: the parameters whose gradients enter the Gramian, or the aggregator: a predicate on
        the path of a parameter, such as ``lambda path: path.startswith("encoder/")``, or a pytree
        of booleans like the parameters; all of them by default. The other parameters, the tasks'
        heads, get the gradient of the weighted sum of the losses, and with an aggregator, or with
        ``groups``, that of the plain sum.
      groups: the group of each of these parameters, if the method is to act on every group by
        itself, such as layer by layer: a function of the path of a parameter that returns a name,
        such as ``lambda path: path.split("/")[0]``, or a pytree of names like the parameters. Each
        group then has a Gramian, or task gradients, of its own, a state of its own, and its own
        weights, with which its part of the gradient is taken. The state, ``value.weights``,
        ``value.present``, ``value.gramian`` and ``value.diagnostics`` are dictionaries by the
        group's name. A task that has no gradient in a group is left out of its decision
        (``leave_out_zero``). The K backward passes are the same; a step of :func:`mtl_jax.every`
        that measures nothing takes as many as there are groups, or K if that is less. Not for a
        weighting that reads the losses alone, and not with ``rows="low_memory"``.
      rows: how the K task gradients, the rows of the Jacobian, are computed. ``"unrolled"``: one
        backward pass after the other, which XLA can see across. ``"map"``: in a loop. ``"vmap"``:
        all at once, with the memory for it. A number: so many at once, in a loop, with a memory
        between these two. ``"low_memory"``: in a loop that holds one of them, never all, for one
        forward derivative more each; not where the task gradients themselves are read. ``"auto"``:
        on CPU ``"unrolled"`` for up to 5 tasks and ``"map"`` for more, and so on several devices
        with Auto mesh axes; on other backends ``"vmap"``. On CPU the gradient of a convolution is
        slow inside a loop, so ``"unrolled"`` may be better there. For a weighting that reads a
        second batch ``"auto"`` finds the inner products by forward derivatives, and so without the
        task gradients, where the losses have them.
      leave_out_zero: whether a task that has nothing to say in a step is left out of its decision,
        as if it had no labels (``mask``): a task whose row of the measured Gramian, or whose task
        gradient, is exactly zero, or whose loss is, for a weighting that needs positive losses. So
        is a constraint that is satisfied, or a detector's loss of boxes in a batch without any.
        ``False`` keeps to the theory: a task with a zero gradient cannot be improved, and many
        methods then give it all the weight, which ends the training. A task that is left out has
        weight 0; where parameters outside the Gramian may still learn from it (``shared``), the
        mean absolute weight of the others, or 1 if there are none.
      diagnostics: whether to return the :class:`mtl_jax.Diagnostics` of the task gradients; then
        the Gramian is measured whatever the weighting reads, at every step at which it decides. At
        others they are 0 and ``value.measured`` is false.
      axis_name: inside ``jax.shard_map``, the mesh axis along which the batch is spread, or a tuple
        of several. ``losses_fn`` must return the losses of the whole batch there: it sums over the
        devices itself, since it knows how many labels each has. Under ``jit`` alone nothing need be
        said, however the arrays are sharded.

    Returns:
      The :class:`MultiTaskGradient`: ``gradient(params, state, *args, mask=None, second=None) ->
      (value, gradient, state)``, with ``init`` for the state. ``mask`` tells which tasks have
      labels in this batch (see :class:`Weighting`), ``second`` is the tuple of the arguments of a
      second batch for a weighting that reads one (``Signal.SECOND_BATCH``). If a loss, the signal
      or the squared norm of the gradient is not finite, the state is returned as it was, and
      ``value.finite`` is False.

    Raises:
      ValueError: if there are no losses or no parameters, a loss has two axes or more, the tasks
        are not the state's, ``mask`` has another structure than the losses, ``shared`` selects
        nothing, a second batch is missing or is not read, ``groups`` is given to a weighting that
        reads the losses alone or a second batch, ``rows`` is unknown, or is ``"low_memory"`` where
        task gradients are read or there are ``groups``; inside ``shard_map``, if ``axis_name`` is
        not an axis of it, the losses differ along that axis, an aggregator's parameters are spread
        over devices, or ``check_vma`` is False.
      TypeError: if ``losses_fn`` is not a function, ``weighting`` neither a :class:`Weighting` nor
        an aggregator, ``state`` not its state, a loss or a parameter not floating-point, a leaf of
        ``mask`` not one boolean, ``second`` not a tuple, the name of a group not a string, or
        ``losses_fn`` has no forward derivative and ``rows`` is ``"low_memory"``; if there are batch
        statistics of Flax among the parameters; or if ``losses_fn`` returns a pair of anything but
        scalars without ``has_aux``.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_jax
      >>> def losses_fn(params, x):
      ...     return {"a": jnp.mean((params - x) ** 2), "b": jnp.mean(jnp.abs(params + x))}
      >>> gradient = mtl_jax.value_and_grad(losses_fn, mtl_jax.equal())
      >>> params, x = jnp.array(3.0), jnp.array([1.0, 2.0])
      >>> state = gradient.init(params, x)
      >>> value, found, state = gradient(params, state, x)
      >>> float(found)
      4.0
    """
    check_functions("value_and_grad", losses_fn=losses_fn)
    check_flags(
        "value_and_grad", has_aux=has_aux, leave_out_zero=leave_out_zero, diagnostics=diagnostics
    )
    choose_rows(rows, number=1)
    if not isinstance(weighting, Aggregator):
        check_weighting(weighting)
    if rows == "low_memory" and _reads_rows(weighting):
        raise ValueError(
            "rows='low_memory' holds one task gradient at a time, and this weighting or aggregator "
            "reads all of them: choose rows='map'."
        )
    if groups is not None:
        _check_groups(weighting, rows)

    def losses(params: PyTree, *args: Any) -> tuple[Losses, Any]:
        return read_output(losses_fn(params, *args), has_aux, "`losses_fn`")

    def jacobian(params: PyTree, mask: PyTree | None, args: tuple[Any, ...]) -> TaskJacobian:
        return ParameterJacobian(
            lambda params: losses(params, *args),
            params,
            mask,
            shared=shared,
            groups=groups,
            rows=rows,
            axes=read_axis_name(axis_name),
            forward=reads_second_batch(weighting),
        )

    return _gradient(
        weighting, losses, jacobian, shared, groups, leave_out_zero, diagnostics, axis_name
    )


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
    leave_out_zero: bool = True,
    diagnostics: bool = False,
    axis_name: AxisName = None,
) -> MultiTaskGradient:
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
        dictionary, of any kind, with these tasks; with ``has_aux`` it returns ``(losses, aux)``. It
        gets the same whole ``params`` as the encoder. The loss of a task may depend on its own copy
        of z only: another one's gives wrong gradients without an error (:func:`check_heads` finds
        it).
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
      leave_out_zero: whether a task whose gradient at z is exactly zero is left out of the
        decision, as in :func:`mtl_jax.value_and_grad`; its head still learns.
      diagnostics: whether to return the :class:`mtl_jax.Diagnostics` of the gradients at z, as in
        :func:`mtl_jax.value_and_grad`.
      axis_name: inside ``jax.shard_map``, the mesh axis along which the batch is spread, or a tuple
        of several: the inner products of the gradients at z are summed over it. ``heads`` must
        return the losses of the whole batch, as in :func:`mtl_jax.value_and_grad`.

    Returns:
      The :class:`MultiTaskGradient`, as of :func:`mtl_jax.value_and_grad`; ``value.aux`` is
      ``(encoder_aux, heads_aux)``.

    Raises:
      ValueError: if ``tasks`` is empty or names one twice, the losses are not of these tasks, a
        loss is not a scalar, z or the parameters are empty, the tasks are not as many as the
        state's, ``mask`` has another structure than the losses, an option is unknown, or
        ``shared`` selects nothing; inside ``shard_map``, if ``axis_name`` is missing or not an
        axis of it, the losses differ along that axis, or ``check_vma`` is False.
      TypeError: if ``encoder`` or ``heads`` is not a function, ``tasks`` not a sequence of strings,
        ``state`` not the weighting's state, a loss, a parameter or a part of z not floating-point,
        a leaf of ``mask`` not one boolean, or ``weighting`` not a :class:`Weighting`, or one that
        reads the task gradients: those by the parameters, as an aggregator; if there are batch
        statistics of Flax among the parameters; if ``encoder`` has no forward derivative and
        ``rows`` is ``"low_memory"``; or if ``heads`` returns a pair without ``has_aux``.

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
      >>> gradient = mtl_jax.representation_value_and_grad(
      ...     encoder, heads, mtl_jax.upgrad(), tasks=("a", "b"))
      >>> state = gradient.init(params, x)
      >>> value, found, state = gradient(params, state, x)
      >>> found["encoder"].shape
      (3, 2)
    """
    where = "representation_value_and_grad"
    check_functions(where, encoder=encoder, heads=heads)
    check_flags(where, has_aux=has_aux, leave_out_zero=leave_out_zero, diagnostics=diagnostics)
    check_weighting(weighting)
    if _reads_rows(weighting) or reads_second_batch(weighting):
        raise TypeError(
            "This weighting reads the task gradients by the parameters: use it through "
            "mtl_jax.value_and_grad, with `shared`."
        )
    names = _read_names(tasks)
    check_option(head_gradient, ("weighted", "unweighted"), "`head_gradient`")
    check_option(gramian, ("representation", "encoder"), "`gramian`")
    choose_rows(rows, number=1)

    def encode(params: PyTree, *args: Any) -> tuple[PyTree, Any]:
        output = encoder(params, *args)
        z, aux = split_aux(output, "`encoder`", "z") if has_aux else (output, None)
        _check_representation(z)
        return z, aux

    def decode(params: PyTree, zs: dict[str, PyTree], *args: Any) -> tuple[Losses, Any]:
        losses, aux = read_output(heads(params, zs, *args), has_aux, "`heads`")
        _check_names(losses, names)
        return losses, aux

    def losses(params: PyTree, *args: Any) -> tuple[Losses, Any]:
        z, encoder_aux = encode(params, *args)
        losses, heads_aux = decode(params, dict.fromkeys(names, z), *args)
        return losses, (encoder_aux, heads_aux) if has_aux else None

    def jacobian(params: PyTree, mask: PyTree | None, args: tuple[Any, ...]) -> TaskJacobian:
        found = RepresentationJacobian(
            lambda params: encode(params, *args),
            lambda params, zs: decode(params, zs, *args),
            params,
            mask,
            names=names,
            head_gradient=head_gradient,
            over_encoder=gramian == "encoder",
            shared=shared,
            rows=rows,
            axes=read_axis_name(axis_name),
        )
        found.aux = found.aux if has_aux else None
        return found

    return _gradient(
        weighting, losses, jacobian, shared, None, leave_out_zero, diagnostics, axis_name
    )


# What both transforms do


def _reads_rows(weighting: Weighting | Aggregator) -> bool:
    return isinstance(weighting, Aggregator) or weighting.needs is Signal.TASK_GRADIENTS


def _check_second(weighting: Weighting | Aggregator, second: Any) -> None:
    """Raise an error for a second batch that is missing, or that nobody reads."""
    reads = reads_second_batch(weighting)
    if reads and second is None:
        raise ValueError(
            "This weighting reads a second batch: pass the arguments of the losses for it, as a "
            "tuple, such as second=(batch,)."
        )
    if second is not None and not reads:
        raise ValueError(
            "`second` is a second batch, which this weighting does not read: leave it out."
        )
    if second is not None and not isinstance(second, tuple):
        raise TypeError(
            "`second` must be the tuple of the further arguments of the losses, such as "
            f"second=(batch,); got {type(second).__name__}."
        )


def _check_groups(weighting: Weighting | Aggregator, rows: RowsMode) -> None:
    """Raise an error for what cannot be had group by group."""
    if not isinstance(weighting, Aggregator) and weighting.needs is Signal.LOSSES:
        raise ValueError(
            "`groups` is for what reads the Gramian or the task gradients: a weighting that reads "
            "the losses alone has the same weights in every group. Leave `groups` out."
        )
    if reads_second_batch(weighting):
        raise ValueError("`groups` is not for a weighting that reads a second batch: leave it out.")
    if rows == "low_memory":
        raise ValueError(
            "rows='low_memory' does not hold the task gradients of which `groups` takes the parts: "
            "choose rows='map', which holds all K of them."
        )


def _gradient(
    weighting: Weighting | Aggregator,
    losses_and_aux: Callable[..., tuple[Losses, Any]],
    jacobian: Callable[[PyTree, PyTree | None, tuple[Any, ...]], TaskJacobian],
    shared: Shared,
    groups: GroupsOf,
    leave_out_zero: bool,
    diagnose: bool,
    axis_name: AxisName,
) -> MultiTaskGradient:
    """The gradient of a weighting, or an aggregator, for a Jacobian."""

    def losses(params: PyTree, *args: Any) -> Losses:
        return losses_and_aux(params, *args)[0]

    def init(params: PyTree, *args: Any, key: Array | None = None) -> PyTree:
        _check_params(params, abstract=True)
        # Outside `shard_map` its axes are unknown to the losses, whose shapes do not depend on it.
        names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ())
        trace = jax.make_jaxpr(losses, axis_env=[(name, 1) for name in names], return_shape=True)
        try:
            _, shapes = trace(params, *args)
        except NameError as error:
            if "axis name" not in str(error):  # not JAX's, for an axis that is not there
                raise
            raise ValueError(
                f"The losses use a mesh axis that is unknown here: {error} Name it as `axis_name`, "
                "or make the state inside jax.shard_map."
            ) from error
        own = Groups.of(params, shared, groups)

        def start(key: Array | None, params: PyTree) -> PyTree:
            if isinstance(weighting, Aggregator):
                return weighting.init(params, shapes, key=key)
            if weighting.needs is Signal.TASK_GRADIENTS:
                return weighting.init(shapes, key=key, params=params)
            return weighting.init(shapes, key=key)

        keys = key
        if own is not None:
            number, key = len(own.names), read_key(key)
            keys = [None] * number if key is None else jax.random.split(key, number)
            keys = dict(zip(own.names, keys, strict=True))
        return each(own, start, keys, shared_parameters(params, shared, own))

    def update(
        params: PyTree,
        state: PyTree,
        *args: Any,
        mask: PyTree | None = None,
        second: tuple[Any, ...] | None = None,
    ) -> tuple[MultiTaskValue, PyTree, PyTree]:
        _check_params(params)
        _check_second(weighting, second)
        at = jacobian(params, mask, args)

        def there(params: PyTree) -> TaskJacobian:
            """The losses of the second batch."""
            assert second is not None
            return jacobian(params, mask, second)

        if isinstance(weighting, Aggregator):
            assert isinstance(at, ParameterJacobian)
            found = _aggregate(weighting, at, state, leave_out_zero, diagnose)
        else:
            found = _weigh(weighting, at, there, state, leave_out_zero, diagnose)
        weights, gramian, diagnosed = found.weights, found.gramian, None
        if gramian is not None and diagnose:
            diagnosed = each(at.groups, lambda own: diagnostics_of(own, at.present), gramian)
        value = MultiTaskValue(
            losses=at.losses,
            weights=None if weights is None else each(at.groups, at.tasks.unstack, weights),
            present=each(at.groups, at.tasks.unstack, found.present),
            finite=all_finite(weights) & has_finite_norm(found.gradient, at.losses),
            aux=at.aux,
            gramian=gramian,
            measured=None if gramian is None else found.measured,
            diagnostics=diagnosed,
        )
        return value, found.gradient, tree_where(value.finite, found.state, state)

    def observe(params: PyTree, state: PyTree, *args: Any, mask: PyTree | None = None) -> PyTree:
        assert isinstance(weighting, Weighting)
        function = weighting.observe
        assert function is not None
        after, own = losses(params, *args), Groups.of(params, shared, groups)
        masks = dict.fromkeys(own.names) if own is not None and mask is None else mask
        return each(own, lambda state, mask: function(after, state, mask=mask), state, masks)

    observes = isinstance(weighting, Weighting) and weighting.observe is not None
    return MultiTaskGradient(init, update, losses, observe if observes else None)


class _Found(NamedTuple):
    """What was decided in a step: the gradient, and what it was decided on.

    Weights, present tasks, state and Gramian are by group where there are groups.
    """

    weights: Any
    present: Any
    gradient: PyTree
    state: PyTree
    gramian: Any
    measured: Bool[Array, ""]


def _weigh(
    weighting: Weighting,
    at: TaskJacobian,
    second: Callable[[PyTree], TaskJacobian],
    state: PyTree,
    leave_out_zero: bool,
    diagnose: bool,
) -> _Found:
    """Decide the weights and take the gradient, measuring the signal only if it is needed."""
    method, needs, groups = weighting.method, weighting.needs, at.groups
    _check_grouped(state, groups)
    state = each(
        groups, lambda own, shared: read_state(method, own, at.tasks, shared), state, at.shared
    )
    losses = read_losses(at.losses, at.present, at.tasks)

    def measure() -> tuple[Any, Any, Any]:
        """The Gramian, if one is wanted, the rows, and what the method reads of the two."""
        if needs is Signal.SECOND_BATCH:
            assert isinstance(at, ParameterJacobian)
            assert method.directions is not None
            products, rows = at.products(second, *method.directions(state, at.present))
            check_whole(products, at.losses, "A parameter", _WHOLE_GRADIENTS)
            return at.measure()[0] if diagnose else None, rows, read(products)
        if needs is not Signal.TASK_GRADIENTS:
            gramian, rows = at.measure()
            check_whole(gramian, at.losses, "The Gramian", "Pass that axis as `axis_name`.")
            return gramian, rows, each(groups, read, gramian)
        assert isinstance(at, ParameterJacobian)
        rows = at.task_gradients()
        check_whole(rows, at.losses, "A parameter", _WHOLE_GRADIENTS)
        return at.gramian_of(rows) if diagnose else None, rows, each(groups, read, at.as_tree(rows))

    def read(signal: Any) -> Any:
        return read_signal(needs, signal, at.present, at.tasks)

    def decide(signal: Any, state: PyTree) -> tuple[Vector, Mask, PyTree]:
        """The weights, the tasks that they are decided on, and the new state."""
        if not leave_out_zero:
            weights, new_state = method.update(losses, state, at.present, signal)
            return weights, at.present, new_state
        deciding = at.present & (losses != 0) if method.positive_losses else at.present
        moving = deciding
        if signal is not None:
            silent = ~nonzero_rows(jax.tree.leaves(signal))
            # A task may have a gradient, and one that is orthogonal to those of a second batch.
            moving &= ~(silent & (losses == 0)) if needs is Signal.SECOND_BATCH else ~silent
            if method.positive_losses:  # a loss of 0 may have a gradient, which must not be seen
                signal = read_signal(needs, signal, moving, at.tasks)
        weights, new_state = method.update(jnp.where(moving, losses, 1), state, moving, signal)
        if signal is None or at.whole or groups is not None:
            return weights, moving, new_state
        # What does not enter the Gramian, such as a head whose last layer begins at zero, may well
        # have a gradient.
        usual = mean_weight(weights, moving)
        return jnp.where(deciding & ~moving, usual, weights), moving, new_state

    def decide_all(signal: Any) -> tuple[Any, Any, Any]:
        if groups is None:
            return decide(signal, state)
        return _decide_by_group(decide, signal, state, stacked=needs is Signal.GRAMIAN)

    always = jnp.asarray(True)
    if needs is Signal.LOSSES and not diagnose:
        weights, present, new_state = decide_all(None)
        return _Found(weights, present, at.pull_back(weights), new_state, None, always)
    if method.due is None:
        gramian, rows, signal = measure()
        weights, present, new_state = decide_all(signal)
        return _Found(weights, present, at.combine(weights, rows), new_state, gramian, always)

    shape = jax.eval_shape(lambda: measure()[0])

    def when_due() -> tuple[Any, ...]:
        gramian, _, signal = measure()
        return *decide_all(signal), gramian

    def otherwise() -> tuple[Any, ...]:
        zeros = jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), shape)
        return *decide_all(None), zeros

    # The rows do not leave the branch: the other one would have to hold as many zeros. So the
    # gradient takes a backward pass of its own, which is the only one in a step that is not due.
    by_group = [method.due(own) for own in ([state] if groups is None else state.values())]
    due = _any_due(functools.reduce(jnp.logical_or, by_group))
    weights, present, new_state, gramian = jax.lax.cond(due, when_due, otherwise)
    return _Found(weights, present, at.pull_back(weights), new_state, gramian, due)


def _check_grouped(state: PyTree, groups: Groups | None) -> None:
    """Raise an error for a state of other groups, if there are groups."""
    if groups is None or (isinstance(state, dict) and set(state) == set(groups.names)):
        return
    known = ", ".join(map(str, state)) if isinstance(state, dict) else "none"
    raise ValueError(
        f"With `groups` the state is a dictionary of the groups {', '.join(groups.names)}, as this "
        f"gradient's `init` returned it; the state has {known}."
    )


def _decide_by_group(
    decide: Callable[[Any, PyTree], tuple[Any, Any, Any]],
    signals: Any,
    states: dict[str, PyTree],
    *,
    stacked: bool,
) -> tuple[Any, Any, Any]:
    """The three results of a decision for every group, each by group.

    Args:
      decide: ``decide(signal, state)``, for one group.
      signals: the signals by group, or ``None``.
      states: the states by group.
      stacked: whether signals and states are of the same shapes in all groups. They are then taken
        together, so that the method is compiled once.
    """
    names = list(states)
    pairs = [(None if signals is None else signals[name], states[name]) for name in names]
    if stacked:
        together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *pairs)
        found = jax.vmap(decide)(*together)
        rows = map(operator.itemgetter, range(len(names)))
        results = [jax.tree.map(row, found) for row in rows]
    else:
        results = [decide(*pair) for pair in pairs]
    weights, present, new_states = (
        dict(zip(names, parts, strict=True)) for parts in zip(*results, strict=True)
    )
    return weights, present, new_states


_WHOLE_GRADIENTS = (
    "Task gradients must be whole where they are read: replicate the parameters in shard_map, or "
    "shard them under jit."
)


def _aggregate(
    aggregator: Aggregator,
    at: ParameterJacobian,
    state: PyTree,
    leave_out_zero: bool,
    diagnose: bool,
) -> _Found:
    """Combine the task gradients; what is not shared gets the gradient of the plain sum."""
    _check_grouped(state, at.groups)
    if aggregator.one_at_a_time:
        # A task whose gradient is zero has its turn like any other. All groups are at the same one.
        turns = state if at.groups is None else next(iter(state.values()))
        present = next_in_turn(turns, at.tasks, at.present)
        rows = stacked(at.task_gradients()) if diagnose else at.one_task_gradient(present)
    else:
        present, rows = at.present, stacked(at.task_gradients())
    check_whole(rows, at.losses, "A parameter", _WHOLE_GRADIENTS)

    def aggregate(rows: PyTree, state: PyTree) -> tuple[list[Array], Mask, PyTree]:
        moving = present
        if leave_out_zero and not aggregator.one_at_a_time:
            moving &= nonzero_rows(jax.tree.leaves(rows))
        combined, new_state = aggregator.update(
            rows, state, losses=at.losses, mask=at.tasks.unstack(moving)
        )
        return jax.tree.leaves(combined), moving, new_state

    if at.groups is None:
        combined, moving, new_state = aggregate(at.as_tree(rows), state)
    else:
        combined, moving, new_state = _decide_by_group(
            aggregate, at.as_tree(rows), state, stacked=False
        )
    gradient = at.with_rest(combined, present.astype(at.tasks.dtype))
    gramian = at.gramian_of(rows) if diagnose else None
    return _Found(None, moving, gradient, new_state, gramian, jnp.asarray(True))


def _any_due(due: Bool[Array, ""]) -> Bool[Array, ""]:
    """The identity; under ``vmap`` whether any of the batch is due, as one boolean.

    A ``cond`` on it remains a branch under ``vmap``, where one on a batched boolean would become a
    ``select`` that computes both sides.
    """

    @jax.custom_batching.custom_vmap
    def identity(due: Bool[Array, ""]) -> Bool[Array, ""]:
        return due

    @identity.def_vmap
    def any_of_batch(axis_size: int, in_batched: list[bool], due: Array) -> tuple[Array, bool]:
        return _any_due(jnp.any(due)), False  # which an outer `vmap` may have batched, too

    return identity(due)


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
    check_functions("check_heads", heads=heads)
    check_flags("check_heads", has_aux=has_aux)
    names = _read_names(tasks)
    _check_representation(z)
    leaf_types((params, args), "In the arguments of `heads`, the leaf")
    depends = _dependence(heads, names, has_aux, params, z, args)
    for task, row in zip(names, np.asarray(depends), strict=True):
        for other, found in zip(names, row, strict=True):
            if other != task and found:
                raise ValueError(
                    f"The loss of {task!r} depends on the representation of {other!r}; each task "
                    "must use its own."
                )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _dependence(
    heads: Heads,
    names: tuple[str, ...],
    has_aux: bool,
    params: PyTree,
    z: PyTree,
    args: tuple[Any, ...],
) -> Bool[Array, "tasks tasks"]:
    """Whether the loss of a task, by row, changes with the representation of one, by column."""

    def losses_fn(zs: dict[str, PyTree]) -> Losses:
        return read_output(heads(params, zs, *args), has_aux, "`heads`")[0]

    losses, pullback = jax.vjp(losses_fn, dict.fromkeys(names, z))
    _check_names(losses, names)
    rows = []
    leaves, structure = jax.tree.flatten(losses)  # of any kind of dictionary, in its order
    named = list(zip(read_tasks(losses).names, leaves, strict=True))
    for task in names:
        unit = [jnp.full_like(loss, name == task) for name, loss in named]
        (gradients,) = pullback(jax.tree.unflatten(structure, unit))
        by_leaf = [[jnp.any(g != 0) for g in jax.tree.leaves(gradients[name])] for name in names]
        rows.append(jnp.any(jnp.array(by_leaf), axis=1))
    return jnp.stack(rows)


# What the functions and arguments of a user must be


def _check_params(params: PyTree, *, abstract: bool = False) -> None:
    """Raise an error for no parameters, or for one that is not floating-point."""
    hint = ", by which nothing can be differentiated. Pass it to `losses_fn` as another argument."
    check_no_statistics(params)
    if not leaf_types(params, "The parameter", jnp.inexact, hint, abstract=abstract):
        raise ValueError("There are no parameters: expected a pytree with at least one array.")


def _check_representation(z: PyTree) -> None:
    """Raise an error for what is no pytree by which one can differentiate."""
    hint = (
        ", by which nothing can be differentiated. Let the heads compute it from their own "
        "arguments."
    )
    if not leaf_types(z, "The representation's leaf", jnp.inexact, hint):
        raise ValueError("The representation is empty: expected a pytree with at least one array.")


def _read_names(tasks: Sequence[str]) -> tuple[str, ...]:
    """The tasks' names, checked."""
    array = hasattr(tasks, "dtype")  # whose iterator may refuse to iterate
    if isinstance(tasks, str) or not isinstance(tasks, Iterable) or array:
        raise TypeError(f"`tasks` must be a sequence of names, got {tasks!r}.")
    names = tuple(tasks)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"`tasks` must hold names, strings; got {name!r}.")
    if not names or len(set(names)) != len(names):
        raise ValueError(f"`tasks` must name at least one task, and none twice; got {names}.")
    return names


def _check_names(losses: Losses, names: tuple[str, ...]) -> None:
    """Raise an error for losses that are not those of the tasks."""
    if not isinstance(losses, Mapping) or set(losses) != set(names):
        got = sorted(losses, key=str) if isinstance(losses, Mapping) else type(losses).__name__
        raise ValueError(
            f"`heads` must return a dictionary with the losses of the tasks {sorted(names)}, got "
            f"{got}."
        )
    for name, loss in losses.items():
        if jnp.ndim(loss):
            raise ValueError(
                f"The loss {name!r} has shape {jnp.shape(loss)}: at the representation, of which "
                "every task has its own copy, a task's loss is a scalar."
            )


def read_output(output: Any, has_aux: bool, name: str) -> tuple[Losses, Any]:
    """The losses, checked, as arrays, and the auxiliary output of the function of that name."""
    if not has_aux:
        _check_no_aux(output, name)
    losses, aux = split_aux(output, name, "losses") if has_aux else (output, None)
    tasks = read_tasks(losses)  # before the backward pass, for its error messages
    named = jax.tree_util.tree_leaves_with_path(losses)
    leaves = [read_array(leaf, f"The loss {leaf_name(path)!r}") for path, leaf in named]
    return jax.tree.unflatten(tasks.structure, leaves), aux


def _check_no_aux(output: Any, name: str) -> None:
    """Raise an error for what looks like losses with auxiliary output.

    A scalar in that would become a task without a word. Losses in two containers look alike, but
    can be returned in something else than a pair.
    """
    if type(output) is not tuple or len(output) != 2:
        return
    if not all(jax.tree_util.all_leaves([part]) and np.ndim(part) == 0 for part in output):
        raise TypeError(
            f"{name} returned a pair that is not of two scalars. Was has_aux=True forgotten, for "
            "(losses, aux)? If both parts hold losses, return them in a list or a dictionary."
        )


def split_aux(output: Any, name: str, what: str) -> tuple[Any, Any]:
    """The two parts of what a function with has_aux=True returned."""
    if not isinstance(output, tuple) or len(output) != 2:
        raise TypeError(
            f"With has_aux=True {name} must return a pair ({what}, aux), got "
            f"{type(output).__name__}."
        )
    return output
