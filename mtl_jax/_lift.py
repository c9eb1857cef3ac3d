"""The constructors: methods written on vectors, or on rows, lifted to pytrees of losses.

A method is written as its paper writes it. What every method shares (names, dtypes, missing tasks,
values that are not finite, error messages) is held here, once.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int32

from mtl_jax._base import OF_METHOD, Aggregator, Signal, VectorMethod, Weighting
from mtl_jax._checks import (
    check_flags,
    check_functions,
    is_key,
    leaf_name,
    leaf_type,
    leaf_types,
    read_array,
    read_key,
)
from mtl_jax._tasks import (
    Tasks,
    arithmetic_dtype,
    at_least_float32,
    describe,
    read_mask,
    read_tasks,
)
from mtl_jax._typing import Gramian, Losses, Mask, Products, PyTree, Vector, Weights


class WeightingState(NamedTuple):
    """The state of a weighting, or of an aggregator.

    Attributes:
      steps: for each task, the updates in which it was present and which were not skipped.
      inner: what the method itself carries.
      tasks: whose state it is; not an array, and the same for the whole training.
    """

    steps: Int32[Array, "tasks"]
    inner: PyTree
    tasks: Tasks


VectorInit = Callable[..., PyTree]
VectorUpdate = Callable[..., tuple[Vector, PyTree]]
VectorObserve = Callable[[Vector, PyTree, Mask], PyTree]
VectorDirections = Callable[[Any, Mask], tuple[Array, Vector | None]]
RowsInit = Callable[[PyTree, Tasks, Array | None], PyTree]
RowsUpdate = Callable[..., tuple[PyTree, PyTree]]


class Pairs(NamedTuple):
    """A number for each pair of tasks in the state of a method: both axes are the tasks.

    Attributes:
      values: the numbers. A pair of which a task is absent keeps its own.
    """

    values: Float[Array, "tasks tasks"]


def vector_weighting(
    update: VectorUpdate,
    init: VectorInit = lambda tasks, key, params=None: (),
    *,
    observe: VectorObserve | None = None,
    needs: Signal = Signal.LOSSES,
    due: Callable[[PyTree], Bool[Array, ""]] | None = None,
    reads_losses: bool = True,
    positive_losses: bool = False,
    directions: VectorDirections | None = None,
) -> Weighting:
    r"""Make a :class:`Weighting` of functions written on the vector of K task losses.

    The functions see the losses of all K tasks as one vector of at least float32, cut from the
    gradient; the loss of an absent task reads 1, and only the entries of present tasks are used of
    what ``update`` returns. A method that has no answer returns NaN.

    Args:
      update: ``update(losses, state, present, steps) -> (weights, state)``, with ``present:
        bool[K]``, and ``steps: int32[K]``, for each task the earlier updates that it took part in.
        It is called with a fifth argument where ``needs`` asks for one. For ``Signal.GRAMIAN``,
        ``gramian: float[K, K]``, finite and 0 in rows and columns of absent tasks. For
        ``Signal.TASK_GRADIENTS``, ``rows``, a pytree like the parameters, each leaf of at least
        float32 with the tasks as its leading axis, 0 for absent tasks. For ``Signal.SECOND_BATCH``,
        ``products: float[K, m]``, 0 in rows of absent tasks, as ``directions`` says.
      init: ``init(tasks, key) -> state``, ``tasks`` being a :class:`Tasks`; with
        ``Signal.TASK_GRADIENTS`` it is called as ``init(tasks, key, params)``. In the state, an
        array of one or more dimensions is a statistic of the tasks, its leading axis being the
        task: the rows of absent tasks are kept as they were. A matrix whose two axes are the tasks
        goes into :class:`mtl_jax.Pairs`. A scalar is shared by the tasks. All of it is finite: a
        running minimum begins at the largest number.
      observe: ``observe(losses, state, present) -> state``, for a method that reads the losses
        after the step.
      needs: the signal that ``update`` reads.
      due: ``due(state) -> bool``, for a method that reads its signal only now and then: whether it
        must be measured at this step. Where it need not, ``update`` is called with ``None`` for it;
        under ``vmap``, and with ``groups``, it is measured for all where it must be for one.
      reads_losses: whether ``update`` reads the losses. If it does not,
        :func:`mtl_jax.as_aggregator` does without them; nothing else depends on it.
      positive_losses: whether a loss of exactly 0 has no answer, or misleads what the method
        learns. :func:`mtl_jax.value_and_grad` and its like then leave the task out of the step, as
        if it had no labels; ``update`` itself is not changed by it.
      directions: with ``Signal.SECOND_BATCH`` ``directions(state, present) -> (combinations,
        step)``: which gradients are taken on the second batch. With ``combinations`` c of shape
        [m, K] and ``step`` s of shape [K], or ``None`` for 0, L the losses of the first batch and
        L' those of the second, ``update`` is given

        .. math:: p_{ki} = \left\langle \nabla L_k(\theta), \;
                  \nabla \sum_j c_{ij} L'_j \Big(\theta - \sum_l s_l \nabla L_l(\theta)\Big)
                  \right\rangle.

    Returns:
      The weighting.

    Raises:
      ValueError: if there are no ``directions`` where ``needs`` is ``Signal.SECOND_BATCH``, or are
        elsewhere; in ``update``, if the function of that name returns another number of weights
        than there are tasks, or a state unlike that of ``init``.
      TypeError: if a function is none, or ``needs`` not a :class:`Signal`; in ``init``, if an array
        of the state has not the tasks as its leading axis; in ``update``, if the function of that
        name, or ``directions``, does not return a pair.

    Example:
      Weights that grow with the task's loss, and sum to the number of tasks:

      >>> import jax.numpy as jnp
      >>> import mtl_jax
      >>> def update(losses, state, present, steps):
      ...     return losses / jnp.mean(losses, where=present), state
      >>> weighting = mtl_jax.vector_weighting(update)
      >>> weights, _ = weighting.update((1.0, 3.0), weighting.init((1.0, 3.0)))
      >>> [float(weight) for weight in weights]
      [0.5, 1.5]
    """
    optional = {"observe": observe, "due": due, "directions": directions}
    given = {name: function for name, function in optional.items() if function is not None}
    check_functions("vector_weighting", update=update, init=init, **given)
    check_flags("vector_weighting", reads_losses=reads_losses, positive_losses=positive_losses)
    if not isinstance(needs, Signal):
        raise TypeError(f"vector_weighting: `needs` must be a mtl_jax.Signal, got {needs!r}.")
    if (directions is not None) != (needs is Signal.SECOND_BATCH):
        raise ValueError(
            "vector_weighting: `directions` says which gradients are taken on the second batch: it "
            "goes with needs=mtl_jax.Signal.SECOND_BATCH, and this with it."
        )

    def init_fn(tasks: Tasks, key: Array | None, params: PyTree) -> WeightingState:
        extra = (params,) if needs is Signal.TASK_GRADIENTS else ()
        return _initial_state(init(tasks, key, *extra), tasks)

    def update_fn(
        losses: Vector, state: WeightingState, present: Mask, signal: PyTree
    ) -> tuple[Vector, WeightingState]:
        readable = all_finite((losses, signal))
        if needs is Signal.SECOND_BATCH and signal is not None:
            _check_products(signal, directions_fn(state, present)[0])
        if needs in (Signal.GRAMIAN, Signal.SECOND_BATCH) and signal is not None:
            # A method need not bear what is not finite: its answer is not used then.
            signal = jnp.where(readable, signal, 0)
        # The method runs whatever the losses are; whether its answer is used is decided below, so
        # that no branch is needed.
        extra = () if needs is Signal.LOSSES else (signal,)
        output = update(losses, state.inner, present, state.steps, *extra)
        weights, inner = _read_result(output, state.inner, "weights")
        weights = jax.lax.stop_gradient(_read_weights(weights, state.tasks))
        inner = _keep_absent(inner, state.inner, present)
        valid = readable & all_finite(inner)
        return accept(weights, _next_state(inner, state, present), state, present, valid)

    def directions_fn(state: WeightingState, present: Mask) -> tuple[Array, Vector | None]:
        assert directions is not None
        combinations, step = _read_directions(directions(state.inner, present), state.tasks)
        # Absent tasks have no gradient on the second batch, either.
        combinations = jnp.where(present[None], combinations, 0)
        return combinations, None if step is None else jnp.where(present, step, 0)

    def observe_fn(losses: Vector, state: WeightingState, present: Mask) -> WeightingState:
        assert observe is not None
        inner = observe(losses, state.inner, present)
        hint = "It must be as `init` made it."
        _check_like(inner, state.inner, "The state that `observe` returned", hint)
        inner = _keep_absent(jax.tree.map(jnp.asarray, inner), state.inner, present)
        return tree_where(all_finite((losses, inner)), state._replace(inner=inner), state)

    return lift(
        VectorMethod(
            init=init_fn,
            update=update_fn,
            observe=None if observe is None else observe_fn,
            due=None if due is None else lambda state: due(state.inner),
            needs=needs,
            reads_losses=reads_losses,
            positive_losses=positive_losses,
            directions=None if directions is None else directions_fn,
        )
    )


def accept(
    weights: Vector,
    new_state: WeightingState,
    state: WeightingState,
    present: Mask,
    valid: Bool[Array, ""] | bool = True,
) -> tuple[Vector, WeightingState]:
    """Weights of 0 for absent tasks and the new state; NaN and the old one if they are not valid.

    Args:
      weights: the weights.
      new_state: the state after the step.
      state: the state before it.
      present: which tasks are present.
      valid: what must hold besides that the weights are finite.
    """
    weights = jnp.where(present, weights, 0)
    valid = valid & all_finite(weights)
    weights = jnp.where(present & ~valid, jnp.nan, weights)
    return weights, tree_where(valid, new_state, state)


def lift(method: VectorMethod) -> Weighting:
    """The weighting on pytrees of a method on vectors.

    Outside ``jit`` its functions are programs, each compiled once for the structure and the dtypes
    of its arguments.
    """

    # One program for the life of the weighting: called outside `jit` it is compiled once for each
    # structure and dtype, called inside it becomes part of what is compiled there (`inline`).
    @functools.partial(jax.jit, static_argnums=0, inline=True)
    def update(
        tasks: Tasks, losses: Losses, state: PyTree, mask: PyTree | None, signal: PyTree
    ) -> tuple[Weights, WeightingState]:
        present = read_mask(mask, tasks)
        signal = read_signal(method.needs, signal, present, tasks)
        params = None if method.needs is not Signal.TASK_GRADIENTS else _without_tasks(signal)
        state = read_state(method, state, tasks, params)
        weights, state = method.update(read_losses(losses, present, tasks), state, present, signal)
        return tasks.unstack(weights), state

    @functools.partial(jax.jit, static_argnums=0, inline=True)
    def observe(tasks: Tasks, losses: Losses, state: PyTree, mask: PyTree | None) -> WeightingState:
        present = read_mask(mask, tasks)
        state = read_state(method, state, tasks)
        assert method.observe is not None
        return method.observe(read_losses(losses, present, tasks), state, present)

    def init_fn(
        losses: Losses, *, key: Array | None = None, params: PyTree | None = None
    ) -> WeightingState:
        tasks, key = read_tasks(losses), read_key(key)
        if method.needs is Signal.TASK_GRADIENTS:
            _check_real(params, "The parameter", abstract=True)
        return method.init(tasks, key, params)

    def update_fn(
        losses: Losses,
        state: PyTree,
        *,
        mask: PyTree | None = None,
        gramian: Gramian | None = None,
        task_gradients: PyTree | None = None,
        products: Products | None = None,
    ) -> tuple[Weights, WeightingState]:
        # What JAX itself would refuse, in words of its own, is refused before it sees it.
        tasks = _read_arguments(losses, state, mask)
        leaf_types(gramian, "The Gramian")
        leaf_types(products, "The products")
        signals = {
            Signal.GRAMIAN: gramian,
            Signal.TASK_GRADIENTS: task_gradients,
            Signal.SECOND_BATCH: products,
        }
        signal = signals.get(method.needs)
        leaf_types(signal, "The gradient")
        if signal is None and method.needs is not Signal.LOSSES and method.due is None:
            what, name = _SIGNALS[method.needs]
            raise ValueError(
                f"This weighting reads the {what}: use it through mtl_jax.value_and_grad or "
                f"mtl_jax.representation_value_and_grad, or pass `{name}`."
            )
        return update(tasks, losses, state, mask, signal)

    def observe_fn(losses: Losses, state: PyTree, *, mask: PyTree | None = None) -> WeightingState:
        return observe(_read_arguments(losses, state, mask), losses, state, mask)

    def due_fn(state: PyTree) -> Bool[Array, ""]:
        assert method.due is not None
        leaf_types(state, "The state's leaf")
        return method.due(read_state(method, state))

    for function in (init_fn, update_fn, observe_fn, due_fn):
        setattr(function, OF_METHOD, method)
    return Weighting(
        init=init_fn,
        update=update_fn,
        needs=method.needs,
        observe=None if method.observe is None else observe_fn,
        due=None if method.due is None else due_fn,
        method=method,
    )


def rows_aggregator(
    update: RowsUpdate,
    init: RowsInit = lambda params, tasks, key: (),
    *,
    reads_losses: bool = False,
    one_at_a_time: bool = False,
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
      one_at_a_time: whether a step is for one task alone, as in :class:`mtl_jax.Aggregator`.

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
    check_functions("rows_aggregator", update=update, init=init)
    check_flags("rows_aggregator", reads_losses=reads_losses, one_at_a_time=one_at_a_time)

    def initial(tasks: Tasks, key: Array | None, params: PyTree) -> WeightingState:
        return _initial_state(init(params, tasks, key), tasks)

    @functools.partial(jax.jit, static_argnums=0, inline=True)
    def program(
        tasks: Tasks, task_gradients: PyTree, state: PyTree, losses: Losses, mask: PyTree | None
    ) -> tuple[PyTree, WeightingState]:
        present = read_mask(mask, tasks)
        rows = read_signal(Signal.TASK_GRADIENTS, task_gradients, present, tasks)
        state = _read_state(initial, state, tasks, _without_tasks(task_gradients))
        vector = read_losses(losses, present, tasks)
        extra = (vector,) if reads_losses else ()
        output = update(rows, state.inner, present, state.steps, *extra)
        gradient, inner = _read_result(output, state.inner, "gradient")
        hint = "It must be like the parameters."
        like = _without_tasks(task_gradients)
        _check_like(gradient, like, "The gradient that `update` returned", hint)
        gradient, inner = jax.lax.stop_gradient((gradient, inner))
        inner = _keep_absent(inner, state.inner, present)
        valid = all_finite((rows, vector, gradient, inner))
        gradient = jax.tree.map(
            lambda leaf, one: jnp.where(valid, leaf, jnp.nan).astype(one.dtype), gradient, like
        )
        return gradient, tree_where(valid, _next_state(inner, state, present), state)

    def init_fn(params: PyTree, losses: Losses, *, key: Array | None = None) -> WeightingState:
        tasks = read_tasks(losses)
        _check_real(params, "The parameter", abstract=True)
        return initial(tasks, read_key(key), params)

    def update_fn(
        task_gradients: PyTree,
        state: PyTree,
        *,
        losses: Losses | None = None,
        mask: PyTree | None = None,
    ) -> tuple[PyTree, WeightingState]:
        if losses is None and reads_losses:
            raise ValueError("This aggregator reads the losses: pass `losses` to `update`.")
        _check_real(task_gradients, "The gradient")
        if losses is None:  # the state knows their names
            leaf_types(mask, "The mask's leaf")
            tasks = tasks_of(state)
            losses = tasks.unstack(tasks.full(1))
        else:
            tasks = _read_arguments(losses, state, mask)
        return program(tasks, task_gradients, state, losses, mask)

    return Aggregator(init_fn, update_fn, one_at_a_time)


def carry_over(old: PyTree, new: PyTree) -> PyTree:
    """Put what is known of the tasks that two states share into the new state.

    For tasks that are added, or left out, in the middle of a training. Tasks are told by their
    names; one that the old state does not know begins as in the new one. What a state holds of the
    settings of a method, such as a preference, is that of the old one for the tasks that both have.

    Args:
      old: the state of a weighting or an aggregator up to now; with ``groups`` of parameters the
        dictionary of them.
      new: the state that ``init`` of the same one makes for the new tasks. For a method whose
        state is like the parameters, they must be the same.

    Returns:
      The state to go on from.

    Raises:
      ValueError: if the states are not of the same weighting, or of other groups.
      TypeError: if one is no state of a weighting.

    Example:
      >>> import mtl_jax
      >>> weighting = mtl_jax.adaptive(decay=0.9)
      >>> state = weighting.init({"depth": 1.0})
      >>> _, state = weighting.update({"depth": 3.0}, state)
      >>> state = mtl_jax.carry_over(state, weighting.init({"depth": 1.0, "normals": 1.0}))
      >>> [round(float(average), 3) for average in state.inner.average]
      [3.0, 0.0]
    """
    if isinstance(old, dict) and isinstance(new, dict) and new:
        if set(old) != set(new):
            raise ValueError(
                f"The states are of other groups: {', '.join(map(str, old))}, and "
                f"{', '.join(map(str, new))}."
            )
        return {group: carry_over(old[group], new[group]) for group in new}
    known = tasks_of(old).names
    pairs = [(known.index(n), k) for k, n in enumerate(tasks_of(new).names) if n in known]
    rows, own_rows = np.array(pairs, np.int32).reshape(-1, 2).T

    def carried(old: Array | Pairs, new: Array | Pairs) -> Array | Pairs:
        if isinstance(old, Pairs) and isinstance(new, Pairs):
            values = old.values[np.ix_(rows, rows)]
            return Pairs(new.values.at[np.ix_(own_rows, own_rows)].set(values))
        old, new = jnp.asarray(old), jnp.asarray(new)
        if (old.ndim, old.dtype, old.shape[1:]) != (new.ndim, new.dtype, new.shape[1:]):
            raise ValueError(
                "The states are not of the same weighting: a leaf is "
                f"{old.dtype}{list(old.shape)} in the old one and {new.dtype}{list(new.shape)} in "
                "the new one. Make the new one with `init` of the same weighting."
            )
        return new.at[own_rows].set(old[rows]) if new.ndim else old

    leaves, structure = jax.tree.flatten(new, is_leaf=_is_pairs)
    old_leaves = jax.tree.leaves(old, is_leaf=_is_pairs)
    if len(old_leaves) != len(leaves):
        raise ValueError(
            f"The states are not of the same weighting: they have {len(old_leaves)} and "
            f"{len(leaves)} leaves. Make the new one with `init` of the same weighting."
        )
    found = [carried(*pair) for pair in zip(old_leaves, leaves, strict=True)]
    return jax.tree.unflatten(structure, found)


# What the lifted functions read


_SIGNALS = {
    Signal.GRAMIAN: ("Gramian of the task gradients", "gramian"),
    Signal.TASK_GRADIENTS: ("task gradients", "task_gradients"),
    Signal.SECOND_BATCH: ("products with gradients on a second batch", "products"),
}


def _read_arguments(losses: Losses, state: PyTree, mask: PyTree | None) -> Tasks:
    """The tasks; an error for a leaf of the arguments that JAX cannot take."""
    tasks = read_tasks(losses)
    leaf_types(losses, "The loss")
    leaf_types(state, "The state's leaf")
    leaf_types(mask, "The mask's leaf")
    return tasks


def read_losses(losses: Losses, present: Mask, tasks: Tasks) -> Vector:
    """The losses as a vector, cut from the gradient, 1 for absent tasks."""
    return jnp.where(present, jax.lax.stop_gradient(tasks.stack(losses)), 1)


def read_signal(needs: Signal, signal: PyTree, present: Mask, tasks: Tasks) -> PyTree:
    """The signal as a method reads it: at least float32, 0 for absent tasks."""
    if signal is None or needs is Signal.LOSSES:
        return None
    if needs is Signal.GRAMIAN:
        return _read_gramian(signal, present, tasks)
    if needs is Signal.SECOND_BATCH:
        return _read_products(signal, present, tasks)
    if leading_axis(signal) != tasks.number:
        raise ValueError(
            f"There are gradients of {leading_axis(signal)} tasks, but {tasks.number} losses: "
            f"{', '.join(tasks.names)}."
        )

    def read_row(leaf: Array) -> Array:
        leaf = jax.lax.stop_gradient(jnp.asarray(leaf))
        leaf = leaf.astype(at_least_float32(leaf.dtype))
        return jnp.where(for_each_task(present, leaf), leaf, 0)

    _check_real(signal, "The gradient")
    return jax.tree.map(read_row, signal)


def _read_gramian(gramian: PyTree, present: Mask, tasks: Tasks) -> Gramian:
    """The Gramian in the dtype of the method's arithmetic, 0 for absent tasks."""
    gramian, shape = read_array(gramian, "The Gramian"), (tasks.number, tasks.number)
    if gramian.shape != shape or not jnp.issubdtype(gramian.dtype, jnp.floating):
        raise ValueError(
            f"The Gramian must be of real floating-point numbers and have shape {shape}, got "
            f"{gramian.dtype}{list(gramian.shape)}."
        )
    both = jnp.logical_and(present[:, None], present[None, :])
    return jnp.where(both, jax.lax.stop_gradient(gramian).astype(tasks.dtype), 0)


