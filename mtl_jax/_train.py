"""A jitted train step around a gradient of weighted losses and an optax optimizer."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32

from mtl_jax._base import MultiTaskGradient, MultiTaskValue
from mtl_jax._checks import (
    check_flags,
    check_functions,
    leaf_name,
    leaf_types,
    read_key,
)
from mtl_jax._jacobian import has_finite_norm
from mtl_jax._lift import tree_where
from mtl_jax._optimizers import check_optimizer, optimizer_update
from mtl_jax._tasks import read_mask, read_tasks
from mtl_jax._typing import PyTree


class TrainState(NamedTuple):
    """All that a training run carries from step to step; a pytree of arrays.

    Attributes:
      params: the parameters.
      opt_state: the optimizer's state.
      weighting_state: the weighting's state.
      step: the number of steps taken, skipped ones included.
      skipped: the number of steps whose update was not finite and was left out.
      model_state: what the network carries besides its parameters, such as batch statistics, or
        ``None``.
      rng: a ``jax.random.key``, from which every step draws its own, or ``None``.
    """

    params: PyTree
    opt_state: PyTree
    weighting_state: PyTree
    step: Int32[Array, ""]
    skipped: Int32[Array, ""]
    model_state: PyTree = None
    rng: Array | None = None


class TrainStepInitFn(Protocol):
    """``init(params, *args, model_state=None, rng=None, weighting_key=None) -> state``."""

    def __call__(
        self,
        params: PyTree,
        *args: Any,
        model_state: PyTree = None,
        rng: Array | None = None,
        weighting_key: Array | None = None,
    ) -> TrainState:
        """Return the state before the first step."""
        ...


class TrainStepUpdateFn(Protocol):
    """``update(state, *args, mask=None, second=None) -> (state, value)``."""

    def __call__(
        self,
        state: TrainState,
        *args: Any,
        mask: PyTree | None = None,
        second: tuple[Any, ...] | None = None,
    ) -> tuple[TrainState, MultiTaskValue]:
        """Return the next state, and the losses and weights of the step."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class TrainStep:
    """A train step: ``state = step.init(params, *args)``; ``state, value = step(state, *args)``.

    :func:`make_train_step` makes it. Calling it is calling ``update``.

    Attributes:
      init: ``init(params, *args, model_state=None, rng=None, weighting_key=None) -> state``: the
        :class:`TrainState` before the first step. ``args`` are those of a step, or their shapes
        (``jax.ShapeDtypeStruct``): the tasks are read off the losses of them, which are traced,
        not computed. ``model_state`` holds batch statistics and the like; ``rng`` is a key for
        the network's own randomness, such as dropout; ``weighting_key`` one for a weighting that
        draws random numbers. All are copied: no two leaves of the state share a buffer, nor one
        with an argument, so that a state can be donated.
      update: ``update(state, *args, mask=None, second=None) -> (state, value)``, jitted. ``second``
        holds the arguments of a second batch, as a tuple, for a weighting that reads one; the model
        state, and a key of its own, are put before them, too.

    Raises:
      ValueError: by ``init``: if there are no parameters; and as the weighting's ``init``, such as
        for a loss with two axes, or a missing key. By ``update``: as the gradient, and if
        the new model state has another structure than the old.
      TypeError: by ``init``: if a key is none, a parameter is not floating-point, or a leaf of the
        model state not an array. By ``update``: as the gradient, and if the state is not a
        :class:`TrainState`.
    """

    init: TrainStepInitFn
    update: TrainStepUpdateFn

    def __call__(
        self,
        state: TrainState,
        *args: Any,
        mask: PyTree | None = None,
        second: tuple[Any, ...] | None = None,
    ) -> tuple[TrainState, MultiTaskValue]:
        """Return the next state, and the losses and weights of the step."""
        leaf_types(mask, "The mask's leaf")
        return self.update(state, *args, mask=mask, second=second)


