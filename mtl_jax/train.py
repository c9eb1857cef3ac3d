"""A jitted train step around a gradient transform and an optax optimizer."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32

from mtl_jax.arguments import check_function, leaf_type
from mtl_jax.base import Aggregator, Weighting
from mtl_jax.checks import check_aggregator, check_optimizer, check_weighting, read_key
from mtl_jax.jacobian import Shared, shared_parameters
from mtl_jax.pytree import PyTree
from mtl_jax.tasks import Losses, leaf_name
from mtl_jax.weighing import GradientFn, MultiTaskValue, check_params, usable


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

    @classmethod
    def create(
        cls,
        params: PyTree,
        optimizer: optax.GradientTransformation,
        weighting: Weighting | Aggregator,
        losses: Losses,
        *,
        model_state: PyTree = None,
        rng: Array | None = None,
        weighting_key: Array | None = None,
        shared: Shared = None,
    ) -> "TrainState":
        """The state before the first step.

        Args:
          params: the parameters. They are copied, since a train step donates its state.
          optimizer: the optax optimizer.
          weighting: the weighting, or the aggregator.
          losses: the losses, or their structure: ``jax.eval_shape(losses_fn, params, ...)``.
          model_state: batch statistics and the like; copied.
          rng: a key for the network's own randomness, such as dropout; copied.
          weighting_key: a key for a weighting that draws random numbers.
          shared: for an aggregator, the parameters that it works on, as in
            :func:`mtl_jax.value_and_grad`.

        Returns:
          The state, none of whose buffers is shared.

        Raises:
          ValueError: if there are no parameters; and as the weighting's ``init``, such as for a
            loss that is not a scalar, or a missing key.
          TypeError: if the optimizer, the weighting or a key is none, a parameter is not
            floating-point, or a leaf of the model state not an array.
        """
        check_optimizer(optimizer, "TrainState.create")
        check_params(params)
        for path, leaf in jax.tree_util.tree_leaves_with_path(model_state):
            leaf_type(leaf, f"The model state's leaf {leaf_name(path)!r}")
        if rng is not None:
            read_key(rng)
        params, model_state, rng = jax.tree.map(jnp.copy, (params, model_state, rng))
        if isinstance(weighting, Aggregator):
            check_aggregator(weighting)
            selected = shared_parameters(params, shared)
            weighting_state = weighting.init(selected, losses, key=weighting_key)
        else:
            check_weighting(weighting)
            weighting_state = weighting.init(losses, key=weighting_key)
        return cls(
            params=params,
            opt_state=optimizer.init(params),
            weighting_state=weighting_state,
            step=jnp.zeros((), jnp.int32),
            skipped=jnp.zeros((), jnp.int32),
            model_state=model_state,
            rng=rng,
        )


class TrainStep(Protocol):
    """``train_step(state, *args, mask=None) -> (state, value)``."""

    def __call__(
        self, state: TrainState, *args: Any, mask: PyTree | None = None
    ) -> tuple[TrainState, MultiTaskValue]:
        """Return the next state, and the losses and weights of the step."""
        ...


def make_train_step(
    gradient_fn: GradientFn,
    optimizer: optax.GradientTransformation,
    weighting: Weighting | Aggregator,
    *,
    losses_fn: Callable[..., Losses] | None = None,
    new_model_state: Callable[[Any], PyTree] = lambda aux: aux,
) -> TrainStep:
    """Compile a train step: gradient, optimizer update, and what the weighting wants to observe.

    What the state carries is what the losses are computed from: the functions are called as
    ``losses_fn(params, *args)``, with ``model_state`` and then a fresh key put before ``args``
    where the state has a model state and an rng.

    A step is skipped if a weight or the squared norm of the gradient is not finite: parameters,
    optimizer, model and weighting keep their state, and ``skipped`` counts it.

    Args:
      gradient_fn: from :func:`mtl_jax.value_and_grad` or
        :func:`mtl_jax.representation_value_and_grad`.
      optimizer: the optax optimizer.
      weighting: the weighting, or the aggregator, that ``gradient_fn`` was made with.
      losses_fn: the losses alone (no ``aux``), for a weighting that observes the losses after the
        step (:func:`mtl_jax.famo`): one more forward pass, on the same batch with the same key.
      new_model_state: selects the new model state from ``aux``; all of it by default. Used only
        where the state has a model state.

    Returns:
      ``train_step(state, *args, mask=None) -> (state, value)``, jitted, with ``state`` donated: a
      :class:`TrainState` that was passed in must not be used again.

    Raises:
      ValueError: if the weighting observes and ``losses_fn`` is missing; when the step is traced,
        as ``gradient_fn``, and if the new model state has another structure than the old.
      TypeError: if the optimizer, the weighting or a function is none; when the step is traced, as
        ``gradient_fn``, and if the state is not a :class:`TrainState`.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import mtl_jax
      >>> def losses_fn(params, x):
      ...     return {"a": jnp.mean((params - x) ** 2), "b": jnp.mean((params + 1) ** 2)}
      >>> weighting, optimizer = mtl_jax.adaptive(), optax.sgd(0.1)
      >>> train_step = mtl_jax.make_train_step(
      ...     mtl_jax.value_and_grad(losses_fn, weighting), optimizer, weighting)
      >>> params, x = jnp.array(3.0), jnp.array([1.0, 2.0])
      >>> losses = jax.eval_shape(losses_fn, params, x)
      >>> state = mtl_jax.TrainState.create(params, optimizer, weighting, losses)
      >>> for _ in range(20):
      ...     state, value = train_step(state, x)
      >>> print(f"{value.losses['a']:.2f} {value.losses['b']:.2f}, {int(state.skipped)} skipped")
      1.73 1.64, 0 skipped
    """
    check_function(gradient_fn, "make_train_step: `gradient_fn`")
    check_optimizer(optimizer, "make_train_step")
    check_function(new_model_state, "make_train_step: `new_model_state`")
    if losses_fn is not None:
        check_function(losses_fn, "make_train_step: `losses_fn`")
    if isinstance(weighting, Aggregator):
        check_aggregator(weighting)
        observe = None
    else:
        check_weighting(weighting)
        observe = weighting.observe
    if observe is not None and losses_fn is None:
        raise ValueError(
            "This weighting observes the losses after the step: pass losses_fn, which returns "
            "them, to make_train_step."
        )

    def train_step(
        state: TrainState, *args: Any, mask: PyTree | None = None
    ) -> tuple[TrainState, MultiTaskValue]:
        if not isinstance(state, TrainState):
            raise TypeError(f"Expected a TrainState, got {type(state)}.")
        carries_model_state = state.model_state is not None
        next_rng, step_rng = (None, None) if state.rng is None else jax.random.split(state.rng)
        context = (state.model_state,) if carries_model_state else ()
        context += (step_rng,) if step_rng is not None else ()

        output = gradient_fn(state.params, state.weighting_state, *context, *args, mask=mask)
        value, gradient, weighting_state = _read_output(output)
        model_state = new_model_state(value.aux) if carries_model_state else None
        _check_model_state(model_state, state.model_state)

        def apply(
            state: TrainState, gradient: PyTree, model_state: PyTree, weighting_state: PyTree
        ) -> TrainState:
            updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            if observe is not None and losses_fn is not None:
                losses = losses_fn(params, *context, *args)
                weighting_state = observe(losses, weighting_state, mask=mask)
            return state._replace(
                params=params,
                opt_state=opt_state,
                model_state=model_state,
                weighting_state=weighting_state,
            )

        def skip(state: TrainState, *_: PyTree) -> TrainState:
            return state._replace(skipped=optax.safe_increment(state.skipped))

        state = jax.lax.cond(
            usable(gradient, value.weights, value.losses),
            apply,
            skip,
            state,
            gradient,
            model_state,
            weighting_state,
        )
        return state._replace(step=optax.safe_increment(state.step), rng=next_rng), value

    return jax.jit(train_step, donate_argnums=0)


def _read_output(output: Any) -> tuple[MultiTaskValue, PyTree, PyTree]:
    if (
        not isinstance(output, tuple)
        or len(output) != 3
        or not isinstance(output[0], MultiTaskValue)
    ):
        raise TypeError(
            "make_train_step: `gradient_fn` must return a MultiTaskValue, the gradient and the "
            f"weighting's state, as mtl_jax.value_and_grad's does; got {type(output)}."
        )
    return output


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
