"""The constructor that lifts methods written on the vector of K task losses to pytrees.

A method is written as its paper writes it, on vectors. What every method shares (names, dtypes,
missing tasks, values that are not finite, error messages) is held here, once.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtl_jax.arguments import check_function, read_array
from mtl_jax.base import Signal, Weighting
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
from mtl_jax.tasks import Losses, Tasks, Weights, read_mask, read_tasks, stack_tasks, unstack_tasks

VectorInit = Callable[[Tasks, Array | None], PyTree]
VectorUpdate = Callable[..., tuple[Float[Array, "tasks"], PyTree]]
VectorObserve = Callable[[Float[Array, "tasks"], PyTree, Bool[Array, "tasks"]], PyTree]


def vector_weighting(
    update: VectorUpdate,
    init: VectorInit = lambda tasks, key: (),
    *,
    observe: VectorObserve | None = None,
    needs: Signal = Signal.LOSSES,
) -> Weighting:
    """Make a :class:`Weighting` of functions written on the vector of K task losses.

    The functions see the losses of all K tasks as one vector of at least float32, cut from the
    gradient; the loss of an absent task reads 1, and only the entries of present tasks are used of
    what ``update`` returns. A method that has no answer returns NaN.

    Args:
      update: ``update(losses, state, present, steps) -> (weights, state)``, with ``present:
        bool[K]``, and ``steps: int32[K]``, for each task the earlier updates that it took part in.
        With ``needs=Signal.GRAMIAN`` it is called as ``update(losses, state, present, steps,
        gramian)``, with ``gramian: float[K, K]`` finite and 0 in rows and columns of absent tasks.
      init: ``init(tasks, key) -> state``, ``tasks`` being a :class:`Tasks`. In the state, an array
        of one or more dimensions is a statistic of the tasks, its leading axis being the task:
        the rows of absent tasks are kept as they were. A scalar is shared by the tasks.
      observe: ``observe(losses, state, present) -> state``, for a method that reads the losses
        after the step.
      needs: the signal that ``update`` reads.

    Returns:
      The weighting.

    Raises:
      ValueError: in ``update``, if the function of that name returns another number of weights than
        there are tasks, or a state unlike that of ``init``.
      TypeError: if a function is none, or ``needs`` not a :class:`Signal`; in ``init``, if an array
        of the state has not the tasks as its leading axis; in ``update``, if the function of that
        name does not return a pair.

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
    for name, function in (("update", update), ("init", init)):
        check_function(function, f"vector_weighting: `{name}`")
    if observe is not None:
        check_function(observe, "vector_weighting: `observe`")
    if not isinstance(needs, Signal):
        raise TypeError(f"vector_weighting: `needs` must be a mtl_jax.Signal, got {needs!r}.")

    @functools.cache
    def expected(tasks: Tasks, keyed: bool) -> Any:
        return shapes_of_state(functools.partial(init, tasks), tasks, keyed)

    def init_fn(losses: Losses, *, key: Array | None = None) -> WeightingState:
        tasks = read_tasks(losses)
        key = read_key(key)
        return initial_state(init(tasks, key), tasks)

    def read(
        losses: Losses, state: WeightingState, mask: PyTree | None
    ) -> tuple[Tasks, Float[Array, "tasks"], Bool[Array, "tasks"]]:
        tasks = read_tasks(losses)
        check_state(state, tasks, functools.partial(expected, tasks))
        present = read_mask(mask, tasks)
        vector = jax.lax.stop_gradient(stack_tasks(losses, tasks))
        return tasks, jnp.where(present, vector, 1), present

    def update_fn(
        losses: Losses,
        state: WeightingState,
        *,
        mask: PyTree | None = None,
        gramian: Float[Array, "tasks tasks"] | None = None,
    ) -> tuple[Weights, WeightingState]:
        tasks, vector, present = read(losses, state, mask)
        state = jax.tree.map(jnp.asarray, state)
        signals, readable = (), jnp.all(jnp.isfinite(vector))
        if needs is Signal.GRAMIAN:
            products = _read_gramian(gramian, tasks, present)
            finite = jnp.all(jnp.isfinite(products))
            # A method need not bear what is not finite: its answer is not used then.
            signals, readable = (jnp.where(finite, products, 0),), readable & finite
        output = update(vector, state.inner, present, state.steps, *signals)
        weights, inner = read_result(output, state.inner, "weights")
        weights = jax.lax.stop_gradient(_read_weights(weights, tasks))
        inner = keep_absent(inner, state.inner, present)
        valid = readable & jnp.all(jnp.isfinite(jnp.where(present, weights, 0))) & all_finite(inner)
        weights = jnp.where(present, jnp.where(valid, weights, jnp.nan), 0)
        new_state = tree_where(valid, next_state(inner, state, present), state)
        return unstack_tasks(weights, tasks), new_state

    def observe_fn(
        losses: Losses, state: WeightingState, *, mask: PyTree | None = None
    ) -> WeightingState:
        assert observe is not None
        _, vector, present = read(losses, state, mask)
        state = jax.tree.map(jnp.asarray, state)
        inner = observe(vector, state.inner, present)
        hint = "It must be as `init` made it."
        check_like(inner, state.inner, "The state that `observe` returned", hint)
        inner = keep_absent(jax.tree.map(jnp.asarray, inner), state.inner, present)
        valid = jnp.all(jnp.isfinite(vector)) & all_finite(inner)
        return tree_where(valid, WeightingState(state.steps, inner), state)

    return Weighting(
        init=init_fn,
        update=update_fn,
        needs=needs,
        observe=observe_fn if observe is not None else None,
    )


def _read_weights(weights: Any, tasks: Tasks) -> Float[Array, "tasks"]:
    """The weights that a method returned."""
    weights = read_array(weights, "What `update` returned as weights")
    if weights.shape != (tasks.number,) or jnp.issubdtype(weights.dtype, jnp.complexfloating):
        raise ValueError(
            f"`update` must return one real weight for each task, of shape {(tasks.number,)}; got "
            f"{weights.dtype}{list(weights.shape)}."
        )
    return weights


def _read_gramian(
    gramian: Float[Array, "tasks tasks"] | None, tasks: Tasks, present: Bool[Array, "tasks"]
) -> Float[Array, "tasks tasks"]:
    """The Gramian in the dtype of the method's arithmetic, 0 for absent tasks."""
    if gramian is None:
        raise ValueError(
            "This weighting reads the Gramian of the task gradients: use it through "
            "mtl_jax.value_and_grad or mtl_jax.representation_value_and_grad, or pass `gramian`."
        )
    gramian, shape = read_array(gramian, "The Gramian"), (tasks.number, tasks.number)
    if gramian.shape != shape or not jnp.issubdtype(gramian.dtype, jnp.floating):
        raise ValueError(
            f"The Gramian must be of real floating-point numbers and have shape {shape}, got "
            f"{gramian.dtype}{list(gramian.shape)}."
        )
    both = jnp.logical_and(present[:, None], present[None, :])
    return jnp.where(both, jax.lax.stop_gradient(gramian).astype(tasks.dtype), 0)