def make_train_step(
    gradient: MultiTaskGradient,
    optimizer: optax.GradientTransformation,
    *,
    new_model_state: Callable[[Any], PyTree] = lambda aux: aux,
    donate: bool = True,
) -> TrainStep:
    r"""Compile a train step: gradient, optimizer update, and what the weighting wants to observe.

    What the state carries is what the losses are computed from: the functions are called as
    ``losses_fn(params, *args)``, with ``model_state`` and then a fresh key put before ``args``
    where the state has a model state and an rng.

    A step is skipped if the weights, or the squared norm of the gradient or of the update, are not
    finite: parameters, optimizer, model and weighting keep their state, and ``skipped`` counts it.

    Any optax optimizer will do. One that takes extra arguments gets ``value``, the weighted sum of
    the losses of present tasks with the weights of the step; ``grad``, its gradient; ``value_fn``,
    from parameters to this sum, the weights held, as ``optax.lbfgs`` asks for (``obj_fn`` is the
    same, for ``optax.contrib.sophia``); and ``grad_fn``, from parameters to its gradient, as
    ``optax.contrib.sam`` does in its opaque mode. What asks for anything else is refused. An
    :class:`mtl_jax.Aggregator` has no weights, and ``groups`` have each their own: the sum is then
    the plain one, while ``grad`` is the combined gradient.

    For complex parameters the gradient is, as that of ``jax.grad``, the conjugate of the direction
    of steepest ascent. Optimizers that do not conjugate it themselves need ``optax.stateless(lambda
    updates, _: jax.tree.map(jnp.conj, updates))`` before them in an ``optax.chain``.

    Args:
      gradient: from :func:`mtl_jax.value_and_grad` or
        :func:`mtl_jax.representation_value_and_grad`. Where its weighting observes the losses
        after the step (:func:`mtl_jax.famo`), a step has one more forward pass, on the same batch
        with the same key.
      optimizer: the optax optimizer.
      new_model_state: selects the new model state from ``aux``; all of it by default. Used only
        where the state has a model state.
      donate: whether a step may reuse the buffers of the state that it is given, which must then
        not be used again, neither as the state nor as another argument. Without it a step needs
        memory for two states.

    Returns:
      The :class:`TrainStep`.

    Raises:
      TypeError: if ``gradient`` is no :class:`MultiTaskGradient`, or the optimizer or a function
        none.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import mtl_jax
      >>> def losses_fn(params, x):
      ...     return {"a": jnp.mean((params - x) ** 2), "b": jnp.mean((params + 1) ** 2)}
      >>> gradient = mtl_jax.value_and_grad(losses_fn, mtl_jax.adaptive())
      >>> step = mtl_jax.make_train_step(gradient, optax.sgd(0.1))
      >>> x = jnp.array([1.0, 2.0])
      >>> state = step.init(jnp.array(3.0), x)
      >>> for _ in range(20):
      ...     state, value = step(state, x)
      >>> print(f"{value.losses['a']:.2f} {value.losses['b']:.2f}, {int(state.skipped)} skipped")
      1.73 1.64, 0 skipped
    """
    if not isinstance(gradient, MultiTaskGradient):
        raise TypeError(
            "make_train_step: `gradient` must be what mtl_jax.value_and_grad or "
            f"mtl_jax.representation_value_and_grad returned, got {gradient!r}."
        )
    check_optimizer(optimizer, "make_train_step")
    check_functions("make_train_step", new_model_state=new_model_state)
    check_flags("make_train_step", donate=donate)

    def init(
        params: PyTree,
        *args: Any,
        model_state: PyTree = None,
        rng: Array | None = None,
        weighting_key: Array | None = None,
    ) -> TrainState:
        leaf_types(model_state, "The model state's leaf")
        if rng is not None:
            read_key(rng)
        context = _context(model_state, rng)
        weighting_state = gradient.init(params, *context, *args, key=weighting_key)
        leaf_types(params, "The parameter")
        zero = jnp.zeros((), jnp.int32)
        state = TrainState(
            params, optimizer.init(params), weighting_state, zero, zero, model_state, rng
        )
        # An optimizer's state may begin as the parameters, or hold an array of its own. And no weak
        # type must remain, which a step would lose: it would be compiled again.
        return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.result_type(leaf), copy=True), state)

    def update(
        state: TrainState,
        *args: Any,
        mask: PyTree | None = None,
        second: tuple[Any, ...] | None = None,
    ) -> tuple[TrainState, MultiTaskValue]:
        if not isinstance(state, TrainState):
            raise TypeError(
                f"Expected a TrainState, as `init` or a step returns it; got {type(state)}."
            )
        number = 2 if second is None else 3
        keys = [None] * 3 if state.rng is None else jax.random.split(state.rng, number)
        next_rng, step_rng = keys[:2]
        args = (*_context(state.model_state, step_rng), *args)
        if isinstance(second, tuple):  # what else it is, the gradient refuses
            second = (*_context(state.model_state, keys[2]), *second)
        value, grads, weighting_state = gradient.update(
            state.params, state.weighting_state, *args, mask=mask, second=second
        )
        model_state = None if state.model_state is None else new_model_state(value.aux)
        _check_model_state(model_state, state.model_state)

        # What line searches minimise: the weights are those of this step, and are held.
        def value_fn(params: PyTree) -> Array:
            return _weighted_sum(gradient.losses(params, *args), value.weights, mask)

        updates, opt_state = optimizer_update(
            optimizer,
            grads,
            state.opt_state,
            state.params,
            value=_weighted_sum(value.losses, value.weights, mask),
            value_fn=value_fn,
        )
        params = optax.apply_updates(state.params, updates)
        if gradient.observe is not None:
            weighting_state = gradient.observe(params, weighting_state, *args, mask=value.present)
        # The update, not the gradient alone: a step size of 1e30, or a division by a second moment
        # of 0, makes it infinite where the gradient is not. The gradient, too: an optimizer may
        # put it into its state and return a finite update all the same.
        finite = value.finite & has_finite_norm(updates, value.losses)
        new_state = TrainState(
            params,
            opt_state,
            weighting_state,
            jnp.asarray(optax.safe_increment(state.step)),
            state.skipped,
            model_state,
            next_rng,
        )
        skipped = state._replace(
            step=new_state.step, skipped=optax.safe_increment(state.skipped), rng=next_rng
        )
        # A select, not a branch: the update must be known before it can be tested.
        return tree_where(finite, new_state, skipped), value._replace(finite=finite)

    return TrainStep(init, jax.jit(update, donate_argnums=(0,) if donate else ()))