def _read_products(products: PyTree, present: Mask, tasks: Tasks) -> Products:
    """The products in the dtype of the method's arithmetic, 0 for absent tasks."""
    products = read_array(products, "The products")
    real = jnp.issubdtype(products.dtype, jnp.floating)
    if products.ndim != 2 or products.shape[0] != tasks.number or not real:
        raise ValueError(
            "The products must be of real floating-point numbers and have the tasks "
            f"({tasks.number}) as the first of two axes, got "
            f"{products.dtype}{list(products.shape)}."
        )
    return jnp.where(present[:, None], jax.lax.stop_gradient(products).astype(tasks.dtype), 0)


def _read_directions(output: Any, tasks: Tasks) -> tuple[Array, Vector | None]:
    """What a method's `directions` returned, cut from the gradient."""
    if not isinstance(output, tuple) or len(output) != 2:
        raise TypeError(
            f"`directions` must return a pair (combinations, step), got {type(output).__name__}."
        )
    combinations, step = output
    combinations = read_array(combinations, "What `directions` returned as combinations")
    step = None if step is None else read_array(step, "What `directions` returned as step")
    for what, found, axes in (("combinations", combinations, 2), ("step", step, 1)):
        if found is None:
            continue
        real = jnp.issubdtype(found.dtype, jnp.floating)
        if found.ndim != axes or found.shape[-1] != tasks.number or not found.size or not real:
            raise ValueError(
                f"`directions` must return {what} of real floating-point numbers with the tasks "
                f"({tasks.number}) as the last of {axes} axes, got {found.dtype}"
                f"{list(found.shape)}."
            )
    return jax.lax.stop_gradient((combinations, step))