def _context(model_state: PyTree, rng: Array | None) -> tuple[Any, ...]:
    """What stands before the arguments of the losses."""
    return (*(() if model_state is None else (model_state,)), *(() if rng is None else (rng,)))


def _weighted_sum(losses: PyTree, weights: PyTree | None, mask: PyTree | None) -> Array:
    """The weighted sum of the losses of present tasks, if each has one weight, or the plain sum.

    An aggregator has no weights, and with groups there are several for a task.
    """
    tasks = read_tasks(losses)
    terms = tasks.stack(losses)
    if jax.tree.structure(weights) == tasks.structure:
        terms = terms * tasks.stack(weights)
    return jnp.sum(terms, where=read_mask(mask, tasks))


def _check_model_state(new: PyTree, old: PyTree) -> None:
    if jax.tree.structure(new) != jax.tree.structure(old):
        raise ValueError(
            "The new model state has another structure than the one in the state: "
            f"{jax.tree.structure(new)} instead of {jax.tree.structure(old)}. Return it as `aux` "
            "of the losses (has_aux=True), or select it from `aux` with new_model_state."
        )
    leaves = zip(jax.tree_util.tree_leaves_with_path(new), jax.tree.leaves(old), strict=True)
    for (path, new_leaf), old_leaf in leaves:
        new_type, old_type = (
            f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}" for leaf in (new_leaf, old_leaf)
        )
        if new_type != old_type:
            raise ValueError(
                f"The new model state's leaf {leaf_name(path)!r} is {new_type}; in the state it is "
                f"{old_type}."
            )