def _check_products(products: Products, combinations: Array) -> None:
    """Raise an error for products with another number of gradients than was asked for."""
    if products.shape[1] != combinations.shape[0]:
        raise ValueError(
            f"This weighting asks for {combinations.shape[0]} gradients on the second batch, the "
            f"products are with {products.shape[1]}."
        )


def _read_weights(weights: Any, tasks: Tasks) -> Vector:
    """The weights that a method returned."""
    weights = read_array(weights, "What `update` returned as weights")
    if weights.shape != (tasks.number,) or jnp.issubdtype(weights.dtype, jnp.complexfloating):
        raise ValueError(
            f"`update` must return one real weight for each task, of shape {(tasks.number,)}; got "
            f"{weights.dtype}{list(weights.shape)}."
        )
    return weights


def _read_result(output: Any, state: PyTree, returned: str) -> tuple[Any, PyTree]:
    """What a method's update returned, its state checked to be as the one before."""
    if not isinstance(output, tuple) or len(output) != 2:
        raise TypeError(
            f"`update` must return a pair ({returned}, state), got {type(output).__name__}."
        )
    result, inner = output
    _check_like(inner, state, "The state that `update` returned", "It must be as `init` made it.")
    return result, jax.tree.map(jnp.asarray, inner)


# States: by task, fresh, and kept where nothing was learned


def _initial_state(inner: PyTree, tasks: Tasks) -> WeightingState:
    """The state before the first step, its buffers fresh, its arrays checked to be by task."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(inner, is_leaf=_is_pairs):
        values = leaf.values if isinstance(leaf, Pairs) else leaf
        shape, _ = leaf_type(values, f"The state's leaf {leaf_name(path)!r}")
        if isinstance(leaf, Pairs) and shape != (tasks.number, tasks.number):
            raise TypeError(
                f"The state's leaf {leaf_name(path)!r} has shape {shape}: Pairs hold a number for "
                f"each pair of the {tasks.number} tasks."
            )
        if shape and shape[0] != tasks.number:
            raise TypeError(
                f"The state's leaf {leaf_name(path)!r} has shape {shape}: an array in a "
                f"weighting's state has the tasks ({tasks.number}) as its leading axis."
            )
    # Copies, so that no leaf aliases an argument, a constant or another leaf; and no weak types,
    # which a step would lose.
    inner = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.result_type(leaf), copy=True), inner)
    return WeightingState(jnp.zeros((tasks.number,), jnp.int32), inner, tasks)


def _next_state(inner: PyTree, state: WeightingState, present: Mask) -> WeightingState:
    """The state with another inner part, the step of the present tasks counted."""
    steps = jnp.where(present, optax.safe_increment(state.steps), state.steps)
    return state._replace(steps=steps, inner=inner)


def read_state(
    method: VectorMethod, state: Any, tasks: Tasks | None = None, params: PyTree = None
) -> WeightingState:
    """The state of a weighting, checked: for these tasks and parameters, if they are given."""
    tasks = tasks_of(state) if tasks is None else tasks
    unknown = method.needs is Signal.TASK_GRADIENTS and params is None
    return _read_state(None if unknown else method.init, state, tasks, params)


def _read_state(
    init: Callable[[Tasks, Array | None, PyTree], WeightingState] | None,
    state: Any,
    tasks: Tasks,
    params: PyTree = None,
) -> WeightingState:
    """The state, as arrays.

    Raises:
      TypeError: if it is no state of a weighting, or a leaf is no array.
      ValueError: if it is for other tasks, or not like the one that ``init`` makes for these.
    """
    known = tasks_of(state)
    if known != tasks:
        raise ValueError(
            f"The state was initialised for {known.number} tasks, but there are losses for "
            f"{tasks.number}: {', '.join(tasks.names)}. Call `init` with these losses. (The state "
            f"is for {describe(known.structure)}, the losses are {describe(tasks.structure)}.)"
        )
    if init is not None:

        def made(key: Any) -> WeightingState:
            return jax.eval_shape(lambda key, params: init(tasks, key, params), key, params)

        expected = made(jax.eval_shape(jax.random.key, 0))
        if jax.tree.structure(expected) != jax.tree.structure(state):
            keyed = any(is_key(leaf) for leaf in jax.tree.leaves(expected))
            # Whether there is a random key in it may be the user's choice.
            expected = made(None) if keyed else expected
        hint = "Pass the state that this weighting's `init` returned."
        _check_like(state, expected, "The weighting's state", hint)
    return jax.tree.map(jnp.asarray, state)


def tasks_of(state: Any) -> Tasks:
    """The tasks that a state is for."""
    if not isinstance(state, WeightingState) or not isinstance(state.tasks, Tasks):
        raise TypeError(
            f"Expected the state that this weighting's `init` returned, got {type(state)}."
        )
    return state.tasks


def next_in_turn(state: Any, tasks: Tasks, present: Mask) -> Mask:
    """Which of the present tasks has had the fewest steps, the first of them."""
    steps = _read_state(None, state, tasks).steps
    fewest = jnp.argmin(jnp.where(present, steps, jnp.iinfo(jnp.int32).max))
    return present & (jnp.arange(tasks.number) == fewest)


def _kind(dtype: Any) -> Any:
    """What dtypes have in common that may stand in for each other in a state."""
    kinds = (jnp.floating, jax.dtypes.prng_key)
    return next((kind for kind in kinds if jnp.issubdtype(dtype, kind)), dtype)


def _check_like(tree: PyTree, expected: PyTree, what: str, hint: str) -> None:
    """Raise an error for a tree whose structure, shapes or kinds of numbers are not as expected."""
    if jax.tree.structure(tree) != jax.tree.structure(expected):
        raise ValueError(f"{what} {_difference(tree, expected)}. {hint}")
    leaves = zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(expected), strict=True)
    for (path, leaf), like in leaves:
        name = f"{what}: the leaf {leaf_name(path)!r}"
        shape, dtype = leaf_type(leaf, name)
        if shape != like.shape or _kind(dtype) != _kind(like.dtype):
            raise ValueError(
                f"{name} is {dtype}{list(shape)} instead of {like.dtype}{list(like.shape)}. {hint}"
            )


def _difference(tree: PyTree, expected: PyTree) -> str:
    """In what the structures of two trees differ, in words: the first leaves, or their nodes."""
    found, wanted = (
        [leaf_name(path) or "itself" for path, _ in jax.tree_util.tree_leaves_with_path(each)]
        for each in (tree, expected)
    )
    missing = [name for name in wanted if name not in found]
    unknown = [name for name in found if name not in wanted]
    if not missing and not unknown:
        kinds = (describe(jax.tree.structure(each)) for each in (tree, expected))
        return "has the structure {} instead of {}".format(*kinds)
    said = [f"lacks the leaf {missing[0]!r}"] if missing else []
    return " and ".join(said + ([f"has an unknown leaf {unknown[0]!r}"] if unknown else []))


def _is_pairs(node: Any) -> bool:
    return isinstance(node, Pairs)


def _keep_absent(new: PyTree, old: PyTree, present: Mask) -> PyTree:
    """The new state, but with the rows, and the pairs, of absent tasks as they were."""

    def keep(new: Array | Pairs, old: Array | Pairs) -> Array | Pairs:
        if isinstance(old, Pairs):
            both = present[:, None] & present[None, :]
            return Pairs(tree_where(both, new, old).values)
        return tree_where(for_each_task(present, old), new, old) if old.ndim else new

    return jax.tree.map(keep, new, old, is_leaf=_is_pairs)


def tree_where(condition: Bool[Array, "..."], chosen: PyTree, otherwise: PyTree) -> PyTree:
    """``chosen`` where the condition holds, else ``otherwise``, in the dtypes of ``otherwise``."""
    return jax.tree.map(
        lambda new, old: jnp.where(condition, _cast(new, old.dtype), old),
        chosen,
        jax.tree.map(jnp.asarray, otherwise),
    )


def _cast(leaf: Array, dtype: Any) -> Array:
    leaf = jnp.asarray(leaf)
    return leaf if leaf.dtype == dtype else leaf.astype(dtype)


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether every floating-point number in the tree is finite."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return functools.reduce(
        jnp.logical_and, (jnp.all(jnp.isfinite(leaf)) for leaf in leaves), jnp.asarray(True)
    )


# Task gradients as rows: each leaf with the tasks as its leading axis


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


def mean_weight(weights: Vector, tasks: Mask) -> Float[Array, ""]:
    """The mean absolute weight of these tasks, 1 if there are none: for a task that has none."""
    total, number = jnp.sum(jnp.abs(weights), where=tasks), jnp.sum(tasks, dtype=weights.dtype)
    return jnp.where(number > 0, total / jnp.maximum(number, 1), 1)


def weighted_sum(weights: Vector, rows: PyTree) -> PyTree:
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


def _without_tasks(task_gradients: PyTree) -> PyTree:
    """The shapes of the parameters that task gradients are of; ``None`` for ``None``."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf)[1:], jnp.result_type(leaf)),
        task_gradients,
    )


def _check_real(tree: PyTree, what: str, *, abstract: bool = False) -> None:
    """Raise an error for parameters, or their gradients, that are not real."""
    hint = "; task gradients are combined as real floating-point numbers."
    leaf_types(tree, what, jnp.floating, hint, abstract=abstract)
